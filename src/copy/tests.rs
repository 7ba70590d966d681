use serde_json::{Value, json};

use super::*;
use crate::{
    oci::media_type,
    pipeline::tests::fake::{Fake, NAME, Store, image},
};

/// What a dry run says of signatures over these payloads, by state, and how many blobs it asked for.
async fn dry_run(payloads: Vec<Vec<u8>>, layers: &[Value]) -> (usize, Vec<&'static str>, usize) {
    dry_run_of(payloads, |store, digest| {
        let tag = Tag::cosign_signatures(digest).unwrap();
        store.put("team/app", Some(tag.as_str()), media_type::OCI_MANIFEST, &manifest(layers));
    })
    .await
}

fn manifest(layers: &[Value]) -> Value {
    let config = json!({ "mediaType": media_type::OCI_CONFIG, "digest": Digest::of(b"{}"), "size": 2 });
    json!({ "schemaVersion": 2, "mediaType": media_type::OCI_MANIFEST, "config": config, "layers": layers })
}

async fn dry_run_of(payloads: Vec<Vec<u8>>, sign: impl FnOnce(&mut Store, &Digest)) -> (usize, Vec<&'static str>, usize) {
    let fake = Fake::start().await;
    fake.store().has_api = true;
    for payload in payloads {
        fake.store().put_blob(payload.leak());
    }
    let digest = fake.store().put("team/app", Some("1.0"), media_type::OCI_MANIFEST, &image("copied"));
    fake.store().put("mirror/app", Some("1.0"), media_type::OCI_MANIFEST, &image("copied"));
    sign(&mut fake.store(), &digest);
    let [source, destination] = ["team", "mirror"].map(|name| format!("{NAME}/{name}/app:1.0").parse::<Reference>().unwrap());
    let registry = fake.client();
    let place = |reference| Place { registry: &registry, reference };
    let copies = copy(place(&source), place(&destination), true).await.unwrap();
    let left_out = copies.signatures.iter().filter_map(|copied| match &copied.state {
        State::LeftOut { reason } => Some(*reason),
        _ => None,
    });
    let missing = copies.signatures.iter().filter(|copied| copied.state == State::Missing).count();
    let blobs = fake.store().asked.iter().filter(|asked| asked.starts_with("GET team/app/blobs/")).count();
    (missing, left_out.collect(), blobs)
}

fn layer(payload: &Digest, size: usize, number: usize) -> Value {
    json!({
        "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json", "digest": payload, "size": size,
        "annotations": { "dev.cosignproject.cosign/signature": format!("{number:08}") },
    })
}

#[tokio::test]
async fn a_payload_is_read_once_and_no_more_layers_than_a_bound() {
    let layers: Vec<_> = (0..1100).map(|number| layer(&Digest::of(b"payload"), 7, number)).collect();
    let (missing, left_out, blobs) = dry_run(vec![b"payload".to_vec()], &layers).await;
    assert_eq!((missing, left_out.len(), blobs), (1000, 100, 1));
    assert!(left_out.iter().all(|reason| reason.contains("behind a thousand others")), "{left_out:?}");
}

#[tokio::test]
async fn payloads_that_fill_the_memory_are_left_out_and_a_dry_run_says_what_would_be() {
    let payloads: Vec<Vec<u8>> = (0..20).map(|number| vec![number; 1 << 20]).collect();
    let mut layers: Vec<_> =
        payloads.iter().enumerate().map(|(number, payload)| layer(&Digest::of(payload), payload.len(), number)).collect();
    layers.insert(0, layer(&Digest::of(b"nowhere"), 7, 99));
    let (missing, left_out, blobs) = dry_run(payloads, &layers).await;
    assert_eq!((missing, blobs), (17, 18));
    let words = left_out.iter().map(|reason| reason.split(' ').nth(2).unwrap()).collect::<Vec<_>>();
    assert_eq!(words, ["is", "before", "before", "before"], "{left_out:?}");
}

#[tokio::test]
async fn no_more_layers_of_all_referrers_are_copied_than_a_bound() {
    let referrer = |number: usize, subject: &Digest| {
        let layers: Vec<_> = (0..99).map(|place| layer(&Digest::of(b"payload"), 7, 99 * number + place)).collect();
        let mut manifest = manifest(&layers);
        manifest["artifactType"] = json!(crate::signature::cosign::ARTIFACT_TYPE);
        manifest["subject"] = json!({ "mediaType": media_type::OCI_MANIFEST, "digest": subject, "size": 1 });
        manifest
    };
    let (missing, left_out, blobs) = dry_run_of(vec![b"payload".to_vec(), b"{}".to_vec()], |store, digest| {
        for number in 0..12 {
            store.put("team/app", None, media_type::OCI_MANIFEST, &referrer(number, digest));
        }
    })
    .await;
    assert_eq!((missing, left_out.len(), blobs), (990, 2, 20), "{left_out:?}");
    assert!(left_out.iter().all(|reason| reason.contains("more than a thousand layers")), "{left_out:?}");
}
