//! One digest's signatures: look, sign what is missing, add it to what is there, write, read back.
//!
//! A registry has no conditional write, so two writers of one `.sig` tag can overwrite each other. What can be done is
//! done: writers in this process take turns by digest, everything slow comes before the last look, and after the write
//! another look tells whether it held; if not, all is done again.

use std::{
    collections::{HashMap, HashSet},
    pin::pin,
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

use futures::future::{join_all, try_join_all};
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use crate::{
    clock::Clock,
    ledger::{Intent, Ledger},
    oci::{Digest, Repository, Tag, media_type},
    pipeline::{
        Error,
        plan::{Target, Wanted},
    },
    registry::{self, Address, Registry},
    signature::cosign::{self, EMPTY_CONFIG, Layer, SignatureManifest, extend_config},
    verify::{self, Verified},
};

/// Writes that did not hold, before the event goes back to the queue.
const ROUNDS: u32 = 8;
/// A tag that was resolved longer ago than this is resolved again before it is signed for.
const TAG_IS_FRESH: Duration = Duration::from_secs(2);

/// What became of one wanted signature.
#[derive(Debug)]
pub enum Written {
    /// Made now, and read back.
    New,
    /// A valid one was there.
    Found,
    Failed(Error),
}

/// Turns by digest, for the writers of this process.
#[derive(Debug, Default)]
pub struct Turns(Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>);

impl Turns {
    async fn take(&self, key: String) -> tokio::sync::OwnedMutexGuard<()> {
        const TIDY_ABOVE: usize = 1024;
        let turn = {
            let mut turns = self.0.lock().expect("nothing panics while it holds the map");
            if turns.len() > TIDY_ABOVE {
                turns.retain(|_, turn| turn.strong_count() > 0);
            }
            let existing = turns.get(&key).and_then(Weak::upgrade);
            existing.unwrap_or_else(|| {
                let turn = Arc::default();
                turns.insert(key, Arc::downgrade(&turn));
                turn
            })
        };
        turn.lock_owned().await
    }
}

/// What writing needs besides the target.
#[derive(Clone, Copy)]
pub struct Desk<'a> {
    pub registry: &'a Registry,
    pub ledger: &'a Ledger,
    pub turns: &'a Turns,
    pub clock: &'a Clock,
    pub message_id: &'a str,
    /// When the tag was resolved.
    pub located: Instant,
    /// What is not done by then has failed.
    pub deadline: Instant,
}

impl Desk<'_> {
    /// Sees to every signature of the target. One answer for each of `target.wanted`, in order.
    pub async fn see_to(&self, target: &Target) -> Vec<Written> {
        let mut answers: Vec<Option<Written>> = target.wanted.iter().map(|_| None).collect();
        let ended = {
            let mut work = pin!(self.try_see_to(target, &mut answers));
            match timeout_at(self.deadline, work.as_mut()).await {
                Ok(ended) => ended,
                // Asked while this work itself still stands in the line, if there is one.
                Err(_) => Err(Error::Deadline { throttled: target.wanted.iter().any(|one| one.witness.is_waited_for()) }),
            }
        };
        // What is open after a failure failed by it: one error, which all of them share.
        let failure = ended.err().map(Arc::new);
        let answer = |answer: Option<Written>| match (answer, &failure) {
            (Some(answer), _) => answer,
            (None, Some(failure)) => Written::Failed(Error::Shared(failure.clone())),
            (None, None) => unreachable!("without a failure every signature was found, made or refused"),
        };
        answers.into_iter().map(answer).collect()
    }

    async fn try_see_to(&self, target: &Target, answers: &mut [Option<Written>]) -> Result<(), Error> {
        let subject = &target.subject;
        let repository = subject.repository();
        let turn = format!("{}/{}@{}", subject.registry(), repository, subject.digest());
        let _turn = self.turns.take(turn).await;
        let tag = Tag::cosign_signatures(subject.digest()).expect("only SHA-256 digests are planned for");
        let current = self.read(target, &tag).await?;
        let mut missing = vec![];
        for (index, wanted) in target.wanted.iter().enumerate() {
            if current.as_ref().is_some_and(|manifest| is_there(manifest, wanted)) {
                answers[index] = Some(Written::Found);
            } else {
                missing.push((index, wanted));
            }
        }
        if missing.is_empty() {
            return Ok(());
        }

        let sign = async {
            self.ledger.intend(missing.iter().map(|(_, wanted)| self.intent(target, wanted)).collect()).await?;
            Ok::<_, Error>(join_all(missing.iter().map(|(_, wanted)| self.sign(target, wanted))).await)
        };
        let (signed, ()) = tokio::join!(sign, async {
            // Failing here is found out below, where the blobs are needed.
            drop(self.upload(target, &missing).await);
        });
        let mut ready = vec![];
        for ((index, _), result) in missing.iter().zip(signed?) {
            match result {
                Ok(verified) => ready.push((*index, verified)),
                Err(error) => answers[*index] = Some(Written::Failed(error)),
            }
        }

        if self.located.elapsed() > TAG_IS_FRESH
            && let Some((tag, digest)) = &target.tag
            && self.registry.resolve(repository, tag).await?.as_ref() != Some(digest)
        {
            ready.retain(|(index, _)| {
                let names_tag = target.wanted[*index].prepared.reference().tag.is_some();
                if names_tag {
                    answers[*index] = Some(Written::Failed(Error::TagMoved { tag: tag.clone() }));
                }
                !names_tag
            });
        }
        if ready.is_empty() {
            return Ok(());
        }
        let ours = self.write(target, &tag, &missing, &ready).await?;
        for (index, _) in ready {
            answers[index] = Some(if ours.contains(&index) { Written::New } else { Written::Found });
        }
        Ok(())
    }

    /// Adds the signatures to what is under the tag, until a look afterwards finds them there. Returns which were added: an
    /// equal one may have come from elsewhere meanwhile.
    async fn write(
        &self,
        target: &Target,
        tag: &Tag,
        missing: &[(usize, &Wanted)],
        ready: &[(usize, Verified)],
    ) -> Result<HashSet<usize>, Error> {
        let repository = target.subject.repository();
        let mut config: Option<(Digest, Vec<Layer>, Vec<u8>)> = None;
        let mut ours = HashSet::new();
        for round in 0..ROUNDS {
            self.upload(target, missing).await?;
            let current = self.read(target, tag).await?;
            let mut manifest = current.unwrap_or_else(SignatureManifest::empty);
            // Another replica may have been here, or a write of ours whose answer was lost.
            let absent: Vec<_> = ready.iter().filter(|(index, _)| !is_there(&manifest, &target.wanted[*index])).collect();
            if absent.is_empty() {
                return Ok(ours);
            }
            let layers: Vec<Layer> = absent.iter().map(|(_, verified)| verified.layer().clone()).collect();
            if let Some(own) = manifest.own_config() {
                match &config {
                    Some((of, lists, content)) if *of == own && *lists == layers => manifest.set_config(content),
                    _ => {
                        if let Some(content) = self.extend_config(repository, &own, &layers).await? {
                            config = Some((own, layers.clone(), content));
                            // That took a while: look again, so that the look and the write stay close together.
                            if round + 1 < ROUNDS {
                                continue;
                            }
                        }
                    }
                }
            }
            manifest.add(layers).map_err(|error| unreadable(target, tag, error))?;
            let content = manifest.to_bytes().map_err(|error| unreadable(target, tag, error))?;
            let written = Digest::of(&content);
            let address = Address::Tag(tag.clone());
            match self.registry.put_manifest(repository, &address, media_type::OCI_MANIFEST, content).await {
                Ok(()) => ours.extend(absent.iter().map(|(index, _)| *index)),
                // Another upload of the same blob was under way; the registry knows it by the next round.
                Err(error @ registry::Error::BlobUnknown { .. }) if round + 1 < ROUNDS => {
                    debug!(error = &error as &dyn std::error::Error, round, "manifest refused for a blob, uploading again");
                    pause(round).await;
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            let stored = self.registry.manifest(repository, &address).await?;
            if stored.as_ref().is_some_and(|stored| *stored.digest() == written) {
                return Ok(ours);
            }
            let stored = stored.map(|stored| SignatureManifest::read(stored.media_type(), stored.content()));
            if let Some(Ok(stored)) = stored
                && ready.iter().all(|(index, _)| is_there(&stored, &target.wanted[*index]))
            {
                return Ok(ours);
            }
            debug!(round, "another writer replaced our signatures, adding them again");
            pause(round).await;
        }
        Err(Error::Overwritten { tag: tag.to_string(), rounds: ROUNDS })
    }

    /// The config that lists these layers too, uploaded. None if it is none that lists layers, and so stays as it is.
    async fn extend_config(&self, repository: &Repository, own: &Digest, layers: &[Layer]) -> Result<Option<Vec<u8>>, Error> {
        let content = match self.registry.blob(repository, own, cosign::MAX_PAYLOAD).await {
            Err(registry::Error::Oversized { .. }) => None,
            content => content?,
        };
        let Some(content) = content.and_then(|content| extend_config(&content, layers)) else { return Ok(None) };
        self.registry.ensure_blob(repository, content.clone().into()).await?;
        Ok(Some(content))
    }

    async fn read(&self, target: &Target, tag: &Tag) -> Result<Option<SignatureManifest>, Error> {
        let manifest = self.registry.manifest(target.subject.repository(), &Address::Tag(tag.clone())).await?;
        let read = |manifest: registry::Manifest| SignatureManifest::read(manifest.media_type(), manifest.content());
        manifest.map(read).transpose().map_err(|error| unreadable(target, tag, error))
    }

    /// Makes sure that the repository has every payload and the constant config.
    async fn upload(&self, target: &Target, wanted: &[(usize, &Wanted)]) -> Result<(), registry::Error> {
        let repository = target.subject.repository();
        let payloads = wanted.iter().map(|(_, wanted)| wanted.prepared.payload().clone());
        let blobs = payloads.chain([EMPTY_CONFIG.into()]);
        try_join_all(blobs.map(|blob| self.registry.ensure_blob(repository, blob))).await.map(drop)
    }

    async fn sign(&self, target: &Target, wanted: &Wanted) -> Result<Verified, Error> {
        let prepared = &wanted.prepared;
        let signed = wanted.witness.sign(wanted.algorithm, prepared.payload_sha256()).await?;
        let asked = verify::Wanted { digest: target.subject.digest().clone(), reference: prepared.reference().clone() };
        let layer = prepared.assemble(signed.raw());
        verify::fresh(&layer, prepared.payload(), &asked, &wanted.witness, &signed, self.clock.now()).map_err(Error::Unverified)
    }

    fn intent(&self, target: &Target, wanted: &Wanted) -> Intent {
        let subject = &target.subject;
        Intent {
            message_id: self.message_id.to_owned(),
            rule: wanted.rules.first().map(|rule| rule.name.clone()).unwrap_or_default(),
            witness: wanted.witness.name().to_owned(),
            key: wanted.witness.resolved_key().to_owned(),
            algorithm: wanted.algorithm,
            format: crate::signature::Format::Cosign.name(),
            registry: subject.registry().clone(),
            repository: subject.repository().clone(),
            digest: subject.digest().clone(),
            reference: wanted.prepared.reference().clone(),
            payload_sha256: *wanted.prepared.payload_sha256(),
        }
    }
}

/// Whether a valid signature of this witness over this payload is in the manifest. Time and key rotation aside, its
/// bytes do not matter: one is enough.
fn is_there(manifest: &SignatureManifest, wanted: &Wanted) -> bool {
    let payload = wanted.prepared.payload_digest();
    let mut candidates = manifest.layers().iter().filter(|layer| *layer.payload() == payload);
    candidates.any(|layer| verify::is_signed_by(wanted.witness.public_key(), wanted.prepared.payload_sha256(), layer.signature()))
}

fn unreadable(target: &Target, tag: &Tag, source: cosign::Error) -> Error {
    Error::SignatureTag { repository: target.subject.repository().clone(), tag: tag.clone(), source }
}

/// Grows with the round, and differs between writers, so that they do not meet again.
async fn pause(round: u32) {
    let longest = 20u64 << round.min(6);
    tokio::time::sleep(Duration::from_millis(fastrand::u64(longest / 2..=longest))).await;
}
