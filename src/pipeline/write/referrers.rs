//! The image's referrers: each signature is a manifest of its own. A registry with the referrers API lists them itself; in one
//! without it, all of them are added to the index under the fallback tag in one write.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use futures::future::try_join_all;
use jiff::Timestamp;
use tokio::time::Instant;
use tracing::debug;

use super::{
    LOOK_IS_FRESH, Numbered, Ready, Store,
    tag::{self, Addition, Merged, pause},
};
use crate::{
    oci::{Digest, Repository, Tag, media_type},
    outcome::{Classify as _, Verdict},
    pipeline::{
        Error,
        plan::{Target, Wanted},
    },
    registry::{self, Referrers, ReferrersIndex, Registry},
    signature::{Claim, EMPTY_CONFIG, Format, bundle, notation, referrer::Referrer},
    verify::{self, Referring, Stored},
    witness::Witness,
};

/// No more referrers are read in search of our own, which are among the first unless somebody hides them.
const MOST_READ: usize = 100;
/// Tries to store a manifest, and looks for it in the registry's own listing.
const TRIES: u32 = 5;

/// The referrers of one digest.
pub(super) struct ReferrerStore<'a> {
    registry: &'a Registry,
    repository: &'a Repository,
    subject: &'a Digest,
    manifest: notation::Target,
    now: Timestamp,
    /// Whether the registry listed them itself, and when.
    by_api: bool,
    looked: Instant,
    /// What has been read of them: None of those that are no signatures.
    read: HashMap<Digest, Option<(Format, Claim)>>,
}

impl<'a> ReferrerStore<'a> {
    pub(super) fn new(registry: &'a Registry, target: &'a Target, now: Timestamp) -> Self {
        let (repository, subject) = (target.subject.repository(), target.subject.digest());
        let manifest = notation::Target::of(&target.subject);
        Self { registry, repository, subject, manifest, now, by_api: false, looked: Instant::now(), read: HashMap::new() }
    }

    /// Which of these are among the listed, valid.
    async fn find(&mut self, listed: &Referrers, wanted: &[Numbered<'_>]) -> Result<HashSet<usize>, Error> {
        let key = |witness: &Witness| bundle::hint(witness.public_key());
        let certificate = |witness: &Witness| witness.certificates().first().map(|chain| chain.thumbprint().to_owned());
        let hints: Vec<_> =
            wanted.iter().flat_map(|(_, wanted)| [Some(key(&wanted.witness)), certificate(&wanted.witness)]).flatten().collect();
        let mut found = HashSet::new();
        for entry in Stored::candidates(listed, Stored::ARTIFACT_TYPES, &hints).into_iter().take(MOST_READ) {
            if found.len() == wanted.len() {
                break;
            }
            if !self.read.contains_key(&entry.digest) {
                let read = verify::read_referrer(self.registry, self.repository, self.subject, entry).await?;
                let said = match read {
                    Referring::Signature(Stored { format, claim: Ok(claim), .. }) => Some((format, claim)),
                    Referring::Signature(_) | Referring::Layers(_) | Referring::Attestation { .. } | Referring::Other => None,
                };
                self.read.insert(entry.digest.clone(), said);
            }
            if let Some((format, claim)) = &self.read[&entry.digest] {
                let same = |wanted: &Wanted| wanted.prepared.format() == *format && self.is_the_same(claim, wanted);
                found.extend(wanted.iter().filter(|(_, wanted)| same(wanted)).map(|(index, _)| *index));
            }
        }
        Ok(found)
    }

    /// Whether a claim is a valid signature of the wanted one's witness that approves the same digest: in notation's formats,
    /// under the certificate that the wanted one would name, and not for a time that has passed.
    fn is_the_same(&self, claim: &Claim, wanted: &Wanted) -> bool {
        let Wanted { witness, algorithm, .. } = wanted;
        let key = witness.public_key();
        let names_ours = |envelope: &notation::Claim| {
            let newest = witness.certificates().first();
            newest.is_none_or(|newest| newest.thumbprint() == envelope.chain().thumbprint())
                && verify::notation::check(envelope, witness.name(), key, witness.certificates(), &self.manifest, self.now)
                    .is_ok()
        };
        claim.digests.contains(self.subject)
            && claim.notation.as_deref().is_none_or(names_ours)
            && key.verify(*algorithm, &claim.signed_sha256, &claim.signature).is_ok()
    }

    /// Stores the blobs and the manifests. Returns each as it was stored.
    async fn put<'r>(&self, ready: &[&'r Ready<'r>]) -> Result<Vec<Put<'r>>, Error> {
        let referrers = ready.iter().filter_map(|one| Some((*one, one.fresh.artifact().referrer()?)));
        try_join_all(referrers.map(async |(one, referrer)| Ok((one, self.put_one(referrer).await?)))).await
    }

    /// In the layout that the registry takes, where there are two.
    async fn put_one<'r>(&self, referrer: &'r Referrer) -> Result<&'r Referrer, Error> {
        let Some(older) = referrer.older() else { return self.put_as(referrer).await };
        let is_older = self.registry.takes_older_layout();
        let (first, second) = if is_older { (older, referrer) } else { (referrer, older) };
        match self.put_as(first).await {
            Err(Error::Registry(refused)) if refused.is_of_content() => {
                debug!(error = &refused as &dyn std::error::Error, "manifest refused, trying the artifact's other layout");
                match self.put_as(second).await {
                    Ok(stored) => {
                        self.registry.remember_layout(!is_older);
                        Ok(stored)
                    }
                    // What refuses both refuses something else, and says of the first what.
                    Err(error) if !matches!(error.verdict(), Verdict::Retry { .. }) => Err(refused.into()),
                    error => error,
                }
            }
            done => done,
        }
    }

    async fn put_as<'r>(&self, referrer: &'r Referrer) -> Result<&'r Referrer, Error> {
        let blobs = [referrer.blob().clone(), Bytes::from_static(EMPTY_CONFIG)];
        store(self.registry, self.repository, &blobs, referrer.digest(), referrer.manifest()).await?;
        Ok(referrer)
    }
}

/// Stores the blobs, and then the OCI manifest that needs them.
pub(crate) async fn store(
    registry: &Registry,
    repository: &Repository,
    blobs: &[Bytes],
    digest: &Digest,
    manifest: &Bytes,
) -> Result<(), Error> {
    let address = digest.clone().into();
    let mut round = 0;
    loop {
        try_join_all(blobs.iter().map(|blob| registry.ensure_blob(repository, blob.clone()))).await?;
        match registry.put_manifest(repository, &address, media_type::OCI_MANIFEST, manifest.clone()).await {
            // Another upload of the same blob was under way; the registry knows it by the next round.
            Err(error @ registry::Error::BlobUnknown { .. }) if round < TRIES => {
                debug!(error = &error as &dyn std::error::Error, round, "manifest refused for a blob, uploading again");
                pause(round).await;
                round += 1;
            }
            done => return Ok(done?),
        }
    }
}

/// Looks until the registry itself lists all of these. False if it turns out to have no API.
pub(crate) async fn are_listed(
    registry: &Registry,
    repository: &Repository,
    subject: &Digest,
    referrers: &[&Digest],
) -> Result<bool, Error> {
    for round in 0..TRIES {
        let listed = registry.referrers(repository, subject).await?;
        if !listed.is_by_api() {
            return Ok(false);
        }
        let is_listed = |digest: &Digest| listed.entries().iter().any(|entry| entry.digest == *digest);
        if referrers.iter().all(|digest| is_listed(digest)) {
            return Ok(true);
        }
        pause(round).await;
    }
    Err(Error::Unlisted { subject: subject.clone() })
}

impl Store for ReferrerStore<'_> {
    fn keeps(format: Format) -> bool {
        match format {
            Format::Cosign => false,
            Format::Bundle | Format::Notation | Format::NotationCose => true,
        }
    }

    async fn look(&mut self, wanted: &[Numbered<'_>]) -> Result<HashSet<usize>, Error> {
        self.looked = Instant::now();
        let listed = self.registry.referrers(self.repository, self.subject).await?;
        self.by_api = listed.is_by_api();
        self.find(&listed, wanted).await
    }

    async fn prepare(&self, _missing: &[Numbered<'_>]) -> Result<(), registry::Error> {
        self.registry.ensure_blob(self.repository, EMPTY_CONFIG.into()).await.map(drop)
    }

    async fn write(&mut self, ready: &[Ready<'_>]) -> Result<HashSet<usize>, Error> {
        let mut ready: Vec<&Ready<'_>> = ready.iter().collect();
        // Nobody has to read what the registry keeps. But after a while another replica may have signed, and this one be late.
        if self.by_api && self.looked.elapsed() > LOOK_IS_FRESH {
            let wanted: Vec<Numbered<'_>> = ready.iter().map(|one| (one.index, one.wanted)).collect();
            let theirs = self.look(&wanted).await?;
            ready.retain(|one| !theirs.contains(&one.index));
        }
        if ready.is_empty() {
            return Ok(HashSet::new());
        }
        let put = self.put(&ready).await?;
        let written: Vec<_> = put.iter().map(|(_, referrer)| referrer.digest()).collect();
        if self.by_api && are_listed(self.registry, self.repository, self.subject, &written).await? {
            return Ok(ready.iter().map(|one| one.index).collect());
        }
        let (registry, repository, tag) = (self.registry, self.repository, Tag::referrers(self.subject));
        let mut entries = Entries { store: self, put: &put, merged: vec![], ours: HashSet::new() };
        tag::add(registry, repository, &tag, &mut entries).await?;
        Ok(entries.ours)
    }
}

/// A signature, and the referrer that it was stored as.
type Put<'r> = (&'r Ready<'r>, &'r Referrer);

/// What is added to the index under the fallback tag.
struct Entries<'a, 's> {
    store: &'a mut ReferrerStore<'s>,
    put: &'a [Put<'a>],
    /// What the last merge added, and what was written of it.
    merged: Vec<usize>,
    ours: HashSet<usize>,
}

impl Addition for Entries<'_, '_> {
    type Content = ReferrersIndex;
    const MEDIA_TYPE: &'static str = media_type::OCI_INDEX;

    async fn upload(&self) -> Result<(), Error> {
        Ok(())
    }

    async fn look(&self) -> Result<Option<(Digest, ReferrersIndex)>, Error> {
        Ok(self.store.registry.referrers_index(self.store.repository, self.store.subject).await?)
    }

    async fn merge(&mut self, current: Option<ReferrersIndex>) -> Result<Merged, Error> {
        let mut index = current.unwrap_or_else(ReferrersIndex::empty);
        let absent: Vec<_> = self.put.iter().filter(|(_, referrer)| !index.contains(referrer.digest())).collect();
        let wanted: Vec<Numbered<'_>> = absent.iter().map(|(one, _)| (one.index, one.wanted)).collect();
        // Another replica may have been here since the first look: what it wrote has other bytes, and says the same.
        let (listed, known) = (Referrers::of_index(index.clone()), self.store.read.len());
        let theirs = self.store.find(&listed, &wanted).await?;
        if self.store.read.len() > known {
            return Ok(Merged::LookAgain);
        }
        self.merged.clear();
        for (one, referrer) in absent.iter().filter(|(one, _)| !theirs.contains(&one.index)) {
            index.add(referrer.descriptor()).map_err(|source| self.full(source))?;
            self.merged.push(one.index);
        }
        if self.merged.is_empty() {
            return Ok(Merged::Complete);
        }
        index.to_bytes().map(Merged::Write).map_err(|source| self.full(source))
    }

    fn written(&mut self) {
        self.ours.extend(self.merged.drain(..));
    }

    fn is_in(&self, content: &ReferrersIndex) -> bool {
        let is_ours = |one: &Ready<'_>| self.ours.contains(&one.index);
        self.put.iter().all(|(one, referrer)| !is_ours(one) || content.contains(referrer.digest()))
    }
}

impl Entries<'_, '_> {
    fn full(&self, source: registry::IndexError) -> Error {
        let tag = Tag::referrers(self.store.subject);
        Error::ReferrersTag { repository: self.store.repository.clone(), tag, source }
    }
}
