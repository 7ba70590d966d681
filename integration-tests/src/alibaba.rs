//! A strict gateway of Alibaba Cloud KMS, its STS and the instance's metadata, in this process. Written from the documented
//! protocol alone, with nothing of what the client uses: it takes the request line as it came, recomputes `ACS3-HMAC-SHA256` from
//! it with the `hmac` of another library, and holds every request to what the documentation demands.

mod acs3;

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, HeaderName, Method, Uri},
    response::Response,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

pub use crate::fake::Fault;
use crate::fake::{self, Now, Padding, SPECS, decoded, http_date, other_pair, pair};
use acs3::{Signing, acs3, hash, query};

/// The id and secret of the access key that it knows.
pub const BASE: [&str; 2] = ["LTAIbase", "baseSecretOfTheTest"];
/// The RAM role that may be taken.
pub const ROLE: &str = "acs:ram::1111222233334444:role/aliyuncontainerregistrykmsrole";
/// Whose OIDC tokens are taken.
pub const PROVIDER: &str = "acs:ram::1111222233334444:oidc-provider/ack-rrsa-c1";
/// The two versions of `key-rsa` (`alias/rsa`); `key-ec` (`alias/ec`) has the newer one.
pub const OLD: &str = "00000000-7072-4bbc-a582-584b5bd80001";
pub const NEW: &str = "2ab1a983-7072-4bbc-a582-584b5bd80001";
const METADATA_TOKEN: &str = "metadata-token==";

pub type Fake = fake::Fake<Given>;

/// What a test may look at and change.
pub struct Given {
    clock: Now,
    pub ahead: SignedDuration,
    pub lifetime: SignedDuration,
    pub script: VecDeque<Fault>,
    pub requests: Vec<String>,
    pub parameters: Vec<BTreeMap<String, String>>,
    pub signers: Vec<String>,
    pub oidc_token: String,
    /// Whom the KMS takes; everybody that it knows, if empty.
    pub only: Option<String>,
    /// How many versions `ListKeyVersions` pads its list with.
    pub padding: usize,
    pub key_state: &'static str,
    pub usage: &'static str,
    pub spec: Option<&'static str>,
    /// Management operations are not here.
    pub dedicated: bool,
    serial: u32,
    keys: HashMap<String, (String, Option<String>)>,
    nonces: HashSet<String>,
}

impl fake::Scripted for Given {
    fn script(&mut self) -> (&mut VecDeque<Fault>, &mut Vec<String>) {
        (&mut self.script, &mut self.requests)
    }
}

impl Fake {
    /// With the clock that it goes by.
    pub async fn start(clock: Now) -> Self {
        Self::serving(Router::new().fallback(serve), |_| Given {
            clock,
            ahead: SignedDuration::ZERO,
            lifetime: SignedDuration::from_hours(1),
            script: VecDeque::new(),
            requests: Vec::new(),
            parameters: Vec::new(),
            signers: Vec::new(),
            oidc_token: "oidc.token-1".into(),
            only: None,
            padding: 0,
            key_state: "Enabled",
            usage: "SIGN/VERIFY",
            spec: None,
            dedicated: false,
            serial: 0,
            keys: HashMap::from([(BASE[0].to_owned(), (BASE[1].to_owned(), None))]),
            nonces: HashSet::new(),
        })
        .await
    }

    /// The query and the headers of a request for a signature of `key-ec`, signed by [`BASE`] now.
    pub fn signing(&self, digest: &[u8; 32]) -> (String, Vec<(String, String)>) {
        let parameters = [
            ("Algorithm", "ECDSA_SHA_256"),
            ("Digest", &BASE64_STANDARD.encode(digest)),
            ("KeyId", "key-ec"),
            ("KeyVersionId", NEW),
        ];
        let parameters = parameters.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let date = self.given().now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let mut headers = vec![
            ("host", self.address.clone()),
            ("x-acs-action", "AsymmetricSign".to_owned()),
            ("x-acs-content-sha256", hash(b"")),
            ("x-acs-date", date),
            ("x-acs-signature-nonce", format!("{:032x}", fastrand::u128(..))),
            ("x-acs-version", "2016-01-20".to_owned()),
        ];
        let Signing { signature, .. } = acs3(BASE[1], &parameters, &headers);
        let names: Vec<_> = headers.iter().map(|(name, _)| *name).collect();
        let authorization =
            format!("ACS3-HMAC-SHA256 Credential={},SignedHeaders={},Signature={signature}", BASE[0], names.join(";"));
        headers.extend([("authorization", authorization), ("accept", "application/json".to_owned())]);
        (query(&parameters), headers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }
}

struct Refusal(u16, &'static str, String);

fn refuse<T>(status: u16, code: &'static str, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal(status, code, message.into()))
}

async fn serve(State(state): State<Arc<Mutex<Given>>>, method: Method, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    let mut given = state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let header = |name: &str| headers.get(name).map_or("", |value| value.to_str().unwrap()).to_owned();
    let mut parameters = decoded(uri.query().unwrap_or_default());
    let action = parameters.get("Action").cloned().unwrap_or_else(|| header("x-acs-action"));
    let asked = if action.is_empty() { format!("{method} {}", uri.path()) } else { action };
    given.requests.push(asked.clone());
    let fault = given.script.pop_front();
    let dated = Response::builder().header("date", http_date(given.now()));
    let error = |status: u16, code: &str, message: &str| {
        json!({ "Code": code, "Message": message, "RequestId": "0A1B", "HttpStatus": status, "HostId": "kms" }).to_string()
    };
    if let Some(fault) = fault.as_ref().filter(|fault| !fault.is_in_answer()) {
        drop(given);
        return fault.answer(dated, "Rejected.Throttling", error).unwrap();
    }
    if asked.starts_with("PUT ") || asked.starts_with("GET ") {
        let (status, text) = given.metadata(&asked, &header);
        return dated.status(status).body(text.into()).unwrap();
    }
    assert_eq!((method, uri.path()), (Method::POST, "/"));
    assert_eq!(header("accept"), "application/json", "the default is XML");
    let answer = if asked == "AssumeRoleWithOIDC" {
        assert!(header("authorization").is_empty(), "this is never signed");
        assert_eq!((parameters["Version"].as_str(), parameters["Format"].as_str()), ("2015-04-01", "JSON"));
        assert!(!parameters["Timestamp"].is_empty());
        parameters.extend(decoded(std::str::from_utf8(&body).unwrap()));
        given.oidc(&parameters)
    } else {
        assert!(body.is_empty());
        given.authenticate(&header, &headers, &parameters).and_then(|signer| {
            given.signers.push(signer.clone());
            given.parameters.push(parameters.clone());
            match (header("x-acs-version").as_str(), asked.as_str()) {
                ("2015-04-01", "AssumeRole") => given.assume_role(&parameters),
                ("2016-01-20", _) => match &given.only {
                    Some(only) if *only != signer => {
                        refuse(404, "InvalidAccessKeyId.NotFound", "Specified access key is not found.")
                    }
                    _ => given.kms(&asked, &parameters, fault.as_ref()),
                },
                other => panic!("{other:?}"),
            }
        })
    };
    match answer {
        Ok(answer) => dated.body(answer.to_string().into()).unwrap(),
        Err(Refusal(status, code, message)) => dated.status(status).body(error(status, code, &message).into()).unwrap(),
    }
}

impl Given {
    fn now(&self) -> Timestamp {
        (self.clock)() + self.ahead
    }

    fn issue(&mut self) -> Value {
        self.serial += 1;
        let n = self.serial;
        let (id, secret, token) = (format!("STS.{n}"), format!("issuedSecret{n}"), format!("issuedToken{n}=="));
        self.keys.insert(id.clone(), (secret.clone(), Some(token.clone())));
        let expires = (self.now() + self.lifetime).strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        json!({ "AccessKeyId": id, "AccessKeySecret": secret, "SecurityToken": token, "Expiration": expires })
    }

    fn metadata(&mut self, asked: &str, header: &dyn Fn(&str) -> String) -> (u16, String) {
        let roles = "GET /latest/meta-data/ram/security-credentials/";
        match asked {
            "PUT /latest/api/token" => {
                let seconds: u32 = header("x-aliyun-ecs-metadata-token-ttl-seconds").parse().unwrap();
                assert!((1..=21_600).contains(&seconds));
                (200, METADATA_TOKEN.to_owned())
            }
            _ if header("x-aliyun-ecs-metadata-token") != METADATA_TOKEN => (403, String::new()),
            _ if asked == roles => (200, "signer-role".to_owned()),
            _ if asked.strip_prefix(roles) == Some("signer-role") => {
                let mut document = self.issue();
                document["Code"] = "Success".into();
                (200, document.to_string())
            }
            _ => (404, "<html>".to_owned()),
        }
    }

    fn oidc(&mut self, parameters: &BTreeMap<String, String>) -> Result<Value, Refusal> {
        self.parameters.push(parameters.clone());
        if parameters["OIDCToken"] != self.oidc_token {
            let message = format!("This JWT token is out of date: {}", parameters["OIDCToken"]);
            return refuse(400, "AuthenticationFail.OIDCToken.Expired", message);
        }
        if (parameters["RoleArn"].as_str(), parameters["OIDCProviderArn"].as_str()) != (ROLE, PROVIDER) {
            return refuse(404, "EntityNotExist.Role", "The role does not exist.");
        }
        Ok(json!({ "RequestId": "0A1B", "Credentials": self.issue() }))
    }

    fn assume_role(&mut self, parameters: &BTreeMap<String, String>) -> Result<Value, Refusal> {
        if parameters["RoleArn"] != ROLE {
            return refuse(403, "NoPermission", "You are not authorized to do this action.");
        }
        let name = &parameters["RoleSessionName"];
        assert!((2..=64).contains(&name.len()));
        Ok(json!({ "RequestId": "0A1B", "AssumedRoleUser": { "Arn": "x" }, "Credentials": self.issue() }))
    }

    fn kms(&self, action: &str, parameters: &BTreeMap<String, String>, fault: Option<&Fault>) -> Result<Value, Refusal> {
        if self.dedicated && !matches!(action, "AsymmetricSign" | "AsymmetricVerify" | "GetPublicKey") {
            return refuse(400, "UnsupportedOperation", "This operation is not supported.");
        }
        let asked = &parameters["KeyId"];
        let id = asked.rsplit(':').next().unwrap().trim_start_matches("key/");
        let (id, spec) = match id.trim_start_matches("alias/").trim_start_matches("key-") {
            "rsa" => ("key-rsa", "RSA_2048"),
            "ec" => ("key-ec", "EC_P256"),
            name if SPECS.contains(&name) => (id.trim_start_matches("alias/"), name),
            _ if id.starts_with("alias/") => return refuse(404, "Forbidden.AliasNotFound", "The specified Alias is not found."),
            _ => return refuse(404, "Forbidden.KeyNotFound", "The specified Key is not found."),
        };
        let (pair, former) = (pair(spec), other_pair("RSA_2048"));
        let arn = format!("acs:kms:cn-hangzhou:1111222233334444:key/{id}");
        let names: &[&str] = match action {
            "DescribeKey" => &["KeyId"],
            "GetPublicKey" => &["KeyId", "KeyVersionId"],
            "AsymmetricSign" if parameters.contains_key("DryRun") => &["Algorithm", "Digest", "DryRun", "KeyId", "KeyVersionId"],
            "AsymmetricSign" => &["Algorithm", "Digest", "KeyId", "KeyVersionId"],
            "AsymmetricVerify" => &["Algorithm", "Digest", "KeyId", "KeyVersionId", "Value"],
            "ListKeyVersions" => &["KeyId", "PageNumber", "PageSize"],
            _ => return refuse(400, "InvalidAction", action),
        };
        assert!(parameters.keys().eq(names), "{parameters:?}");
        match action {
            "DescribeKey" => Ok(json!({ "RequestId": "0A1B", "KeyMetadata": {
                "KeyId": if let Some(Fault::As(id, _)) = fault { id } else { id },
                "Arn": arn, "KeyState": self.key_state, "KeyUsage": self.usage, "KeySpec": self.spec.unwrap_or(spec),
                "DKMSInstanceId": "kst-1", "Origin": "Aliyun_KMS", "ProtectionLevel": "SOFTWARE",
                "DeleteDate": if self.key_state == "PendingDeletion" { "2027-01-15T08:00:00Z" } else { "" },
            }})),
            "ListKeyVersions" => {
                let (page, size): (usize, usize) =
                    (parameters["PageNumber"].parse().unwrap(), parameters["PageSize"].parse().unwrap());
                assert!((1..=100).contains(&size) && page >= 1);
                // The newest is neither the first nor the last.
                let padding = (0..self.padding).map(|n| (format!("older-{n}"), "2024-01-01T00:00:00Z".to_owned()));
                let mut all = vec![
                    (OLD.to_owned(), "2025-03-01T00:00:00Z".to_owned()),
                    (NEW.to_owned(), "2026-03-01T00:00:00Z".to_owned()),
                ];
                all.splice(1..1, padding.clone().take(self.padding / 2));
                all.extend(padding.skip(self.padding / 2));
                let total = all.len();
                let versions: Vec<_> = all
                    .into_iter()
                    .skip((page - 1) * size)
                    .take(size)
                    .map(|(version, date)| json!({ "KeyId": id, "KeyVersionId": version, "CreationDate": date }))
                    .collect();
                Ok(
                    json!({ "KeyVersions": { "KeyVersion": versions }, "TotalCount": total, "PageNumber": page, "PageSize": size }),
                )
            }
            _ => {
                let version = parameters["KeyVersionId"].as_str();
                let pair = match (id, version) {
                    (_, NEW) => pair,
                    ("key-rsa", OLD) => former,
                    _ => return refuse(404, "Forbidden.KeyVersionNotFound", "The specified KeyVersion is not found."),
                };
                match self.key_state {
                    "Enabled" => {}
                    "Disabled" => {
                        return refuse(409, "Rejected.Disabled", "The request was rejected because the key is disabled.");
                    }
                    "PendingDeletion" => return refuse(409, "Rejected.PendingDeletion", "The key state is pending deletion."),
                    _ => return refuse(409, "Rejected.PendingImport", "The key state is pending import."),
                }
                let (id, version) = if let Some(Fault::As(id, version)) = fault { (*id, *version) } else { (id, version) };
                if action == "GetPublicKey" {
                    return Ok(
                        json!({ "KeyId": id, "KeyVersionId": version, "PublicKey": pair.public_pem(), "RequestId": "0A1B" }),
                    );
                }
                let Ok(digest) = <[u8; 32]>::try_from(BASE64_STANDARD.decode(&parameters["Digest"]).unwrap()) else {
                    return refuse(400, "InvalidParameter", "The specified parameter Digest is not valid.");
                };
                let padding = padding(&parameters["Algorithm"])?;
                if action == "AsymmetricVerify" {
                    let value = BASE64_STANDARD.decode(&parameters["Value"]).unwrap();
                    let Some(valid) = pair.verifies(padding, &digest, &value) else { return refuse_algorithm() };
                    return Ok(json!({ "KeyId": id, "KeyVersionId": version, "Value": valid, "RequestId": "0A1B" }));
                }
                if parameters.get("DryRun").is_some_and(|dry| dry == "true") {
                    let message = "The request would have succeeded, but the DryRun flag is set.";
                    return refuse(400, "DryRunOperationError", message);
                }
                let pair = if matches!(fault, Some(Fault::WrongKey)) { former } else { pair };
                let Some(value) = pair.sign(padding, &digest) else { return refuse_algorithm() };
                Ok(json!({ "KeyId": id, "KeyVersionId": version, "Value": BASE64_STANDARD.encode(value), "RequestId": "0A1B" }))
            }
        }
    }

    /// `ACS3-HMAC-SHA256` as its documentation has it. Returns who signed.
    fn authenticate(
        &mut self,
        header: &dyn Fn(&str) -> String,
        headers: &HeaderMap,
        parameters: &BTreeMap<String, String>,
    ) -> Result<String, Refusal> {
        let authorization = header("authorization");
        let Some(fields) = authorization.strip_prefix("ACS3-HMAC-SHA256 ") else {
            return refuse(400, "MissingAccessKeyId", "AccessKeyId is mandatory for this action.");
        };
        let field = |name: &str| fields.split(',').find_map(|field| field.strip_prefix(name)?.strip_prefix('=')).unwrap();
        let id = field("Credential").to_owned();
        let Some((secret, token)) = self.keys.get(&id) else {
            return refuse(404, "InvalidAccessKeyId.NotFound", "Specified access key is not found.");
        };
        if token.as_deref().unwrap_or_default() != header("x-acs-security-token") {
            return refuse(
                400,
                "InvalidSecurityToken.MismatchWithAccessKey",
                "Specified SecurityToken mismatch with the AccessKey.",
            );
        }
        // Every x-acs- header and the host have to be signed.
        let mut needed: Vec<_> = headers.keys().map(HeaderName::as_str).filter(|name| name.starts_with("x-acs-")).collect();
        needed.extend(["host"].iter().chain(headers.contains_key("content-type").then_some(&"content-type")));
        needed.sort_unstable();
        assert_eq!(field("SignedHeaders"), needed.join(";"));
        for name in ["x-acs-action", "x-acs-version", "x-acs-date", "x-acs-signature-nonce", "x-acs-content-sha256"] {
            assert!(needed.contains(&name), "{name} is missing");
        }
        assert_eq!(header("x-acs-content-sha256"), hash(b""), "the body is empty");
        let signed: Vec<_> = needed.iter().map(|name| (*name, header(name).trim().to_owned())).collect();
        let Signing { signature, to_sign, canonical } = acs3(secret, parameters, &signed);
        if field("Signature") != signature {
            let message = format!(
                "Specified signature does not match our calculation. server StringToSign is [{to_sign}] server CanonicalRequest is [{canonical}]"
            );
            return refuse(400, "SignatureDoesNotMatch", message);
        }
        let signed_at: Timestamp = header("x-acs-date").parse().unwrap();
        if self.now().duration_since(signed_at).abs() > SignedDuration::from_mins(15) {
            return refuse(400, "InvalidTimeStamp.Expired", "Specified time stamp or date value is expired.");
        }
        if !self.nonces.insert(header("x-acs-signature-nonce")) {
            return refuse(400, "SignatureNonceUsed", "Specified signature nonce was used already.");
        }
        Ok(id)
    }
}

fn padding(algorithm: &str) -> Result<Padding, Refusal> {
    match algorithm {
        "RSA_PKCS1_SHA_256" => Ok(Padding::Pkcs1),
        "RSA_PSS_SHA_256" => Ok(Padding::Pss),
        "ECDSA_SHA_256" => Ok(Padding::Asn1),
        _ => refuse_algorithm(),
    }
}

fn refuse_algorithm<T>() -> Result<T, Refusal> {
    refuse(400, "InvalidParameter", "The specified parameter Algorithm is not valid.")
}
