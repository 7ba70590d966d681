//! What holds for every key, whichever KMS it is in.

mod kms_contract {
    mod clouds;
}

use std::{error::Error as _, sync::Arc};

use async_trait::async_trait;
use countersign::{
    clock::Clock,
    kms::{self, Algorithm, Environment, Error, KeySpec, KeyUri, SigningKey, VerifyError},
    outcome::{Classify, Verdict},
};
use futures::future::join_all;
#[cfg(feature = "pkcs11")]
use integration_tests::softhsm::{PIN, SoftHsm};
use integration_tests::{
    ministack::{Ministack, REGION},
    openbao::OpenBao,
};
use reqwest::Method;
use rsa::{
    pkcs8::DecodePublicKey,
    sha2::{Digest, Sha256},
    signature::hazmat::PrehashVerifier,
};
use serde_json::json;

/// One provider with keys of every kind.
#[async_trait]
trait Provider: Sync {
    /// Opens the key of this kind; an equal one each time.
    async fn open(&self, spec: KeySpec) -> Result<Arc<dyn SigningKey>, Error>;

    /// What may not be in any text.
    fn secrets(&self) -> Vec<&str>;

    /// Whether its KMS verifies.
    fn verifies(&self) -> bool {
        false
    }

    /// Makes the keys fail in the way of this number, or none if there are no more ways; says how that has to end.
    async fn fail(&self, _way: usize, _spec: KeySpec) -> Option<Ending> {
        None
    }

    /// Undoes it.
    async fn mend(&self, _way: usize, _spec: KeySpec) {}
}

#[derive(Debug, PartialEq, Eq)]
enum Ending {
    Retry,
    Refuse,
}

async fn holds(provider: &dyn Provider) {
    for spec in KeySpec::ALL {
        let key = provider.open(spec).await.unwrap();
        assert_eq!(key.public_key().spec(), spec);
        is_the_same_each_time(provider, &*key).await;
        for algorithm in Algorithm::ALL {
            if key.allows(algorithm) {
                signs_the_digest_and_nothing_else(&*key, algorithm).await;
                signs_many_at_once(&*key, algorithm).await;
                its_kms_agrees(provider, &*key, algorithm).await;
            } else {
                let refused = key.sign(algorithm, &digest(0)).await;
                match (spec.supports(algorithm), &refused) {
                    (false, Err(Error::WrongAlgorithm { .. })) | (true, Err(Error::Misconfigured { .. })) => {}
                    _ => panic!("{spec} {algorithm}: {refused:?}"),
                }
            }
        }
        fails_as_it_should(provider, &*key).await;
        shows_no_secret(provider, &format!("{key:?}"));
    }
}

async fn is_the_same_each_time(provider: &dyn Provider, key: &dyn SigningKey) {
    let again = provider.open(key.public_key().spec()).await.unwrap();
    assert_eq!(again.public_key(), key.public_key());
    assert_eq!(again.resolved(), key.resolved());
    assert_eq!(again.uri(), key.uri());
    assert_eq!(key.uri().to_string().parse::<KeyUri>().as_ref(), Ok(key.uri()), "a reference is written as it is read");
}

async fn signs_the_digest_and_nothing_else(key: &dyn SigningKey, algorithm: Algorithm) {
    let digest = digest(1);
    let signature = key.sign(algorithm, &digest).await.unwrap();
    assert_eq!(key.public_key().verify(algorithm, &digest, signature.as_ref()), Ok(()));
    assert_ne!(is_verified_by_others(key, algorithm, &digest, signature.as_ref()), Some(false), "{algorithm}");
    // The classic mistake of a KMS's client: the digest taken for a message and hashed again.
    let again: [u8; 32] = Sha256::digest(digest).into();
    assert_eq!(key.public_key().verify(algorithm, &again, signature.as_ref()), Err(VerifyError::Mismatch));
    assert_ne!(is_verified_by_others(key, algorithm, &again, signature.as_ref()), Some(true), "{algorithm}");
}

/// An independent verifier for RSA: the rsa crate, which takes a salt of exactly 32 bytes.
fn is_verified_by_others(key: &dyn SigningKey, algorithm: Algorithm, digest: &[u8; 32], signature: &[u8]) -> Option<bool> {
    let public_key = || rsa::RsaPublicKey::from_public_key_der(key.public_key().spki_der()).unwrap();
    let verified = match algorithm {
        Algorithm::RsaPkcs1Sha256 => rsa::pkcs1v15::VerifyingKey::<Sha256>::new(public_key())
            .verify_prehash(digest, &rsa::pkcs1v15::Signature::try_from(signature).unwrap()),
        Algorithm::RsaPssSha256 => rsa::pss::VerifyingKey::<Sha256>::new_with_salt_len(public_key(), 32)
            .verify_prehash(digest, &rsa::pss::Signature::try_from(signature).unwrap()),
        Algorithm::EcdsaSha256 => return None,
    };
    Some(verified.is_ok())
}

async fn signs_many_at_once(key: &dyn SigningKey, algorithm: Algorithm) {
    const MANY: u8 = 48;
    let signed = join_all((0..MANY).map(|number| async move { (number, key.sign(algorithm, &digest(number)).await) })).await;
    for (number, signature) in signed {
        let verified = key.public_key().verify(algorithm, &digest(number), signature.unwrap().as_ref());
        assert_eq!(verified, Ok(()), "{algorithm} {number}");
    }
}

/// What it would sign and what it has signed, as the KMS itself sees it, where it can be asked.
async fn its_kms_agrees(provider: &dyn Provider, key: &dyn SigningKey, algorithm: Algorithm) {
    key.dry_run(algorithm, &digest(4)).await.unwrap();
    let signature = key.sign(algorithm, &digest(5)).await.unwrap();
    let valid = key.verify(algorithm, &digest(5), signature.as_ref()).await.unwrap();
    assert_eq!(valid, provider.verifies().then_some(true), "{algorithm}");
    let invalid = key.verify(algorithm, &digest(6), signature.as_ref()).await.unwrap();
    assert_eq!(invalid, provider.verifies().then_some(false), "{algorithm}");
}

async fn fails_as_it_should(provider: &dyn Provider, key: &dyn SigningKey) {
    let spec = key.public_key().spec();
    let algorithm = Algorithm::ALL.into_iter().find(|algorithm| key.allows(*algorithm)).expect("it signs with some algorithm");
    let mut way = 0;
    while let Some(ending) = provider.fail(way, spec).await {
        for error in [key.sign(algorithm, &digest(2)).await.unwrap_err(), provider.open(spec).await.unwrap_err()] {
            let found = match error.verdict() {
                Verdict::Retry { .. } => Ending::Retry,
                Verdict::Refuse { .. } => Ending::Refuse,
                Verdict::Poison => panic!("a key knows nothing of events: {error}"),
            };
            assert_eq!(found, ending, "{way}: {error}");
            assert!(error.to_string().contains(&key.uri().to_string()), "{error} does not name the key");
            let mut text = format!("{error} {error:?}");
            let mut source = error.source();
            while let Some(cause) = source {
                text = format!("{text} {cause} {cause:?}");
                source = cause.source();
            }
            shows_no_secret(provider, &text);
        }
        provider.mend(way, spec).await;
        let signature = key.sign(algorithm, &digest(3)).await.unwrap();
        assert_eq!(key.public_key().verify(algorithm, &digest(3), signature.as_ref()), Ok(()), "{way}");
        way += 1;
    }
}

fn shows_no_secret(provider: &dyn Provider, text: &str) {
    for secret in provider.secrets() {
        assert!(!text.contains(secret), "a secret is in {text}");
    }
}

fn digest(number: u8) -> [u8; 32] {
    Sha256::digest([number]).into()
}

struct Files(tempfile::TempDir);

#[async_trait]
impl Provider for Files {
    async fn open(&self, spec: KeySpec) -> Result<Arc<dyn SigningKey>, Error> {
        let path = self.0.path().join(spec.name());
        if !path.exists() {
            kms::generate(spec, &path)?;
        }
        let uri = format!("file://{}", path.display()).parse().unwrap();
        kms::open_in(&uri, None, Clock::system(), &Environment::of([])).await
    }

    fn secrets(&self) -> Vec<&str> {
        vec!["PRIVATE KEY"]
    }
}

#[tokio::test]
async fn it_holds_for_files() {
    holds(&Files(tempfile::tempdir().unwrap())).await;
}

struct Aws {
    server: Ministack,
    ids: [String; 4],
    access_key_id: String,
    secret: String,
}

impl Aws {
    fn name(spec: KeySpec) -> &'static str {
        if spec == KeySpec::EcP256 { "ECC_NIST_P256" } else { spec.name() }
    }

    async fn ask(&self, operation: &str, spec: KeySpec) {
        let id = &self.ids[KeySpec::ALL.iter().position(|known| *known == spec).unwrap()];
        self.server.kms(operation, &json!({"KeyId": id})).await.unwrap();
    }
}

#[async_trait]
impl Provider for Aws {
    async fn open(&self, spec: KeySpec) -> Result<Arc<dyn SigningKey>, Error> {
        let uri = format!("awskms://{}/alias/{}?region={REGION}", self.server.host(), Self::name(spec)).parse().unwrap();
        let environment = Environment::of([("AWS_ACCESS_KEY_ID", &self.access_key_id), ("AWS_SECRET_ACCESS_KEY", &self.secret)]);
        kms::open_in(&uri, None, Clock::system(), &environment).await
    }

    fn secrets(&self) -> Vec<&str> {
        vec![&self.secret]
    }

    fn verifies(&self) -> bool {
        true
    }

    async fn fail(&self, way: usize, spec: KeySpec) -> Option<Ending> {
        if way > 0 {
            return None;
        }
        self.ask("DisableKey", spec).await;
        Some(Ending::Refuse)
    }

    async fn mend(&self, _: usize, spec: KeySpec) {
        self.ask("EnableKey", spec).await;
    }
}

#[tokio::test]
async fn it_holds_for_aws_kms() {
    let server = Ministack::start().await.expect("ministack is in .tools: `make tools` installs it there");
    let who = server.user("signer", &["kms:Sign", "kms:Verify", "kms:GetPublicKey", "kms:DescribeKey"]).await.unwrap();
    let mut ids = Vec::new();
    for spec in KeySpec::ALL {
        ids.push(server.key(Aws::name(spec), Aws::name(spec)).await.unwrap());
    }
    let (access_key_id, secret) = (who.access_key_id, who.secret_access_key);
    holds(&Aws { server, ids: ids.try_into().unwrap(), access_key_id, secret }).await;
}

struct Vault {
    server: OpenBao,
    token: String,
}

impl Vault {
    fn name(spec: KeySpec) -> &'static str {
        match spec {
            KeySpec::Rsa2048 => "rsa-2048",
            KeySpec::Rsa3072 => "rsa-3072",
            KeySpec::Rsa4096 => "rsa-4096",
            KeySpec::EcP256 => "ecdsa-p256",
        }
    }
}

#[async_trait]
impl Provider for Vault {
    async fn open(&self, spec: KeySpec) -> Result<Arc<dyn SigningKey>, Error> {
        let uri = format!("openbao://{}?version=1", Self::name(spec)).parse().unwrap();
        let environment = Environment::of([("BAO_ADDR", self.server.url()), ("BAO_TOKEN", &self.token)]);
        kms::open_in(&uri, None, Clock::system(), &environment).await
    }

    fn secrets(&self) -> Vec<&str> {
        vec![&self.token]
    }

    fn verifies(&self) -> bool {
        true
    }

    async fn fail(&self, way: usize, spec: KeySpec) -> Option<Ending> {
        let key = format!("transit/keys/{}", Self::name(spec));
        match way {
            0 => {
                self.server.seal().await.unwrap();
                Some(Ending::Retry)
            }
            1 => {
                self.server.root(Method::POST, &format!("{key}/rotate"), json!({})).await.unwrap();
                let least = json!({"min_encryption_version": 2});
                self.server.root(Method::POST, &format!("{key}/config"), least).await.unwrap();
                Some(Ending::Refuse)
            }
            2 => {
                self.server.root(Method::DELETE, &format!("{key}/soft-delete"), json!({})).await.unwrap();
                Some(Ending::Refuse)
            }
            _ => None,
        }
    }

    async fn mend(&self, way: usize, spec: KeySpec) {
        let key = format!("transit/keys/{}", Self::name(spec));
        match way {
            0 => self.server.unseal().await.unwrap(),
            1 => {
                let least = json!({"min_encryption_version": 0});
                self.server.root(Method::POST, &format!("{key}/config"), least).await.unwrap();
            }
            _ => {
                self.server.root(Method::POST, &format!("{key}/soft-delete-restore"), json!({})).await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn it_holds_for_a_transit_engine() {
    let server = OpenBao::start().await.expect("OpenBao is in .tools: `make tools` installs it there");
    for spec in KeySpec::ALL {
        server.key(Vault::name(spec), Vault::name(spec)).await.unwrap();
    }
    server.verifying_policy("signer", "+").await.unwrap();
    let token = server.token("signer", json!({"ttl": "1h"})).await.unwrap();
    holds(&Vault { server, token }).await;
}

#[cfg(feature = "pkcs11")]
struct Token(SoftHsm);

#[cfg(feature = "pkcs11")]
#[async_trait]
impl Provider for Token {
    async fn open(&self, spec: KeySpec) -> Result<Arc<dyn SigningKey>, Error> {
        let uri = self.0.uri(spec.name()).parse().unwrap();
        kms::open_in(&uri, None, Clock::system(), &Environment::of([])).await
    }

    fn secrets(&self) -> Vec<&str> {
        vec![PIN]
    }

    fn verifies(&self) -> bool {
        true
    }

    async fn fail(&self, way: usize, _: KeySpec) -> Option<Ending> {
        if way > 0 {
            return None;
        }
        self.0.take_out().unwrap();
        Some(Ending::Retry)
    }

    async fn mend(&self, _: usize, _: KeySpec) {
        self.0.put_back().unwrap();
    }
}

#[cfg(feature = "pkcs11")]
#[tokio::test]
async fn it_holds_for_a_token() {
    let Some(hsm) = SoftHsm::inside("it_holds_for_a_token") else { return };
    for (number, spec) in (1..).zip(KeySpec::ALL) {
        let kind = match spec {
            KeySpec::Rsa2048 => "rsa:2048",
            KeySpec::Rsa3072 => "rsa:3072",
            KeySpec::Rsa4096 => "rsa:4096",
            KeySpec::EcP256 => "EC:prime256v1",
        };
        hsm.key(kind, spec.name(), number).unwrap();
    }
    holds(&Token(hsm)).await;
}
