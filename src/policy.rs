//! What a namespace demands of the images that run in it: security policies, and which of them apply where.
//!
//! A [`Policy`] is plain data, however it was written down: a `[[policy]]` of the configuration, and whatever else an
//! administrator may keep policies in. [`Policies`] has them ready to be looked up.

mod pattern;

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use serde::{Deserialize, Serialize};

pub use self::pattern::Patterns;
use crate::signature::Format;

/// In these namespaces of these clusters only images run that these witnesses have signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    pub name: String,
    /// Each of them must have signed. At least one.
    pub witnesses: Vec<String>,
    /// Names of clusters or globs of them; empty: every cluster.
    #[serde(default)]
    pub clusters: Vec<String>,
    /// Names of namespaces or globs of them. At least one.
    pub namespaces: Vec<String>,
    /// A policy that is not enabled has no effect.
    #[serde(default)]
    pub enabled: bool,
    /// For people.
    #[serde(default)]
    pub note: String,
    #[serde(default)]
    pub mode: Mode,
    /// Only signatures in one of these count; empty: in any.
    #[serde(default)]
    pub formats: Vec<Format>,
    #[serde(default)]
    pub signed_as: SignedAs,
    /// Whether an image counts that is not signed itself, if the index that its tag names lists it and is signed.
    #[serde(default)]
    pub through_index: bool,
    /// Images that were built longer ago do not run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_age: Option<Duration>,
    #[serde(default)]
    pub tags: Tags,
    /// Images that this policy says nothing of, as [`Patterns`] has them.
    #[serde(default)]
    pub allow: Vec<String>,
}

/// What becomes of an image that does not meet a policy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Mode {
    /// It does not run.
    #[default]
    Enforce,
    /// It runs, and who asked for it is warned.
    Warn,
    /// It runs, and the cluster's audit log has it.
    Audit,
}

impl Mode {
    pub const ALL: [Self; 3] = [Self::Enforce, Self::Warn, Self::Audit];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Warn => "warn",
            Self::Audit => "audit",
        }
    }
}

/// Which name a signature must be for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum SignedAs {
    /// For this repository, and this tag if the image is used by one; or for the digest wherever it is (type `simple`).
    #[default]
    Name,
    /// For this repository and the tag that the image is used by, and nothing less.
    Tag,
    /// For the digest, whatever it was called when it was signed.
    Digest,
}

impl SignedAs {
    pub const ALL: [Self; 3] = [Self::Name, Self::Tag, Self::Digest];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Tag => "tag",
            Self::Digest => "digest",
        }
    }
}

/// What is made of an image that is used by a tag.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Tags {
    /// It does not meet the policy, even if signed: the tag can be moved.
    #[default]
    Deny,
    /// The mutating webhook pins it to the digest that verified.
    Resolve,
}

impl Tags {
    pub const ALL: [Self; 2] = [Self::Deny, Self::Resolve];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Deny => "deny",
            Self::Resolve => "resolve",
        }
    }
}

/// A policy that is in force in this cluster, with its patterns compiled.
#[derive(Debug)]
pub struct Bound {
    pub policy: Policy,
    pub allow: Patterns,
    /// Why it cannot be used, if it cannot: then no image meets it.
    pub refused: Option<Arc<str>>,
}

/// A policy that cannot be used. Until it can, nothing is admitted to its namespaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closed {
    pub name: String,
    /// Names of namespaces or globs of them, which have been parsed.
    pub namespaces: Vec<String>,
    pub reason: Arc<str>,
}

/// The policies that are in force in one cluster, by namespace. Finding those of a namespace costs what they are, not what
/// all are.
#[derive(Debug, Default)]
pub struct Policies {
    bound: Vec<Arc<Bound>>,
    exact: HashMap<String, Vec<usize>>,
    globs: GlobSet,
    /// For each glob of `globs`, whose it is.
    of_glob: Vec<usize>,
}

/// Why policies cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("policy {policy}: {problem}")]
    Pattern { policy: String, problem: String },
    #[error("the policies' patterns together are too large: {0}")]
    TooLarge(#[source] globset::Error),
    #[error(
        "policy {0} is for certain clusters, and it is not known which one this is: name it with `cluster` in [admission], or \
         with --cluster where a command takes it"
    )]
    NoCluster(String),
}

impl Policies {
    /// Takes those that are enabled and for this cluster.
    ///
    /// # Errors
    /// [`Error::NoCluster`] if an enabled policy is for certain clusters and `cluster` is none: it would silently not hold.
    pub fn new(policies: impl IntoIterator<Item = Policy>, cluster: Option<&str>) -> Result<Self, Error> {
        Self::with_closed(policies, [], cluster)
    }

    /// The same, and those that cannot be used.
    pub fn with_closed(
        policies: impl IntoIterator<Item = Policy>,
        closed: impl IntoIterator<Item = Closed>,
        cluster: Option<&str>,
    ) -> Result<Self, Error> {
        let mut this = Self::default();
        let mut globs = GlobSetBuilder::new();
        let closed = closed.into_iter().map(|closed| {
            let Closed { name, namespaces, reason } = closed;
            (Policy { namespaces, enabled: true, ..Policy::new(&name, "", "") }, Some(reason))
        });
        let usable = policies.into_iter().filter(|policy| policy.enabled).map(|policy| (policy, None));
        for (policy, refused) in usable.chain(closed) {
            let wrong = |problem| Error::Pattern { policy: policy.name.clone(), problem };
            if !policy.is_for(cluster)? {
                continue;
            }
            let index = this.bound.len();
            for namespace in &policy.namespaces {
                if is_glob(namespace) {
                    globs.add(glob(namespace).map_err(wrong)?);
                    this.of_glob.push(index);
                } else {
                    this.exact.entry(namespace.clone()).or_default().push(index);
                }
            }
            let allow = Patterns::parse(&policy.allow).map_err(wrong)?;
            this.bound.push(Arc::new(Bound { policy, allow, refused }));
        }
        this.globs = globs.build().map_err(Error::TooLarge)?;
        Ok(this)
    }

    /// Those that hold in this namespace, in the order they were given. Empty: nothing is demanded.
    #[must_use]
    pub fn of(&self, namespace: &str) -> Vec<Arc<Bound>> {
        let exact = self.exact.get(namespace).into_iter().flatten().copied();
        let mut found: Vec<usize> =
            exact.chain(self.globs.matches(namespace).into_iter().map(|glob| self.of_glob[glob])).collect();
        found.sort_unstable();
        found.dedup();
        found.into_iter().map(|index| self.bound[index].clone()).collect()
    }

    /// All that are in force here.
    #[must_use]
    pub fn all(&self) -> &[Arc<Bound>] {
        &self.bound
    }
}

/// Whether a name of a cluster or a namespace is a pattern of them.
#[must_use]
pub fn is_glob(text: &str) -> bool {
    text.contains(['*', '?', '[', ']', '{', '}'])
}

/// Reads a pattern of clusters or namespaces, in globset's syntax.
///
/// # Errors
/// A clause that says what is wrong with it.
pub fn glob(text: &str) -> Result<globset::Glob, String> {
    GlobBuilder::new(text).literal_separator(true).build().map_err(|error| error.kind().to_string())
}

fn any_holds(patterns: &[String], name: &str) -> Result<bool, String> {
    for pattern in patterns {
        if pattern == name || (is_glob(pattern) && glob(pattern)?.compile_matcher().is_match(name)) {
            return Ok(true);
        }
    }
    Ok(false)
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Policy {
    /// Whether it has a say in this cluster.
    ///
    /// # Errors
    /// [`Error::NoCluster`] if it is for certain clusters and `cluster` is none; [`Error::Pattern`].
    pub fn is_for(&self, cluster: Option<&str>) -> Result<bool, Error> {
        match cluster {
            _ if self.clusters.is_empty() => Ok(true),
            None => Err(Error::NoCluster(self.name.clone())),
            Some(cluster) => {
                any_holds(&self.clusters, cluster).map_err(|problem| Error::Pattern { policy: self.name.clone(), problem })
            }
        }
    }

    /// A policy that demands a signature of this witness in this namespace, and is as by default otherwise: not enabled.
    #[must_use]
    pub fn new(name: &str, witness: &str, namespace: &str) -> Self {
        Self {
            name: name.to_owned(),
            witnesses: vec![witness.to_owned()],
            clusters: vec![],
            namespaces: vec![namespace.to_owned()],
            enabled: false,
            note: String::new(),
            mode: Mode::default(),
            formats: vec![],
            signed_as: SignedAs::default(),
            through_index: false,
            max_age: None,
            tags: Tags::default(),
            allow: vec![],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(name: &str, clusters: &[&str], namespaces: &[&str]) -> Policy {
        let owned = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
        Policy { clusters: owned(clusters), namespaces: owned(namespaces), enabled: true, ..Policy::new(name, "release", "") }
    }

    fn names(policies: &Policies, namespace: &str) -> Vec<String> {
        policies.of(namespace).iter().map(|bound| bound.policy.name.clone()).collect()
    }

    #[test]
    fn every_policy_whose_cluster_and_namespace_hold_applies_and_each_once() {
        let policies = Policies::new(
            [
                policy("exact", &[], &["payments"]),
                policy("both", &["prod-eu"], &["payments", "pay*"]),
                policy("globs", &["prod-*"], &["pay*"]),
                policy("all", &[], &["*"]),
                policy("elsewhere", &["prod-us"], &["payments"]),
                Policy { enabled: false, ..policy("disabled", &[], &["payments"]) },
            ],
            Some("prod-eu"),
        )
        .unwrap();
        assert_eq!(names(&policies, "payments"), ["exact", "both", "globs", "all"]);
        assert_eq!(names(&policies, "paying"), ["both", "globs", "all"]);
        assert_eq!(names(&policies, "default"), ["all"]);
        assert_eq!(policies.all().len(), 4);
    }

    #[test]
    fn a_policy_for_a_cluster_is_not_silently_dropped_where_the_cluster_is_not_known() {
        let of_cluster = policy("payments", &["prod-eu"], &["payments"]);
        assert!(matches!(Policies::new([of_cluster.clone()], None), Err(Error::NoCluster(name)) if name == "payments"));
        let disabled = Policy { enabled: false, ..of_cluster };
        assert!(Policies::new([disabled], None).unwrap().of("payments").is_empty());
    }

    #[test]
    fn a_policy_that_cannot_be_used_closes_its_namespaces_beside_those_that_can() {
        let closed = Closed { name: "broken".into(), namespaces: vec!["pay*".into(), "shop".into()], reason: "why".into() };
        let policies = Policies::with_closed([policy("good", &[], &["payments"])], [closed], None).unwrap();
        assert_eq!(names(&policies, "payments"), ["good", "broken"]);
        assert_eq!(names(&policies, "shop"), ["broken"]);
        assert_eq!(names(&policies, "other"), [""; 0]);
        assert_eq!(policies.of("shop")[0].refused.as_deref(), Some("why"));
        assert_eq!(policies.of("shop")[0].policy.mode, Mode::Enforce);
    }

    #[test]
    fn finding_the_policies_of_a_namespace_does_not_look_at_the_others() {
        let policies =
            Policies::new((0..10_000).map(|n| policy(&n.to_string(), &[], &[&format!("team-{n}")])), Some("c")).unwrap();
        assert_eq!(names(&policies, "team-77"), ["77"]);
    }
}
