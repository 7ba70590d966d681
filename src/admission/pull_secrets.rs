//! Logins of the cluster: the `imagePullSecrets` of what is reviewed and of its service account, read through the API when a
//! registry has to be asked that the configuration has no login of, and remembered shortly.
//!
//! What cannot be read is as if it were not there, and logged: the registry then decides whether it shows the image.

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
    secrets: Memory<DockerConfig>,
    accounts: Memory<Vec<String>>,
}

/// What one object is pulled with.
#[derive(Debug, Clone)]
pub struct Logins {
    secrets: PullSecrets,
    namespace: String,
    pulled_with: PulledWith,
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
        pulled_with.secrets.retain(|name| is_name(name));
        pulled_with.accounts.retain(|name| is_name(name));
        Logins { secrets: self.clone(), namespace: namespace.to_owned(), pulled_with }
    }
}

impl Logins {
    /// Each different login for this registry, in the order that a node tries them.
    pub async fn of(&self, registry: &RegistryName) -> Vec<Credentials> {
        let inner = &self.secrets.0;
        let accounts = self.pulled_with.accounts.iter();
        let of_accounts = join_all(accounts.map(|name| inner.account((self.namespace.clone(), name.clone())))).await;
        let mut names = self.pulled_with.secrets.clone();
        for name in of_accounts.iter().flat_map(|names| names.iter()).take(MOST_SECRETS) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        let secrets = join_all(names.into_iter().map(|name| inner.secret((self.namespace.clone(), name)))).await;
        let mut logins: Vec<Credentials> = vec![];
        for login in secrets.iter().filter_map(|logins| logins.login(registry)) {
            let same = |known: &Credentials| {
                known.username == login.username && known.password.expose_secret() == login.password.expose_secret()
            };
            if logins.len() < MOST_LOGINS && !logins.iter().any(same) {
                logins.push(login.clone());
            }
        }
        logins
    }
}

/// A namespace, and a name in it.
type Key = (String, String);

impl Inner {
    async fn secret(&self, key: Key) -> Arc<DockerConfig> {
        let (namespace, name) = key.clone();
        let cluster = self.cluster.clone();
        let read = async move {
            let api: Api<Secret> = Api::namespaced(cluster.client(), &namespace);
            let secret = found("secret", &namespace, &name, cluster.ask(api.get(&name)).await)?;
            let logins = logins(&secret);
            if logins.is_none() {
                warn!(namespace, secret = name, "an imagePullSecret holds no logins: it has to be a docker configuration");
            }
            logins
        };
        self.secrets.get(key, read).await
    }

    /// The secrets that an account's pods are pulled with.
    async fn account(&self, key: Key) -> Arc<Vec<String>> {
        let (namespace, name) = key.clone();
        let cluster = self.cluster.clone();
        let read = async move {
            let api: Api<ServiceAccount> = Api::namespaced(cluster.client(), &namespace);
            let account = found("service account", &namespace, &name, cluster.ask(api.get(&name)).await)?;
            Some(account.image_pull_secrets.into_iter().flatten().map(|secret| secret.name).collect())
        };
        self.accounts.get(key, read).await
    }
}

fn found<T>(what: &str, namespace: &str, name: &str, answer: Result<T, kubernetes::Error>) -> Option<T> {
    match answer {
        Ok(object) => Some(object),
        Err(error) if error.is_not_found() => None,
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            warn!(namespace, name, error, "a {what} cannot be read: images are asked for without its logins");
            None
        }
    }
}

/// Both types that nodes take: `kubernetes.io/dockerconfigjson`, and the older `kubernetes.io/dockercfg` without `auths`.
fn logins(secret: &Secret) -> Option<DockerConfig> {
    let data = secret.data.as_ref()?;
    let parsed = match (data.get(".dockerconfigjson"), data.get(".dockercfg")) {
        (Some(config), _) => DockerConfig::parse(&config.0),
        (None, Some(config)) => DockerConfig::parse(&[b"{\"auths\":", &config.0[..], b"}"].concat()),
        (None, None) => return None,
    };
    parsed.ok()
}

/// What was read lately, asked for once however many want it.
struct Memory<T> {
    known: Mutex<Generations<Key, (Instant, Arc<T>)>>,
    asking: Flights<Key, Option<Arc<T>>>,
}

impl<T: Default + Send + Sync + 'static> Memory<T> {
    fn new() -> Self {
        Self { known: Mutex::new(Generations::new(ENTRIES)), asking: Flights::new() }
    }

    async fn get(&self, key: Key, read: impl Future<Output = Option<T>> + Send + 'static) -> Arc<T> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&key);
        if let Some((_, value)) = known.filter(|(until, _)| Instant::now() < *until) {
            return value;
        }
        let read = self.asking.join(key.clone(), || read.map(|value| value.map(Arc::new)).boxed()).await;
        let keep = if read.is_some() { KEEP } else { KEEP_NOTHING };
        let value = read.unwrap_or_default();
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
        for other in [secret("password", "p"), secret(".dockerconfigjson", "p"), Secret::default()] {
            assert!(logins(&other).is_none());
        }
    }
}
