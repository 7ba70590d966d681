//! A strict Google Cloud in this process: KMS, the token endpoint, STS, service account credentials and the metadata server. Written
//! from the documented protocol alone, with nothing of what the client uses: it checks the signature and every claim of a JWT, issues
//! tokens that end, holds requests to what the documentation demands, and signs with real keys.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, LazyLock, Mutex},
};

use aws_lc_rs::{
    encoding::{AsDer, Pkcs8V1Der},
    rsa::KeySize,
    signature::{KeyPair, RSA_PKCS1_2048_8192_SHA256, RsaKeyPair, UnparsedPublicKey},
};
use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, Method, Uri},
    response::Response,
};
use base64::{Engine, prelude::BASE64_STANDARD, prelude::BASE64_URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

pub use crate::fake::Fault;
use crate::fake::{self, Now, Padding, Pair, decoded, http_date, other_pair, pair, pem};

/// The service account, and the id of its key.
pub const EMAIL: &str = "countersign@p-1.iam.gserviceaccount.com";
const KEY_ID: &str = "0a1b2c3d";
/// A provider of a workload identity pool.
pub const PROVIDER: &str = "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/pool/providers/ci";
/// The key ring; a key in it is named by its algorithm, such as `RSA_SIGN_PKCS1_2048_SHA256`.
pub const RING: &str = "projects/p-1/locations/europe-west3/keyRings/images";
/// A person's.
pub const USER: [&str; 3] = ["client-1", "clientSecret1", "1//refreshToken1"];
const KMS_SCOPE: &str = "https://www.googleapis.com/auth/cloudkms";
const CLOUD_SCOPE: &str = "https://www.googleapis.com/auth/cloud-platform";

pub type Fake = fake::Fake<Given>;

/// What a test may look at and change.
pub struct Given {
    clock: Now,
    address: String,
    pub ahead: SignedDuration,
    /// Of tokens, in seconds.
    pub lifetime: i64,
    pub script: VecDeque<Fault>,
    pub requests: Vec<String>,
    /// Who asked the KMS.
    pub callers: Vec<&'static str>,
    pub subject_token: String,
    /// The states of each key's versions. Number 10 has the key of [`pair`], the others [`other_pair`].
    pub versions: BTreeMap<u32, &'static str>,
    /// How many versions are on a page at most, however many are asked for.
    pub page: usize,
    /// Who may not use keys.
    pub denied: Option<&'static str>,
    serial: u32,
    tokens: HashMap<String, Token>,
}

struct Token {
    of: &'static str,
    scope: &'static str,
    expires: Timestamp,
}

static SIGNER: LazyLock<RsaKeyPair> = LazyLock::new(|| RsaKeyPair::generate(KeySize::Rsa2048).expect("a key can be made"));

impl fake::Scripted for Given {
    fn script(&mut self) -> (&mut VecDeque<Fault>, &mut Vec<String>) {
        (&mut self.script, &mut self.requests)
    }
}

impl Fake {
    /// With the clock that it goes by.
    pub async fn start(clock: Now) -> Self {
        Self::serving(Router::new().fallback(serve), |address| Given {
            clock,
            address: address.to_owned(),
            ahead: SignedDuration::ZERO,
            lifetime: 3599,
            script: VecDeque::new(),
            requests: Vec::new(),
            callers: Vec::new(),
            subject_token: "subject.token-1".to_owned(),
            versions: BTreeMap::from([(8, "DISABLED"), (9, "ENABLED"), (10, "ENABLED"), (11, "DESTROYED")]),
            page: 1000,
            denied: None,
            serial: 0,
            tokens: HashMap::new(),
        })
        .await
    }

    /// Forgets every token that it has issued.
    pub fn revoke(&self) {
        self.given().tokens.clear();
    }

    /// The reference of a key here.
    pub fn uri(&self, key: &str) -> String {
        format!("gcpkms://{RING}/cryptoKeys/{key}?endpoint={}", self.address)
    }

    /// Path, headers and body of a request for a signature of that version of a key, with a token issued for it.
    pub fn signing(&self, version: &str, digest: &[u8; 32]) -> (String, Vec<(String, String)>, String) {
        let (token, _) = self.given().issue_token("service account", CLOUD_SCOPE);
        let crc = crc32c(digest).to_string();
        let body = json!({ "digest": { "sha256": BASE64_STANDARD.encode(digest) }, "digestCrc32c": crc });
        let path = format!("/v1/{RING}/cryptoKeys/{version}:asymmetricSign");
        (path, fake::with_bearer(&token), body.to_string())
    }

    /// The file of the service account's key, as the console gives it.
    pub fn service_account(&self) -> Value {
        let der: Pkcs8V1Der<'_> = SIGNER.as_der().expect("it can be written");
        json!({
            "type": "service_account", "project_id": "p-1", "private_key_id": KEY_ID, "private_key": pem("PRIVATE KEY", der.as_ref()),
            "client_email": EMAIL, "client_id": "1", "token_uri": format!("http://{}/token", self.address),
            "auth_uri": "https://accounts.google.com/o/oauth2/auth", "universe_domain": "googleapis.com",
        })
    }

    /// The file of a federated workload whose token is in that file; `email` is the service account that it becomes.
    pub fn external_account(&self, token: &str, email: Option<&str>) -> Value {
        let mut file = json!({
            "type": "external_account", "audience": PROVIDER, "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
            "token_url": format!("http://{}/v1/token", self.address), "credential_source": { "file": token },
            "universe_domain": "googleapis.com",
        });
        if let Some(email) = email {
            let url = format!("http://{}/v1/projects/-/serviceAccounts/{email}:generateAccessToken", self.address);
            file["service_account_impersonation_url"] = url.into();
        }
        file
    }

    /// The file that `gcloud auth application-default login` writes.
    pub fn user(&self) -> Value {
        let [id, secret, token] = USER;
        let token_uri = format!("http://{}/token", self.address);
        json!({ "type": "authorized_user", "client_id": id, "client_secret": secret, "refresh_token": token, "token_uri": token_uri })
    }
}

/// Status, code and message.
struct Refusal(u16, &'static str, String);

type Answered = Result<Value, Refusal>;

fn refuse<T>(status: u16, code: &'static str, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal(status, code, message.into()))
}

async fn serve(State(state): State<Arc<Mutex<Given>>>, method: Method, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    let mut given = state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let header = |name: &str| headers.get(name).map_or("", |value| value.to_str().unwrap());
    let path = uri.path();
    given.requests.push(format!("{method} {}", path.strip_prefix(&format!("/v1/{RING}/cryptoKeys")).unwrap_or(path)));
    let fault = given.script.pop_front();
    let mut dated = Response::builder().header("date", http_date(given.now())).header("content-type", "application/json");
    let is_oauth = matches!(path, "/token" | "/v1/token");
    let error = |status: u16, code: &str, message: &str| {
        if is_oauth {
            return json!({ "error": code, "error_description": message }).to_string();
        }
        json!({ "error": { "code": status, "status": code, "message": message, "details": [] } }).to_string()
    };
    if let Some(fault) = fault.as_ref().filter(|fault| !fault.is_in_answer()) {
        drop(given);
        return fault.answer(dated, "RESOURCE_EXHAUSTED", error).unwrap();
    }
    let form = || {
        assert_eq!(header("content-type"), "application/x-www-form-urlencoded");
        decoded(std::str::from_utf8(&body).unwrap())
    };
    let bearer = header("authorization").strip_prefix("Bearer ").unwrap_or_default().to_owned();
    let answer = match (method.as_str(), path) {
        ("POST", "/token") => given.token(&form()),
        ("POST", "/v1/token") => given.exchange(&form()),
        ("GET", "/computeMetadata/v1/instance/service-accounts/default/token") => {
            dated = dated.header("metadata-flavor", "Google");
            if header("metadata-flavor") == "Google" {
                Ok(given.issue("machine", CLOUD_SCOPE))
            } else {
                refuse(403, "PERMISSION_DENIED", "Missing Metadata-Flavor:Google header.")
            }
        }
        ("POST", path) if path.ends_with(":generateAccessToken") => given.impersonate(path, &bearer, &json_of(&headers, &body)),
        _ => match given.authenticate(&bearer) {
            Ok(of) => {
                given.callers.push(of);
                given.kms(of, &method, &uri, &headers, &body, fault.as_ref())
            }
            Err(refusal) => Err(refusal),
        },
    };
    let answer = answer.map(|mut answer| {
        if let Some(Fault::Field(name, value)) = fault {
            answer[name] = value.map_or(Value::Null, |text| serde_json::from_str(text).unwrap_or_else(|_| text.into()));
            answer.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        }
        answer
    });
    match answer {
        Ok(answer) => dated.body(answer.to_string().into()).unwrap(),
        Err(Refusal(status, code, message)) => dated.status(status).body(error(status, code, &message).into()).unwrap(),
    }
}

fn json_of(headers: &HeaderMap, body: &Bytes) -> Value {
    assert_eq!(headers["content-type"], "application/json");
    serde_json::from_slice(body).unwrap()
}

impl Given {
    fn now(&self) -> Timestamp {
        (self.clock)() + self.ahead
    }

    fn issue(&mut self, of: &'static str, scope: &'static str) -> Value {
        let (token, _) = self.issue_token(of, scope);
        json!({ "access_token": token, "expires_in": self.lifetime, "token_type": "Bearer" })
    }

    fn issue_token(&mut self, of: &'static str, scope: &'static str) -> (String, Timestamp) {
        self.serial += 1;
        let token = format!("ya29.issuedToken{}", self.serial);
        let expires = self.now() + SignedDuration::from_secs(self.lifetime);
        self.tokens.insert(token.clone(), Token { of, scope, expires });
        (token, expires)
    }

    /// Whose token it is, if it lasts and is good for the KMS.
    fn authenticate(&self, bearer: &str) -> Result<&'static str, Refusal> {
        match self.tokens.get(bearer) {
            Some(token) if token.expires > self.now() => {
                assert!([KMS_SCOPE, CLOUD_SCOPE].contains(&token.scope));
                Ok(token.of)
            }
            _ => {
                let message = format!("Request had invalid authentication credentials: {bearer}");
                refuse(401, "UNAUTHENTICATED", message)
            }
        }
    }

    fn token(&mut self, form: &BTreeMap<String, String>) -> Answered {
        match form["grant_type"].as_str() {
            "urn:ietf:params:oauth:grant-type:jwt-bearer" => {
                assert!(form.keys().eq(["assertion", "grant_type"]), "{form:?}");
                self.check_jwt(&form["assertion"])?;
                Ok(self.issue("service account", KMS_SCOPE))
            }
            "refresh_token" => {
                let [id, secret, token] = USER;
                if (form["client_id"].as_str(), form["client_secret"].as_str()) != (id, secret) {
                    return refuse(401, "invalid_client", format!("The OAuth client was not found: {}", form["client_secret"]));
                }
                if form["refresh_token"] != token {
                    return refuse(400, "invalid_grant", "Token has been expired or revoked.");
                }
                Ok(self.issue("user", CLOUD_SCOPE))
            }
            _ => refuse(400, "unsupported_grant_type", "Invalid grant_type"),
        }
    }

    /// RFC 7515 and 7523, and what Google asks of claims.
    fn check_jwt(&self, jwt: &str) -> Result<(), Refusal> {
        let parts: Vec<_> = jwt.split('.').collect();
        let [header, claims, signature] = parts[..] else { return refuse(400, "invalid_grant", "Bad Request") };
        let decode = |part: &str| BASE64_URL_SAFE_NO_PAD.decode(part).unwrap();
        let object = |part: &str| serde_json::from_slice::<Value>(&decode(part)).unwrap();
        assert_eq!(object(header), json!({ "alg": "RS256", "typ": "JWT", "kid": KEY_ID }));
        let key = UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, SIGNER.public_key());
        if key.verify(format!("{header}.{claims}").as_bytes(), &decode(signature)).is_err() {
            return refuse(400, "invalid_grant", format!("Invalid JWT Signature: {jwt}"));
        }
        let claims = object(claims);
        assert_eq!(claims["aud"], format!("http://{}/token", self.address));
        assert_eq!(claims["scope"], KMS_SCOPE);
        if claims["iss"] != EMAIL {
            return refuse(400, "invalid_grant", "Invalid grant: account not found");
        }
        let (issued, ends) = (claims["iat"].as_i64().unwrap(), claims["exp"].as_i64().unwrap());
        assert!(ends > issued && ends - issued <= 3600);
        let now = self.now().as_second();
        if issued > now + 60 || ends <= now {
            let message = "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe. Check your iat \
                           and exp values in the JWT claim.";
            return refuse(400, "invalid_grant", message);
        }
        Ok(())
    }

    /// RFC 8693.
    fn exchange(&mut self, form: &BTreeMap<String, String>) -> Answered {
        let names = ["audience", "grant_type", "requested_token_type", "scope", "subject_token", "subject_token_type"];
        assert!(form.keys().eq(names), "{form:?}");
        assert_eq!(form["grant_type"], "urn:ietf:params:oauth:grant-type:token-exchange");
        assert_eq!(form["requested_token_type"], "urn:ietf:params:oauth:token-type:access_token");
        assert_eq!(form["subject_token_type"], "urn:ietf:params:oauth:token-type:jwt");
        if form["audience"] != PROVIDER {
            return refuse(400, "invalid_target", "The target service indicated by the audience parameters is invalid.");
        }
        if form["subject_token"] != self.subject_token {
            return refuse(400, "invalid_grant", format!("The given credential is rejected: {}", form["subject_token"]));
        }
        let scope = [KMS_SCOPE, CLOUD_SCOPE].into_iter().find(|scope| form["scope"] == **scope).unwrap();
        let mut answer = self.issue("pool", scope);
        answer["issued_token_type"] = "urn:ietf:params:oauth:token-type:access_token".into();
        Ok(answer)
    }

    fn impersonate(&mut self, path: &str, bearer: &str, body: &Value) -> Answered {
        assert_eq!(self.authenticate(bearer)?, "pool");
        assert_eq!(self.tokens[bearer].scope, CLOUD_SCOPE);
        assert_eq!(*body, json!({ "scope": [KMS_SCOPE], "lifetime": "3600s" }));
        if path != format!("/v1/projects/-/serviceAccounts/{EMAIL}:generateAccessToken") {
            return refuse(403, "PERMISSION_DENIED", "Permission 'iam.serviceAccounts.getAccessToken' denied on resource");
        }
        let (token, expires) = self.issue_token("service account", KMS_SCOPE);
        Ok(json!({ "accessToken": token, "expireTime": expires.strftime("%Y-%m-%dT%H:%M:%SZ").to_string() }))
    }

    fn kms(&self, of: &str, method: &Method, uri: &Uri, headers: &HeaderMap, body: &Bytes, fault: Option<&Fault>) -> Answered {
        let path = uri.path().strip_prefix(&format!("/v1/{RING}/cryptoKeys/"));
        let Some((algorithm, rest)) = path.and_then(|path| path.split_once("/cryptoKeyVersions")) else {
            return refuse(404, "NOT_FOUND", format!("{} not found.", uri.path()));
        };
        if self.denied == Some(of) {
            return refuse(403, "PERMISSION_DENIED", "Permission 'cloudkms.cryptoKeyVersions.useToSign' denied on resource");
        }
        let key = format!("{RING}/cryptoKeys/{algorithm}");
        let Some((spec, padding)) = kind(algorithm) else {
            return refuse(404, "NOT_FOUND", format!("CryptoKey {key} not found."));
        };
        if rest.is_empty() {
            assert_eq!(*method, Method::GET);
            return Ok(self.list(&key, algorithm, &decoded(uri.query().unwrap_or_default())));
        }
        let (number, verb) = rest[1..].split_once(['/', ':']).unwrap();
        let Some((number, state)) = number.parse().ok().and_then(|number| self.versions.get_key_value(&number)) else {
            return refuse(404, "NOT_FOUND", format!("CryptoKeyVersion {key}/cryptoKeyVersions/{number} not found."));
        };
        let name = format!("{key}/cryptoKeyVersions/{number}");
        if *state != "ENABLED" {
            return refuse(400, "FAILED_PRECONDITION", format!("{name} is not enabled, current state is: {state}."));
        }
        let own: &Pair = if *number == 10 { pair(spec) } else { other_pair(spec) };
        let own = if matches!(fault, Some(Fault::WrongKey)) { other_pair(spec) } else { own };
        match (method.as_str(), verb) {
            ("GET", "publicKey") => {
                let pem = own.public_pem();
                let crc = crc32c(pem.as_bytes()).to_string();
                Ok(json!({ "pem": pem, "algorithm": algorithm, "pemCrc32c": crc, "name": name, "protectionLevel": "SOFTWARE" }))
            }
            ("POST", "asymmetricSign") => {
                let body = json_of(headers, body);
                let fields: Vec<_> = body.as_object().unwrap().keys().map(String::as_str).collect();
                assert_eq!(fields, ["digest", "digestCrc32c"], "what it does not know, it refuses");
                assert_eq!(body["digest"].as_object().unwrap().keys().collect::<Vec<_>>(), ["sha256"]);
                let digest = BASE64_STANDARD.decode(body["digest"]["sha256"].as_str().unwrap()).unwrap();
                if body["digestCrc32c"].as_str().expect("an int64 is a text") != crc32c(&digest).to_string() {
                    return refuse(
                        400,
                        "INVALID_ARGUMENT",
                        "The checksum in field digest_crc32c did not match the data in field digest.",
                    );
                }
                let Ok(digest) = <[u8; 32]>::try_from(digest) else {
                    return refuse(400, "INVALID_ARGUMENT", "The digest has the wrong length.");
                };
                let signature = own.sign(padding, &digest).expect("the padding is the algorithm's");
                Ok(json!({
                    "signature": BASE64_STANDARD.encode(&signature), "signatureCrc32c": crc32c(&signature).to_string(),
                    "verifiedDigestCrc32c": true, "name": name, "protectionLevel": "SOFTWARE",
                }))
            }
            _ => refuse(404, "NOT_FOUND", "Not Found"),
        }
    }

    fn list(&self, key: &str, algorithm: &str, query: &BTreeMap<String, String>) -> Value {
        assert_eq!(query["filter"], "state=ENABLED");
        assert!((1..=1000).contains(&query["pageSize"].parse::<usize>().unwrap()));
        let mut names: Vec<_> = self.versions.iter().filter(|(_, state)| **state == "ENABLED").collect();
        // The order is one of names: 10 comes before 9.
        names.sort_by_key(|(number, _)| number.to_string());
        let from: usize = query.get("pageToken").map_or(0, |token| token.strip_prefix("page=").unwrap().parse().unwrap());
        let page = names.iter().skip(from).take(self.page);
        let versions: Vec<_> = page
            .map(|(number, state)| json!({ "name": format!("{key}/cryptoKeyVersions/{number}"), "state": state, "algorithm": algorithm }))
            .collect();
        let mut answer = json!({ "totalSize": names.len() });
        if !versions.is_empty() {
            answer["cryptoKeyVersions"] = versions.into();
        }
        if from + self.page < names.len() {
            answer["nextPageToken"] = format!("page={}", from + self.page).into();
        }
        answer
    }
}

fn kind(algorithm: &str) -> Option<(&'static str, Padding)> {
    Some(match algorithm {
        "RSA_SIGN_PKCS1_2048_SHA256" => ("RSA_2048", Padding::Pkcs1),
        "RSA_SIGN_PKCS1_3072_SHA256" => ("RSA_3072", Padding::Pkcs1),
        // Countersign has no use for the latter.
        "RSA_SIGN_PKCS1_4096_SHA256" | "RSA_SIGN_PKCS1_4096_SHA512" => ("RSA_4096", Padding::Pkcs1),
        "RSA_SIGN_PSS_2048_SHA256" => ("RSA_2048", Padding::Pss),
        "RSA_SIGN_PSS_3072_SHA256" => ("RSA_3072", Padding::Pss),
        "RSA_SIGN_PSS_4096_SHA256" => ("RSA_4096", Padding::Pss),
        "EC_SIGN_P256_SHA256" => ("EC_P256", Padding::Asn1),
        _ => return None,
    })
}

/// CRC-32C by table, as its inventors have it, and not as the client does.
fn crc32c(bytes: &[u8]) -> u32 {
    static TABLE: LazyLock<Vec<u32>> = LazyLock::new(|| {
        let step = |crc: u32| if crc & 1 == 1 { 0x82F6_3B78 ^ (crc >> 1) } else { crc >> 1 };
        (0..256).map(|byte| (0..8).fold(byte, |crc, _| step(crc))).collect()
    });
    !bytes.iter().fold(u32::MAX, |crc, byte| TABLE[((crc ^ u32::from(*byte)) & 0xFF) as usize] ^ (crc >> 8))
}
