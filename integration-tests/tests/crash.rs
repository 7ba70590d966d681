//! Nothing that was pushed is lost, and nothing is signed twice, however often the daemon dies and whatever the registry does.

use std::time::Duration;

use anyhow::{Result, ensure};
use futures::future::try_join_all;
use integration_tests::house::{House, Plan, TOKEN};
use integration_tests::image::Image;
use integration_tests::process::eventually;
use integration_tests::proxy::Proxy;
use integration_tests::registry::{Notify, Options};
use integration_tests::signature::signatures;

/// Pushed in each round while the daemon is killed once.
const IMAGES: usize = 12;
/// 25 rounds of 12 images, 24 of them with a kill.
const ROUNDS: usize = 25;
const SETTLE: Duration = Duration::from_secs(120);

/// One image and the tags that it is pushed under, all at once.
struct Push {
    image: Image,
    repository: String,
    tags: Vec<String>,
}

impl Push {
    fn new(number: usize) -> Result<Self> {
        let tags = if number.is_multiple_of(3) { 1..=3 } else { 1..=1 };
        Ok(Self {
            image: Image::oci(&format!("image {number}"))?,
            repository: format!("team/app-{}", number % 7),
            tags: tags.map(|tag| format!("{number}.{tag}")).collect(),
        })
    }

    fn tags(&self) -> Vec<&str> {
        self.tags.iter().map(String::as_str).collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_at_any_moment_and_a_registry_that_is_down_lose_nothing_and_double_nothing() -> Result<()> {
    // The registry tries again at once, so that the daemon is never idle for long.
    let patience = Duration::from_millis(50);
    let mut house = House::build(Plan::default()).await?;
    let hook = format!("{}/events/main", house.daemon.url());
    let notify = Notify { threshold: 1, backoff: patience, ..Notify::new(hook, TOKEN) };
    house.replace_registry(Options { notify: Some(notify), ..Options::default() }).await?;
    let proxy = Proxy::start(&house.registry.host()).await?;
    house.route_registry(&proxy.url())?;
    house.daemon.start().await?;

    let pushes = (0..ROUNDS * IMAGES).map(Push::new).collect::<Result<Vec<_>>>()?;
    for (round, pushes) in pushes.chunks(IMAGES).enumerate() {
        // For a third of the time countersign does not reach the registry; once the registry itself dies meanwhile.
        proxy.refuse(round % 6 >= 4);
        proxy.cut();
        push_while_killing(&mut house, pushes, round > 0).await?;
        if round == 16 {
            // What the registry has not delivered when it dies would be lost by it, not by countersign.
            house.registry.wait_delivered(SETTLE).await?;
            house.registry.kill()?;
            restart(&mut house).await?;
            house.registry.start_again().await?;
        }
    }
    proxy.refuse(false);
    house.registry.wait_delivered(SETTLE).await?;
    let tags: usize = pushes.iter().map(|push| push.tags.len()).sum();
    let metrics = house.wait_settled(u64::try_from(tags)?, SETTLE).await?;

    for push in &pushes {
        let digest = &push.image.manifest.digest;
        let mut expected: Vec<_> = push.tags.iter().map(|tag| house.reference(&push.repository, tag)).collect();
        expected.sort();
        let signed = house.signed(&push.repository, digest).await?;
        ensure!(signed == expected, "{}@{digest} is signed as {signed:?} and not as {expected:?}", push.repository);
        let stored = signatures(&house.client, &push.repository, digest).await?.len();
        ensure!(stored == expected.len(), "{}@{digest} has {stored} layers, and {expected:?} are valid", push.repository);
    }

    // Deliveries that were cut off are sent again, so that there may be more events than pushes; but each has ended.
    assert_eq!(metrics.ended("dead") + metrics.ended("skipped"), 0, "{metrics:?}");
    let status = house.run(&["queue", "status", "--output", "json"]).await?.expect_code(0)?.json()?;
    let count = |name: &str| status[name].as_u64().unwrap_or_else(|| panic!("no {name} in {status}"));
    assert_eq!(count("received"), metrics.received());
    for outcome in ["signed", "already_signed", "skipped", "dead"] {
        assert_eq!(count(outcome), metrics.ended(outcome), "{outcome} in the ledger and in the metrics");
    }
    Ok(())
}

/// Pushes all of them at once, and kills the daemon somewhere in between.
async fn push_while_killing(house: &mut House, pushes: &[Push], kill: bool) -> Result<()> {
    let client = house.client.clone();
    let pushing = try_join_all(pushes.iter().map(|push| {
        let client = &client;
        async move { client.push(&push.image, &push.repository, &push.tags()).await }
    }));
    let killing = async {
        if kill {
            tokio::time::sleep(Duration::from_millis(fastrand::u64(0..150))).await;
            restart(house).await?;
        }
        Ok(())
    };
    tokio::try_join!(pushing, killing)?;
    Ok(())
}

/// kill -9, start, and wait until it takes events; it is not ready while it cannot reach the registry.
async fn restart(house: &mut House) -> Result<()> {
    house.daemon.kill()?;
    house.daemon.start_alive().await
}

#[tokio::test]
async fn what_was_accepted_before_a_crash_is_signed_after_it() -> Result<()> {
    let mut house = House::build(Plan::default()).await?;
    let proxy = Proxy::start(&house.registry.host()).await?;
    house.route_registry(&proxy.url())?;
    house.daemon.start().await?;
    proxy.refuse(true);
    proxy.cut();

    let image = Image::oci("accepted")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    // The registry may count it as one that is to be delivered a moment after it has answered.
    let taken = async || Ok((house.daemon.metrics().await?.received() > 0).then_some(()));
    eventually("it is taken", SETTLE, taken).await?;
    house.registry.wait_delivered(SETTLE).await?;
    let metrics = house.daemon.metrics().await?;
    assert_eq!((metrics.received(), metrics.queued()), (1, 1));
    house.daemon.kill()?;
    // The registry has forgotten it by now.
    house.registry.kill()?;
    house.registry.start_again().await?;

    proxy.refuse(false);
    house.daemon.start().await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    assert!(house.wait_settled(1, SETTLE).await?.ended("signed") == 1);
    Ok(())
}

#[tokio::test]
async fn a_registry_that_hangs_delays_and_loses_nothing() -> Result<()> {
    let house = House::start(Plan::default()).await?;
    let image = Image::oci("hangs")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.registry.pause()?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    house.registry.resume()?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await
}

#[tokio::test]
async fn connections_that_are_cut_in_the_middle_cost_no_signature() -> Result<()> {
    let mut house = House::build(Plan::default()).await?;
    let proxy = Proxy::start(&house.registry.host()).await?;
    house.route_registry(&proxy.url())?;
    house.daemon.start().await?;
    let images = (0..10).map(|number| Image::oci(&format!("cut {number}"))).collect::<Result<Vec<_>>>()?;
    proxy.delay(Duration::from_millis(5));
    for image in &images {
        house.push(image, "team/app", &[&image.manifest.digest[7..20]]).await?;
        tokio::time::sleep(Duration::from_millis(fastrand::u64(5..60))).await;
        proxy.cut();
    }
    proxy.delay(Duration::ZERO);
    for image in &images {
        let tag = &image.manifest.digest[7..20];
        let what = format!("{tag} is signed once");
        eventually(&what, SETTLE, async || {
            let signed = house.signed("team/app", &image.manifest.digest).await?;
            ensure!(signed.len() < 2, "signed twice: {signed:?}");
            Ok((signed.len() == 1).then_some(()))
        })
        .await?;
    }
    Ok(())
}
