//! From the rules that match the pushes of an image to the signatures that are wanted: each once, whichever pushes and rules ask
//! for it.

use std::{collections::HashMap, sync::Arc, time::Duration};

use jiff::Timestamp;

use crate::{
    kms::Algorithm,
    oci::{Digest, Reference},
    outcome::Skip,
    rule::{Rule, SignatureType},
    signature::{Format, Prepared, bundle, cosign, notation},
    subject::{Image, Subject, TagState},
    witness::Witness,
};

/// What is wanted of one push.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The queue's message that it came by.
    pub message_id: &'a str,
    pub pushed_at: Timestamp,
    pub tag: &'a TagState,
    /// Those that match it.
    pub rules: &'a [Arc<Rule>],
}

/// All that is wanted of some pushes of one digest, which are known by their places.
#[derive(Debug, Default)]
pub struct Plan {
    /// Children first, then the index.
    pub targets: Vec<Target>,
    /// Rules that matched the event and have nothing to sign after all.
    pub skipped: Vec<(usize, Arc<Rule>, Skip)>,
    /// Rules whose witness is not there.
    pub unwitnessed: Vec<(usize, Arc<Rule>)>,
}

/// One digest, and every signature that is wanted for it, in all formats: they are looked for, made and written together.
#[derive(Debug)]
pub struct Target {
    pub subject: Subject,
    pub wanted: Vec<Wanted>,
    /// What the tags that are signed have to name still when the signatures are written.
    pub root: Digest,
}

/// One signature.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub prepared: Prepared,
    pub witness: Arc<Witness>,
    pub algorithm: Algorithm,
    /// Of the first push that asks for it.
    pub message_id: String,
    /// That push, and the others.
    pub first: Asker,
    pub others: Vec<Asker>,
}

/// A push that asks for a signature.
#[derive(Debug, Clone)]
pub struct Asker {
    /// Its place among the requests.
    pub push: usize,
    /// The rule by which it does, and others by which it does, too.
    pub rule: Arc<Rule>,
    pub more: Vec<Arc<Rule>>,
}

impl Target {
    /// Adds a signature, or the push and its rule to those that want it already.
    fn want(&mut self, prepared: Prepared, push: usize, message_id: &str, rule: &Arc<Rule>, witness: &Arc<Witness>) {
        let same = |wanted: &&mut Wanted| {
            wanted.witness.name() == witness.name() && wanted.algorithm == rule.algorithm && wanted.prepared == prepared
        };
        let asker = || Asker { push, rule: rule.clone(), more: vec![] };
        match self.wanted.iter_mut().find(same) {
            // The rules of a push come one after the other.
            Some(Wanted { first, others, .. }) => match others.last_mut().unwrap_or(first) {
                last if last.push == push => last.more.push(rule.clone()),
                _ => others.push(asker()),
            },
            None => self.wanted.push(Wanted {
                prepared,
                witness: witness.clone(),
                algorithm: rule.algorithm,
                message_id: message_id.to_owned(),
                first: asker(),
                others: vec![],
            }),
        }
    }

    /// What the ledger has the signature vouch for: where a format names the digest alone, the digest in its repository.
    pub fn reference(&self, wanted: &Wanted) -> Reference {
        let pinned = || Reference::pinned(self.subject.registry(), self.subject.repository(), self.subject.digest());
        wanted.prepared.reference().cloned().unwrap_or_else(pinned)
    }
}

/// What is requested of an image now, by pushes of it. What a witness that is not among `witnesses`, or has no certificate where
/// one is needed, should sign is left out, and its rules are returned.
#[must_use]
pub fn plan(image: &Image, requests: &[Request<'_>], witnesses: &HashMap<String, Arc<Witness>>, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let mut signing = vec![];
    for (push, request) in requests.iter().enumerate() {
        for rule in request.rules {
            if image.root.digest().algorithm() != "sha256" {
                plan.skipped.push((push, rule.clone(), Skip::UnsupportedDigest));
            } else if matches!(request.tag, TagState::Moved(_)) && rule.tags.is_some() {
                plan.skipped.push((push, rule.clone(), Skip::Superseded));
            } else if let Some(witness) = witnesses.get(&rule.witness).filter(|witness| rule.is_served_by(witness)) {
                signing.push((push, rule, witness));
            } else {
                plan.unwitnessed.push((push, rule.clone()));
            }
        }
    }
    // A bundle is one for all pushes, as old as the first that wants one.
    let bundled = signing.iter().filter(|(_, rule, _)| rule.formats.contains(&Format::Bundle));
    let pushed_at = bundled.map(|(push, ..)| requests[*push].pushed_at).min().unwrap_or(now);
    // Of the rules by which the first push wants a signature, the strictest says for how long.
    let mut lifetimes: HashMap<_, (usize, Option<Duration>)> = HashMap::new();
    for (push, rule, witness) in &signing {
        for format in &rule.formats {
            let (first, lifetime) = lifetimes.entry((witness.name(), rule.algorithm, *format)).or_insert((*push, rule.expiry));
            if *first == *push {
                *lifetime = lifetime.iter().chain(&rule.expiry).min().copied();
            }
        }
    }
    // A child of another algorithm than its index is left out: no verifier finds signatures of it.
    let subjects = image.children.iter().chain([&image.root]).filter(|subject| subject.digest().algorithm() == "sha256");
    for subject in subjects {
        let mut target = Target { subject: subject.clone(), wanted: vec![], root: image.root.digest().clone() };
        for (push, rule, witness) in &signing {
            let Request { message_id, tag, .. } = requests[*push];
            let reference = match (tag, rule.signature_type) {
                (TagState::Current(tag), SignatureType::Default) => {
                    Reference::tagged(subject.registry(), subject.repository(), tag)
                }
                _ => Reference::pinned(subject.registry(), subject.repository(), subject.digest()),
            };
            for format in &rule.formats {
                // Those who read referrers ask for those of the digest that the tag names. Only readers of the `.sig` tag ask
                // for a platform's.
                let is_read = *format == Format::Cosign || *subject == image.root;
                if !is_read {
                    continue;
                }
                let (_, lifetime) = lifetimes[&(witness.name(), rule.algorithm, *format)];
                let prepared = match (format.envelope(), witness.certificates().first()) {
                    (Some(envelope), Some(chain)) => {
                        Prepared::Notation(notation::Prepared::new(envelope, subject, chain, now, lifetime))
                    }
                    // Such a rule was left out above.
                    (Some(_), None) => continue,
                    (None, _) if *format == Format::Cosign => Prepared::Cosign(cosign::Prepared::new(subject, &reference)),
                    (None, _) => Prepared::Bundle(bundle::Prepared::new(subject, pushed_at)),
                };
                target.want(prepared, *push, message_id, rule, witness);
            }
        }
        if !target.wanted.is_empty() {
            plan.targets.push(target);
        }
    }
    plan
}
