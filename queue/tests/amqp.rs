//! What the contract does not ask of every queue: a broker that goes away, comes back, is full, says nothing, and replicas.

mod amqp {
    mod connections;
    mod deleted;
    mod replicas;
    mod unanswered;
    mod wire;
}
mod broker;

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use broker::{Broker, options};
use bytes::Bytes;
use countersign_queue::{Amqp, Burial, Delivery, Error, Message, PartitionKey, Queue};
use integration_tests::{process::eventually, rabbitmq::RabbitMq};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

const LIMIT: Duration = Duration::from_secs(60);

fn message(id: &str, key: usize) -> Message {
    Message {
        id: id.to_owned(),
        content_type: "text/plain".to_owned(),
        key: PartitionKey(format!("key {key}")),
        body: Bytes::from(format!("body of {id}")),
        replay_of: None,
    }
}

/// A broker of the test's own, to be stopped and killed. The shared one is kept up beside it, for the tests that follow one
/// another meanwhile: each of them would start it anew.
async fn own_broker() -> (RabbitMq, Arc<Broker>) {
    let (own, shared) = tokio::join!(RabbitMq::start(), Broker::shared());
    (own.unwrap(), shared)
}

async fn next(queue: &Amqp) -> Delivery {
    timeout(LIMIT, queue.pull()).await.expect("something is delivered").unwrap().expect("the queue is open")
}

/// Pushes until it is taken, as a registry does.
async fn push_until_taken(queue: &Amqp, message: Message) {
    let last = Mutex::new(None);
    let taken = eventually("a push is taken", LIMIT, async || match queue.push(vec![message.clone()]).await {
        Ok(()) => Ok(Some(())),
        Err(error) => {
            *last.lock().unwrap() = Some(error);
            Ok(None)
        }
    });
    if let Err(error) = taken.await {
        panic!("{error:#}: {last:?}");
    }
}

fn unavailable<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    match result {
        Err(Error::Unavailable { what, .. }) => what,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_confirmed_survives_kill_9_of_the_broker_and_comes_again() {
    let (mut broker, _shared) = own_broker().await;
    let (url, tracker) = (broker.url(), TaskTracker::new());
    let queue = Amqp::open(options("replica", move || vec![url.clone()]), &tracker).await.unwrap();
    broker.sync().await.unwrap();
    queue.push((0..20).map(|n| message(&n.to_string(), n)).collect()).await.unwrap();
    let (acked, lost) = (next(&queue).await, next(&queue).await);
    let (acked_id, lost_id) = (acked.message().id.clone(), lost.message().id.clone());
    broker.kill().unwrap();
    unavailable(queue.push(vec![message("refused", 1)]).await);
    unavailable(queue.probe().await);
    let error = acked.ack().await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    drop(lost);

    broker.start_again().await.unwrap();
    push_until_taken(&queue, message("later", 100)).await;
    // What was decided while there was no connection was carried out when it came again.
    let mut left: HashSet<_> = (0..20).map(|n| n.to_string()).filter(|id| *id != acked_id).chain(["later".to_owned()]).collect();
    assert!(left.contains(&lost_id));
    while !left.is_empty() {
        let delivery = next(&queue).await;
        let id = &delivery.message().id;
        // What the broker has not answered may come all the same, some seconds later.
        assert!(left.remove(id) || ["refused", "later"].contains(&id.as_str()), "{delivery:?} twice");
        delivery.ack().await.unwrap();
    }
    let ended = async {
        while queue.stats().await.unwrap().queued() > 0 {
            let Ok(delivery) = timeout(Duration::from_millis(100), queue.pull()).await else { continue };
            let delivery = delivery.unwrap().expect("the queue is open");
            assert!(["refused", "later"].contains(&delivery.message().id.as_str()), "{delivery:?} twice");
            delivery.ack().await.unwrap();
        }
    };
    timeout(LIMIT, ended).await.expect("nothing is left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queue_opens_without_a_broker_and_recovers_by_itself() {
    let (mut broker, _shared) = own_broker().await;
    broker.stop().await.unwrap();
    let (url, tracker) = (broker.url(), TaskTracker::new());
    // The first of the two is nobody, ever.
    let urls = move || vec!["amqp://guest:guest@127.0.0.1:9".to_owned(), url.clone()];
    let queue = Amqp::open(options("replica", urls), &tracker).await.unwrap();
    let what = unavailable(queue.push(vec![message("1", 1)]).await);
    assert!(what.contains("127.0.0.1") && !what.contains("guest"), "{what}");
    broker.start_again().await.unwrap();
    push_until_taken(&queue, message("2", 1)).await;
    next(&queue).await.ack().await.unwrap();
    drop(queue);
    tracker.close();
    timeout(LIMIT, tracker.wait()).await.expect("all its tasks end with it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disk_refuses_pushes_at_once_and_lets_acks_through() {
    let (broker, _shared) = own_broker().await;
    let (url, tracker) = (broker.url(), TaskTracker::new());
    let queue = Amqp::open(options("replica", move || vec![url.clone()]), &tracker).await.unwrap();
    queue.push(vec![message("1", 1), message("2", 2)]).await.unwrap();
    let (first, second) = (next(&queue).await, next(&queue).await);
    broker.disk_alarm(true).await.unwrap();
    // The broker says so when it is published to.
    let what = unavailable(queue.push(vec![message("3", 3)]).await);
    assert!(what.contains("takes no messages"), "{what}");
    unavailable(queue.probe().await);
    first.ack().await.unwrap();
    // It cannot be written now, is remembered, and written later.
    let burial = Burial { kind: "denied".to_owned(), reason: "no".to_owned() };
    unavailable(second.bury(burial).await);
    broker.disk_alarm(false).await.unwrap();
    push_until_taken(&queue, message("4", 4)).await;
    let buried = async || Ok(queue.stats().await.is_ok_and(|stats| (stats.dead, stats.in_flight) == (1, 0)).then_some(()));
    eventually("it is buried", LIMIT, buried).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_broker_is_given_up_and_found_again() {
    let (broker, _shared) = own_broker().await;
    let (url, tracker) = (broker.url(), TaskTracker::new());
    let queue = Amqp::open(options("replica", move || vec![url.clone()]), &tracker).await.unwrap();
    queue.push(vec![message("1", 1)]).await.unwrap();
    broker.freeze(true).unwrap();
    let began = Instant::now();
    unavailable(queue.push(vec![message("2", 2)]).await);
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    // Waited for again it would take as long as the first.
    let began = Instant::now();
    for _ in 0..5 {
        unavailable(queue.push(vec![message("2", 2)]).await);
    }
    assert!(began.elapsed() < Duration::from_secs(20), "the next are refused at once");
    broker.freeze(false).unwrap();
    push_until_taken(&queue, message("3", 3)).await;
    let mut got = HashSet::new();
    while !got.contains("1") || !got.contains("3") {
        let delivery = next(&queue).await;
        got.insert(delivery.message().id.clone());
        delivery.ack().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queue_with_other_arguments_is_named_with_the_argument_and_the_cure() {
    let vhost = Broker::shared().await.vhost().await;
    let tracker = TaskTracker::new();
    let arguments = serde_json::json!({ "durable": true, "arguments": { "x-queue-type": "quorum", "x-delivery-limit": 3 } });
    let path = format!("/api/queues/{}/countersign.v1.dead", vhost.name);
    vhost.broker.rabbitmq.manage("PUT", &path, Some(&arguments)).await.unwrap();
    let error = Amqp::open(vhost.options("replica"), &tracker).await.unwrap_err().to_string();
    assert_eq!(
        error,
        "the queue countersign.v1.dead is on the broker already with another `x-delivery-limit`: move its messages away and \
         delete it, or give this queue another prefix"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secret_is_read_again_at_each_connect() {
    let vhost = Broker::shared().await.vhost().await;
    let rabbitmq = &vhost.broker.rabbitmq;
    let user = format!("user-{}", vhost.name);
    rabbitmq.let_in(&vhost.name, &user, "old").await.unwrap();
    let url = |password: &str| format!("amqp://{user}:{password}@{}/{}", rabbitmq.host(), vhost.name);
    let secret = Arc::new(Mutex::new(url("old")));
    let read = Arc::clone(&secret);
    let queue = Amqp::open(options("replica", move || vec![read.lock().unwrap().clone()]), &TaskTracker::new()).await.unwrap();
    queue.push(vec![message("1", 1)]).await.unwrap();

    rabbitmq.let_in(&vhost.name, &user, "new").await.unwrap();
    *secret.lock().unwrap() = url("new");
    rabbitmq.close_connections(&vhost.name).await.unwrap();
    push_until_taken(&queue, message("2", 2)).await;
    let mut left = HashSet::from(["1", "2"]);
    while !left.is_empty() {
        left.remove(next(&queue).await.message().id.as_str());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn past_is_forgotten_by_size_and_the_totals_go_on_for_all_replicas_over_kill_9_of_the_broker() {
    const MESSAGES: usize = 60;
    let (mut broker, _shared) = own_broker().await;
    // As an administrator may who has less room.
    let less = serde_json::json!({ "pattern": "history$", "definition": { "max-length-bytes": 20_000_000 } });
    broker.manage("PUT", "/api/policies/%2F/less", Some(&less)).await.unwrap();
    let (url, tracker) = (broker.url(), TaskTracker::new());
    let open = async |name| {
        let url = url.clone();
        Amqp::open(options(name, move || vec![url.clone()]), &tracker).await.unwrap()
    };
    let (one, other) = (open("one").await, open("other").await);
    broker.sync().await.unwrap();
    let none = one.stats().await.unwrap();
    assert_eq!((none.pushed_total, none.history.unwrap().messages), (0, 0));
    for n in 0..MESSAGES {
        let large = Message { body: Bytes::from(vec![b'x'; 1 << 20]), ..message(&n.to_string(), n) };
        one.push(vec![large]).await.unwrap();
        assert_eq!(one.stats().await.unwrap().pushed_total, n as u64 + 1);
    }
    let buried = tokio::select! { delivery = next(&one) => delivery, delivery = next(&other) => delivery };
    let id = buried.message().id.clone();
    buried.bury(Burial { kind: "denied".to_owned(), reason: "no".to_owned() }).await.unwrap();
    assert!(one.discard(&id).await.unwrap());
    let is_so = async |queue: &Amqp, pushed: u64| {
        let stats = eventually("both are told the same", LIMIT, async || {
            let stats = queue.stats().await.ok();
            let fell = |stats: &countersign_queue::Stats| stats.pushed_total < pushed || stats.discarded_total < 1;
            assert!(!stats.as_ref().is_some_and(fell), "{stats:?}, and there were {pushed}");
            Ok(stats.filter(|stats| stats.pushed_total == pushed))
        });
        stats.await.unwrap()
    };
    let listed = async |queue: &Amqp| {
        let (mut ids, mut after) = (Vec::new(), None);
        loop {
            let page = queue.history(jiff::Timestamp::MIN, jiff::Timestamp::MAX, after.as_deref(), 1000).await.unwrap();
            let Some(last) = page.last() else { return ids };
            after = Some(last.cursor.clone());
            ids.extend(page.into_iter().map(|kept| kept.message.id));
        }
    };
    let kept = is_so(&one, 60).await.history.unwrap();
    assert!((1..50).contains(&kept.messages), "{kept:?}");
    assert_eq!(is_so(&other, 60).await.history.unwrap(), kept);
    let ids = listed(&one).await;
    let newest: Vec<_> = (MESSAGES - ids.len()..MESSAGES).map(|n| n.to_string()).collect();
    assert!(!ids.is_empty() && ids == newest, "{ids:?}");
    // The broker's own numbers, one in a segment, are among them.
    assert!((ids.len() as u64..ids.len() as u64 + 3).contains(&kept.messages), "{kept:?}");

    broker.kill().unwrap();
    unavailable(one.stats().await);
    unavailable(one.history(jiff::Timestamp::MIN, jiff::Timestamp::MAX, None, 1).await);
    broker.start_again().await.unwrap();
    let fresh = open("fresh").await;
    for queue in [&fresh, &one, &other] {
        assert_eq!(is_so(queue, 60).await.history.unwrap(), kept);
        assert_eq!(listed(queue).await, ids);
    }
    let few = eventually("what was read with is let go of", LIMIT, async || {
        let channels = broker.manage("GET", "/api/channels", None).await?;
        Ok((channels.as_array().is_some_and(|channels| channels.len() < 30)).then_some(()))
    });
    few.await.unwrap();
    push_until_taken(&other, message("later", 1)).await;
    let more = other.stats().await.unwrap().pushed_total;
    assert!(more > 60);
    assert_eq!(is_so(&one, more).await.history.unwrap().messages, kept.messages + more - 60);
    drop((fresh, one, other));
    let again = open("again").await;
    is_so(&again, more).await;
}

/// What an administrator imports where the daemon may not declare anything.
const DEFINITIONS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/rabbitmq/definitions.json");

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn definitions_for_administrators_are_what_the_daemon_declares() {
    let broker = Broker::shared().await;
    let (declared, imported) = (broker.vhost().await, broker.vhost().await);
    let with = |vhost: &broker::Vhost| countersign_queue::amqp::Options { partitions: 8, ..vhost.options("replica") };
    let queue = Amqp::open(with(&declared), &TaskTracker::new()).await.unwrap();
    queue.probe().await.unwrap();
    let path = |name: &str| format!("/api/definitions/{name}");
    let export = broker.rabbitmq.manage("GET", &path(&declared.name), None).await.unwrap();
    let mut definitions = serde_json::Map::new();
    for kind in ["queues", "exchanges", "bindings"] {
        let mut listed = export[kind].as_array().unwrap().clone();
        // Queues of a connection's own are nobody else's.
        listed.retain(|entry| !entry.to_string().contains("amq.gen"));
        listed.sort_by_key(ToString::to_string);
        definitions.insert(kind.to_owned(), listed.into());
    }
    let shown = serde_json::to_string_pretty(&definitions).unwrap() + "\n";
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(DEFINITIONS, &shown).unwrap();
    }
    let kept = std::fs::read_to_string(DEFINITIONS).unwrap();
    assert!(kept == shown, "{DEFINITIONS} is out of date: run this test with BLESS=1");

    let kept = serde_json::from_str(&kept).unwrap();
    broker.rabbitmq.manage("POST", &path(&imported.name), Some(&kept)).await.unwrap();
    let queue = Amqp::open(with(&imported), &TaskTracker::new()).await.unwrap();
    queue.push(vec![message("1", 1)]).await.unwrap();
    next(&queue).await.ack().await.unwrap();
}
