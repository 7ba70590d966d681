//! Referrers: the manifests that name another one as their subject (distribution-spec 1.1, "Listing Referrers").
//!
//! Registries with the referrers API list them themselves. In one without it, whoever writes a referrer keeps an index of them
//! under a tag ("Referrers Tag Schema"). Which kind a registry is can only be found out by asking it; that is remembered, and
//! asked again: an API that was not there may come, and a proxy's 404 is no word of the registry's.

mod index;

use std::{sync::Mutex, time::Duration};

use http::{Method, StatusCode, header::CONTENT_TYPE};
use tokio::time::Instant;

pub use index::{IndexError, ReferrersIndex};

use super::{
    Address, Error, Manifest, Registry,
    auth::Access,
    transport::{Answer, Call, Outgoing},
};
use crate::oci::{Descriptor, Digest, Repository, Tag, media_type};

/// A registry that had no API is asked again after this time.
const ASK_AGAIN: Duration = Duration::from_secs(3600);
const MOST_PAGES: usize = 100;
const MOST_ENTRIES: usize = 10_000;
/// Of all pages together: anybody who can push can make entries of any length.
const MOST_BYTES: usize = 4 * Manifest::LIMIT;

/// The referrers of one manifest, as they are listed. Nothing here has been verified.
#[derive(Debug, Clone)]
pub struct Referrers {
    entries: Vec<Descriptor>,
    by_api: bool,
}

impl Referrers {
    /// Those of an index that is kept under the fallback tag.
    #[must_use]
    pub fn of_index(index: ReferrersIndex) -> Self {
        Self { entries: index.into_entries(), by_api: false }
    }

    pub fn entries(&self) -> &[Descriptor] {
        &self.entries
    }

    /// Whether the registry listed them itself, and so lists whatever is pushed with a subject. Otherwise the index under the
    /// fallback tag is to be kept by whoever pushes.
    #[must_use]
    pub fn is_by_api(&self) -> bool {
        self.by_api
    }

    /// Those that may be of one of these artifact types: listed as such, or without a type that says anything. cosign's own
    /// entries in the fallback index are of the latter kind.
    pub fn candidates<'a>(&'a self, artifact_types: &'static [&'static str]) -> impl Iterator<Item = &'a Descriptor> + use<'a> {
        self.entries.iter().filter(|entry| match entry.artifact_type.as_deref() {
            None | Some("" | media_type::OCI_EMPTY) => entry.media_type == media_type::OCI_MANIFEST,
            Some(named) => artifact_types.contains(&named),
        })
    }
}

/// Whether a registry has the API, as far as is known.
#[derive(Debug, Default)]
pub(super) struct Knowledge(Mutex<Known>);

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Known {
    #[default]
    Nothing,
    HasApi,
    /// It had none at this time.
    HadNone(Instant),
}

impl Knowledge {
    fn is_worth_asking(&self) -> bool {
        !matches!(*self.lock(), Known::HadNone(since) if since.elapsed() < ASK_AGAIN)
    }

    fn found_api(&self) {
        *self.lock() = Known::HasApi;
    }

    /// One that had the API a moment ago must say twice that it has none.
    fn found_none(&self) {
        let mut known = self.lock();
        *known = if *known == Known::HasApi { Known::Nothing } else { Known::HadNone(Instant::now()) };
    }

    /// The registry said that it took notice of a manifest's subject: it may have the API by now. Some say so that have none.
    pub(super) fn heard_of_subject(&self) {
        let mut known = self.lock();
        if matches!(*known, Known::HadNone(_)) {
            *known = Known::Nothing;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.0.lock().expect("nothing panics while it holds this")
    }
}

/// When a registry has refused a manifest that says its artifact's type itself, and taken the one in the layout of before OCI
/// image-spec 1.1, if it has.
#[derive(Debug, Default)]
pub(super) struct OlderLayout(Mutex<Option<Instant>>);

impl OlderLayout {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.0.lock().expect("nothing panics while it holds this")
    }
}

impl Registry {
    /// Whether artifacts are to be stored in the layout of before OCI image-spec 1.1, because the registry took nothing else when
    /// it was tried last. It is tried again later.
    pub fn takes_older_layout(&self) -> bool {
        self.0.older_layout.lock().is_some_and(|since| since.elapsed() < ASK_AGAIN)
    }

    /// Remembers which of both layouts the registry took when it had refused the other.
    pub fn remember_layout(&self, is_older: bool) {
        *self.0.older_layout.lock() = is_older.then(Instant::now);
    }

    /// All referrers of `subject` in this repository: by the API, or if the registry has none, by the index under the fallback
    /// tag.
    ///
    /// # Errors
    /// [`Error::NoIndex`] if the fallback tag holds something else.
    pub async fn referrers(&self, repository: &Repository, subject: &Digest) -> Result<Referrers, Error> {
        if let Some(entries) = self.listed_referrers(repository, subject).await? {
            return Ok(Referrers { entries, by_api: true });
        }
        let index = self.referrers_index(repository, subject).await?;
        Ok(Referrers::of_index(index.map_or_else(ReferrersIndex::empty, |(_, index)| index)))
    }

    /// The index under the fallback tag, and its digest. None if there is none.
    ///
    /// # Errors
    /// [`Error::NoIndex`] if the tag holds something else, which is then not to be overwritten.
    pub async fn referrers_index(
        &self,
        repository: &Repository,
        subject: &Digest,
    ) -> Result<Option<(Digest, ReferrersIndex)>, Error> {
        let tag = Tag::referrers(subject);
        let Some(manifest) = self.manifest(repository, &Address::Tag(tag.clone())).await? else { return Ok(None) };
        match ReferrersIndex::read(manifest.media_type(), manifest.content()) {
            Ok(index) => Ok(Some((manifest.digest().clone(), index))),
            Err(problem) => {
                let call = Call {
                    doing: "read the referrers under",
                    repository: Some(repository),
                    item: Some((':', tag.as_str())),
                    access: Access::Pull,
                };
                Err(Error::NoIndex { at: self.at_call(&call), problem: problem.to_string() })
            }
        }
    }

    /// What the API lists; None if the registry has none.
    async fn listed_referrers(&self, repository: &Repository, subject: &Digest) -> Result<Option<Vec<Descriptor>>, Error> {
        let knowledge = &self.0.referrers;
        if !knowledge.is_worth_asking() {
            return Ok(None);
        }
        let call = Call {
            doing: "list the referrers of",
            repository: Some(repository),
            item: Some(('@', subject.as_str())),
            access: Access::Pull,
        };
        let mut entries = vec![];
        // Not filtered by the registry: some filter wrongly, and one listing serves all formats.
        let mut next = Some(self.url(&call, &format!("/referrers/{subject}"))?);
        let (mut pages, mut bytes) = (0, 0);
        while let Some(url) = next {
            let outgoing = Outgoing::new(Method::GET, url.clone()).accepting_manifests().staying();
            let answer = self.exchange(&call, outgoing, Manifest::LIMIT).await?;
            if pages == 0 && says_unsupported(&answer) {
                if !self.speaks_of_names(&answer) {
                    knowledge.found_none();
                }
                return Ok(None);
            }
            if answer.status != StatusCode::OK {
                return Err(self.failure(&call, &answer));
            }
            let page = ReferrersIndex::read(media_type::OCI_INDEX, &answer.body)
                .map_err(|error| Error::Malformed { at: self.at_call(&call), problem: error.to_string() })?;
            entries.extend(page.into_entries());
            pages += 1;
            bytes += answer.body.len();
            if pages > MOST_PAGES || entries.len() > MOST_ENTRIES || bytes > MOST_BYTES {
                let limit = format!("{MOST_ENTRIES} referrers, {MOST_PAGES} pages or {MOST_BYTES} bytes");
                return Err(Error::Oversized { at: self.at_call(&call), limit });
            }
            next = self.next_page(&call, &url, &answer)?;
        }
        knowledge.found_api();
        Ok(Some(entries))
    }

    /// Whether a refusal is a registry's word about a repository or a manifest, which says nothing of the API in general.
    fn speaks_of_names(&self, answer: &Answer) -> bool {
        self.reported(answer).has(&["NAME_UNKNOWN", "MANIFEST_UNKNOWN"])
    }
}

/// Whether the first answer is that of a registry without the API, or of what stands in for its website.
fn says_unsupported(answer: &Answer) -> bool {
    match answer.status {
        StatusCode::OK => {
            let content_type = answer.header(CONTENT_TYPE).and_then(|text| text.split(';').next()).unwrap_or_default();
            !content_type.trim().eq_ignore_ascii_case(media_type::OCI_INDEX)
        }
        StatusCode::BAD_REQUEST
        | StatusCode::NOT_FOUND
        | StatusCode::METHOD_NOT_ALLOWED
        | StatusCode::NOT_ACCEPTABLE
        | StatusCode::NOT_IMPLEMENTED => true,
        status => status.is_redirection(),
    }
}
