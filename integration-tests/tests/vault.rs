//! Keys in a Transit engine, from push to verdict, beside a real OpenBao.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::Duration;

use anyhow::{Context, Result};
use integration_tests::house::{House, Keys};
use integration_tests::image::Image;
use integration_tests::keys::{in_openbao, sign_what_everybody_accepts};
use integration_tests::openbao::OpenBao;
use integration_tests::process::{eventually, http_client};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

async fn a_key_in_a_vault_signs_what_everybody_accepts(bao: &OpenBao, keys: Keys) -> Result<()> {
    let (plan, token) = in_openbao(bao, keys).await?;
    sign_what_everybody_accepts(plan, &token).await
}

#[tokio::test]
async fn a_p256_key_in_a_vault_with_tls_signs_what_everybody_accepts() -> Result<()> {
    a_key_in_a_vault_signs_what_everybody_accepts(&OpenBao::start_tls().await?, Keys::P256).await
}

#[tokio::test]
async fn an_rsa_key_in_a_vault_signs_what_everybody_accepts() -> Result<()> {
    a_key_in_a_vault_signs_what_everybody_accepts(&OpenBao::start().await?, Keys::Rsa2048).await
}

#[tokio::test]
async fn a_token_that_nobody_knows_keeps_the_daemon_from_starting_and_it_says_why() -> Result<()> {
    let bao = OpenBao::start().await?;
    let (plan, token) = in_openbao(&bao, Keys::P256).await?;
    let mut house = House::build(plan).await?;
    bao.root(Method::POST, "auth/token/revoke", json!({"token": token})).await?;
    house.daemon.start_unready()?;
    let status = house.daemon.wait(LIMIT).await?;
    assert!(!status.success(), "{status}");
    let log = house.daemon.logged();
    for part in ["VAULT_TOKEN is unknown, revoked or past its time", "give countersign credentials that the KMS knows"] {
        assert!(log.contains(part), "{part:?} is not in: {log}");
    }
    assert!(!log.contains(&token), "the log holds the token");
    let check = house.run(&["check", "--online"]).await?.expect_code(3)?;
    assert!(format!("{}{}", check.stdout, check.stderr).contains("VAULT_TOKEN is unknown"), "{check:?}");
    Ok(())
}

#[tokio::test]
async fn a_witness_with_a_login_of_its_own_needs_no_token_from_the_environment() -> Result<()> {
    let bao = OpenBao::start().await?;
    let (plan, token) = in_openbao(&bao, Keys::P256).await?;
    let mut house = House::build(plan).await?;
    bao.root(Method::POST, "auth/token/revoke", json!({"token": token})).await?;
    bao.root(Method::POST, "sys/auth/approle", json!({"type": "approle"})).await?;
    let role = json!({"token_policies": ["signer"], "token_ttl": "2s", "token_max_ttl": "4s"});
    bao.root(Method::POST, "auth/approle/role/countersign", role).await?;
    let role_id = bao.root(Method::GET, "auth/approle/role/countersign/role-id", Value::Null).await?;
    let made = bao.root(Method::POST, "auth/approle/role/countersign/secret-id", json!({})).await?;
    let secret_id = made["data"]["secret_id"].as_str().context("no secret id")?;
    let file = house.config_path().with_file_name("secret-id");
    File::options().write(true).create_new(true).mode(0o600).open(file)?.write_all(secret_id.as_bytes())?;
    let login = format!(
        "login = {{ method = \"approle\", role_id = {}, secret_id = {{ file = \"secret-id\" }} }}",
        role_id["data"]["role_id"]
    );
    let witness = "[[witness]]\nname = \"release\"\n";
    house.write_config(&house.config().replace(witness, &format!("{witness}{login}\n")))?;
    house.daemon.start().await?;
    // For longer than any token of the role lasts.
    for number in 0..3 {
        let image = Image::oci(&format!("by login {number}"))?;
        let tag = format!("1.{number}");
        house.push(&image, "team/app", &[&tag]).await?;
        house.wait_signed("team/app", &image.manifest.digest, &[&tag]).await?;
        if number < 2 {
            let logins = |log: &str| log.matches("logged in").count();
            let before = logins(&house.daemon.logged());
            let daemon = &house.daemon;
            let what = "one login more";
            eventually(what, LIMIT, async || Ok((logins(&daemon.logged()) > before).then_some(()))).await?;
        }
    }
    assert_eq!(house.wait_settled(3, LIMIT).await?.ended("dead"), 0);
    assert!(!house.daemon.logged().contains(secret_id), "the log holds the secret id");
    Ok(())
}

#[tokio::test]
async fn what_is_pushed_while_the_vault_is_sealed_is_signed_when_it_is_unsealed() -> Result<()> {
    let bao = OpenBao::start().await?;
    let (plan, _) = in_openbao(&bao, Keys::P256).await?;
    let mut house = House::build(plan).await?;
    bao.seal().await?;
    house.daemon.start_alive().await?;
    let ready = http_client()?.get(format!("{}/readyz", house.daemon.url())).send().await?;
    assert_eq!(ready.status(), StatusCode::SERVICE_UNAVAILABLE);
    eventually("the log says why", LIMIT, async || Ok(house.daemon.logged().contains("sealed").then_some(()))).await?;
    let first = Image::oci("sealed at the start")?;
    house.push(&first, "team/app", &["1.0"]).await?;
    bao.unseal().await?;
    house.wait_signed("team/app", &first.manifest.digest, &["1.0"]).await?;

    bao.seal().await?;
    let second = Image::oci("sealed while running")?;
    house.push(&second, "team/app", &["2.0"]).await?;
    bao.unseal().await?;
    house.wait_signed("team/app", &second.manifest.digest, &["2.0"]).await?;
    let metrics = house.wait_settled(2, LIMIT).await?;
    assert_eq!((metrics.ended("signed"), metrics.ended("dead")), (2, 0));
    Ok(())
}

#[tokio::test]
async fn a_policy_taken_away_makes_a_dead_letter_that_names_it_and_a_replay_signs() -> Result<()> {
    let bao = OpenBao::start().await?;
    let (plan, _) = in_openbao(&bao, Keys::P256).await?;
    let house = House::start(plan).await?;
    bao.root(Method::DELETE, "sys/policies/acl/signer", Value::Null).await?;
    let image = Image::oci("denied")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    let metrics = house.wait_settled(1, LIMIT).await?;
    assert_eq!(metrics.ended("dead"), 1);
    let dead = house.run(&["queue", "dead"]).await?.expect_code(0)?.stdout;
    assert!(dead.contains("`update` on transit/sign/release/sha2-256"), "no cure in: {dead}");

    bao.policy("signer", "release").await?;
    house.run(&["queue", "replay", "--all"]).await?.expect_code(0)?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    Ok(())
}
