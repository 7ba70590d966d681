//! Images against policies: the one road for the webhook and for manifests on the command line.

use std::{collections::HashSet, sync::Arc, time::Duration};

use futures::{FutureExt as _, StreamExt as _, stream};
use tokio::time::{Instant, timeout_at};

use super::{
    daemon::{Daemon, Pending},
    evidence::{DENIAL, Evidence, Examiner, Failure, Freshness, Signature},
    pull_secrets::{Logins, PullSecrets, Unread},
    why::{Fault, Why},
    workload::Kinds,
};
use crate::{
    clock::Clock,
    config::Breakglass,
    kubernetes::Events,
    oci::{Reference, Tag},
    policy::{Bound, Mode, Patterns, Policies, Policy, SignedAs, Tags},
    signature::Format,
    verify::Rejection,
};

/// Different images of one object that are looked at.
pub const MOST_IMAGES: usize = 512;
/// Images of one object that are looked at at once.
const AT_ONCE: usize = 32;
/// Longer than any reference can be: repository 255, tag 128, digest 135, and a host.
const LONGEST_REFERENCE: usize = 800;

/// Everything that a decision takes. Made anew when the configuration is read again.
#[derive(Debug)]
pub struct Judge {
    pub policies: Policies,
    /// Images that no policy says anything of.
    pub allow: Patterns,
    pub kinds: Kinds,
    pub examiner: Examiner,
    pub breakglass: Option<Breakglass>,
    pub daemon: Option<Daemon>,
    /// None: what pods are pulled with is not asked for.
    pub pull_secrets: Option<PullSecrets>,
    /// None: nobody is told by Events.
    pub events: Option<Events>,
    pub clock: Clock,
}

/// What became of one image.
#[derive(Debug)]
pub struct Verdict {
    /// As it was written.
    pub text: String,
    /// Policies that it does not meet, and why. Empty: it may run.
    pub unmet: Vec<Unmet>,
    /// By its tag and the digest that verified, if it was used by its tag and may be pinned.
    pub pinned: Option<Reference>,
    /// Policies that had something to say of it.
    pub asked: usize,
    /// It is still to be signed.
    pub pending: Option<Pending>,
}

/// A policy that an image does not meet.
#[derive(Debug, Clone)]
pub struct Unmet {
    pub bound: Arc<Bound>,
    pub why: Why,
}

impl Verdict {
    /// What keeps it from running.
    pub fn enforced(&self) -> impl Iterator<Item = &Unmet> {
        self.of_mode(Mode::Enforce)
    }

    pub fn of_mode(&self, mode: Mode) -> impl Iterator<Item = &Unmet> {
        self.unmet.iter().filter(move |unmet| unmet.bound.policy.mode == mode)
    }
}

/// How images are judged.
#[derive(Debug, Clone, Copy)]
pub struct Terms<'a> {
    /// Whether what is used by a tag can be pinned to the digest that verified.
    pub pins: bool,
    /// Whether registries are asked for what is remembered, too.
    pub fresh: bool,
    /// When an answer must be there, and how long that is from the beginning.
    pub deadline: Instant,
    pub patience: Duration,
    /// What the images are pulled with, for registries that the configuration has no login of.
    pub logins: Option<&'a Logins>,
}

impl Judge {
    /// Judges each different text once, in the order they first come. None if there are more than [`MOST_IMAGES`].
    pub async fn images(
        &self,
        texts: impl IntoIterator<Item = &str>,
        policies: &[Arc<Bound>],
        terms: Terms<'_>,
    ) -> Option<Vec<Verdict>> {
        let mut seen = HashSet::new();
        let different: Vec<&str> = texts.into_iter().filter(|text| seen.insert(*text)).take(MOST_IMAGES + 1).collect();
        if different.len() > MOST_IMAGES {
            return None;
        }
        let judged: Vec<_> = different.into_iter().map(|text| self.image(text, policies, terms).boxed()).collect();
        Some(stream::iter(judged).buffered(AT_ONCE).collect().await)
    }

    async fn image(&self, text: &str, policies: &[Arc<Bound>], terms: Terms<'_>) -> Verdict {
        let verdict = |unmet, pinned, asked| Verdict { text: text.to_owned(), unmet, pinned, asked, pending: None };
        let of_all = |demands: &[Arc<Bound>], why: &Why| -> Vec<Unmet> {
            demands.iter().map(|bound| Unmet { bound: bound.clone(), why: why.clone() }).collect()
        };
        let reference = match parse(text) {
            Ok(reference) => reference,
            Err(why) => return verdict(of_all(policies, &why), None, policies.len()),
        };
        // Costs no request: what is allowed must run when nothing else works.
        if self.allow.hold(&reference) {
            return verdict(vec![], None, 0);
        }
        let demands: Vec<Arc<Bound>> = policies.iter().filter(|bound| !bound.allow.hold(&reference)).cloned().collect();
        let asked = demands.len();
        let (demands, closed): (Vec<_>, Vec<_>) = demands.into_iter().partition(|bound| bound.refused.is_none());
        let closed =
            closed.into_iter().filter_map(|bound| bound.refused.clone().map(|reason| Unmet { bound, why: Why::Refused(reason) }));
        let closed: Vec<Unmet> = closed.collect();
        if demands.is_empty() {
            return verdict(closed, None, asked);
        }
        let judged = timeout_at(terms.deadline, self.reference(&reference, &demands, terms)).await;
        let (mut unmet, mut pinned) = match judged {
            Ok(Ok(judged)) => judged,
            Ok(Err(failure)) => (of_all(&demands, &failure.into()), None),
            Err(_) => (of_all(&demands, &Why::Late(terms.patience)), None),
        };
        if let Some(logins) = terms.logins
            && unmet.iter().any(|unmet| unmet.why.is_locked())
            && self.examiner.takes_logins(&reference.registry)
        {
            // It only says more, and is mostly remembered.
            let unread = timeout_at(terms.deadline, logins.unread(&reference.registry)).await.unwrap_or_default();
            lock(&mut unmet, unread);
        }
        if !closed.is_empty() {
            unmet.extend(closed);
            pinned = None;
        }
        let mut verdict = verdict(unmet, pinned, asked);
        if let Some(daemon) = &self.daemon
            && verdict.unmet.iter().any(|unmet| unmet.why.awaits_signature())
        {
            // It only says more, so it may take what time is left and no longer.
            verdict.pending = timeout_at(terms.deadline, daemon.pending(&reference, self.clock.now())).await.ok().flatten();
        }
        verdict
    }

    async fn reference(
        &self,
        reference: &Reference,
        demands: &[Arc<Bound>],
        Terms { pins, fresh, logins, .. }: Terms<'_>,
    ) -> Result<(Vec<Unmet>, Option<Reference>), Failure> {
        let by_tag = reference.digest.is_none();
        let mut image = reference.clone();
        if by_tag {
            image.tag.get_or_insert_with(Tag::latest);
            let Some(digest) = self.examiner.resolve(&image, logins).await? else {
                return Ok((demands.iter().map(|bound| Unmet { bound: bound.clone(), why: Why::Absent }).collect(), None));
            };
            image.digest = Some(digest);
        }
        let freshness = if fresh { Freshness::Fresh } else { Freshness::Any };
        let mut evidence = self.examiner.evidence(&image, freshness, logins).await?;
        let judge_by = |evidence: &Evidence| -> Vec<Option<Why>> {
            demands.iter().map(|bound| objection(&bound.policy, &image, evidence)).collect()
        };
        let mut objections = judge_by(&evidence);
        if evidence.age() >= DENIAL && objections.iter().any(Option::is_some) {
            // It may have been signed since. If that cannot be asked now, what is known counts.
            if let Ok(newer) = self.examiner.evidence(&image, Freshness::Fresh, logins).await {
                evidence = newer;
                objections = judge_by(&evidence);
            }
        }
        let mut unmet = vec![];
        let mut is_approved = false;
        for (bound, mut why) in demands.iter().zip(objections) {
            let policy = &bound.policy;
            if policy.through_index || policy.max_age.is_some() {
                // What cannot be asked for one policy's sake is held against that one alone.
                why = self.look_further(policy, &image, why, logins).await.unwrap_or_else(|failure| Some(failure.into()));
            }
            if by_tag {
                why = match (why, policy.tags) {
                    (why, Tags::Deny) => Some(Why::Tag { pinned: Box::new(image.clone()), otherwise: why.map(Box::new) }),
                    (None, Tags::Resolve) if !pins => Some(Why::NotPinned { pinned: Box::new(image.clone()) }),
                    (why, Tags::Resolve) => {
                        is_approved |= why.is_none();
                        why
                    }
                };
            }
            unmet.extend(why.map(|why| Unmet { bound: bound.clone(), why }));
        }
        // Only what some policy that resolves tags has approved, and no policy keeps from running.
        let is_kept = unmet.iter().any(|unmet| unmet.bound.policy.mode == Mode::Enforce);
        Ok((unmet, (is_approved && !is_kept).then_some(image)))
    }

    /// What this policy has against an image with a digest, once the index that lists it and its age were asked for; `why` is
    /// what it has against the image's own signatures.
    async fn look_further(
        &self,
        policy: &Policy,
        image: &Reference,
        why: Option<Why>,
        logins: Option<&Logins>,
    ) -> Result<Option<Why>, Failure> {
        if why.is_some() && !(policy.through_index && self.index_is_signed(policy, image, logins).await?) {
            return Ok(why);
        }
        let Some(max_age) = policy.max_age else { return Ok(None) };
        let Some(built) = self.examiner.built(image, logins).await? else { return Ok(Some(Why::Ageless)) };
        let age = self.clock.now().duration_since(built);
        let is_old = jiff::SignedDuration::try_from(max_age).is_ok_and(|max_age| age > max_age);
        Ok(is_old.then_some(Why::Old { built, max_age }))
    }

    async fn index_is_signed(&self, policy: &Policy, image: &Reference, logins: Option<&Logins>) -> Result<bool, Failure> {
        let Some(index) = self.examiner.index_of(image, logins).await? else { return Ok(false) };
        let evidence = self.examiner.evidence(&index, Freshness::Any, logins).await?;
        Ok(objection(policy, &index, &evidence).is_none())
    }
}

/// Says of what a login could help with why there was none.
fn lock(unmet: &mut [Unmet], unread: Vec<Unread>) {
    if unread.is_empty() {
        return;
    }
    let unread: Arc<[Unread]> = unread.into();
    for Unmet { why, .. } in unmet.iter_mut().filter(|unmet| unmet.why.is_locked()) {
        *why = Why::Locked { why: Box::new(why.clone()), unread: unread.clone() };
    }
}

fn parse(text: &str) -> Result<Reference, Why> {
    if text.len() > LONGEST_REFERENCE {
        return Err(Why::NoReference(format!("it has {} characters, more than any has", text.len())));
    }
    text.parse().map_err(|error| Why::no_reference(&error))
}

/// What a policy has against the signatures of an image. `image` has a digest, and the tag that it is used by, if any.
fn objection(policy: &Policy, image: &Reference, evidence: &Evidence) -> Option<Why> {
    if !evidence.exists {
        return Some(Why::Absent);
    }
    policy.witnesses.iter().find_map(|witness| {
        let fault = fault(policy, witness, image, evidence)?;
        Some(Why::Unsigned { witness: witness.clone(), fault })
    })
}

/// Why there is no signature of this witness that the policy takes; None if there is one.
fn fault(policy: &Policy, witness: &str, image: &Reference, evidence: &Evidence) -> Option<Fault> {
    let is_format = |format: &Format| policy.formats.is_empty() || policy.formats.contains(format);
    let mut formats = vec![];
    let mut names = vec![];
    let mut others = vec![];
    let mut rejected: Vec<&Rejection> = vec![];
    for signature in &evidence.signatures {
        match signature {
            Signature::Stands { witness: signer, .. } | Signature::Elsewhere { witness: signer, .. } if **signer != *witness => {
                others.push(signer.to_string());
            }
            Signature::Stands { format, .. } | Signature::Elsewhere { format, .. } if !is_format(format) => {
                formats.push(format.name());
            }
            Signature::Stands { reference, .. } => {
                if is_name(policy.signed_as, reference.as_ref(), image) {
                    return None;
                }
                names.extend(reference.as_ref().map(ToString::to_string));
            }
            Signature::Elsewhere { .. } if policy.signed_as == SignedAs::Digest => return None,
            Signature::Elsewhere { reference, .. } => names.push(reference.clone()),
            Signature::Falls(rejection) => rejected.push(rejection),
        }
    }
    let of_witness = |rejection: &&&Rejection| match rejection {
        Rejection::Expired { witness: of, .. } | Rejection::Revoked { witness: of, .. } => of == witness,
        _ => false,
    };
    let broken = |rejection: &&&Rejection| {
        !matches!(rejection, Rejection::UnknownKey | Rejection::Expired { .. } | Rejection::Revoked { .. })
    };
    let dedup = |mut names: Vec<String>| {
        names.sort();
        names.dedup();
        names
    };
    // The nearest miss first: what has to be done about it is the least.
    Some(if let Some(rejection) = rejected.iter().find(of_witness) {
        Fault::Rejected((**rejection).clone())
    } else if !formats.is_empty() {
        formats.sort_unstable();
        formats.dedup();
        Fault::OtherFormat(formats)
    } else if !names.is_empty() {
        Fault::OtherName(dedup(names).join(" and "))
    } else if !others.is_empty() {
        Fault::Others(dedup(others))
    } else if let Some(rejection) = rejected.iter().find(broken) {
        Fault::Rejected((**rejection).clone())
    } else if let Some(problem) = &evidence.unreadable {
        Fault::Unreadable(problem.clone())
    } else if rejected.is_empty() {
        Fault::Nothing
    } else {
        Fault::OtherKey
    })
}

/// Whether a signature that stands in the image's repository is for the name that the policy wants. `signed` is what was
/// signed; None where a format names nothing but the digest.
fn is_name(wanted: SignedAs, signed: Option<&Reference>, image: &Reference) -> bool {
    let signed_tag = signed.and_then(|signed| signed.tag.as_ref());
    match wanted {
        SignedAs::Digest => true,
        SignedAs::Name => signed_tag.is_none() || image.tag.is_none() || signed_tag == image.tag.as_ref(),
        SignedAs::Tag => {
            let in_place = signed.is_some_and(|signed| signed.name() == image.name());
            in_place && signed_tag.is_some() && signed_tag == image.tag.as_ref()
        }
    }
}

#[cfg(test)]
mod tests;
