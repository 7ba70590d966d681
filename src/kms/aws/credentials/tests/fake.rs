//! What stands around a program in AWS, in this process: STS, EC2's instance metadata, and the endpoints of ECS and EKS. It is
//! strict: requests are held to the services' documentation, and signatures are recomputed from scratch.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
};

use aws_lc_rs::{
    digest::{SHA256, digest},
    hmac,
};
use axum::{Router, body::Bytes, extract::State, response::Response};
use http::{HeaderMap, Method, Uri};
use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use serde_json::json;
use tokio::net::TcpListener;

use crate::clock::Clock;

pub(in crate::kms::aws) const REGION: &str = "eu-west-1";
pub(super) const BASE: [&str; 2] = ["AKIABASE", "base/secret+key"];
/// What IMDS gives and wants back.
const METADATA_TOKEN: &str = "metadata-token==";

#[derive(Clone)]
pub(in crate::kms::aws) struct Cloud {
    pub(in crate::kms::aws) address: String,
    state: Arc<Mutex<Given>>,
}

pub(super) struct Given {
    clock: Clock,
    /// How far their clock is ahead of ours.
    pub(super) ahead: SignedDuration,
    pub(super) lifetime: SignedDuration,
    /// Instead of the next answers.
    pub(super) script: VecDeque<(u16, &'static str)>,
    pub(super) requests: Vec<String>,
    pub(super) web_token: String,
    pub(super) container_token: Option<String>,
    /// The access key of whom requests to STS were signed by.
    pub(super) signers: Vec<String>,
    pub(super) forms: Vec<HashMap<String, String>>,
    /// Whether the instance has a role.
    pub(super) has_role: bool,
    serial: u32,
    /// Whom credentials are given of, instead of somebody new each time.
    issue_as: Option<(String, String)>,
    keys: HashMap<String, (String, Option<String>)>,
}

impl Cloud {
    pub(in crate::kms::aws) async fn start(clock: Clock) -> Self {
        let state = Arc::new(Mutex::new(Given {
            clock,
            ahead: SignedDuration::ZERO,
            lifetime: SignedDuration::from_hours(1),
            script: VecDeque::new(),
            requests: Vec::new(),
            web_token: "web.identity.token-1".into(),
            container_token: None,
            signers: Vec::new(),
            forms: Vec::new(),
            has_role: true,
            serial: 0,
            issue_as: None,
            keys: HashMap::from([(BASE[0].to_owned(), (BASE[1].to_owned(), None))]),
        }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let app = Router::new().fallback(serve).with_state(state.clone());
        #[expect(clippy::disallowed_methods, reason = "it ends with the test's own runtime")]
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { address, state }
    }

    pub(super) fn given(&self) -> MutexGuard<'_, Given> {
        self.state.lock().unwrap()
    }

    pub(in crate::kms::aws) fn then(&self, answers: impl IntoIterator<Item = (u16, &'static str)>) {
        self.given().script.extend(answers);
    }

    /// Every credential is one of this access key from now on; only the token is new.
    pub(in crate::kms::aws) fn issue_as(&self, id: &str, secret: &str) {
        self.given().issue_as = Some((id.to_owned(), secret.to_owned()));
    }

    /// What was asked for since this was asked last.
    pub(in crate::kms::aws) fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.given().requests)
    }
}

async fn serve(State(state): State<Arc<Mutex<Given>>>, method: Method, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    let mut given = state.lock().unwrap();
    let form: HashMap<String, String> = serde_urlencoded::from_bytes(&body).unwrap_or_default();
    let asked = form.get("Action").cloned().unwrap_or_else(|| format!("{method} {}", uri.path()));
    given.requests.push(asked.clone());
    let (status, text) = match given.script.pop_front() {
        Some((status, text)) => (status, text.to_owned()),
        None => given.answer(&asked, &headers, &form, &body),
    };
    let date = given.now().to_zoned(TimeZone::UTC).strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
    Response::builder().status(status).header("date", date).body(text.into()).unwrap()
}

impl Given {
    fn now(&self) -> Timestamp {
        self.clock.now() + self.ahead
    }

    fn issue(&mut self) -> (String, String, String, Timestamp) {
        self.serial += 1;
        let n = self.serial;
        let own = || (format!("ASIA{n}"), format!("issued/secret-{n}"));
        let ((id, secret), token) = (self.issue_as.clone().unwrap_or_else(own), format!("issued-token-{n}=="));
        self.keys.insert(id.clone(), (secret.clone(), Some(token.clone())));
        (id, secret, token, self.now() + self.lifetime)
    }

    fn document(&mut self) -> (u16, String) {
        let (id, secret, token, expires) = self.issue();
        let document = json!({
            "Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": id, "SecretAccessKey": secret, "Token": token,
            "Expiration": expires.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        });
        (200, document.to_string())
    }

    fn answer(&mut self, asked: &str, headers: &HeaderMap, form: &HashMap<String, String>, body: &[u8]) -> (u16, String) {
        let header = |name: &str| headers.get(name).map_or("", |value| value.to_str().unwrap());
        let roles = "GET /latest/meta-data/iam/security-credentials/";
        match asked {
            "PUT /latest/api/token" => {
                let seconds: u32 = header("x-aws-ec2-metadata-token-ttl-seconds").parse().unwrap();
                assert!((1..=21_600).contains(&seconds), "a token that lasts {seconds} s");
                (200, METADATA_TOKEN.to_owned())
            }
            _ if asked.starts_with(roles) && header("x-aws-ec2-metadata-token") != METADATA_TOKEN => (401, String::new()),
            _ if asked == roles && self.has_role => (200, "signer+role\n".to_owned()),
            _ if asked.strip_prefix(roles) == Some("signer+role") => self.document(),
            "GET /v2/credentials/task" | "GET /v1/credentials" => {
                if self.container_token.as_deref().unwrap_or_default() != header("authorization") {
                    let message = format!("you sent {}", header("authorization"));
                    return (400, json!({ "code": "InvalidAuthorization", "message": message }).to_string());
                }
                self.document()
            }
            "AssumeRoleWithWebIdentity" => {
                assert!(header("authorization").is_empty(), "this is never signed");
                self.forms.push(form.clone());
                if form["WebIdentityToken"] != self.web_token {
                    return refusal(400, "ExpiredTokenException", &format!("Token expired: {}", form["WebIdentityToken"]));
                }
                self.assumed(asked)
            }
            "AssumeRole" => {
                self.forms.push(form.clone());
                match self.authenticate(headers, body) {
                    Ok(signer) => {
                        self.signers.push(signer);
                        self.assumed(asked)
                    }
                    Err((code, message)) => refusal(403, code, &message),
                }
            }
            _ => (404, "<html>not found</html>".to_owned()),
        }
    }

    fn assumed(&mut self, action: &str) -> (u16, String) {
        let (id, secret, token, expires) = self.issue();
        let xml = format!(
            "<{action}Response xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\n  <{action}Result>\n    <AssumedRoleUser>\n      \
             <Arn>arn:aws:sts::111122223333:assumed-role/a/b</Arn>\n    </AssumedRoleUser>\n    <Credentials>\n      \
             <AccessKeyId>{id}</AccessKeyId>\n      <SecretAccessKey>{secret}</SecretAccessKey>\n      \
             <SessionToken>{token}</SessionToken>\n      <Expiration>{}</Expiration>\n    </Credentials>\n  </{action}Result>\n\
             </{action}Response>",
            expires.strftime("%Y-%m-%dT%H:%M:%SZ")
        );
        (200, xml)
    }

    /// Signature Version 4 as its specification has it, with nothing of what the client uses. Returns who signed.
    fn authenticate(&self, headers: &HeaderMap, body: &[u8]) -> Result<String, (&'static str, String)> {
        let header = |name: &str| headers.get(name).map_or("", |value| value.to_str().unwrap());
        let fields = header("authorization").strip_prefix("AWS4-HMAC-SHA256 ").unwrap().to_owned();
        let field = |name: &str| fields.split(", ").find_map(|field| field.strip_prefix(name)?.strip_prefix('=')).unwrap();
        let (id, scope) = field("Credential").split_once('/').unwrap();
        let unknown = || ("InvalidClientTokenId", "The security token included in the request is invalid".to_owned());
        let (secret, token) = self.keys.get(id).ok_or_else(unknown)?;
        if token.as_deref().unwrap_or_default() != header("x-amz-security-token") {
            return Err(unknown());
        }
        let date_time = header("x-amz-date");
        assert_eq!(scope, format!("{}/{REGION}/sts/aws4_request", &date_time[..8]));
        let names: Vec<_> = field("SignedHeaders").split(';').collect();
        let needed = ["content-type", "host", "x-amz-date"].into_iter().chain(token.as_ref().map(|_| "x-amz-security-token"));
        assert_eq!(names, needed.collect::<Vec<_>>());
        let hex_digest = |bytes: &[u8]| hex::encode(digest(&SHA256, bytes));
        let lines: Vec<_> = names.iter().map(|name| format!("{name}:{}\n", header(name))).collect();
        let canonical = format!("POST\n/\n\n{}\n{}\n{}", lines.concat(), names.join(";"), hex_digest(body));
        let to_sign = format!("AWS4-HMAC-SHA256\n{date_time}\n{scope}\n{}", hex_digest(canonical.as_bytes()));
        let mac = |key: &[u8], text: &str| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes()).as_ref().to_vec();
        let key = scope.split('/').fold(format!("AWS4{secret}").into_bytes(), |key, part| mac(&key, part));
        if field("Signature") != hex::encode(mac(&key, &to_sign)) {
            // AWS repeats the request in the lines that follow.
            let message =
                format!("The request signature we calculated does not match.\n\nThe Canonical String was '{canonical}'");
            return Err(("SignatureDoesNotMatch", message));
        }
        let signed_at = Timestamp::strptime("%Y%m%dT%H%M%S%z", date_time.replace('Z', "+0000")).unwrap();
        if self.now().duration_since(signed_at).abs() > SignedDuration::from_mins(5) {
            return Err(("SignatureDoesNotMatch", format!("Signature expired: {date_time} is now earlier than (- 5 min.)")));
        }
        Ok(id.to_owned())
    }
}

fn refusal(status: u16, code: &str, message: &str) -> (u16, String) {
    let error = format!("<Error>\n<Type>Sender</Type>\n<Code>{code}</Code>\n<Message>{message}</Message>\n</Error>");
    (status, format!("<ErrorResponse>{error}<RequestId>0a1b</RequestId></ErrorResponse>"))
}
