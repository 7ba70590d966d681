//! A client of the OCI distribution API (distribution-spec 1.1), as much of it as signing and verifying need.
//!
//! Nothing that a registry says is believed: content is hashed, sizes and times are bounded, a 404 counts as "not there"
//! only if the registry itself says so, and credentials go to the registry and to the token service that it names, by https,
//! and nowhere else. One [`Registry`] is one configured registry; cloning it is cheap and shares its connections, its tokens
//! and what it knows of blobs.
//!
//! Calls repeat a request by themselves only where that is safe and quick: reads that docker-registry answers 500 while the
//! tag is being written, reads and uploads on a kept connection that was just being closed, uploads in another way than the one
//! that was refused. All else is an [`Error`] whose
//! verdict says whether the event should come again. A manifest PUT is never repeated here: another writer may have come in
//! between, and only the caller can read, merge and write again.

mod auth;
mod blobs;
mod challenge;
mod connect;
mod error;
mod flight;
mod listing;
mod manifest;
mod referrers;
mod transport;

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode, Uri, header::CONTENT_TYPE};
use hyper_util::client::proxy::matcher::Matcher;
use reqwest::Url;
use secrecy::SecretString;

use auth::{Access, Authenticator};
use blobs::Blobs;
use connect::Client;
use transport::{Call, ERROR_LIMIT, Outgoing};

pub use error::{Account, At, Broken, Error, Reported};
pub(crate) use flight::Flights;
pub use manifest::Manifest;
pub use referrers::{IndexError, Referrers, ReferrersIndex};

use crate::oci::{Digest, RegistryName, Repository, Tag};

/// What the configuration says of one registry.
#[derive(Clone)]
pub struct Settings {
    /// The registry's name in image references.
    pub name: RegistryName,
    /// Where its API is: `https://host[:port]`, or `http://…` for a registry without TLS. The `/v2/` is added; a path is kept
    /// before it.
    pub url: Url,
    pub credentials: Option<Credentials>,
    /// Certificates (PEM, one or more) that are trusted besides the system's.
    pub ca: Option<Vec<u8>>,
    pub timeouts: Timeouts,
    /// Told of every exchange that ended.
    pub observer: Option<Observer>,
}

/// Reads what of a registry's answers is read beside manifests: what it asks for, where a listing goes on, and what it says is wrong.
#[cfg(fuzzing)]
pub fn read_answer(header: &str, body: &[u8]) {
    if let Ok(value) = HeaderValue::from_str(header) {
        let headers = http::HeaderMap::from_iter([(http::header::WWW_AUTHENTICATE, value)]);
        let _ = challenge::Challenge::read(&headers);
    }
    if let Some(target) = transport::next_link(header) {
        assert!(header.contains(&format!("<{target}>")), "a target that was not sent");
    }
    let reported = Reported::read(StatusCode::BAD_REQUEST, body, &["the secret"]);
    assert!(!format!("{reported:?}").contains("the secret"), "a credential was kept");
}

/// What type of manifest this is taken for when it is served with this header.
#[cfg(fuzzing)]
#[must_use]
pub fn read_manifest(content_type: Option<&str>, content: &[u8]) -> Option<&'static str> {
    let manifest = Manifest::new(&Address::Tag(Tag::latest()), content_type, None, Bytes::copy_from_slice(content));
    manifest.ok().map(|manifest| manifest.media_type())
}

/// Told what was done (`read the manifest`), how it ended (`ok`, or a word for what went wrong), and how long it took.
pub type Observer = Arc<dyn Fn(&'static str, &'static str, Duration) + Send + Sync>;

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the URL itself: somebody may have written a password into it, which `Registry::new` refuses.
        f.debug_struct("Settings")
            .field("name", &self.name)
            .field("url", &format_args!("{}", transport::origin_text(&self.url)))
            .field("credentials", &self.credentials)
            .field("ca", &self.ca.as_ref().map(Vec::len))
            .field("timeouts", &self.timeouts)
            .finish_non_exhaustive()
    }
}

/// An account of the registry. For a token instead of a password, registries say which username goes with it.
#[derive(Debug, Clone)]
pub struct Credentials {
    pub username: String,
    pub password: SecretString,
}

/// How long a registry may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// To connect, TLS included.
    pub connect: Duration,
    /// For one whole request, from connecting to the last byte of the answer.
    pub request: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect: Duration::from_secs(5), request: Duration::from_secs(30) }
    }
}

/// What a manifest is asked for by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Tag(Tag),
    Digest(Digest),
}

impl Address {
    fn as_str(&self) -> &str {
        match self {
            Self::Tag(tag) => tag.as_str(),
            Self::Digest(digest) => digest.as_str(),
        }
    }

    fn item(&self) -> (char, &str) {
        match self {
            Self::Tag(tag) => (':', tag.as_str()),
            Self::Digest(digest) => ('@', digest.as_str()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<Tag> for Address {
    fn from(tag: Tag) -> Self {
        Self::Tag(tag)
    }
}

impl From<Digest> for Address {
    fn from(digest: Digest) -> Self {
        Self::Digest(digest)
    }
}

/// One registry. `Clone` shares everything.
#[derive(Clone)]
pub struct Registry(Arc<Shared>);

struct Shared {
    name: RegistryName,
    /// `settings.url`, without a path.
    origin: Url,
    /// `https://host/v2/`
    base: String,
    client: Client,
    timeouts: Timeouts,
    authenticator: Authenticator,
    blobs: Blobs,
    referrers: referrers::Knowledge,
    older_layout: referrers::OlderLayout,
    observer: Option<Observer>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Registry({} at {})", self.0.name, self.0.base)
    }
}

impl Registry {
    /// Sets up the client; nothing is sent yet. Connections by https go through the proxy that `HTTPS_PROXY`, `ALL_PROXY` and
    /// `NO_PROXY` name, those by plain http go directly.
    ///
    /// # Errors
    /// [`Error::Settings`], which says what is wrong with them.
    pub fn new(settings: Settings) -> Result<Self, Error> {
        Self::through(settings, Matcher::from_env())
    }

    fn through(settings: Settings, proxies: Matcher) -> Result<Self, Error> {
        let wrong = |problem: String| Error::Settings { registry: settings.name.clone(), problem };
        let url = &settings.url;
        if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
            return Err(wrong(
                "its url must begin with https:// (or http://, for a registry without TLS) and name a host".into(),
            ));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(wrong("its url holds a username or password: these have settings of their own".into()));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(wrong("its url has a query or a fragment, which the API has no use for".into()));
        }
        let base = format!("{}/v2/", url.as_str().trim_end_matches('/'));
        let mut origin = url.clone();
        origin.set_path("");
        let authenticator = Authenticator::new(settings.credentials.clone()).map_err(wrong)?;
        let client = connect::client(&settings, proxies).map_err(wrong)?;
        let Settings { name, timeouts, observer, .. } = settings;
        let blobs = Blobs::new();
        let referrers = referrers::Knowledge::default();
        let older_layout = referrers::OlderLayout::default();
        Ok(Self(Arc::new(Shared {
            name,
            origin,
            base,
            client,
            timeouts,
            authenticator,
            blobs,
            referrers,
            older_layout,
            observer,
        })))
    }

    /// The registry's name in image references.
    pub fn name(&self) -> &RegistryName {
        &self.0.name
    }

    /// Whether it is asked by an account, and not by nobody.
    pub fn has_account(&self) -> bool {
        self.0.authenticator.account().0.is_some()
    }

    /// The same registry, asked by another account. The connections are shared.
    ///
    /// # Errors
    /// [`Error::Settings`] if the username cannot be sent.
    pub fn with_account(&self, credentials: Credentials) -> Result<Self, Error> {
        let Shared { name, origin, base, client, timeouts, observer, .. } = &*self.0;
        let wrong = |problem| Error::Settings { registry: name.clone(), problem };
        Ok(Self(Arc::new(Shared {
            name: name.clone(),
            origin: origin.clone(),
            base: base.clone(),
            client: client.clone(),
            timeouts: *timeouts,
            authenticator: Authenticator::new(Some(credentials)).map_err(wrong)?,
            blobs: Blobs::new(),
            referrers: referrers::Knowledge::default(),
            older_layout: referrers::OlderLayout::default(),
            observer: observer.clone(),
        })))
    }

    /// Whether the registry is there and lets us in (`GET /v2/`). Says nothing of what may be done in which repository.
    pub async fn ping(&self) -> Result<(), Error> {
        let call = Call { doing: "reach the API", repository: None, item: None, access: Access::Enter };
        let answer = self.exchange(&call, Outgoing::new(Method::GET, self.url(&call, "")?), ERROR_LIMIT).await?;
        if answer.status == StatusCode::OK { Ok(()) } else { Err(self.failure(&call, &answer)) }
    }

    /// The manifest at `at`, verified as [`Manifest`] says. None only if the registry itself says that there is none.
    pub async fn manifest(&self, repository: &Repository, at: &Address) -> Result<Option<Manifest>, Error> {
        let call = Call { doing: "read the manifest", repository: Some(repository), item: Some(at.item()), access: Access::Pull };
        let outgoing = Outgoing::new(Method::GET, self.url(&call, &format!("/manifests/{at}"))?).accepting_manifests();
        let answer = self.exchange(&call, outgoing, Manifest::LIMIT).await?;
        if answer.says_absent() {
            return Ok(None);
        }
        if answer.status != StatusCode::OK {
            return Err(self.failure(&call, &answer));
        }
        let claimed = answer.content_digest();
        Manifest::new(at, answer.header(CONTENT_TYPE), claimed.as_ref(), answer.body.clone()).map(Some).map_err(|refused| {
            let place = self.at_call(&call);
            match (refused, at) {
                (manifest::Refused::Mismatch { expected, found }, _) => {
                    Error::DigestMismatch { at: place, expected: expected.to_string(), found: found.to_string() }
                }
                (manifest::Refused::Malformed(problem), Address::Digest(_)) => Error::Unsupported { at: place, problem },
                (manifest::Refused::Malformed(problem), Address::Tag(_)) => Error::Malformed { at: place, problem },
            }
        })
    }

    /// The digest that `tag` names now, on the registry's word. None only if the registry itself says that there is no such tag.
    pub async fn resolve(&self, repository: &Repository, tag: &Tag) -> Result<Option<Digest>, Error> {
        let call = Call {
            doing: "resolve the tag",
            repository: Some(repository),
            item: Some((':', tag.as_str())),
            access: Access::Pull,
        };
        let outgoing = Outgoing::new(Method::HEAD, self.url(&call, &format!("/manifests/{tag}"))?).accepting_manifests();
        let answer = self.exchange(&call, outgoing, ERROR_LIMIT).await?;
        match (answer.status, answer.content_digest()) {
            (StatusCode::OK, Some(digest)) => Ok(Some(digest)),
            // Without the header the content tells; and a 404 or another error to a HEAD has no body that would say whose it
            // is and why, so the question is asked again in full.
            _ => Ok(self.manifest(repository, &Address::Tag(tag.clone())).await?.map(|manifest| manifest.digest().clone())),
        }
    }

    /// Stores a manifest under a tag or by its digest. Everything it refers to must be there: see [`Self::ensure_blob`].
    ///
    /// # Errors
    /// [`Error::BlobUnknown`] asks for the blobs to be ensured again, which will then upload them. After
    /// [`Error::Unreachable`] it is not known whether it was written.
    pub async fn put_manifest(
        &self,
        repository: &Repository,
        at: &Address,
        media_type: &str,
        content: Bytes,
    ) -> Result<(), Error> {
        let call =
            Call { doing: "write the manifest", repository: Some(repository), item: Some(at.item()), access: Access::Push };
        let digest = Digest::of(&content);
        if let Address::Digest(asked) = at
            && !asked.matches(&content)
        {
            return Err(Error::DigestMismatch {
                at: self.at_call(&call),
                expected: asked.to_string(),
                found: digest.to_string(),
            });
        }
        let media_type = HeaderValue::from_str(media_type)
            .map_err(|_| Error::Unsupported { at: self.at_call(&call), problem: format!("its media type is {media_type:?}") })?;
        let url = self.url(&call, &format!("/manifests/{at}"))?;
        let answer = self.exchange(&call, Outgoing::new(Method::PUT, url).with_content(media_type, content), ERROR_LIMIT).await?;
        if answer.status != StatusCode::CREATED {
            return Err(self.write_failure(&call, &answer));
        }
        if answer.header("oci-subject").is_some() {
            self.0.referrers.heard_of_subject();
        }
        self.check_claim(&call, &answer, &digest)
    }

    /// Makes sure that the repository has the blob, and returns its SHA-256 digest. Uploads it unless it is known to be there;
    /// however many ask for the same blob at once, it is uploaded once.
    pub async fn ensure_blob(&self, repository: &Repository, content: Bytes) -> Result<Digest, Error> {
        let digest = Digest::of(&content);
        self.upload_once(repository, &digest, content).await?;
        Ok(digest)
    }

    /// Forgets that the repository is known to have the blob: the next [`Self::ensure_blob`] uploads it.
    pub fn forget_blob(&self, repository: &Repository, digest: &Digest) {
        self.0.blobs.forget(|(known, blob)| known == repository && blob == digest);
    }

    /// A blob's content, which hashes to `digest` and has at most `limit` bytes. None only if the registry itself says that
    /// there is none.
    pub async fn blob(&self, repository: &Repository, digest: &Digest, limit: u64) -> Result<Option<Bytes>, Error> {
        let call = Call {
            doing: "read the blob",
            repository: Some(repository),
            item: Some(('@', digest.as_str())),
            access: Access::Pull,
        };
        let outgoing = Outgoing::new(Method::GET, self.url(&call, &format!("/blobs/{digest}"))?);
        let answer = self.exchange(&call, outgoing, usize::try_from(limit).unwrap_or(usize::MAX)).await?;
        if answer.says_absent() {
            return Ok(None);
        }
        if answer.status != StatusCode::OK {
            return Err(self.failure(&call, &answer));
        }
        if !digest.matches(&answer.body) {
            let found = Digest::of(&answer.body).to_string();
            return Err(Error::DigestMismatch { at: self.at_call(&call), expected: digest.to_string(), found });
        }
        Ok(Some(answer.body))
    }

    /// The API's address for the call's repository, `rest` being what follows its name.
    fn url(&self, call: &Call<'_>, rest: &str) -> Result<Uri, Error> {
        let base = &self.0.base;
        let text = match call.repository {
            Some(repository) => format!("{base}{repository}{rest}"),
            None => format!("{base}{rest}"),
        };
        Uri::from_maybe_shared(Bytes::from(text))
            .map_err(|error| Error::Malformed { at: self.at_call(call), problem: error.to_string() })
    }
}

#[cfg(test)]
mod tests;
