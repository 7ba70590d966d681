//! The ledger in a PostgreSQL database, which any number of replicas share.
//!
//! One thread has two connections: over one it writes, so that all who wait share a commit, over the other it reads. It lives as
//! long as the [`Store`]. A connection is made when it is needed, and again after it was lost; until that works, whoever asks
//! is told so at once.

mod failure;
mod link;
mod read;
mod schema;
mod tls;
mod write;

use std::{collections::HashMap, fmt, io, sync::Arc, thread, time::Duration};

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};
use tokio_postgres::config::Host;
use tokio_postgres_rustls::MakeRustlsConnect;

use self::{failure::Failure, link::Link};
use super::{Backend, Error, EventRecord, KeptCertificate, RuleOutcome, SignatureRecord, StoryQuery, Sums, Work};
use crate::{
    clock::Clock,
    oci::{Digest, RegistryName, Repository},
};

pub use self::tls::{Authorities, Trust};

/// How a PostgreSQL database is reached, and how long it is waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Postgres {
    /// Hosts, user, database and `sslmode`; with the password, which its `Debug` does not show.
    pub connection: tokio_postgres::Config,
    /// What the server's certificate is checked for, where there is TLS.
    pub trust: Trust,
    pub limits: Limits,
}

/// How long is waited for a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// For a connection, its TLS and the login.
    pub connect: Duration,
    /// For each statement, locks that others hold included; the server ends it then. A transaction as a whole has twice that.
    pub statement: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connect: Duration::from_secs(5), statement: Duration::from_secs(10) }
    }
}

impl Postgres {
    /// The database as messages name it, without user and password.
    #[must_use]
    pub fn place(&self) -> String {
        place(&self.connection)
    }

    /// Logs in and looks whether a ledger can be there. Nothing is written.
    pub async fn look(&self) -> Result<(), Error> {
        Link::new(self.clone(), connector(&self.trust)?, []).look().await
    }
}

fn connector(trust: &Trust) -> Result<MakeRustlsConnect, Error> {
    let cure = "let sslrootcert name a readable file of PEM certificates";
    tls::connector(trust).map_err(|source| Error::Refused { cure, source: Arc::new(source) })
}

/// The database as messages name it, without user and password.
fn place(config: &tokio_postgres::Config) -> String {
    let hosts = config.get_hosts().iter().enumerate().map(|(number, host)| {
        let port = config.get_ports().get(number).or_else(|| config.get_ports().first()).copied().unwrap_or(5432);
        match host {
            Host::Tcp(name) => format!("{name}:{port}"),
            Host::Unix(folder) => format!("{}:{port}", folder.display()),
        }
    });
    let hosts: Vec<_> = hosts.collect();
    let database = config.get_dbname().or(config.get_user()).unwrap_or_default();
    format!("postgres://{}/{database}", hosts.join(","))
}

/// The way to the thread.
pub(super) struct Store {
    place: String,
    writer: mpsc::UnboundedSender<write::Job>,
    reader: mpsc::UnboundedSender<read::Question>,
}

impl Store {
    /// Nothing is connected to yet.
    ///
    /// # Errors
    /// [`Error::Refused`] if the authorities for TLS cannot be read, or if there is no thread to be had.
    pub(super) fn new(settings: Postgres, clock: Clock) -> Result<Self, Error> {
        let no_thread = |source: io::Error| Error::Refused {
            cure: "let countersign have one more thread, and a few more file descriptors",
            source: Arc::new(source),
        };
        let (place, tls) = (settings.place(), connector(&settings.trust)?);
        let writing = Link::new(settings.clone(), tls.clone(), write::statements());
        let reading = Link::new(settings, tls, read::statements());
        let (writer, jobs) = mpsc::unbounded_channel();
        let (reader, questions) = mpsc::unbounded_channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(&no_thread)?;
        let work = move || {
            runtime.block_on(async {
                tokio::join!(write::Writer::new(writing, clock).run(jobs), read::run(reading, questions));
            });
        };
        thread::Builder::new().name("ledger-postgres".to_owned()).spawn(work).map_err(&no_thread)?;
        Ok(Self { place, writer, reader })
    }

    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> read::Question) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.reader.send(question(reply)).map_err(|_| Error::Closed)?;
        answer.await.map_err(|_| Error::Closed)?
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Postgres").field(&self.place).finish()
    }
}

#[async_trait]
impl Backend for Store {
    /// Returns once `work` is committed, with whatever else was waiting.
    async fn write(&self, work: Work) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        self.writer.send(write::Job { work, reply }).map_err(|_| Error::Closed)?;
        answer.await.map_err(|_| Error::Closed)?
    }

    async fn sums(&self) -> Result<Sums, Error> {
        self.ask(read::Question::Sums).await
    }

    async fn story(&self, query: StoryQuery) -> Result<Vec<EventRecord>, Error> {
        self.ask(|reply| read::Question::Story(query, reply)).await
    }

    async fn rule_outcomes(&self, message_ids: Vec<String>) -> Result<HashMap<String, Vec<RuleOutcome>>, Error> {
        self.ask(|reply| read::Question::Rules(message_ids, reply)).await
    }

    async fn signatures(
        &self,
        registry: RegistryName,
        repository: Repository,
        digest: Digest,
    ) -> Result<Vec<SignatureRecord>, Error> {
        self.ask(|reply| read::Question::Signatures((registry, repository, digest), reply)).await
    }

    /// A statement of its own, which commits by itself, and shares no transaction with what goes by the thousand.
    async fn keep_certificate(&self, certificate: KeptCertificate) -> Result<(), Error> {
        self.ask(|reply| read::Question::Keep(certificate, reply)).await
    }

    async fn certificates(&self, witness: String, key: String) -> Result<Vec<KeptCertificate>, Error> {
        self.ask(|reply| read::Question::Certificates(witness, key, reply)).await
    }
}
