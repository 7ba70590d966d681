//! The API of the cluster that the admission webhook stands in, through `kube`: as much of it as is configured, and nothing
//! that a review has to wait for.
//!
//! A [`Cluster`] is opened without asking anything, so that a webhook whose API is away starts all the same. Every call that
//! is made through it has an end.

mod events;
mod watch;

use std::{future::Future, path::PathBuf, time::Duration};

use kube::{
    Client, Config,
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tokio::time::timeout;

pub use self::{
    events::{Events, FAMILIES as EVENT_FAMILIES, Notice, Sender, events},
    watch::{Lost, Objects, Seen, follow, list},
};
use crate::config;

/// The group of the project's own resources.
pub const GROUP: &str = "countersign.dev";

/// To connect, TLS included.
const CONNECT: Duration = Duration::from_secs(5);
/// For one call, from connecting to the last byte of the answer; watching goes on for longer.
const CALL: Duration = Duration::from_secs(10);

/// Characters of what the API says of a call that it refuses.
const READABLE: usize = 400;

/// One cluster's API. Clones share its connections.
#[derive(Clone)]
pub struct Cluster(Client);

/// Why the API did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "this is no pod that has a service account's token: set `automountServiceAccountToken: true`, or name a file with \
         `kubeconfig` in [admission] kubernetes"
    )]
    Account(#[source] Box<InClusterError>),
    #[error("{}: is no kubeconfig that can be used", path.display())]
    Kubeconfig {
        path: PathBuf,
        #[source]
        source: Box<KubeconfigError>,
    },
    #[error("no client of the cluster's API can be made")]
    Setup(#[source] Box<kube::Error>),
    /// The API answered, and said no.
    #[error("the cluster's API refuses: {message} ({code})")]
    Refused { code: u16, message: String },
    #[error("the cluster's API cannot be reached")]
    Unreachable(#[source] Box<kube::Error>),
    #[error("the cluster's API did not answer within {} s", .0.as_secs())]
    Late(Duration),
    #[error("there are more than {0} objects of one kind")]
    TooMany(usize),
}

/// Whether this can be the name of an object or a namespace: of what reviews say, nothing else may become part of a path.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let is_label =
        |label: &str| !label.is_empty() && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    text.len() <= 253 && text.split('.').all(is_label)
}

impl Cluster {
    /// Reads who asks, and where. Nothing is sent yet.
    ///
    /// # Errors
    /// [`Error::Account`], [`Error::Kubeconfig`] and [`Error::Setup`] only.
    pub async fn open(settings: &config::Kubernetes) -> Result<Self, Error> {
        let mut config = match &settings.kubeconfig {
            None => Config::incluster().map_err(|error| Error::Account(Box::new(error)))?,
            Some(path) => {
                let wrong = |source| Error::Kubeconfig { path: path.clone(), source: Box::new(source) };
                let file = Kubeconfig::read_from(path).map_err(wrong)?;
                Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(wrong)?
            }
        };
        config.connect_timeout = Some(CONNECT);
        // Whoever calls knows better whether to try again.
        config.default_retry = false;
        Client::try_from(config).map(Self).map_err(|error| Error::Setup(Box::new(error)))
    }

    /// For `kube::Api`.
    #[must_use]
    pub fn client(&self) -> Client {
        self.0.clone()
    }

    /// Waits for one call of the API, but not for long. One object that is not there is [`Error::Refused`] with the code 404.
    pub async fn ask<T>(&self, call: impl Future<Output = kube::Result<T>>) -> Result<T, Error> {
        timeout(CALL, call).await.map_err(|_| Error::Late(CALL))?.map_err(Error::from)
    }
}

impl From<kube::Error> for Error {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => {
                let message = status.message.chars().filter(|c| !c.is_control()).take(READABLE).collect();
                Self::Refused { code: status.code, message }
            }
            error => Self::Unreachable(Box::new(error)),
        }
    }
}

impl Error {
    /// Whether the API says that there is no such thing.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: 404, .. })
    }
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cluster")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_a_name_becomes_part_of_a_path() {
        for name in ["a", "pull-secret.v2", "0"] {
            assert!(is_name(name), "{name}");
        }
        for other in ["", "..", "a..b", "../kube-system/secrets/b", "a/b", "a?b", "A", "a%2fb", "é", &"a".repeat(254)] {
            assert!(!is_name(other), "{other}");
        }
    }
}
