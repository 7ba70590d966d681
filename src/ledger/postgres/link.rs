//! One connection, made when it is needed, and again after it was lost.

use std::{future::Future, time::Duration};

use tokio::{
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_postgres::{Client, Statement, config::TargetSessionAttrs};
use tokio_postgres_rustls::MakeRustlsConnect;
use tracing::{info, warn};

use super::{Failure, Postgres, place, schema};
use crate::ledger::Error;

/// The wait after the first connection that failed; it doubles with each further one.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// Others may have a large ledger to migrate first.
const MIGRATION: Duration = Duration::from_secs(600);
/// A connection on which nothing was said for so long is asked after.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// The way to the database.
pub(super) struct Link<const N: usize> {
    settings: Postgres,
    tls: MakeRustlsConnect,
    sql: [String; N],
    session: Option<Session<N>>,
    /// The connection that failed last: until when no other is tried, and why.
    failed: Option<(Instant, Error)>,
    wait: Duration,
}

/// A connection and what is prepared on it.
pub(super) struct Session<const N: usize> {
    pub(super) client: Client,
    /// In the order in which the link was given them.
    pub(super) statements: [Statement; N],
    /// Carries the connection; ends with it.
    _carrier: JoinSet<()>,
}

impl<const N: usize> Link<N> {
    /// `sql` is what is prepared on each connection.
    pub(super) fn new(mut settings: Postgres, tls: MakeRustlsConnect, sql: [String; N]) -> Self {
        let limits = settings.limits;
        let connection = &mut settings.connection;
        if connection.get_application_name().is_none() {
            connection.application_name("countersign");
        }
        // Of several hosts, the one that can be written: after a fail-over it is another.
        connection.target_session_attrs(TargetSessionAttrs::ReadWrite);
        connection.connect_timeout(limits.connect);
        connection.keepalives_idle(KEEPALIVE);
        connection.tcp_user_timeout(limits.statement * 2);
        Self { settings, tls, sql, session: None, failed: None, wait: FIRST_WAIT }
    }

    /// How long a transaction may take before it is given up for lost.
    pub(super) fn patience(&self) -> Duration {
        self.settings.limits.statement * 2
    }

    /// The connection, for the ledger to be `what` ("written", "read").
    pub(super) async fn session(&mut self, what: &'static str) -> Result<&Session<N>, Error> {
        // One that ended while nobody used it was not a failure: the database may have been restarted.
        let open = self.session.take().filter(|session| !session.client.is_closed());
        let session = match open {
            Some(session) => session,
            None => self.connect(what).await?,
        };
        Ok(self.session.insert(session))
    }

    /// Nothing is known of the connection any more.
    pub(super) fn drop_session(&mut self) {
        self.session = None;
    }

    async fn connect(&mut self, what: &'static str) -> Result<Session<N>, Error> {
        if let Some((until, error)) = &self.failed
            && Instant::now() < *until
        {
            return Err(error.clone());
        }
        match self.try_connect().await {
            Ok(session) => {
                if self.failed.take().is_some() {
                    info!(ledger = place(&self.settings.connection), "the database is there again");
                }
                self.wait = FIRST_WAIT;
                Ok(session)
            }
            Err(failure) => {
                let error = failure.into_error(what);
                if self.failed.is_none() {
                    warn!(
                        ledger = place(&self.settings.connection),
                        error = &error as &dyn std::error::Error,
                        "no connection to the database; tried again until there is one"
                    );
                }
                // With jitter: replicas that lost it together do not come back together.
                self.failed = Some((Instant::now() + self.wait.mul_f64(fastrand::f64().mul_add(0.5, 0.5)), error.clone()));
                self.wait = (self.wait * 2).min(LONGEST_WAIT);
                Err(error)
            }
        }
    }

    /// Whether the database lets us in, and has no ledger that is not ours. Nothing is changed.
    pub(super) async fn look(&self) -> Result<(), Error> {
        let look = async {
            let (client, _carrier) = self.log_in().await?;
            let limit = self.settings.limits.statement;
            timeout(limit, schema::look(&client, &self.settings.connection)).await.map_err(|_| Failure::Silent)?
        };
        look.await.map_err(|failure| failure.into_error("read"))
    }

    async fn log_in(&self) -> Result<(Client, JoinSet<()>), Failure> {
        let Postgres { connection: config, limits, .. } = &self.settings;
        let (client, connection) = within(limits.connect, config.connect(self.tls.clone())).await?;
        let mut carrier = JoinSet::new();
        // How it ends is told to whoever waits for an answer then.
        carrier.spawn(async move { drop(connection.await) });
        within(limits.connect, client.batch_execute(&set_up(limits.statement))).await?;
        Ok((client, carrier))
    }

    async fn try_connect(&self) -> Result<Session<N>, Failure> {
        let Postgres { connection: config, limits, .. } = &self.settings;
        let (client, carrier) = self.log_in().await?;
        timeout(MIGRATION, schema::bring_up(&client, config)).await.map_err(|_| Failure::Silent)??;
        let prepared = futures::future::try_join_all(self.sql.iter().map(|sql| client.prepare(sql)));
        let statements = within(limits.statement, prepared).await?;
        let statements = statements.try_into().unwrap_or_else(|_| unreachable!("there are as many as there were"));
        Ok(Session { client, statements, _carrier: carrier })
    }
}

/// What holds for the session.
fn set_up(limit: Duration) -> String {
    let limit = limit.as_millis();
    format!(
        "-- An answer means that the commit is on the disk, and on the synchronous standbys' where there are any: a key is asked
         -- on the strength of it. Whoever has set it lower for this user or database meant other tables; higher stays.
         SELECT set_config('synchronous_commit', 'on', false)
          WHERE current_setting('synchronous_commit') NOT IN ('on', 'remote_apply');
         SET statement_timeout = {limit};
         -- What a replica that vanished had locked is not locked for long.
         SET idle_in_transaction_session_timeout = {limit};
         -- Each statement has its index. A plan that was made while a table was small must not stay when it is large.
         SET enable_seqscan = off"
    )
}

async fn within<T>(limit: Duration, answer: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T, Failure> {
    timeout(limit, answer).await.map_err(|_| Failure::Silent)?.map_err(Failure::Database)
}

#[cfg(test)]
mod tests {
    use integration_tests::postgres::Postgres as Server;

    use super::*;
    use crate::ledger::{Limits, Trust, postgres::tls};

    #[tokio::test]
    async fn a_commit_is_on_the_disk_whatever_is_set_for_the_database() {
        let server = Server::shared();
        let database = server.database().unwrap();
        for (set, expected) in
            [("off", "on"), ("local", "on"), ("remote_write", "on"), ("on", "on"), ("remote_apply", "remote_apply")]
        {
            server.sql("postgres", &format!("ALTER DATABASE {database} SET synchronous_commit = {set}")).unwrap();
            let connection = server.url(&database).parse().unwrap();
            let settings = Postgres { connection, trust: Trust::Anything, limits: Limits::default() };
            let tls = tls::connector(&settings.trust).unwrap();
            let mut link = Link::new(settings, tls, ["SHOW synchronous_commit".to_owned()]);
            let session = link.session("read").await.unwrap();
            let row = session.client.query_one(&session.statements[0], &[]).await.unwrap();
            assert_eq!(row.get::<_, &str>(0), expected, "{set}");
        }
    }
}
