//! A named signing identity: its key opened, its public key pinned, its signatures checked before anyone sees them.

mod breaker;
mod pace;
mod pin;
mod record;
mod trust;

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use jiff::Timestamp;
use sha2::Digest as _;
use tokio::{sync::Semaphore, time::Instant};
use tracing::Instrument;

use crate::{
    certificate::Chain,
    clock::Clock,
    kms::{self, Algorithm, KeyUri, Login, PublicKey, PublicKeyError, RawSignature, SigningKey},
    outcome::{Classify, Verdict},
};
pub use breaker::Away;
use breaker::Breaker;
use pace::Pace;
pub use record::{AwayView, LastError, Observation, Observer, Operation, Quota, Status};
use record::{Known, Record};
pub use trust::{Standing, TrustedKeys};

/// What the configuration says of a witness.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WitnessSettings {
    pub name: String,
    pub description: String,
    /// The key that signs.
    pub key: KeyUri,
    /// Who asks, where the key's KMS takes that from here.
    pub login: Option<Login>,
    /// Further public keys whose signatures count: rotation by overlap, revocation by date.
    pub verify: Vec<TrustedKeySettings>,
    /// The witness's share of the KMS's quota; as fast as it is asked, if absent.
    pub rate: Option<Rate>,
    /// Where the public key is kept from the first opening on. A later opening that finds another key is refused.
    pub pin: Option<Pin>,
}

/// The file that says which public key a witness has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pin {
    /// Ours: written on the first opening, and again when the key is rotated.
    Kept(PathBuf),
    /// The administrator's: compared, and never written.
    Given(PathBuf),
}

impl Pin {
    /// Whether there is a key to compare with, or one that has to be there.
    pub(crate) fn exists(&self) -> bool {
        match self {
            Self::Kept(path) => path.exists(),
            Self::Given(_) => true,
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::Kept(path) | Self::Given(path) => path,
        }
    }
}

/// A public key whose signatures count though it does not sign (any more).
#[derive(Clone, PartialEq, Eq)]
pub struct TrustedKeySettings {
    /// The text of its PEM file.
    pub pem: String,
    /// From then on its signatures no longer count.
    pub until: Option<Timestamp>,
    /// From then on its signatures no longer count, for this reason.
    pub revoked: Option<(Timestamp, String)>,
}

/// How many signatures a witness asks its KMS for. Zeroes count as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    pub per_second: u32,
    /// How many may come at once after a pause.
    pub burst: u32,
}

/// Why a witness cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("witness {witness}: its key cannot be opened")]
    Key { witness: String, source: kms::Error },
    #[error("witness {witness}: key {number} under `verify` cannot be used")]
    TrustedKey {
        witness: String,
        /// Counted from 1.
        number: usize,
        source: PublicKeyError,
    },
    #[error("witness {witness}: keys {first} and {second} under `verify` are the same key")]
    TrustedTwice { witness: String, first: usize, second: usize },
    #[error(
        "witness {witness}: the key behind {key} changed: {} keeps sha256:{pinned}, and it is sha256:{found} now; if that is intended, \
         list the old public key (the one in that file) under the witness's `verify`, so that its signatures count on, or remove the \
         file, so that they do not",
        pin.display()
    )]
    KeyChanged { witness: String, key: Arc<KeyUri>, pin: PathBuf, pinned: String, found: String },
    #[error("witness {witness}: the pinned public key in {} could not be {what}", pin.display())]
    Pin { witness: String, pin: PathBuf, what: &'static str, source: io::Error },
    #[error("witness {witness}: the pinned public key in {} is damaged; remove the file to pin the key anew", pin.display())]
    PinDamaged { witness: String, pin: PathBuf, source: PublicKeyError },
    #[error("witness {witness}: its own key sha256:{fingerprint} {standing}, so it must not sign: name another key")]
    Retired { witness: String, fingerprint: String, standing: Standing },
    #[error(
        "witness {witness}: none of its public keys is known here without asking {key}: start the daemon once, which keeps the key, or \
         list it under the witness's `verify`"
    )]
    NoKeyOffline { witness: String, key: Arc<KeyUri> },
}

impl Classify for Error {
    fn verdict(&self) -> Verdict {
        let cure = match self {
            Self::Key { source, .. } => return source.verdict(),
            Self::TrustedKey { .. } | Self::TrustedTwice { .. } => "correct the key under the witness's `verify`",
            Self::KeyChanged { .. } => {
                "list the old public key under the witness's `verify` or remove the pinned one, as the message says"
            }
            Self::Pin { .. } => "let countersign's user read and write its state folder",
            Self::PinDamaged { .. } => "remove the pinned public key",
            Self::Retired { .. } => "name another key in the witness's `key`",
            Self::NoKeyOffline { .. } => "start the daemon once, or list the public key under the witness's `verify`",
        };
        Verdict::Refuse { cure }
    }
}

/// What is signed to see whether a key signs. It is no payload of any format (those begin with `{`, `DSSEv1`, `ey` or, in CBOR
/// and DER, with a byte that is no letter), so the signature approves nothing, whoever gets hold of it.
pub const PROBE: &str = "countersign probe: this signature approves nothing";

/// Calls that a key has under way at once. A KMS that takes 10 ms answers 1,600 a second so, more than any sells, and more at once
/// only queue there: OpenBao answered fewer a second on 32 connections than on 8, and took four times as long for each.
const UNDER_WAY: usize = 16;

/// How a probe was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probed {
    /// The KMS said that it would sign.
    DryRun,
    /// It signed [`PROBE`], and the signature verifies.
    Signed,
}

/// A named signing identity: one asymmetric key in one KMS, and the public keys whose signatures count as its own.
#[derive(Debug)]
pub struct Witness {
    name: String,
    description: String,
    key: Arc<dyn SigningKey>,
    trusted: TrustedKeys,
    pace: Pace,
    breaker: Breaker,
    under_way: Semaphore,
    record: Record,
    clock: Clock,
    observer: Observer,
    certificates: Vec<Chain>,
}

/// A signature that a witness's key made, verified against its public key. Only [`Witness::sign`] makes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    raw: RawSignature,
    algorithm: Algorithm,
    digest: [u8; 32],
}

impl Signed {
    #[must_use]
    pub fn raw(&self) -> &RawSignature {
        &self.raw
    }

    /// Whether these bytes are the signature, over this SHA-256 and by this algorithm.
    #[must_use]
    pub fn is(&self, algorithm: Algorithm, digest: &[u8; 32], raw: &[u8]) -> bool {
        self.algorithm == algorithm && self.digest == *digest && self.raw.as_ref() == raw
    }
}

impl Witness {
    /// Opens the key, reads its public half, and holds it against the pinned one.
    pub async fn open(settings: &WitnessSettings, clock: Clock) -> Result<Self, Error> {
        // What is wrong in the configuration is said before the KMS is asked.
        trust::configured(&settings.name, &settings.verify)?;
        let opened = kms::open(&settings.key, settings.login.as_ref(), clock.clone()).await;
        let key = opened.map_err(|source| Error::Key { witness: settings.name.clone(), source })?;
        Self::from_key(settings, key, clock)
    }

    /// The same with a key that is open already.
    pub fn from_key(settings: &WitnessSettings, key: Arc<dyn SigningKey>, clock: Clock) -> Result<Self, Error> {
        pin::hold(settings, key.public_key())?;
        let trusted = TrustedKeys::with_own(&settings.name, &settings.verify, Some(key.public_key()))?;
        let standing = trusted.standing(key.public_key(), clock.now());
        if let Some(standing @ (Standing::Ended { .. } | Standing::Revoked { .. })) = standing {
            let fingerprint = key.public_key().fingerprint().to_owned();
            return Err(Error::Retired { witness: settings.name.clone(), fingerprint, standing });
        }
        let (name, description) = (settings.name.clone(), settings.description.clone());
        Ok(Self {
            name,
            description,
            key,
            trusted,
            pace: Pace::new(settings.rate),
            breaker: Breaker::new(clock.clone()),
            under_way: Semaphore::new(UNDER_WAY),
            record: Record::default(),
            clock,
            observer: Observer::new(|_| ()),
            certificates: vec![],
        })
    }

    /// The same, watched.
    #[must_use]
    pub fn observed(self, observer: Observer) -> Self {
        Self { observer, ..self }
    }

    /// The same with certificates of its key, the one that its signatures name first.
    #[must_use]
    pub fn certified(self, certificates: Vec<Chain>) -> Self {
        Self { certificates, ..self }
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn description(&self) -> &str {
        &self.description
    }

    /// The reference as configured.
    #[must_use]
    pub fn key_uri(&self) -> &KeyUri {
        self.key.uri()
    }

    /// What the KMS itself called the key when it was opened, for the ledger: on AWS its ARN.
    #[must_use]
    pub fn resolved_key(&self) -> &str {
        self.key.resolved()
    }

    /// The key that signs.
    #[must_use]
    pub fn public_key(&self) -> &PublicKey {
        self.key.public_key()
    }

    /// Whether the key signs with this algorithm: a KMS may hold it to fewer than its kind allows.
    #[must_use]
    pub fn allows(&self, algorithm: Algorithm) -> bool {
        self.key.allows(algorithm)
    }

    /// The keys whose signatures count.
    #[must_use]
    pub fn trusted_keys(&self) -> &TrustedKeys {
        &self.trusted
    }

    /// The certificates that its notation signatures may name, the one that new ones do first. None of those whose rules need none.
    #[must_use]
    pub fn certificates(&self) -> &[Chain] {
        &self.certificates
    }

    /// Signs a SHA-256 digest (the caller has hashed), and verifies what came back before returning it.
    ///
    /// Waits its turn first if the witness has a rate, if the KMS has throttled it lately, or if as many calls as may be at once are under way.
    /// While the KMS is away it says so at once ([`kms::Error::Away`]). Dropping the future gives the turn up. An answer that cannot be
    /// right is asked for once more; all else goes to the caller at once, as its verdict says. Nothing is ever asked twice at the
    /// same time, to see which is faster: each signature costs money.
    pub async fn sign(&self, algorithm: Algorithm, digest: &[u8; 32]) -> Result<Signed, kms::Error> {
        let span = tracing::info_span!("kms.sign", witness = %self.name, %algorithm);
        async {
            self.check_fitness(algorithm)?;
            match self.ask(Operation::Sign, self.sign_once(algorithm, digest)).await {
                Err(error) if error.is_garbled() => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "asking the KMS once more");
                    self.ask(Operation::Sign, self.sign_once(algorithm, digest)).await
                }
                result => result,
            }
        }
        .instrument(span)
        .await
    }

    /// Whether the key would sign now: by a dry run or, where the KMS has none, by a signature over [`PROBE`].
    pub async fn probe(&self, algorithm: Algorithm) -> Result<Probed, kms::Error> {
        self.check_fitness(algorithm)?;
        let digest = sha2::Sha256::digest(PROBE).into();
        let probe = async {
            if self.key.dry_run(algorithm, &digest).await? {
                return Ok(Probed::DryRun);
            }
            self.sign_once(algorithm, &digest).await.map(|_| Probed::Signed)
        };
        self.ask(Operation::Probe, probe).await
    }

    /// Whether the key signs, and if not, why. Known from what was signed in the last minutes; else its KMS is probed, but not more
    /// than twice a minute, however often this is asked.
    pub async fn ready(&self, algorithm: Algorithm) -> Result<(), String> {
        // While it is away its own rhythm says when it is asked.
        match if self.is_away() { Known::Unknown } else { self.record.known() } {
            Known::Ready => Ok(()),
            Known::Unready(why) => Err(why),
            Known::Unknown => match self.probe(algorithm).await {
                Ok(_) | Err(kms::Error::Throttled { .. }) => Ok(()),
                Err(error) => Err(error.to_string()),
            },
        }
    }

    /// Has the KMS verify a signature over a SHA-256 digest. None if it does not verify.
    pub async fn verify_remotely(
        &self,
        algorithm: Algorithm,
        digest: &[u8; 32],
        signature: &[u8],
    ) -> Result<Option<bool>, kms::Error> {
        self.key.verify(algorithm, digest, signature).await
    }

    /// How things stand, without asking the KMS.
    #[must_use]
    pub fn status(&self) -> Status {
        let away = self.breaker.away().map(|Away { since, next, .. }| AwayView { since, next });
        let standing = self.trusted.standing(self.public_key(), self.clock.now());
        let state = match standing {
            Some(Standing::Ended { .. }) => "ended",
            Some(Standing::Revoked { .. }) => "revoked",
            Some(Standing::Counts) | None if away.is_some() => "away",
            Some(Standing::Counts) | None if self.record.is_failing() => "failing",
            Some(Standing::Counts) | None => "ok",
        };
        let (waiting, under_way) = (self.record.waiting.now(), self.record.under_way.now());
        let (last_signed, last_error) = self.record.last();
        let quota = Quota { waiting, under_way, ..self.pace.quota() };
        Status { state: state.to_owned(), away, quota, last_signed, last_error }
    }

    /// Whether its KMS does not answer now.
    #[must_use]
    pub fn is_away(&self) -> bool {
        self.breaker.away().is_some()
    }

    /// As [`SigningKey::stuck_threads`] has it.
    #[must_use]
    pub fn stuck_threads(&self) -> Option<usize> {
        self.key.stuck_threads()
    }

    /// Whether it can be asked now. The error is [`kms::Error::Away`].
    pub fn look(&self) -> Result<(), kms::Error> {
        self.breaker.look().map_err(|away| self.away(away))
    }

    /// About how many signatures a second can be had: what its rate or its KMS's throttling allows, else what is known to go.
    #[must_use]
    pub fn expected_rate(&self) -> f64 {
        self.pace.expected()
    }

    /// Whether somebody waits for a turn now: the witness is asked for more than its rate or its KMS allows.
    #[must_use]
    pub fn is_waited_for(&self) -> bool {
        self.record.waiting.now() > 0
    }

    /// What would make every signature useless is said without asking the KMS for one.
    fn check_fitness(&self, algorithm: Algorithm) -> Result<(), kms::Error> {
        let key = || Arc::new(self.key_uri().clone());
        let spec = self.public_key().spec();
        if !spec.supports(algorithm) {
            return Err(kms::Error::WrongAlgorithm { key: key(), spec, algorithm });
        }
        let standing = self.trusted.standing(self.public_key(), self.clock.now());
        match standing.expect("a witness's own key is among its trusted keys") {
            Standing::Counts => Ok(()),
            standing => {
                let what = format!("its public key {standing}, so nothing was signed: name another key in witness {}", self.name);
                Err(kms::Error::Misconfigured { key: key(), what })
            }
        }
    }

    async fn sign_once(&self, algorithm: Algorithm, digest: &[u8; 32]) -> Result<Signed, kms::Error> {
        let signature = self.key.sign(algorithm, digest).await?;
        self.checked(algorithm, digest, signature)
    }

    /// Asks the KMS for one thing that its quota counts: in turn, unless it is away, and with what it says put on record.
    async fn ask<T>(&self, operation: Operation, call: impl Future<Output = Result<T, kms::Error>>) -> Result<T, kms::Error> {
        let (came, waiting) = (Instant::now(), self.record.waiting.one());
        let _one = self.under_way.acquire().await.expect("the semaphore is never closed");
        // Those who stood in line while it went away do not wait for a turn as well.
        self.look()?;
        let turn = self.pace.turn().await;
        let leave = self.breaker.enter().map_err(|away| self.away(away))?;
        drop(waiting);
        let (asked, under_way) = (Instant::now(), self.record.under_way.one());
        let result = call.await;
        drop(under_way);
        let word = result.as_ref().map_or_else(kms::Error::name, |_| "ok");
        self.observer.tell(Observation::Asked { operation, waited: asked - came, result: word, took: asked.elapsed() });
        self.record.note(operation, &result, self.clock.now());
        match &result {
            Err(error) if error.is_absence() => {
                if let Some(away) = leave.failed() {
                    self.observer.tell(Observation::Away(true));
                    let since = tracing::field::display(away.since);
                    tracing::warn!(
                        since,
                        error = error as &dyn std::error::Error,
                        "the KMS is away: it is asked one thing at a time"
                    );
                }
                return result;
            }
            Err(kms::Error::Throttled { retry_after, .. }) => {
                if let Some(rate) = self.pace.throttled(turn, *retry_after) {
                    tracing::warn!(rate, "the KMS throttles: asking for fewer signatures a second for a while");
                }
            }
            Ok(_) => self.pace.served(),
            Err(_) => {}
        }
        if leave.answered() {
            self.observer.tell(Observation::Away(false));
            tracing::info!(witness = self.name, "the KMS is back");
        }
        result
    }

    fn away(&self, Away { since, next, after }: Away) -> kms::Error {
        kms::Error::Away { key: Arc::new(self.key_uri().clone()), since, next, after }
    }

    fn checked(&self, algorithm: Algorithm, digest: &[u8; 32], raw: RawSignature) -> Result<Signed, kms::Error> {
        self.public_key().verify(algorithm, digest, raw.as_ref()).map_err(|_| kms::Error::BadSignature {
            key: Arc::new(self.key_uri().clone()),
            algorithm,
            fingerprint: self.public_key().fingerprint().to_owned(),
        })?;
        Ok(Signed { raw, algorithm, digest: *digest })
    }
}

impl fmt::Debug for TrustedKeySettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the text: it is checked to be a public key only later.
        f.debug_struct("TrustedKeySettings").field("until", &self.until).field("revoked", &self.revoked).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
