//! What only a database server can do to a ledger, and several replicas to each other.

use std::{
    error::Error as _,
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, Command},
    thread,
    time::Instant,
};

use futures::future::{join_all, try_join_all};
use integration_tests::{
    postgres::{PASSWORD, USER},
    proxy::Proxy,
};

use super::*;
use crate::config::{self, Config};

fn place() -> (&'static Server, String, Place) {
    let place = Place::postgres();
    let Place::Postgres(server, database) = &place else { unreachable!() };
    (*server, database.clone(), place)
}

fn connect(url: &str) -> Ledger {
    Ledger::connect(settings(url), Clock::system()).unwrap()
}

/// With little patience, which is still enough for a busy machine.
fn impatient(url: &str) -> Ledger {
    let limits = Limits { connect: Duration::from_secs(10), statement: Duration::from_secs(5) };
    Ledger::connect(Postgres { limits, ..settings(url) }, Clock::system()).unwrap()
}

/// Until it does, for as long as a database may need to come back.
async fn in_the_end<T>(mut ask: impl AsyncFnMut() -> Result<T, Error>) -> T {
    let start = Instant::now();
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(error) => {
                assert_eq!(error.verdict(), Verdict::TRANSIENT, "{error:?}");
                assert!(start.elapsed() < Duration::from_secs(60), "it has not recovered: {error:?}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

/// Another session, which holds a lock on the events until it is dropped.
struct Holder(Child);

impl Holder {
    fn of(server: &Server, database: &str) -> Self {
        let mut session = server.session(database).unwrap();
        let sql = "BEGIN; LOCK TABLE countersign.event IN ACCESS EXCLUSIVE MODE; SELECT 'locked';\n";
        session.stdin.as_mut().unwrap().write_all(sql.as_bytes()).unwrap();
        let mut line = String::new();
        BufReader::new(session.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "locked\n");
        Self(session)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        drop(self.0.wait());
    }
}

/// Waits until somebody in the database waits for a lock.
async fn somebody_waits(server: &Server, database: &str) {
    let question = "SELECT count(*) FROM pg_locks WHERE NOT granted
                       AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    while server.sql(database, question).unwrap() == "0" {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn replicas_of_a_new_version_that_start_at_once_bring_the_ledger_up_with_what_is_in_it() {
    let (server, database, place) = place();
    let url = server.url(&database);
    place.system().conclude(conclusion(1, Outcome::Signed)).await.unwrap();
    server.sql(&database, "DROP TABLE countersign.certificate; UPDATE countersign.ledger SET version = 1").unwrap();

    let replicas: Vec<_> = (0..8).map(|_| connect(&url)).collect();
    for result in join_all(replicas.iter().map(Ledger::check)).await {
        result.unwrap();
    }
    assert_eq!(place.rows("SELECT version FROM ledger"), [["2"]]);
    replicas[3].keep_certificate(certificate(1, "a")).await.unwrap();
    assert_eq!(replicas[5].certificates("release", "key").await.unwrap(), [certificate(1, "a")]);
    assert_eq!(replicas[7].sums().await.unwrap().signed, 1);
}

#[tokio::test]
async fn replicas_that_start_at_once_make_one_ledger() {
    let (server, database, _place) = place();
    let replicas: Vec<_> = (0..8).map(|_| connect(&server.url(&database))).collect();
    for result in join_all(replicas.iter().map(Ledger::check)).await {
        result.unwrap();
    }
    assert_eq!(server.sql(&database, "SELECT version FROM countersign.ledger").unwrap(), "2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_that_tell_of_the_same_events_at_once_count_each_once() {
    let (server, database, place) = place();
    let replicas: Vec<_> = (0..3).map(|_| connect(&server.url(&database))).collect();
    let outcomes = [
        Outcome::Signed,
        Outcome::AlreadySigned,
        Outcome::Skipped(Skip::NoRule),
        Outcome::Dead,
        Outcome::Retrying,
        Outcome::Dead,
    ];
    let work = (0..1200).map(|number: u32| {
        // Each event is told of by all, by one of them in another order, and dead ones are replayed.
        let (place, replica) = (number / 3 % 100, number % 3);
        let (n, replica) = (if replica == 0 { place } else { 99 - place }, &replicas[replica as usize]);
        let outcome = outcomes[(number / 7) as usize % outcomes.len()].clone();
        async move {
            replica.intend(vec![intent(n)]).await?;
            replica.conclude(conclusion(n, outcome)).await?;
            if number.is_multiple_of(5) { replica.forget_event(&message(n)).await } else { Ok(()) }
        }
    });
    try_join_all(work).await.unwrap();
    let sums = replicas[0].sums().await.unwrap();
    assert_eq!(sums, place.recount());
    assert_eq!(place.rows("SELECT count(*) FROM event"), [["100"]]);
    assert_eq!(place.rows("SELECT count(*), sum(asked) FROM signature"), [["100", "1200"]]);
}

#[tokio::test]
async fn who_waits_at_the_same_moment_shares_a_commit() {
    let (server, database, place) = place();
    let ledger = connect(&server.url(&database));
    ledger.check().await.unwrap();
    try_join_all((0..500).map(|n| ledger.intend(vec![intent(n)]))).await.unwrap();
    try_join_all((0..500).map(|n| ledger.conclude(conclusion(n, Outcome::Signed)))).await.unwrap();
    let commits = |table| place.rows(&format!("SELECT count(DISTINCT xmin::text) FROM {table}"))[0][0].parse::<u32>().unwrap();
    let (events, signatures) = (commits("event"), commits("signature"));
    assert!(events < 20 && signatures < 20, "{events} and {signatures} commits for 500 events");
    assert_eq!(ledger.sums().await.unwrap(), Sums { signed: 500, ..Sums::default() });
}

#[tokio::test]
async fn a_database_that_is_away_at_first_and_killed_later_loses_nothing_that_was_promised() {
    const EVENTS: u32 = 900;
    let mut server = Server::start().unwrap();
    let database = server.database().unwrap();
    let url = server.url(&database);
    server.stop().unwrap();
    let ledger = connect(&url);
    let error = ledger.intend(vec![intent(0)]).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { what: "written", .. }), "{error:?}");
    assert!(matches!(ledger.sums().await.unwrap_err(), Error::Unavailable { what: "read", .. }));
    server.start_again().unwrap();

    let killing = thread::spawn(move || {
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(fastrand::u64(20..300)));
            server.kill().unwrap();
            server.start_again().unwrap();
        }
        server
    });
    let one = |n| {
        let ledger = &ledger;
        async move {
            in_the_end(async || ledger.intend(vec![intent(n)]).await).await;
            assert!(
                !in_the_end(async || {
                    let event = event(n);
                    ledger.signatures(&event.registry, &event.repository, &event.digest).await
                })
                .await
                .is_empty()
            );
            in_the_end(async || ledger.conclude(conclusion(n, Outcome::Signed)).await).await;
        }
    };
    let lanes = (0..30).map(|lane| async move {
        for n in (lane..EVENTS).step_by(30) {
            one(n).await;
        }
    });
    join_all(lanes).await;
    let server = killing.join().unwrap();
    in_the_end(async || ledger.check().await).await;
    assert_eq!(ledger.sums().await.unwrap(), Sums { signed: u64::from(EVENTS), ..Sums::default() });
    let rows = server.sql(&database, "SELECT count(*), count(*) FILTER (WHERE state = 'written') FROM countersign.signature");
    assert_eq!(rows.unwrap(), format!("{EVENTS}|{EVENTS}"));
}

#[tokio::test]
async fn a_connection_that_is_cut_within_a_transaction_costs_nothing() {
    let (server, database, place) = place();
    let proxy = Proxy::start(&server.host()).await.unwrap();
    let ledger = connect(&server.url(&database).replace(&server.host(), &proxy.host()));
    ledger.check().await.unwrap();
    let holder = Holder::of(server, &database);
    let concluding = ledger.conclude(conclusion(1, Outcome::Signed));
    let cutting = async {
        somebody_waits(server, &database).await;
        proxy.cut();
        drop(holder);
    };
    let (concluded, ()) = futures::join!(concluding, cutting);
    concluded.unwrap();
    assert_eq!(ledger.sums().await.unwrap(), Sums { signed: 1, ..Sums::default() });
    assert_eq!(place.recount(), ledger.sums().await.unwrap());

    // And one that is cut while nothing is said.
    proxy.cut();
    ledger.conclude(conclusion(2, Outcome::Signed)).await.unwrap();
    proxy.cut();
    assert_eq!(ledger.sums().await.unwrap(), Sums { signed: 2, ..Sums::default() });
}

#[tokio::test]
async fn a_statement_that_takes_too_long_is_given_up_and_nothing_of_it_is_recorded() {
    let (server, database, place) = place();
    let ledger = impatient(&server.url(&database));
    ledger.check().await.unwrap();
    let holder = Holder::of(server, &database);
    let error = ledger.conclude(conclusion(1, Outcome::Signed)).await.unwrap_err();
    assert_eq!(error.verdict(), Verdict::TRANSIENT);
    assert!(error.source().unwrap().source().unwrap().to_string().contains("statement timeout"), "{error:?}");
    drop(holder);
    assert_eq!(place.recount(), Sums::default());
    ledger.conclude(conclusion(1, Outcome::Signed)).await.unwrap();
    assert_eq!(in_the_end(async || ledger.sums().await).await, place.recount());
}

#[tokio::test]
async fn a_server_that_falls_silent_is_not_waited_for() {
    let server = Server::start().unwrap();
    let database = server.database().unwrap();
    let ledger = impatient(&server.url(&database));
    ledger.check().await.unwrap();
    server.signal_all("STOP").unwrap();
    let start = Instant::now();
    let (written, read) = futures::join!(ledger.intend(vec![intent(1)]), ledger.sums());
    assert_eq!(written.unwrap_err().verdict(), Verdict::TRANSIENT);
    assert_eq!(read.unwrap_err().verdict(), Verdict::TRANSIENT);
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    server.signal_all("CONT").unwrap();
    in_the_end(async || ledger.intend(vec![intent(2)]).await).await;
}

/// Of the first word that it says to a database.
async fn refusal(url: &str) -> (Error, &'static str) {
    let ledger = connect(url);
    let error = ledger.check().await.unwrap_err();
    let told = format!("{ledger:?} {:?} {error:?} {error} {:?}", settings(url), error.source().map(ToString::to_string));
    assert!(!told.contains("the-secret") && !told.contains("wrong-secret"), "{told}");
    match error.verdict() {
        Verdict::Refuse { cure } => (error, cure),
        other => panic!("{other:?}: {error:?}"),
    }
}

#[tokio::test]
async fn what_an_administrator_has_to_do_is_said() {
    let (server, database, _place) = place();
    let url = server.url(&database);
    for (url, expected) in [
        (url.replace(PASSWORD, "wrong-secret"), "correct the user and password"),
        (url.replace(&format!(":{PASSWORD}"), ""), "write the user's password"),
        (url.replace(USER, "nobody_here"), "correct the user and password"),
        (url.replace(&database, "no_such_database"), "create the database"),
    ] {
        let (error, cure) = refusal(&url).await;
        assert!(cure.contains(expected), "{cure}: {error:?}");
        assert!(matches!(error, Error::Refused { .. }), "{error:?}");
    }

    // A database that is another user's: without the right to make a schema, and with a schema made for us.
    server.sql("postgres", &format!("ALTER DATABASE {database} OWNER TO postgres")).unwrap();
    let (_, cure) = refusal(&url).await;
    assert!(cure.contains("GRANT CREATE ON DATABASE"), "{cure}");
    server.sql(&database, &format!("CREATE SCHEMA countersign AUTHORIZATION {USER}")).unwrap();
    connect(&url).check().await.unwrap();

    let latin = server.database().unwrap();
    server.sql("postgres", &format!("DROP DATABASE {latin}")).unwrap();
    let create = format!("CREATE DATABASE {latin} OWNER {USER} ENCODING 'LATIN1' TEMPLATE template0");
    server.sql("postgres", &create).unwrap();
    let (_, cure) = refusal(&server.url(&latin)).await;
    assert!(cure.contains("UTF8"), "{cure}");
}

#[tokio::test]
async fn another_programs_schema_and_a_newer_versions_ledger_are_refused_and_left_as_they_are() {
    let (server, database, _place) = place();
    let url = server.url(&database);
    let tables =
        || server.sql(&database, "SELECT relname FROM pg_class WHERE relnamespace = 'countersign'::regnamespace").unwrap();
    server.sql(&database, "CREATE SCHEMA countersign; CREATE TABLE countersign.queue (id int)").unwrap();
    server.sql(&database, &format!("ALTER SCHEMA countersign OWNER TO {USER}")).unwrap();
    let (error, cure) = refusal(&url).await;
    assert!(matches!(error, Error::Foreign { .. }) && cure.contains("rename this schema"), "{error:?}");
    assert_eq!(tables(), "queue");

    server.sql(&database, "DROP SCHEMA countersign CASCADE").unwrap();
    connect(&url).check().await.unwrap();
    let before = tables();
    server.sql(&database, "UPDATE countersign.ledger SET version = 3").unwrap();
    let (error, _) = refusal(&url).await;
    assert!(matches!(error, Error::Newer { found: 3, known: 2, .. }), "{error:?}");
    assert!(error.to_string().contains(&server.host()) && error.to_string().ends_with("use a newer one"), "{error}");
    assert_eq!(tables(), before);
}

#[tokio::test]
async fn a_database_that_may_only_be_read_is_waited_for() {
    let (server, database, _place) = place();
    let ledger = connect(&server.url(&database));
    ledger.check().await.unwrap();
    let end_sessions = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                         WHERE datname = current_database() AND pid <> pg_backend_pid()";
    // As a standby, and a primary that has become one.
    server.sql("postgres", &format!("ALTER DATABASE {database} SET default_transaction_read_only = on")).unwrap();
    server.sql(&database, end_sessions).unwrap();
    let error = ledger.intend(vec![intent(1)]).await.unwrap_err();
    assert_eq!(error.verdict(), Verdict::TRANSIENT, "{error:?}");
    server.sql("postgres", &format!("ALTER DATABASE {database} RESET default_transaction_read_only")).unwrap();
    in_the_end(async || ledger.intend(vec![intent(1)]).await).await;
}

#[tokio::test]
async fn with_many_events_every_answer_comes_from_an_index() {
    let (server, database, place) = place();
    let ledger = connect(&server.url(&database));
    ledger.conclude(conclusion(1, Outcome::Signed)).await.unwrap();
    let bulk = "INSERT INTO countersign.event (message, repository, tag, digest, outcome, attempt, concluded_at)
                SELECT 'bulk-' || n, 'registry.example.com/bulk/r' || n % 1000, 'v' || n / 1000, sha256(n::text::bytea), 'signed', 1, now()
                  FROM generate_series(0, 49999) AS n;
                INSERT INTO countersign.signature (identity, claim, message, rule, witness, format, repository, digest, reference,
                                                   payload, asked)
                SELECT sha256(id::text::bytea), sha256(message::bytea), message, 'r', 'w', 'cosign', repository, digest, '@', digest, 0
                  FROM countersign.event";
    server.sql(&database, bulk).unwrap();
    for (tag, digest) in [(true, false), (false, true), (true, true), (false, false)] {
        let tag = event(1).tag.filter(|_| tag);
        let query = StoryQuery { tag, digest: Some(event(1).digest).filter(|_| digest), ..story_of(1) };
        // Often enough for a plan that is kept.
        for _ in 0..12 {
            assert_eq!(ledger.story(query.clone()).await.unwrap().len(), 1);
        }
    }
    for n in 1..20 {
        signatures_of(&ledger, n).await;
        ledger.intend(vec![intent(n)]).await.unwrap();
        ledger.conclude(conclusion(n, Outcome::AlreadySigned)).await.unwrap();
        ledger.conclude(conclusion(n + 100, Outcome::AlreadySigned)).await.unwrap();
        ledger.forget_event(&message(n)).await.unwrap();
    }
    // A session's counts are there when it has ended.
    drop(ledger);
    let sessions =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'countersign'";
    while server.sql(&database, sessions).unwrap() != "0" {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let scans = "SELECT coalesce(sum(seq_tup_read), 0) FROM pg_stat_user_tables
                  WHERE schemaname = 'countersign' AND relname = 'event'";
    // The bulk insert read them once, for the signatures.
    assert_eq!(place.rows(scans), [["50001"]]);
}

/// As the configuration has it.
fn configured(url: &str) -> Postgres {
    let text = format!("[ledger]\nurl = \"{url}\"\n");
    match Config::parse(&text, Path::new("/countersign.toml")).unwrap().0.ledger {
        config::Ledger::Postgres(settings) => *settings,
        config::Ledger::Sqlite { path } => panic!("{}", path.display()),
    }
}

#[tokio::test]
async fn sslmode_means_what_it_means_to_libpq() {
    let folder = tempfile::tempdir().unwrap();
    let openssl = |arguments: &str| {
        let done = Command::new("openssl").args(arguments.split(' ')).current_dir(folder.path()).output();
        let done = done.expect("openssl must be installed: apt-get install openssl");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    };
    std::fs::write(folder.path().join("san"), "subjectAltName=DNS:localhost\n").unwrap();
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    openssl(&format!("req -x509 {key} -subj /CN=authority -days 2 -keyout ca.key -out ca.pem"));
    openssl(&format!("req {key} -subj /CN=database -keyout key.pem -out request.pem"));
    openssl("x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile san -out certificate.pem");

    let mut server = Server::start().unwrap();
    let database = server.database().unwrap();
    let plain = server.url(&database);
    for name in ["certificate.pem", "key.pem"] {
        server.hand_over(name, &std::fs::read(folder.path().join(name)).unwrap()).unwrap();
    }
    let ca = folder.path().join("ca.pem");
    let port = server.host().rsplit_once(':').unwrap().1.to_owned();
    let url = |host: &str, parameters: &str| {
        format!("postgres://{USER}:{PASSWORD}@{host}:{port}/{database}?{parameters}").replace("CA", ca.to_str().unwrap())
    };
    let works = async |url: String| Ledger::connect(configured(&url), Clock::system()).unwrap().check().await;

    works(plain).await.unwrap();
    works(url("localhost", "sslmode=prefer")).await.unwrap();
    assert_eq!(works(url("localhost", "sslmode=require")).await.unwrap_err().verdict(), Verdict::TRANSIENT, "it has no TLS yet");

    let files = server.folder().display().to_string();
    for setting in
        [format!("ssl_cert_file='{files}/certificate.pem'"), format!("ssl_key_file='{files}/key.pem'"), "ssl=on".into()]
    {
        server.sql("postgres", &format!("ALTER SYSTEM SET {setting}")).unwrap();
    }
    server.stop().unwrap();
    server.start_again().unwrap();
    server.sql("postgres", &format!("ALTER DATABASE {database} OWNER TO {USER}")).unwrap();
    for parameters in [
        "sslmode=disable",
        "sslmode=prefer",
        "application_name=default",
        "sslmode=require",
        "sslmode=require&sslrootcert=CA",
        "sslmode=verify-ca&sslrootcert=CA",
    ] {
        works(url("127.0.0.1", parameters)).await.unwrap_or_else(|error| panic!("{parameters}: {error:?}"));
    }
    works(url("localhost", "sslmode=verify-full&sslrootcert=CA")).await.unwrap();
    for (host, parameters) in [
        ("127.0.0.1", "sslmode=verify-full&sslrootcert=CA"),
        ("localhost", "sslmode=verify-full"),
        ("localhost", "sslmode=verify-ca"),
        ("localhost", "sslmode=verify-full&sslrootcert=system"),
    ] {
        let error = works(url(host, parameters)).await.unwrap_err();
        assert!(format!("{error:?}").contains("InvalidCertificate"), "{host} {parameters}: {error:?}");
    }
    // Over the socket there is none, whatever is asked for.
    let socket = format!("postgres://postgres@/{database}?host={files}&port={port}&sslmode=verify-full");
    works(socket).await.unwrap();
}
