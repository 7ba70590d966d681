//! A small token service as distribution's token authentication has it: RS256, with the certificate in `x5c`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeyPair;
use aws_lc_rs::signature::RSA_PKCS1_SHA256;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use reqwest::Url;
use reqwest::header::AUTHORIZATION;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::process::scratch;

/// Knows one password, which is everybody's.
#[derive(Debug)]
pub struct Issuer {
    desk: Arc<Desk>,
    port: u16,
    _server: JoinSet<()>,
}

#[derive(Debug)]
struct Desk {
    folder: TempDir,
    key: KeyPair,
    certificate: String,
    password: &'static str,
    scopes: Mutex<Vec<String>>,
    life: AtomicU64,
    given: AtomicU64,
}

impl Issuer {
    /// The account that may only pull; every other may do everything.
    pub const READER: &str = "reader";

    pub async fn start(password: &'static str) -> Result<Self> {
        let folder = scratch()?;
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test", "-days", "2"])
            .args(["-keyout", "key.pem", "-out", "certificate.pem"])
            .current_dir(folder.path())
            .output()
            .context("openssl must be installed: apt-get install openssl")?;
        ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let pem = |name: &str| -> Result<String> {
            let text = fs::read_to_string(folder.path().join(name))?;
            Ok(text.lines().filter(|line| !line.starts_with("-----")).collect())
        };
        let key = KeyPair::from_pkcs8(&STANDARD.decode(pem("key.pem")?)?).context("the token service's key")?;
        let certificate = pem("certificate.pem")?;
        let (scopes, life, given) = (Mutex::default(), AtomicU64::new(300), AtomicU64::new(0));
        let desk = Arc::new(Desk { folder, key, certificate, password, scopes, life, given });
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("bind the token service")?;
        let port = listener.local_addr()?.port();
        let router = Router::new().fallback(answer).with_state(Arc::clone(&desk));
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await.expect("serving ends with its task only") });
        Ok(Self { desk, port, _server: server })
    }

    /// What the registry has to say of where it is.
    pub fn realm(&self) -> String {
        format!("http://localhost:{}/token?from=challenge", self.port)
    }

    /// What the registry has to believe: a file in PEM.
    pub fn certificate(&self) -> PathBuf {
        self.desk.folder.path().join("certificate.pem")
    }

    /// How many seconds tokens last that are given from now on.
    pub fn expire_after(&self, seconds: u64) {
        self.desk.life.store(seconds, SeqCst);
    }

    /// The scope of every token that was asked for.
    pub fn scopes(&self) -> Vec<String> {
        self.desk.scopes().clone()
    }

    /// A token without being asked: for `repository:NAME:pull,push`.
    pub fn token(&self, scope: &str) -> String {
        self.desk.token("tester", scope)
    }
}

impl Desk {
    fn scopes(&self) -> MutexGuard<'_, Vec<String>> {
        self.scopes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn token(&self, user: &str, scope: &str) -> String {
        let access = match scope.split(':').collect::<Vec<_>>()[..] {
            [kind, name, actions] => {
                let may = |action: &&str| user != Issuer::READER || *action == "pull";
                let actions: Vec<_> = actions.split(',').filter(may).collect();
                json!([{ "type": kind, "name": name, "actions": actions }])
            }
            _ => json!([]),
        };
        #[expect(clippy::disallowed_methods, reason = "the registry compares it with its own clock")]
        let now = jiff::Timestamp::now().as_second();
        let expires = now + i64::try_from(self.life.load(SeqCst)).unwrap_or(i64::MAX / 2) + 1;
        self.sign(&json!({
            "iss": "test", "sub": user, "aud": "registry", "iat": now, "nbf": now - 10, "exp": expires,
            "jti": self.given.fetch_add(1, SeqCst).to_string(), "access": access,
        }))
    }

    fn sign(&self, claims: &Value) -> String {
        let header = json!({ "typ": "JWT", "alg": "RS256", "x5c": [self.certificate] });
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let input = format!("{}.{}", part(&header), part(claims));
        let mut signature = vec![0; self.key.public_modulus_len()];
        self.key
            .sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), input.as_bytes(), &mut signature)
            .expect("an RSA key of 2048 bits signs");
        format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

async fn answer(State(desk): State<Arc<Desk>>, request: Request) -> Response {
    let asked = asked(&request);
    match asked {
        Ok((_, password, _)) if password != desk.password => {
            (StatusCode::UNAUTHORIZED, json!({ "details": "incorrect username or password" }).to_string()).into_response()
        }
        Ok((user, _, scope)) => {
            desk.scopes().push(scope.clone());
            let life = desk.life.load(SeqCst);
            json!({ "access_token": desk.token(&user, &scope), "expires_in": life }).to_string().into_response()
        }
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error:#}")).into_response(),
    }
}

/// User, password and scope, of a question as distribution's challenge has it asked.
fn asked(request: &Request) -> Result<(String, String, String)> {
    let url = Url::parse("http://localhost")?.join(&request.uri().to_string())?;
    let value = |name: &str| url.query_pairs().find(|(known, _)| known == name).map(|(_, value)| value.into_owned());
    ensure!(value("from").as_deref() == Some("challenge"), "the realm's own query is gone: {url}");
    ensure!(value("service").as_deref() == Some("registry"), "another service: {url}");
    let header = request.headers().get(AUTHORIZATION).context("nobody asks")?.to_str()?;
    let pair = String::from_utf8(STANDARD.decode(header.strip_prefix("Basic ").context("not by password")?)?)?;
    let (user, password) = pair.split_once(':').context("no password")?;
    Ok((user.to_owned(), password.to_owned(), value("scope").unwrap_or_default()))
}
