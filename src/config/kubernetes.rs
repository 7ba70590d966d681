use std::path::PathBuf;

use super::{
    reader::{Section, optional},
    shape::{Key, Kind, Table},
};

/// What the webhook may ask the API of its cluster for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kubernetes {
    /// None: as the service account of the pod that this runs in.
    pub kubeconfig: Option<PathBuf>,
    /// Whether policies and witnesses are read from custom resources, too.
    pub resources: bool,
    /// Whether registries are logged in to by the secrets that pods are pulled with.
    pub pull_secrets: bool,
    /// Whether the cluster is told by Events of what happened.
    pub events: bool,
}

pub(crate) static TABLE: Table = Table {
    title: "`kubernetes`",
    doc: "What the API of the cluster is asked for. Each needs a permission, which deploy/ grants.",
    keys: &[
        Key::optional(
            "kubeconfig",
            Kind::Path,
            "\"/etc/countersign/kubeconfig\"",
            "A file that says where the API is and who asks. If absent, the service account of the pod that this runs in.",
        ),
        Key::defaulted(
            "resources",
            Kind::Flag,
            "false",
            "Whether the cluster's SecurityPolicy and Witness resources are in force, besides each [[policy]] and [[witness]]. As long \
             as they have not been read, nothing is admitted.",
        ),
        Key::defaulted(
            "pull_secrets",
            Kind::Flag,
            "false",
            "Whether a [[registry]] without a login of its own is asked with the imagePullSecrets of the pod and of its service account.",
        ),
        Key::defaulted(
            "events",
            Kind::Flag,
            "true",
            "Whether an Event tells of an object that was admitted in an emergency.",
        ),
    ],
};

pub(crate) fn read(section: &Section<'_>) -> Option<Kubernetes> {
    let kubeconfig = section.value("kubeconfig").map(|value| value.readable_file());
    let resources = section.value("resources").and_then(|value| value.flag());
    let pull_secrets = section.value("pull_secrets").and_then(|value| value.flag());
    let events = section.value("events").and_then(|value| value.flag());
    Some(Kubernetes { kubeconfig: optional(kubeconfig)?, resources: resources?, pull_secrets: pull_secrets?, events: events? })
}
