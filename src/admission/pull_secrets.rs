//! Logins of the cluster: the `imagePullSecrets` of what is reviewed and of its service account, read through the API when a
//! registry has to be asked that the configuration has no login of, and remembered shortly.
//!
//! What cannot be read is as if it were not there, and logged: the registry then decides whether it shows the image. If it does not,
//! the denial says what could not be read.

mod unread;

use std::{
    fmt,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{FutureExt as _, future::join_all};
use k8s_openapi::api::core::v1::{Secret, ServiceAccount};
use kube::Api;
use secrecy::ExposeSecret as _;
use tokio::time::Instant;
use tracing::warn;

pub use self::unread::{Kind, Problem, Unread};
use super::{cache::Generations, docker_config::DockerConfig, workload::PulledWith};
use crate::{
    kubernetes::{self, Cluster, is_name},
    oci::RegistryName,
    registry::{Credentials, Flights},
};

/// How long a secret is not read again.
const KEEP: Duration = Duration::from_secs(60);
/// The same for one that could not be read, or is not there.
const KEEP_NOTHING: Duration = Duration::from_secs(5);
/// Secrets, and service accounts, that are remembered.
const ENTRIES: usize = 4096;
/// Secrets of service accounts that are read for one object.
const MOST_SECRETS: usize = 16;
/// Different logins of one registry that are tried.
const MOST_LOGINS: usize = 4;

/// The logins of one cluster. Clones share what is remembered.
#[derive(Clone)]
pub struct PullSecrets(Arc<Inner>);

struct Inner {
    cluster: Cluster,
    secrets: Memory<Result<DockerConfig, Problem>>,
    accounts: Memory<Result<Vec<String>, Problem>>,
}

/// What one object is pulled with.
#[derive(Debug, Clone)]
pub struct Logins {
    secrets: PullSecrets,
    namespace: String,
    pulled_with: PulledWith,
    /// What nothing can be read by.
    no_names: Vec<Unread>,
}

impl PullSecrets {
    #[must_use]
    pub fn new(cluster: Cluster) -> Self {
        Self(Arc::new(Inner { cluster, secrets: Memory::new(), accounts: Memory::new() }))
    }

    /// Those of an object in this namespace. Nothing is read yet, and never anything by what is no name.
    #[must_use]
    pub fn of(&self, namespace: &str, pulled_with: &PulledWith) -> Logins {
        let mut pulled_with = if is_name(namespace) { pulled_with.clone() } else { PulledWith::default() };
        let mut no_names = vec![];
        for (kind, names) in [(Kind::Secret, &mut pulled_with.secrets), (Kind::ServiceAccount, &mut pulled_with.accounts)] {
            let wrong = names.extract_if(.., |name| !is_name(name));
            no_names.extend(wrong.map(|name| unread(kind, namespace, &name, Problem::NoName)));
        }
        Logins { secrets: self.clone(), namespace: namespace.to_owned(), pulled_with, no_names }
    }
}

impl Logins {
    /// Each different login for this registry, in the order that a node tries them.
    pub async fn of(&self, registry: &RegistryName) -> Vec<Credentials> {
        let mut logins: Vec<Credentials> = vec![];
        let (secrets, _) = self.read().await;
        for login in secrets.iter().filter_map(|(_, secret)| (**secret).as_ref().ok()?.login(registry)) {
            let same = |known: &Credentials| {
                known.username == login.username && known.password.expose_secret() == login.password.expose_secret()
            };
            if logins.len() < MOST_LOGINS && !logins.iter().any(same) {
                logins.push(login.clone());
            }
        }
        logins
    }

    /// Why there may be no login for this registry: what could not be read, and, if nothing has one, what was read in vain.
    pub async fn unread(&self, registry: &RegistryName) -> Vec<Unread> {
        let (secrets, accounts) = self.read().await;
        let of_secrets = secrets.iter().filter_map(|(name, secret)| {
            let problem = (**secret).as_ref().err()?;
            Some(unread(Kind::Secret, &self.namespace, name, problem.clone()))
        });
        let mut all: Vec<Unread> = self.no_names.iter().cloned().chain(of_secrets).chain(accounts).collect();
        let read = || secrets.iter().filter_map(|(name, secret)| Some((name, (**secret).as_ref().ok()?)));
        if read().all(|(_, logins)| logins.login(registry).is_none()) {
            let problem = Problem::OtherRegistry(registry.clone());
            all.extend(read().map(|(name, _)| unread(Kind::Secret, &self.namespace, name, problem.clone())));
        }
        all
    }

    /// Every secret by its name, and the accounts that could not be read.
    async fn read(&self) -> (Vec<(String, Arc<Result<DockerConfig, Problem>>)>, Vec<Unread>) {
        let inner = &self.secrets.0;
        let accounts = &self.pulled_with.accounts;
        let of_accounts = join_all(accounts.iter().map(|name| inner.account((self.namespace.clone(), name.clone())))).await;
        let mut names = self.pulled_with.secrets.clone();
        for name in of_accounts.iter().filter_map(|names| (**names).as_ref().ok()).flatten().take(MOST_SECRETS) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        let not_read = accounts.iter().zip(&of_accounts).filter_map(|(name, read)| {
            let problem = (**read).as_ref().err()?;
            Some(unread(Kind::ServiceAccount, &self.namespace, name, problem.clone()))
        });
        let secrets = names.iter().map(|name| inner.secret((self.namespace.clone(), name.clone())));
        let secrets = join_all(secrets).await;
        (names.into_iter().zip(secrets).collect(), not_read.collect())
    }
}

fn unread(kind: Kind, namespace: &str, name: &str, problem: Problem) -> Unread {
    Unread { kind, namespace: namespace.to_owned(), name: name.to_owned(), problem }
}

/// A namespace, and a name in it.
type Key = (String, String);

impl Inner {
    async fn secret(&self, key: Key) -> Arc<Result<DockerConfig, Problem>> {
        let (namespace, name) = key.clone();
        let cluster = self.cluster.clone();
        let read = async move {
            let api: Api<Secret> = Api::namespaced(cluster.client(), &namespace);
            let secret = found("secret", &namespace, &name, cluster.ask(api.get(&name)).await)?;
            let logins = logins(&secret);
            if logins.is_err() {
                warn!(namespace, secret = name, "an imagePullSecret holds no logins: it has to be a docker configuration");
            }
            logins
        };
        self.secrets.get(key, read).await
    }

    /// The secrets that an account's pods are pulled with.
    async fn account(&self, key: Key) -> Arc<Result<Vec<String>, Problem>> {
        let (namespace, name) = key.clone();
        let cluster = self.cluster.clone();
        let read = async move {
            let api: Api<ServiceAccount> = Api::namespaced(cluster.client(), &namespace);
            let account = found("service account", &namespace, &name, cluster.ask(api.get(&name)).await)?;
            let secrets = account.image_pull_secrets.into_iter().flatten().map(|secret| secret.name);
            Ok(secrets.filter(|name| is_name(name)).collect())
        };
        self.accounts.get(key, read).await
    }
}

fn found<T>(what: &str, namespace: &str, name: &str, answer: Result<T, kubernetes::Error>) -> Result<T, Problem> {
    answer.map_err(|error| {
        if !error.is_not_found() {
            let error = &error as &dyn std::error::Error;
            warn!(namespace, name, error, "a {what} cannot be read: images are asked for without its logins");
        }
        Problem::from(&error)
    })
}

/// Both types that nodes take: `kubernetes.io/dockerconfigjson`, and the older `kubernetes.io/dockercfg` without `auths`.
fn logins(secret: &Secret) -> Result<DockerConfig, Problem> {
    let data = |key| Some(&secret.data.as_ref()?.get(key)?.0);
    let parsed = match (data(".dockerconfigjson"), data(".dockercfg")) {
        (Some(config), _) => DockerConfig::parse(config),
        (None, Some(config)) => DockerConfig::parse(&[b"{\"auths\":", &config[..], b"}"].concat()),
        (None, None) => return Err(Problem::NoLogins { of_type: secret.type_.clone().unwrap_or_default() }),
    };
    parsed.map_err(|_| Problem::Malformed)
}

/// What was read lately, asked for once however many want it.
struct Memory<T> {
    known: Mutex<Generations<Key, (Instant, Arc<T>)>>,
    asking: Flights<Key, Arc<T>>,
}

impl<T: Send + Sync + 'static, E: Send + Sync + 'static> Memory<Result<T, E>> {
    fn new() -> Self {
        Self { known: Mutex::new(Generations::new(ENTRIES)), asking: Flights::new() }
    }

    async fn get(&self, key: Key, read: impl Future<Output = Result<T, E>> + Send + 'static) -> Arc<Result<T, E>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&key);
        if let Some((_, value)) = known.filter(|(until, _)| Instant::now() < *until) {
            return value;
        }
        let value = self.asking.join(key.clone(), || read.map(Arc::new).boxed()).await;
        let keep = if value.is_ok() { KEEP } else { KEEP_NOTHING };
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(key, (Instant::now() + keep, value.clone()));
        value
    }
}

impl fmt::Debug for PullSecrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PullSecrets")
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;

    use super::*;

    fn secret(key: &str, content: &str) -> Secret {
        let data = [(key.to_owned(), ByteString(content.as_bytes().to_vec()))];
        Secret { data: Some(data.into()), ..Secret::default() }
    }

    #[test]
    fn both_types_of_secrets_are_read_and_others_hold_no_logins() {
        let registry = "r.example.com".parse().unwrap();
        let new = secret(".dockerconfigjson", r#"{"auths":{"r.example.com":{"username":"anna","password":"p"}}}"#);
        let old = secret(".dockercfg", r#"{"https://r.example.com/v1/":{"auth":"YW5uYTpw"}}"#);
        for secret in [new, old] {
            assert_eq!(logins(&secret).unwrap().login(&registry).unwrap().username, "anna");
        }
        let opaque = Secret { type_: Some("Opaque".to_owned()), ..secret("password", "hunter2") };
        for (other, problem) in [
            (opaque, Problem::NoLogins { of_type: "Opaque".to_owned() }),
            (secret(".dockerconfigjson", "hunter2"), Problem::Malformed),
            (Secret::default(), Problem::NoLogins { of_type: String::new() }),
        ] {
            assert_eq!(logins(&other).unwrap_err(), problem);
        }
    }

    #[test]
    fn what_could_not_be_read_is_said_with_the_cure() {
        let said = |problem| unread(Kind::Secret, "payments", "pull", problem).to_string();
        let make = "make it by `kubectl create secret docker-registry`";
        for (problem, expected) in [
            (Problem::Missing, "there is no Secret payments/pull: make it, or correct its name in the object".to_owned()),
            (Problem::NoName, "no Secret can have the name \"pull\": correct it in the object".to_owned()),
            (Problem::Malformed, format!("what the Secret payments/pull holds is no docker configuration: {make}")),
            (
                Problem::NoLogins { of_type: "Opaque".to_owned() },
                format!("the Secret payments/pull is of the type \"Opaque\", which has no logins: {make}"),
            ),
            (
                Problem::OtherRegistry("r.example.com".parse().unwrap()),
                format!("the Secret payments/pull has no login of r.example.com: {make} --docker-server=r.example.com"),
            ),
        ] {
            assert_eq!(said(problem), expected);
        }
        let refused = |code| Problem::from(&kubernetes::Error::Refused { code, message: "no".to_owned() });
        assert_eq!((refused(404), refused(403)), (Problem::Missing, Problem::Forbidden));
        assert!(said(refused(403)).starts_with("countersign may not read the Secret payments/pull: allow its service account"));
        assert!(said(refused(500)).ends_with("the cluster's API refuses: no (500): try again"), "{}", said(refused(500)));
    }
}
