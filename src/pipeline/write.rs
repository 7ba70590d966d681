//! One digest's signatures: look, sign what is missing, add it to what is there, write, read back.
//!
//! A registry has no conditional write, so two writers of one `.sig` tag can overwrite each other. What can be done is
//! done: writers in this process take turns by digest, everything slow comes before the last look, and after the write
//! another look tells whether it held; if not, all is done again.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

use futures::future::{join_all, try_join_all};
use tokio::time::Instant;
use tracing::debug;

use crate::{
    clock::Clock,
    kms,
    ledger::{Intent, Ledger},
    oci::{Digest, Tag, media_type},
    pipeline::{
        Error,
        plan::{Target, Wanted},
    },
    registry::{self, Address, Registry},
    signature::cosign::{self, EMPTY_CONFIG, Layer, SignatureManifest, extend_config},
    telemetry::Metrics,
    verify::{self, Trust, Verified},
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
    pub metrics: &'a Metrics,
    pub turns: &'a Turns,
    pub clock: &'a Clock,
    pub message_id: &'a str,
    /// When the tag was resolved.
    pub located: Instant,
}

impl Desk<'_> {
    /// Sees to every signature of the target. One answer for each of `target.wanted`, in order.
    pub async fn see_to(&self, target: &Target) -> Vec<Written> {
        let turn = format!("{}/{}@{}", target.subject.registry(), target.subject.repository(), target.subject.digest());
        let _turn = self.turns.take(turn).await;
        let mut answers: Vec<Option<Written>> = target.wanted.iter().map(|_| None).collect();
        if let Err(error) = self.try_see_to(target, &mut answers).await {
            // What is open after a failure failed by it: the error is one, so it is shared in words.
            let error = Arc::new(error);
            return answers
                .into_iter()
                .map(|answer| answer.unwrap_or_else(|| Written::Failed(Error::Shared(error.clone()))))
                .collect();
        }
        answers.into_iter().map(|answer| answer.unwrap_or(Written::Found)).collect()
    }

    async fn try_see_to(&self, target: &Target, answers: &mut [Option<Written>]) -> Result<(), Error> {
        let subject = &target.subject;
        let repository = subject.repository();
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

        self.ledger.intend(missing.iter().map(|(_, wanted)| self.intent(target, wanted)).collect()).await?;
        let (signed, ()) = tokio::join!(join_all(missing.iter().map(|(_, wanted)| self.sign(target, wanted))), async {
            // Failing here is found out below, where the blobs are needed.
            drop(self.upload(target, &missing).await);
        });
        let mut ready = vec![];
        for ((index, _), result) in missing.iter().zip(signed) {
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
        self.write(target, &tag, &missing, &ready).await?;
        for (index, _) in ready {
            answers[index] = Some(Written::New);
        }
        Ok(())
    }

    /// Adds the layers to what is under the tag, until a look afterwards finds them there.
    async fn write(
        &self,
        target: &Target,
        tag: &Tag,
        missing: &[(usize, &Wanted)],
        ready: &[(usize, Verified)],
    ) -> Result<(), Error> {
        let repository = target.subject.repository();
        let layers: Vec<Layer> = ready.iter().map(|(_, verified)| verified.layer().clone()).collect();
        let mut config: Option<(Digest, Vec<u8>)> = None;
        for round in 0..ROUNDS {
            self.upload(target, missing).await?;
            let current = self.read(target, tag).await?;
            let mut manifest = current.unwrap_or_else(SignatureManifest::empty);
            if let Some(own) = manifest.own_config() {
                match &config {
                    Some((of, content)) if *of == own => manifest.set_config(content),
                    _ => {
                        let content = self.registry.blob(repository, &own, cosign::MAX_PAYLOAD).await?;
                        if let Some(content) = content.and_then(|content| extend_config(&content, &layers)) {
                            self.registry.ensure_blob(repository, content.clone().into()).await?;
                            config = Some((own, content));
                            // That took a while: look again, so that the look and the write stay close together.
                            if round + 1 < ROUNDS {
                                continue;
                            }
                        }
                    }
                }
            }
            manifest.add(layers.iter().cloned()).map_err(|error| unreadable(target, tag, error))?;
            let content = manifest.to_bytes();
            let written = Digest::of(&content);
            let address = Address::Tag(tag.clone());
            match self.registry.put_manifest(repository, &address, media_type::OCI_MANIFEST, content).await {
                Ok(()) => {}
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
                return Ok(());
            }
            let stored = stored.map(|stored| SignatureManifest::read(stored.media_type(), stored.content()));
            if let Some(Ok(stored)) = stored
                && layers.iter().all(|layer| stored.contains(layer))
            {
                return Ok(());
            }
            debug!(round, "another writer replaced our signatures, adding them again");
            pause(round).await;
        }
        Err(Error::Overwritten { tag: tag.to_string(), rounds: ROUNDS })
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
        let began = Instant::now();
        let signed = wanted.witness.sign(wanted.algorithm, prepared.payload_sha256()).await;
        self.metrics.kms_asked(wanted.witness.name(), signed.as_ref().map_or_else(kms::Error::name, |_| "ok"), began.elapsed());
        let raw = signed?;
        let asked = verify::Wanted { digest: target.subject.digest().clone(), reference: prepared.reference().clone() };
        let own = Trust { witness: wanted.witness.name(), keys: wanted.witness.trusted_keys() };
        let layer = prepared.assemble(&raw);
        verify::signature(&layer, Some(prepared.payload()), &asked, &[own], self.clock.now()).map_err(Error::Unverified)
    }

    fn intent(&self, target: &Target, wanted: &Wanted) -> Intent {
        let subject = &target.subject;
        Intent {
            message_id: self.message_id.to_owned(),
            rule: wanted.rules.first().map(|rule| rule.name.clone()).unwrap_or_default(),
            witness: wanted.witness.name().to_owned(),
            key: wanted.witness.key_uri().to_string(),
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
