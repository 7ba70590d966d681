use std::{path::PathBuf, time::Duration};

use super::{
    reader::{Section, optional},
    shape::{Key, Kind, Table},
};

/// What the webhook may ask the API of its cluster for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Kubernetes {
    /// None: as the service account of the pod that this runs in.
    pub kubeconfig: Option<PathBuf>,
    /// Whether policies and witnesses are read from custom resources, too.
    pub resources: bool,
    /// Whether registries are logged in to by the secrets that pods are pulled with.
    pub pull_secrets: bool,
    /// Whether the cluster is told by Events of what happened.
    pub events: bool,
    /// None: nobody looks again at what was admitted.
    pub recheck: Option<Recheck>,
}

/// How often what runs is verified again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recheck {
    pub every: Duration,
    /// Images a second, at most.
    pub rate: u32,
}

impl Default for Recheck {
    fn default() -> Self {
        Self { every: Duration::from_secs(3600), rate: 5 }
    }
}

impl Recheck {
    /// From one image to the next.
    #[must_use]
    pub fn pause(self) -> Duration {
        Duration::from_secs(1) / self.rate.max(1)
    }
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
            "Whether an Event tells of an object that was admitted in an emergency, and of a pod that `recheck` found.",
        ),
        Key::optional(
            "recheck",
            Kind::Table(&RECHECK),
            "{ every = \"1h\" }",
            "Has all pods listed now and then, and their images verified again: what would be denied now is told of, and never evicted.",
        ),
    ],
};

static RECHECK: Table = Table {
    title: "`recheck`",
    doc: "How often what runs is verified again.",
    keys: &[
        Key::defaulted(
            "every",
            Kind::Duration { least: 1_000, most: 30 * 86_400_000 },
            "\"1h\"",
            "From one look to the next, give or take a tenth.",
        ),
        Key::defaulted("rate", Kind::Count { least: 1, most: 1_000 }, "5", "How many images a second, at most."),
    ],
};

pub(crate) fn read(section: &Section<'_>) -> Option<Kubernetes> {
    let kubeconfig = section.value("kubeconfig").map(|value| value.readable_file());
    let resources = section.value("resources").and_then(|value| value.flag());
    let pull_secrets = section.value("pull_secrets").and_then(|value| value.flag());
    let events = section.value("events").and_then(|value| value.flag());
    let recheck = section.value("recheck").map(|value| value.table().as_ref().and_then(recheck));
    Some(Kubernetes {
        kubeconfig: optional(kubeconfig)?,
        resources: resources?,
        pull_secrets: pull_secrets?,
        events: events?,
        recheck: optional(recheck)?,
    })
}

fn recheck(section: &Section<'_>) -> Option<Recheck> {
    let every = section.value("every").and_then(|value| value.duration());
    let rate = section.value("rate").and_then(|value| value.count());
    Some(Recheck { every: every?, rate: rate? })
}
