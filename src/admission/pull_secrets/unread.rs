//! Why there is no login where an object says that there is one: for whoever is denied because of it.

use std::fmt;

use crate::{admission::shown, kubernetes, oci::RegistryName};

/// What an object is pulled with and could not be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unread {
    pub kind: Kind,
    pub namespace: String,
    pub name: String,
    pub problem: Problem,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Secret,
    ServiceAccount,
}

/// Nothing of a secret's content is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// It is no name that anything in a cluster can have.
    NoName,
    Missing,
    Forbidden,
    /// The API did not answer, or with an error of its own.
    Failed(String),
    /// A secret of another type.
    NoLogins {
        of_type: String,
    },
    Malformed,
    /// There are logins in it, and none of this registry.
    OtherRegistry(RegistryName),
}

impl From<&kubernetes::Error> for Problem {
    fn from(error: &kubernetes::Error) -> Self {
        match error {
            kubernetes::Error::Refused { code: 404, .. } => Self::Missing,
            kubernetes::Error::Refused { code: 401 | 403, .. } => Self::Forbidden,
            error => Self::Failed(crate::admission::chain(error)),
        }
    }
}

impl fmt::Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MAKE: &str = "make it by `kubectl create secret docker-registry`";
        let Self { kind, namespace, problem, .. } = self;
        let name = shown(&self.name);
        let kind = match kind {
            Kind::Secret => "Secret",
            Kind::ServiceAccount => "ServiceAccount",
        };
        match problem {
            Problem::NoName => write!(f, "no {kind} can have the name {name:?}: correct it in the object"),
            Problem::Missing => write!(f, "there is no {kind} {namespace}/{name}: make it, or correct its name in the object"),
            Problem::Forbidden => write!(
                f,
                "countersign may not read the {kind} {namespace}/{name}: allow its service account to `get` secrets and \
                 serviceaccounts, as the chart does with admission.kubernetes.pullSecrets"
            ),
            Problem::Failed(why) => write!(f, "the {kind} {namespace}/{name} could not be read, {why}: try again"),
            Problem::NoLogins { of_type } => {
                write!(f, "the {kind} {namespace}/{name} is of the type {:?}, which has no logins: {MAKE}", shown(of_type))
            }
            Problem::Malformed => write!(f, "what the {kind} {namespace}/{name} holds is no docker configuration: {MAKE}"),
            Problem::OtherRegistry(registry) => {
                write!(f, "the {kind} {namespace}/{name} has no login of {registry}: {MAKE} --docker-server={registry}")
            }
        }
    }
}
