//! An event is a hint and never an authority: whatever it claims, only what the registry serves in a rule's scope is signed.

use std::time::Duration;

use anyhow::Result;
use integration_tests::house::{House, Keys, TOKEN, rule};
use integration_tests::image::Image;
use integration_tests::signature::{signatures, tag_of};
use reqwest::StatusCode;
use serde_json::json;
use tokio::net::TcpListener;

const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test]
async fn an_unknown_digest_signs_nothing() -> Result<()> {
    let house = House::start_quiet(None).await?;
    house.push(&Image::oci("there")?, "team/app", &["1.0"]).await?;
    let digest = Image::oci("not there")?.manifest.digest;
    let forged = House::event(&house.registry.host(), "team/app", Some("1.0"), &digest);
    assert_eq!(house.notify(Some(TOKEN), &forged).await?, StatusCode::ACCEPTED);
    let metrics = house.wait_settled(1, LIMIT).await?;
    assert_eq!((metrics.ended("signed"), metrics.ended("skipped")), (0, 1));
    assert_eq!(house.client.tags("team/app").await?, ["1.0"]);
    Ok(())
}

#[tokio::test]
async fn a_foreign_host_is_never_contacted_nor_signed_for() -> Result<()> {
    let house = House::start_quiet(None).await?;
    let image = Image::oci("foreign")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    let trap = TcpListener::bind(("127.0.0.1", 0)).await?;
    let foreign = trap.local_addr()?.to_string();
    for digest in [&image.manifest.digest, &Image::oci("elsewhere")?.manifest.digest] {
        let forged = House::event(&foreign, "team/app", Some("1.0"), digest);
        assert_eq!(house.notify(Some(TOKEN), &forged).await?, StatusCode::ACCEPTED);
    }
    house.wait_settled(2, LIMIT).await?;
    // The image is in the source's own registry, under that tag: signing it there, as that, is what is right.
    let stored = signatures(&house.client, "team/app", &image.manifest.digest).await?;
    assert_eq!(
        stored.iter().map(|signature| signature.reference.as_str()).collect::<Vec<_>>(),
        [house.reference("team/app", "1.0")]
    );
    assert_eq!(house.client.tags("team/app").await?.len(), 2);
    assert!(tokio::time::timeout(Duration::from_millis(50), trap.accept()).await.is_err(), "the foreign host was contacted");
    Ok(())
}

#[tokio::test]
async fn a_tag_that_points_elsewhere_is_not_signed_for_the_digest() -> Result<()> {
    let rules = rule("all", "team", Keys::P256) + "\n" + &rule("release", "strict", Keys::P256) + "tags = [\"release\"]\n";
    let house = House::start_quiet(Some(rules)).await?;
    let (old, current) = (Image::oci("vulnerable")?, Image::oci("current")?);
    for repository in ["team/app", "strict/app"] {
        house.push(&old, repository, &["old"]).await?;
        house.push(&current, repository, &["release"]).await?;
        let forged = House::event(&house.registry.host(), repository, Some("release"), &old.manifest.digest);
        assert_eq!(house.notify(Some(TOKEN), &forged).await?, StatusCode::ACCEPTED);
    }
    house.wait_settled(2, LIMIT).await?;
    // A rule for all tags signs the digest, which was pushed here after all, but says nothing of the tag.
    let digest = &old.manifest.digest;
    assert_eq!(house.signed("team/app", digest).await?, [house.reference("team/app", digest)]);
    // A rule that goes by the tag has nothing to go by.
    assert!(house.signed("strict/app", digest).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn another_repositorys_digest_is_not_signed_here() -> Result<()> {
    let house = House::start_quiet(None).await?;
    let image = Image::oci("of another")?;
    house.push(&image, "scratch/app", &["1.0"]).await?;
    house.push(&Image::oci("of this")?, "team/app", &["1.0"]).await?;
    for tag in [Some("1.0"), None] {
        let forged = House::event(&house.registry.host(), "team/app", tag, &image.manifest.digest);
        assert_eq!(house.notify(Some(TOKEN), &forged).await?, StatusCode::ACCEPTED);
    }
    let metrics = house.wait_settled(2, LIMIT).await?;
    assert_eq!(metrics.ended("signed"), 0);
    for repository in ["team/app", "scratch/app"] {
        assert_eq!(house.client.tags(repository).await?, ["1.0"], "{repository}");
    }
    Ok(())
}

#[tokio::test]
async fn without_the_token_nothing_gets_in() -> Result<()> {
    let house = House::start_quiet(None).await?;
    let image = Image::oci("unauthenticated")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    let genuine = House::event(&house.registry.host(), "team/app", Some("1.0"), &image.manifest.digest);
    for token in [None, Some(""), Some("guess"), Some(&TOKEN[1..])] {
        assert_eq!(house.notify(token, &genuine).await?, StatusCode::UNAUTHORIZED, "{token:?}");
    }
    assert_eq!(house.daemon.metrics().await?.received(), 0);
    assert_eq!(house.client.tags("team/app").await?, ["1.0"]);
    Ok(())
}

#[tokio::test]
async fn an_authentic_body_that_is_no_event_is_kept_and_does_not_block_the_registry() -> Result<()> {
    let house = House::start_quiet(None).await?;
    for (number, body) in [json!("no envelope"), json!({"events": [{"action": "push"}]})].iter().enumerate() {
        assert_eq!(house.notify(Some(TOKEN), body).await?, StatusCode::ACCEPTED, "{body}");
        house.wait_settled(number as u64 + 1, LIMIT).await?;
        let dead = house.run(&["queue", "dead", "--output", "json"]).await?.expect_code(0)?.json()?;
        assert_eq!(dead.as_array().map(Vec::len), Some(number + 1), "{dead}");
    }
    let huge = json!({"events": [], "filler": "x".repeat(8 << 20)});
    assert_eq!(house.notify(Some(TOKEN), &huge).await?, StatusCode::PAYLOAD_TOO_LARGE);
    Ok(())
}

#[tokio::test]
async fn hostile_names_lead_nowhere() -> Result<()> {
    let house = House::start_quiet(None).await?;
    let image = Image::oci("names")?;
    house.push(&image, "secret/app", &["1.0"]).await?;
    let digest = &image.manifest.digest;
    for repository in ["team/../secret/app", "team/%2e%2e/secret/app", "TEAM/app", "team//app", "../secret/app", "team/app?x=1"] {
        let forged = House::event(&house.registry.host(), repository, Some("1.0"), digest);
        assert_eq!(house.notify(Some(TOKEN), &forged).await?, StatusCode::ACCEPTED, "{repository}");
    }
    for tag in ["../../secret/app/manifests/1.0", "a b", "", &"t".repeat(200)] {
        let forged = House::event(&house.registry.host(), "team/app", Some(tag), digest);
        assert_eq!(house.notify(Some(TOKEN), &forged).await?, StatusCode::ACCEPTED, "{tag}");
    }
    house.wait_settled(0, LIMIT).await?;
    assert_eq!(house.client.tags("secret/app").await?, ["1.0"]);
    assert!(house.client.tags("team/app").await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_signature_that_is_announced_as_an_image_is_not_signed() -> Result<()> {
    let house = House::start_quiet(None).await?;
    let image = Image::oci("announced")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.notify(Some(TOKEN), &House::event(&house.registry.host(), "team/app", Some("1.0"), &image.manifest.digest)).await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;

    // Under a tag that does not give it away.
    let signature = house.client.manifest("team/app", &tag_of(&image.manifest.digest)).await?.unwrap();
    house.client.put_manifest("team/app", "2.0", &signature).await?;
    house.notify(Some(TOKEN), &House::event(&house.registry.host(), "team/app", Some("2.0"), &signature.digest)).await?;
    let metrics = house.wait_settled(2, LIMIT).await?;
    assert_eq!((metrics.ended("signed"), metrics.ended("skipped")), (1, 1));
    assert!(signatures(&house.client, "team/app", &signature.digest).await?.is_empty());
    Ok(())
}
