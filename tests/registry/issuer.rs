//! A small token service as distribution's token authentication has it: RS256, with the certificate in `x5c`.

use std::{
    fs,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};

use aws_lc_rs::{rand::SystemRandom, rsa::KeyPair, signature::RSA_PKCS1_SHA256};
use axum::{
    Json, Router,
    extract::{Query, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::get,
};
use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use countersign::clock::Clock;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::server::{Auth, PASSWORD};

pub struct Issuer {
    state: Arc<Shared>,
    port: u16,
    _server: JoinSet<()>,
}

struct Shared {
    folder: TempDir,
    key: KeyPair,
    certificate: String,
    scopes: Mutex<Vec<String>>,
    life: AtomicU64,
}

impl Issuer {
    pub async fn start() -> Self {
        let folder = TempDir::new().unwrap();
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test", "-days", "2"])
            .args(["-keyout", "key.pem", "-out", "certificate.pem"])
            .current_dir(folder.path())
            .output()
            .expect("openssl must be installed: apt-get install openssl");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let pem = |name: &str| -> String {
            let text = fs::read_to_string(folder.path().join(name)).unwrap();
            text.lines().filter(|line| !line.starts_with("-----")).collect()
        };
        let key = KeyPair::from_pkcs8(&STANDARD.decode(pem("key.pem")).unwrap()).unwrap();
        let certificate = pem("certificate.pem");
        let state = Arc::new(Shared { folder, key, certificate, scopes: Mutex::default(), life: AtomicU64::new(300) });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let router = Router::new().route("/token", get(answer)).with_state(state.clone());
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { state, port, _server: server }
    }

    /// What the registry has to be told of this service.
    pub fn auth(&self) -> Auth {
        let certificate = self.state.folder.path().join("certificate.pem");
        Auth::Token { realm: format!("http://localhost:{}/token?from=challenge", self.port), certificate }
    }

    pub fn expire_after(&self, seconds: u64) {
        self.state.life.store(seconds, SeqCst);
    }

    /// The scope of every token that was asked for.
    pub fn scopes(&self) -> Vec<String> {
        self.state.scopes.lock().unwrap().clone()
    }
}

#[derive(serde::Deserialize)]
struct Asked {
    from: String,
    service: String,
    scope: Option<String>,
}

/// `ann` may do everything, `reader` may only pull.
async fn answer(State(state): State<Arc<Shared>>, Query(asked): Query<Asked>, headers: HeaderMap) -> Response {
    assert_eq!((asked.from.as_str(), asked.service.as_str()), ("challenge", "registry"));
    let basic = headers["authorization"].to_str().unwrap().strip_prefix("Basic ").unwrap();
    let pair = String::from_utf8(STANDARD.decode(basic).unwrap()).unwrap();
    let (user, password) = pair.split_once(':').unwrap();
    if password != PASSWORD {
        return (StatusCode::UNAUTHORIZED, Json(json!({ "details": "incorrect username or password" }))).into_response();
    }
    let scope = asked.scope.unwrap_or_default();
    state.scopes.lock().unwrap().push(scope.clone());
    let access = match scope.split(':').collect::<Vec<_>>()[..] {
        [kind, name, actions] => {
            let actions: Vec<_> = actions.split(',').filter(|action| user == "ann" || *action == "pull").collect();
            json!([{ "type": kind, "name": name, "actions": actions }])
        }
        _ => json!([]),
    };
    let life = state.life.load(SeqCst);
    let now = Clock::system().now().as_second();
    let claims = json!({
        "iss": "test", "sub": user, "aud": "registry", "iat": now, "nbf": now - 10, "exp": now + i64::try_from(life).unwrap() + 1,
        "jti": uuid::Uuid::now_v7().to_string(), "access": access,
    });
    let token = sign(&state, &claims);
    Json(json!({ "access_token": token, "expires_in": life })).into_response()
}

fn sign(state: &Shared, claims: &Value) -> String {
    let header = json!({ "typ": "JWT", "alg": "RS256", "x5c": [state.certificate] });
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let input = format!("{}.{}", part(&header), part(claims));
    let mut signature = vec![0; state.key.public_modulus_len()];
    state.key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), input.as_bytes(), &mut signature).unwrap();
    format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature))
}
