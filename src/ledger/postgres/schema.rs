//! The tables, in a schema of their own, and how they come to be.

use std::{io, sync::Arc};

use tokio_postgres::Client;

use super::{Failure, place};
use crate::ledger::Error;

/// Each brings a ledger one version further; its version is how many it has been through. One that was released never changes.
const MIGRATIONS: &[&str] = &[FIRST, CERTIFICATES];

/// `countersign` in ASCII, as far as a number goes: the advisory lock that migrations run under.
const LOCK: i64 = 0x636f_756e_7465_7273;

/// Texts are written out, so that an administrator can read the trail with any client. `identity` and `claim` are hashes of the
/// columns that tell signatures apart, with and without the key (`write.rs`): one narrow index instead of a wide one.
///
/// Messages compare by their bytes, because rows are locked in the order of their messages, and that must be one order for all.
///
/// `tally` counts the terminal outcomes of `event`, in the same transactions. One row an outcome would be one lock that every
/// replica waits for until the other's commit is on the disk, so each transaction adds to a shard picked at random, and a
/// reader sums them up. One shard alone means nothing, and may well be negative.
const FIRST: &str = "
    CREATE TABLE countersign.ledger (
        version     bigint NOT NULL
    );
    INSERT INTO countersign.ledger (version) VALUES (0);

    CREATE TABLE countersign.event (
        id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        message         text COLLATE \"C\" NOT NULL UNIQUE,
        source          text,
        sender_id       text,
        repository      text,
        tag             text,
        digest          bytea,
        pushed_at       timestamptz,
        received_at     timestamptz,
        actor           text,
        outcome         text NOT NULL,
        reason          text,
        rules           text,
        detail          text,
        attempt         bigint NOT NULL,
        concluded_at    timestamptz NOT NULL
    );
    CREATE INDEX event_by_tag ON countersign.event (repository, tag);
    CREATE INDEX event_by_digest ON countersign.event (digest);

    CREATE TABLE countersign.signature (
        id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        identity        bytea NOT NULL UNIQUE,
        claim           bytea NOT NULL,
        message         text NOT NULL,
        rule            text NOT NULL,
        witness         text NOT NULL,
        format          text NOT NULL,
        repository      text NOT NULL,
        digest          bytea NOT NULL,
        reference       text NOT NULL,
        payload         bytea NOT NULL,
        key             text,
        algorithm       text,
        asked           bigint NOT NULL,
        asked_first_at  timestamptz,
        asked_last_at   timestamptz,
        state           text,
        detail          text,
        concluded_at    timestamptz
    );
    CREATE INDEX signature_by_claim ON countersign.signature (claim);
    CREATE INDEX signature_by_digest ON countersign.signature (digest);

    CREATE TABLE countersign.tally (
        shard           integer NOT NULL,
        outcome         text NOT NULL,
        reason          text NOT NULL,
        events          bigint NOT NULL,
        PRIMARY KEY (shard, outcome, reason)
    );

    CREATE TABLE countersign.probe (
        shard           integer PRIMARY KEY,
        written_at      timestamptz NOT NULL
    );
";

const CERTIFICATES: &str = "
    CREATE TABLE countersign.certificate (
        witness         text NOT NULL,
        key             text NOT NULL,
        number          bigint NOT NULL,
        pem             text NOT NULL,
        PRIMARY KEY (witness, key, number)
    );
";

/// The version of a ledger that this program wrote.
fn known() -> i64 {
    i64::try_from(MIGRATIONS.len()).expect("a handful")
}

/// Makes the database's ledger one of this version, unless it is. One of another program, or of a newer version, is left as it is.
pub(super) async fn bring_up(client: &Client, config: &tokio_postgres::Config) -> Result<(), Failure> {
    if state(client, config).await? == State::Version(known()) {
        return Ok(());
    }
    let result = migrate(client, config).await;
    if result.is_err() {
        // Whatever it answers, the session is given up.
        let _ = client.batch_execute("ROLLBACK").await;
    }
    result
}

/// Whether there is a ledger of another program or of a newer version. Nothing is changed.
pub(super) async fn look(client: &Client, config: &tokio_postgres::Config) -> Result<(), Failure> {
    state(client, config).await.map(drop)
}

async fn migrate(client: &Client, config: &tokio_postgres::Config) -> Result<(), Failure> {
    // Many replicas start at once: one migrates, the others wait for it and find it done. Building an index may take its time.
    client.batch_execute("BEGIN; SET LOCAL statement_timeout = 0").await?;
    client.execute("SELECT pg_advisory_xact_lock($1)", &[&LOCK]).await?;
    let found = match state(client, config).await? {
        State::Version(found) => found,
        State::Absent => {
            client.batch_execute("CREATE SCHEMA countersign").await?;
            0
        }
        State::Empty => 0,
    };
    for migration in MIGRATIONS.iter().skip(usize::try_from(found).unwrap_or_default()) {
        client.batch_execute(migration).await?;
    }
    client.execute("UPDATE countersign.ledger SET version = $1", &[&known()]).await?;
    client.batch_execute("COMMIT").await?;
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// No schema.
    Absent,
    /// A schema with nothing in it, as an administrator prepares it.
    Empty,
    Version(i64),
}

async fn state(client: &Client, config: &tokio_postgres::Config) -> Result<State, Failure> {
    let question = "
        SELECT to_regnamespace('countersign') IS NOT NULL, to_regclass('countersign.ledger') IS NOT NULL,
               EXISTS (SELECT 1 FROM pg_class WHERE relnamespace = to_regnamespace('countersign')),
               current_setting('server_encoding')";
    let row = client.query_one(question, &[]).await?;
    let (schema, ledger, filled): (bool, bool, bool) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let encoding: String = row.try_get(3)?;
    if encoding != "UTF8" {
        let source = Arc::new(io::Error::other(format!("the database's encoding is {encoding}")));
        let cure = "create a database with ENCODING 'UTF8', and let [ledger] url name it";
        return Err(Failure::Unfit(Error::Refused { cure, source }));
    }
    match (schema, ledger, filled) {
        (false, ..) => Ok(State::Absent),
        (true, false, false) => Ok(State::Empty),
        (true, false, true) => Err(Failure::Unfit(Error::Foreign {
            place: format!("the schema countersign of {}", place(config)),
            cure: "let [ledger] url name another database, or rename this schema and a new ledger is begun",
        })),
        (true, true, _) => {
            let row = client.query_one("SELECT version FROM countersign.ledger", &[]).await?;
            let found = row.try_get(0)?;
            if found > known() {
                return Err(Failure::Unfit(Error::Newer { place: place(config), found, known: known() }));
            }
            Ok(State::Version(found))
        }
    }
}
