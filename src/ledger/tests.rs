mod files;
mod processes;
mod queries;
mod servers;

use std::time::Duration;

use integration_tests::postgres::Postgres as Server;
use rusqlite::Connection;

use super::*;
use crate::{clock::ManualClock, event::BY_HAND};

const START: &str = "2026-11-21T09:00:00.123456Z";

fn clock() -> (Clock, ManualClock) {
    Clock::manual(START.parse().unwrap())
}

/// Where a test's ledger is.
enum Place {
    /// In this folder.
    Sqlite(tempfile::TempDir),
    /// In this database.
    Postgres(&'static Server, String),
}

impl Place {
    fn sqlite() -> Self {
        Self::Sqlite(tempfile::tempdir().unwrap())
    }

    fn postgres() -> Self {
        let server = Server::shared();
        Self::Postgres(server, server.database().unwrap())
    }

    fn open(&self, clock: Clock) -> Ledger {
        open(&self.name(), clock).unwrap()
    }

    fn system(&self) -> Ledger {
        self.open(Clock::system())
    }

    /// By which another process opens it.
    fn name(&self) -> String {
        match self {
            Self::Sqlite(_) => self.path().to_str().unwrap().to_owned(),
            Self::Postgres(server, database) => server.url(database),
        }
    }

    /// Of the file.
    fn path(&self) -> PathBuf {
        match self {
            Self::Sqlite(folder) => folder.path().join("ledger.db"),
            Self::Postgres(..) => panic!("it is in no file"),
        }
    }

    /// What the tables themselves say.
    fn rows(&self, sql: &str) -> Vec<Vec<String>> {
        match self {
            Self::Sqlite(_) => {
                let connection = Connection::open(self.path()).unwrap();
                let mut statement = connection.prepare(sql).unwrap();
                let columns = statement.column_count();
                let text = |value: rusqlite::types::Value| match value {
                    rusqlite::types::Value::Integer(number) => number.to_string(),
                    rusqlite::types::Value::Text(text) => text,
                    other => panic!("{other:?}"),
                };
                let row = |row: &rusqlite::Row<'_>| (0..columns).map(|column| row.get(column).map(text)).collect();
                statement.query_map([], row).unwrap().collect::<Result<_, _>>().unwrap()
            }
            Self::Postgres(server, database) => {
                let answer = server.sql(database, &format!("SET search_path = countersign; {sql}")).unwrap();
                answer.lines().map(|line| line.split('|').map(str::to_owned).collect()).collect()
            }
        }
    }

    fn recount(&self) -> Sums {
        let mut sums = Sums::default();
        for row in self.rows("SELECT outcome, coalesce(reason, ''), count(*) FROM event GROUP BY outcome, reason") {
            let [outcome, reason, events] = row.as_slice() else { panic!("{row:?}") };
            let events = events.parse().unwrap();
            match outcome.as_str() {
                "signed" => sums.signed += events,
                "already_signed" => sums.already_signed += events,
                "dead" => sums.dead += events,
                "skipped" => {
                    sums.skipped += events;
                    sums.skip_reasons.insert(serde_json::from_value(reason.as_str().into()).unwrap(), events);
                }
                other => assert_eq!(other, "retrying"),
            }
        }
        sums
    }
}

/// By a URL or a path.
fn open(name: &str, clock: Clock) -> Result<Ledger, Error> {
    if name.starts_with("postgres://") { Ledger::connect(settings(name), clock) } else { Ledger::open(Path::new(name), clock) }
}

fn settings(url: &str) -> Postgres {
    Postgres { connection: url.parse().unwrap(), trust: Trust::Anything, limits: Limits::default() }
}

/// Makes a test of each of these functions and each backend.
macro_rules! on_each_backend {
    ($($name:ident),* $(,)?) => {
        mod on_sqlite {
            $(#[tokio::test] async fn $name() { super::$name(&$crate::ledger::tests::Place::sqlite()).await; })*
        }
        mod on_postgresql {
            $(#[tokio::test] async fn $name() { super::$name(&$crate::ledger::tests::Place::postgres()).await; })*
        }
    };
}
use on_each_backend;

fn event(n: u32) -> PushEvent {
    PushEvent {
        id: format!("sender-{n}"),
        source: "main".into(),
        registry: "registry.example.com".parse().unwrap(),
        repository: "production/app".parse().unwrap(),
        tag: Some(format!("v{n}").parse().unwrap()),
        digest: Digest::of(&n.to_le_bytes()),
        pushed_at: "2026-11-21T09:00:00.123456Z".parse().unwrap(),
        received_at: "2026-11-21T09:00:01Z".parse().unwrap(),
        actor: Some("ci \"bot\"\n".into()),
    }
}

fn message(n: u32) -> String {
    format!("message-{n}")
}

fn intent(n: u32) -> Intent {
    let event = event(n);
    let tag = event.tag.unwrap();
    Intent {
        message_id: message(n),
        rule: "production".into(),
        witness: "release".into(),
        key: "file:///keys/release.pem".into(),
        algorithm: Algorithm::EcdsaSha256,
        format: "cosign",
        reference: Reference::tagged(&event.registry, &event.repository, &tag),
        registry: event.registry,
        repository: event.repository,
        digest: event.digest,
        payload_sha256: [7; 32],
    }
}

fn result(intent: &Intent, state: SignatureState) -> SignatureResult {
    SignatureResult {
        rule: intent.rule.clone(),
        witness: intent.witness.clone(),
        format: intent.format,
        digest: intent.digest.clone(),
        reference: intent.reference.clone(),
        payload_sha256: intent.payload_sha256,
        state,
    }
}

fn conclusion(n: u32, outcome: Outcome) -> Conclusion {
    let state = match &outcome {
        Outcome::Signed => Some(SignatureState::Written),
        Outcome::AlreadySigned => Some(SignatureState::Found),
        Outcome::Retrying | Outcome::Dead => Some(SignatureState::Failed("the key is gone".into())),
        Outcome::Skipped(_) => None,
    };
    Conclusion {
        event: EventFacts::of(message(n), &event(n)),
        rules: vec![RuleOutcome { rule: "production".into(), outcome: outcome.clone(), detail: None }],
        signatures: state.map(|state| result(&intent(n), state)).into_iter().collect(),
        detail: matches!(outcome, Outcome::Retrying | Outcome::Dead).then(|| "the key is gone".to_owned()),
        outcome,
        attempt: 1,
    }
}

fn story_of(n: u32) -> StoryQuery {
    let event = event(n);
    StoryQuery { registry: event.registry, repository: event.repository, tag: event.tag, digest: None, limit: 10 }
}

async fn signatures_of(ledger: &Ledger, n: u32) -> Vec<SignatureRecord> {
    let event = event(n);
    ledger.signatures(&event.registry, &event.repository, &event.digest).await.unwrap()
}

on_each_backend!(
    what_is_recorded_is_told_again_unchanged,
    an_event_counts_once_under_its_latest_outcome,
    a_replayed_dead_letter_is_no_longer_dead,
    an_event_that_died_again_while_it_was_replayed_stays_dead,
    what_is_signed_by_hand_is_told_and_never_counted,
    an_intent_that_nobody_lived_to_conclude_stays_on_record_until_its_redelivery,
    asking_again_is_counted_and_open_again,
    another_key_is_another_record_and_the_one_asked_last_is_concluded,
    a_signature_that_is_found_is_recorded_once_and_never_replaces_that_we_wrote_it,
    texts_of_any_length_are_kept_shortened,
    of_certificates_made_at_the_same_moment_the_first_is_kept,
);

fn certificate(number: u32, pem: &str) -> KeptCertificate {
    KeptCertificate { witness: "release".into(), key: "key".into(), number, pem: pem.into() }
}

async fn of_certificates_made_at_the_same_moment_the_first_is_kept(place: &Place) {
    let (one, other) = (place.system(), place.system());
    assert_eq!(one.certificates("release", "key").await.unwrap(), []);
    one.keep_certificate(certificate(1, "first")).await.unwrap();
    other.keep_certificate(certificate(1, "second")).await.unwrap();
    other.keep_certificate(certificate(2, "renewed")).await.unwrap();
    one.keep_certificate(KeptCertificate { key: "other".into(), ..certificate(1, "another") }).await.unwrap();
    for ledger in [one, other] {
        let kept = ledger.certificates("release", "key").await.unwrap();
        assert_eq!(kept, [certificate(2, "renewed"), certificate(1, "first")]);
        assert_eq!(ledger.certificates("release", "other").await.unwrap().len(), 1);
        assert_eq!(ledger.certificates("staging", "key").await.unwrap(), []);
    }
}

async fn what_is_recorded_is_told_again_unchanged(place: &Place) {
    let (clock, hand) = clock();
    let ledger = place.open(clock.clone());

    let asked_at = clock.now();
    ledger.intend(vec![intent(1)]).await.unwrap();
    let open = signatures_of(&ledger, 1).await;
    assert_eq!(open[0].state, None);

    hand.advance(Duration::from_secs(1));
    let said = conclusion(1, Outcome::Signed);
    ledger.conclude(said.clone()).await.unwrap();

    let story = ledger.story(story_of(1)).await.unwrap();
    let expected = EventRecord {
        event: said.event,
        outcome: said.outcome,
        rules: said.rules,
        detail: said.detail,
        attempt: said.attempt,
        concluded_at: clock.now(),
    };
    assert_eq!(story, [expected]);
    let asked = Asked {
        key: "file:///keys/release.pem".into(),
        algorithm: Algorithm::EcdsaSha256,
        times: 1,
        first_at: asked_at,
        last_at: asked_at,
    };
    let expected = SignatureRecord {
        message_id: message(1),
        rule: "production".into(),
        witness: "release".into(),
        format: "cosign".into(),
        reference: intent(1).reference,
        payload_sha256: [7; 32],
        asked: Some(asked),
        state: Some(SignatureState::Written),
        concluded_at: Some(clock.now()),
    };
    assert_eq!(signatures_of(&ledger, 1).await, [expected]);
    assert_eq!(ledger.sums().await.unwrap(), Sums { signed: 1, ..Sums::default() });
    ledger.check().await.unwrap();
}

async fn an_event_counts_once_under_its_latest_outcome(place: &Place) {
    let ledger = place.system();
    let sums = async || ledger.sums().await.unwrap();

    ledger.conclude(conclusion(1, Outcome::Retrying)).await.unwrap();
    assert_eq!(sums().await, Sums::default(), "what is retried has not ended");
    for _redelivery in 0..3 {
        ledger.conclude(Conclusion { attempt: 2, ..conclusion(1, Outcome::Signed) }).await.unwrap();
        assert_eq!(sums().await, Sums { signed: 1, ..Sums::default() });
    }
    ledger.conclude(conclusion(1, Outcome::AlreadySigned)).await.unwrap();
    assert_eq!(sums().await, Sums { already_signed: 1, ..Sums::default() });

    ledger.conclude(conclusion(2, Outcome::Skipped(Skip::NoRule))).await.unwrap();
    ledger.conclude(conclusion(3, Outcome::Skipped(Skip::Disabled))).await.unwrap();
    ledger.conclude(conclusion(3, Outcome::Skipped(Skip::Superseded))).await.unwrap();
    let poison = EventFacts::poison(message(4), START.parse().unwrap());
    ledger
        .conclude(Conclusion { event: poison, rules: vec![], signatures: vec![], ..conclusion(4, Outcome::Dead) })
        .await
        .unwrap();
    let expected = Sums {
        already_signed: 1,
        skipped: 2,
        dead: 1,
        skip_reasons: [(Skip::NoRule, 1), (Skip::Superseded, 1)].into(),
        ..Sums::default()
    };
    assert_eq!(sums().await, expected);
    assert_eq!(place.recount(), expected);
    assert_eq!(expected.concluded(), 4);

    let story = ledger.story(story_of(1)).await.unwrap();
    assert_eq!(story.len(), 1, "one event, one record");
    assert_eq!(story[0].outcome, Outcome::AlreadySigned);
}

async fn a_replayed_dead_letter_is_no_longer_dead(place: &Place) {
    let ledger = place.system();
    ledger.conclude(conclusion(1, Outcome::Dead)).await.unwrap();
    ledger.conclude(conclusion(2, Outcome::Signed)).await.unwrap();

    for n in [1, 1, 2, 99] {
        ledger.forget_event(&message(n)).await.unwrap();
    }
    assert_eq!(ledger.sums().await.unwrap(), Sums { signed: 1, ..Sums::default() });
    let story = ledger.story(story_of(1)).await.unwrap();
    assert_eq!((&story[0].outcome, story[0].detail.as_deref()), (&Outcome::Retrying, Some("replayed: the key is gone")));

    ledger.conclude(conclusion(1, Outcome::Signed)).await.unwrap();
    assert_eq!(ledger.sums().await.unwrap(), Sums { signed: 2, ..Sums::default() });
    assert_eq!(place.recount(), ledger.sums().await.unwrap());
}

async fn an_event_that_died_again_while_it_was_replayed_stays_dead(place: &Place) {
    let (clock, hand) = clock();
    let ledger = place.open(clock.clone());
    ledger.conclude(conclusion(1, Outcome::Dead)).await.unwrap();
    let replayed_at = clock.now();
    hand.advance(Duration::from_millis(1));
    ledger.conclude(conclusion(1, Outcome::Dead)).await.unwrap();

    ledger.forget_event_until(&message(1), replayed_at).await.unwrap();
    assert_eq!(ledger.sums().await.unwrap(), Sums { dead: 1, ..Sums::default() });
    ledger.forget_event_until(&message(1), clock.now()).await.unwrap();
    assert_eq!(ledger.sums().await.unwrap(), Sums::default());
    assert_eq!(place.recount(), Sums::default());
}

async fn what_is_signed_by_hand_is_told_and_never_counted(place: &Place) {
    let ledger = place.system();
    for outcome in [Outcome::Dead, Outcome::Retrying, Outcome::Dead, Outcome::Signed] {
        let mut by_hand = conclusion(1, outcome);
        by_hand.event.source = Some(BY_HAND.into());
        ledger.conclude(by_hand).await.unwrap();
        ledger.forget_event(&message(1)).await.unwrap();
        assert_eq!(ledger.sums().await.unwrap(), Sums::default());
        assert_eq!(place.rows("SELECT coalesce(sum(abs(events)), 0) FROM tally"), [["0"]], "nor uncounted");
    }
    assert_eq!(ledger.story(story_of(1)).await.unwrap()[0].outcome, Outcome::Signed);
}

async fn an_intent_that_nobody_lived_to_conclude_stays_on_record_until_its_redelivery(place: &Place) {
    let ledger = place.system();
    ledger.intend(vec![intent(1), Intent { rule: "second".into(), ..intent(1) }]).await.unwrap();
    // The redelivery finds what the first delivery wrote before it was killed, and says so of one rule.
    ledger.conclude(conclusion(1, Outcome::AlreadySigned)).await.unwrap();
    let signatures = signatures_of(&ledger, 1).await;
    let told: Vec<_> = signatures.iter().map(|signature| (signature.rule.as_str(), signature.state.clone())).collect();
    assert_eq!(told, [("second", None), ("production", Some(SignatureState::Found))]);
}

async fn asking_again_is_counted_and_open_again(place: &Place) {
    let (clock, hand) = clock();
    let ledger = place.open(clock.clone());
    let first_at = clock.now();
    ledger.intend(vec![intent(1)]).await.unwrap();
    ledger.conclude(conclusion(1, Outcome::Retrying)).await.unwrap();
    assert_eq!(signatures_of(&ledger, 1).await[0].state, Some(SignatureState::Failed("the key is gone".into())));
    hand.advance(Duration::from_secs(60));
    ledger.intend(vec![intent(1)]).await.unwrap();

    let signatures = signatures_of(&ledger, 1).await;
    let asked = signatures[0].asked.clone().unwrap();
    assert_eq!((asked.times, asked.first_at, asked.last_at), (2, first_at, clock.now()));
    assert_eq!((signatures.len(), &signatures[0].state, signatures[0].concluded_at), (1, &None, None));
}

async fn another_key_is_another_record_and_the_one_asked_last_is_concluded(place: &Place) {
    let (clock, hand) = clock();
    let ledger = place.open(clock);
    for key in ["file:///old.pem", "file:///new.pem", "file:///old.pem"] {
        ledger.intend(vec![Intent { key: key.into(), ..intent(1) }]).await.unwrap();
        hand.advance(Duration::from_secs(1));
    }
    ledger.conclude(conclusion(1, Outcome::Signed)).await.unwrap();
    let signatures = signatures_of(&ledger, 1).await;
    let told: Vec<_> = signatures.iter().map(|s| (s.asked.clone().unwrap().key, s.state.clone())).collect();
    assert_eq!(
        told,
        [("file:///new.pem".into(), None), ("file:///old.pem".to_owned(), Some(SignatureState::Written))],
        "what became of the other is not known"
    );
}

async fn a_signature_that_is_found_is_recorded_once_and_never_replaces_that_we_wrote_it(place: &Place) {
    let ledger = place.system();
    ledger.intend(vec![intent(1)]).await.unwrap();
    ledger.conclude(conclusion(1, Outcome::Signed)).await.unwrap();
    // A replay of the same event, and another event of the same image.
    ledger.conclude(conclusion(1, Outcome::AlreadySigned)).await.unwrap();
    let mut other = conclusion(1, Outcome::AlreadySigned);
    other.event.message_id = "another".into();
    ledger.conclude(other).await.unwrap();
    let signatures = signatures_of(&ledger, 1).await;
    assert_eq!(signatures.len(), 1);
    assert_eq!(signatures[0].state, Some(SignatureState::Written));

    // One that nobody here asked a key for.
    for _event in 0..3 {
        ledger.conclude(conclusion(2, Outcome::AlreadySigned)).await.unwrap();
    }
    let signatures = signatures_of(&ledger, 2).await;
    assert_eq!(signatures.len(), 1);
    assert_eq!((&signatures[0].asked, &signatures[0].state), (&None, &Some(SignatureState::Found)));
}

async fn texts_of_any_length_are_kept_shortened(place: &Place) {
    let ledger = place.system();
    let mut long = conclusion(1, Outcome::Dead);
    long.detail = Some("ü\0".repeat(100_000));
    long.event.actor = Some("ü".repeat(100_000));
    ledger.conclude(long).await.unwrap();
    let story = ledger.story(story_of(1)).await.unwrap();
    let expected = if matches!(place, Place::Sqlite(_)) { "ü\0ü" } else { "ü\u{2400}ü" };
    assert!(story[0].detail.as_ref().unwrap().starts_with(expected));
    assert_eq!(story[0].event.actor.as_ref().unwrap().len(), LONGEST_DETAIL);
}

#[test]
fn nothing_to_do_with_the_disk_kills_an_event() {
    let source = Arc::new(rusqlite::Error::InvalidQuery);
    assert_eq!(Error::Unavailable { what: "written", source }.verdict(), Verdict::TRANSIENT);
    assert_eq!(Error::Closed.verdict(), Verdict::TRANSIENT);
}
