//! Handling that is cut short, or held up by somebody who hangs.

use super::*;

/// Polls `future` so many times, then drops it, as a crash at one of its await points would.
pub(super) async fn dropped_after<F: Future>(polls: usize, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut left = polls;
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending => {
            left -= 1;
            if left == 0 { Poll::Ready(None) } else { Poll::Pending }
        }
    })
    .await
}

#[tokio::test]
async fn event_that_others_may_have_is_left_alone_and_nothing_is_said_of_it() {
    let house = House::new().await;
    let pipeline = house.pipeline(release());
    let digest = house.image("lost");
    house.push(Some("1.0"), &digest).await;
    let lost = CancellationToken::new();
    let delivery = house.queue.pull().await.unwrap().unwrap().until(lost.clone());
    lost.cancel();
    assert!(pipeline.handle(vec![delivery]).await.is_none());
    assert!(house.signed(&digest).is_empty());

    // And one that is lost when it was handled, and is to be a dead letter.
    house.enqueue("text/plain", "key", b"no event".to_vec()).await;
    let lost = CancellationToken::new();
    let (mut handled, mut signed) = (None, 0);
    while handled.is_none() {
        let delivery = house.queue.pull().await.unwrap().unwrap();
        if delivery.message().content_type == "text/plain" {
            handled = pipeline.handle(vec![delivery.until(lost.clone())]).await;
        } else {
            pipeline.settle(pipeline.handle(vec![delivery]).await.unwrap()).await.unwrap();
            signed += 1;
        }
    }
    lost.cancel();
    pipeline.settle(handled.unwrap()).await.unwrap();
    assert!(house.dead().await.is_empty());
    assert_eq!(house.ledger.sums().await.unwrap().concluded(), signed);

    house.settle(&pipeline).await;
    assert_eq!(house.signed(&digest), [tagged("1.0")]);
    assert_eq!(house.dead().await.len(), 1);
}

#[tokio::test]
async fn handling_that_ends_at_any_await_point_is_done_again_and_signs_once() {
    let house = House::new().await;
    let (mut polls, mut survived) = (0, 0);
    while survived < 3 {
        polls += 1;
        let digest = house.image(&format!("crash {polls}"));
        house.push(Some("1.0"), &digest).await;
        // What a process knows goes with it; what is on disk and in the registry stays.
        let first = house.pipeline(release());
        let delivery = house.queue.pull().await.unwrap().unwrap();
        survived += u32::from(dropped_after(polls, first.handle(vec![delivery])).await.is_some());
        house.settle(&house.pipeline(release())).await;
        assert_eq!(house.signed(&digest), [tagged("1.0")], "dropped after {polls} polls");
    }
    assert!(polls > 12, "only {polls} polls: the drops did not reach every stage");
    assert!(house.dead().await.is_empty());
}

#[tokio::test]
async fn a_queue_or_a_ledger_whose_thread_died_ends_the_work_with_an_error() {
    #[derive(Debug)]
    struct Broken;
    #[async_trait]
    impl Queue for Broken {
        async fn push(&self, _: Vec<Message>) -> Result<(), queue::Error> {
            unreachable!()
        }
        async fn pull_together(&self) -> Result<Vec<Delivery>, queue::Error> {
            Err(queue::Error::Died)
        }
        async fn stats(&self) -> Result<queue::Stats, queue::Error> {
            unreachable!()
        }
        async fn dead_letters(&self, _: Option<&str>, _: usize) -> Result<Vec<DeadLetter>, queue::Error> {
            unreachable!()
        }
        async fn replay(&self, _: &str) -> Result<bool, queue::Error> {
            unreachable!()
        }
        async fn discard(&self, _: &str) -> Result<bool, queue::Error> {
            unreachable!()
        }
        async fn history(&self, _: Timestamp, _: Timestamp, _: Option<&str>, _: usize) -> Result<Vec<Kept>, queue::Error> {
            unreachable!()
        }
        async fn close(&self) {}
    }
    let house = House::new().await;
    let error = house.pipeline(release()).work(&Broken).await.unwrap_err();
    assert!(error.to_string().contains("restart"), "{error}");
}

/// So many workers until `done` says so.
async fn work_until(house: &House, pipeline: &Pipeline, workers: usize, done: impl AsyncFn() -> bool) {
    let working = futures::future::join_all((0..workers).map(|_| pipeline.work(&*house.queue)));
    let waiting = async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(60), async {
        tokio::select! {
            ended = working => panic!("the workers ended: {ended:?}"),
            () = waiting => {}
        }
    });
    in_time.await.expect("it is done in a minute");
}

fn two_teams() -> Vec<Rule> {
    vec![rule("team", "release"), Rule { scope: Scope::parse("swift").unwrap(), ..rule("swift", "other") }]
}

#[tokio::test]
async fn a_witness_whose_kms_hangs_leaves_the_others_their_workers() {
    let house = House::new().await;
    let pipeline = house.pipeline(two_teams()).with_slots(8);
    *house.key.slow.lock().unwrap() = Duration::from_secs(3600);
    house.push_many("team/app", 40).await;
    house.push_many("swift/app", 40).await;
    work_until(&house, &pipeline, 8, async || house.ledger.sums().await.unwrap().signed == 40).await;
    let hanging = house.calls();
    assert!((1..=6).contains(&hanging), "{hanging} of 8 workers hang");
    // What turned away went back uncounted, and is done when the KMS is there again.
    *house.key.slow.lock().unwrap() = Duration::ZERO;
    let done = async || house.ledger.sums().await.unwrap().signed == 80;
    work_until(&house, &pipeline, 8, done).await;
}

#[tokio::test]
async fn a_kms_that_is_away_is_not_asked_by_every_event_and_none_of_them_dies_of_it() {
    let house = House::new().await;
    let pipeline = house.pipeline(two_teams()).with_slots(4);
    house.key.away.store(true, SeqCst);
    let since = std::time::Instant::now();
    house.push_many("team/app", 30).await;
    let witness = house.witnesses["release"].clone();
    work_until(&house, &pipeline, 4, async || witness.status().away.is_some()).await;
    house.push_many("swift/app", 30).await;
    work_until(&house, &pipeline, 4, async || house.ledger.sums().await.unwrap().signed == 30).await;
    // It is tried again after a second, two, four.
    let (asked, tries) = (house.calls(), (2 * since.elapsed().as_secs() + 2).ilog2().max(3));
    assert!(asked <= 5 + 4 + tries, "{asked} calls to a KMS that is away");
    let looked_up = house.registry.store().asked.iter().filter(|asked| asked.contains("team/app")).count();
    house.key.away.store(false, SeqCst);
    work_until(&house, &pipeline, 4, async || house.ledger.sums().await.unwrap().signed == 60).await;
    assert!(house.dead().await.is_empty());
    assert!(looked_up < 30 * 4, "{looked_up} requests to the registry for nothing");
}
