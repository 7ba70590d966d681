//! Whose turn it is: equal keys, and retries at their time.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use countersign_queue::{Delivery, MOST_TOGETHER, Queue, Retry};
use tokio::{task::JoinSet, time::timeout};

use super::{Backend, assert_empty, assert_no_more, burial, fast_random, ids, keyed, message, next, retry, soon};

pub async fn messages_of_one_key_are_in_one_hand_at_a_time(backend: impl Backend) {
    let queue = backend.queue();
    queue.push((0..200).map(|n| keyed(n, n % 3)).collect()).await.unwrap();
    let in_hand = Arc::new(Mutex::new(HashSet::new()));
    let left = Arc::new(Mutex::new(ids(0..200)));
    let mut workers = JoinSet::new();
    for _ in 0..8 {
        let (queue, in_hand, left) = (Arc::clone(&queue), Arc::clone(&in_hand), Arc::clone(&left));
        workers.spawn(async move {
            loop {
                // Some want one at a time.
                let together = if fast_random().is_multiple_of(3) {
                    queue.pull().await.unwrap().into_iter().collect()
                } else {
                    queue.pull_together().await.unwrap()
                };
                let Some(key) = together.first().map(|delivery| delivery.message().key.clone()) else { return };
                assert!(together.len() <= MOST_TOGETHER && together.iter().all(|delivery| delivery.message().key == key));
                assert!(in_hand.lock().unwrap().insert(key.clone()), "two of {key:?} at once");
                let last = together.len() - 1;
                for (place, delivery) in together.into_iter().enumerate() {
                    let id = delivery.message().id.clone();
                    tokio::time::sleep(Duration::from_micros(fast_random() % 500)).await;
                    if place == last {
                        in_hand.lock().unwrap().remove(&key);
                    }
                    match fast_random() % 4 {
                        0 => drop(delivery),
                        1 => delivery.retry(retry(Duration::from_micros(fast_random() % 3000))).await.unwrap(),
                        settled => {
                            assert!(left.lock().unwrap().remove(&id), "{id} came again");
                            if settled == 2 {
                                delivery.ack().await.unwrap();
                            } else {
                                delivery.bury(burial("denied")).await.unwrap();
                            }
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

/// Three of one key that came in while a fourth was in hand, pulled together.
async fn three_together(queue: &dyn Queue) -> Vec<Delivery> {
    queue.push(vec![keyed(0, 7)]).await.unwrap();
    let first = next(queue).await;
    queue.push((1..4).map(|n| keyed(n, 7)).collect()).await.unwrap();
    // A broker gives them out when it likes.
    tokio::time::sleep(Duration::from_millis(500)).await;
    first.ack().await.unwrap();
    let together = soon(queue.pull_together()).await.unwrap();
    let got: HashSet<_> = together.iter().map(|delivery| delivery.message().id.clone()).collect();
    assert_eq!((together.len(), got), (3, ids(1..4)));
    together
}

pub async fn what_waits_for_its_key_comes_together(backend: impl Backend) {
    let queue = backend.queue();
    let together = three_together(&*queue).await;
    let stats = queue.stats().await.unwrap();
    assert_eq!((stats.ready, stats.in_flight), (0, 3));
    for delivery in together {
        delivery.ack().await.unwrap();
    }
    assert_empty(&*queue).await;
    queue.close().await;
    assert!(queue.pull_together().await.unwrap().is_empty());
}

pub async fn what_came_together_keeps_its_key_until_the_last_is_out_of_hand(backend: impl Backend) {
    let queue = backend.queue();
    let mut together = three_together(&*queue).await.into_iter();
    let (acked, dropped, retried) = (together.next().unwrap(), together.next().unwrap(), together.next().unwrap());
    let again = HashSet::from([dropped.message().id.clone(), retried.message().id.clone(), "4".to_owned()]);
    queue.push(vec![keyed(4, 7)]).await.unwrap();
    acked.ack().await.unwrap();
    drop(dropped);
    assert_no_more(&*queue).await;
    retried.retry(retry(Duration::ZERO)).await.unwrap();
    let mut got = HashSet::new();
    while got.len() < 3 {
        let together = soon(queue.pull_together()).await.unwrap();
        assert_no_more(&*queue).await;
        for delivery in together.into_iter().rev() {
            assert!(got.insert(delivery.message().id.clone()));
            delivery.bury(burial("denied")).await.unwrap();
        }
    }
    assert_eq!(got, again);
    let stats = queue.stats().await.unwrap();
    assert_eq!((stats.queued(), stats.dead), (0, 3));
}

pub async fn what_came_together_and_was_not_settled_comes_again_after_a_restart(mut backend: impl Backend) {
    let queue = backend.queue();
    let mut together = three_together(&*queue).await;
    let settled = together.remove(0);
    let left: HashSet<_> = together.iter().map(|delivery| delivery.message().id.clone()).collect();
    settled.ack().await.unwrap();
    drop((together, queue));
    let queue = backend.restart().await;
    let mut got = HashSet::new();
    while got.len() < 2 {
        for delivery in soon(queue.pull_together()).await.unwrap() {
            got.insert(delivery.message().id.clone());
            delivery.ack().await.unwrap();
        }
    }
    assert_eq!(got, left);
    assert_empty(&*queue).await;
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
        let waiting = queue.stats().await.unwrap().waiting;
        assert!(waiting == 1 || before.elapsed() >= Duration::from_millis(300), "{waiting}");
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
