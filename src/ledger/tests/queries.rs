//! What `explain` asks.

use rusqlite::{StatementStatus, named_params};

use super::*;

on_each_backend!(
    a_story_is_told_by_tag_by_digest_by_both_and_of_the_whole_repository_newest_first,
    what_rules_made_of_messages_is_told_of_those_that_are_on_record,
    long_digests_and_references_to_elsewhere_are_told_unchanged,
);

async fn a_story_is_told_by_tag_by_digest_by_both_and_of_the_whole_repository_newest_first(place: &Place) {
    let ledger = place.system();
    // (message, repository, tag, digest): a tag that moved, a digest of two tags, and the same in another repository.
    for (n, repository, tag, content) in [
        (1, "production/app", Some("latest"), "a"),
        (2, "production/app", Some("v1"), "a"),
        (3, "production/app", None, "a"),
        (4, "production/app", Some("latest"), "b"),
        (5, "production/application", Some("latest"), "a"),
    ] {
        let mut conclusion = conclusion(n, Outcome::Skipped(Skip::Disabled));
        conclusion.event.repository = Some(repository.parse().unwrap());
        conclusion.event.tag = tag.map(|tag| tag.parse().unwrap());
        conclusion.event.digest = Some(Digest::of(content.as_bytes()));
        ledger.conclude(conclusion).await.unwrap();
    }
    ledger.conclude(conclusion(1, Outcome::Signed)).await.unwrap();

    let told = async |tag: Option<&str>, content: Option<&str>, limit| {
        let query = StoryQuery {
            registry: "registry.example.com".parse().unwrap(),
            repository: "production/app".parse().unwrap(),
            tag: tag.map(|tag| tag.parse().unwrap()),
            digest: content.map(|content| Digest::of(content.as_bytes())),
            limit,
        };
        let story = ledger.story(query).await.unwrap();
        story.iter().map(|record| record.event.message_id[8..].parse().unwrap()).collect::<Vec<u32>>()
    };
    assert_eq!(told(Some("latest"), None, 10).await, [4, 1]);
    assert_eq!(told(None, Some("a"), 10).await, [3, 2, 1]);
    assert_eq!(told(Some("latest"), Some("a"), 10).await, [1]);
    assert_eq!(told(None, None, 10).await, [4, 3, 2, 1]);
    assert_eq!(told(None, None, 2).await, [4, 3]);
    assert_eq!(told(None, Some("a"), 1).await, [3]);
    assert_eq!(told(Some("v2"), None, 10).await, [] as [u32; 0]);
}

async fn what_rules_made_of_messages_is_told_of_those_that_are_on_record(place: &Place) {
    let ledger = place.system();
    let rules = vec![
        RuleOutcome { rule: "one".into(), outcome: Outcome::Dead, detail: Some("denied".into()) },
        RuleOutcome { rule: "two".into(), outcome: Outcome::Skipped(Skip::Disabled), detail: None },
    ];
    ledger.conclude(Conclusion { rules: rules.clone(), ..conclusion(1, Outcome::Dead) }).await.unwrap();
    ledger.conclude(Conclusion { rules: vec![], ..conclusion(2, Outcome::Dead) }).await.unwrap();
    let id = |n| conclusion(n, Outcome::Dead).event.message_id;
    let told = ledger.rule_outcomes(vec![id(1), id(2), id(3)]).await.unwrap();
    assert_eq!(told, [(id(1), rules), (id(2), vec![])].into());
    assert!(ledger.rule_outcomes(vec![]).await.unwrap().is_empty());
}

async fn long_digests_and_references_to_elsewhere_are_told_unchanged(place: &Place) {
    let ledger = place.system();
    let sha512: Digest = format!("sha512:{}", "0f".repeat(64)).parse().unwrap();
    let mut references: Vec<Reference> = vec![
        Reference::pinned(&intent(1).registry, &intent(1).repository, &sha512),
        Reference::tagged(&intent(1).registry, &intent(1).repository, &"v1".parse().unwrap()),
        Reference::pinned(&intent(1).registry, &intent(1).repository, &Digest::of(b"another")),
        "mirror.example.com/production/app:v1".parse().unwrap(),
        format!("registry.example.com/production/app:v1@{sha512}").parse().unwrap(),
        "registry.example.com/production/app".parse().unwrap(),
    ];
    for reference in &references {
        let intent = Intent { digest: sha512.clone(), reference: reference.clone(), ..intent(1) };
        ledger.intend(vec![intent.clone()]).await.unwrap();
        let signatures = vec![result(&intent, SignatureState::Written)];
        ledger.conclude(Conclusion { signatures, ..conclusion(1, Outcome::Signed) }).await.unwrap();
    }
    let told = ledger.signatures(&intent(1).registry, &intent(1).repository, &sha512).await.unwrap();
    references.reverse();
    assert_eq!(told.iter().map(|signature| signature.reference.clone()).collect::<Vec<_>>(), references);
    assert!(told.iter().all(|signature| signature.state == Some(SignatureState::Written)));
    let elsewhere = "production/other".parse().unwrap();
    assert_eq!(ledger.signatures(&intent(1).registry, &elsewhere, &sha512).await.unwrap(), []);
}

#[tokio::test]
async fn with_two_hundred_thousand_events_every_answer_comes_from_an_index() {
    const EVENTS: u32 = 200_000;
    let place = Place::sqlite();
    let (path, ledger) = (place.path(), place.system());
    ledger.intend(vec![intent(1)]).await.unwrap();
    ledger.conclude(conclusion(1, Outcome::Signed)).await.unwrap();
    let connection = Connection::open(&path).unwrap();
    // A thousand repositories of two hundred tags, each a digest.
    connection
        .execute_batch(&format!(
            "BEGIN;
             INSERT INTO word (text) SELECT 'registry.example.com/bulk/r' || value FROM (
                WITH RECURSIVE n (value) AS (SELECT 0 UNION ALL SELECT value + 1 FROM n WHERE value < 999) SELECT value FROM n);
             WITH RECURSIVE n (value) AS (SELECT 0 UNION ALL SELECT value + 1 FROM n WHERE value < {EVENTS} - 1)
             INSERT INTO event (message, repository, tag, subject, outcome, attempt, concluded_at)
                SELECT 'bulk-' || value, (SELECT id FROM word WHERE text = 'registry.example.com/bulk/r' || (value % 1000)),
                       'v' || (value / 1000), 1000 + value, 'signed', 1, 0 FROM n;
             INSERT INTO subject (id, digest, repository)
                SELECT subject, randomblob(32), repository FROM event WHERE message LIKE 'bulk-%';
             INSERT INTO signature (message, rule, witness, format, subject, reference, payload, asked)
                SELECT message, 1, 1, 1, subject, ':' || tag, randomblob(32), 0 FROM event WHERE message LIKE 'bulk-%';
             COMMIT;"
        ))
        .unwrap();

    let mut query = story_of(1);
    for (tag, digest) in [(true, false), (false, true), (true, true), (false, false)] {
        query.tag = event(1).tag.filter(|_| tag);
        query.digest = Some(event(1).digest).filter(|_| digest);
        let index = if digest { "event_by_subject" } else { "event_by_tag" };
        let plan = plan(&connection, &sqlite::story_sql(&query));
        assert!(plan.contains(&format!("INDEX {index} ")) && !plan.contains("SCAN"), "{plan}");
        assert_eq!(ledger.story(query.clone()).await.unwrap().len(), 1);
    }
    let plan = plan(&connection, sqlite::SIGNATURES);
    assert!(plan.contains("INDEX signature_by_subject (subject=?)") && !plan.contains("SCAN"), "{plan}");
    assert_eq!(signatures_of(&ledger, 1).await.len(), 1);

    // And counted: not one row is looked at that the index did not name.
    let mut story = connection.prepare(&sqlite::story_sql(&query)).unwrap();
    let parameters = named_params! {
        ":repository": "registry.example.com/bulk/r7", ":tag": Option::<String>::None, ":digest": Option::<Vec<u8>>::None, ":limit": 50
    };
    assert_eq!(story.query_map(parameters, |_| Ok(())).unwrap().count(), 50);
    assert_eq!(story.get_status(StatementStatus::FullscanStep), 0);
}

fn plan(connection: &Connection, sql: &str) -> String {
    let mut plan = connection.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
    let lines = plan.raw_query().mapped(|row| row.get::<_, String>("detail"));
    lines.collect::<Result<Vec<_>, _>>().unwrap().join("\n")
}
