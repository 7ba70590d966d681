use std::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering::SeqCst},
};

use async_trait::async_trait;
use axum::{Router, body::Body, response::Response};
use http::{Method, Request, StatusCode, header};
use http_body_util::BodyExt;
use queue::{DeadLetter, Delivery, Kept, Stats};
use tokio::sync::{Notify, Semaphore};
use tower::ServiceExt;

use super::*;

const ENVELOPE: &str = r#"{"events":[
    {"id":"1","timestamp":"2026-01-15T09:12:44Z","action":"push","actor":{"name":"ci"},"request":{"host":"evil.example"},
     "target":{"mediaType":"application/vnd.oci.image.manifest.v1+json","repository":"team/app","tag":"1.0",
               "digest":"sha256:db7da600462e7b3a21648206747f051da90b506b23d75769901304bb36317a08"}},
    {"id":"2","action":"pull"},
    {"id":"3","action":"push","target":{"mediaType":"application/vnd.oci.image.manifest.v1+json","repository":"../a","digest":"x"}},
    {"id":"4","action":"push","target":{"mediaType":"application/vnd.oci.image.index.v1+json","repository":"team/multi",
               "digest":"sha256:b5b85baf8ec58af5e2374b224ae57784e68dcdb610afaffffe03625643ff3c3e"}}
]}"#;

/// Keeps what is pushed, when it is let; nothing else.
#[derive(Debug)]
struct Shelf {
    messages: Mutex<Vec<Vec<Message>>>,
    full: AtomicBool,
    asked: Notify,
    durable: Semaphore,
}

impl Shelf {
    fn ready() -> Arc<Self> {
        Self::with_permits(Semaphore::MAX_PERMITS)
    }

    fn with_permits(permits: usize) -> Arc<Self> {
        let durable = Semaphore::new(permits);
        Arc::new(Self { messages: Mutex::default(), full: AtomicBool::new(false), asked: Notify::new(), durable })
    }

    fn pushes(&self) -> Vec<Vec<Message>> {
        self.messages.lock().unwrap().clone()
    }
}

#[async_trait]
impl Queue for Shelf {
    async fn push(&self, messages: Vec<Message>) -> Result<(), queue::Error> {
        self.asked.notify_one();
        self.durable.acquire().await.unwrap().forget();
        if self.full.load(SeqCst) {
            return Err(queue::Error::Unavailable { what: "the disk is full".into(), source: None });
        }
        self.messages.lock().unwrap().push(messages);
        Ok(())
    }
    async fn pull_together(&self) -> Result<Vec<Delivery>, queue::Error> {
        unimplemented!("intake only pushes")
    }
    async fn stats(&self) -> Result<Stats, queue::Error> {
        unimplemented!("intake only pushes")
    }
    async fn dead_letters(&self, _: Option<&str>, _: usize) -> Result<Vec<DeadLetter>, queue::Error> {
        unimplemented!("intake only pushes")
    }
    async fn replay(&self, _: &str) -> Result<bool, queue::Error> {
        unimplemented!("intake only pushes")
    }
    async fn discard(&self, _: &str) -> Result<bool, queue::Error> {
        unimplemented!("intake only pushes")
    }
    async fn history(&self, _: Timestamp, _: Timestamp, _: Option<&str>, _: usize) -> Result<Vec<Kept>, queue::Error> {
        unimplemented!("intake only pushes")
    }
    async fn close(&self) {}
}

fn source(name: &str, token: &str) -> Source {
    Source {
        name: name.into(),
        kind: Kind::Distribution,
        registry: "registry.example.com".parse().unwrap(),
        auth: Auth::Bearer { tokens: vec![token.into()] },
    }
}

fn intake(queue: &Arc<Shelf>) -> Arc<Intake> {
    let (clock, _hand) = Clock::manual("2026-11-21T09:00:00Z".parse().unwrap());
    Arc::new(Intake::new(Arc::clone(queue) as Arc<dyn Queue>, clock, vec![source("main", "token")]))
}

fn request(path: &str, token: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path).header(header::AUTHORIZATION, format!("Bearer {token}")).body(body.into()).unwrap()
}

async fn answer(router: Router, request: Request<Body>) -> (StatusCode, Response<()>, String) {
    let (head, body) = router.oneshot(request).await.unwrap().into_parts();
    let text = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
    (head.status, Response::from_parts(head, ()), text)
}

fn count(intake: &Intake, name: &str, labels: &[(&str, &str)]) -> u64 {
    let samples = intake.counters().samples();
    let wanted = |sample: &&Sample| {
        sample.name == name && sample.labels.iter().map(|(name, value)| (*name, value.as_str())).eq(labels.iter().copied())
    };
    samples.iter().find(wanted).unwrap_or_else(|| panic!("no {name} {labels:?}")).value
}

#[tokio::test]
async fn pushes_of_one_envelope_are_stored_at_once_and_the_rest_is_counted() {
    let queue = Shelf::ready();
    let intake = intake(&queue);
    let (status, _, text) = answer(router(Arc::clone(&intake)), request("/events/main", "token", ENVELOPE)).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    assert_eq!(text, r#"{"ignored":1,"quarantined":1,"taken":2}"#);

    let pushes = queue.pushes();
    let [messages] = &pushes[..] else { panic!("{pushes:?}") };
    let [app, refused, multi] = &messages[..] else { panic!("{messages:?}") };
    let event = PushEvent::from_cloud_event(&app.body).unwrap();
    assert_eq!((event.id.as_str(), event.source.as_str(), event.registry.as_str()), ("1", "main", "registry.example.com"));
    assert_eq!(event.pushed_at, "2026-01-15T09:12:44Z".parse().unwrap());
    assert_eq!(event.received_at, "2026-11-21T09:00:00Z".parse().unwrap());
    assert_eq!((app.content_type.as_str(), app.key.0.as_str()), (event::CONTENT_TYPE, event.partition_key().as_str()));
    let event = PushEvent::from_cloud_event(&multi.body).unwrap();
    assert_eq!((event.tag, event.pushed_at), (None, event.received_at), "no time of the sender's: the time of receipt");
    assert_eq!(refused.content_type, event::QUARANTINE_CONTENT_TYPE);
    assert_eq!(refused.key.0, format!("quarantine/{}", refused.id), "it waits for no other");
    assert!(refused.body.starts_with(br#"{"id":"3""#) && refused.body.ends_with(b"}}"), "{refused:?}");
    assert!(app.id != refused.id && app.id != multi.id && app.id.as_bytes()[14] == b'7', "UUIDs of version 7");

    assert_eq!(count(&intake, "intake_requests", &[("source", "main")]), 1);
    assert_eq!(count(&intake, "intake_taken", &[("source", "main")]), 2);
    assert_eq!(count(&intake, "intake_ignored", &[("source", "main"), ("reason", "pull")]), 1);
    assert_eq!(count(&intake, "intake_quarantined", &[("source", "main"), ("reason", "bad_name")]), 1);
}

#[tokio::test]
async fn a_body_that_is_no_event_is_accepted_and_kept_untouched() {
    for body in ["", "not json", "[]", r#"{"events":7}"#] {
        let queue = Shelf::ready();
        let (status, _, text) = answer(router(intake(&queue)), request("/events/main", "token", body)).await;
        assert_eq!((status, text.as_str()), (StatusCode::ACCEPTED, r#"{"ignored":0,"quarantined":1,"taken":0}"#));
        let pushes = queue.pushes();
        assert_eq!((&pushes[0][0].content_type[..], &pushes[0][0].body[..]), (event::QUARANTINE_CONTENT_TYPE, body.as_bytes()));
    }
}

#[tokio::test]
async fn what_brings_nothing_does_not_need_the_queue() {
    let queue = Shelf::with_permits(0);
    for body in ["{}", r#"{"events":[{"action":"pull"}]}"#] {
        assert_eq!(answer(router(intake(&queue)), request("/events/main", "token", body)).await.0, StatusCode::ACCEPTED);
    }
}

#[tokio::test]
async fn nothing_is_answered_before_the_events_are_durable() {
    let queue = Shelf::with_permits(0);
    let answer = answer(router(intake(&queue)), request("/events/main", "token", ENVELOPE));
    tokio::pin!(answer);
    tokio::select! {
        biased;
        early = &mut answer => panic!("{early:?}"),
        () = queue.asked.notified() => {}
    }
    assert!(futures::poll!(&mut answer).is_pending());
    queue.durable.add_permits(1);
    assert_eq!(answer.await.0, StatusCode::ACCEPTED);
    assert_eq!(queue.pushes().len(), 1);
}

#[tokio::test]
async fn a_queue_that_cannot_take_it_is_a_503_and_counts_nothing_as_taken() {
    let queue = Shelf::ready();
    queue.full.store(true, SeqCst);
    let intake = intake(&queue);
    let (status, head, text) = answer(router(Arc::clone(&intake)), request("/events/main", "token", ENVELOPE)).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(head.headers()[header::RETRY_AFTER], "1");
    assert_eq!(head.headers()[header::CONTENT_TYPE], "application/problem+json");
    assert!(!text.contains("disk"), "{text}");
    assert_eq!(count(&intake, "intake_taken", &[("source", "main")]), 0);
    assert_eq!(count(&intake, "intake_refused", &[("source", "main"), ("reason", "queue")]), 1);
    queue.full.store(false, SeqCst);
    assert_eq!(answer(router(intake), request("/events/main", "token", ENVELOPE)).await.0, StatusCode::ACCEPTED);
}

#[tokio::test]
async fn without_the_secret_a_source_looks_as_if_it_were_not_there() {
    let queue = Shelf::ready();
    let intake = intake(&queue);
    let mut seen = Vec::new();
    for path in ["/events/main", "/events/other", "/events/%ff", "/events/main%2F"] {
        let (status, head, text) = answer(router(Arc::clone(&intake)), request(path, "wrong", ENVELOPE)).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{path}");
        seen.push((head.headers().clone(), text));
    }
    assert!(seen.windows(2).all(|pair| pair[0] == pair[1]), "{seen:?}");
    assert!(seen[0].0.contains_key(header::WWW_AUTHENTICATE));
    assert!(queue.pushes().is_empty());
    assert_eq!(count(&intake, "intake_unauthorized", &[("source", "main")]), 1);
    assert_eq!(count(&intake, "intake_unauthorized", &[("source", "")]), 3);
}

#[tokio::test]
async fn an_unauthenticated_body_is_not_read() {
    let body = Body::from_stream(futures::stream::once(async { panic!("read") as Result<Bytes, std::io::Error> }));
    let (status, ..) = answer(router(intake(&Shelf::ready())), request("/events/main", "wrong", body)).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_body_that_does_not_arrive_is_no_event_and_is_counted() {
    let queue = Shelf::ready();
    let intake = intake(&queue);
    let chunks = [Ok(Bytes::from_static(b"{")), Err(std::io::Error::other("connection reset"))];
    let request = request("/events/main", "token", Body::from_stream(futures::stream::iter(chunks)));
    assert_eq!(answer(router(Arc::clone(&intake)), request).await.0, StatusCode::BAD_REQUEST);
    assert!(queue.pushes().is_empty());
    assert_eq!(count(&intake, "intake_refused", &[("source", "main"), ("reason", "body")]), 1);
}

#[tokio::test]
async fn sources_are_replaced_between_two_requests_and_counters_go_on() {
    let queue = Shelf::ready();
    let intake = intake(&queue);
    let take = async |source: &str, token: &str| {
        let headers = request("/", token, "").headers().clone();
        intake.take(source, &headers, Bytes::from_static(ENVELOPE.as_bytes())).await
    };
    let accepted = Answer::Accepted { taken: 2, ignored: 1, quarantined: 1 };
    assert_eq!(take("main", "token").await, accepted);
    intake.replace_sources(vec![source("main", "renewed"), source("second", "token")]);
    assert_eq!(take("main", "token").await, Answer::Unauthorized);
    assert_eq!(take("main", "renewed").await, accepted);
    assert_eq!(take("second", "token").await, accepted);
    intake.replace_sources(Vec::new());
    assert_eq!(take("main", "renewed").await, Answer::Unauthorized);
    assert_eq!(count(&intake, "intake_taken", &[("source", "main")]), 4);
}

#[tokio::test]
async fn other_methods_are_not_allowed() {
    for method in [Method::GET, Method::PUT, Method::DELETE] {
        let mut request = request("/events/main", "token", "");
        *request.method_mut() = method;
        assert_eq!(answer(router(intake(&Shelf::ready())), request).await.0, StatusCode::METHOD_NOT_ALLOWED);
    }
}

#[test]
fn secrets_are_not_printed() {
    let printed = format!("{:?} {:?}", source("main", "hush"), intake(&Shelf::ready()));
    assert!(!printed.contains("hush"), "{printed}");
}
