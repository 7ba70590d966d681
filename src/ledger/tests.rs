use std::time::Duration;

use super::*;
use crate::clock::ManualClock;

const START: &str = "2026-11-21T09:00:00.123456Z";

fn clock() -> (Clock, ManualClock) {
    Clock::manual(START.parse().unwrap())
}

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

#[tokio::test]
async fn what_is_recorded_is_told_again_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let (clock, hand) = clock();
    let ledger = Ledger::open(&folder.path().join("ledger.db"), clock.clone()).unwrap();

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
