//! Image references, as people and clients write them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{Digest, ParseError, RegistryName, Repository, Tag};

/// An image reference, normalised: `registry/repository[:tag][@digest]`.
///
/// A text without a host belongs to Docker Hub, and there a single component belongs to `library/`, as every client has it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    pub registry: RegistryName,
    pub repository: Repository,
    pub tag: Option<Tag>,
    pub digest: Option<Digest>,
}

impl Reference {
    /// `registry/repository:tag`, what a client types to pull.
    #[must_use]
    pub fn tagged(registry: &RegistryName, repository: &Repository, tag: &Tag) -> Self {
        Self { registry: registry.clone(), repository: repository.clone(), tag: Some(tag.clone()), digest: None }
    }

    /// `registry/repository@digest`, which means one manifest for ever.
    #[must_use]
    pub fn pinned(registry: &RegistryName, repository: &Repository, digest: &Digest) -> Self {
        Self { registry: registry.clone(), repository: repository.clone(), tag: None, digest: Some(digest.clone()) }
    }

    /// `registry/repository`, without tag and digest.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Reference {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse()?)),
            None => (text, None),
        };
        // A colon after the last slash begins a tag; one before it is a port.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag.parse()?)),
            _ => (rest, None),
        };
        let (registry, path) = match name.split_once('/') {
            Some((host, path)) if host.contains(['.', ':']) || host == "localhost" => (host.parse()?, path.to_owned()),
            _ => (RegistryName::docker_hub(), name.to_owned()),
        };
        let path = if registry == RegistryName::docker_hub() && !path.contains('/') { format!("library/{path}") } else { path };
        Ok(Self { registry, repository: path.parse()?, tag, digest })
    }
}

impl Serialize for Reference {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Reference {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: &str = "sha256:e9b028cb7b49c4dae3dc661c2e147f3d78b9b4d1165c406256db92f18d4a0454";

    #[test]
    fn references_are_normalised_as_clients_do() {
        let long = format!("[::1]:5000/a/b@{D}");
        for (text, normal) in [
            ("app", "docker.io/library/app"),
            ("app:1", "docker.io/library/app:1"),
            ("index.docker.io/library/app:1", "docker.io/library/app:1"),
            ("Index.Docker.io/app:1", "docker.io/library/app:1"),
            ("team/app:1", "docker.io/team/app:1"),
            ("localhost/app", "localhost/app"),
            ("LOCALHOST:5000/app", "localhost:5000/app"),
            ("registry.example.com:5000/a/b/c:v1.0", "registry.example.com:5000/a/b/c:v1.0"),
            (long.as_str(), long.as_str()),
        ] {
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), normal, "{text}");
        }
        for bad in [
            "",
            "a b",
            "http://x.com/a",
            "x.com/",
            "x.com/A",
            "x.com/a:",
            "x.com/a@sha256:12",
            "x.com:99999/a",
            "a//b",
            "../a",
            "x.com/a/../b",
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad} must not parse");
        }
    }
}
