//! Several replicas on one broker: who has what, what becomes of other layouts' messages, and who only looks.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use countersign_queue::{Amqp, Burial, Message, Queue as _, Retry};
use integration_tests::{process::eventually, proxy::Proxy};
use jiff::Timestamp;
use tokio::{task::JoinSet, time::timeout};
use tokio_util::task::TaskTracker;

use crate::{
    LIMIT,
    broker::{self, Broker},
    message, next, push_until_taken, unavailable,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_share_the_work_and_never_have_one_key_at_once() {
    const MESSAGES: usize = 300;
    let vhost = Broker::shared().await.vhost().await;
    let in_hand = Arc::new(Mutex::new(HashSet::new()));
    let left: Arc<Mutex<HashSet<String>>> = Arc::new(Mutex::new((0..MESSAGES).map(|n| n.to_string()).collect()));
    let mut replicas = Vec::new();
    for name in ["a", "b", "c"] {
        replicas.push(Arc::new(Amqp::open(vhost.options(name), &TaskTracker::new()).await.unwrap()));
    }
    replicas[0].push((0..MESSAGES).map(|n| message(&n.to_string(), n % 40)).collect()).await.unwrap();
    let mut workers = JoinSet::new();
    for (place, queue) in replicas.iter().enumerate() {
        for _ in 0..4 {
            let (queue, in_hand, left) = (Arc::clone(queue), Arc::clone(&in_hand), Arc::clone(&left));
            workers.spawn(async move {
                let mut handled = 0;
                while let Some(delivery) = queue.pull().await.unwrap() {
                    let (id, key) = (delivery.message().id.clone(), delivery.message().key.clone());
                    assert!(in_hand.lock().unwrap().insert(key.clone()), "two of {key:?} at once");
                    tokio::time::sleep(Duration::from_millis(2)).await;
                    in_hand.lock().unwrap().remove(&key);
                    handled += 1;
                    if handled % 7 == 0 {
                        let retry = Retry { after: Duration::from_millis(30), counted: true, reason: "busy".to_owned() };
                        delivery.retry(retry).await.unwrap();
                        continue;
                    }
                    delivery.ack().await.unwrap();
                    left.lock().unwrap().remove(&id);
                    // One replica leaves in the middle of it.
                    if place == 0 && handled == 10 {
                        queue.close().await;
                    }
                }
            });
        }
    }
    eventually("all are handled", LIMIT, async || Ok(left.lock().unwrap().is_empty().then_some(()))).await.unwrap();
    let stats = eventually("the last is settled", LIMIT, async || {
        let stats = replicas[1].stats().await?;
        Ok((stats.queued() == 0).then_some(stats))
    });
    assert_eq!(stats.await.unwrap().pushed_total, 300);
    for queue in &replicas {
        queue.close().await;
    }
    workers.join_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_share_the_partitions_and_who_closes_keeps_its_keys_until_they_are_out_of_hand() {
    let vhost = Broker::shared().await.vhost().await;
    let tracker = TaskTracker::new();
    let first = Amqp::open(vhost.options("a"), &tracker).await.unwrap();
    let second = Amqp::open(vhost.options("b"), &tracker).await.unwrap();
    first.push((0..64).map(|n| message(&n.to_string(), n)).collect()).await.unwrap();
    let shared = async || {
        let stats = first.stats().await?;
        let holders: Vec<_> = stats.partitions.iter().filter_map(|partition| partition.holder.as_deref()).collect();
        Ok((holders == ["a", "b", "a"]).then_some(()))
    };
    eventually("each has its share", LIMIT, shared).await.unwrap();

    // One of b's is in hand, and another of its key waits.
    let held = next(&second).await;
    let key = held.message().key.clone();
    second.push(vec![Message { key: key.clone(), ..message("behind", 0) }]).await.unwrap();
    second.close().await;
    let seen = async {
        loop {
            let delivery = next(&first).await;
            let (id, of_key) = (delivery.message().id.clone(), delivery.message().key == key);
            delivery.ack().await.unwrap();
            if of_key {
                return id;
            }
        }
    };
    tokio::pin!(seen);
    tokio::select! {
        biased;
        id = &mut seen => panic!("{id} came while its key was in hand"),
        () = tokio::time::sleep(Duration::from_secs(2)) => {}
    }
    assert!(!held.lost().is_cancelled());
    held.ack().await.unwrap();
    seen.await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replica_that_comes_back_at_once_under_its_name_gets_its_share_again() {
    let vhost = Broker::shared().await.vhost().await;
    let first = Amqp::open(vhost.options("a"), &TaskTracker::new()).await.unwrap();
    // Whose a partition is shows when something comes from it.
    let shared = async |second: &Amqp| {
        let pushed = first.push((0..64).map(|n| message(&n.to_string(), n)).collect()).await;
        let (Ok(()), Ok(stats)) = (pushed, first.stats().await) else { return Ok(None) };
        let has =
            |name: &str, replica| stats.partitions.iter().any(|at| at.name == name && at.holder.as_deref() == Some(replica));
        let is_shared = has("3.0", "a") && has("3.1", "b") && has("3.2", "a");
        while let Ok(delivery) = timeout(Duration::from_millis(200), async {
            tokio::select! {
                delivery = first.pull() => delivery,
                delivery = second.pull() => delivery,
            }
        })
        .await
        {
            delivery?.expect("nobody closes them").ack().await?;
        }
        Ok(is_shared.then_some(()))
    };
    for _ in 0..2 {
        let tracker = TaskTracker::new();
        let second = Amqp::open(vhost.options("b"), &tracker).await.unwrap();
        eventually("each has its share", LIMIT, async || shared(&second).await).await.unwrap();
        drop(second);
        tracker.close();
        timeout(LIMIT, tracker.wait()).await.expect("all its tasks end with it");
    }
}

async fn with_partitions(vhost: &broker::Vhost, replica: &str, partitions: u16, tracker: &TaskTracker) -> Amqp {
    let options = countersign_queue::amqp::Options { partitions, ..vhost.options(replica) };
    Amqp::open(options, tracker).await.unwrap()
}

/// What is in each queue of a layout, as the broker says, which counts every few seconds.
async fn depths(vhost: &broker::Vhost, partitions: u16) -> Vec<u64> {
    let path = format!("/api/queues/{}", vhost.name);
    let listed = vhost.broker.rabbitmq.manage("GET", &path, None).await.unwrap();
    let prefix = format!("countersign.v1.events.{partitions}.");
    let queues = listed.as_array().unwrap().iter().filter(|queue| queue["name"].as_str().unwrap().starts_with(&prefix));
    queues.map(|queue| queue["messages"].as_u64().unwrap_or(u64::MAX)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_partitions_are_drained_into_the_new_ones() {
    const WAIT: Duration = Duration::from_secs(15);
    let vhost = Broker::shared().await.vhost().await;
    let tracker = TaskTracker::new();
    let old = with_partitions(&vhost, "old", 8, &tracker).await;
    old.push((0..40).map(|n| message(&format!("ready {n}"), n)).collect()).await.unwrap();
    old.push((0..5).map(|n| message(&format!("blocked {n}"), 100)).collect()).await.unwrap();
    let mut waiting = HashMap::new();
    for n in 0..6 {
        let delivery = next(&old).await;
        if n < 2 {
            delivery.bury(Burial { kind: "denied".to_owned(), reason: "no".to_owned() }).await.unwrap();
            continue;
        }
        waiting.insert(delivery.message().id.clone(), Instant::now());
        delivery.retry(Retry { after: WAIT, counted: true, reason: "busy".to_owned() }).await.unwrap();
    }
    let in_hand = next(&old).await;
    drop(old);
    drop(in_hand);
    tracker.close();
    timeout(LIMIT, tracker.wait()).await.expect("all its tasks end with it");

    let new = with_partitions(&vhost, "new", 3, &TaskTracker::new()).await;
    // What the other had in hand is back once the broker knows that it is gone.
    let stats = eventually("everything is counted", LIMIT, async || {
        let stats = new.stats().await?;
        Ok((stats.queued() >= 43).then_some(stats))
    });
    assert_eq!(stats.await.unwrap().dead, 2);
    let moved = eventually("it is moved", LIMIT, async || {
        let stats = new.stats().await?;
        assert!(stats.queued() >= 43, "{stats:?}");
        let in_ours = stats.partitions.iter().filter(|partition| partition.name.starts_with("3."));
        let in_ours: u64 = in_ours.map(|partition| partition.ready).sum();
        // What goes from waiting to ready while it is counted may be counted in both.
        let is_moved = (in_ours + stats.waiting, stats.queued(), stats.partitions.len()) == (43, 43, 3);
        Ok(is_moved.then_some(stats))
    });
    let stats = moved.await.unwrap();
    assert_eq!((stats.dead, stats.pushed_total), (2, 45), "{stats:?}");

    let letters = new.dead_letters(None, 10).await.unwrap();
    for letter in &letters {
        assert!(new.replay(&letter.message.id).await.unwrap());
    }
    let mut got = HashSet::new();
    while got.len() < 45 {
        let delivery = next(&new).await;
        let (id, attempts) = (delivery.message().id.clone(), delivery.attempts());
        assert!(got.insert(id.clone()), "{id} twice");
        let retried = waiting.get(&id);
        assert_eq!(attempts, u32::from(retried.is_some()));
        assert!(retried.is_none_or(|retried| retried.elapsed() >= WAIT), "{id} came early");
        // What goes from waiting to ready while it is counted may be counted in both.
        let left = 46 - got.len() as u64;
        eventually("it is counted", LIMIT, async || Ok((new.stats().await?.queued() == left).then_some(()))).await.unwrap();
        delivery.ack().await.unwrap();
    }
    let stats = new.stats().await.unwrap();
    assert_eq!((stats.queued(), stats.dead), (0, 0), "{stats:?}");
    eventually("the broker says so", LIMIT, async || Ok((depths(&vhost, 8).await == [0; 8]).then_some(()))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_with_different_numbers_of_partitions_lose_nothing() {
    const MESSAGES: usize = 200;
    let vhost = Broker::shared().await.vhost().await;
    let left: Arc<Mutex<HashSet<String>>> = Arc::new(Mutex::new((0..MESSAGES).map(|n| n.to_string()).collect()));
    let old_tracker = TaskTracker::new();
    let old = Arc::new(with_partitions(&vhost, "old", 8, &old_tracker).await);
    let new = Arc::new(with_partitions(&vhost, "new", 3, &TaskTracker::new()).await);
    let handle = |queue: &Arc<Amqp>, most: usize| {
        let (queue, left) = (Arc::clone(queue), Arc::clone(&left));
        async move {
            let mut handled = 0;
            while handled < most
                && let Some(delivery) = queue.pull().await.unwrap()
            {
                handled += 1;
                if handled % 5 == 0 && delivery.attempts() == 0 {
                    let retry = Retry { after: Duration::from_secs(2), counted: true, reason: "busy".to_owned() };
                    delivery.retry(retry).await.unwrap();
                    continue;
                }
                let id = delivery.message().id.clone();
                delivery.ack().await.unwrap();
                left.lock().unwrap().remove(&id);
            }
        }
    };
    let mut workers = JoinSet::new();
    workers.spawn(handle(&new, usize::MAX));
    workers.spawn(handle(&old, 50));
    for n in 0..MESSAGES {
        let queue = if n % 2 == 0 { &old } else { &new };
        queue.push(vec![message(&n.to_string(), n % 70)]).await.unwrap();
    }
    // The old one goes in the middle of its work; what it left, and what comes back to it, is the other's.
    workers.join_next().await.unwrap().unwrap();
    assert!(!left.lock().unwrap().is_empty());
    old.close().await;
    drop(old);
    old_tracker.close();
    timeout(LIMIT, old_tracker.wait()).await.expect("all its tasks end with it");
    eventually("all are handled", LIMIT, async || Ok(left.lock().unwrap().is_empty().then_some(()))).await.unwrap();
    eventually("the last is settled", LIMIT, async || Ok((new.stats().await?.queued() == 0).then_some(()))).await.unwrap();
    new.close().await;
    workers.join_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_consume_sees_everything_and_takes_nothing() {
    let vhost = Broker::shared().await.vhost().await;
    let watching = countersign_queue::amqp::Options { consume: false, ..vhost.options("watching") };
    let watching = Amqp::open(watching, &TaskTracker::new()).await.unwrap();
    watching.push((0..9).map(|n| message(&n.to_string(), n)).collect()).await.unwrap();
    assert!(timeout(Duration::from_millis(500), watching.pull()).await.is_err(), "nothing is delivered");
    let stats = watching.stats().await.unwrap();
    assert_eq!((stats.ready, stats.in_flight, stats.partitions.len()), (9, 0, 3), "{stats:?}");
    assert!(stats.partitions.iter().all(|partition| partition.holder.is_none()), "{stats:?}");
    // The first to come that does has them all.
    let queue = Amqp::open(vhost.options("replica"), &TaskTracker::new()).await.unwrap();
    let in_hand = next(&queue).await;
    let later = countersign_queue::amqp::Options { consume: false, ..vhost.options("later") };
    let later = Amqp::open(later, &TaskTracker::new()).await.unwrap();
    // What others hold is as old as their last report.
    let told = eventually("it is told what the other has in hand", LIMIT, async || {
        let stats = later.stats().await?;
        Ok(((stats.ready, stats.in_flight) == (8, 1)).then_some(stats))
    });
    let stats = told.await.unwrap();
    assert!(stats.partitions.iter().any(|partition| partition.holder.as_deref() == Some("replica")), "{stats:?}");
    let route = |stats: &countersign_queue::Stats| {
        let held: Vec<_> = stats.partitions.iter().filter(|partition| partition.in_flight == 1).cloned().collect();
        held[0].name.clone()
    };
    let busy = route(&stats);
    in_hand.bury(Burial { kind: "denied".to_owned(), reason: "no".to_owned() }).await.unwrap();
    for _ in 0..8 {
        next(&queue).await.ack().await.unwrap();
    }
    // Idle, it is still held by the one that its messages come to.
    let idle = eventually("it is told by the next report", LIMIT, async || {
        let stats = later.stats().await?;
        Ok((stats.queued() == 0).then_some(stats))
    });
    let idle = idle.await.unwrap();
    let partition = idle.partitions.iter().find(|partition| partition.name == busy).unwrap();
    assert_eq!((partition.holder.as_deref(), partition.in_flight), (Some("replica"), 0));
    let letters = later.dead_letters(None, 5).await.unwrap();
    assert!(later.discard(&letters[0].message.id).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn age_of_what_no_replica_has_is_told_by_when_as_many_were_pushed() {
    let vhost = Broker::shared().await.vhost().await;
    let open = async |name: &str, consume| {
        let options = countersign_queue::amqp::Options { consume, ..vhost.options(name) };
        Amqp::open(options, &TaskTracker::new()).await.unwrap()
    };
    let watching = open("watching", false).await;
    assert_eq!(watching.stats().await.unwrap().oldest, None);
    for n in 0..4 {
        watching.push(vec![message(&n.to_string(), n)]).await.unwrap();
    }
    let pushed = watching.history(Timestamp::MIN, Timestamp::MAX, None, 10).await.unwrap();
    let pushed_at = |id: &str| pushed.iter().find(|kept| kept.message.id == id).map(|kept| kept.pushed_at);
    // A busy broker's counts are told without it.
    let told = async |queue: &Amqp| {
        let told = async || Ok(queue.stats().await?).map(|stats| Some(stats).filter(|stats| stats.oldest.is_some()));
        eventually("an age is told", LIMIT, told).await.unwrap()
    };
    let stats = told(&watching).await;
    assert_eq!((stats.ready, stats.oldest), (4, pushed_at("0")));

    // Two are done, and two wait.
    let (replica, hour) = (open("replica", true).await, Duration::from_secs(3600));
    for _ in 0..4 {
        let delivery = next(&replica).await;
        if ["0", "1"].contains(&delivery.message().id.as_str()) {
            delivery.ack().await.unwrap();
        } else {
            delivery.retry(Retry { after: hour, counted: true, reason: "busy".to_owned() }).await.unwrap();
        }
    }
    assert_eq!(replica.stats().await.unwrap().oldest, pushed_at("2"));
    drop((replica, watching));
    // Nobody remembers whose wait that is.
    let stats = told(&open("later", true).await).await;
    assert_eq!((stats.queued(), stats.waiting, stats.oldest), (2, 2, pushed_at("2")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retry_that_came_to_another_replica_is_no_longer_told_of() {
    let vhost = Broker::shared().await.vhost().await;
    let first = Amqp::open(vhost.options("a"), &TaskTracker::new()).await.unwrap();
    first.push(vec![message("1", 1)]).await.unwrap();
    let retry = Retry { after: Duration::from_secs(3), counted: true, reason: "busy".to_owned() };
    next(&first).await.retry(retry).await.unwrap();
    assert!(first.stats().await.unwrap().oldest.is_some());
    first.close().await;
    let second = Amqp::open(vhost.options("b"), &TaskTracker::new()).await.unwrap();
    next(&second).await.ack().await.unwrap();
    let forgotten = async || {
        let stats = first.stats().await?;
        Ok((stats.queued(), stats.oldest).eq(&(0, None)).then_some(()))
    };
    eventually("nothing is old, since nothing is there", LIMIT, forgotten).await.unwrap();
}

/// All of it is one replica's share: that of the first by name.
fn one_partition(options: countersign_queue::amqp::Options) -> countersign_queue::amqp::Options {
    countersign_queue::amqp::Options { partitions: 1, ..options }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn decision_that_the_broker_did_not_hear_is_not_taken_for_one_about_a_replay() {
    let vhost = Broker::shared().await.vhost().await;
    let proxy = Proxy::start(&vhost.broker.rabbitmq.host()).await.unwrap();
    let through = vhost.url().replace(&vhost.broker.rabbitmq.host(), &proxy.host());
    let cut_off = one_partition(broker::options("z", move || vec![through.clone()]));
    let cut_off = Amqp::open(cut_off, &TaskTracker::new()).await.unwrap();
    push_until_taken(&cut_off, message("1", 1)).await;
    let held = next(&cut_off).await;
    let tracker = TaskTracker::new();
    let other = Amqp::open(one_partition(vhost.options("a")), &tracker).await.unwrap();
    proxy.cut();
    let burial = Burial { kind: "denied".to_owned(), reason: "no".to_owned() };
    unavailable(held.bury(burial.clone()).await);
    next(&other).await.bury(burial).await.unwrap();
    assert!(other.replay("1").await.unwrap());
    // The other goes in the middle of it.
    let replayed = next(&other).await;
    drop((other, replayed));
    tracker.close();
    timeout(LIMIT, tracker.wait()).await.expect("all its tasks end with it");
    next(&cut_off).await.ack().await.unwrap();
    let stats = eventually("it is done", LIMIT, async || {
        let Ok(stats) = cut_off.stats().await else { return Ok(None) };
        Ok((stats.queued() == 0).then_some(stats))
    });
    assert_eq!(stats.await.unwrap().dead, 0, "the replay was buried unseen");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partition_of_a_replica_that_closes_is_another_s_at_once() {
    let vhost = Broker::shared().await.vhost().await;
    let first = Amqp::open(one_partition(vhost.options("a")), &TaskTracker::new()).await.unwrap();
    let second = Amqp::open(one_partition(vhost.options("b")), &TaskTracker::new()).await.unwrap();
    first.push(vec![message("1", 1)]).await.unwrap();
    next(&first).await.ack().await.unwrap();
    first.close().await;
    second.push(vec![message("2", 2)]).await.unwrap();
    // The first is still there, and need not end for that; a report takes two seconds, and a release in vain five.
    let delivery = timeout(Duration::from_secs(2), second.pull()).await.expect("nothing is waited for").unwrap().unwrap();
    delivery.ack().await.unwrap();
    drop(first);
}
