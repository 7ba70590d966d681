//! A strict KMS in this process: real keys, `DIGEST` only, key states, Signature Version 4 recomputed from scratch, and faults
//! that a test asks for.

use std::{
    collections::VecDeque,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use aws_lc_rs::{
    digest::{SHA256, digest},
    hmac,
    signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, RSA_PKCS1_SHA256, RSA_PSS_SHA256, RsaEncoding, RsaKeyPair,
        RsaPssSaltLength, RsaSignatureEncoding,
    },
};
use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    response::Response,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use futures::{StreamExt, stream};
use http::{HeaderMap, StatusCode};
use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use rsa::pkcs8::SecretDocument;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::kms::{Algorithm, KeySpec, PublicKey};

pub(super) const ACCESS_KEY: &str = "AKIDEXAMPLE";
pub(super) const SECRET_KEY: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
pub(super) const REGION: &str = "eu-west-1";
pub(super) const RSA_ARN: &str = "arn:aws:kms:eu-west-1:111122223333:key/rsa";
pub(super) const EC_ARN: &str = "arn:aws:kms:eu-west-1:111122223333:key/ec";

/// What the KMS does with a request instead of answering it.
#[derive(Debug, Clone)]
pub(super) enum Fault {
    Error {
        status: u16,
        code: &'static str,
        message: &'static str,
        retry_after: Option<u32>,
    },
    /// Headers and half a body, and then nothing.
    SlowBody,
    /// Headers and half a body, and then the connection is gone.
    Reset,
    /// The connection is gone before any answer.
    NoAnswer,
    /// A body of exactly this text.
    Says(String),
    Endless,
    /// Signs with another key of the same kind.
    WrongKey,
    /// Hashes the digest again.
    DoubleHash,
    /// A PSS signature with as much salt as fits.
    MaximumSalt,
    /// Answers as this key.
    OtherArn(&'static str),
    OtherAlgorithm,
}

impl Fault {
    pub(super) fn error(status: u16, code: &'static str) -> Self {
        Self::Error { status, code, message: "as the test has it", retry_after: None }
    }
}

pub(super) struct Fake {
    pub(super) address: String,
    state: Arc<Served>,
}

struct Served {
    script: Mutex<VecDeque<Fault>>,
    key_state: Mutex<&'static str>,
    usage: Mutex<&'static str>,
    /// How far the KMS's clock is ahead of the machine's.
    ahead: Mutex<SignedDuration>,
    token: Mutex<Option<String>>,
    requests: Mutex<Vec<String>>,
    under_way: AtomicUsize,
    most_under_way: AtomicUsize,
    delay: Mutex<Duration>,
    rsa: Key,
    ec: Key,
    other: &'static Key,
}

/// Made once: that takes longer than any test here.
static OTHER: LazyLock<Key> = LazyLock::new(Key::generated);

struct Key {
    public: PublicKey,
    pair: Pair,
}

enum Pair {
    Rsa(RsaKeyPair),
    Ec(EcdsaKeyPair),
}

impl Fake {
    pub(super) async fn start() -> Self {
        let state = Arc::new(Served {
            script: Mutex::default(),
            key_state: Mutex::new("Enabled"),
            usage: Mutex::new("SIGN_VERIFY"),
            ahead: Mutex::default(),
            token: Mutex::default(),
            requests: Mutex::default(),
            under_way: AtomicUsize::new(0),
            most_under_way: AtomicUsize::new(0),
            delay: Mutex::default(),
            rsa: Key::of(include_str!("../../../../tests/data/vectors/keys/rsa2048.key.pem")),
            ec: Key::of(include_str!("../../../../tests/data/vectors/keys/p256.key.pem")),
            other: &OTHER,
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let app = Router::new().fallback(serve).with_state(state.clone());
        #[expect(clippy::disallowed_methods, reason = "it ends with the test's own runtime")]
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { address, state }
    }

    /// These instead of the next requests' answers.
    pub(super) fn then(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state.script.lock().unwrap().extend(faults);
    }

    pub(super) fn set_state(&self, state: &'static str) {
        *self.state.key_state.lock().unwrap() = state;
    }

    pub(super) fn set_usage(&self, usage: &'static str) {
        *self.state.usage.lock().unwrap() = usage;
    }

    pub(super) fn set_ahead(&self, ahead: SignedDuration) {
        *self.state.ahead.lock().unwrap() = ahead;
    }

    pub(super) fn set_token(&self, token: &str) {
        *self.state.token.lock().unwrap() = Some(token.to_owned());
    }

    pub(super) fn set_delay(&self, delay: Duration) {
        *self.state.delay.lock().unwrap() = delay;
    }

    /// The operations that were asked for since this was asked last.
    pub(super) fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state.requests.lock().unwrap())
    }

    pub(super) fn most_under_way(&self) -> usize {
        self.state.most_under_way.load(Ordering::SeqCst)
    }
}

impl Key {
    fn of(pem: &str) -> Self {
        let (_, document) = SecretDocument::from_pem(pem.trim()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key.pem");
        crate::kms::create_file(&path, pem.as_bytes(), 0o600).unwrap();
        let public = crate::kms::public_key_of_file(&path, None).unwrap();
        let pair = if public.spec() == KeySpec::EcP256 {
            Pair::Ec(EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, document.as_bytes()).unwrap())
        } else {
            Pair::Rsa(RsaKeyPair::from_pkcs8(document.as_bytes()).unwrap())
        };
        Self { public, pair }
    }

    fn generated() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key.pem");
        crate::kms::generate(KeySpec::Rsa2048, &path).unwrap();
        Self::of(&std::fs::read_to_string(path).unwrap())
    }

    fn sign(&self, algorithm: &str, given: &[u8], fault: Option<&Fault>) -> Vec<u8> {
        static MAXIMUM_SALT: RsaSignatureEncoding = RSA_PSS_SHA256.with_pss_salt_length(RsaPssSaltLength::Max);
        let hashed =
            if matches!(fault, Some(Fault::DoubleHash)) { digest(&SHA256, given).as_ref().to_vec() } else { given.to_vec() };
        let hashed = crate::kms::public_key::import(&hashed.try_into().unwrap());
        let padding: &'static dyn RsaEncoding = match algorithm {
            "RSASSA_PSS_SHA_256" if matches!(fault, Some(Fault::MaximumSalt)) => &MAXIMUM_SALT,
            "RSASSA_PSS_SHA_256" => &RSA_PSS_SHA256,
            _ => &RSA_PKCS1_SHA256,
        };
        match &self.pair {
            Pair::Ec(pair) => pair.sign_digest(&hashed).unwrap().as_ref().to_vec(),
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign_digest(padding, &hashed, &mut signature).unwrap();
                signature
            }
        }
    }
}

struct Refusal(u16, &'static str, String);

fn refuse<T>(code: &'static str, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal(400, code, message.into()))
}

async fn serve(State(state): State<Arc<Served>>, headers: HeaderMap, body: Bytes) -> Response {
    let operation = headers.get("x-amz-target").map_or("", |target| target.to_str().unwrap()).to_owned();
    state.requests.lock().unwrap().push(operation.trim_start_matches("TrentService.").to_owned());
    let under_way = state.under_way.fetch_add(1, Ordering::SeqCst) + 1;
    state.most_under_way.fetch_max(under_way, Ordering::SeqCst);
    let delay = *state.delay.lock().unwrap();
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    state.under_way.fetch_sub(1, Ordering::SeqCst);

    let fault = state.script.lock().unwrap().pop_front();
    let now = now() + *state.ahead.lock().unwrap();
    let dated = Response::builder()
        .header("date", now.to_zoned(TimeZone::UTC).strftime("%a, %d %b %Y %H:%M:%S GMT").to_string())
        .header("x-amzn-requestid", "0a1b2c");
    match &fault {
        Some(Fault::Error { status, code, message, retry_after }) => {
            let dated = match retry_after {
                Some(seconds) => dated.header("retry-after", *seconds),
                None => dated,
            };
            let body = json!({ "__type": code, "message": message }).to_string();
            return dated.status(*status).body(body.into()).unwrap();
        }
        Some(cut @ (Fault::SlowBody | Fault::Reset)) => {
            let half = stream::iter([Ok(Bytes::from_static(b"{\"KeyId\":"))]);
            let body = if matches!(cut, Fault::SlowBody) {
                Body::from_stream(half.chain(stream::pending::<Result<Bytes, std::io::Error>>()))
            } else {
                Body::from_stream(half.chain(stream::once(async { Err(std::io::Error::other("cut")) })))
            };
            return dated.body(body).unwrap();
        }
        Some(Fault::NoAnswer) => panic!("the connection is dropped"),
        Some(Fault::Says(text)) => return dated.body(text.clone().into()).unwrap(),
        Some(Fault::Endless) => {
            let zeroes = stream::repeat_with(|| Ok::<_, std::io::Error>(Bytes::from(vec![b' '; 16 * 1024])));
            return dated.body(Body::from_stream(zeroes)).unwrap();
        }
        _ => {}
    }
    let answer = state
        .authenticate(&headers, &body, now)
        .and_then(|()| state.answer(&operation, &serde_json::from_slice(&body).unwrap(), fault.as_ref()));
    match answer {
        Ok(answer) => dated.body(answer.to_string().into()).unwrap(),
        Err(Refusal(status, code, message)) => {
            let body = json!({ "__type": format!("com.amazonaws.kms#{code}"), "message": message }).to_string();
            dated.status(StatusCode::from_u16(status).unwrap()).body(body.into()).unwrap()
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the peer has a clock of its own")]
pub(super) fn now() -> Timestamp {
    Timestamp::now()
}

impl Served {
    fn answer(&self, operation: &str, request: &Value, fault: Option<&Fault>) -> Result<Value, Refusal> {
        let asked = request["KeyId"].as_str().unwrap();
        let (key, arn) = match asked {
            "alias/rsa" | "rsa" | RSA_ARN => (&self.rsa, RSA_ARN),
            "alias/ec" | "ec" | EC_ARN => (&self.ec, EC_ARN),
            _ => return refuse("NotFoundException", format!("Alias {asked} is not found.")),
        };
        let state = *self.key_state.lock().unwrap();
        let usage = *self.usage.lock().unwrap();
        let spec = if arn == EC_ARN { "ECC_NIST_P256" } else { "RSA_2048" };
        let arn = if let Some(Fault::OtherArn(other)) = fault { other } else { arn };
        match operation {
            "TrentService.DescribeKey" => Ok(json!({ "KeyMetadata": {
                "Arn": arn, "KeyId": "x", "KeyState": state, "KeyUsage": usage, "KeySpec": spec, "Enabled": state == "Enabled",
                "DeletionDate": (state == "PendingDeletion").then_some(1_800_000_000.5),
            }})),
            "TrentService.GetPublicKey" => Ok(json!({
                "KeyId": arn, "KeySpec": spec, "KeyUsage": usage, "PublicKey": BASE64_STANDARD.encode(key.public.spki_der()),
            })),
            "TrentService.Sign" => {
                match state {
                    "Enabled" => {}
                    "Disabled" => return refuse("DisabledException", format!("{arn} is disabled.")),
                    _ => return refuse("KMSInvalidStateException", format!("{arn} is {state}.")),
                }
                let algorithm = request["SigningAlgorithm"].as_str().unwrap();
                let digest = BASE64_STANDARD.decode(request["Message"].as_str().unwrap()).unwrap();
                if request["MessageType"] != "DIGEST" || digest.len() != 32 {
                    return refuse("ValidationException", "a DIGEST of 32 bytes is wanted");
                }
                if request["DryRun"] == true {
                    return Err(Refusal(412, "DryRunOperationException", "the DryRun parameter was specified".to_owned()));
                }
                let key = if matches!(fault, Some(Fault::WrongKey)) { self.other } else { key };
                let signature = BASE64_STANDARD.encode(key.sign(algorithm, &digest, fault));
                let algorithm = if matches!(fault, Some(Fault::OtherAlgorithm)) { "RSASSA_PSS_SHA_512" } else { algorithm };
                Ok(json!({ "KeyId": arn, "Signature": signature, "SigningAlgorithm": algorithm }))
            }
            "TrentService.Verify" => {
                let text = |name: &str| BASE64_STANDARD.decode(request[name].as_str().unwrap()).unwrap();
                assert_eq!(request["MessageType"], "DIGEST");
                let algorithm = match request["SigningAlgorithm"].as_str().unwrap() {
                    "RSASSA_PKCS1_V1_5_SHA_256" => Algorithm::RsaPkcs1Sha256,
                    "RSASSA_PSS_SHA_256" => Algorithm::RsaPssSha256,
                    _ => Algorithm::EcdsaSha256,
                };
                let digest = text("Message").try_into().unwrap();
                if key.public.verify(algorithm, &digest, &text("Signature")).is_err() {
                    return refuse("KMSInvalidSignatureException", "");
                }
                Ok(json!({ "KeyId": arn, "SignatureValid": true, "SigningAlgorithm": request["SigningAlgorithm"] }))
            }
            _ => refuse("UnknownOperationException", operation),
        }
    }

    /// Signature Version 4 as its specification has it, with nothing of what the client uses.
    fn authenticate(&self, headers: &HeaderMap, body: &[u8], now: Timestamp) -> Result<(), Refusal> {
        let header = |name: &str| headers.get(name).map_or("", |value| value.to_str().unwrap());
        let token = self.token.lock().unwrap().clone();
        if token.as_deref().unwrap_or_default() != header("x-amz-security-token") {
            return refuse("UnrecognizedClientException", "The security token included in the request is invalid.");
        }
        let Some(fields) = header("authorization").strip_prefix("AWS4-HMAC-SHA256 ") else {
            return refuse("MissingAuthenticationTokenException", "Missing Authentication Token");
        };
        let field = |name: &str| {
            fields
                .split(", ")
                .find_map(|field| field.strip_prefix(name)?.strip_prefix('='))
                .expect("the field is there")
                .to_owned()
        };
        let (credential, signed_headers) = (field("Credential"), field("SignedHeaders"));
        let date_time = header("x-amz-date");
        let date = &date_time[..8];
        let scope = format!("{date}/{REGION}/kms/aws4_request");
        if credential.split('/').next() != Some(ACCESS_KEY) {
            return refuse("UnrecognizedClientException", "The security token included in the request is invalid.");
        }
        assert_eq!(credential, format!("{ACCESS_KEY}/{scope}"), "region, service and date of the scope");
        let all = ["content-type", "host", "x-amz-date", "x-amz-security-token", "x-amz-target"];
        let expected: Vec<_> = all.into_iter().filter(|name| token.is_some() || *name != "x-amz-security-token").collect();
        assert_eq!(signed_headers, expected.join(";"));
        assert_eq!(header("content-type"), "application/x-amz-json-1.1");

        let hex_digest = |bytes: &[u8]| hex::encode(digest(&SHA256, bytes));
        let lines: Vec<_> = expected.iter().map(|name| format!("{name}:{}", header(name))).collect();
        let canonical = format!("POST\n/\n\n{}\n\n{signed_headers}\n{}", lines.join("\n"), hex_digest(body));
        let to_sign = format!("AWS4-HMAC-SHA256\n{date_time}\n{scope}\n{}", hex_digest(canonical.as_bytes()));
        let mac = |key: &[u8], text: &str| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes()).as_ref().to_vec();
        let key = [REGION, "kms", "aws4_request"]
            .iter()
            .fold(mac(format!("AWS4{SECRET_KEY}").as_bytes(), date), |key, part| mac(&key, part));
        if field("Signature") != hex::encode(mac(&key, &to_sign)) {
            // AWS repeats the request in the lines that follow.
            let message =
                format!("The request signature we calculated does not match.\n\nThe Canonical String was\n'{canonical}'");
            return refuse("InvalidSignatureException", message);
        }
        let signed_at = Timestamp::strptime("%Y%m%dT%H%M%S%z", date_time.replace('Z', "+0000")).unwrap();
        let old = now.duration_since(signed_at);
        if old > SignedDuration::from_mins(5) {
            return refuse("InvalidSignatureException", format!("Signature expired: {date_time} is now earlier than (- 5 min.)"));
        }
        if old < -SignedDuration::from_mins(5) {
            return refuse(
                "InvalidSignatureException",
                format!("Signature not yet current: {date_time} is still later than (+ 5 min.)"),
            );
        }
        Ok(())
    }
}
