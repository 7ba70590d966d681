//! Blobs: uploaded once per repository, by one POST where the registry takes that (distribution-spec 1.1, "Single POST"), else by
//! one POST and one PUT ("POST then PUT").

use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use futures::FutureExt;
use http::{HeaderValue, Method, StatusCode, Uri, header::LOCATION};
use tokio::time::Instant;

use super::{
    Error, Registry,
    auth::Access,
    error::{Broken, Reported},
    flight::Flights,
    transport::{Answer, Call, ERROR_LIMIT, Outgoing},
};
use crate::oci::{Digest, Repository};

const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");

/// What is known of a registry's blobs, and what is being uploaded.
pub(super) struct Blobs {
    known: Mutex<Known>,
    uploads: Flights<(Repository, Digest), Result<(), Error>>,
    single_post: Mutex<SinglePost>,
}

impl Blobs {
    pub(super) fn new() -> Self {
        Self { known: Mutex::new(Known::new(Instant::now())), uploads: Flights::new(), single_post: Mutex::default() }
    }

    fn single_post(&self) -> MutexGuard<'_, SinglePost> {
        self.single_post.lock().expect("nothing panics while it holds this")
    }

    fn learn_of_single_post(&self, is_taken: bool) {
        self.single_post().learn(is_taken, Instant::now());
    }

    fn knows(&self, blob: &(Repository, Digest)) -> bool {
        self.known.lock().expect("nothing panics while it holds this").has(blob, Instant::now())
    }

    fn remember(&self, blob: (Repository, Digest)) {
        self.known.lock().expect("nothing panics while it holds this").add(blob, Instant::now());
    }

    pub(super) fn forget(&self, forgotten: impl Fn(&(Repository, Digest)) -> bool) {
        self.known.lock().expect("nothing panics while it holds this").remove(forgotten);
    }
}

/// Whether a registry takes a blob with the POST that elsewhere only opens a session, as far as is known.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum SinglePost {
    #[default]
    Untried,
    Taken,
    /// It was anything but taken, at this time.
    NotTaken(Instant),
}

impl SinglePost {
    /// After which one is tried again: the registry may be another by then.
    const TRY_AGAIN: Duration = Duration::from_secs(3600);

    fn is_worth_trying(self, now: Instant) -> bool {
        !matches!(self, Self::NotTaken(since) if now.duration_since(since) < Self::TRY_AGAIN)
    }

    fn learn(&mut self, is_taken: bool, now: Instant) {
        if !is_taken {
            *self = Self::NotTaken(now);
        } else if self.is_worth_trying(now) {
            *self = Self::Taken;
        }
    }
}

/// What a single POST came to.
enum Posted {
    Taken,
    /// At this address, by this answer, it has only opened a session.
    Session(Uri, Box<Answer>),
    Refused,
    /// No answer.
    Lost,
}

/// The blobs known to be present, in two generations: what was not asked for during one whole generation is forgotten. That
/// bounds the memory, and the time for which we rely on a blob that the registry's garbage collection may have taken.
struct Known {
    young: HashSet<(Repository, Digest)>,
    old: HashSet<(Repository, Digest)>,
    since: Instant,
}

impl Known {
    const MOST: usize = 4096;
    const LIFE: Duration = Duration::from_secs(30 * 60);

    fn new(now: Instant) -> Self {
        Self { young: HashSet::new(), old: HashSet::new(), since: now }
    }

    fn has(&mut self, blob: &(Repository, Digest), now: Instant) -> bool {
        self.age(now);
        if self.young.contains(blob) {
            return true;
        }
        let was_old = self.old.contains(blob);
        if was_old && self.young.len() < Self::MOST {
            // Still in use: the next generation keeps it, but it is no proof that the registry does.
            self.young.insert(blob.clone());
        }
        was_old
    }

    fn add(&mut self, blob: (Repository, Digest), now: Instant) {
        self.age(now);
        self.young.insert(blob);
    }

    fn age(&mut self, now: Instant) {
        if self.young.len() >= Self::MOST || now.duration_since(self.since) >= Self::LIFE {
            self.old = std::mem::take(&mut self.young);
            self.since = now;
        }
    }

    fn remove(&mut self, forgotten: impl Fn(&(Repository, Digest)) -> bool) {
        self.young.retain(|blob| !forgotten(blob));
        self.old.retain(|blob| !forgotten(blob));
    }
}

impl Registry {
    /// Uploads, unless somebody is at it or it is known to be there.
    pub(super) async fn upload_once(&self, repository: &Repository, digest: &Digest, content: Bytes) -> Result<(), Error> {
        let blob = (repository.clone(), digest.clone());
        if self.0.blobs.knows(&blob) {
            return Ok(());
        }
        let upload = self.0.blobs.uploads.join(blob.clone(), || {
            let registry = self.clone();
            async move {
                // The upload before this one may have ended between the two questions.
                if registry.0.blobs.knows(&blob) {
                    return Ok(());
                }
                registry.upload(&blob.0, &blob.1, content).await?;
                registry.0.blobs.remember(blob);
                Ok(())
            }
            .boxed()
        });
        upload.await
    }

    async fn upload(&self, repository: &Repository, digest: &Digest, content: Bytes) -> Result<(), Error> {
        let call = Call {
            doing: "upload the blob",
            repository: Some(repository),
            item: Some(('@', digest.as_str())),
            access: Access::Push,
        };
        let is_worth_trying = self.0.blobs.single_post().is_worth_trying(Instant::now());
        let posted = if is_worth_trying {
            let was_taken = *self.0.blobs.single_post() == SinglePost::Taken;
            let posted = self.post_once(&call, digest, content.clone(), was_taken).await;
            match &posted {
                // It may be busy, or the connection old: that says nothing of what it knows.
                Err(_) | Ok(Posted::Lost) if was_taken => {}
                posted => self.0.blobs.learn_of_single_post(matches!(posted, Ok(Posted::Taken))),
            }
            posted?
        } else {
            Posted::Refused
        };
        let (done, was_sent_twice) = match posted {
            Posted::Taken => return Ok(()),
            Posted::Session(start, answer) => (self.end_session(&call, &start, &answer, digest, content.clone()).await, true),
            Posted::Refused | Posted::Lost => (self.upload_by_session(&call, digest, content.clone()).await, false),
        };
        match done {
            // A session that was cut off or lost is of no use any more, but content has one address: begin again, once.
            Err(Error::BlobUnknown { .. } | Error::Unreachable { source: Broken::Lost(_) | Broken::Cut(_), .. }) => {
                self.upload_by_session(&call, digest, content).await
            }
            // It may have taken what came with the POST for the beginning.
            Err(Error::Rejected { .. }) if was_sent_twice => self.upload_by_session(&call, digest, content).await,
            done => done,
        }
    }

    async fn post_once(&self, call: &Call<'_>, digest: &Digest, content: Bytes, is_known: bool) -> Result<Posted, Error> {
        let start = self.url(call, &format!("/blobs/uploads/?{}", query_of(digest)))?;
        let outgoing = Outgoing::new(Method::POST, start.clone()).with_content(OCTETS, content);
        let answer = match self.exchange(call, outgoing, ERROR_LIMIT).await {
            Err(Error::Unreachable { source: Broken::Lost(_) | Broken::Cut(_), .. }) => return Ok(Posted::Lost),
            answer => answer?,
        };
        match answer.status {
            StatusCode::CREATED => {
                // The first time it is looked whether it has what it says that it has.
                let is_there = self.check_claim(call, &answer, digest).is_ok() && (is_known || self.has_blob(call, digest).await);
                Ok(if is_there { Posted::Taken } else { Posted::Refused })
            }
            // distribution has only seen a POST, and waits for the content.
            StatusCode::ACCEPTED => Ok(Posted::Session(start, Box::new(answer))),
            status => match self.write_failure(call, &answer) {
                error @ (Error::Throttled { .. } | Error::ServerError { .. })
                    if status != StatusCode::INTERNAL_SERVER_ERROR && status != StatusCode::NOT_IMPLEMENTED =>
                {
                    Err(error)
                }
                // A session is what every registry knows, and what it says to that counts.
                error => {
                    tracing::debug!(registry = %self.0.name, %error, "a blob is not taken by a single POST");
                    Ok(Posted::Refused)
                }
            },
        }
    }

    /// Whether it says so: what cannot be found out is uploaded again.
    async fn has_blob(&self, call: &Call<'_>, digest: &Digest) -> bool {
        let Ok(target) = self.url(call, &format!("/blobs/{digest}")) else { return false };
        let answer = self.exchange(call, Outgoing::new(Method::HEAD, target), ERROR_LIMIT).await;
        answer.is_ok_and(|answer| answer.status == StatusCode::OK)
    }

    async fn upload_by_session(&self, call: &Call<'_>, digest: &Digest, content: Bytes) -> Result<(), Error> {
        let start = self.url(call, "/blobs/uploads/")?;
        let answer = self.exchange(call, Outgoing::new(Method::POST, start.clone()), ERROR_LIMIT).await?;
        if answer.status != StatusCode::ACCEPTED {
            return Err(self.write_failure(call, &answer));
        }
        self.end_session(call, &start, &answer, digest, content).await
    }

    /// Sends all the content to the session that `answer` has opened.
    async fn end_session(
        &self,
        call: &Call<'_>,
        start: &Uri,
        answer: &Answer,
        digest: &Digest,
        content: Bytes,
    ) -> Result<(), Error> {
        let Some(location) = answer.header(LOCATION) else {
            return Err(Error::Malformed { at: self.at_call(call), problem: "an upload without a Location".to_owned() });
        };
        let mut target = self.own_url(call, start, location)?;
        // Not through query_pairs_mut: it would rewrite the query that is there, which the registry has signed.
        let query = match target.query().filter(|query| !query.is_empty()) {
            Some(query) => format!("{query}&{}", query_of(digest)),
            None => query_of(digest),
        };
        target.set_query(Some(&query));
        target.set_fragment(None);
        let outgoing = Outgoing::new(Method::PUT, self.target(call, &target)?).with_content(OCTETS, content);
        let answer = self.exchange(call, outgoing, ERROR_LIMIT).await?;
        if answer.status != StatusCode::CREATED && answer.status != StatusCode::NO_CONTENT {
            return Err(self.write_failure(call, &answer));
        }
        self.check_claim(call, &answer, digest)
    }

    /// A `Docker-Content-Digest` that a write is answered with must be what was written.
    pub(super) fn check_claim(&self, call: &Call<'_>, answer: &Answer, digest: &Digest) -> Result<(), Error> {
        match answer.content_digest() {
            Some(claimed) if claimed.algorithm() == digest.algorithm() && claimed != *digest => {
                Err(Error::DigestMismatch { at: self.at_call(call), expected: digest.to_string(), found: claimed.to_string() })
            }
            _ => Ok(()),
        }
    }

    /// The error that the answer to a write stands for.
    pub(super) fn write_failure(&self, call: &Call<'_>, answer: &Answer) -> Error {
        const LOST: &[&str] =
            &["MANIFEST_BLOB_UNKNOWN", "BLOB_UNKNOWN", "DIGEST_INVALID", "BLOB_UPLOAD_UNKNOWN", "BLOB_UPLOAD_INVALID"];
        match self.failure(call, answer) {
            Error::Rejected { at, reported } if reported.has(LOST) => {
                if let Some(repository) = call.repository {
                    self.0.blobs.forget(|(known, _)| known == repository);
                }
                // It may have said that it took what it threw away.
                self.0.blobs.learn_of_single_post(false);
                Error::BlobUnknown { at, reported }
            }
            Error::Rejected { at, reported } | Error::Denied { at, reported, .. } if says_read_only(&reported) => {
                Error::ReadOnly { at, reported }
            }
            Error::Rejected { at, reported } | Error::Denied { at, reported, .. } if says_full(&reported) => {
                Error::Quota { at, reported }
            }
            Error::Rejected { at, reported } | Error::Denied { at, reported, .. } if says_immutable(call, &reported) => {
                Error::ImmutableTag { at, reported }
            }
            error => error,
        }
    }
}

fn query_of(digest: &Digest) -> String {
    format!("digest={}%3A{}", digest.algorithm(), digest.encoded())
}

/// Whether a write was refused because none is taken. distribution has no code for that: it does not know the method. Harbor says
/// `DENIED`, and in words that it is in read only mode.
fn says_read_only(reported: &Reported) -> bool {
    let message = reported.message().to_ascii_lowercase();
    reported.status() == StatusCode::METHOD_NOT_ALLOWED || message.contains("read only") || message.contains("read-only")
}

/// Whether a write was refused for a quota. Harbor has `DENIED` for that too: "adding 1 KiB of storage resource, which when updated
/// to current usage of 10 GiB will exceed the configured upper limit of 10 GiB"; others name the quota.
fn says_full(reported: &Reported) -> bool {
    let message = reported.message().to_ascii_lowercase();
    message.contains("quota") || message.contains("exceed the configured upper limit")
}

/// Whether a refused write of a tag was refused for its immutability. There is no code for that: ECR says `TAG_INVALID`,
/// Harbor `PRECONDITION`, others `DENIED`, but each says it in words.
fn says_immutable(call: &Call<'_>, reported: &Reported) -> bool {
    let message = reported.message().to_ascii_lowercase();
    matches!(call.item, Some((':', _))) && (message.contains("immutab") || message.contains("cannot be overwritten"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_post_that_was_not_taken_is_tried_again_after_an_hour() {
        let start = Instant::now();
        let mut known = SinglePost::default();
        assert!(known.is_worth_trying(start));
        known.learn(true, start);
        assert_eq!(known, SinglePost::Taken);
        known.learn(false, start);
        // One that was on its way says that it was.
        known.learn(true, start);
        assert!(!known.is_worth_trying(start + SinglePost::TRY_AGAIN / 2));
        assert!(known.is_worth_trying(start + SinglePost::TRY_AGAIN));
        known.learn(true, start + SinglePost::TRY_AGAIN);
        assert_eq!(known, SinglePost::Taken);
    }

    #[test]
    fn what_is_known_is_bounded_and_forgotten_when_it_is_not_asked_for() {
        let blob = |n: usize| ("a".parse().unwrap(), Digest::of(&n.to_le_bytes()));
        let start = Instant::now();
        let mut known = Known::new(start);
        for n in 0..Known::MOST * 10 {
            known.add(blob(n), start);
            assert!(known.has(&blob(0), start), "what is asked for all the time stays");
        }
        assert!(known.young.len() + known.old.len() <= 2 * Known::MOST);
        assert!(known.has(&blob(Known::MOST * 10 - 1), start));
        assert!(!known.has(&blob(1), start));
        assert!(known.has(&blob(0), start + Known::LIFE), "old now");
        let mut idle = Known::new(start);
        idle.add(blob(7), start);
        assert!(idle.has(&blob(8), start + Known::LIFE) || idle.old.contains(&blob(7)));
        idle.age(start + 2 * Known::LIFE);
        assert!(!idle.has(&blob(7), start + 2 * Known::LIFE));
    }
}
