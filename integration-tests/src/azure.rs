//! A strict Azure in this process: a vault, Entra's token endpoint, and the two endpoints of managed identities. Written from the
//! documented protocol alone, with nothing of what the client uses: it issues tokens that end, holds requests to what the documentation
//! demands, and signs with real keys.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, Method, Uri},
    response::Response,
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

pub use crate::fake::Fault;
use crate::fake::{self, Now, Padding, Pair, SPECS, decoded, http_date, other_pair, pair};

pub const TENANT: &str = "11111111-2222-3333-4444-555555555555";
/// The application's id, and its secret.
pub const CLIENT: [&str; 2] = ["66666666-7777-8888-9999-000000000000", "client.Secret~1"];
/// What App Service gives its apps.
pub const IDENTITY_HEADER: &str = "identityHeader1";
/// The two versions of each key; the former one has another key.
pub const OLD: &str = "00000000000000000000000000000001";
pub const NEW: &str = "00000000000000000000000000000002";

pub type Fake = fake::Fake<Given>;

/// What a test may look at and change.
pub struct Given {
    clock: Now,
    address: String,
    /// Of tokens, in seconds.
    pub lifetime: i64,
    pub script: VecDeque<Fault>,
    pub requests: Vec<String>,
    /// Who asked the vault.
    pub callers: Vec<&'static str>,
    pub federated_token: String,
    pub enabled: bool,
    pub not_before: Option<Timestamp>,
    pub expires: Option<Timestamp>,
    pub key_ops: Vec<&'static str>,
    /// Whether keys are in an HSM, and say so.
    pub hsm: bool,
    pub deleted: bool,
    /// The inner code of why nobody may sign.
    pub denied: Option<&'static str>,
    /// The version that is used where none is named.
    pub current: &'static str,
    serial: u32,
    tokens: HashMap<String, (&'static str, Timestamp)>,
}

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
            lifetime: 3599,
            script: VecDeque::new(),
            requests: Vec::new(),
            callers: Vec::new(),
            federated_token: "federated.token-1".to_owned(),
            enabled: true,
            not_before: None,
            expires: None,
            key_ops: vec!["sign", "verify"],
            hsm: false,
            deleted: false,
            denied: None,
            current: NEW,
            serial: 0,
            tokens: HashMap::new(),
        })
        .await
    }

    /// Forgets every token that it has issued.
    pub fn revoke(&self) {
        self.given().tokens.clear();
    }

    /// The reference of a key here: of `RSA-2048` and so on, or of one of these and a version.
    pub fn uri(&self, key: &str) -> String {
        format!("azurekms://{}/{key}", self.address)
    }

    /// Path, headers and body of a request for a signature of that key and version, with a token issued for it.
    pub fn signing(&self, key: &str, digest: &[u8; 32]) -> (String, Vec<(String, String)>, String) {
        let token = self.given().issue("application");
        let body = json!({ "alg": "ES256", "value": BASE64_URL_SAFE_NO_PAD.encode(digest) });
        (format!("/keys/{key}/sign?api-version=7.4"), fake::with_bearer(&token), body.to_string())
    }

    /// The variables of an application with a secret.
    pub fn variables(&self) -> [(&'static str, String); 4] {
        let [id, secret] = CLIENT.map(str::to_owned);
        let authority = format!("http://{}", self.address);
        [
            ("AZURE_TENANT_ID", TENANT.to_owned()),
            ("AZURE_CLIENT_ID", id),
            ("AZURE_CLIENT_SECRET", secret),
            ("AZURE_AUTHORITY_HOST", authority),
        ]
    }
}

/// Status, code, inner code and message.
struct Refusal(u16, &'static str, &'static str, String);

type Answered = Result<Value, Refusal>;

fn refuse<T>(status: u16, code: &'static str, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal(status, code, "", message.into()))
}

fn forbid<T>(inner: &'static str, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal(403, "Forbidden", inner, message.into()))
}

async fn serve(State(state): State<Arc<Mutex<Given>>>, method: Method, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    let mut given = state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let header = |name: &str| headers.get(name).map_or("", |value| value.to_str().unwrap());
    let path = uri.path();
    given.requests.push(format!("{method} {path}"));
    let fault = given.script.pop_front();
    let mut dated = Response::builder().header("date", http_date((given.clock)())).header("x-ms-request-id", "0a1b");
    let is_vault = path.starts_with("/keys/");
    let write = |code: &str, inner: &str, message: &str| {
        if !is_vault {
            return json!({ "error": code, "error_description": message, "error_codes": [1] }).to_string();
        }
        let mut error = json!({ "code": code, "message": message });
        if !inner.is_empty() {
            error["innererror"] = json!({ "code": inner });
        }
        json!({ "error": error }).to_string()
    };
    if let Some(fault) = fault.as_ref().filter(|fault| !fault.is_in_answer()) {
        drop(given);
        return fault.answer(dated, "Throttled", |_, code, message| write(code, "", message)).unwrap();
    }
    let query = decoded(uri.query().unwrap_or_default());
    let answer = match (method.as_str(), path) {
        ("POST", _) if path.ends_with("/oauth2/v2.0/token") => {
            assert_eq!(header("content-type"), "application/x-www-form-urlencoded");
            given.token(path, &decoded(std::str::from_utf8(&body).unwrap()))
        }
        ("GET", "/metadata/identity/oauth2/token") => {
            assert_eq!(query["api-version"], "2018-02-01");
            if header("metadata") == "true" {
                given.managed("machine", &query)
            } else {
                refuse(400, "bad_request_102", "Required metadata header not specified")
            }
        }
        ("GET", "/msi/token") => {
            assert_eq!(query["api-version"], "2019-08-01");
            if header("x-identity-header") == IDENTITY_HEADER {
                given.managed("app", &query)
            } else {
                refuse(401, "Unauthorized", "")
            }
        }
        _ => given.vault(&method, path, &headers, &query, &body, fault.as_ref()),
    };
    match answer {
        Ok(mut answer) => {
            if let Some(Fault::Field(name, value)) = fault {
                *answer.pointer_mut(name).unwrap() = value.map_or(Value::Null, Value::from);
            }
            dated.header("content-type", "application/json").body(answer.to_string().into()).unwrap()
        }
        Err(Refusal(status, code, inner, message)) => {
            if status == 401 && is_vault {
                let challenge =
                    format!("Bearer authorization=\"http://{}/{TENANT}\", resource=\"https://vault.azure.net\"", given.address);
                dated = dated.header("www-authenticate", challenge);
            }
            dated.status(status).body(write(code, inner, &message).into()).unwrap()
        }
    }
}

impl Given {
    fn now(&self) -> Timestamp {
        (self.clock)()
    }

    fn issue(&mut self, of: &'static str) -> String {
        self.serial += 1;
        let token = format!("eyJ0.issuedToken{}", self.serial);
        self.tokens.insert(token.clone(), (of, self.now() + SignedDuration::from_secs(self.lifetime)));
        token
    }

    fn token(&mut self, path: &str, form: &BTreeMap<String, String>) -> Answered {
        if path != format!("/{TENANT}/oauth2/v2.0/token") {
            return refuse(400, "invalid_request", "AADSTS90002: Tenant not found.");
        }
        assert_eq!(
            (form["grant_type"].as_str(), form["scope"].as_str()),
            ("client_credentials", "https://vault.azure.net/.default")
        );
        if form["client_id"] != CLIENT[0] {
            return refuse(400, "unauthorized_client", "AADSTS700016: Application was not found in the directory.");
        }
        let of = if let Some(secret) = form.get("client_secret") {
            assert_eq!(form.len(), 4);
            if *secret != CLIENT[1] {
                return refuse(
                    401,
                    "invalid_client",
                    format!("AADSTS7000215: Invalid client secret provided: {secret}\r\nTrace ID: 1"),
                );
            }
            "secret"
        } else {
            assert_eq!(form.len(), 5);
            assert_eq!(form["client_assertion_type"], "urn:ietf:params:oauth:client-assertion-type:jwt-bearer");
            if form["client_assertion"] != self.federated_token {
                return refuse(
                    401,
                    "invalid_client",
                    format!("AADSTS700024: {} is not within its valid time range.", form["client_assertion"]),
                );
            }
            "federated"
        };
        let token = self.issue(of);
        Ok(json!({ "token_type": "Bearer", "expires_in": self.lifetime, "ext_expires_in": self.lifetime, "access_token": token }))
    }

    fn managed(&mut self, of: &'static str, query: &BTreeMap<String, String>) -> Answered {
        assert_eq!(query["resource"], "https://vault.azure.net");
        assert!(query.keys().all(|name| ["api-version", "client_id", "resource"].contains(&name.as_str())));
        if query.get("client_id").is_some_and(|client| client != CLIENT[0]) {
            return refuse(400, "invalid_request", "Identity not found");
        }
        let token = self.issue(of);
        let ends = (self.now().as_second() + self.lifetime).to_string();
        let mut answer =
            json!({ "access_token": token, "expires_on": ends, "resource": query["resource"], "token_type": "Bearer" });
        if of == "machine" {
            answer["expires_in"] = self.lifetime.to_string().into();
        }
        Ok(answer)
    }

    fn vault(
        &mut self,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
        query: &BTreeMap<String, String>,
        body: &Bytes,
        fault: Option<&Fault>,
    ) -> Answered {
        let header = |name: &str| headers.get(name).map_or("", |value| value.to_str().unwrap());
        let bearer = header("authorization").strip_prefix("Bearer ").unwrap_or_default();
        match self.tokens.get(bearer) {
            Some((of, ends)) if *ends > self.now() => self.callers.push(of),
            _ => return refuse(401, "Unauthorized", format!("[TokenExpired] Error validating token: {bearer}")),
        }
        if query.get("api-version").map(String::as_str) != Some("7.4") || query.len() != 1 {
            return refuse(400, "BadParameter", "The request URI contains an invalid or missing api-version.");
        }
        let parts: Vec<_> = path[1..].split('/').collect();
        let (name, version, verb) = match parts[..] {
            ["keys", name] => (name, self.current, ""),
            ["keys", name, version] => (name, version, ""),
            ["keys", name, version, verb] => (name, version, verb),
            _ => return refuse(404, "NotFound", "Not found."),
        };
        if let Some(inner) = self.denied {
            return forbid(inner, "Caller is not authorized to perform action on resource.");
        }
        let spec = name.replace('-', "_").to_uppercase();
        let Some(spec) =
            SPECS.into_iter().find(|known| *known == spec).filter(|_| [OLD, NEW].contains(&version) && !self.deleted)
        else {
            return refuse(404, "KeyNotFound", format!("A key with (name/id) {name}/{version} was not found in this key vault."));
        };
        let own: &Pair = if version == NEW && !matches!(fault, Some(Fault::WrongKey)) { pair(spec) } else { other_pair(spec) };
        let kid = match fault {
            Some(Fault::As(name, version)) => format!("http://{}/keys/{name}/{version}", self.address),
            Some(_) | None => format!("http://{}/keys/{name}/{version}", self.address),
        };
        match (method.as_str(), verb) {
            ("GET", "") => Ok(self.bundle(own, &kid)),
            ("POST", "sign" | "verify") => {
                assert_eq!(header("content-type"), "application/json");
                self.usable(verb)?;
                let body = serde_json::from_slice(body).unwrap();
                if verb == "sign" { Self::sign(own, &kid, &body) } else { Self::verify(own, &body) }
            }
            _ => refuse(405, "MethodNotAllowed", ""),
        }
    }

    fn bundle(&self, pair: &Pair, kid: &str) -> Value {
        let [one, other] = pair.numbers().map(|number| BASE64_URL_SAFE_NO_PAD.encode(number));
        let placed = |plain: &str| if self.hsm { format!("{plain}-HSM") } else { plain.to_owned() };
        let mut key = match pair {
            Pair::Rsa(_) => json!({ "kty": placed("RSA"), "n": one, "e": other }),
            Pair::Ec { .. } => json!({ "kty": placed("EC"), "crv": "P-256", "x": one, "y": other }),
        };
        key["kid"] = kid.into();
        key["key_ops"] = self.key_ops.clone().into();
        let mut attributes =
            json!({ "enabled": self.enabled, "created": 1, "updated": 1, "recoveryLevel": "Recoverable+Purgeable" });
        for (name, time) in [("nbf", self.not_before), ("exp", self.expires)] {
            if let Some(time) = time {
                attributes[name] = time.as_second().into();
            }
        }
        json!({ "key": key, "attributes": attributes, "tags": {} })
    }

    /// Whether keys may do this now.
    fn usable(&self, operation: &str) -> Result<(), Refusal> {
        if !self.enabled {
            return forbid("KeyDisabled", format!("Operation {operation} is not allowed on a disabled key."));
        }
        if self.not_before.is_some_and(|time| self.now() < time) {
            return forbid("KeyNotYetValid", format!("Operation {operation} is not allowed on a key that is not yet valid."));
        }
        if self.expires.is_some_and(|time| time <= self.now()) {
            return forbid("KeyExpired", format!("Operation {operation} is not allowed on an expired key."));
        }
        if !self.key_ops.contains(&operation) {
            return forbid("KeyOperationForbidden", format!("Operation {operation} is not permitted on this key."));
        }
        Ok(())
    }

    fn sign(pair: &Pair, kid: &str, body: &Value) -> Answered {
        let fields: Vec<_> = body.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(fields, ["alg", "value"]);
        match pair.sign(padding(body)?, &digest(&body["value"])?) {
            Some(signature) => Ok(json!({ "kid": kid, "value": BASE64_URL_SAFE_NO_PAD.encode(signature) })),
            None => refuse(400, "BadParameter", "Key and signing algorithm are not compatible."),
        }
    }

    fn verify(pair: &Pair, body: &Value) -> Answered {
        let fields: Vec<_> = body.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(fields, ["alg", "digest", "value"]);
        match pair.verifies(padding(body)?, &digest(&body["digest"])?, &bytes(&body["value"])) {
            Some(valid) => Ok(json!({ "value": valid })),
            None => refuse(400, "BadParameter", "Key and signing algorithm are not compatible."),
        }
    }
}

fn padding(body: &Value) -> Result<Padding, Refusal> {
    match body["alg"].as_str().unwrap() {
        "RS256" => Ok(Padding::Pkcs1),
        "PS256" => Ok(Padding::Pss),
        "ES256" => Ok(Padding::Fixed),
        _ => refuse(400, "BadParameter", "Property alg has invalid value."),
    }
}

fn digest(value: &Value) -> Result<[u8; 32], Refusal> {
    bytes(value).try_into().or_else(|_| refuse(400, "BadParameter", "Invalid length of 'value'."))
}

fn bytes(value: &Value) -> Vec<u8> {
    BASE64_URL_SAFE_NO_PAD.decode(value.as_str().unwrap()).expect("base64url without padding")
}
