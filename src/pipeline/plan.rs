//! From the rules that match an image to the signatures that are wanted: each once, whichever rules ask for it.

use std::{collections::HashMap, sync::Arc};

use jiff::Timestamp;

use crate::{
    kms::Algorithm,
    oci::{Digest, Reference, Tag},
    outcome::Skip,
    rule::{Rule, SignatureType},
    signature::{Format, Prepared, bundle, cosign, notation},
    subject::{Image, Subject, TagState},
    witness::Witness,
};

/// All that is wanted of one push.
#[derive(Debug, Default)]
pub struct Plan {
    /// Children first, then the index.
    pub targets: Vec<Target>,
    /// Rules that matched the event and have nothing to sign after all.
    pub skipped: Vec<(Arc<Rule>, Skip)>,
    /// Rules whose witness is not there.
    pub unwitnessed: Vec<Arc<Rule>>,
}

/// One digest, and every signature that is wanted for it, in all formats: they are looked for, made and written together.
#[derive(Debug)]
pub struct Target {
    pub subject: Subject,
    pub wanted: Vec<Wanted>,
    /// The tag that is signed, and the digest that it has to name still when the signature is written.
    pub tag: Option<(Tag, Digest)>,
}

/// One signature.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub prepared: Prepared,
    pub witness: Arc<Witness>,
    pub algorithm: Algorithm,
    /// The rules that ask for it.
    pub rules: Vec<Arc<Rule>>,
}

impl Target {
    /// Adds a signature, or the rule to those that want it already.
    fn want(&mut self, prepared: Prepared, rule: &Arc<Rule>, witness: &Arc<Witness>) {
        let same = |wanted: &&mut Wanted| {
            wanted.witness.name() == witness.name() && wanted.algorithm == rule.algorithm && wanted.prepared == prepared
        };
        match self.wanted.iter_mut().find(same) {
            Some(wanted) => wanted.rules.push(rule.clone()),
            None => self.wanted.push(Wanted {
                prepared,
                witness: witness.clone(),
                algorithm: rule.algorithm,
                rules: vec![rule.clone()],
            }),
        }
    }

    /// What the ledger has the signature vouch for: where a format names the digest alone, the digest in its repository.
    pub fn reference(&self, wanted: &Wanted) -> Reference {
        let pinned = || Reference::pinned(self.subject.registry(), self.subject.repository(), self.subject.digest());
        wanted.prepared.reference().cloned().unwrap_or_else(pinned)
    }
}

/// What the matching rules want of an image that was pushed at this time, now. What a witness that is not among `witnesses`, or
/// has no certificate where one is needed, should sign is left out, and its rules are returned.
#[must_use]
pub fn plan(
    image: &Image,
    pushed_at: Timestamp,
    rules: &[Arc<Rule>],
    witnesses: &HashMap<String, Arc<Witness>>,
    now: Timestamp,
) -> Plan {
    let mut plan = Plan::default();
    let mut signing = vec![];
    for rule in rules {
        if image.root.digest().algorithm() != "sha256" {
            plan.skipped.push((rule.clone(), Skip::UnsupportedDigest));
        } else if matches!(image.tag, TagState::Moved(_)) && rule.tags.is_some() {
            plan.skipped.push((rule.clone(), Skip::Superseded));
        } else if let Some(witness) = witnesses.get(&rule.witness).filter(|witness| rule.is_served_by(witness)) {
            signing.push((rule, witness));
        } else {
            plan.unwitnessed.push(rule.clone());
        }
    }
    let tag = match &image.tag {
        TagState::Current(tag) => Some(tag),
        TagState::Moved(_) | TagState::None => None,
    };
    // A child of another algorithm than its index is left out: no verifier finds signatures of it.
    let subjects = image.children.iter().chain([&image.root]).filter(|subject| subject.digest().algorithm() == "sha256");
    for subject in subjects {
        let mut target = Target { subject: subject.clone(), wanted: vec![], tag: None };
        for (rule, witness) in &signing {
            let reference = match (tag, rule.signature_type) {
                (Some(tag), SignatureType::Default) => {
                    target.tag = Some((tag.clone(), image.root.digest().clone()));
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
                // Of rules that want the same signature, the strictest says for how long.
                let same =
                    signing.iter().filter(|(other, signer)| signer.name() == witness.name() && other.formats.contains(format));
                let lifetime = same.filter_map(|(other, _)| other.expiry).min();
                let prepared = match (format.envelope(), witness.certificates().first()) {
                    (Some(envelope), Some(chain)) => {
                        Prepared::Notation(notation::Prepared::new(envelope, subject, chain, now, lifetime))
                    }
                    // Such a rule was left out above.
                    (Some(_), None) => continue,
                    (None, _) if *format == Format::Cosign => Prepared::Cosign(cosign::Prepared::new(subject, &reference)),
                    (None, _) => Prepared::Bundle(bundle::Prepared::new(subject, pushed_at)),
                };
                target.want(prepared, rule, witness);
            }
        }
        if !target.wanted.is_empty() {
            plan.targets.push(target);
        }
    }
    plan
}
