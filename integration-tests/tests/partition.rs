//! A network that loses every packet between one replica and the broker, for a minute. `make partition` runs this: it needs
//! root and network namespaces.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use integration_tests::fleet::{Fleet, ensure_one_writer_at_a_time, sums};
use integration_tests::house::House;
use integration_tests::image::Image;
use integration_tests::namespace::{self, Namespace};
use integration_tests::process::{eventually, http_client};

const LIMIT: Duration = Duration::from_secs(90);
const MINUTE: Duration = Duration::from_secs(60);
const REPOSITORY: &str = "team/app";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replica_that_a_minute_of_lost_packets_cuts_off_is_relieved_and_no_image_has_two_writers_at_once() -> Result<()> {
    let name = "replica_that_a_minute_of_lost_packets_cuts_off_is_relieved_and_no_image_has_two_writers_at_once";
    if !namespace::inside(name)? {
        return Ok(());
    }
    let namespaces = (1..=3).map(Namespace::join).collect::<Result<Vec<_>>>()?;
    let mut fleet = Fleet::build_in(&namespaces, "").await?;
    fleet.start().await?;
    let port = fleet.broker.port();
    let cut_off = 0;

    // Each image comes with three tags, one after the other: three writes of one signature tag.
    let (sender, house) = (fleet.sender()?, &fleet.house);
    let began = Instant::now();
    let sending = async {
        let numbers = stream::iter(0..).take_while(|_| std::future::ready(began.elapsed() < MINUTE + Duration::from_secs(20)));
        let push = numbers.map(async |number| {
            let image = Image::oci(&format!("image {number}"))?;
            let tags: Vec<_> = (0..3).map(|tag| format!("{number}.{tag}")).collect();
            for (place, tag) in tags.iter().enumerate() {
                if place == 1 {
                    // So that the network has changed meanwhile for some.
                    tokio::time::sleep(Duration::from_secs(4)).await;
                }
                house.push(&image, REPOSITORY, &[tag]).await?;
                let event = House::event(&house.registry.host(), REPOSITORY, Some(tag), &image.manifest.digest);
                // The one that is cut off takes none, so that others do.
                sender.send(&event).await?;
            }
            Ok((image, tags))
        });
        push.buffer_unordered(64).try_collect::<Vec<_>>().await
    };
    let cutting = async {
        tokio::time::sleep(Duration::from_secs(8)).await;
        // What it has in hand then takes it longer than it takes the broker to give that to others.
        fleet.registries[cut_off].delay(Duration::from_secs(2));
        tokio::time::sleep(Duration::from_secs(4)).await;
        namespaces[cut_off].drop_packets(port, true)?;
        let since = Instant::now();
        let url = format!("{}/readyz", fleet.replicas[cut_off].url());
        let ready = async || anyhow::Ok(http_client()?.get(&url).send().await?.status().is_success());
        eventually("it knows that it is cut off", LIMIT, async || Ok((!ready().await?).then_some(()))).await?;
        let known = since.elapsed();
        // What comes in now is signed elsewhere, before the network is back.
        let image = Image::oci("meanwhile")?;
        house.push(&image, REPOSITORY, &["meanwhile"]).await?;
        sender.send(&House::event(&house.registry.host(), REPOSITORY, Some("meanwhile"), &image.manifest.digest)).await?;
        let signed = async || Ok((house.signed(REPOSITORY, &image.manifest.digest).await?.len() == 1).then_some(()));
        eventually("others sign", LIMIT, signed).await?;
        let relieved = since.elapsed();
        ensure!(relieved < MINUTE, "it took {relieved:?} until others signed");
        tokio::time::sleep(MINUTE.saturating_sub(since.elapsed())).await;
        ensure!(!ready().await?, "packets came through");
        namespaces[cut_off].drop_packets(port, false)?;
        fleet.registries[cut_off].delay(Duration::ZERO);
        eventually("it is back", LIMIT, async || Ok(ready().await?.then_some(()))).await?;
        Ok((known, relieved))
    };
    let (images, (known, relieved)) = tokio::try_join!(sending, cutting)?;
    let metrics = fleet.wait_settled(3 * images.len() as u64).await?;
    for (image, tags) in &images {
        let digest = &image.manifest.digest;
        let mut expected: Vec<_> = tags.iter().map(|tag| fleet.house.reference(REPOSITORY, tag)).collect();
        expected.sort();
        let signed = fleet.house.signed(REPOSITORY, digest).await?;
        ensure!(signed == expected, "{digest} is signed as {signed:?} and not as {expected:?}");
    }
    let served = fleet.house.registry.served()?;
    let (writes, shared) = ensure_one_writer_at_a_time(&served)?;
    let by_replica = namespaces.iter().map(|namespace| {
        let by = served.iter().filter(|one| one.method == "PUT" && one.path.contains(".sig") && one.source == namespace.here);
        by.count()
    });
    let by_replica: Vec<_> = by_replica.collect();
    eprintln!(
        "{} images, three tags each; known after {known:.1?}, relieved after {relieved:.1?}; {writes} writes, by replica {by_replica:?}; \
         {shared} images had writers in several replicas; {}",
        images.len(),
        sums(&metrics),
    );
    ensure!(by_replica.iter().filter(|&&writes| writes > 0).count() > 1, "nobody else had to work: {by_replica:?}");
    Ok(())
}
