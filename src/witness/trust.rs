use std::{fmt, sync::Arc};

use jiff::Timestamp;

use super::{Error, TrustedKeySettings, WitnessSettings, pin};
use crate::kms::{self, KeyUri, PublicKey};

/// The public keys whose signatures count as a witness's: its own, and those under `verify` while they are neither past their
/// end nor revoked.
#[derive(Debug, Clone)]
pub struct TrustedKeys {
    own: Option<PublicKey>,
    keys: Vec<TrustedKey>,
    takes_pss: bool,
}

#[derive(Debug, Clone)]
struct TrustedKey {
    key: PublicKey,
    until: Option<Timestamp>,
    revoked: Option<(Timestamp, String)>,
}

/// Whether a key's signatures count at a time, and why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    Counts,
    /// Its `until` has come.
    Ended {
        until: Timestamp,
    },
    /// Its `revoked` has come.
    Revoked {
        since: Timestamp,
        reason: String,
    },
}

impl TrustedKeys {
    /// The keys as far as they are known without asking a KMS: for `file://` the private key's file or, where that may not be
    /// read, the pinned public key; for others the pinned public key; and those under `verify`.
    pub fn offline(settings: &WitnessSettings) -> Result<Self, Error> {
        let pinned = pin::read(settings)?;
        let own = match &settings.key {
            KeyUri::File(path) => match (kms::public_key_of_file(path, settings.login.as_ref()), pinned) {
                (Ok(found), Some(pinned)) => {
                    let pin = settings.pin.as_ref().expect("there is a pinned key").path();
                    pin::compare_or_rotation(settings, pin, &pinned, &found)?;
                    Some(found)
                }
                (Ok(found), None) => Some(found),
                (Err(_), Some(pinned)) => Some(pinned),
                (Err(source), None) => return Err(Error::Key { witness: settings.name.clone(), source }),
            },
            KeyUri::AwsKms { .. }
            | KeyUri::AlibabaKms { .. }
            | KeyUri::GcpKms(_)
            | KeyUri::AzureKms(_)
            | KeyUri::Vault(_)
            | KeyUri::Pkcs11(_) => pinned,
        };
        if own.is_none() && settings.verify.is_empty() {
            let key = Arc::new(settings.key.clone());
            return Err(Error::NoKeyOffline { witness: settings.name.clone(), key });
        }
        Self::with_own(&settings.name, &settings.verify, own.as_ref())
    }

    /// A witness's own key, and the keys under its `verify`.
    ///
    /// # Errors
    /// [`Error::TrustedKey`] and [`Error::TrustedTwice`] only.
    pub fn with_own(witness: &str, verify: &[TrustedKeySettings], own: Option<&PublicKey>) -> Result<Self, Error> {
        let mut keys: Vec<_> = configured(witness, verify)?
            .into_iter()
            .map(|(key, settings)| TrustedKey { key, until: settings.until, revoked: settings.revoked.clone() })
            .collect();
        // The own key comes first, and an entry under `verify` that names it limits it as it limits any other.
        if let Some(own) = own {
            let position = keys.iter().position(|trusted| trusted.key == *own);
            let trusted = position
                .map_or_else(|| TrustedKey { key: own.clone(), until: None, revoked: None }, |position| keys.remove(position));
            keys.insert(0, trusted);
        }
        Ok(Self { own: own.cloned(), keys, takes_pss: false })
    }

    /// The same, and its RSA keys' PSS signatures count under the `.sig` tag too, where no other verifier takes them.
    #[must_use]
    pub fn taking_pss(self, takes_pss: bool) -> Self {
        Self { takes_pss, ..self }
    }

    /// Whether PSS signatures count under the `.sig` tag.
    #[must_use]
    pub fn is_pss_taken(&self) -> bool {
        self.takes_pss
    }

    /// The witness's own key: the one that signs now. Absent if it is in a KMS that was not asked.
    #[must_use]
    pub fn own(&self) -> Option<&PublicKey> {
        self.own.as_ref()
    }

    /// The keys whose signatures count at this time, the own one first.
    pub fn at(&self, now: Timestamp) -> impl Iterator<Item = &PublicKey> {
        self.standings(now).filter(|(_, standing)| *standing == Standing::Counts).map(|(key, _)| key)
    }

    /// All keys, and whether their signatures count at this time.
    pub fn standings(&self, now: Timestamp) -> impl Iterator<Item = (&PublicKey, Standing)> {
        self.keys.iter().map(move |trusted| (&trusted.key, trusted.standing(now)))
    }

    /// The next moment after this one at which a key runs out or is revoked: until then, what counts stays as it is.
    #[must_use]
    pub fn next_change(&self, now: Timestamp) -> Option<Timestamp> {
        let moments = self.keys.iter().flat_map(|trusted| [trusted.until, trusted.revoked.as_ref().map(|(since, _)| *since)]);
        moments.flatten().filter(|moment| *moment > now).min()
    }

    /// Whether this key's signatures count at this time; `None` if it is not among the keys at all.
    #[must_use]
    pub fn standing(&self, key: &PublicKey, now: Timestamp) -> Option<Standing> {
        self.keys.iter().find(|trusted| trusted.key == *key).map(|trusted| trusted.standing(now))
    }
}

impl TrustedKey {
    fn standing(&self, now: Timestamp) -> Standing {
        match (&self.revoked, self.until) {
            (Some((since, reason)), _) if *since <= now => Standing::Revoked { since: *since, reason: reason.clone() },
            (_, Some(until)) if until <= now => Standing::Ended { until },
            _ => Standing::Counts,
        }
    }
}

/// Says of a key what has become of it: "was revoked on 2026-12-24T03:00:00Z: the laptop was stolen".
impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Counts => f.write_str("counts"),
            Self::Ended { until } => write!(f, "counted until {until}"),
            Self::Revoked { since, reason } if reason.is_empty() => write!(f, "was revoked on {since}"),
            Self::Revoked { since, reason } => write!(f, "was revoked on {since}: {reason}"),
        }
    }
}

/// The keys under `verify`. One that stands there twice is refused, because only one of the two could be meant.
pub(super) fn configured<'a>(
    witness: &str,
    verify: &'a [TrustedKeySettings],
) -> Result<Vec<(PublicKey, &'a TrustedKeySettings)>, Error> {
    let mut keys: Vec<(PublicKey, &TrustedKeySettings)> = Vec::with_capacity(verify.len());
    for (index, trusted) in verify.iter().enumerate() {
        let key = PublicKey::from_pem(&trusted.pem).map_err(|source| Error::TrustedKey {
            witness: witness.to_owned(),
            number: index + 1,
            source,
        })?;
        if let Some(first) = keys.iter().position(|(earlier, _)| *earlier == key) {
            let witness = witness.to_owned();
            return Err(Error::TrustedTwice { witness, first: first + 1, second: index + 1 });
        }
        keys.push((key, trusted));
    }
    Ok(keys)
}
