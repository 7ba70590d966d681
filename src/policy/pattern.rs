use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use crate::oci::Reference;

/// Images that need no signature, by name: exact or as globs in which `*` stays within a segment and `**` crosses them.
///
/// A pattern without a tag or digest holds every image of the repositories whose `registry/repository` it matches. One with
/// a tag or a digest is compared with `registry/repository:tag`, `registry/repository@digest`, and the two together.
#[derive(Debug, Clone, Default)]
pub struct Patterns {
    names: GlobSet,
    references: GlobSet,
}

impl Patterns {
    /// # Errors
    /// A clause that says which pattern is wrong and why.
    pub fn parse(patterns: &[String]) -> Result<Self, String> {
        let (mut names, mut references) = (GlobSetBuilder::new(), GlobSetBuilder::new());
        for pattern in patterns {
            let text = canonical(pattern)?;
            let glob = GlobBuilder::new(&text)
                .literal_separator(true)
                .build()
                .map_err(|error| format!("\"{pattern}\" is no pattern: {}", error.kind()))?;
            if names_an_image(&text) {
                references.add(glob)
            } else {
                names.add(glob)
            };
        }
        let build = |set: GlobSetBuilder| set.build().map_err(|error| format!("the patterns together are too large: {error}"));
        Ok(Self { names: build(names)?, references: build(references)? })
    }

    /// Whether one of them holds this image.
    #[must_use]
    pub fn hold(&self, image: &Reference) -> bool {
        // Asked of every image by every policy, and most policies have none.
        if !self.names.is_empty() && self.names.is_match(image.name()) {
            return true;
        }
        if self.references.is_empty() {
            return false;
        }
        let tagged = Reference { digest: None, ..image.clone() };
        let pinned = Reference { tag: None, ..image.clone() };
        [image, &tagged, &pinned].iter().any(|form| self.references.is_match(form.to_string()))
    }
}

/// With its registry, as references are compared. A text without wildcards is read as every client reads it.
fn canonical(pattern: &str) -> Result<String, String> {
    const LONGEST: usize = 512;
    if pattern.len() > LONGEST {
        return Err("a pattern is longer than any reference".to_owned());
    }
    if !super::is_glob(pattern) {
        return pattern.parse().map(|image: Reference| image.to_string()).map_err(|error| format!("\"{pattern}\": {error}"));
    }
    let registry = pattern.split('/').next().unwrap_or_default();
    let has_registry = pattern.contains('/') && (registry == "localhost" || registry.contains(['.', ':', '*']));
    if has_registry || pattern == "**" {
        return Ok(pattern.to_owned());
    }
    Err(format!("\"{pattern}\" names no registry: begin with one, such as docker.io/library/, or write \"**\" for every image"))
}

fn names_an_image(pattern: &str) -> bool {
    pattern.contains('@') || pattern.rsplit('/').next().is_some_and(|last| last.contains(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(pattern: &str, image: &str) -> bool {
        Patterns::parse(&[pattern.to_owned()]).unwrap().hold(&image.parse().unwrap())
    }

    #[test]
    fn images_are_held_by_repository_by_tag_and_by_digest() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (pattern, image, expected) in [
            ("registry.k8s.io/**", "registry.k8s.io/pause:3.10".to_owned(), true),
            ("registry.k8s.io/*", "registry.k8s.io/coredns/coredns:1".to_owned(), false),
            ("registry.k8s.io/pause", format!("registry.k8s.io/pause:3@{digest}"), true),
            ("registry.k8s.io/pause:3", format!("registry.k8s.io/pause:3@{digest}"), true),
            ("registry.k8s.io/pause:3", "registry.k8s.io/pause:4".to_owned(), false),
            ("registry.k8s.io/pause:3*", "registry.k8s.io/pause:3.10".to_owned(), true),
            ("alpine", "docker.io/library/alpine:3.11".to_owned(), true),
            ("alpine", "registry.example.com/alpine".to_owned(), false),
            ("docker.io/library/*", "alpine".to_owned(), true),
            ("127.0.0.1:5000/team/*", "127.0.0.1:5000/team/app:1".to_owned(), true),
            ("**", "registry.example.com/any/thing:1".to_owned(), true),
        ] {
            assert_eq!(holds(pattern, &image), expected, "{pattern} {image}");
        }
        assert!(holds(&format!("r.example.com/app@{digest}"), &format!("r.example.com/app:1@{digest}")));
    }

    #[test]
    fn patterns_that_cannot_be_meant_are_refused() {
        for bad in ["", "a b", "alpine*", "team/*", "r.example.com/[", "R.example.com/App"] {
            assert!(Patterns::parse(&[bad.to_owned()]).is_err(), "{bad:?}");
        }
    }
}
