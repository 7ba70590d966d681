//! The harness itself, without countersign: a judge that accepts everything, or a fault that does not happen, proves nothing.

use std::time::{Duration, Instant};

use anyhow::Result;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use integration_tests::image::{self, Image};
use integration_tests::ministack::{Credentials, Ministack};
use integration_tests::process::{eventually, free_port, http_client};
use integration_tests::proxy::Proxy;
use integration_tests::registry::{Client, Login, Notify, Options, Registry};
use integration_tests::signature::{PublicKey, signatures, signed_references};
use integration_tests::verifier::{Cosign, KeyPair, Skopeo};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

#[tokio::test]
async fn the_judges_accept_what_cosign_signed_and_refuse_what_nobody_signed() -> Result<()> {
    let registry = Registry::start().await?;
    let (key, stranger) = tokio::try_join!(KeyPair::generate(), KeyPair::generate())?;
    let client = registry.client()?;
    let image = Image::index("judges")?;
    client.push(&image, "team/app", &["1.0"]).await?;
    let repository = format!("{}/team/app", registry.host());
    let by_tag = format!("{repository}:1.0");
    let by_digest = format!("{repository}@{}", image.manifest.digest);
    let platform = format!("{repository}@{}", image.child("amd64").digest);
    // cosign does not write the tag into what it signs, which skopeo's default wants to see.
    let any_tag = json!({"type": "matchRepository"});
    let skopeo = Skopeo::with_identity(&key.public(), &registry.host(), Some(&any_tag))?.architecture("amd64");

    for reference in [&by_tag, &by_digest] {
        for cosign in [Cosign::V2, Cosign::V3] {
            let ruling = cosign.verify(&key.public(), reference).await?;
            assert!(!ruling.accepted && ruling.words.contains("no signatures found"), "{cosign:?}: {}", ruling.words);
        }
        let ruling = skopeo.copy(reference).await?;
        assert!(!ruling.accepted && ruling.words.contains("A signature was required"), "{}", ruling.words);
    }

    Cosign::V2.sign(&key, &by_digest).await?;
    Cosign::V3.sign(&key, &platform).await?;

    for reference in [&by_tag, &by_digest] {
        for cosign in [Cosign::V2, Cosign::V3] {
            let ruling = cosign.verify(&key.public(), reference).await?;
            assert!(ruling.accepted, "{cosign:?}: {}", ruling.words);
            let ruling = cosign.verify(&stranger.public(), reference).await?;
            assert!(!ruling.accepted, "{cosign:?} accepted another key's signature: {}", ruling.words);
        }
        let ruling = skopeo.copy(reference).await?;
        assert!(ruling.accepted, "{}", ruling.words);
        for (what, skopeo) in [
            ("another key's signature", Skopeo::with_identity(&stranger.public(), &registry.host(), Some(&any_tag))?),
            ("a signature that names no tag", Skopeo::requiring(&key.public(), &registry.host())?),
        ] {
            let ruling = skopeo.architecture("amd64").copy(reference).await?;
            assert!(!ruling.accepted, "skopeo accepted {what}: {}", ruling.words);
        }
        let unsigned_platform = Skopeo::with_identity(&key.public(), &registry.host(), Some(&any_tag))?.architecture("arm64");
        assert!(!unsigned_platform.copy(reference).await?.accepted);
    }
    Ok(())
}

#[tokio::test]
async fn signatures_are_read_and_counted_as_they_are_stored() -> Result<()> {
    let registry = Registry::start().await?;
    let (first, second) = tokio::try_join!(KeyPair::generate(), KeyPair::generate())?;
    let client = registry.client()?;
    let image = Image::oci("counted")?;
    let digest = &image.manifest.digest;
    client.push(&image, "app", &["1", "2"]).await?;
    assert!(signatures(&client, "app", digest).await?.is_empty());

    let reference = format!("{}/app@{digest}", registry.host());
    Cosign::V2.sign(&first, &reference).await?;
    Cosign::V3.sign(&second, &reference).await?;

    assert_eq!(signatures(&client, "app", digest).await?.len(), 2);
    for key in [&first, &second] {
        let key = PublicKey::from_pem(&std::fs::read_to_string(key.public())?)?;
        assert_eq!(signed_references(&client, "app", digest, &key).await?, [format!("{}/app", registry.host())]);
    }
    Ok(())
}

#[tokio::test]
async fn every_kind_of_image_is_stored_by_tag_and_by_digest() -> Result<()> {
    let registry = Registry::start_with(Options { login: true, ..Options::default() }).await?;
    let client = registry.client()?;
    let images = [
        ("oci", Image::oci("kinds")?),
        ("docker", Image::docker("kinds")?),
        ("index", Image::index("kinds")?),
        ("list", Image::docker_list("kinds")?),
        ("nested", Image::nested_index("kinds")?),
    ];
    for (kind, image) in &images {
        client.push(image, "kinds", &[kind, "latest"]).await?;
        let stored = client.manifest("kinds", kind).await?;
        assert_eq!(stored.as_ref(), Some(&image.manifest), "{kind}");
    }
    client.push(&Image::oci("untagged")?, "kinds", &[]).await?;
    let mut tags = client.tags("kinds").await?;
    tags.sort();
    assert_eq!(tags, ["docker", "index", "latest", "list", "nested", "oci"]);
    assert_ne!(Image::oci("one seed")?.manifest.digest, Image::oci("another")?.manifest.digest);
    assert_eq!(images[4].1.child("arm64").media_type, image::OCI_MANIFEST);

    let stranger = Client::new(&registry.url(), Login::None)?;
    assert!(stranger.push(&Image::oci("refused")?, "kinds", &["x"]).await.is_err(), "a registry with a login let a stranger in");
    Ok(())
}

#[tokio::test]
async fn the_registry_tells_of_pushes_counts_requests_and_keeps_its_data_over_a_crash() -> Result<()> {
    let hook = TcpListener::bind(("127.0.0.1", 0)).await?;
    let notify = Notify::new(format!("http://{}/events/main", hook.local_addr()?), "secret");
    let mut registry = Registry::start_with(Options { notify: Some(notify), count_requests: true, ..Options::default() }).await?;
    let client = registry.client()?;
    let image = Image::oci("told")?;
    client.push(&image, "told", &["1"]).await?;

    let (mut connection, _) = tokio::time::timeout(Duration::from_secs(60), hook.accept()).await??;
    let mut event = String::new();
    let mut piece = [0; 4096];
    while !event.contains("\"useragent\"") {
        let length = connection.read(&mut piece).await?;
        assert!(length > 0, "the registry gave up: {event}");
        event.push_str(std::str::from_utf8(&piece[..length])?);
    }
    connection.write_all(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n").await?;
    registry.wait_delivered(Duration::from_secs(60)).await?;
    assert!(event.starts_with("POST /events/main"), "{event}");
    assert!(event.contains("Authorization: Bearer secret"), "{event}");
    assert!(event.contains(&image.manifest.digest) && event.contains("\"tag\": \"1\""), "{event}");

    // Two blobs in two requests each, and the manifest.
    let counts = registry.count_requests("")?;
    assert_eq!((counts["POST upload"], counts["PUT upload"], counts["PUT manifest"]), (2, 2, 1), "{counts:?}");

    registry.kill()?;
    assert!(client.manifest("told", "1").await.is_err());
    registry.start_again().await?;
    assert_eq!(client.manifest("told", "1").await?, Some(image.manifest));

    registry.pause()?;
    let unanswered = tokio::time::timeout(Duration::from_millis(300), client.manifest("told", "1")).await;
    registry.resume()?;
    assert!(unanswered.is_err(), "a paused registry answered");
    assert!(client.manifest("told", "1").await?.is_some());
    Ok(())
}

#[tokio::test]
async fn ministack_signs_for_its_users_and_for_nobody_else() -> Result<()> {
    let kms = Ministack::start().await?;
    let user = kms.user("signer", &["kms:Sign", "kms:GetPublicKey"]).await?;
    let message = b"what is signed";
    for (spec, algorithm) in [("RSA_2048", "RSASSA_PKCS1_V1_5_SHA_256"), ("ECC_NIST_P256", "ECDSA_SHA_256")] {
        let alias = spec.to_lowercase();
        kms.key(spec, &alias).await?;
        let key_id = json!({"KeyId": format!("alias/{alias}")});
        let public_key = kms.kms_as(&user, "GetPublicKey", &key_id).await?;
        let pem =
            format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", public_key["PublicKey"].as_str().unwrap());

        let mut request = key_id.clone();
        request["Message"] = json!(STANDARD.encode(Sha256::digest(message)));
        request["MessageType"] = json!("DIGEST");
        request["SigningAlgorithm"] = json!(algorithm);
        let answer = kms.kms_as(&user, "Sign", &request).await?;
        let signature = STANDARD.decode(answer["Signature"].as_str().unwrap())?;
        let key = PublicKey::from_pem(&pem)?;
        assert!(key.verifies(message, &signature) && !key.verifies(b"another message", &signature), "{spec}");

        let impostor = Credentials { secret_access_key: "guessed".to_owned(), ..user.clone() };
        let refusal = kms.kms_as(&impostor, "Sign", &request).await.unwrap_err().to_string();
        assert!(refusal.contains("InvalidSignature"), "{refusal}");
        let refusal = kms.kms_as(&user, "ScheduleKeyDeletion", &key_id).await.unwrap_err().to_string();
        assert!(refusal.contains("AccessDenied"), "{refusal}");
    }
    Ok(())
}

#[tokio::test]
async fn the_proxy_is_slow_cuts_and_refuses_when_told_to() -> Result<()> {
    let registry = Registry::start().await?;
    let proxy = Proxy::start(&registry.host()).await?;
    let client = Client::new(&proxy.url(), Login::None)?;
    client.push(&Image::oci("through")?, "through", &["1"]).await?;

    let delay = Duration::from_millis(150);
    proxy.delay(delay);
    let start = Instant::now();
    client.tags("through").await?;
    assert!(start.elapsed() >= 2 * delay, "there and back took {:?}", start.elapsed());

    proxy.delay(Duration::from_secs(30));
    let start = Instant::now();
    let (cut, ()) = tokio::join!(client.tags("through"), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        proxy.cut();
    });
    assert!(cut.is_err() && start.elapsed() < Duration::from_secs(20), "the connection was not cut");

    proxy.delay(Duration::ZERO);
    proxy.refuse(true);
    assert!(client.tags("through").await.is_err());
    proxy.refuse(false);
    assert_eq!(client.tags("through").await?, ["1"]);
    Ok(())
}

#[tokio::test]
async fn ports_are_free_and_differ_and_waiting_ends() -> Result<()> {
    let (first, second) = (free_port()?, free_port()?);
    assert_ne!(first, second);
    assert!(http_client()?.get(format!("http://127.0.0.1:{first}/")).send().await.is_err());

    let refusal = eventually("a thing that never comes", Duration::from_millis(50), async || Ok(None::<()>)).await.unwrap_err();
    assert_eq!(refusal.to_string(), "a thing that never comes: not after 50ms");
    Ok(())
}
