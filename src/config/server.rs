use std::{net::SocketAddr, path::PathBuf, time::Duration};

use super::{
    Secret,
    reader::{Section, optional},
    report::{Wrong, cut},
    shape::{Grammar, Key, Kind, Table},
};

/// How countersign is reached.
#[derive(Debug, Clone)]
pub struct Server {
    pub listen: SocketAddr,
    /// None: plain HTTP.
    pub tls: Option<Tls>,
    /// How long a shutdown may take.
    pub grace: Duration,
    /// Bytes of one request's body.
    pub max_body: u64,
    /// Requests that are handled at once; more are answered 503.
    pub max_requests: usize,
    pub header_timeout: Duration,
    pub body_timeout: Duration,
}

/// The server's own certificate.
#[derive(Debug, Clone)]
pub struct Tls {
    /// PEM: the certificate, then those that lead to its root.
    pub certificate: PathBuf,
    /// PEM: PKCS#8, PKCS#1 or SEC1.
    pub key: Secret,
}

pub(crate) static TABLE: Table = Table {
    title: "[server]",
    doc: "How countersign is reached: push events, health, metrics.",
    keys: &[
        Key::defaulted(
            "listen",
            Kind::Text(&ADDRESS),
            "\"127.0.0.1:8080\"",
            "The address and port to listen on. Registries on other machines need one that they can reach, and then `tls`.",
        ),
        Key::optional(
            "tls",
            Kind::Table(&TLS),
            "{ certificate = \"tls/server.pem\", key = { file = \"tls/server.key\" } }",
            "Serves HTTPS with this certificate. Plain HTTP, if absent.",
        ),
        Key::defaulted(
            "grace",
            Kind::Duration { least: 0, most: 3_600_000 },
            "\"20s\"",
            "How long a shutdown waits for what is in hand before it is handed back to the queue.",
        ),
        Key::defaulted(
            "max_body",
            Kind::Size { least: 1 << 10, most: 256 << 20 },
            "\"5MiB\"",
            "The largest body of one request. The default holds every event that a registry sends.",
        ),
        Key::defaulted(
            "max_requests",
            Kind::Count { least: 1, most: 65_535 },
            "256",
            "How many requests are handled at once. More are answered 503, and registries send them again.",
        ),
        Key::defaulted(
            "header_timeout",
            Kind::Duration { least: 100, most: 3_600_000 },
            "\"10s\"",
            "How long a client may take to send the head of a request.",
        ),
        Key::defaulted(
            "body_timeout",
            Kind::Duration { least: 100, most: 3_600_000 },
            "\"10s\"",
            "How long a client may take to send the body of a request.",
        ),
    ],
};

static TLS: Table = Table {
    title: "`tls`",
    doc: "The certificate that clients see.",
    keys: &[
        Key::required(
            "certificate",
            Kind::Path,
            "\"tls/server.pem\"",
            "A PEM file: the server's certificate, then those that lead to its root.",
        ),
        Key::required("key", Kind::Secret, "{ file = \"tls/server.key\" }", "The certificate's private key, as PEM."),
    ],
};

pub(crate) static ADDRESS: Grammar = Grammar { noun: "an address and a port in quotes", pattern: Some(":[0-9]+$") };

pub(crate) fn read(section: &Section<'_>) -> Option<Server> {
    let listen = section.value("listen").and_then(|value| value.parse(address));
    let has_tls = section.written("tls").is_some();
    let tls = section.value("tls").map(|value| value.table().as_ref().and_then(tls));
    let grace = section.value("grace").and_then(|value| value.duration());
    let max_body = section.value("max_body").and_then(|value| value.size());
    let max_requests = section.value("max_requests").and_then(|value| value.count());
    let header_timeout = section.value("header_timeout").and_then(|value| value.duration());
    let body_timeout = section.value("body_timeout").and_then(|value| value.duration());
    if !has_tls && listen.is_some_and(|address| !address.ip().is_loopback()) && !section.report.names.sources.is_empty() {
        section.report.absent_warning(
            section.value_span("listen"),
            "the sources' tokens and passwords come in over plain HTTP from other machines",
            "add `tls`, or listen on 127.0.0.1 behind something that ends TLS".to_owned(),
        );
    }
    Some(Server {
        listen: listen?,
        tls: optional(tls)?,
        grace: grace?,
        max_body: max_body?,
        max_requests: max_requests?,
        header_timeout: header_timeout?,
        body_timeout: body_timeout?,
    })
}

fn tls(section: &Section<'_>) -> Option<Tls> {
    let certificate = section.value("certificate").and_then(|value| value.readable_file());
    let key = section.value("key").and_then(|value| value.secret());
    Some(Tls { certificate: certificate?, key: key? })
}

/// What `listen` is where it is not written.
pub(crate) fn default_listen() -> SocketAddr {
    let default = TABLE.key("listen").expect("it is declared above").example;
    default.trim_matches('"').parse().expect("a test reads every default")
}

pub(crate) fn address(text: &str) -> Result<SocketAddr, Wrong> {
    text.parse().map_err(|_| {
        let message = format!("\"{}\" is no address with a port", cut(text));
        let help = match text.strip_prefix(':').map(str::parse::<u16>) {
            Some(Ok(port)) => format!("for all addresses of this machine write \"0.0.0.0:{port}\" or \"[::]:{port}\""),
            _ => "for example \"127.0.0.1:8080\" or \"[::1]:8080\"; host names are not looked up".to_owned(),
        };
        Wrong::new(message, help)
    })
}
