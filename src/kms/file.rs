mod pkcs8;

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use async_trait::async_trait;
use aws_lc_rs::{
    encoding::{AsDer, PublicKeyX509Der},
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair, RSA_PKCS1_SHA256, RSA_PSS_SHA256, RsaEncoding, RsaKeyPair,
    },
};
use rsa::pkcs8::SecretDocument;
use secrecy::SecretString;
use tokio::sync::Semaphore;

use super::{
    Algorithm, Environment, Error, KeySpec, KeyUri, Login, PublicKey, RawSignature, SigningKey, create_file, public_key::import,
};

/// A private key in a PKCS#8 file on this machine (RFC 5208), readable by its owner only.
///
/// aws-lc computes with it in constant time: what it takes does not tell the key's bits to somebody who measures it. (The rsa
/// crate does not, RUSTSEC-2023-0071, and is given public keys only.)
pub(super) struct FileKey {
    uri: KeyUri,
    resolved: String,
    public_key: PublicKey,
    private_key: PrivateKey,
    /// RSA signatures that are computed at once; more would only queue for the same cores.
    cores: Arc<Semaphore>,
}

enum PrivateKey {
    Rsa(Arc<RsaKeyPair>),
    P256(EcdsaKeyPair),
}

impl FileKey {
    /// `login` says where the passphrase is, if the file is encrypted.
    pub(super) fn open(path: &Path, login: Option<&Login>, environment: &Environment) -> Result<Self, Error> {
        let passphrase = match login {
            None => None,
            Some(Login::Secret(passphrase)) => {
                let secret = passphrase.read_line(environment);
                Some(secret.map_err(|what| misconfigured(path, format!("the passphrase: {what}")))?)
            }
            Some(Login::Token { .. } | Login::AppRole { .. } | Login::Jwt { .. }) => {
                return Err(misconfigured(path, "a `login` is for a Vault: a file takes a `passphrase` if it is encrypted"));
            }
        };
        Self::open_with(path, passphrase.as_ref())
    }

    fn open_with(path: &Path, passphrase: Option<&SecretString>) -> Result<Self, Error> {
        let uri = KeyUri::File(path.to_owned());
        let document = pkcs8::read(path, passphrase)?;
        let invalid = |source| Error::PublicKey { key: Arc::new(uri.clone()), source };
        // Both kinds are tried: which of them it is stands in the DER, and aws-lc reads that strictly.
        let (private_key, spki) = if let Ok(pair) = RsaKeyPair::from_pkcs8(document.as_bytes()) {
            let spki = AsDer::<PublicKeyX509Der<'_>>::as_der(pair.public_key());
            (PrivateKey::Rsa(Arc::new(pair)), spki)
        } else if let Ok(pair) = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, document.as_bytes()) {
            let spki = AsDer::<PublicKeyX509Der<'_>>::as_der(pair.public_key());
            (PrivateKey::P256(pair), spki)
        } else {
            let what = "it is neither an RSA nor a P-256 private key, or its numbers do not fit together: make one with `countersign \
                        key generate`";
            return Err(misconfigured(path, what));
        };
        let spki = spki.expect("a key pair that was just parsed has a public key");
        let public_key = PublicKey::from_spki_der(spki.as_ref()).map_err(invalid)?;
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Ok(Self { resolved: uri.to_string(), uri, public_key, private_key, cores: Arc::new(Semaphore::new(cores)) })
    }
}

#[async_trait]
impl SigningKey for FileKey {
    fn uri(&self) -> &KeyUri {
        &self.uri
    }

    fn resolved(&self) -> &str {
        &self.resolved
    }

    fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    async fn sign(&self, algorithm: Algorithm, digest: &[u8; 32]) -> Result<RawSignature, Error> {
        let failed = |what: &str| Error::Transient { key: Arc::new(self.uri.clone()), what: what.to_owned() };
        let wrong = || {
            let (key, spec) = (Arc::new(self.uri.clone()), self.public_key.spec());
            Error::WrongAlgorithm { key, spec, algorithm }
        };
        let digest = import(digest);
        let pair = match (&self.private_key, algorithm) {
            // 11 microseconds: handing it to another thread would cost more.
            (PrivateKey::P256(pair), Algorithm::EcdsaSha256) => {
                let signature = pair.sign_digest(&digest).map_err(|_| failed("P-256 signing failed"))?;
                return Ok(RawSignature(signature.as_ref().to_vec()));
            }
            (PrivateKey::Rsa(pair), Algorithm::RsaPkcs1Sha256 | Algorithm::RsaPssSha256) => Arc::clone(pair),
            _ => return Err(wrong()),
        };
        let padding: &'static dyn RsaEncoding =
            if algorithm == Algorithm::RsaPssSha256 { &RSA_PSS_SHA256 } else { &RSA_PKCS1_SHA256 };
        // 0.2 to 3.4 milliseconds: too long for a thread that others' connections wait on.
        let core = Arc::clone(&self.cores).acquire_owned().await.expect("the semaphore is never closed");
        let signed = tokio::task::spawn_blocking(move || {
            let _core = core;
            let mut signature = vec![0; pair.public_modulus_len()];
            pair.sign_digest(padding, &digest, &mut signature).map(|()| signature)
        });
        match signed.await {
            Ok(Ok(signature)) => Ok(RawSignature(signature)),
            Ok(Err(_)) => Err(failed("RSA signing failed")),
            Err(_) => Err(failed("signing was cut off by the shutdown")),
        }
    }
}

impl fmt::Debug for FileKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileKey").field("uri", &self.uri).field("public_key", &self.public_key).finish_non_exhaustive()
    }
}

/// The public half of a private key's file, for those who only verify.
pub(crate) fn public_key_of_file(path: &Path, login: Option<&Login>) -> Result<PublicKey, Error> {
    FileKey::open(path, login, &Environment::system()).map(|key| key.public_key)
}

/// Makes a key and writes it as a PKCS#8 PEM file that its owner alone can read. An existing file is never replaced.
/// An RSA key takes up to some seconds.
pub fn generate(spec: KeySpec, path: &Path) -> Result<PublicKey, Error> {
    generate_with(spec, path, None)
}

/// The same, encrypted with a passphrase (PBES2 of RFC 8018: scrypt and AES-256-CBC).
pub fn generate_encrypted(spec: KeySpec, path: &Path, passphrase: &SecretString) -> Result<PublicKey, Error> {
    generate_with(spec, path, Some(passphrase))
}

fn generate_with(spec: KeySpec, path: &Path, passphrase: Option<&SecretString>) -> Result<PublicKey, Error> {
    let failed = |what, source| Error::File { key: Arc::new(KeyUri::File(path.to_owned())), what, source };
    let no_key = |_| failed("the key could not be made", io::ErrorKind::Other.into());
    let rsa = |size| {
        let pair = RsaKeyPair::generate(size).map_err(no_key)?;
        let der = pair.as_der().map_err(no_key)?;
        SecretDocument::try_from(der.as_ref()).map_err(|_| no_key(aws_lc_rs::error::Unspecified))
    };
    let document = match spec {
        KeySpec::Rsa2048 => rsa(KeySize::Rsa2048)?,
        KeySpec::Rsa3072 => rsa(KeySize::Rsa3072)?,
        KeySpec::Rsa4096 => rsa(KeySize::Rsa4096)?,
        KeySpec::EcP256 => {
            let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).map_err(no_key)?;
            let der = pair.to_pkcs8v1().map_err(no_key)?;
            SecretDocument::try_from(der.as_ref()).map_err(|_| no_key(aws_lc_rs::error::Unspecified))?
        }
    };
    let pem = pkcs8::to_pem(&document, passphrase).map_err(no_key)?;
    create_file(path, pem.as_bytes(), 0o600).map_err(|source| {
        let what = if source.kind() == io::ErrorKind::AlreadyExists {
            "there is a file already, and a key is never overwritten: choose another name, or move the old one away"
        } else {
            "the key could not be written"
        };
        failed(what, source)
    })?;
    // What was written is what a later start will read.
    FileKey::open_with(path, passphrase).map(|key| key.public_key)
}

fn misconfigured(path: &Path, what: impl Into<String>) -> Error {
    Error::Misconfigured { key: Arc::new(KeyUri::File(PathBuf::from(path))), what: what.into() }
}

#[cfg(test)]
mod tests;
