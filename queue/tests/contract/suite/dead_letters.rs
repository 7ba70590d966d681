//! What is buried stays until somebody takes it away.

use std::{collections::HashSet, time::Duration};

use countersign_queue::DeadLetter;

use super::{Backend, assert_empty, assert_no_more, burial, bury_some, drain, ids, keyed, message, next, retry};

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

pub async fn two_who_list_at_once_see_each_letter_once(backend: impl Backend) {
    let queue = backend.queue();
    let order = bury_some(&*queue, 100).await;
    // From now on none is one that was never looked at.
    assert_eq!(queue.dead_letters(None, 1000).await.unwrap().len(), 100);
    assert!(queue.dead_letters(order.last().map(String::as_str), 1000).await.unwrap().is_empty());
    let mut listed = [vec![], vec![]];
    let mut ended = [false; 2];
    while ended != [true; 2] {
        for ((listed, limit), ended) in listed.iter_mut().zip([7, 40]).zip(&mut ended).filter(|(_, ended)| !**ended) {
            let page = queue.dead_letters(listed.last().map(String::as_str), limit).await.unwrap();
            *ended = page.is_empty();
            listed.extend(page.into_iter().map(|letter| letter.message.id));
        }
    }
    for mut listed in listed {
        listed.sort();
        let mut order = order.clone();
        order.sort();
        assert_eq!(listed, order);
    }
}

pub async fn order_of_many_dead_letters_stays_as_it_is(backend: impl Backend) {
    let queue = backend.queue();
    let mut order = bury_some(&*queue, 300).await;
    for round in 0..3 {
        let mut listed = Vec::new();
        loop {
            let page = queue.dead_letters(listed.last().map(String::as_str), 70).await.unwrap();
            if page.is_empty() {
                break;
            }
            listed.extend(page.into_iter().map(|letter| letter.message.id));
        }
        assert_eq!(listed, order, "{round}");
        // A few, far between, and at once.
        let taken: Vec<_> = order.iter().skip(round).step_by(7).cloned().collect();
        let replays = taken.iter().map(|id| async { queue.replay(id).await.unwrap() });
        assert!(futures::future::join_all(replays).await.into_iter().all(|was_there| was_there));
        order.retain(|id| !taken.contains(id));
        for _ in &taken {
            next(&*queue).await.ack().await.unwrap();
        }
    }
    assert_eq!(queue.stats().await.unwrap().dead, order.len() as u64);
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
