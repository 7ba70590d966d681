use std::{
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::{HeaderValue, Method};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Value, json};
use tokio::{
    sync::{self, Notify},
    time::Instant,
};

use super::{
    client::{Client, Request},
    fault::{Class, Fault},
    login::Login,
};
use crate::kms::Environment;

/// A token for one server, obtained when it is needed and kept alive while [`Session::keep`] runs.
pub(super) struct Session {
    client: Arc<Client>,
    login: Login,
    environment: Environment,
    held: sync::Mutex<Held>,
    /// Logins that have ended, well or not.
    ended: AtomicU64,
    /// A token has taken another one's place.
    changed: Notify,
}

#[derive(Default)]
struct Held {
    token: Option<Arc<Token>>,
    /// The last login, by its number, if it failed.
    failed: Option<(u64, Fault)>,
}

/// What a server knows us by for a while.
pub(super) struct Token {
    text: SecretString,
    /// Whether the server has said that it knows it.
    pub(super) is_known: bool,
    lease: Mutex<Option<Lease>>,
    /// How long it lasted at first.
    granted: Duration,
}

/// How long a token lasts; one without a lease has no end, or one that is not known.
#[derive(Debug, Clone, Copy)]
struct Lease {
    since: Instant,
    time: Duration,
    renewable: bool,
}

impl Lease {
    fn new(seconds: u64, renewable: bool) -> Option<Self> {
        (seconds > 0).then(|| Self { since: Instant::now(), time: Duration::from_secs(seconds), renewable })
    }

    fn end(self) -> Instant {
        self.since + self.time
    }

    /// When to see to it: between a half and two thirds of its time, so that many daemons that started together spread.
    fn due(self) -> Instant {
        self.since + self.time.mul_f64(0.5 + fastrand::f64() * 0.15)
    }
}

impl Token {
    fn new(text: SecretString, is_known: bool, lease: Option<Lease>) -> Result<Self, Fault> {
        HeaderValue::from_str(text.expose_secret())
            .map_err(|_| Fault::new(Class::Credentials, "the token cannot be sent: it holds something that is no part of one"))?;
        let granted = lease.map_or(Duration::ZERO, |lease| lease.time);
        Ok(Self { text, is_known, lease: Mutex::new(lease), granted })
    }

    pub(super) fn header(&self) -> HeaderValue {
        let mut header = HeaderValue::from_str(self.text.expose_secret()).expect("that it can be sent was checked at first");
        header.set_sensitive(true);
        header
    }

    pub(super) fn text(&self) -> &SecretString {
        &self.text
    }

    fn lease(&self) -> Option<Lease> {
        *self.lease.lock().expect("nothing panics while it holds this")
    }

    fn set_lease(&self, lease: Lease) {
        *self.lease.lock().expect("nothing panics while it holds this") = Some(lease);
    }

    fn is_over(&self) -> bool {
        self.lease().is_some_and(|lease| lease.end() <= Instant::now())
    }
}

impl Session {
    pub(super) fn new(client: Arc<Client>, login: Login, environment: Environment) -> Self {
        let (held, ended, changed) = (sync::Mutex::default(), AtomicU64::new(0), Notify::new());
        Self { client, login, environment, held, ended, changed }
    }

    /// How many logins have ended: what [`Self::renewed`] wants to know of the time before a request was sent.
    pub(super) fn logins(&self) -> u64 {
        self.ended.load(Ordering::Acquire)
    }

    /// The token that there is, or a new one.
    pub(super) async fn token(&self) -> Result<Arc<Token>, Fault> {
        self.token_but(None, self.logins()).await
    }

    /// A token after the server refused this one: another that was obtained meanwhile, or a new one.
    pub(super) async fn renewed(&self, refused: &Arc<Token>, before: u64) -> Result<Arc<Token>, Fault> {
        self.token_but(Some(refused), before).await
    }

    /// Of many who ask at once, one logs in. How that ends counts for all who asked before it ended.
    async fn token_but(&self, refused: Option<&Arc<Token>>, before: u64) -> Result<Arc<Token>, Fault> {
        let mut held = self.held.lock().await;
        if let Some(token) = &held.token
            && !token.is_over()
            && !refused.is_some_and(|refused| Arc::ptr_eq(refused, token))
        {
            return Ok(Arc::clone(token));
        }
        if let Some((number, fault)) = &held.failed
            && *number > before
        {
            return Err(fault.clone());
        }
        let result = self.log_in().await.map(Arc::new);
        let number = self.ended.fetch_add(1, Ordering::AcqRel) + 1;
        match &result {
            Ok(token) => {
                *held = Held { token: Some(Arc::clone(token)), failed: None };
                self.changed.notify_one();
            }
            Err(fault) => held.failed = Some((number, fault.clone())),
        }
        result
    }

    async fn log_in(&self) -> Result<Token, Fault> {
        let read = |secret: &super::login::SecretSource| {
            secret.read(&self.environment).map_err(|what| Fault::new(Class::Credentials, what))
        };
        match &self.login {
            Login::Token { token } | Login::Secret(token) => self.look_up(read(token)?).await,
            Login::AppRole { role_id, secret_id, .. } => {
                let secret_id = secret_id.as_ref().map(read).transpose()?;
                let mut body = json!({ "role_id": role_id });
                if let Some(secret_id) = &secret_id {
                    body["secret_id"] = secret_id.expose_secret().into();
                }
                self.log_in_with(body, secret_id.as_ref()).await
            }
            Login::Jwt { role, jwt, .. } => {
                let jwt = read(jwt)?;
                self.log_in_with(json!({ "role": role, "jwt": jwt.expose_secret() }), Some(&jwt)).await
            }
        }
    }

    /// Asks how long a token lasts. That this is refused can mean that the token is bad, or only that it may not ask.
    async fn look_up(&self, text: SecretString) -> Result<Token, Fault> {
        let token = Token::new(text, false, None)?;
        let request = Request { method: Method::GET, path: "auth/token/lookup-self", body: None, secret: None };
        match self.client.send::<LookUpAnswer>(&request, Some(&token)).await {
            Ok(LookUpAnswer { data: LookUp { ttl, expire_time, renewable } }) => {
                // In its last second a token has 0 of them left, as one without an end has.
                let seconds = if expire_time.is_some() { ttl.max(1) } else { ttl };
                Token::new(token.text, true, Lease::new(seconds, renewable))
            }
            Err(fault) if fault.is_forbidden() => Ok(token),
            Err(fault) => Err(fault.told("the token cannot be looked up")),
        }
    }

    async fn log_in_with(&self, body: Value, secret: Option<&SecretString>) -> Result<Token, Fault> {
        let path = self.login.path().expect("only a login has a body");
        let request = Request { method: Method::POST, path: &path, body: Some(body), secret };
        let answer: AuthAnswer = self.client.send(&request, None).await.map_err(|fault| {
            let class = match fault.class {
                Class::Forbidden | Class::Misconfigured | Class::KeyUnusable | Class::NotFound => Class::Credentials,
                passing => passing,
            };
            Fault { class, ..fault }.told(&format!("the login at {path} was refused"))
        })?;
        let Auth { client_token, lease_duration, renewable } = answer.auth;
        let token = SecretString::from(client_token);
        if token.expose_secret().is_empty() {
            let what = format!("the login at {path} gave no token: it wants a second factor, which a daemon has not");
            return Err(Fault::new(Class::Credentials, what));
        }
        tracing::info!(server = self.client.address(), path, lease_seconds = lease_duration, "logged in");
        Token::new(token, true, Lease::new(lease_duration, renewable))
    }

    /// Renews the token before its time is over, or logs in anew where it cannot be renewed. Never ends.
    pub(super) async fn keep(&self) {
        loop {
            let token = self.held.lock().await.token.clone();
            let due = token.as_ref().and_then(|token| token.lease()).filter(|_| token.as_ref().is_some_and(|t| !t.is_over()));
            tokio::select! {
                () = self.changed.notified() => {}
                () = until(due.map(Lease::due)) => {
                    let token = token.expect("only a token is due");
                    if let Err(fault) = self.extend(&token).await {
                        tracing::warn!(server = self.client.address(), what = fault.what, "the token could not be renewed; trying again");
                        let left = token.lease().map_or(SHORTEST_WAIT, |lease| lease.end() - Instant::now());
                        tokio::time::sleep((left / 4).clamp(SHORTEST_WAIT, LONGEST_WAIT)).await;
                    }
                }
            }
        }
    }

    async fn extend(&self, token: &Arc<Token>) -> Result<(), Fault> {
        if token.lease().is_some_and(|lease| lease.renewable) {
            let request = Request { method: Method::POST, path: "auth/token/renew-self", body: Some(json!({})), secret: None };
            match self.client.send::<AuthAnswer>(&request, Some(token)).await {
                Ok(AuthAnswer { auth }) => {
                    // Near a token's greatest age, what a renewal gives shrinks, in the end to 0 seconds.
                    if let Some(lease) = Lease::new(auth.lease_duration, auth.renewable) {
                        token.set_lease(lease);
                        if lease.time >= token.granted / 2 {
                            return Ok(());
                        }
                    }
                }
                Err(fault) if matches!(fault.class, Class::Forbidden | Class::Misconfigured) => {}
                Err(fault) => return Err(fault),
            }
        }
        let new = self.renewed(token, self.logins()).await?;
        if let (Login::Token { token } | Login::Secret(token), Some(lease)) = (&self.login, new.lease()) {
            let seconds = (lease.end() - Instant::now()).as_secs();
            tracing::warn!(server = self.client.address(), seconds, %token, "the token ends and cannot be renewed for longer: put a new one in its place");
        }
        Ok(())
    }

    /// What to say of a token that was refused though it was obtained a moment ago.
    pub(super) fn explain(&self, token: &Token, path: &str, capability: &str, fault: Fault) -> Fault {
        if token.is_known {
            let before = format!(
                "the token is valid, but no policy of it allows `{capability}` on {path}: attach one with path \"{path}\" {{ capabilities \
                 = [\"{capability}\"] }}"
            );
            return fault.told(&before);
        }
        let source = match &self.login {
            Login::Token { token } | Login::Secret(token) => token.to_string(),
            Login::AppRole { path, .. } | Login::Jwt { path, .. } => format!("the login at {path}"),
        };
        let before = format!(
            "the token from {source} is unknown, revoked or past its time, or nothing allows it to look itself up and `{capability}` on {path}"
        );
        Fault { class: Class::Credentials, ..fault }.told(&before)
    }
}

const SHORTEST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("login", &self.login).finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct AuthAnswer {
    auth: Auth,
}

#[derive(Deserialize)]
struct Auth {
    client_token: String,
    /// Seconds; 0 for a token without an end.
    lease_duration: u64,
    renewable: bool,
}

#[derive(Deserialize)]
struct LookUpAnswer {
    data: LookUp,
}

#[derive(Deserialize)]
struct LookUp {
    /// Seconds; 0 for a token without an end.
    ttl: u64,
    /// `null` for a token without an end.
    expire_time: Option<IgnoredAny>,
    /// Absent for tokens that are not.
    #[serde(default)]
    renewable: bool,
}
