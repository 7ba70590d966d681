//! The past, run again through the administrator's API, and the selection of dead letters.

use axum::{Router, body::Body};
use http::{Request, header};
use http_body_util::BodyExt as _;
use jiff::SignedDuration;
use tower::ServiceExt as _;

use super::*;
use crate::admin::{Admin, router};

#[tokio::test]
async fn what_a_wrong_rule_skipped_is_signed_when_the_past_is_run_again() {
    let house = House::new().await;
    let digest = house.image("skipped");
    let id = house.push(Some("1.0"), &digest).await;
    let wrong = Rule { scope: Scope::parse("teem").unwrap(), ..rule("team", "release") };
    house.settle(&house.pipeline(vec![wrong])).await;
    assert_eq!(house.outcome(&digest).await.0, Outcome::Skipped(Skip::NoRule));

    let pipeline = Arc::new(house.pipeline(release()));
    let replayed = house.replay_past(&pipeline, json!({})).await;
    assert_eq!(replayed["events"][0]["id"], id);
    assert_ne!(replayed["events"][0]["replayed_as"], id);
    house.settle(&pipeline).await;
    assert_eq!(house.signed(&digest), [tagged("1.0")]);
    let sums = house.ledger.sums().await.unwrap();
    assert_eq!((sums.signed, sums.skipped, house.queue.stats().await.unwrap().pushed_total), (1, 1, 2));

    // What was run again is no past of its own.
    let replayed = house.replay_past(&pipeline, json!({})).await;
    assert_eq!(replayed["events"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn rule_for_new_images_only_does_not_sign_older_ones_that_are_run_again() {
    let house = House::new().await;
    let digest = house.image("older than its rule");
    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(vec![])).await;

    let created = Some(Clock::system().now() - Duration::from_secs(30));
    let pipeline = Arc::new(house.pipeline(vec![Rule { created, ..rule("team", "release") }]));
    house.replay_past(&pipeline, json!({})).await;
    house.settle(&pipeline).await;
    assert_eq!(house.outcome(&digest).await.0, Outcome::Skipped(Skip::BeforeRule));
    assert_eq!((house.calls(), house.signed(&digest).len()), (0, 0));
    let by_rule = house.replay_past(&pipeline, json!({ "rule": "team" })).await;
    assert_eq!(by_rule["events"], json!([]), "the rule would not sign it");
}

#[tokio::test]
async fn tag_that_moved_on_is_superseded_when_its_past_is_run_again() {
    let house = House::new().await;
    let old = house.image("old");
    house.push(Some("1.0"), &old).await;
    house.settle(&house.pipeline(vec![])).await;
    house.image("new");

    let by_tag = Rule { tags: Some(TagFilter::parse(&["1.*"]).unwrap()), ..rule("by tag", "release") };
    let pipeline = Arc::new(house.pipeline(vec![by_tag]));
    house.replay_past(&pipeline, json!({})).await;
    house.settle(&pipeline).await;
    assert_eq!(house.outcome(&old).await.0, Outcome::Skipped(Skip::Superseded));
    assert_eq!(house.calls(), 0);
}

#[tokio::test]
async fn what_is_signed_already_costs_two_requests_when_it_is_run_again() {
    let house = House::new().await;
    let pipeline = Arc::new(house.pipeline(release()));
    let digest = house.image("signed");
    house.push(Some("1.0"), &digest).await;
    house.settle(&pipeline).await;
    let asked = house.registry.store().asked.len();
    house.replay_past(&pipeline, json!({})).await;
    house.settle(&pipeline).await;
    assert_eq!(house.registry.store().asked.len(), asked + 2);
    assert_eq!((house.calls(), house.outcome(&digest).await.0), (1, Outcome::AlreadySigned));
}

#[tokio::test]
async fn looking_at_the_past_changes_nothing_and_goes_in_pages_by_time_repository_and_rule() {
    let house = House::new().await;
    let pipeline = Arc::new(
        house.pipeline(vec![rule("team", "release"), Rule { scope: Scope::parse("other").unwrap(), ..rule("other", "release") }]),
    );
    for name in ["a", "b", "c"] {
        let digest = house.image(name);
        house.push(Some("1.0"), &digest).await;
    }
    house.enqueue(event::QUARANTINE_CONTENT_TYPE, "quarantine/main", b"no event".to_vec()).await;
    house.settle(&pipeline).await;
    let before = house.queue.stats().await.unwrap();
    let router = house.router(&pipeline);
    let past = async |query: &str| {
        let until = Clock::system().now() + Duration::from_secs(60);
        let path = format!("/api/v1/queue/past?from=2026-01-01T00:00:00Z&until={until}&{query}");
        let (status, answer) = ask(&router, "GET", &path, None).await;
        assert_eq!(status, 200, "{answer}");
        answer
    };
    let number = |page: &Value| page["events"].as_array().unwrap().len();

    let (mut pages, mut found, mut after) = (0, 0, String::new());
    loop {
        let page = past(&format!("limit=2{after}")).await;
        let Some(next) = page["next"].as_str() else { break };
        after = format!("&after={next}");
        pages += 1;
        found += number(&page);
    }
    assert_eq!((pages, found), (2, 3), "what is no event is looked at, and left out");
    let first = past("most=1").await;
    assert_eq!(number(&first), 1);
    assert_eq!(number(&past(&format!("after={}", first["next"].as_str().unwrap())).await), 2, "what it did not come to");
    assert_eq!(number(&past("repository=team/*").await), 3);
    assert_eq!(number(&past("repository=other/**").await), 0);
    assert_eq!(number(&past("rule=team").await), 3);
    assert_eq!(number(&past("rule=other").await), 0);
    assert_eq!(house.queue.stats().await.unwrap(), before);
    let (status, problem) = ask(&router, "GET", "/api/v1/queue/past?from=now&until=now", None).await;
    assert_eq!(status, 400, "{problem}");
    for filter in ["rule=teem", "repository=%7Bteam"] {
        let path = format!("/api/v1/queue/past?from=2026-01-01T00:00:00Z&until=2027-01-01T00:00:00Z&{filter}");
        let (status, problem) = ask(&router, "GET", &path, None).await;
        assert_eq!(status, 400, "{problem}");
    }
}

#[tokio::test]
async fn dead_letters_are_selected_by_rule_kind_error_age_and_repository() {
    let house = House::new().await;
    let denied = |name: &str, tags: &str| Rule { tags: Some(TagFilter::parse(&[tags]).unwrap()), ..rule(name, "denied") };
    let pipeline = Arc::new(house.pipeline(vec![denied("one", "1.*"), denied("two", "2.*")]));
    let digest = house.image("letters");
    house.registry.store().put("team/app", Some("2.0"), media_type::OCI_MANIFEST, &image("letters"));
    let one = house.push(Some("1.0"), &digest).await;
    let two = house.push(Some("2.0"), &digest).await;
    let poison = house.enqueue(event::QUARANTINE_CONTENT_TYPE, "quarantine/main", b"no event".to_vec()).await;
    house.settle(&pipeline).await;

    // Rule "two" has been corrected not to want that tag any more, and another one wants the first.
    let now = Arc::new(house.pipeline(vec![denied("one", "1.*"), denied("two", "9.*"), denied("three", "1.*")]));
    let router = house.router(&now);
    let selected = async |filter: &str| {
        let (status, page) = ask(&router, "GET", &format!("/api/v1/queue/dead?{filter}"), None).await;
        assert_eq!(status, 200, "{page}");
        let mut ids: Vec<_> =
            page["letters"].as_array().unwrap().iter().map(|letter| letter["id"].as_str().unwrap().to_owned()).collect();
        ids.sort();
        ids
    };
    let sorted = |ids: &[&String]| {
        let mut ids: Vec<_> = ids.iter().map(|id| (*id).clone()).collect();
        ids.sort();
        ids
    };
    assert_eq!(selected("").await, sorted(&[&one, &two, &poison]));
    assert_eq!(selected("rule=one").await, [&*one]);
    assert_eq!(selected("rule=two").await, [&*two], "by the recorded failure");
    assert_eq!(selected("rule=three").await, [&*one], "by the configuration in force");
    assert_eq!(selected("kind=poison").await, [&*poison]);
    assert_eq!(selected("kind=refused&rule=two").await, [&*two]);
    assert_eq!(selected("error=kms:Sign").await, sorted(&[&one, &two]));
    assert_eq!(selected("error=nothing+like+it").await, [""; 0]);
    assert_eq!(selected("repository=team/**").await, sorted(&[&one, &two]));
    assert_eq!(selected("repository=*").await, [""; 0], "a star stays within a segment");
    let minute = SignedDuration::from_mins(1);
    let (earlier, later) = (Clock::system().now() - minute, Clock::system().now() + minute);
    assert_eq!(selected(&format!("buried_until={earlier}")).await, [""; 0]);
    assert_eq!(selected(&format!("buried_from={earlier}&buried_until={later}")).await.len(), 3);
    assert_eq!(selected(&format!("buried_from={later}")).await, [""; 0]);
}

async fn ask(router: &Router, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
    let request = Request::builder().method(method).uri(path).header(header::CONTENT_TYPE, "application/json");
    let request = request.body(body.map_or_else(Body::empty, |body| Body::from(body.to_string()))).unwrap();
    let response = router.clone().oneshot(request).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap_or_default())
}

impl House {
    fn router(&self, pipeline: &Arc<Pipeline>) -> Router {
        let pipeline = Some(pipeline.clone());
        let (queue, ledger) = (self.queue.clone(), self.ledger.clone());
        router(Admin { queue, ledger, pipeline, rules: Arc::default(), clock: Clock::system() })
    }

    /// All of it that the filter holds of.
    async fn replay_past(&self, pipeline: &Arc<Pipeline>, mut query: Value) -> Value {
        let now = Clock::system().now();
        query["from"] = json!(now - SignedDuration::from_hours(1));
        query["until"] = json!(now);
        let (status, answer) = ask(&self.router(pipeline), "POST", "/api/v1/queue/past/replay", Some(query)).await;
        assert_eq!(status, 200, "{answer}");
        answer
    }
}
