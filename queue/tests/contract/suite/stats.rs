//! What the queue says of itself, and how it ends.

use std::{collections::HashMap, sync::Arc, time::Duration};

use countersign_queue::Error;
use tokio::task::JoinSet;

use super::{Backend, assert_empty, burial, bury_some, keyed, message, next, retry};

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
    let mut again = backend.restart().await.stats().await.unwrap();
    // Who holds a partition in which nothing was delivered since is not known any more.
    for (partition, before) in again.partitions.iter_mut().zip(&stats.partitions).filter(|(now, _)| now.holder.is_none()) {
        assert_eq!((before.ready, before.in_flight), (0, 0));
        partition.holder.clone_from(&before.holder);
    }
    assert_eq!(again, stats);
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
