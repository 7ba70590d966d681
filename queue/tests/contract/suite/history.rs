//! What was pushed can be had again for a while.

use std::time::Duration;

use countersign_queue::{Kept, Message, Queue};
use jiff::{SignedDuration, Timestamp};

use super::{Backend, burial, message, next, soon};

pub async fn history_has_what_was_pushed_whatever_became_of_it(mut backend: impl Backend) {
    let queue = backend.queue();
    queue.push((0..5).map(message).collect()).await.unwrap();
    next(&*queue).await.ack().await.unwrap();
    next(&*queue).await.bury(burial("denied")).await.unwrap();
    next(&*queue).await.bury(burial("denied")).await.unwrap();
    let dead = queue.dead_letters(None, 10).await.unwrap();
    assert!(queue.discard(&dead[0].message.id).await.unwrap());
    assert!(queue.replay(&dead[1].message.id).await.unwrap());
    let held = next(&*queue).await;
    let kept = all(&*queue).await;
    assert_eq!(messages(&kept), (0..5).map(message).collect::<Vec<_>>());
    held.ack().await.unwrap();
    assert_eq!(all(&*queue).await, kept);
    drop(queue);
    let queue = backend.restart().await;
    assert_eq!(all(&*queue).await, kept);
    assert_eq!(queue.stats().await.unwrap().queued(), 2, "listing delivers nothing and takes nothing");
}

pub async fn history_comes_oldest_first_in_pages(backend: impl Backend) {
    let queue = backend.queue();
    for n in 0..10 {
        queue.push(vec![message(2 * n), message(2 * n + 1)]).await.unwrap();
    }
    let mut listed: Vec<Kept> = Vec::new();
    loop {
        let after = listed.last().map(|kept| kept.cursor.clone());
        let page = queue.history(Timestamp::MIN, Timestamp::MAX, after.as_deref(), 3).await.unwrap();
        assert!(page.len() <= 3);
        if page.is_empty() {
            break;
        }
        listed.extend(page);
        // What is settled between two pages is in none twice, and missing from none.
        next(&*queue).await.ack().await.unwrap();
    }
    assert_eq!(messages(&listed), (0..20).map(message).collect::<Vec<_>>());
    assert!(listed.is_sorted_by_key(|kept| kept.pushed_at));
    assert!(queue.history(Timestamp::MIN, Timestamp::MAX, None, 0).await.unwrap().is_empty());
    for cursor in ["", "no cursor", "1.2.3", "9999999999999999999999.1"] {
        let page = queue.history(Timestamp::MIN, Timestamp::MAX, Some(cursor), 1).await.unwrap();
        assert_eq!(messages(&page), [message(0)], "{cursor}");
    }
}

pub async fn history_is_of_the_time_that_is_asked_for(backend: impl Backend) {
    let queue = backend.queue();
    for n in 0..5 {
        queue.push(vec![message(n)]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let kept = all(&*queue).await;
    let times: Vec<_> = kept.iter().map(|kept| kept.pushed_at).collect();
    let between = async |from, until| {
        let page = queue.history(from, until, None, 10).await.unwrap();
        page.into_iter().map(|kept| kept.message.id).collect::<Vec<_>>()
    };
    assert_eq!(between(times[1], times[3]).await, ["1", "2"], "from the first on, and before the second");
    assert_eq!(between(times[1], times[1]).await, [""; 0]);
    assert_eq!(between(times[3], times[1]).await, [""; 0]);
    assert_eq!(between(times[4] + SignedDuration::from_nanos(1), Timestamp::MAX).await, [""; 0]);
    let after = queue.history(times[1], times[3], Some(&kept[1].cursor), 10).await.unwrap();
    assert_eq!(after, kept[2..3]);
    let after = queue.history(times[3], Timestamp::MAX, Some(&kept[1].cursor), 10).await.unwrap();
    assert_eq!(after, kept[3..], "a cursor of before that time");
}

pub async fn what_is_run_again_is_a_message_like_any_other_and_no_history(mut backend: impl Backend) {
    let queue = backend.queue();
    let again = Message { id: "again".into(), replay_of: Some("1".into()), ..message(1) };
    queue.push(vec![message(1)]).await.unwrap();
    next(&*queue).await.ack().await.unwrap();
    queue.push(vec![again.clone()]).await.unwrap();
    assert_eq!(messages(&all(&*queue).await), [message(1)]);
    let delivery = next(&*queue).await;
    assert_eq!(delivery.message(), &again);
    delivery.bury(burial("denied")).await.unwrap();
    assert_eq!(queue.dead_letters(None, 1).await.unwrap()[0].message, again);
    assert!(queue.replay("again").await.unwrap());
    drop(queue);
    let queue = backend.restart().await;
    let delivery = next(&*queue).await;
    assert_eq!(delivery.message(), &again);
    delivery.ack().await.unwrap();
    assert_eq!(messages(&all(&*queue).await), [message(1)]);
    assert_eq!(queue.stats().await.unwrap().pushed_total, 2);
}

pub async fn stats_say_how_far_back_history_reaches(mut backend: impl Backend) {
    let queue = backend.queue();
    let history = queue.stats().await.unwrap().history.expect("this queue keeps its past");
    assert_eq!((history.oldest, history.messages), (None, 0));
    queue.push(vec![message(1)]).await.unwrap();
    next(&*queue).await.ack().await.unwrap();
    queue.push(vec![message(2)]).await.unwrap();
    let kept = all(&*queue).await;
    drop(queue);
    let history = backend.restart().await.stats().await.unwrap().history.unwrap();
    assert_eq!((history.oldest, history.messages), (Some(kept[0].pushed_at), 2));
}

pub async fn what_is_too_old_is_no_longer_history_but_is_delivered<B: Backend>(_: B) {
    let backend = B::keeping(Duration::from_millis(300)).await;
    let queue = backend.queue();
    queue.push(vec![message(1), message(2), message(3)]).await.unwrap();
    next(&*queue).await.ack().await.unwrap();
    next(&*queue).await.bury(burial("denied")).await.unwrap();
    soon(async {
        while !all(&*queue).await.is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert_eq!(queue.stats().await.unwrap().history.unwrap().oldest, None);
    let id = queue.dead_letters(None, 1).await.unwrap().remove(0).message.id;
    assert!(queue.replay(&id).await.unwrap(), "a dead letter is kept until somebody says so");
    for _ in 0..2 {
        next(&*queue).await.ack().await.unwrap();
    }
    assert_eq!(queue.stats().await.unwrap().queued(), 0);
}

pub async fn queue_that_is_told_to_keep_nothing_keeps_nothing<B: Backend>(_: B) {
    let backend = B::keeping(Duration::ZERO).await;
    let queue = backend.queue();
    queue.push(vec![message(1), message(2)]).await.unwrap();
    next(&*queue).await.ack().await.unwrap();
    assert_eq!(all(&*queue).await, []);
    assert_eq!(queue.stats().await.unwrap().history, None);
    next(&*queue).await.ack().await.unwrap();
}

async fn all(queue: &dyn Queue) -> Vec<Kept> {
    queue.history(Timestamp::MIN, Timestamp::MAX, None, 1000).await.unwrap()
}

fn messages(kept: &[Kept]) -> Vec<Message> {
    kept.iter().map(|kept| kept.message.clone()).collect()
}
