//! What is known of an image's signatures: asked of its registry once, however many ask, and remembered.
//!
//! This is admission's one door to [`crate::verify`]. Evidence is by repository and digest; what a policy makes of it, the
//! tag included, is decided elsewhere, so that any number of policies cost one examination.

use std::{
    collections::HashMap,
    fmt, iter,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use jiff::Timestamp;
use secrecy::ExposeSecret as _;
use sha2::{Digest as _, Sha256};
use tokio::{sync::Semaphore, time::Instant};

use super::{built, cache::Generations, pull_secrets::Logins};
use crate::{
    clock::Clock,
    oci::{Digest, Reference, RegistryName, Tag, media_type},
    registry::{self, Address, Credentials, Flights, Registry},
    signature::Format,
    verify::{self, Depth, Judgement, Known, Rejection, Trust},
};

/// What counts against an image is not believed for longer than this: it may have been signed since.
pub const DENIAL: Duration = Duration::from_secs(1);
/// Images that are asked about at registries at once.
const AT_ONCE: usize = 128;
/// Images that are remembered for not being signed.
const DENIALS: usize = 4096;
/// Accounts of registries, other than those of the configuration, whose tokens are kept.
const ACCOUNTS: usize = 256;

/// The signatures of one digest in one repository.
#[derive(Debug)]
pub struct Evidence {
    /// Whether the registry has the image.
    pub exists: bool,
    pub signatures: Vec<Signature>,
    /// Why nothing could be read where signatures are.
    pub unreadable: Option<String>,
    /// The first moment at which one of them ends by itself.
    until: Option<Timestamp>,
    at: Instant,
}

impl Evidence {
    #[cfg(test)]
    pub(super) fn in_test(signatures: Vec<Signature>) -> Self {
        Self { exists: true, signatures, unreadable: None, until: None, at: Instant::now() }
    }

    /// How long ago the registry was asked.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.at.elapsed()
    }
}

/// One signature, and what it is worth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signature {
    /// It stands for this digest in this repository; under which name is in `reference`.
    Stands { witness: Arc<str>, format: Format, reference: Option<Reference> },
    /// It stands for this digest under the name of another repository.
    Elsewhere { witness: Arc<str>, format: Format, reference: String },
    /// It does not count.
    Falls(Rejection),
}

/// Why nothing is known: that is no answer, neither way.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Failure {
    #[error("no [[registry]] is named {0}")]
    NoRegistry(RegistryName),
    #[error(transparent)]
    Registry(#[from] registry::Error),
}

impl Failure {
    /// Whether the registry does not let in who asks, and may let in others.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Registry(registry::Error::Unauthorized { .. } | registry::Error::Denied { .. }))
    }
}

/// How old an answer may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freshness {
    /// As old as is kept.
    Any,
    /// Not older than [`DENIAL`].
    Fresh,
}

/// What it takes to examine images.
pub struct Settings {
    pub registries: HashMap<RegistryName, Registry>,
    /// The witnesses whose signatures count.
    pub witnesses: Vec<Known>,
    /// Images that are remembered, and for how long.
    pub entries: usize,
    pub keep: Duration,
    pub clock: Clock,
}

/// Asks registries, and remembers.
#[derive(Clone)]
pub struct Examiner(Arc<Inner>);

struct Inner {
    settings: Settings,
    places: Semaphore,
    memory: Mutex<Memory>,
    examining: Flights<(Reference, Account), Result<Arc<Evidence>, Failure>>,
    resolving: Flights<(Reference, Account), Result<Option<Digest>, Failure>>,
    hits: AtomicU64,
    misses: AtomicU64,
}

/// Who asks a registry: a hash of a login, or whoever the configuration has.
type Account = Option<[u8; 32]>;

struct Memory {
    standing: Generations<Reference, Arc<Evidence>>,
    fallen: Generations<Reference, Arc<Evidence>>,
    /// Indexes by what they list, which never changes: `repository:tag@child`.
    parents: Generations<Reference, Digest>,
    built: Generations<Reference, Option<Timestamp>>,
    accounts: Generations<(RegistryName, Account), Registry>,
    /// When a key runs out or is revoked, and all this is to be forgotten.
    ends: Option<Timestamp>,
}

impl Examiner {
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let ends = next_change(&settings.witnesses, settings.clock.now());
        let entries = settings.entries;
        Self(Arc::new(Inner {
            settings,
            places: Semaphore::new(AT_ONCE),
            memory: Mutex::new(Memory {
                standing: Generations::new(entries),
                fallen: Generations::new(DENIALS),
                parents: Generations::new(entries),
                built: Generations::new(entries),
                accounts: Generations::new(ACCOUNTS),
                ends,
            }),
            examining: Flights::new(),
            resolving: Flights::new(),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }))
    }

    /// The signatures of `image`, which has a digest; its tag is of no account. `logins` are for registries that the
    /// configuration has no login of; what was found is remembered for everybody.
    pub async fn evidence(
        &self,
        image: &Reference,
        freshness: Freshness,
        logins: Option<&Logins>,
    ) -> Result<Arc<Evidence>, Failure> {
        let key = Reference { tag: None, ..image.clone() };
        if let Some(known) = self.0.recall(&key, freshness) {
            self.0.hits.fetch_add(1, Relaxed);
            return Ok(known);
        }
        self.0.misses.fetch_add(1, Relaxed);
        let ask = |registry, account| {
            let (inner, key) = (self.0.clone(), key.clone());
            self.0.examining.join((key.clone(), account), || async move { inner.examine(registry, key).await }.boxed()).boxed()
        };
        self.0.as_let_in(image, logins, ask).await
    }

    /// What the tag of `image` names now; None if the registry has no such tag. Never remembered.
    pub async fn resolve(&self, image: &Reference, logins: Option<&Logins>) -> Result<Option<Digest>, Failure> {
        let ask = |registry: Registry, account| {
            let (inner, key) = (self.0.clone(), image.clone());
            let resolve = async move {
                let _place = inner.places.acquire().await.expect("it is never closed");
                let tag = key.tag.clone().unwrap_or_else(Tag::latest);
                Ok(registry.resolve(&key.repository, &tag).await?)
            };
            self.0.resolving.join((image.clone(), account), || resolve.boxed()).boxed()
        };
        self.0.as_let_in(image, logins, ask).await
    }

    /// The index that the tag of `image` names, if it lists the digest of `image`; which has both.
    pub async fn index_of(&self, image: &Reference, logins: Option<&Logins>) -> Result<Option<Reference>, Failure> {
        let (Some(tag), Some(child)) = (&image.tag, &image.digest) else { return Ok(None) };
        let as_index = |digest| Reference { digest: Some(digest), ..image.clone() };
        if let Some(known) = self.0.memory().parents.get(image) {
            return Ok(Some(as_index(known)));
        }
        let _place = self.0.places.acquire().await.expect("it is never closed");
        let ask = |registry: Registry, _| {
            let address = Address::Tag(tag.clone());
            async move { Ok(registry.manifest(&image.repository, &address).await?) }.boxed()
        };
        let Some(manifest) = self.0.as_let_in(image, logins, ask).await? else { return Ok(None) };
        let lists = media_type::is_index(manifest.media_type()) && built::children(manifest.content()).contains(child);
        if !lists {
            return Ok(None);
        }
        self.0.memory().parents.insert(image.clone(), manifest.digest().clone());
        Ok(Some(as_index(manifest.digest().clone())))
    }

    /// When `image`, which has a digest, was built, by what is in the image itself; None if that does not say.
    pub async fn built(&self, image: &Reference, logins: Option<&Logins>) -> Result<Option<Timestamp>, Failure> {
        let key = Reference { tag: None, ..image.clone() };
        if let Some(known) = self.0.memory().built.get(&key) {
            return Ok(known);
        }
        let _place = self.0.places.acquire().await.expect("it is never closed");
        let ask = |registry: Registry, _| async move { Ok(built::built(&registry, image).await?) }.boxed();
        let found = self.0.as_let_in(image, logins, ask).await?;
        self.0.memory().built.insert(key, found);
        Ok(found)
    }

    /// Whether images of this registry can be looked at.
    #[must_use]
    pub fn knows(&self, registry: &RegistryName) -> bool {
        self.0.settings.registries.contains_key(registry)
    }

    /// Whether this registry is asked with what objects are pulled with: it has no login in the configuration.
    #[must_use]
    pub fn takes_logins(&self, registry: &RegistryName) -> bool {
        self.0.settings.registries.get(registry).is_some_and(|registry| !registry.has_account())
    }

    /// Questions that memory answered, and those that it did not.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.0.hits.load(Relaxed), self.0.misses.load(Relaxed))
    }
}

impl Inner {
    fn recall(&self, key: &Reference, freshness: Freshness) -> Option<Arc<Evidence>> {
        let mut memory = self.memory();
        let is_recent = |evidence: &Arc<Evidence>| evidence.at.elapsed() < DENIAL;
        let standing = memory.standing.get(key).filter(|evidence| match freshness {
            Freshness::Any => {
                let is_over = evidence.until.is_some_and(|until| until <= self.settings.clock.now());
                !is_over && evidence.at.elapsed() < self.settings.keep
            }
            Freshness::Fresh => is_recent(evidence),
        });
        standing.or_else(|| memory.fallen.get(key).filter(is_recent))
    }

    /// What is remembered, unless a key has run out since.
    fn memory(&self) -> MutexGuard<'_, Memory> {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ends) = memory.ends {
            let now = self.settings.clock.now();
            if ends <= now {
                memory.standing.clear();
                memory.fallen.clear();
                memory.ends = next_change(&self.settings.witnesses, now);
            }
        }
        memory
    }

    /// Asks the image's registry as one account after the other, until one is let in.
    async fn as_let_in<'a, T>(
        &self,
        image: &Reference,
        logins: Option<&Logins>,
        ask: impl Fn(Registry, Account) -> BoxFuture<'a, Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let registry = self.settings.registries.get(&image.registry);
        let registry = registry.ok_or_else(|| Failure::NoRegistry(image.registry.clone()))?;
        let logins = match logins {
            Some(logins) if !registry.has_account() => logins.of(&image.registry).await,
            _ => vec![],
        };
        let (mut accounts, mut kept_out) = (logins.into_iter(), None);
        loop {
            let asked = match (accounts.next(), kept_out) {
                (Some(login), _) => {
                    let (registry, account) = self.as_account(registry, login)?;
                    ask(registry, account).await
                }
                (None, Some(kept_out)) => return Err(kept_out),
                (None, None) => return ask(registry.clone(), None).await,
            };
            match asked {
                Err(error) if error.is_refusal() => kept_out = Some(error),
                answer => return answer,
            }
        }
    }

    /// The registry as somebody else sees it, with the tokens that were given to them.
    fn as_account(&self, registry: &Registry, login: Credentials) -> Result<(Registry, Account), Failure> {
        let text = [login.username.as_bytes(), &[0], login.password.expose_secret().as_bytes()].concat();
        let account = Some(Sha256::digest(text).into());
        let key = (registry.name().clone(), account);
        if let Some(known) = self.memory().accounts.get(&key) {
            return Ok((known, account));
        }
        let registry = registry.with_account(login)?;
        self.memory().accounts.insert(key, registry.clone());
        Ok((registry, account))
    }

    async fn examine(&self, registry: Registry, image: Reference) -> Result<Arc<Evidence>, Failure> {
        let _place = self.places.acquire().await.expect("it is never closed");
        let at = Instant::now();
        let now = self.settings.clock.now();
        let trusts: Vec<Trust<'_>> = self.settings.witnesses.iter().map(Known::trust).collect();
        let examination = verify::examine(&registry, &image, &trusts, now, Depth::Verdicts).await?;
        let evidence = Evidence {
            until: examination.verified().filter_map(verify::Verified::until).min(),
            exists: examination.digest.is_some(),
            signatures: examination.signatures.into_iter().flat_map(read).collect(),
            unreadable: examination.unreadable,
            at,
        };
        let evidence = Arc::new(evidence);
        let stands = evidence.signatures.iter().any(|signature| !matches!(signature, Signature::Falls(_)));
        let mut memory = self.memory();
        // One that was begun before a key ran out must not be kept past that.
        if next_change(&self.settings.witnesses, now) == memory.ends {
            if stands {
                memory.standing.insert(image, evidence.clone());
            } else {
                memory.standing.forget(&image);
                memory.fallen.insert(image, evidence.clone());
            }
        }
        Ok(evidence)
    }
}

/// One for each witness that has the key.
pub(super) fn read(examined: verify::Examined) -> Vec<Signature> {
    let verify::Examined { format, also, verdict, .. } = examined;
    let each = |witness: &str, signature: &dyn Fn(&str) -> Signature| {
        iter::once(witness).chain(also.iter().map(String::as_str)).map(signature).collect()
    };
    match verdict {
        Judgement::Verified(verified) => {
            let reference: Option<Reference> = verified.reference().and_then(|reference| reference.parse().ok());
            each(verified.witness(), &|witness| Signature::Stands {
                witness: witness.into(),
                format,
                reference: reference.clone(),
            })
        }
        Judgement::Rejected { reason: Rejection::OtherReference(reference), witness: Some(witness), .. } => {
            each(&witness, &|witness| Signature::Elsewhere { witness: witness.into(), format, reference: reference.clone() })
        }
        Judgement::Rejected { reason, .. } => vec![Signature::Falls(reason)],
    }
}

fn next_change(witnesses: &[Known], now: Timestamp) -> Option<Timestamp> {
    witnesses.iter().filter_map(|known| known.keys.next_change(now)).min()
}

impl fmt::Debug for Examiner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Examiner").field("registries", &self.0.settings.registries.len()).finish_non_exhaustive()
    }
}
