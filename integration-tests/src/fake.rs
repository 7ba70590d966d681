//! What the fakes of the clouds' KMSs have in common: a server, real keys, and the ways in which a service fails.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};
use std::time::Duration;

use aws_lc_rs::digest::{Digest as Hashed, SHA256};
use aws_lc_rs::encoding::{AsDer as _, PublicKeyX509Der};
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING,
    EcdsaKeyPair, EcdsaSigningAlgorithm, KeyPair as _, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_SHA256,
    RSA_PSS_2048_8192_SHA256, RSA_PSS_SHA256, RsaEncoding, RsaKeyPair, VerificationAlgorithm,
};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::response::Builder;
use axum::middleware::{self, Next};
use axum::response::Response;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures::{StreamExt as _, stream};
use jiff::{Timestamp, tz::TimeZone};
use reqwest::Url;
use tokio::net::TcpListener;

/// A cloud on this machine, and what a test may look at and change of it.
pub struct Fake<G> {
    pub address: String,
    given: Arc<Mutex<G>>,
    /// How long an answer takes at least, in microseconds.
    distance: Arc<AtomicU64>,
}

/// What a test wants of each fake.
pub trait Scripted {
    /// What becomes of the next requests, and what was asked for since this was asked last.
    fn script(&mut self) -> (&mut VecDeque<Fault>, &mut Vec<String>);
}

impl<G> Clone for Fake<G> {
    fn clone(&self) -> Self {
        Self { address: self.address.clone(), given: Arc::clone(&self.given), distance: Arc::clone(&self.distance) }
    }
}

impl<G: Scripted + Send + 'static> Fake<G> {
    /// Serves `app`; what is `given` may have the address in it.
    pub(crate) async fn serving(app: Router<Arc<Mutex<G>>>, given: impl FnOnce(&str) -> G) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let given = Arc::new(Mutex::new(given(&address)));
        let distance = Arc::new(AtomicU64::new(0));
        let away = middleware::from_fn_with_state(Arc::clone(&distance), come_from_afar);
        let app = app.with_state(Arc::clone(&given)).layer(away);
        #[expect(clippy::disallowed_methods, reason = "it ends with the test's own runtime")]
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { address, given, distance }
    }

    /// From now on it is so far away: answers take that long at least.
    pub fn stand_off(&self, distance: Duration) {
        self.distance.store(u64::try_from(distance.as_micros()).unwrap(), Ordering::Relaxed);
    }

    pub fn given(&self) -> MutexGuard<'_, G> {
        self.given.lock().unwrap()
    }

    pub fn then(&self, faults: impl IntoIterator<Item = Fault>) {
        self.given().script().0.extend(faults);
    }

    /// What was asked for since this was asked last.
    pub fn requests(&self) -> Vec<String> {
        std::mem::take(self.given().script().1)
    }
}

/// Where a fake's time comes from.
pub type Now = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// The kinds of key, by their names in countersign.
pub const SPECS: [&str; 4] = ["RSA_2048", "RSA_3072", "RSA_4096", "EC_P256"];

/// What a service does with a request instead of answering it.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Status and code.
    Error(u16, &'static str),
    /// Status, code and message.
    Saying(u16, &'static str, &'static str),
    Throttled {
        retry_after: u32,
    },
    /// A body of exactly this text, and 200.
    Says(String),
    /// Headers and half a body, and then the connection is gone.
    Reset,
    NoAnswer,
    Endless,
    /// Answers as this key and version.
    As(&'static str, &'static str),
    /// Signs with another key of the same kind.
    WrongKey,
    /// Answers with this field gone, or with this in its place.
    Field(&'static str, Option<&'static str>),
}

impl Fault {
    /// Whether there is an answer all the same, another one.
    pub fn is_in_answer(&self) -> bool {
        matches!(self, Self::As(..) | Self::WrongKey | Self::Field(..))
    }

    /// What comes instead of an answer; nothing, if it only changes the answer. `error` writes a status, code and message down, and
    /// `throttled` is the code of that.
    pub fn answer(&self, response: Builder, throttled: &str, error: impl Fn(u16, &str, &str) -> String) -> Option<Response> {
        let (status, body) = match self {
            Self::Error(status, code) => (*status, error(*status, code, "as the test has it").into()),
            Self::Saying(status, code, message) => (*status, error(*status, code, message).into()),
            Self::Throttled { retry_after } => {
                let body = error(429, throttled, "too many requests");
                return Some(response.status(429).header("retry-after", *retry_after).body(body.into()).unwrap());
            }
            Self::Says(text) => (200, text.clone().into()),
            Self::Reset => {
                let half = stream::iter([Ok(Bytes::from_static(b"{\"KeyId\":"))]);
                (200, Body::from_stream(half.chain(stream::once(async { Err(std::io::Error::other("cut")) }))))
            }
            Self::NoAnswer => panic!("the connection is dropped"),
            Self::Endless => {
                let spaces = stream::repeat_with(|| Ok::<_, std::io::Error>(Bytes::from(vec![b' '; 16 * 1024])));
                (200, Body::from_stream(spaces))
            }
            Self::As(..) | Self::WrongKey | Self::Field(..) => return None,
        };
        Some(response.status(status).body(body).unwrap())
    }
}

async fn come_from_afar(State(distance): State<Arc<AtomicU64>>, request: Request, next: Next) -> Response {
    match distance.load(Ordering::Relaxed) {
        0 => {}
        distance => tokio::time::sleep(Duration::from_micros(distance)).await,
    }
    next.run(request).await
}

/// The headers of a JSON request by who has this token.
pub(crate) fn with_bearer(token: &str) -> Vec<(String, String)> {
    vec![("authorization".to_owned(), format!("Bearer {token}")), ("content-type".to_owned(), "application/json".to_owned())]
}

/// As HTTP writes a time.
pub fn http_date(time: Timestamp) -> String {
    time.to_zoned(TimeZone::UTC).strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()
}

/// The pairs of a query or of a form.
pub fn decoded(query: &str) -> BTreeMap<String, String> {
    let mut url = Url::parse("http://query/").expect("it is a constant");
    url.set_query(Some(query));
    url.query_pairs().into_owned().collect()
}

/// A key of one kind.
pub enum Pair {
    Rsa(RsaKeyPair),
    Ec { asn1: EcdsaKeyPair, fixed: EcdsaKeyPair },
}

/// How a digest is signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Padding {
    Pkcs1,
    Pss,
    /// `ECDSA-Sig-Value` in DER.
    Asn1,
    /// The two numbers, 32 bytes each.
    Fixed,
}

/// The key of a kind, the same each time. None is made here: large ones take longer than clients wait for their signatures.
pub fn pair(spec: &str) -> &'static Pair {
    static PAIRS: [LazyLock<Pair>; 4] = [
        LazyLock::new(|| Pair::rsa(&der(include_str!("../../tests/data/vectors/keys/rsa2048.key.pem")))),
        LazyLock::new(|| Pair::rsa(&der(include_str!("../../tests/data/vectors/keys/rsa3072.key.pem")))),
        LazyLock::new(|| Pair::rsa(&der(include_str!("../../tests/data/vectors/keys/rsa4096.key.pem")))),
        LazyLock::new(|| Pair::ec(&der(include_str!("../../tests/data/vectors/keys/p256.key.pem")))),
    ];
    &PAIRS[SPECS.iter().position(|known| *known == spec).expect("it is the name of a kind of key")]
}

/// Another key: of the same kind where that is `RSA_2048` or `EC_P256`.
pub fn other_pair(spec: &str) -> &'static Pair {
    static RSA: LazyLock<Pair> = LazyLock::new(|| Pair::generated(KeySize::Rsa2048));
    static EC: LazyLock<Pair> = LazyLock::new(|| {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).expect("a key can be made");
        Pair::ec(pair.to_pkcs8v1().expect("it can be written").as_ref())
    });
    if spec == "EC_P256" { &EC } else { &RSA }
}

fn der(pem: &str) -> Vec<u8> {
    let base64: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    BASE64_STANDARD.decode(base64).expect("PEM holds base64")
}

pub fn pem(label: &str, der: &[u8]) -> String {
    let base64 = BASE64_STANDARD.encode(der);
    let lines: Vec<_> = base64.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

impl Pair {
    fn rsa(der: &[u8]) -> Self {
        Self::Rsa(RsaKeyPair::from_pkcs8(der).expect("it is an RSA key"))
    }

    fn generated(size: KeySize) -> Self {
        Self::Rsa(RsaKeyPair::generate(size).expect("a key can be made"))
    }

    fn ec(der: &[u8]) -> Self {
        let read =
            |algorithm: &'static EcdsaSigningAlgorithm| EcdsaKeyPair::from_pkcs8(algorithm, der).expect("it is a P-256 key");
        Self::Ec { asn1: read(&ECDSA_P256_SHA256_ASN1_SIGNING), fixed: read(&ECDSA_P256_SHA256_FIXED_SIGNING) }
    }

    pub fn public_der(&self) -> Vec<u8> {
        let der: PublicKeyX509Der<'_> = match self {
            Self::Rsa(pair) => pair.public_key().as_der(),
            Self::Ec { asn1, .. } => asn1.public_key().as_der(),
        }
        .expect("a public key can be encoded");
        der.as_ref().to_vec()
    }

    pub fn public_pem(&self) -> String {
        pem("PUBLIC KEY", &self.public_der())
    }

    /// The modulus and the exponent, or the two coordinates.
    pub fn numbers(&self) -> [Vec<u8>; 2] {
        match self {
            Self::Rsa(pair) => {
                let key = pair.public_key();
                let [n, e] = [key.modulus(), key.exponent()];
                [n.big_endian_without_leading_zero().to_vec(), e.big_endian_without_leading_zero().to_vec()]
            }
            Self::Ec { asn1, .. } => {
                let (x, y) = asn1.public_key().as_ref()[1..].split_at(32);
                [x.to_vec(), y.to_vec()]
            }
        }
    }

    /// Nothing, if this kind of key does not sign so.
    pub fn sign(&self, padding: Padding, digest: &[u8; 32]) -> Option<Vec<u8>> {
        let hashed = Hashed::import_less_safe(digest, &SHA256).expect("it is 32 bytes");
        let rsa = |pair: &RsaKeyPair, encoding: &'static dyn RsaEncoding| {
            let mut signature = vec![0; pair.public_modulus_len()];
            pair.sign_digest(encoding, &hashed, &mut signature).expect("the buffer is large enough");
            Some(signature)
        };
        let ec = |pair: &EcdsaKeyPair| Some(pair.sign_digest(&hashed).expect("it can sign").as_ref().to_vec());
        match (self, padding) {
            (Self::Rsa(pair), Padding::Pkcs1) => rsa(pair, &RSA_PKCS1_SHA256),
            (Self::Rsa(pair), Padding::Pss) => rsa(pair, &RSA_PSS_SHA256),
            (Self::Ec { asn1, .. }, Padding::Asn1) => ec(asn1),
            (Self::Ec { fixed, .. }, Padding::Fixed) => ec(fixed),
            _ => None,
        }
    }

    /// Whether this is its signature. Nothing, if this kind of key does not sign so.
    pub fn verifies(&self, padding: Padding, digest: &[u8; 32], signature: &[u8]) -> Option<bool> {
        let algorithm: &'static dyn VerificationAlgorithm = match (self, padding) {
            (Self::Rsa(_), Padding::Pkcs1) => &RSA_PKCS1_2048_8192_SHA256,
            (Self::Rsa(_), Padding::Pss) => &RSA_PSS_2048_8192_SHA256,
            (Self::Ec { .. }, Padding::Asn1) => &ECDSA_P256_SHA256_ASN1,
            (Self::Ec { .. }, Padding::Fixed) => &ECDSA_P256_SHA256_FIXED,
            _ => return None,
        };
        let hashed = Hashed::import_less_safe(digest, &SHA256).expect("it is 32 bytes");
        let key = ParsedPublicKey::new(algorithm, self.public_der()).expect("it is a key");
        Some(key.verify_digest_sig(&hashed, signature).is_ok())
    }
}
