//! Three replicas on one RabbitMQ and one PostgreSQL ledger: nothing is lost or signed twice when any of them, or the broker,
//! dies, and nobody notices when they are restarted one after the other.

use std::env;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use integration_tests::daemon::Daemon;
use integration_tests::fleet::{Fleet, Sender, ensure_one_writer_at_a_time, sums};
use integration_tests::house::House;
use integration_tests::image::Image;
use integration_tests::process::{eventually, http_client};
use integration_tests::rabbitmq::RabbitMq;
use integration_tests::signature::signatures;
use serde_json::Value;
use tokio::sync::OnceCell;

const LIMIT: Duration = Duration::from_secs(60);
/// Events of the crash story; `make story` has 20,000.
const EVENTS: usize = 2_000;
/// Of an image, so that many different ones are on their way at once.
const EVENTS_PER_IMAGE: usize = 10;
const SENDERS: usize = 24;

/// One image, and the tags that it is pushed under.
struct Push {
    image: Image,
    repository: String,
    tags: Vec<String>,
    pushed: OnceCell<()>,
}

impl Push {
    fn new(number: usize) -> Result<Self> {
        // Every twentieth is no rule's.
        let namespace = if number % 20 == 7 { "other" } else { "team" };
        Ok(Self {
            image: Image::oci(&format!("image {number}"))?,
            repository: format!("{namespace}/app-{}", number % 50),
            tags: (0..=number % 4).map(|tag| format!("{number}.{tag}")).collect(),
            pushed: OnceCell::new(),
        })
    }

    fn is_covered(&self) -> bool {
        self.repository.starts_with("team/")
    }

    /// As the registry tells of it, once it is there.
    async fn event(&self, house: &House, tag: usize) -> Result<Value> {
        let tags: Vec<_> = self.tags.iter().map(String::as_str).collect();
        self.pushed.get_or_try_init(|| house.push(&self.image, &self.repository, &tags)).await?;
        Ok(House::event(&house.registry.host(), &self.repository, Some(&self.tags[tag]), &self.image.manifest.digest))
    }

    async fn check(&self, house: &House) -> Result<usize> {
        let digest = &self.image.manifest.digest;
        let mut expected: Vec<_> = self.tags.iter().map(|tag| house.reference(&self.repository, tag)).collect();
        expected.retain(|_| self.is_covered());
        expected.sort();
        let layers = signatures(&house.client, &self.repository, digest).await?;
        let valid = layers.iter().filter(|layer| layer.digest == *digest && layer.is_by(house.public_key()));
        let mut signed: Vec<_> = valid.map(|layer| layer.reference.clone()).collect();
        signed.sort();
        ensure!(signed == expected, "{}@{digest} is signed as {signed:?} and not as {expected:?}", self.repository);
        ensure!(layers.len() == expected.len(), "{}@{digest} has {} layers for {expected:?}", self.repository, layers.len());
        Ok(signed.len())
    }
}

/// What happens to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blow {
    /// kill -9, and started again.
    Replica,
    /// Stopped in order, and started again.
    BrokerStops,
    /// kill -9, and started again.
    BrokerDies,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_of_replicas_and_broker_at_random_under_load_loses_nothing_and_doubles_nothing() -> Result<()> {
    let number = |name: &str, otherwise: u64| env::var(name).map_or(Ok(otherwise), |text| text.parse().context(name.to_owned()));
    let seed = number("STORY_SEED", fastrand::u64(..))?;
    let events = usize::try_from(number("STORY_EVENTS", EVENTS as u64)?)?;
    eprintln!("STORY_SEED={seed} STORY_EVENTS={events}");
    let mut rng = Rng::with_seed(seed);
    let mut fleet = Fleet::build(3, "").await?;
    fleet.start().await?;

    let pushes = (0..events / EVENTS_PER_IMAGE).map(Push::new).collect::<Result<Vec<_>>>()?;
    let every_tag = pushes.iter().enumerate().flat_map(|(image, push)| (0..push.tags.len()).map(move |tag| (image, tag)));
    let mut deliveries: Vec<_> = every_tag.cycle().take(events).collect();
    // The same image again soon after, and much later.
    for chunk in deliveries.chunks_mut(500) {
        rng.shuffle(chunk);
    }
    for _ in 0..events / 4 {
        let (one, other) = (rng.usize(..events), rng.usize(..events));
        deliveries.swap(one, other);
    }
    let skipped = deliveries.iter().filter(|(image, _)| !pushes[*image].is_covered()).count();

    let (sender, began) = (fleet.sender()?, Instant::now());
    let (sent, done) = (AtomicUsize::new(0), AtomicBool::new(false));
    let Fleet { replicas, house, broker, .. } = &mut fleet;
    let house = &*house;
    let sending = async {
        let deliver = |&(image, tag): &(usize, usize)| {
            let (sender, pushes, sent) = (&sender, &pushes, &sent);
            async move {
                sender.send(&pushes[image].event(house, tag).await?).await?;
                sent.fetch_add(1, Ordering::Relaxed);
                anyhow::Ok(())
            }
        };
        stream::iter(deliveries.iter().map(deliver)).buffer_unordered(SENDERS).try_for_each(async |()| Ok(())).await?;
        done.store(true, Ordering::Relaxed);
        anyhow::Ok(())
    };
    let ((), blows) = tokio::try_join!(sending, strike(replicas, broker, &mut rng, events, &done))?;
    let count = |blow| blows.iter().filter(|one| **one == blow).count();
    let (sent_after, stood) = (began.elapsed(), (sender.refused(), sender.broken()));
    fleet.start().await?;
    let metrics = fleet.wait_quiet(events as u64).await?;
    let settled_after = began.elapsed();

    let checking = pushes.iter().map(|push| push.check(&fleet.house));
    let signatures: usize = stream::iter(checking).buffer_unordered(8).try_fold(0, async |all, one| Ok(all + one)).await?;
    let (writes, shared) = ensure_one_writer_at_a_time(&fleet.house.registry.served()?)?;
    eprintln!(
        "{events} events of {} images in {sent_after:.0?}, settled after {settled_after:.0?}; {} replicas killed, broker stopped \
         {} times and killed {} times; 503: {}, no answer: {}; {}; {signatures} signatures by {writes} writes, {shared} images \
         had writers in several replicas",
        pushes.len(),
        count(Blow::Replica),
        count(Blow::BrokerStops),
        count(Blow::BrokerDies),
        stood.0,
        stood.1,
        sums(&metrics),
    );
    let agreed = eventually("the command line says what the replicas do", LIMIT, async || {
        // The broker gets what it had not answered seconds after it is back, so there may be more of everything than just now.
        let metrics = fleet.wait_settled(events as u64).await?;
        let status = fleet.house.run(&["queue", "status", "--output", "json"]).await?.expect_code(0)?.json()?;
        let told = ["received", "signed", "already_signed", "skipped", "dead", "queued"].map(|name| status[name].as_u64());
        let ended = ["signed", "already_signed", "skipped", "dead"].map(|outcome| metrics.ended(outcome));
        let expected = [[metrics.received()].as_slice(), &ended, &[metrics.queued()]].concat();
        let is_same = told.iter().copied().eq(expected.into_iter().map(Some));
        Ok(is_same.then_some(metrics))
    });
    let metrics = agreed.await?;
    // What was not answered with 202 may have been taken all the same, and was sent again.
    let most = events as u64 + sender.refused() + sender.broken();
    ensure!(metrics.received() <= most, "more came in than was sent: {}", sums(&metrics));
    ensure!(metrics.ended("dead") == 0, "nothing had to fail: {}", sums(&metrics));
    ensure!(metrics.ended("skipped") >= skipped as u64, "{skipped} events are no rule's: {}", sums(&metrics));
    Ok(())
}

/// Until all is sent, and each blow has fallen at least once. The more events, the rarer.
async fn strike(
    replicas: &mut [Daemon],
    broker: &mut RabbitMq,
    rng: &mut Rng,
    events: usize,
    done: &AtomicBool,
) -> Result<Vec<Blow>> {
    let (mut blows, longest) = (vec![], 1_000 + events as u64 / 2);
    loop {
        let mut round = [[Blow::Replica; 6].as_slice(), &[Blow::BrokerStops, Blow::BrokerDies]].concat();
        rng.shuffle(&mut round);
        for blow in round {
            if done.load(Ordering::Relaxed) && blows.len() >= 8 {
                return Ok(blows);
            }
            tokio::time::sleep(Duration::from_millis(rng.u64(300..longest))).await;
            match blow {
                Blow::Replica => {
                    let replica = rng.choice(replicas.iter_mut()).context("there are three")?;
                    replica.kill()?;
                    tokio::time::sleep(Duration::from_millis(rng.u64(0..500))).await;
                    replica.start_alive().await?;
                }
                Blow::BrokerStops => broker.stop().await?,
                Blow::BrokerDies => broker.kill()?,
            }
            broker.start_again().await?;
            blows.push(blow);
        }
    }
}

/// What `/readyz` says: nothing, or the checks that fail.
async fn unready(replica: &Daemon) -> Result<Vec<String>> {
    let answer = http_client()?.get(format!("{}/readyz", replica.url())).send().await?;
    if answer.status().is_success() {
        return Ok(vec![]);
    }
    let problem: Value = answer.json().await?;
    let checks = problem["checks"].as_array().context("no checks")?.iter().filter(|check| check["ok"] == false);
    Ok(checks.filter_map(|check| check["name"].as_str()).map(str::to_owned).collect())
}

async fn wait_all(fleet: &Fleet, expected: &[&str]) -> Result<()> {
    for replica in &fleet.replicas {
        let what = format!("{expected:?} is what /readyz complains of");
        eventually(&what, LIMIT, async || Ok((unready(replica).await? == expected).then_some(()))).await?;
    }
    Ok(())
}

/// Sends events of new images with four tags each, a few at once, until it is told to stop; returns what was sent.
async fn load(house: &House, sender: &Sender, stop: &AtomicBool) -> Result<Vec<Push>> {
    let numbers = stream::iter(0..).take_while(|_| std::future::ready(!stop.load(Ordering::Relaxed)));
    let sending = numbers.map(async |number| {
        let push = Push::new(number * 20 + 3)?;
        for tag in 0..push.tags.len() {
            sender.send(&push.event(house, tag).await?).await?;
        }
        Ok(push)
    });
    sending.buffer_unordered(4).try_collect().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rolling_restart_under_load_loses_no_event_and_no_time() -> Result<()> {
    let mut fleet = Fleet::build(3, "").await?;
    fleet.start().await?;
    let (sender, stop) = (fleet.sender()?, AtomicBool::new(false));
    let Fleet { replicas, house, .. } = &mut fleet;
    let restarting = async {
        for _ in 0..2 {
            for replica in replicas.iter_mut() {
                tokio::time::sleep(Duration::from_millis(500)).await;
                let began = Instant::now();
                let status = replica.terminate(LIMIT).await?;
                ensure!(status.success(), "it ended with {status}:\n{}", replica.logged());
                // After that it would give back what it cannot finish.
                ensure!(began.elapsed() < Duration::from_secs(15), "it took {:?} to stop", began.elapsed());
                replica.start().await?;
            }
        }
        stop.store(true, Ordering::Relaxed);
        Ok(())
    };
    let (pushes, ()) = tokio::try_join!(load(house, &sender, &stop), restarting)?;
    let events = 4 * pushes.len() as u64;
    let metrics = fleet.wait_settled(events).await?;
    for push in &pushes {
        ensure!(push.check(&fleet.house).await? == 4);
    }
    let (writes, shared) = ensure_one_writer_at_a_time(&fleet.house.registry.served()?)?;
    let took = "extract(epoch FROM concluded_at - received_at)";
    let slowest: f64 = fleet.sql(&format!("SELECT max({took}) FROM countersign.event"))?.parse()?;
    let half = format!("SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY {took}) FROM countersign.event");
    let half: f64 = fleet.sql(&half)?.parse()?;
    eprintln!(
        "{events} events, six restarts, the slowest took {slowest:.1} s; {writes} writes, {shared} images had writers in several \
         replicas; {}",
        sums(&metrics),
    );
    ensure!(metrics.received() <= events + sender.broken(), "{}", sums(&metrics));
    // A time-out of the broker's would be twenty seconds or more, beside what an event takes on a machine as busy as this.
    ensure!(slowest < half + 20.0, "an event took {slowest} s, and half of them took less than {half} s");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_replica_is_ready_without_the_broker_or_the_database() -> Result<()> {
    let mut fleet = Fleet::build(2, "").await?;
    fleet.start().await?;
    fleet.broker.stop().await?;
    wait_all(&fleet, &["queue"]).await?;
    fleet.broker.start_again().await?;
    wait_all(&fleet, &[]).await?;
    fleet.database.stop()?;
    wait_all(&fleet, &["ledger"]).await?;
    fleet.database.start_again()?;
    wait_all(&fleet, &[]).await
}
