//! The promises, as functions over any backend.
//!
//! A new one goes into the list of [`hold_to_the_contract`] as well; the compiler says so when it is forgotten.

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use countersign_queue::{Burial, DeadLetter, Delivery, Error, Message, PartitionKey, Queue, Retry};
use tokio::{sync::Barrier, task::JoinSet, time::timeout};

/// A backend under test.
#[async_trait]
pub trait Backend: Sized {
    /// An empty queue of its own.
    async fn fresh() -> Self;
    fn queue(&self) -> Arc<dyn Queue>;
    /// The same queue in what might be another process. Nobody holds the old one or a delivery of it.
    async fn restart(&mut self) -> Arc<dyn Queue>;
}

macro_rules! hold_to_the_contract {
    ($module:ident, $backend:ty) => {
        suite::hold_to_the_contract!(
            $module, $backend:
            message_is_delivered_as_it_was_pushed,
            any_body_is_taken,
            acked_message_is_gone_for_good,
            pushed_message_survives_a_restart,
            unsettled_message_is_delivered_again_after_a_restart,
            dropped_delivery_goes_back_at_once,
            delivery_lost_in_a_panic_goes_back,
            pull_waits_for_a_push,
            each_of_many_pullers_gets_its_own_message,
            cancelled_pulls_lose_nothing,
            concurrent_pushes_are_all_delivered_once,
            empty_push_is_no_push,
            messages_of_one_key_are_in_one_hand_at_a_time,
            settling_lets_the_next_of_its_key_come,
            retry_hands_the_turn_to_the_next_of_its_key,
            due_retry_waits_for_the_one_of_its_key_that_is_in_hand,
            busy_key_does_not_hold_up_others,
            retry_is_not_delivered_before_its_time,
            pull_waits_for_the_earliest_retry,
            retry_may_be_at_once_or_practically_never,
            counted_retries_use_up_patience_and_others_do_not,
            retry_and_its_patience_survive_a_restart,
            buried_message_is_listed_and_not_delivered,
            burying_survives_a_restart,
            dead_letters_are_listed_oldest_first_in_pages,
            listing_loses_none_while_letters_are_taken_away,
            replayed_message_is_delivered_with_new_patience,
            replayed_message_waits_for_its_key,
            discarded_message_is_gone_for_good,
            replay_and_discard_of_the_unknown_say_so,
            stats_add_up_at_every_step,
            stats_survive_a_restart,
            oldest_is_the_first_pushed_that_is_not_settled,
            probe_finds_the_queue_well,
            close_ends_pulls_and_refuses_pushes,
            what_is_in_hand_at_close_can_be_settled,
        );
    };
    ($module:ident, $backend:ty: $($promise:ident),* $(,)?) => {
        mod $module {
            use super::*;
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $promise() {
                    suite::soon(suite::$promise(<$backend as Backend>::fresh().await)).await;
                }
            )*
        }
    };
}
pub(crate) use hold_to_the_contract;

/// Long enough for any machine, short enough for a test that hangs.
pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), what).await.expect("it came to an end")
}

pub async fn message_is_delivered_as_it_was_pushed(backend: impl Backend) {
    let queue = backend.queue();
    let pushed = Message {
        id: "0190-ä".into(),
        content_type: "application/cloudevents+json; charset=utf-8".into(),
        key: PartitionKey("sha256:00ff".into()),
        body: Bytes::from_static(b"\x00\xff{\"n\":1}\r\n"),
    };
    queue.push(vec![pushed.clone()]).await.unwrap();
    let delivery = next(&*queue).await;
    assert_eq!(delivery.message(), &pushed);
    assert_eq!((delivery.attempts(), delivery.waited()), (0, Duration::ZERO));
    assert_eq!(queue.stats().await.unwrap().oldest, Some(delivery.pushed_at()));
}

pub async fn any_body_is_taken(backend: impl Backend) {
    let queue = backend.queue();
    for (n, size) in [0, 1, 4096, 100_000, 3_000_000].into_iter().enumerate() {
        let mut pushed = message(n);
        pushed.body = (0..=250).cycle().take(size).collect();
        queue.push(vec![pushed.clone()]).await.unwrap();
        let delivery = next(&*queue).await;
        assert!(delivery.message() == &pushed, "{size} bytes");
        delivery.ack().await.unwrap();
    }
}

pub async fn acked_message_is_gone_for_good(mut backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![message(1)]).await.unwrap();
    next(&*queue).await.ack().await.unwrap();
    assert_empty(&*queue).await;
    drop(queue);
    assert_empty(&*backend.restart().await).await;
}

pub async fn pushed_message_survives_a_restart(mut backend: impl Backend) {
    backend.queue().push((0..10).map(message).collect()).await.unwrap();
    let queue = backend.restart().await;
    assert_eq!(drain(&*queue).await, ids(0..10));
}

pub async fn unsettled_message_is_delivered_again_after_a_restart(mut backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![message(1), message(2)]).await.unwrap();
    let held = [next(&*queue).await, next(&*queue).await];
    queue.close().await;
    drop((held, queue));
    assert_eq!(drain(&*backend.restart().await).await, ids(1..3));
}

pub async fn dropped_delivery_goes_back_at_once(backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![message(1)]).await.unwrap();
    for _ in 0..5 {
        let delivery = next(&*queue).await;
        assert_eq!((delivery.message().id.as_str(), delivery.attempts()), ("1", 0));
        drop(delivery);
    }
    next(&*queue).await.ack().await.unwrap();
    assert_empty(&*queue).await;
}

pub async fn delivery_lost_in_a_panic_goes_back(backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![message(1)]).await.unwrap();
    let delivery = next(&*queue).await;
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let _held = delivery;
        std::panic::resume_unwind(Box::new("lost"));
    });
    assert!(tasks.join_next().await.unwrap().unwrap_err().is_panic());
    next(&*queue).await.ack().await.unwrap();
}

pub async fn pull_waits_for_a_push(backend: impl Backend) {
    let queue = backend.queue();
    let mut pull = queue.pull();
    assert!(timeout(Duration::from_millis(50), &mut pull).await.is_err(), "there is nothing yet");
    queue.push(vec![message(1)]).await.unwrap();
    assert_eq!(soon(pull).await.unwrap().unwrap().message().id, "1");
}

pub async fn each_of_many_pullers_gets_its_own_message(backend: impl Backend) {
    let queue = backend.queue();
    let mut pullers = JoinSet::new();
    for _ in 0..50 {
        let queue = Arc::clone(&queue);
        pullers.spawn(async move { next(&*queue).await });
    }
    queue.push((0..50).map(message).collect()).await.unwrap();
    let got: Vec<Delivery> = pullers.join_all().await;
    assert_eq!(got.iter().map(|delivery| delivery.message().id.clone()).collect::<HashSet<_>>(), ids(0..50));
    assert_eq!(queue.stats().await.unwrap().in_flight, 50);
}

pub async fn cancelled_pulls_lose_nothing(backend: impl Backend) {
    let queue = backend.queue();
    let canceller = {
        let queue = Arc::clone(&queue);
        async move {
            let mut got = HashSet::new();
            while got.len() < 100 {
                // Given up at any moment, also at the one at which a message arrives.
                if let Ok(delivery) = timeout(Duration::from_micros(fast_random() % 800), queue.pull()).await {
                    let delivery = delivery.unwrap().unwrap();
                    got.insert(delivery.message().id.clone());
                    delivery.ack().await.unwrap();
                }
            }
            got
        }
    };
    let pusher = async {
        for n in 0..100 {
            queue.push(vec![message(n)]).await.unwrap();
        }
    };
    let (got, ()) = soon(async { tokio::join!(canceller, pusher) }).await;
    assert_eq!(got, ids(0..100));
    assert_empty(&*queue).await;
}

pub async fn concurrent_pushes_are_all_delivered_once(backend: impl Backend) {
    let queue = backend.queue();
    let start = Arc::new(Barrier::new(100));
    let mut pushers = JoinSet::new();
    for n in 0..100 {
        let (queue, start) = (Arc::clone(&queue), Arc::clone(&start));
        pushers.spawn(async move {
            start.wait().await;
            queue.push(vec![message(3 * n), message(3 * n + 1), message(3 * n + 2)]).await.unwrap();
        });
    }
    pushers.join_all().await;
    assert_eq!(queue.stats().await.unwrap().ready, 300);
    let mut got = HashSet::new();
    for _ in 0..300 {
        let delivery = next(&*queue).await;
        assert!(got.insert(delivery.message().id.clone()), "delivered twice");
        delivery.ack().await.unwrap();
    }
    assert_eq!(got, ids(0..300));
}

pub async fn empty_push_is_no_push(backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![]).await.unwrap();
    assert_empty(&*queue).await;
    assert_eq!(queue.stats().await.unwrap().pushed_total, 0);
}

pub async fn messages_of_one_key_are_in_one_hand_at_a_time(backend: impl Backend) {
    let queue = backend.queue();
    queue.push((0..200).map(|n| keyed(n, n % 3)).collect()).await.unwrap();
    let in_hand = Arc::new(Mutex::new(HashSet::new()));
    let left = Arc::new(Mutex::new(ids(0..200)));
    let mut workers = JoinSet::new();
    for _ in 0..8 {
        let (queue, in_hand, left) = (Arc::clone(&queue), Arc::clone(&in_hand), Arc::clone(&left));
        workers.spawn(async move {
            while let Some(delivery) = queue.pull().await.unwrap() {
                let (id, key) = (delivery.message().id.clone(), delivery.message().key.clone());
                assert!(in_hand.lock().unwrap().insert(key.clone()), "two of {key:?} at once");
                tokio::time::sleep(Duration::from_micros(fast_random() % 500)).await;
                in_hand.lock().unwrap().remove(&key);
                match fast_random() % 4 {
                    0 => drop(delivery),
                    1 => delivery.retry(retry(Duration::from_micros(fast_random() % 3000))).await.unwrap(),
                    settled => {
                        left.lock().unwrap().remove(&id);
                        if settled == 2 {
                            delivery.ack().await.unwrap();
                        } else {
                            delivery.bury(burial("denied")).await.unwrap();
                        }
                    }
                }
                if left.lock().unwrap().is_empty() {
                    queue.close().await;
                }
            }
        });
    }
    workers.join_all().await;
    assert_eq!(queue.stats().await.unwrap().queued(), 0);
}

pub async fn settling_lets_the_next_of_its_key_come(backend: impl Backend) {
    let queue = backend.queue();
    queue.push((0..4).map(|n| keyed(n, 7)).collect()).await.unwrap();
    let mut got = HashSet::new();
    for settle in 0..4 {
        let delivery = next(&*queue).await;
        assert_no_more(&*queue).await;
        got.insert(delivery.message().id.clone());
        match settle {
            0 => delivery.ack().await.unwrap(),
            1 => delivery.bury(burial("denied")).await.unwrap(),
            _ => delivery.retry(retry(Duration::from_secs(3600))).await.unwrap(),
        }
    }
    assert_eq!(got, ids(0..4));
}

pub async fn retry_hands_the_turn_to_the_next_of_its_key(backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![keyed(1, 7), keyed(2, 7)]).await.unwrap();
    let first = next(&*queue).await;
    let retried = first.message().id.clone();
    first.retry(retry(Duration::from_secs(3600))).await.unwrap();
    let second = next(&*queue).await;
    assert_ne!(second.message().id, retried);
    assert_eq!(queue.stats().await.unwrap().waiting, 1);
}

pub async fn due_retry_waits_for_the_one_of_its_key_that_is_in_hand(backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![keyed(1, 7), keyed(2, 7)]).await.unwrap();
    next(&*queue).await.retry(retry(Duration::from_millis(100))).await.unwrap();
    let second = next(&*queue).await;
    assert!(timeout(Duration::from_millis(400), queue.pull()).await.is_err(), "its key is in hand");
    second.ack().await.unwrap();
    next(&*queue).await.ack().await.unwrap();
    assert_empty(&*queue).await;
}

pub async fn busy_key_does_not_hold_up_others(backend: impl Backend) {
    let queue = backend.queue();
    queue.push((0..2000).map(|n| keyed(n, 7)).collect()).await.unwrap();
    queue.push(vec![keyed(5000, 8)]).await.unwrap();
    let got = [next(&*queue).await, next(&*queue).await];
    assert_eq!(got.iter().map(|delivery| &delivery.message().key.0).collect::<HashSet<_>>().len(), 2);
}

pub async fn retry_is_not_delivered_before_its_time(backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![message(1)]).await.unwrap();
    for counted in [true, false] {
        let delivery = next(&*queue).await;
        let before = Instant::now();
        delivery.retry(Retry { counted, ..retry(Duration::from_millis(300)) }).await.unwrap();
        assert_eq!(queue.stats().await.unwrap().waiting, 1);
        drop(next(&*queue).await);
        assert!(before.elapsed() >= Duration::from_millis(300));
    }
}

pub async fn pull_waits_for_the_earliest_retry(backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![message(1), message(2), message(3)]).await.unwrap();
    let after = HashMap::from([("1", 3600), ("2", 0), ("3", 1800)]);
    for _ in 0..3 {
        let delivery = next(&*queue).await;
        let after = Duration::from_secs(after[delivery.message().id.as_str()]) + Duration::from_millis(200);
        delivery.retry(retry(after)).await.unwrap();
    }
    assert_eq!(next(&*queue).await.message().id, "2");
}

pub async fn retry_may_be_at_once_or_practically_never(backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![message(1)]).await.unwrap();
    next(&*queue).await.retry(retry(Duration::ZERO)).await.unwrap();
    next(&*queue).await.retry(retry(Duration::from_secs(3600 * 24 * 40))).await.unwrap();
    assert_no_more(&*queue).await;
    assert_eq!(queue.stats().await.unwrap().waiting, 1);
}

pub async fn counted_retries_use_up_patience_and_others_do_not(backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![message(1)]).await.unwrap();
    let mut expected = (0, Duration::ZERO);
    for (counted, milliseconds) in [(true, 20), (false, 50), (true, 30), (false, 10)] {
        let delivery = next(&*queue).await;
        assert_eq!((delivery.attempts(), delivery.waited()), expected);
        let after = Duration::from_millis(milliseconds);
        delivery.retry(Retry { counted, ..retry(after) }).await.unwrap();
        if counted {
            expected = (expected.0 + 1, expected.1 + after);
        }
    }
    let delivery = next(&*queue).await;
    assert_eq!((delivery.attempts(), delivery.waited()), expected);
}

pub async fn retry_and_its_patience_survive_a_restart(mut backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![message(1), message(2)]).await.unwrap();
    for _ in 0..2 {
        let delivery = next(&*queue).await;
        let after = if delivery.message().id == "1" { Duration::from_millis(600) } else { Duration::from_secs(3600) };
        delivery.retry(retry(after)).await.unwrap();
    }
    drop(queue);
    let queue = backend.restart().await;
    let delivery = next(&*queue).await;
    assert_eq!(delivery.message().id, "1");
    assert_eq!((delivery.attempts(), delivery.waited()), (1, Duration::from_millis(600)));
    assert_eq!(queue.stats().await.unwrap().waiting, 1);
}

pub async fn buried_message_is_listed_and_not_delivered(backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![message(1)]).await.unwrap();
    let delivery = next(&*queue).await;
    let pushed_at = delivery.pushed_at();
    delivery.retry(retry(Duration::ZERO)).await.unwrap();
    next(&*queue).await.bury(burial("denied")).await.unwrap();
    assert_no_more(&*queue).await;
    let letters = queue.dead_letters(None, 10).await.unwrap();
    let [letter] = &letters[..] else { panic!("{letters:?}") };
    let expected =
        DeadLetter { message: message(1), burial: burial("denied"), pushed_at, buried_at: letter.buried_at, attempts: 1 };
    assert_eq!(letter, &expected);
    assert!(letter.buried_at >= pushed_at);
    assert_eq!(queue.dead_letters(None, 10).await.unwrap(), letters, "listing takes nothing away");
}

pub async fn burying_survives_a_restart(mut backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![message(1)]).await.unwrap();
    next(&*queue).await.bury(burial("poison")).await.unwrap();
    let letters = queue.dead_letters(None, 10).await.unwrap();
    drop(queue);
    let queue = backend.restart().await;
    assert_no_more(&*queue).await;
    assert_eq!(queue.dead_letters(None, 10).await.unwrap(), letters);
}

pub async fn dead_letters_are_listed_oldest_first_in_pages(backend: impl Backend) {
    let queue = backend.queue();
    let order = bury_some(&*queue, 10).await;
    let mut listed = Vec::new();
    loop {
        let page = queue.dead_letters(listed.last().map(String::as_str), 3).await.unwrap();
        assert!(page.len() <= 3);
        if page.is_empty() {
            break;
        }
        listed.extend(page.into_iter().map(|letter| letter.message.id));
    }
    assert_eq!(listed, order);
    assert!(queue.dead_letters(None, 0).await.unwrap().is_empty());
    assert_eq!(queue.dead_letters(None, usize::MAX).await.unwrap().len(), 10);
}

pub async fn listing_loses_none_while_letters_are_taken_away(backend: impl Backend) {
    let queue = backend.queue();
    let order = bury_some(&*queue, 30).await;
    let mut listed = HashSet::new();
    let mut after: Option<String> = None;
    loop {
        let page = queue.dead_letters(after.as_deref(), 4).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.message.id.clone());
        // The last one too: the next page cannot begin after it.
        for letter in page.iter().filter(|letter| letter.message.id.parse::<usize>().unwrap() % 3 != 0) {
            queue.discard(&letter.message.id).await.unwrap();
        }
        listed.extend(page.into_iter().map(|letter| letter.message.id));
    }
    assert_eq!(listed, order.into_iter().collect());
}

pub async fn replayed_message_is_delivered_with_new_patience(mut backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![message(1)]).await.unwrap();
    let delivery = next(&*queue).await;
    let pushed_at = delivery.pushed_at();
    delivery.retry(retry(Duration::from_millis(1))).await.unwrap();
    next(&*queue).await.bury(burial("gave_up")).await.unwrap();
    assert!(queue.replay("1").await.unwrap());
    assert!(queue.dead_letters(None, 10).await.unwrap().is_empty());
    drop(queue);
    let queue = backend.restart().await;
    let delivery = next(&*queue).await;
    assert_eq!(delivery.message(), &message(1));
    assert_eq!((delivery.attempts(), delivery.waited(), delivery.pushed_at()), (0, Duration::ZERO, pushed_at));
    delivery.bury(burial("gave_up")).await.unwrap();
    assert!(queue.replay("1").await.unwrap(), "a second time");
    next(&*queue).await.ack().await.unwrap();
    assert_empty(&*queue).await;
}

pub async fn replayed_message_waits_for_its_key(backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![keyed(1, 7)]).await.unwrap();
    next(&*queue).await.bury(burial("denied")).await.unwrap();
    queue.push(vec![keyed(2, 7)]).await.unwrap();
    let in_hand = next(&*queue).await;
    assert!(queue.replay("1").await.unwrap());
    assert_no_more(&*queue).await;
    in_hand.ack().await.unwrap();
    assert_eq!(next(&*queue).await.message().id, "1");
}

pub async fn discarded_message_is_gone_for_good(mut backend: impl Backend) {
    let queue = backend.queue();
    bury_some(&*queue, 2).await;
    assert!(queue.discard("0").await.unwrap());
    assert!(!queue.discard("0").await.unwrap());
    assert!(!queue.replay("0").await.unwrap());
    drop(queue);
    let queue = backend.restart().await;
    assert_no_more(&*queue).await;
    let left = queue.dead_letters(None, 10).await.unwrap();
    assert_eq!(left.into_iter().map(|letter| letter.message.id).collect::<Vec<_>>(), ["1"]);
    assert_eq!(queue.stats().await.unwrap().discarded_total, 1);
}

pub async fn replay_and_discard_of_the_unknown_say_so(backend: impl Backend) {
    let queue = backend.queue();
    queue.push(vec![message(1)]).await.unwrap();
    for id in ["1", "2", "", "'; DROP TABLE message; --"] {
        assert!(!queue.replay(id).await.unwrap());
        assert!(!queue.discard(id).await.unwrap());
    }
    assert_eq!(drain(&*queue).await, ids(1..2));
}

pub async fn stats_add_up_at_every_step(backend: impl Backend) {
    let queue = backend.queue();
    let check = async |queued: [u64; 3], dead: u64, acked: u64, discarded: u64| {
        let stats = queue.stats().await.unwrap();
        assert_eq!([stats.ready, stats.waiting, stats.in_flight], queued);
        assert_eq!((stats.dead, stats.discarded_total), (dead, discarded));
        assert_eq!(stats.pushed_total, acked + stats.queued() + dead + discarded);
    };
    check([0, 0, 0], 0, 0, 0).await;
    queue.push(vec![keyed(0, 0), keyed(1, 0), message(2), message(3), message(4)]).await.unwrap();
    check([5, 0, 0], 0, 0, 0).await;
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(next(&*queue).await);
    }
    check([1, 0, 4], 0, 0, 0).await;
    held.pop().unwrap().ack().await.unwrap();
    check([1, 0, 3], 0, 1, 0).await;
    held.pop().unwrap().retry(retry(Duration::from_secs(3600))).await.unwrap();
    check([1, 1, 2], 0, 1, 0).await;
    let buried = held.pop().unwrap();
    let id = buried.message().id.clone();
    buried.bury(burial("denied")).await.unwrap();
    check([1, 1, 1], 1, 1, 0).await;
    drop(held);
    check([2, 1, 0], 1, 1, 0).await;
    queue.replay(&id).await.unwrap();
    check([3, 1, 0], 0, 1, 0).await;
    for acked in 1..=3 {
        check([4 - acked, 1, 0], 0, acked, 0).await;
        next(&*queue).await.ack().await.unwrap();
    }
    queue.push(vec![message(9)]).await.unwrap();
    next(&*queue).await.bury(burial("denied")).await.unwrap();
    queue.discard("9").await.unwrap();
    check([0, 1, 0], 0, 4, 1).await;
}

pub async fn stats_survive_a_restart(mut backend: impl Backend) {
    let queue = backend.queue();
    bury_some(&*queue, 3).await;
    queue.discard("1").await.unwrap();
    queue.push((10..15).map(|n| keyed(n, n % 2)).collect()).await.unwrap();
    next(&*queue).await.retry(retry(Duration::from_secs(3600))).await.unwrap();
    let stats = queue.stats().await.unwrap();
    drop(queue);
    assert_eq!(backend.restart().await.stats().await.unwrap(), stats);
    assert_eq!((stats.pushed_total, stats.discarded_total, stats.ready, stats.waiting, stats.dead), (8, 1, 4, 1, 2));
}

pub async fn oldest_is_the_first_pushed_that_is_not_settled(backend: impl Backend) {
    let queue = backend.queue();
    assert_eq!(queue.stats().await.unwrap().oldest, None);
    queue.push(vec![keyed(1, 7)]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(5)).await;
    queue.push(vec![keyed(2, 7)]).await.unwrap();
    let first = next(&*queue).await;
    let first_pushed = first.pushed_at();
    assert_eq!(queue.stats().await.unwrap().oldest, Some(first_pushed));
    first.bury(burial("denied")).await.unwrap();
    let second = next(&*queue).await;
    assert!(second.pushed_at() > first_pushed);
    assert_eq!(queue.stats().await.unwrap().oldest, Some(second.pushed_at()));
    queue.replay("1").await.unwrap();
    assert_eq!(queue.stats().await.unwrap().oldest, Some(first_pushed));
}

pub async fn probe_finds_the_queue_well(backend: impl Backend) {
    let queue = backend.queue();
    queue.probe().await.unwrap();
    assert_eq!(queue.stats().await.unwrap().pushed_total, 0);
}

pub async fn close_ends_pulls_and_refuses_pushes(mut backend: impl Backend) {
    let queue = backend.queue();
    let mut pulls = JoinSet::new();
    for _ in 0..5 {
        let queue = Arc::clone(&queue);
        pulls.spawn(async move { queue.pull().await.unwrap() });
    }
    tokio::time::sleep(Duration::from_millis(20)).await;
    queue.close().await;
    assert!(pulls.join_all().await.iter().all(Option::is_none));
    assert!(queue.pull().await.unwrap().is_none());
    assert!(matches!(queue.push(vec![message(1)]).await, Err(Error::Closed)));
    queue.close().await;
    drop(queue);
    assert_empty(&*backend.restart().await).await;
}

pub async fn what_is_in_hand_at_close_can_be_settled(mut backend: impl Backend) {
    let queue = backend.queue();
    queue.push((0..5).map(message).collect()).await.unwrap();
    let mut held = HashMap::new();
    for _ in 0..4 {
        let delivery = next(&*queue).await;
        held.insert(delivery.message().id.clone(), delivery);
    }
    let mut held: Vec<_> = held.into_iter().collect();
    queue.close().await;
    assert!(queue.pull().await.unwrap().is_none(), "though there is one more");
    held.pop().unwrap().1.ack().await.unwrap();
    held.pop().unwrap().1.retry(retry(Duration::from_secs(3600))).await.unwrap();
    held.pop().unwrap().1.bury(burial("denied")).await.unwrap();
    drop((held, queue));
    let queue = backend.restart().await;
    let stats = queue.stats().await.unwrap();
    assert_eq!((stats.ready, stats.waiting, stats.dead), (2, 1, 1));
}

/// The message with this number as its id, of a key of its own.
fn message(number: usize) -> Message {
    keyed(number, 1_000_000 + number)
}

fn keyed(number: usize, key: usize) -> Message {
    Message {
        id: number.to_string(),
        content_type: "text/plain".into(),
        key: PartitionKey(format!("key {key}")),
        body: format!("body of {number}").into(),
    }
}

fn ids(numbers: std::ops::Range<usize>) -> HashSet<String> {
    numbers.map(|number| number.to_string()).collect()
}

fn retry(after: Duration) -> Retry {
    Retry { after, counted: true, reason: "the registry answers 503".into() }
}

fn burial(kind: &str) -> Burial {
    Burial { kind: kind.into(), reason: "the key may not be used: allow it".into() }
}

async fn next(queue: &dyn Queue) -> Delivery {
    soon(queue.pull()).await.unwrap().expect("the queue is open")
}

/// Pushes messages `0..number` and buries them; gives the order of burials.
async fn bury_some(queue: &dyn Queue, number: usize) -> Vec<String> {
    queue.push((0..number).map(message).collect()).await.unwrap();
    let mut order = Vec::new();
    for _ in 0..number {
        let delivery = next(queue).await;
        order.push(delivery.message().id.clone());
        delivery.bury(burial("denied")).await.unwrap();
    }
    order
}

/// Acks what can be had, until nothing is ready.
async fn drain(queue: &dyn Queue) -> HashSet<String> {
    let mut got = HashSet::new();
    while queue.stats().await.unwrap().ready > 0 {
        let delivery = next(queue).await;
        got.insert(delivery.message().id.clone());
        delivery.ack().await.unwrap();
    }
    got
}

async fn assert_no_more(queue: &dyn Queue) {
    assert!(timeout(Duration::from_millis(50), queue.pull()).await.is_err(), "something was delivered");
}

async fn assert_empty(queue: &dyn Queue) {
    assert_no_more(queue).await;
    assert_eq!(queue.stats().await.unwrap().queued(), 0);
}

/// Different in each run and task; good enough to shake the order of things.
fn fast_random() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(0)
}
