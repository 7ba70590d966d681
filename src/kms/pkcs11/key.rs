use std::{
    fmt,
    sync::{Arc, LazyLock, Mutex},
};

use async_trait::async_trait;
use cryptoki::{
    error::{Error as ModuleError, RvError},
    mechanism::{
        Mechanism, MechanismType,
        rsa::{PkcsMgfType, PkcsPssParams},
    },
    object::ObjectHandle,
};

use super::{
    fault::Fault,
    module::{Door, Entered},
    object,
    pool::{Pool, Pools},
};
use crate::kms::{Algorithm, Environment, Error, KeyUri, Login, PublicKey, RawSignature, SigningKey, ecdsa};

static POOLS: LazyLock<Pools<Station>> = LazyLock::new(Mutex::default);

/// One private key in a token.
pub(super) struct Pkcs11Key {
    door: Arc<Door>,
    resolved: String,
    public_key: PublicKey,
    pool: Arc<Pool<Station>>,
}

impl Pkcs11Key {
    pub(super) async fn open(uri: &KeyUri, login: Option<&Login>, environment: &Environment) -> Result<Self, Error> {
        let KeyUri::Pkcs11(reference) = uri else { unreachable!("kms::open chose by the kind of URI") };
        let uri = Arc::new(uri.clone());
        let pin = match login {
            None => reference.pin.clone(),
            Some(Login::Secret(pin)) if reference.pin.is_none() => Some(pin.clone()),
            Some(Login::Secret(_)) => {
                let what = "the PIN stands in its reference and in the witness: one of the two is enough".to_owned();
                return Err(Error::Misconfigured { key: uri, what });
            }
            Some(Login::Token { .. } | Login::AppRole { .. } | Login::Jwt { .. }) => {
                let what = "a `login` is for a Vault: a token takes a `pin`".to_owned();
                return Err(Error::Misconfigured { key: uri, what });
            }
        };
        let pool = Pool::of(&uri, &POOLS);
        let door = Arc::new(Door { uri, reference: reference.clone(), pin, environment: environment.clone() });
        let asked = Arc::clone(&door);
        let (public_key, resolved) = pool.run(move |station| station.describe(&asked)).await?;
        tracing::info!(key = %door.uri, resolved, spec = %public_key.spec(), "key opened");
        Ok(Self { door, resolved, public_key, pool })
    }
}

#[async_trait]
impl SigningKey for Pkcs11Key {
    fn uri(&self) -> &KeyUri {
        &self.door.uri
    }

    fn resolved(&self) -> &str {
        &self.resolved
    }

    fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    async fn sign(&self, algorithm: Algorithm, digest: &[u8; 32]) -> Result<RawSignature, Error> {
        let spec = self.public_key.spec();
        if !spec.supports(algorithm) {
            return Err(Error::WrongAlgorithm { key: Arc::clone(&self.door.uri), spec, algorithm });
        }
        let (door, digest) = (Arc::clone(&self.door), *digest);
        let signature = self.pool.run(move |station| station.sign(&door, algorithm, &digest)).await?;
        if algorithm != Algorithm::EcdsaSha256 {
            return Ok(RawSignature(signature));
        }
        let what = || format!("an ECDSA signature of {} bytes, and r and s of P-256 have 64", signature.len());
        let der = ecdsa::der_of_p256(&signature);
        der.map(RawSignature).ok_or_else(|| Error::BadResponse { key: Arc::clone(&self.door.uri), what: what() })
    }

    async fn verify(&self, algorithm: Algorithm, digest: &[u8; 32], signature: &[u8]) -> Result<Option<bool>, Error> {
        let signature = match algorithm {
            Algorithm::RsaPkcs1Sha256 | Algorithm::RsaPssSha256 => signature.to_vec(),
            Algorithm::EcdsaSha256 => match ecdsa::p256_of_der(signature) {
                Some(raw) => raw.to_vec(),
                // It cannot even be written as tokens read it.
                None => return Ok(Some(false)),
            },
        };
        let (door, public_key, digest) = (Arc::clone(&self.door), self.public_key.clone(), *digest);
        self.pool.run(move |station| station.verify(&door, &public_key, algorithm, &digest, &signature)).await
    }

    fn stuck_threads(&self) -> Option<usize> {
        Some(self.pool.stuck())
    }
}

impl fmt::Debug for Pkcs11Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pkcs11Key")
            .field("uri", &self.door.uri)
            .field("resolved", &self.resolved)
            .field("public_key", &self.public_key)
            .field("pool", &self.pool)
            .finish_non_exhaustive()
    }
}

/// What a thread has of a token, once it was there: a session and the key in it.
#[derive(Default)]
struct Station(Option<(Entered, ObjectHandle)>);

impl Station {
    fn describe(&mut self, door: &Door) -> Result<(PublicKey, String), Error> {
        // As it is now: what an earlier opening found may be gone.
        self.0 = None;
        self.within(door, |entered, private| object::describe(door, entered, private))
    }

    fn sign(&mut self, door: &Door, algorithm: Algorithm, digest: &[u8; 32]) -> Result<Vec<u8>, Error> {
        let (mechanism, data) = asked(algorithm, digest);
        self.within(door, |entered, private| entered.session.sign(&mechanism, private, &data).map_err(Fault::from))
    }

    /// By the public key object beside the private key; `None` if there is none, or none that verifies.
    fn verify(
        &mut self,
        door: &Door,
        public_key: &PublicKey,
        algorithm: Algorithm,
        digest: &[u8; 32],
        signature: &[u8],
    ) -> Result<Option<bool>, Error> {
        let (mechanism, data) = asked(algorithm, digest);
        self.within(door, |entered, private| {
            let Some(public) = object::public_key(&entered.session, private, public_key)? else { return Ok(None) };
            match entered.session.verify(&mechanism, public, &data, signature) {
                Ok(()) => Ok(Some(true)),
                Err(ModuleError::Pkcs11(RvError::SignatureInvalid | RvError::SignatureLenRange, _)) => Ok(Some(false)),
                Err(ModuleError::Pkcs11(
                    RvError::KeyFunctionNotPermitted | RvError::MechanismInvalid | RvError::FunctionNotSupported,
                    _,
                )) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
    }

    /// Does something in the session. If that is lost, as when the token was taken out and put back, then once more in a new one;
    /// and if that does not help and nobody uses the module, then once more after it was initialised anew.
    fn within<T>(&mut self, door: &Door, work: impl Fn(&Entered, ObjectHandle) -> Result<T, Fault>) -> Result<T, Error> {
        let was_there = self.0.is_some();
        let mut result = self.once(door, &work);
        if was_there && result.as_ref().is_err_and(Fault::may_pass) {
            tracing::info!(key = %door.uri, "the session is lost: opening another");
            result = self.once(door, &work);
        }
        if result.as_ref().is_err_and(Fault::may_pass) && self.renew(door).map_err(|fault| fault.into_error(&door.uri))? {
            result = self.once(door, &work);
        }
        result.map_err(|fault| fault.into_error(&door.uri))
    }

    fn renew(&mut self, door: &Door) -> Result<bool, Fault> {
        self.0 = None;
        // The sessions that lie idle, of other keys too: they are opened again when they are needed.
        let pools = Pool::all(&POOLS)
            .into_iter()
            .filter(|pool| matches!(pool.uri(), KeyUri::Pkcs11(other) if other.module == door.reference.module));
        drop(pools.flat_map(|pool| pool.idle_states()).collect::<Vec<_>>());
        door.renew()
    }

    fn once<T>(&mut self, door: &Door, work: impl Fn(&Entered, ObjectHandle) -> Result<T, Fault>) -> Result<T, Fault> {
        let (entered, private) = if let Some(known) = self.0.take() {
            known
        } else {
            let entered = door.enter()?;
            let private = object::private_key(door, &entered.session)?;
            (entered, private)
        };
        // A session in which something failed is closed, because an operation may be half done in it.
        let done = work(&entered, private)?;
        self.0 = Some((entered, private));
        Ok(done)
    }
}

/// The mechanism, and what it takes: the module only pads.
fn asked(algorithm: Algorithm, digest: &[u8; 32]) -> (Mechanism<'static>, Vec<u8>) {
    /// What stands before a SHA-256 digest in PKCS#1 (RFC 8017 section 9.2, note 1).
    const DIGEST_INFO: [u8; 19] =
        [0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20];
    match algorithm {
        Algorithm::RsaPkcs1Sha256 => (Mechanism::RsaPkcs, [&DIGEST_INFO[..], digest].concat()),
        Algorithm::RsaPssSha256 => {
            let (hash_alg, mgf) = (MechanismType::SHA256, PkcsMgfType::MGF1_SHA256);
            (Mechanism::RsaPkcsPss(PkcsPssParams { hash_alg, mgf, s_len: 32.into() }), digest.to_vec())
        }
        Algorithm::EcdsaSha256 => (Mechanism::Ecdsa, digest.to_vec()),
    }
}
