//! Brokers as an administrator may have them: several addresses, TLS with client certificates, a password that changes.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use integration_tests::certificates::Certificates;
use integration_tests::house::{House, Plan};
use integration_tests::image::Image;
use integration_tests::process::eventually;
use integration_tests::rabbitmq::RabbitMq;

const LIMIT: Duration = Duration::from_secs(90);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broker_is_reached_by_tls_past_a_dead_one_and_again_after_its_password_was_rotated() -> Result<()> {
    let certificates = Certificates::make()?;
    let broker = RabbitMq::start_with(&certificates.demanded_by_rabbitmq()).await?;
    let (folder, urls) = (certificates.folder().display(), certificates.folder().join("amqp-urls"));
    // The broker first, the file after it: for a moment the file is wrong.
    let rotate = async |password: &str| -> Result<()> {
        broker.let_in("/", "countersign", password).await?;
        let user = format!("amqps://countersign:{password}@127.0.0.1");
        Ok(fs::write(&urls, format!("{user}:9,{user}:{}\n", broker.tls_port()))?)
    };
    rotate("the-old-password").await?;
    let queue = format!(
        "backend = \"amqp\"\nurl = {{ file = \"{folder}/amqp-urls\" }}\npartitions = 2\n\
         tls = {{ ca = \"{folder}/ca.pem\", certificate = \"{folder}/client.pem\", key = {{ file = \"{folder}/client.key\" }} }}\n"
    );
    let house = House::start(Plan { queue, ..Plan::default() }).await?;
    house.run(&["check", "--online"]).await?.expect_code(0)?;
    let (before, after) = (Image::oci("before the rotation")?, Image::oci("after the rotation")?);
    house.push(&before, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &before.manifest.digest, &["1.0"]).await?;
    house.wait_settled(1, LIMIT).await?;

    rotate("the-new-password").await?;
    broker.close_connections("/").await?;
    let lost = async || Ok(house.daemon.logged().contains("the connection to the broker is given up").then_some(()));
    eventually("its connections are gone", LIMIT, lost).await?;
    house.push(&after, "team/app", &["2.0"]).await?;
    house.wait_signed("team/app", &after.manifest.digest, &["2.0"]).await?;
    house.wait_settled(2, LIMIT).await?;
    ensure!(!house.daemon.logged().contains("-password"), "the log holds a password");
    Ok(())
}
