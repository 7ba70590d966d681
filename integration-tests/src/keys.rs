//! Keys that never leave their KMS, and houses that sign with them.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::house::{House, Keys, Plan};
use crate::image::Image;
use crate::ministack::{Credentials, Ministack, REGION};
use crate::openbao::OpenBao;
use crate::verifier::{Cosign, Skopeo};

/// What countersign may do with a key in AWS KMS; the last is for `verify --with-kms` alone.
pub const ACTIONS: [&str; 4] = ["kms:Sign", "kms:GetPublicKey", "kms:DescribeKey", "kms:Verify"];

/// A key in ministack under `alias/release`, a user who may use it, and a house that asks for it at `host`: ministack's own, or that
/// of something in between. With the key's id.
pub async fn in_ministack(kms: &Ministack, host: &str, keys: Keys) -> Result<(Plan, String)> {
    let spec = if keys == Keys::P256 { "ECC_NIST_P256" } else { "RSA_2048" };
    let id = kms.key(spec, "release").await?;
    let environment = environment(kms.user("countersign", &ACTIONS).await?);
    Ok((Plan { keys, key_uri: Some(aws_uri(host, "release")), environment, ..Plan::default() }, id))
}

/// `awskms://…/alias/NAME`
pub fn aws_uri(host: &str, alias: &str) -> String {
    format!("awskms://http://{host}/alias/{alias}?region={REGION}")
}

/// Variables by which countersign is this user.
pub fn environment(user: Credentials) -> Vec<(&'static str, String)> {
    vec![("AWS_ACCESS_KEY_ID", user.access_key_id), ("AWS_SECRET_ACCESS_KEY", user.secret_access_key)]
}

/// A key in OpenBao, a token with the rights to it and no others, and a house that has them from its environment. With the token.
pub async fn in_openbao(bao: &OpenBao, keys: Keys) -> Result<(Plan, String)> {
    bao.key("release", if keys == Keys::P256 { "ecdsa-p256" } else { "rsa-2048" }).await?;
    bao.verifying_policy("signer", "release").await?;
    let token = bao.token("signer", json!({"ttl": "1h"})).await?;
    let ca = bao.ca().to_str().context("a folder whose name is no text")?.to_owned();
    let mut environment = vec![("VAULT_ADDR", bao.url().to_owned()), ("VAULT_TOKEN", token.clone())];
    if bao.url().starts_with("https://") {
        environment.push(("VAULT_CACERT", ca));
    }
    Ok((Plan { keys, key_uri: Some("hashivault://release".to_owned()), environment, ..Plan::default() }, token))
}

/// Pushes an index to such a house: every judge has to accept what it signs, and `secret` may not be logged.
pub async fn sign_what_everybody_accepts(plan: Plan, secret: &str) -> Result<()> {
    let house = House::start(plan).await?;
    let image = Image::index("kms")?;
    house.push(&image, "team/app", &["1.0"]).await?;
    house.wait_signed("team/app", &image.manifest.digest, &["1.0"]).await?;
    house.wait_signed("team/app", &image.child("amd64").digest, &["1.0"]).await?;
    let (key, reference) = (house.public_key_path(), house.reference("team/app", "1.0"));
    for cosign in [Cosign::V2, Cosign::V3] {
        let ruling = cosign.verify(&key, &reference).await?;
        ensure!(ruling.accepted, "{cosign:?}: {}", ruling.words);
    }
    let ruling = Skopeo::requiring(&key, &house.registry.host())?.architecture("amd64").copy(&reference).await?;
    ensure!(ruling.accepted, "{}", ruling.words);
    ensure!(!house.daemon.logged().contains(secret), "the log holds the KMS's secret");
    Ok(())
}
