//! Who we are to a registry: nobody, an account with a password, or the bearer of a token.
//!
//! Distribution's token authentication: the registry names a token service and a scope, the service trades the account's
//! password for a token, the registry takes the token until it expires. Tokens are kept per repository and right, and asked
//! for once however many calls wait for one. A registry that has asked once is sent the right token or the password
//! without being asked again.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, RwLock},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use futures::FutureExt;
use http::{HeaderValue, Method, StatusCode, Uri};
use reqwest::Url;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use tokio::time::Instant;

use super::{
    Credentials, Registry,
    challenge::Challenge,
    error::{self, Account, At, Error, Object},
    flight::Flights,
    transport::{self, ERROR_LIMIT, Outgoing},
};
use crate::oci::Repository;

/// What a call needs to be allowed to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Access {
    /// To be let in at all.
    Enter,
    Pull,
    Push,
    /// List the registry's repositories.
    Catalog,
}

impl Access {
    pub(super) fn need(self) -> &'static str {
        match self {
            Self::Enter => "use this registry",
            Self::Pull => "pull from this repository",
            Self::Push => "push to this repository",
            Self::Catalog => "list the registry's repositories",
        }
    }
}

/// What a token is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Grant {
    pub(super) repository: Option<Repository>,
    pub(super) access: Access,
}

impl Grant {
    /// The scope to ask for, where the registry has not named one. None asks for no right, only for entry.
    fn scope(&self) -> Option<String> {
        match (&self.repository, self.access) {
            (Some(repository), Access::Pull) => Some(format!("repository:{repository}:pull")),
            (Some(repository), Access::Push) => Some(format!("repository:{repository}:pull,push")),
            (None, Access::Catalog) => Some("registry:catalog:*".to_owned()),
            (None, _) | (Some(_), Access::Enter | Access::Catalog) => None,
        }
    }
}

/// What is sent along with a request.
#[derive(Clone)]
pub(super) enum Authorization {
    None,
    Basic(HeaderValue),
    Bearer(Arc<Token>),
}

impl Authorization {
    /// The header, marked as sensitive, so that its `Debug` shows nothing.
    pub(super) fn header(&self) -> Option<&HeaderValue> {
        match self {
            Self::None => None,
            Self::Basic(header) => Some(header),
            Self::Bearer(token) => Some(&token.header),
        }
    }

    /// What must not be repeated in a message.
    pub(super) fn secret(&self) -> Option<&str> {
        self.header().and_then(|header| header.to_str().ok()).and_then(|text| text.split_once(' ')).map(|(_, secret)| secret)
    }
}

/// A token as the service gave it out. No `Debug`: it is a credential.
pub(super) struct Token {
    header: HeaderValue,
    scope: Option<String>,
    asked: Instant,
    /// From then on a new one is asked for: shortly before it expires.
    renew: Instant,
}

/// How the registry wants to be approached, as far as it has said.
#[derive(Clone)]
enum Scheme {
    /// It has not asked for anything yet.
    Open,
    Basic,
    Bearer(Arc<Service>),
}

struct Service {
    realm: Url,
    name: Option<String>,
}

/// What one registry is shown.
pub(super) struct Authenticator {
    username: Option<String>,
    password: Option<SecretString>,
    basic: Option<HeaderValue>,
    scheme: RwLock<Scheme>,
    tokens: Mutex<HashMap<Grant, Arc<Token>>>,
    requests: Flights<Grant, Result<Arc<Token>, Error>>,
}

/// More tokens than this are not kept.
const MOST_TOKENS: usize = 1024;

impl Authenticator {
    /// Fails if the username cannot be sent.
    pub(super) fn new(credentials: Option<Credentials>) -> Result<Self, String> {
        let (username, password) = credentials.map(|c| (c.username, c.password)).unzip();
        let basic = match (&username, &password) {
            (Some(username), Some(password)) => {
                if username.contains(':') || username.chars().any(char::is_control) {
                    return Err(
                        "the username has a colon or a control character, which HTTP basic authentication cannot send".into()
                    );
                }
                let pair = SecretString::from(format!("{username}:{}", password.expose_secret()));
                Some(secret_header("Basic", &BASE64.encode(pair.expose_secret())).expect("base64 is always a header value"))
            }
            _ => None,
        };
        Ok(Self {
            username,
            password,
            basic,
            scheme: RwLock::new(Scheme::Open),
            tokens: Mutex::default(),
            requests: Flights::new(),
        })
    }

    pub(super) fn account(&self) -> Account {
        Account(self.username.clone())
    }

    /// What must not be repeated in a message, whatever was sent.
    pub(super) fn password(&self) -> Option<&str> {
        self.password.as_ref().map(ExposeSecret::expose_secret).filter(|password| !password.is_empty())
    }

    fn scheme(&self) -> Scheme {
        self.scheme.read().expect("nothing panics while it holds this").clone()
    }

    /// A kept token that is good for `grant`. One for pushing is good for pulling too.
    fn kept(&self, grant: &Grant) -> Option<Arc<Token>> {
        let tokens = self.tokens.lock().expect("nothing panics while it holds this");
        let fresh = |grant: &Grant| tokens.get(grant).filter(|token| Instant::now() < token.renew).cloned();
        fresh(grant).or_else(|| {
            (grant.access == Access::Pull)
                .then(|| fresh(&Grant { repository: grant.repository.clone(), access: Access::Push }))
                .flatten()
        })
    }

    /// The scope to ask for: the one that the registry named last time, even if that token has expired.
    fn scope(&self, grant: &Grant) -> Option<String> {
        let tokens = self.tokens.lock().expect("nothing panics while it holds this");
        tokens.get(grant).map_or_else(|| grant.scope(), |token| token.scope.clone())
    }

    fn keep(&self, grant: Grant, token: Arc<Token>) {
        let mut tokens = self.tokens.lock().expect("nothing panics while it holds this");
        if tokens.len() >= MOST_TOKENS {
            let now = Instant::now();
            tokens.retain(|_, token| now < token.renew);
            if tokens.len() >= MOST_TOKENS {
                tokens.clear();
            }
        }
        tokens.insert(grant, token);
    }

    /// Forgets a token that was refused, unless it has been replaced since.
    fn drop_token(&self, refused: &Arc<Token>) {
        self.tokens.lock().expect("nothing panics while it holds this").retain(|_, token| !Arc::ptr_eq(token, refused));
    }
}

impl Registry {
    /// What to send along with a request for `grant`.
    pub(super) async fn authorization(&self, grant: &Grant) -> Result<Authorization, Error> {
        let authenticator = &self.0.authenticator;
        match authenticator.scheme() {
            Scheme::Open => Ok(Authorization::None),
            Scheme::Basic => Ok(authenticator.basic.clone().map_or(Authorization::None, Authorization::Basic)),
            Scheme::Bearer(service) => match authenticator.kept(grant) {
                Some(token) => Ok(Authorization::Bearer(token)),
                None => self.token(grant, service, authenticator.scope(grant)).await.map(Authorization::Bearer),
            },
        }
    }

    /// After a 401 to `shown`: what to show instead, if there is anything that could help. `since` is when the call began.
    pub(super) async fn meet(
        &self,
        challenge: Option<Challenge>,
        grant: &Grant,
        shown: &Authorization,
        since: Instant,
    ) -> Result<Option<Authorization>, Error> {
        let authenticator = &self.0.authenticator;
        match challenge {
            None => Ok(None),
            Some(Challenge::Basic) => match (&authenticator.basic, shown) {
                (None, _) | (Some(_), Authorization::Basic(_)) => Ok(None),
                (Some(basic), _) => {
                    *authenticator.scheme.write().expect("nothing panics while it holds this") = Scheme::Basic;
                    Ok(Some(Authorization::Basic(basic.clone())))
                }
            },
            Some(Challenge::Bearer { realm, service, scope }) => {
                let service = Arc::new(Service { realm: self.realm(grant, &realm)?, name: service });
                let scope = scope.as_deref().map(in_order).filter(|scope| !scope.is_empty()).or_else(|| grant.scope());
                if let Authorization::Bearer(token) = shown {
                    // A token that was made for this very call lacks the right; another one would lack it too.
                    if token.asked >= since && token.scope == scope {
                        return Ok(None);
                    }
                    authenticator.drop_token(token);
                }
                *authenticator.scheme.write().expect("nothing panics while it holds this") = Scheme::Bearer(service.clone());
                match authenticator.kept(grant) {
                    Some(token) if token.scope == scope => Ok(Some(Authorization::Bearer(token))),
                    _ => self.token(grant, service, scope).await.map(|token| Some(Authorization::Bearer(token))),
                }
            }
        }
    }

    /// The token service's address, if credentials may go there: by https; or by plain http, if the registry itself is
    /// configured so and the service is on the same host, or both are on this machine.
    pub(super) fn realm(&self, grant: &Grant, text: &str) -> Result<Url, Error> {
        let own = &self.0.origin;
        let realm =
            Url::parse(text).ok().filter(|url| url.host().is_some() && url.username().is_empty() && url.password().is_none());
        let Some(realm) = realm else {
            let problem = format!("the token service that it names, {:?}, is no URL", error::cut(text, 120));
            return Err(Error::Malformed { at: self.at_token(grant), problem });
        };
        let near = own.scheme() == "http"
            && realm.scheme() == "http"
            && (own.host() == realm.host() || (transport::is_loopback(own) && transport::is_loopback(&realm)));
        if realm.scheme() == "https" || near {
            Ok(realm)
        } else {
            Err(Error::Elsewhere {
                at: self.at_token(grant),
                target: transport::origin_text(&realm),
                problem: "a token service without https, where no credentials are sent",
                cure: "have the registry name a token service with an https:// address",
            })
        }
    }

    fn at_token(&self, grant: &Grant) -> At {
        self.at(
            match grant.access {
                Access::Enter => "get a token to enter",
                Access::Pull => "get a token to pull from",
                Access::Push => "get a token to push to",
                Access::Catalog => "get a token to list",
            },
            &Object { repository: grant.repository.as_ref(), item: None },
        )
    }

    /// Asks the token service, once for all who wait for the same grant.
    async fn token(&self, grant: &Grant, service: Arc<Service>, scope: Option<String>) -> Result<Arc<Token>, Error> {
        let flight = self.0.authenticator.requests.join(grant.clone(), || {
            let (registry, grant) = (self.clone(), grant.clone());
            async move {
                // Whoever was here a moment ago may have just brought one.
                if let Some(token) = registry.0.authenticator.kept(&grant).filter(|token| token.scope == scope) {
                    return Ok(token);
                }
                let token = Arc::new(registry.ask_for_token(&grant, &service, scope).await?);
                registry.0.authenticator.keep(grant, token.clone());
                Ok(token)
            }
            .boxed()
        });
        flight.await
    }

    async fn ask_for_token(&self, grant: &Grant, service: &Service, scope: Option<String>) -> Result<Token, Error> {
        #[derive(Deserialize)]
        struct Given {
            token: Option<String>,
            access_token: Option<String>,
            expires_in: Option<f64>,
        }
        /// Where the service does not say: distribution, "Token Authentication Specification".
        const DEFAULT_LIFE: f64 = 60.0;
        const LONGEST_LIFE: f64 = 24.0 * 3600.0;
        /// A token is renewed this long before it expires, so that none expires on the way.
        const LEAD: Duration = Duration::from_secs(10);

        let authenticator = &self.0.authenticator;
        let mut url = service.realm.clone();
        {
            let mut query = url.query_pairs_mut();
            if let Some(name) = &service.name {
                query.append_pair("service", name);
            }
            if let Some(scope) = &scope {
                query.append_pair("scope", scope);
            }
        }
        let asked = Instant::now();
        let at = || self.at_token(grant);
        let authorization = authenticator.basic.clone().map_or(Authorization::None, Authorization::Basic);
        let target = Uri::try_from(url.as_str()).map_err(|_| Error::Malformed {
            at: at(),
            problem: "the token service has no address that can be asked".to_owned(),
        })?;
        let answer = self.send_once(&Outgoing::new(Method::GET, target), &authorization, ERROR_LIMIT, &at).await?;
        if answer.status != StatusCode::OK {
            let reported = self.reported(&answer);
            return Err(match answer.status {
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                    Error::Unauthorized { at: at(), account: authenticator.account(), need: grant.access.need(), reported }
                }
                _ => transport::refusal(at(), &answer, reported),
            });
        }
        let given: Given = serde_json::from_slice(&answer.body).map_err(|_| Error::Malformed {
            at: at(),
            problem: "the token service's answer is no JSON object with a token".to_owned(),
        })?;
        let header = given
            .token
            .or(given.access_token)
            .map(SecretString::from)
            .filter(|token| !token.expose_secret().is_empty())
            .and_then(|token| secret_header("Bearer", token.expose_secret()))
            .ok_or_else(|| Error::Malformed {
                at: at(),
                problem: "the token service gave no token that can be sent".to_owned(),
            })?;
        let life = given.expires_in.filter(|life| life.is_finite() && *life >= 0.0).unwrap_or(DEFAULT_LIFE).min(LONGEST_LIFE);
        let life = Duration::from_secs_f64(life);
        Ok(Token { header, scope, asked, renew: asked + life - LEAD.min(life / 4) })
    }
}

/// A scope with its actions sorted: distribution names them in an order that changes from answer to answer.
fn in_order(scope: &str) -> String {
    let sorted = |part: &str| match part.rsplit_once(':') {
        Some((resource, actions)) => {
            let mut actions: Vec<_> = actions.split(',').collect();
            actions.sort_unstable();
            format!("{resource}:{}", actions.join(","))
        }
        None => part.to_owned(),
    };
    scope.split_ascii_whitespace().map(sorted).collect::<Vec<_>>().join(" ")
}

/// `scheme secret` as a header that no `Debug` shows. None if the secret has characters that no header can carry.
fn secret_header(scheme: &str, secret: &str) -> Option<HeaderValue> {
    let text = SecretString::from(format!("{scheme} {secret}"));
    let mut header = HeaderValue::from_str(text.expose_secret()).ok()?;
    header.set_sensitive(true);
    Some(header)
}
