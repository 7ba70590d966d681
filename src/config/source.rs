use crate::oci::RegistryName;

use super::{
    Secret,
    names::{self, PLAIN},
    queue::{self, TLS, Tls},
    reader::{Section, optional},
    registry::{self, Login},
    report::Wrong,
    shape::{ANY_TEXT, Choice, Grammar, Key, Kind, Table, Word},
    value::Value,
};

/// A door that push events come in by: `POST /events/{name}`, a broker's queue, or both.
#[derive(Debug, Clone)]
pub struct Source {
    /// Safe as one segment of a path.
    pub name: String,
    pub kind: SourceKind,
    /// The registry that its events are about, whatever they say; one of [`super::Config::registries`].
    pub registry: RegistryName,
    pub auth: SourceAuth,
    /// A broker's queue that its events come in by as well.
    pub queue: Option<SourceQueue>,
}

/// A queue that others publish events into. Who may publish there is let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceQueue {
    /// One or several, as [`super::Amqp`] has them.
    pub url: Secret,
    pub tls: Tls,
    pub name: String,
    /// The queue is declared and bound to it; otherwise it is there already.
    pub exchange: Option<String>,
    pub routing_key: String,
    /// Events that may be in hand at once.
    pub prefetch: u16,
}

/// What sends the events, and so what they look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceKind {
    /// CNCF distribution (docker-registry) 2.8 and 3.x.
    Distribution,
    /// CloudEvents 1.0 of the plain form: whatever can be made to send them.
    CloudEvents,
}

impl SourceKind {
    /// The word in the configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Distribution => "distribution",
            Self::CloudEvents => "cloudevents",
        }
    }
}

/// How a sender shows that it may send.
#[derive(Debug, Clone)]
pub enum SourceAuth {
    /// `Authorization: Bearer TOKEN`.
    Bearer {
        token: Secret,
        /// Counts beside `token` while senders are moved over to it.
        token_old: Option<Secret>,
    },
    /// `Authorization: Basic …` (RFC 7617).
    Basic(Login),
    /// Nobody, over HTTP: all its events come by its queue.
    Nobody,
}

pub(crate) static TABLE: Table = Table {
    title: "[[source]]",
    doc: "A door that push events come in by: POST /events/NAME, a broker's queue, or both.",
    keys: &[
        Key::required("name", Kind::Text(&PLAIN), "\"main\"", "The last part of the path that events are posted to."),
        Key::required("kind", Kind::Choice(&KIND), "\"distribution\"", "What sends the events, and so what they look like."),
        Key::required(
            "registry",
            Kind::Text(&registry::NAME),
            "\"registry.example.com\"",
            "The [[registry]] that its events are about. A host inside an event is never contacted.",
        ),
        Key::optional(
            "token",
            Kind::Secret,
            "{ file = \"/run/secrets/webhook\" }",
            "What senders show as \"Authorization: Bearer TOKEN\". A source has this or `basic`.",
        ),
        Key::optional(
            "token_old",
            Kind::Secret,
            "{ file = \"/run/secrets/webhook-old\" }",
            "A token that counts as well, while senders are moved over to the new one.",
        ),
        Key::optional(
            "basic",
            Kind::Table(&BASIC),
            "{ username = \"registry\", password = { file = \"/run/secrets/webhook\" } }",
            "What senders show as HTTP basic authentication, if they cannot send a token.",
        ),
        Key::optional(
            "queue",
            Kind::Table(&QUEUE),
            "{ name = \"registry-events\", url = { file = \"/run/secrets/events-url\" } }",
            "A RabbitMQ queue that others publish the registry's events into, as the registry sends them or as CloudEvents. \
             Whoever may publish there is let in; `token` and `basic` are for those who post as well.",
        ),
        Key::later("hmac"),
    ],
};

static QUEUE: Table = Table {
    title: "`queue`",
    doc: "A RabbitMQ queue that others publish events into.",
    keys: &[
        Key::required("name", Kind::Text(&NAME), "\"registry-events\"", "The queue's name."),
        Key::required(
            "url",
            Kind::Secret,
            "{ file = \"/run/secrets/events-url\" }",
            "The brokers: amqp://USER:PASSWORD@HOST:5672/VHOST, or amqps:// for TLS; several with commas between.",
        ),
        Key::optional(
            "exchange",
            Kind::Text(&NAME),
            "\"registry\"",
            "An exchange: the queue is then made, durable, and bound to it. Without, the queue must be there.",
        ),
        Key::defaulted("routing_key", Kind::Text(&ANY_TEXT), "\"#\"", "What it is bound by."),
        Key::defaulted("prefetch", Kind::Count { least: 1, most: 4096 }, "64", "How many events may be in hand at once."),
        Key::optional("tls", Kind::Table(&TLS), "{ ca = \"tls/broker-ca.pem\" }", "How the broker's certificate is checked."),
    ],
};

static NAME: Grammar = Grammar { noun: "a name in quotes", pattern: Some("^[^\\x00-\\x1f]{1,255}$") };

static KIND: Choice = Choice {
    words: &[
        Word { text: "distribution", doc: "CNCF distribution (docker-registry) 2.8 and 3.x." },
        Word {
            text: "cloudevents",
            doc: "CloudEvents 1.0 whose type ends in image.pushed and whose data is { repository, tag, digest }, as a CI job or a relay sends them.",
        },
    ],
    later: &["harbor", "zot", "acr", "quay", "dockerhub", "ecr", "gar", "gitlab", "github", "gitea", "nexus", "artifactory"],
};

static BASIC: Table = Table {
    title: "`basic`",
    doc: "A user name and its password.",
    keys: &[
        Key::required("username", Kind::Text(&ANY_TEXT), "\"registry\"", "The user name that senders show."),
        Key::required("password", Kind::Secret, "{ file = \"/run/secrets/webhook\" }", "The password that senders show."),
    ],
};

pub(crate) fn read(section: &Section<'_>) -> Option<Source> {
    let name = section.value("name").and_then(|value| value.parse(names::plain));
    let kind = section.value("kind").and_then(|value| value.choice([SourceKind::Distribution, SourceKind::CloudEvents]));
    let registry = section.value("registry").and_then(|value| {
        let name = value.parse(registry::registry_name)?;
        section.report.names.registries.check(&value, name.as_str());
        Some(name)
    });
    let queue = section.value("queue").map(|value| value.table().as_ref().and_then(source_queue));
    let auth = auth(section, queue.is_some());
    Some(Source { name: name?, kind: kind?, registry: registry?, auth: auth?, queue: optional(queue)? })
}

fn source_queue(section: &Section<'_>) -> Option<SourceQueue> {
    let name = section.value("name").and_then(|value| value.parse(broker_name));
    let url = section.value("url").and_then(|value| value.secret());
    let exchange = optional(section.value("exchange").map(|value| value.parse(broker_name)));
    let routing_key = section.value("routing_key").and_then(|value| value.text());
    let prefetch = section.value("prefetch").and_then(|value| value.count());
    let tls = optional(section.value("tls").map(|value| value.table().as_ref().and_then(queue::tls)));
    Some(SourceQueue {
        name: name?,
        url: url?,
        exchange: exchange?,
        routing_key: routing_key?,
        prefetch: prefetch?,
        tls: tls?.unwrap_or_default(),
    })
}

/// As long as the protocol has it (AMQP 0-9-1: a short string).
fn broker_name(text: &str) -> Result<String, Wrong> {
    if (1..=255).contains(&text.len()) && !text.chars().any(char::is_control) {
        return Ok(text.to_owned());
    }
    Err(Wrong::new("this is no name of a queue or an exchange", "they have 1 to 255 bytes"))
}

fn auth(section: &Section<'_>, has_queue: bool) -> Option<SourceAuth> {
    let token = section.value("token").map(|value| bearer(&value));
    let token_old = section.value("token_old").map(|value| bearer(&value));
    let basic = section.value("basic").map(|value| value.table().as_ref().and_then(basic));
    match (token, token_old, basic) {
        (Some(token), None, None) => Some(SourceAuth::Bearer { token: token?, token_old: None }),
        (Some(token), Some(token_old), None) => Some(SourceAuth::Bearer { token: token?, token_old: Some(token_old?) }),
        (None, None, Some(basic)) => basic.map(SourceAuth::Basic),
        (None, Some(_), None) => {
            let at = section.written("token_old").unwrap_or_else(|| section.span.clone());
            section.report.absent(at, "`token_old` without `token`", "name it `token`: nothing takes its place yet".to_owned());
            None
        }
        (_, _, Some(_)) => {
            let at = section.written("basic").unwrap_or_else(|| section.span.clone());
            section.report.error(at, "a source has `token` or `basic`, not both", "keep what its senders use".to_owned());
            None
        }
        (None, None, None) if has_queue => Some(SourceAuth::Nobody),
        (None, None, None) => {
            let message = "[[source]] has no `token` and no `basic`: anybody could send events";
            let help = "add one, and give its senders the same: token = { file = \"/run/secrets/webhook\" }";
            section.report.absent(section.span.clone(), message, help.to_owned());
            None
        }
    }
}

/// A token is one header value, and must not be guessed.
fn bearer(value: &Value<'_>) -> Option<Secret> {
    const SHORT: usize = 16;
    let token = value.secret()?;
    if !token.expose().bytes().all(|b| b.is_ascii_graphic()) {
        let help = "use letters, digits and punctuation of ASCII, without spaces: openssl rand -hex 32 makes a good one";
        return value.wrong(Wrong::new("this token cannot be sent in a header", help));
    }
    if token.expose().len() < SHORT {
        let help = "openssl rand -hex 32 makes a good one".to_owned();
        value.report.warning(
            value.span.clone(),
            format!("this token has fewer than {SHORT} characters, and could be guessed"),
            help,
        );
    }
    Some(token)
}

fn basic(section: &Section<'_>) -> Option<Login> {
    let username = section.value("username").and_then(|value| value.parse(registry::username));
    let password = section.value("password").and_then(|value| value.secret());
    Some(Login { username: username?, password: password? })
}
