use std::{net::SocketAddr, path::PathBuf, time::Duration};

use reqwest::Url;

use super::{
    Tls,
    kubernetes::{self, Kubernetes},
    names::PLAIN,
    policy::{self, PATTERN},
    reader::{Section, optional},
    report::{Wrong, cut},
    server::{self, ADDRESS},
    shape::{ANY_TEXT, Grammar, Key, Kind, Table},
    value::Value,
};

/// The admission webhook.
#[derive(Debug, Clone)]
pub struct Admission {
    pub listen: SocketAddr,
    pub certificate: Certificate,
    /// The cluster that it stands in, as policies name it.
    pub cluster: Option<String>,
    /// The most that a review may take; a cluster that gives less time is answered within that.
    pub deadline: Duration,
    pub cache: Cache,
    /// Patterns of images that no policy says anything of.
    pub allow: Vec<String>,
    /// None: nobody may get past the policies.
    pub breakglass: Option<Breakglass>,
    pub kinds: Vec<CustomKind>,
    /// Where a daemon's API is: http, https, or `unix:///path/of/its.sock`.
    pub daemon: Option<Url>,
    /// A file as docker and the kubelet keep logins in.
    pub docker_config: Option<PathBuf>,
    /// None: the cluster's API is asked for nothing.
    pub kubernetes: Option<Kubernetes>,
}

/// What the webhook proves its name with.
#[derive(Debug, Clone)]
pub enum Certificate {
    Files(Tls),
    /// Made here. The authority that signs it is kept in the folder.
    Own {
        folder: PathBuf,
        names: Vec<String>,
    },
}

/// How much is remembered of what verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cache {
    /// Images.
    pub entries: usize,
    pub keep: Duration,
}

/// Who may get past the policies in an emergency.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Breakglass {
    pub users: Vec<String>,
    pub groups: Vec<String>,
    /// How far ahead the end of an emergency may be.
    pub longest: Duration,
}

/// A kind of object that pods are made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CustomKind {
    pub group: String,
    pub kind: String,
    /// Where its pod templates are; `*` is every member of a list or a map.
    pub paths: Vec<Vec<String>>,
}

pub(crate) static TABLE: Table = Table {
    title: "[admission]",
    doc: "The admission webhook, `countersign admission`. Time limits of requests, and how it stops, are as in [server].",
    keys: &[
        Key::defaulted(
            "listen",
            Kind::Text(&ADDRESS),
            "\"127.0.0.1:8443\"",
            "The address and port to listen on, by HTTPS. In a cluster, \"0.0.0.0:8443\" or \"[::]:8443\".",
        ),
        Key::defaulted(
            "tls",
            Kind::Table(&TLS),
            "{ folder = \"/var/lib/countersign/admission\", names = [\"countersign-admission.countersign.svc\"] }",
            "The certificate that the cluster's API server sees: made and rotated by itself, or read from files and read again when \
             they change.",
        ),
        Key::optional(
            "cluster",
            Kind::Text(&PLAIN),
            "\"prod-eu\"",
            "The cluster that this webhook stands in, as policies name it.",
        ),
        Key::defaulted(
            "deadline",
            Kind::Duration { least: 100, most: 30_000 },
            "\"10s\"",
            "The most that a review may take. Where the webhook's `timeoutSeconds` is less, it is answered in time for that.",
        ),
        Key::defaulted(
            "cache",
            Kind::Table(&CACHE),
            "{ entries = 100_000, keep = \"24h\" }",
            "What is remembered of images that verified. It is forgotten when the configuration is read again, and when a key runs \
             out or is revoked.",
        ),
        Key::defaulted(
            "allow",
            Kind::List(&Kind::Text(&PATTERN)),
            "[]",
            "Images that no policy says anything of: the cluster's own, and countersign's, so that both can always be mended.",
        ),
        Key::optional(
            "breakglass",
            Kind::Table(&BREAKGLASS),
            "{ groups = [\"oncall\"] }",
            "Who may get past all policies with the annotation countersign.dev/breakglass: \"until TIME because REASON\".",
        ),
        Key::defaulted(
            "kinds",
            Kind::Tables(&KIND),
            "[]",
            "Further kinds of objects that pods are made from. Those of Kubernetes itself are known.",
        ),
        Key::optional(
            "daemon",
            Kind::Text(&DAEMON),
            "\"unix:///var/lib/countersign/countersign.sock\"",
            "Where the API of a daemon that signs is. Answers then say whether an image is still to be signed.",
        ),
        Key::optional(
            "docker_config",
            Kind::Path,
            "\"/var/lib/kubelet/config.json\"",
            "A file with logins as docker and nodes keep them, for each [[registry]] that has none of its own.",
        ),
        Key::optional(
            "kubernetes",
            Kind::Table(&kubernetes::TABLE),
            "{ resources = true }",
            "What the API of the cluster is asked for. If absent, it is asked for nothing, and needs grant nothing.",
        ),
    ],
};

static TLS: Table = Table {
    title: "`tls`",
    doc: "The certificate that the API server sees.",
    keys: &[
        Key::optional(
            "certificate",
            Kind::Path,
            "\"tls/tls.crt\"",
            "A PEM file: the certificate, then those that lead to its root.",
        ),
        Key::optional("key", Kind::Secret, "{ file = \"tls/tls.key\" }", "The certificate's private key, as PEM."),
        Key::defaulted(
            "folder",
            Kind::Path,
            "\"/var/lib/countersign/admission\"",
            "Without files: where the authority is kept that signs the certificate. `countersign admission --ca-bundle` prints it.",
        ),
        Key::defaulted(
            "names",
            Kind::List(&Kind::Text(&HOST)),
            "[\"countersign-admission.countersign.svc\"]",
            "Without files: the host names and addresses that the API server calls.",
        ),
    ],
};

static CACHE: Table = Table {
    title: "`cache`",
    doc: "What is remembered of images that verified.",
    keys: &[
        Key::defaulted("entries", Kind::Count { least: 16, most: 10_000_000 }, "100_000", "How many images."),
        Key::defaulted(
            "keep",
            Kind::Duration { least: 1_000, most: 365 * 86_400_000 },
            "\"24h\"",
            "How long, and so how long they are admitted while their registry is away.",
        ),
    ],
};

static BREAKGLASS: Table = Table {
    title: "`breakglass`",
    doc: "Who may get past all policies.",
    keys: &[
        Key::defaulted("users", Kind::List(&Kind::Text(&SUBJECT)), "[]", "Users, as the cluster names them."),
        Key::defaulted(
            "groups",
            Kind::List(&Kind::Text(&SUBJECT)),
            "[]",
            "Groups. For workloads, also the service accounts of the controllers that make pods: system:serviceaccounts:kube-system.",
        ),
        Key::defaulted(
            "longest",
            Kind::Duration { least: 60_000, most: 365 * 86_400_000 },
            "\"24h\"",
            "How far ahead the end of an emergency may be.",
        ),
    ],
};

static KIND: Table = Table {
    title: "`kinds`",
    doc: "A kind of object that pods are made from.",
    keys: &[
        Key::required("group", Kind::Text(&ANY_TEXT), "\"argoproj.io\"", "Its API group."),
        Key::required("kind", Kind::Text(&ANY_TEXT), "\"Rollout\"", "Its kind."),
        Key::required(
            "paths",
            Kind::List(&Kind::Text(&PATH)),
            "[\"spec.template\"]",
            "Where its pod templates are, the ones with a `spec`. * is every member of a list or a map.",
        ),
    ],
};

static HOST: Grammar = Grammar { noun: "a host name or address in quotes", pattern: Some("^[0-9A-Za-z.:-]+$") };
static SUBJECT: Grammar = Grammar { noun: "a name in quotes", pattern: Some("^.+$") };
static PATH: Grammar = Grammar { noun: "a path such as \"spec.template\"", pattern: Some("^[^.\\s]+(\\.[^.\\s]+)*$") };
static DAEMON: Grammar = Grammar { noun: "a URL in quotes", pattern: Some("^(https?|unix)://") };

pub(crate) fn read(section: &Section<'_>) -> Option<Admission> {
    let listen = section.value("listen").and_then(|value| value.parse(server::address));
    let certificate = section.value("tls").and_then(|value| value.table()).as_ref().and_then(certificate);
    let cluster = section.value("cluster").map(|value| value.parse(super::names::plain));
    let deadline = section.value("deadline").and_then(|value| value.duration());
    let cache = section.value("cache").and_then(|value| value.table()).as_ref().and_then(cache);
    let allow = section.value("allow").and_then(|value| policy::patterns(&value));
    let breakglass = section.value("breakglass").map(|value| value.table().as_ref().and_then(breakglass));
    let kinds = section.value("kinds").and_then(|value| value.each_table(custom_kind));
    let daemon = section.value("daemon").map(|value| value.parse(daemon));
    let docker_config = section.value("docker_config").map(|value| value.readable_file());
    let kubernetes = section.value("kubernetes").map(|value| value.table().as_ref().and_then(kubernetes::read));
    Some(Admission {
        listen: listen?,
        certificate: certificate?,
        cluster: optional(cluster)?,
        deadline: deadline?,
        cache: cache?,
        allow: allow?,
        breakglass: optional(breakglass)?,
        kinds: kinds?,
        daemon: optional(daemon)?,
        docker_config: optional(docker_config)?,
        kubernetes: optional(kubernetes)?,
    })
}

/// In files if either of them is named, and of our own making otherwise.
fn certificate(section: &Section<'_>) -> Option<Certificate> {
    let certificate = section.value("certificate").map(|value| value.readable_file());
    let key = section.value("key").map(|value| value.secret());
    let folder = section.value("folder").and_then(|value| value.path());
    let names = section.value("names").and_then(|value| value.each(|element| element.parse(host)));
    let is_own = section.written("folder").is_some() || section.written("names").is_some();
    match (certificate, key) {
        (None, None) => {
            let (folder, names) = (folder?, names?);
            if names.is_empty() {
                let help = "write the name of the webhook's service: names = [\"SERVICE.NAMESPACE.svc\"]".to_owned();
                section.report.error(section.value_span("names"), "`names` is empty: nobody could call this webhook", help);
                return None;
            }
            Some(Certificate::Own { folder, names })
        }
        (Some(certificate), Some(key)) if !is_own => Some(Certificate::Files(Tls { certificate: certificate?, key: key? })),
        _ => {
            let message = "`tls` has either `certificate` and `key`, or `folder` and `names`";
            let help = "write tls = { certificate = \"tls.crt\", key = { file = \"tls.key\" } }, or \
                        tls = { folder = \"…\", names = [\"SERVICE.NAMESPACE.svc\"] }";
            section.report.error(section.span.clone(), message, help.to_owned());
            None
        }
    }
}

/// What a certificate can be for.
fn host(text: &str) -> Result<String, Wrong> {
    let is_name = !text.is_empty()
        && text.len() <= 253
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.')
        && text.split('.').all(|label| !label.is_empty() && label.len() <= 63);
    if is_name || text.parse::<std::net::IpAddr>().is_ok() {
        return Ok(text.to_owned());
    }
    let help = "write a host name such as \"countersign-admission.countersign.svc\", or an address, without a port";
    Err(Wrong::new(format!("\"{}\" is no host", cut(text)), help))
}

fn cache(section: &Section<'_>) -> Option<Cache> {
    let entries = section.value("entries").and_then(|value| value.count());
    let keep = section.value("keep").and_then(|value| value.duration());
    Some(Cache { entries: entries?, keep: keep? })
}

fn breakglass(section: &Section<'_>) -> Option<Breakglass> {
    let users = section.value("users").and_then(|value| value.each(Value::text));
    let groups = section.value("groups").and_then(|value| value.each(Value::text));
    let longest = section.value("longest").and_then(|value| value.duration());
    let (users, groups) = (users?, groups?);
    if users.is_empty() && groups.is_empty() {
        let help = "name them in `users` or `groups`, or remove `breakglass`".to_owned();
        section.report.error(section.span.clone(), "`breakglass` lets nobody past", help);
    }
    Some(Breakglass { users, groups, longest: longest? })
}

fn custom_kind(section: &Section<'_>) -> Option<CustomKind> {
    let group = section.value("group").and_then(|value| value.text());
    let kind = section.value("kind").and_then(|value| value.text());
    let paths = section.value("paths").and_then(|value| {
        value.each(|element| {
            element.parse(|text| {
                let path: Vec<String> = text.trim_start_matches('.').split('.').map(str::to_owned).collect();
                if path.len() <= 16 && path.iter().all(|segment| !segment.is_empty()) {
                    return Ok(path);
                }
                let help = "write the members from the outside in: \"spec.template\", \"spec.replicaSpecs.*.template\"";
                Err(Wrong::new(format!("\"{}\" is no path", cut(text)), help))
            })
        })
    });
    Some(CustomKind { group: group?, kind: kind?, paths: paths? })
}

fn daemon(text: &str) -> Result<Url, Wrong> {
    const HELP: &str =
        "write \"unix:///var/lib/countersign/countersign.sock\", the socket in the daemon's folder, or an https:// URL";
    let url: Url = text.parse().map_err(|error| Wrong::new(format!("`daemon` is no URL: {error}"), HELP))?;
    let is_socket = url.scheme() == "unix" && url.path().len() > 1;
    let is_web = matches!(url.scheme(), "http" | "https") && url.has_host();
    if (is_socket || is_web) && url.username().is_empty() && url.password().is_none() && url.query().is_none() {
        Ok(url)
    } else {
        Err(Wrong::new("`daemon` is no URL of a daemon's API", HELP))
    }
}
