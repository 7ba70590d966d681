//! Which signing rules match an image, and why the others do not.
//!
//! A registry can have ten thousand rules, one a team; looking up must cost what one does. Rules are therefore kept in
//! a tree of path segments: a namespace hangs at its own place, a glob where its literal beginning ends, and an event
//! meets only what lies on its repository's path.

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use globset::{Glob, GlobBuilder, GlobMatcher, GlobSet, GlobSetBuilder};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    kms::Algorithm,
    oci::{RegistryName, Repository, Tag},
    outcome::Skip,
    signature::Format,
    witness::Witness,
};

/// What is signed, by whom, and how: one `[[rule]]` of the configuration.
#[derive(Debug, Clone)]
pub struct Rule {
    pub name: String,
    /// Only images of this registry; every configured one if absent.
    pub registry: Option<RegistryName>,
    pub scope: Scope,
    pub exclude: Vec<Scope>,
    /// Only these tags; every one if absent.
    pub tags: Option<TagFilter>,
    /// Images that were pushed before this are not signed ("new images only").
    pub created: Option<Timestamp>,
    pub witness: String,
    pub algorithm: Algorithm,
    pub signature_type: SignatureType,
    pub trigger: Trigger,
    /// How each signature is written: every way, side by side.
    pub formats: Vec<Format>,
    /// How long signatures of notation's formats count; None: as long as their certificate.
    pub expiry: Option<Duration>,
    /// Whether what is pushed by digest alone is signed too.
    pub untagged: bool,
    pub enabled: bool,
}

/// What a signature says besides the digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SignatureType {
    /// The digest and the tag: `host/repository:tag`.
    Default,
    /// The digest alone: `host/repository@digest`, for images that are replicated under other tags.
    Simple,
}

/// What sets a rule off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trigger {
    /// Every push.
    Automatic,
    /// Only `countersign sign`.
    Manual,
}

impl SignatureType {
    /// The word in the configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Simple => "simple",
        }
    }
}

impl Trigger {
    /// The word in the configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Automatic => "automatic",
            Self::Manual => "manual",
        }
    }
}

/// A set of repositories: a namespace with all below it, or a glob over the whole repository name.
#[derive(Clone)]
pub enum Scope {
    /// `production`: the repository `production` and all of `production/**`.
    Namespace(Repository),
    /// `team-*/apps/**`: `*` stays within one path segment, `**` crosses them.
    Glob(GlobMatcher),
}

impl Scope {
    /// # Errors
    /// A sentence that says what is wrong with the text.
    pub fn parse(text: &str) -> Result<Self, String> {
        if !text.contains(['*', '?', '[', '{']) {
            let trimmed = text.strip_suffix('/').unwrap_or(text);
            return trimmed.parse().map(Self::Namespace).map_err(|error: crate::oci::ParseError| error.to_string());
        }
        if text.starts_with('/') {
            return Err(format!("{text:?} begins with a slash; repository names do not"));
        }
        glob(text, true).map(|glob| Self::Glob(glob.compile_matcher()))
    }

    /// The text as configured.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Namespace(namespace) => namespace.as_str(),
            Self::Glob(glob) => glob.glob().glob(),
        }
    }

    #[must_use]
    pub fn contains(&self, repository: &Repository) -> bool {
        match self {
            Self::Namespace(namespace) => {
                repository.as_str().strip_prefix(namespace.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            Self::Glob(glob) => glob.is_match(repository.as_str()),
        }
    }

    /// The leading path segments that hold no pattern.
    fn literal_segments(&self) -> Vec<&str> {
        let text = self.as_str();
        match self {
            Self::Namespace(_) => text.split('/').collect(),
            Self::Glob(_) => {
                // The last segment is never part of the way: a glob hangs above what it matches.
                let mut segments: Vec<_> = text.split('/').collect();
                segments.pop();
                segments.into_iter().take_while(|segment| !segment.contains(['*', '?', '[', ']', '{', '}', '\\', ','])).collect()
            }
        }
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl PartialEq for Scope {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

/// The tags that a rule signs: exact ones and globs.
#[derive(Clone)]
pub struct TagFilter {
    patterns: Vec<String>,
    set: GlobSet,
}

impl TagFilter {
    /// # Errors
    /// A sentence that says which pattern is wrong, and how.
    pub fn parse<S: AsRef<str>>(patterns: &[S]) -> Result<Self, String> {
        let patterns: Vec<String> = patterns.iter().map(|pattern| pattern.as_ref().to_owned()).collect();
        let mut set = GlobSetBuilder::new();
        for pattern in &patterns {
            set.add(glob(pattern, false)?);
        }
        let set = set.build().map_err(|error| error.to_string())?;
        Ok(Self { patterns, set })
    }

    #[must_use]
    pub fn patterns(&self) -> &[String] {
        &self.patterns
    }

    #[must_use]
    pub fn contains(&self, tag: &Tag) -> bool {
        self.set.is_match(tag.as_str())
    }
}

impl fmt::Debug for TagFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.patterns.fmt(f)
    }
}

impl PartialEq for TagFilter {
    fn eq(&self, other: &Self) -> bool {
        self.patterns == other.patterns
    }
}

fn glob(text: &str, path: bool) -> Result<Glob, String> {
    GlobBuilder::new(text).literal_separator(path).build().map_err(|error| format!("{text:?} is not a glob: {}", error.kind()))
}

/// What asks for signatures.
#[derive(Debug, Clone, Copy)]
pub struct Occasion<'a> {
    pub registry: &'a RegistryName,
    pub repository: &'a Repository,
    pub tag: Option<&'a Tag>,
    pub pushed_at: Timestamp,
    /// `Manual` is an administrator's word: it sets off every rule, also for images older than the rule.
    pub trigger: Trigger,
}

/// The rules whose scope holds an image, by whether they sign it.
#[derive(Debug, Default)]
pub struct Matches {
    pub matched: Vec<Arc<Rule>>,
    pub skipped: Vec<(Arc<Rule>, Skip)>,
}

impl Matches {
    /// Why nothing is signed, when nothing matched: the reason of the rule that came closest.
    #[must_use]
    pub fn reason(&self) -> Skip {
        // Later checks are reached only by rules that passed the earlier ones, so the greatest is the closest.
        self.skipped.iter().map(|(_, skip)| *skip).max_by_key(|skip| closeness(*skip)).unwrap_or(Skip::NoRule)
    }
}

fn closeness(skip: Skip) -> u8 {
    match skip {
        Skip::NoRule => 0,
        Skip::Disabled => 1,
        Skip::Excluded => 2,
        Skip::ManualOnly => 3,
        Skip::Untagged => 4,
        Skip::TagNotMatched => 5,
        Skip::BeforeRule => 6,
        Skip::UnsupportedDigest | Skip::Superseded | Skip::NotFound | Skip::Attachment => 7,
    }
}

impl Rule {
    /// Whether this witness has all that the rule's formats need.
    #[must_use]
    pub fn is_served_by(&self, witness: &Witness) -> bool {
        let needs_certificate = self.formats.iter().any(|format| format.envelope().is_some());
        !needs_certificate || !witness.certificates().is_empty()
    }

    /// Why this rule, whose scope holds the repository, does not sign.
    fn objection(&self, occasion: &Occasion<'_>) -> Option<Skip> {
        let manual = occasion.trigger == Trigger::Manual;
        if !self.enabled {
            return Some(Skip::Disabled);
        }
        if self.exclude.iter().any(|scope| scope.contains(occasion.repository)) {
            return Some(Skip::Excluded);
        }
        if self.trigger == Trigger::Manual && !manual {
            return Some(Skip::ManualOnly);
        }
        match occasion.tag {
            None if !self.untagged && !manual => return Some(Skip::Untagged),
            None if self.tags.is_some() => return Some(Skip::TagNotMatched),
            Some(tag) if self.tags.as_ref().is_some_and(|tags| !tags.contains(tag)) => return Some(Skip::TagNotMatched),
            _ => {}
        }
        if !manual && self.created.is_some_and(|created| occasion.pushed_at < created) {
            return Some(Skip::BeforeRule);
        }
        None
    }
}

/// All rules, ready to be looked up.
#[derive(Debug, Default)]
pub struct Rules {
    all: Vec<Arc<Rule>>,
    everywhere: Node,
    by_registry: HashMap<RegistryName, Node>,
}

#[derive(Debug, Default)]
struct Node {
    children: HashMap<Box<str>, Node>,
    /// Rules for this namespace and all below it.
    namespace: Vec<Arc<Rule>>,
    /// Rules with a glob whose literal beginning ends here, and one automaton over all of these globs.
    globs: Vec<Arc<Rule>>,
    automaton: GlobSet,
}

impl Rules {
    /// # Errors
    /// When all globs together are more than one automaton can hold.
    pub fn new(rules: Vec<Rule>) -> Result<Self, String> {
        let mut this = Self { all: rules.into_iter().map(Arc::new).collect(), ..Self::default() };
        for rule in &this.all {
            let mut node = match &rule.registry {
                Some(registry) => this.by_registry.entry(registry.clone()).or_default(),
                None => &mut this.everywhere,
            };
            for segment in rule.scope.literal_segments() {
                node = node.children.entry(segment.into()).or_default();
            }
            match rule.scope {
                Scope::Namespace(_) => node.namespace.push(rule.clone()),
                Scope::Glob(_) => node.globs.push(rule.clone()),
            }
        }
        this.everywhere.compile()?;
        for node in this.by_registry.values_mut() {
            node.compile()?;
        }
        Ok(this)
    }

    /// Every rule, as configured.
    #[must_use]
    pub fn all(&self) -> &[Arc<Rule>] {
        &self.all
    }

    #[must_use]
    pub fn matching(&self, occasion: &Occasion<'_>) -> Matches {
        let mut matches = Matches::default();
        for root in [Some(&self.everywhere), self.by_registry.get(occasion.registry)].into_iter().flatten() {
            root.visit(occasion.repository, &mut |rule| match rule.objection(occasion) {
                None => matches.matched.push(rule.clone()),
                Some(skip) => matches.skipped.push((rule.clone(), skip)),
            });
        }
        matches
    }
}

impl Node {
    fn compile(&mut self) -> Result<(), String> {
        let mut set = GlobSetBuilder::new();
        for rule in &self.globs {
            if let Scope::Glob(glob) = &rule.scope {
                set.add(glob.glob().clone());
            }
        }
        self.automaton = set.build().map_err(|error| format!("the rules' globs together are too large: {error}"))?;
        self.children.values_mut().try_for_each(Self::compile)
    }

    fn visit(&self, repository: &Repository, found: &mut impl FnMut(&Arc<Rule>)) {
        let mut node = Some(self);
        let mut segments = repository.segments();
        while let Some(here) = node {
            here.namespace.iter().for_each(&mut *found);
            if !here.globs.is_empty() {
                here.automaton.matches(repository.as_str()).into_iter().for_each(|index| found(&here.globs[index]));
            }
            node = segments.next().and_then(|segment| here.children.get(segment));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(name: &str, scope: &str) -> Rule {
        Rule {
            name: name.into(),
            registry: None,
            scope: Scope::parse(scope).unwrap(),
            exclude: vec![],
            tags: None,
            created: None,
            witness: "w".into(),
            algorithm: Algorithm::EcdsaSha256,
            signature_type: SignatureType::Default,
            trigger: Trigger::Automatic,
            formats: vec![Format::Cosign],
            expiry: None,
            untagged: false,
            enabled: true,
        }
    }

    fn names(rules: &Rules, repository: &str) -> Vec<String> {
        let mut names: Vec<_> = lookup(rules, repository, Some("1.0")).matched.iter().map(|rule| rule.name.clone()).collect();
        names.sort();
        names
    }

    fn lookup(rules: &Rules, repository: &str, tag: Option<&str>) -> Matches {
        let tag = tag.map(|tag| tag.parse().unwrap());
        rules.matching(&Occasion {
            registry: &"r.example.com".parse().unwrap(),
            repository: &repository.parse().unwrap(),
            tag: tag.as_ref(),
            pushed_at: "2026-11-21T09:00:00Z".parse().unwrap(),
            trigger: Trigger::Automatic,
        })
    }

    #[test]
    fn every_rule_whose_scope_holds_the_repository_is_found() {
        let elsewhere = Rule { registry: Some("other.example.com".parse().unwrap()), ..rule("elsewhere", "production") };
        let here = Rule { registry: Some("r.example.com".parse().unwrap()), ..rule("here", "production") };
        let rules = Rules::new(vec![
            rule("namespace", "production"),
            rule("deeper", "production/payments"),
            rule("glob", "team-*/apps/**"),
            rule("literal then glob", "production/*/api"),
            rule("all", "**"),
            rule("one segment", "*"),
            rule("either", "{production,staging}/web"),
            elsewhere,
            here,
        ])
        .unwrap();
        for (repository, expected) in [
            ("production", vec!["all", "here", "namespace", "one segment"]),
            ("production/web", vec!["all", "either", "here", "namespace"]),
            ("production/payments/api", vec!["all", "deeper", "here", "literal then glob", "namespace"]),
            ("production2/web", vec!["all"]),
            ("staging/web", vec!["all", "either"]),
            ("team-a/apps/x/y", vec!["all", "glob"]),
            ("team-a/other/apps/x", vec!["all"]),
        ] {
            assert_eq!(names(&rules, repository), expected, "{repository}");
        }
    }

    #[test]
    fn a_rule_that_does_not_sign_says_why() {
        let scoped = |change: fn(&mut Rule)| {
            let mut changed = rule("r", "production");
            change(&mut changed);
            Rules::new(vec![changed]).unwrap()
        };
        let tags = |rule: &mut Rule| rule.tags = Some(TagFilter::parse(&["v*", "latest"]).unwrap());
        for (rules, repository, tag, expected) in [
            (scoped(|_| ()), "staging/app", Some("1"), Skip::NoRule),
            (scoped(|rule| rule.enabled = false), "production/app", Some("1"), Skip::Disabled),
            (
                scoped(|rule| rule.exclude = vec![Scope::parse("production/*-scratch").unwrap()]),
                "production/my-scratch",
                Some("1"),
                Skip::Excluded,
            ),
            (scoped(|rule| rule.trigger = Trigger::Manual), "production/app", Some("1"), Skip::ManualOnly),
            (scoped(|_| ()), "production/app", None, Skip::Untagged),
            (scoped(tags), "production/app", Some("nightly"), Skip::TagNotMatched),
            (
                scoped(|rule| rule.created = Some("2026-11-21T09:00:01Z".parse().unwrap())),
                "production/app",
                Some("1"),
                Skip::BeforeRule,
            ),
        ] {
            let matches = lookup(&rules, repository, tag);
            assert!(matches.matched.is_empty(), "{expected:?}");
            assert_eq!(matches.reason(), expected);
        }
        assert_eq!(lookup(&scoped(tags), "production/app", Some("v1.2")).matched.len(), 1);
        assert_eq!(lookup(&scoped(|rule| rule.untagged = true), "production/app", None).matched.len(), 1);
    }

    #[test]
    fn an_administrators_word_sets_off_manual_rules_and_older_images() {
        let manual =
            Rule { trigger: Trigger::Manual, created: Some("2030-01-01T00:00:00Z".parse().unwrap()), ..rule("r", "production") };
        let rules = Rules::new(vec![manual]).unwrap();
        let registry = "r.example.com".parse().unwrap();
        let repository = "production/app".parse().unwrap();
        let occasion = Occasion {
            registry: &registry,
            repository: &repository,
            tag: None,
            pushed_at: Timestamp::UNIX_EPOCH,
            trigger: Trigger::Manual,
        };
        assert_eq!(rules.matching(&occasion).matched.len(), 1);
    }

    #[test]
    fn scopes_that_no_repository_can_have_are_refused() {
        for bad in ["", "/production", "Production", "a//b", "/team-*", "team-[", "a{b"] {
            assert!(Scope::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_event_meets_only_the_rules_on_its_own_path() {
        let rules = Rules::new((0..10_000).map(|n| rule(&n.to_string(), &format!("team-{n}/apps"))).collect()).unwrap();
        let mut met = 0;
        rules.everywhere.visit(&"team-77/apps/web".parse().unwrap(), &mut |_| met += 1);
        assert_eq!(met, 1);
    }
}
