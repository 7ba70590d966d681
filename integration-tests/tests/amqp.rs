//! countersign on RabbitMQ.

use std::time::Duration;

use anyhow::Result;
use integration_tests::house::{House, Plan, TOKEN};
use integration_tests::image::Image;
use integration_tests::process::eventually;
use integration_tests::rabbitmq::RabbitMq;

const LIMIT: Duration = Duration::from_secs(60);

fn plan(broker: &RabbitMq) -> Plan {
    let queue = "backend = \"amqp\"\nurl = { env = \"AMQP_URL\" }\npartitions = 4\n".to_owned();
    Plan { queue, environment: vec![("AMQP_URL", broker.url())], ..Plan::default() }
}

async fn is_ready(house: &House) -> Result<bool> {
    let answer = integration_tests::process::http_client()?.get(format!("{}/readyz", house.daemon.url())).send().await?;
    Ok(answer.status().is_success())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pushed_image_is_signed_through_rabbitmq_though_the_broker_is_killed() -> Result<()> {
    let mut broker = RabbitMq::start().await?;
    let house = House::start(plan(&broker)).await?;
    // Killed soon after its queues were declared, RabbitMQ would forget them.
    broker.stop().await?;
    broker.start_again().await?;
    eventually("it is ready again", LIMIT, async || Ok(is_ready(&house).await?.then_some(()))).await?;
    let (first, second) = (Image::oci("before")?, Image::oci("after")?);
    house.push(&first, "team/app", &["v1"]).await?;
    house.wait_signed("team/app", &first.manifest.digest, &["v1"]).await?;
    house.wait_settled(1, LIMIT).await?;

    broker.kill()?;
    let event = House::event(&house.registry.host(), "team/app", Some("v1"), &first.manifest.digest);
    eventually("a push is refused", LIMIT, async || Ok((house.notify(Some(TOKEN), &event).await?.as_u16() == 503).then_some(())))
        .await?;
    // An answer stands for a second.
    eventually("it is not ready", LIMIT, async || Ok((!is_ready(&house).await?).then_some(()))).await?;

    broker.start_again().await?;
    house.push(&second, "team/app", &["v2"]).await?;
    house.wait_signed("team/app", &second.manifest.digest, &["v2"]).await?;
    eventually("it is ready again", LIMIT, async || Ok(is_ready(&house).await?.then_some(()))).await?;
    house.wait_settled(2, LIMIT).await?;
    Ok(())
}
