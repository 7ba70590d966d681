use async_trait::async_trait;
use axum::body::Body;
use http::{Request, header};
use http_body_util::BodyExt;
use queue::{DeadLetter, Delivery, Embedded, Kept, Message};
use serde_json::{Value, json};
use tower::ServiceExt;

use super::*;
use crate::{
    cli::{Client, Output, QueueCommand, ReplayArgs, Selection, queue as command},
    pipeline::tests::{House, fake::NAME, rule},
};

fn admin(house: &House, pipeline: Option<Arc<Pipeline>>) -> Admin {
    Admin { queue: house.queue.clone(), ledger: house.ledger.clone(), pipeline, rules: Arc::default(), clock: Clock::system() }
}

async fn ask(router: &Router, method: &str, path: &str, body: Option<Value>) -> (StatusCode, Value) {
    let request = Request::builder().method(method).uri(path).header(header::CONTENT_TYPE, "application/json");
    let request = request.body(body.map_or_else(Body::empty, |body| Body::from(body.to_string()))).unwrap();
    let response = router.clone().oneshot(request).await.unwrap();
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap_or_default())
}

async fn get(router: &Router, path: &str) -> Value {
    let (status, answer) = ask(router, "GET", path, None).await;
    assert_eq!(status, StatusCode::OK, "{path}: {answer}");
    answer
}

async fn post(router: &Router, path: &str, body: Value) -> Value {
    let (status, answer) = ask(router, "POST", path, Some(body)).await;
    assert_eq!(status, StatusCode::OK, "{path}: {answer}");
    answer
}

/// Every event is somewhere.
fn assert_sums(status: &Value) {
    let count = |name: &str| status[name].as_u64().unwrap();
    let sum = ["signed", "already_signed", "skipped", "dead", "queued"].map(count).iter().sum::<u64>();
    assert_eq!(count("received"), sum, "{status}");
}

#[tokio::test]
async fn dead_letters_are_paged_replayed_and_discarded_and_the_sums_go_on_adding_up() {
    let house = House::new().await;
    let pipeline = Arc::new(house.pipeline(vec![rule("denied", "denied")]));
    let router = router(admin(&house, None));
    for name in ["a", "b", "c"] {
        let digest = house.image(name);
        house.push(Some("1.0"), &digest).await;
    }
    house.settle(&pipeline).await;

    let first = get(&router, "/api/v1/queue/dead?limit=2").await;
    let ids: Vec<_> =
        first["letters"].as_array().unwrap().iter().map(|letter| letter["id"].as_str().unwrap().to_owned()).collect();
    let letter = &first["letters"][0];
    assert_eq!((letter["repository"].as_str(), letter["kind"].as_str()), (Some("team/app"), Some("refused")));
    assert_eq!((letter.get("body"), first["next"].as_str()), (None, Some(&*ids[1])));
    let rest = get(&router, &format!("/api/v1/queue/dead?after={}", ids[1])).await;
    assert_eq!((ids.len(), rest["letters"].as_array().unwrap().len()), (2, 1));

    let moved = post(&router, "/api/v1/queue/discard", json!({ "ids": [ids[0], "no such id"] })).await;
    assert_eq!(moved, json!({ "done": 1, "unknown": ["no such id"] }));
    let moved = post(&router, "/api/v1/queue/replay", json!({ "ids": [ids[0], ids[1]] })).await;
    assert_eq!(moved, json!({ "done": 1, "unknown": [ids[0]] }));
    let status = get(&router, "/api/v1/queue").await;
    assert_sums(&status);
    assert_eq!(
        (status["dead"].as_u64(), status["dead_letters"].as_u64(), status["queued"].as_u64()),
        (Some(2), Some(1), Some(1))
    );

    house.settle(&pipeline).await;
    let status = get(&router, "/api/v1/queue").await;
    assert_sums(&status);
    assert_eq!((status["dead"].as_u64(), status["dead_letters"].as_u64()), (Some(3), Some(2)));
}

#[test]
fn status_has_each_partition_with_its_holder_and_its_age() {
    let now: Timestamp = "2026-11-21T09:00:00Z".parse().unwrap();
    let oldest = Some("2026-11-21T08:58:30Z".parse().unwrap());
    let held = Partition { name: "2.1".to_owned(), holder: Some("one-12".to_owned()), ready: 4, in_flight: 1, oldest };
    let empty = Partition { name: "2.0".to_owned(), ..Partition::default() };
    let stats = Stats { ready: 4, in_flight: 1, partitions: vec![empty, held], ..Stats::default() };
    let shown = serde_json::to_value(QueueStatus::new(stats, &Sums::default(), now)).unwrap();
    let expected = json!([
        { "name": "2.0", "holder": null, "ready": 0, "in_flight": 0, "oldest_seconds": null },
        { "name": "2.1", "holder": "one-12", "ready": 4, "in_flight": 1, "oldest_seconds": 90 },
    ]);
    assert_eq!(shown["partitions"], expected);
    let without = serde_json::to_value(QueueStatus::new(Stats::default(), &Sums::default(), now)).unwrap();
    assert_eq!(without.get("partitions"), None);
}

/// Has handled what it replays before the caller hears of it.
#[derive(Debug)]
struct Hasty {
    queue: Arc<Embedded>,
    pipeline: Arc<Pipeline>,
}

#[async_trait]
impl Queue for Hasty {
    async fn push(&self, messages: Vec<Message>) -> Result<(), queue::Error> {
        self.queue.push(messages).await
    }
    async fn pull_together(&self) -> Result<Vec<Delivery>, queue::Error> {
        self.queue.pull_together().await
    }
    async fn stats(&self) -> Result<Stats, queue::Error> {
        self.queue.stats().await
    }
    async fn dead_letters(&self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>, queue::Error> {
        self.queue.dead_letters(after, limit).await
    }
    async fn replay(&self, id: &str) -> Result<bool, queue::Error> {
        let replayed = self.queue.replay(id).await?;
        House::settle_queue(&self.queue, &self.pipeline).await;
        Ok(replayed)
    }
    async fn discard(&self, id: &str) -> Result<bool, queue::Error> {
        self.queue.discard(id).await
    }
    async fn history(
        &self,
        from: Timestamp,
        until: Timestamp,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Kept>, queue::Error> {
        self.queue.history(from, until, after, limit).await
    }
    async fn close(&self) {}
}

#[tokio::test]
async fn a_replayed_event_that_died_again_at_once_is_still_counted_as_dead() {
    let house = House::new().await;
    let pipeline = Arc::new(house.pipeline(vec![rule("denied", "denied")]));
    let id = house.push(Some("1.0"), &house.image("hopeless")).await;
    house.settle(&pipeline).await;
    let queue = Arc::new(Hasty { queue: house.queue.clone(), pipeline });
    let router = router(Admin { queue, ..admin(&house, None) });
    post(&router, "/api/v1/queue/replay", json!({ "ids": [id] })).await;
    let status = get(&router, "/api/v1/queue").await;
    assert_sums(&status);
    assert_eq!(status["dead"], 1);
}

#[tokio::test]
async fn signing_by_hand_is_told_recorded_and_counted_nowhere() {
    let house = House::new().await;
    let digest = house.image("by hand");
    let pipeline = house.pipeline(vec![rule("works", "release"), rule("does not", "denied")]);
    let router = router(admin(&house, Some(Arc::new(pipeline))));
    let request = |repository: &str, tag: Option<&str>, digest: &Digest| json!({ "registry": NAME, "repository": repository, "tag": tag, "digest": digest });

    let answer = post(&router, "/api/v1/sign", request("team/app", Some("1.0"), &digest)).await;
    assert_eq!((answer["outcome"].as_str(), answer["retry"].as_bool()), (Some("failed"), Some(false)));
    assert!(answer["error"].as_str().unwrap().contains("kms:Sign is not allowed"), "{answer}");
    let states: Vec<_> = answer["signatures"].as_array().unwrap().iter().map(|one| one["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["written", "failed"]);

    let answer = post(&router, "/api/v1/sign", request("other/app", None, &digest)).await;
    assert_eq!(
        (answer["outcome"].as_str(), answer["reason"].as_str()),
        (Some("skipped"), Some("no rule's scope holds this repository"))
    );
    let answer = post(&router, "/api/v1/sign", request("team/app", None, &Digest::of(b"never pushed"))).await;
    assert_eq!(answer["reason"], "the registry does not have this manifest");

    let story = get(&router, &format!("/api/v1/story?registry={NAME}&repository=team/app&digest={digest}")).await;
    assert_eq!((story["events"][0]["outcome"].as_str(), story["signatures"].as_array().unwrap().len()), (Some("dead"), 2));
    let sums = get(&router, "/api/v1/queue").await;
    assert_sums(&sums);
    assert_eq!(sums["received"], 0);
}

#[tokio::test]
async fn what_cannot_be_meant_or_done_is_refused() {
    let house = House::new().await;
    let router = router(admin(&house, None));
    let request = json!({ "registry": NAME, "repository": "team/app", "tag": null, "digest": Digest::of(b"x") });
    let (status, problem) = ask(&router, "POST", "/api/v1/sign", Some(request)).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(problem["detail"].as_str().unwrap().contains("cannot sign"), "{problem}");
    for body in [json!({}), json!({ "ids": "all" }), json!([])] {
        assert!(ask(&router, "POST", "/api/v1/queue/discard", Some(body)).await.0.is_client_error());
    }
    assert!(ask(&router, "GET", "/api/v1/queue/dead?limit=many", None).await.0.is_client_error());
    assert_eq!(ask(&router, "DELETE", "/api/v1/queue", None).await.0, StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn a_named_dead_letter_that_is_not_there_is_a_negative_answer() {
    let house = House::new().await;
    let client = Client::Here(router(admin(&house, None)));
    for (ids, all, code) in [(vec!["no-such-id".to_owned()], false, "1"), (vec![], true, "0")] {
        let selection = Selection { ids, ..Selection::default() };
        let replay = QueueCommand::Replay(ReplayArgs { selection, all, ..ReplayArgs::default() });
        let ended = command::run(&client, &Clock::system(), &replay, Output::Json).await.unwrap();
        assert_eq!(format!("{ended:?}"), format!("{:?}", std::process::ExitCode::from(code.parse::<u8>().unwrap())));
    }
}

#[tokio::test]
async fn a_story_tells_of_what_is_queued_and_untried_and_of_that_only_what_is_asked_for() {
    let house = House::new().await;
    let pipeline = Arc::new(house.pipeline(vec![]));
    let router = router(admin(&house, None));
    let digest = house.image("told");
    let id = house.push(Some("1.0"), &digest).await;
    house.push(Some("2.0"), &house.image("another")).await;
    let queued = |story: &Value| -> Vec<String> {
        story["queued"].as_array().unwrap().iter().map(|event| event["id"].as_str().unwrap().to_owned()).collect()
    };
    let by_tag = format!("/api/v1/story?registry={NAME}&repository=team/app&tag=1.0");
    assert_eq!(queued(&get(&router, &by_tag).await), [id.as_str()]);
    assert_eq!(queued(&get(&router, &format!("/api/v1/story?registry={NAME}&repository=team/app&digest={digest}")).await), [id]);
    assert_eq!(queued(&get(&router, &format!("/api/v1/story?registry={NAME}&repository=team/app")).await).len(), 2);
    assert!(queued(&get(&router, &format!("/api/v1/story?registry={NAME}&repository=team/other")).await).is_empty());
    house.settle(&pipeline).await;
    let story = get(&router, &by_tag).await;
    assert!(queued(&story).is_empty());
    assert_eq!(story["events"].as_array().unwrap().len(), 1);
}
