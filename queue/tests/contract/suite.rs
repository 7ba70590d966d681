//! The promises, as functions over any backend.
//!
//! A new one goes into the list of [`hold_to_the_contract`] as well; the compiler says so when it is forgotten.

mod dead_letters;
mod deliveries;
mod history;
mod stats;
mod turns;

use std::{collections::HashSet, future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use countersign_queue::{Burial, Delivery, Message, PartitionKey, Queue, Retry};
use tokio::time::timeout;

pub use self::{dead_letters::*, deliveries::*, history::*, stats::*, turns::*};

/// A backend under test.
#[async_trait]
pub trait Backend: Sized {
    /// An empty queue of its own.
    async fn fresh() -> Self;
    /// An empty queue that keeps the past for so long. [`Backend::fresh`] keeps it for longer than any test takes.
    async fn keeping(history: Duration) -> Self;
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
            what_waits_for_its_key_comes_together,
            what_came_together_keeps_its_key_until_the_last_is_out_of_hand,
            what_came_together_and_was_not_settled_comes_again_after_a_restart,
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
            two_who_list_at_once_see_each_letter_once,
            order_of_many_dead_letters_stays_as_it_is,
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
            history_has_what_was_pushed_whatever_became_of_it,
            history_comes_oldest_first_in_pages,
            history_is_of_the_time_that_is_asked_for,
            what_is_run_again_is_a_message_like_any_other_and_no_history,
            stats_say_how_far_back_history_reaches,
            what_is_too_old_is_no_longer_history_but_is_delivered,
            queue_that_is_told_to_keep_nothing_keeps_nothing,
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
        replay_of: None,
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
