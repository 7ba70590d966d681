//! The vectors as a registry has them, each where its tag files say.

use std::fs;

use serde_json::{Value, json};

use super::*;
use crate::{
    certificate::Chain,
    kms::KeyUri,
    oci::{Repository, media_type},
    pipeline::tests::fake::{Fake, NAME},
    witness::{TrustedKeySettings, TrustedKeys, WitnessSettings},
};

const VECTORS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/vectors");
const REPOSITORY: &str = "team/app";

fn vector(folder: &str, file: &str) -> Vec<u8> {
    let path = format!("{VECTORS}/{folder}/{file}");
    fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn text(folder: &str, file: &str) -> String {
    String::from_utf8(vector(folder, file)).unwrap().trim().to_owned()
}

/// A registry that has the image and this vector.
async fn registry_with(folder: &str) -> Fake {
    let fake = Fake::start().await;
    let mut store = fake.store();
    let (image, manifest) = (vector("image", "manifest.json"), vector(folder, "manifest.json"));
    store.put_as(REPOSITORY, "1.0", media_type::OCI_MANIFEST, image.clone().into());
    store.put_as(REPOSITORY, &text("image", "digest.txt"), media_type::OCI_MANIFEST, image.into());
    store.put_as(REPOSITORY, Digest::of(&manifest).as_str(), media_type::OCI_MANIFEST, manifest.clone().into());
    for file in fs::read_dir(format!("{VECTORS}/{folder}")).unwrap() {
        store.put_blob(Box::leak(fs::read(file.unwrap().path()).unwrap().into_boxed_slice()));
    }
    let is_referrer = fs::exists(format!("{VECTORS}/{folder}/referrers-tag.txt")).unwrap();
    if is_referrer {
        let index = vector(folder, "referrers-index.json");
        store.put_as(REPOSITORY, &text(folder, "referrers-tag.txt"), media_type::OCI_INDEX, index.into());
    } else {
        store.put_as(REPOSITORY, &text(folder, "tag.txt"), media_type::OCI_MANIFEST, manifest.into());
    }
    drop(store);
    fake
}

/// A witness that has this one of the vectors' keys.
fn keys(name: &str) -> TrustedKeys {
    let settings = WitnessSettings {
        name: name.into(),
        description: String::new(),
        key: "awskms:///alias/never-asked?region=eu-west-1".parse::<KeyUri>().unwrap(),
        login: None,
        verify: vec![TrustedKeySettings { pem: text("keys", &format!("{name}.pub.pem")), until: None, revoked: None }],
        rate: None,
        pin: None,
    };
    TrustedKeys::offline(&settings).unwrap()
}

/// Verdict or reason of each signature, and how it is said to be stored.
async fn told(folder: &str, reference: &str) -> Vec<(String, Value)> {
    let fake = registry_with(folder).await;
    let keys = ["rsa2048", "p256"].map(|name| (name, keys(name)));
    let chains = ["rsa2048", "p256"].map(|name| [Chain::from_pem(&text("keys", &format!("{name}.notation.crt.pem"))).unwrap()]);
    let trusts: Vec<_> =
        keys.iter().zip(&chains).map(|((witness, keys), certificates)| Trust { witness, keys, certificates }).collect();
    let reference = format!("{NAME}/{REPOSITORY}{reference}").parse().unwrap();
    let now = "2026-11-21T09:00:00Z".parse().unwrap();
    let examination = examine(&fake.client(), &reference, &trusts, now, Depth::Statements).await.unwrap();
    assert_eq!(examination.unreadable, None, "{folder}");
    assert_eq!(examination.attestations, [], "{folder}");
    let told = serde_json::to_value(&examination.signatures).unwrap();
    let word = |one: &Value| {
        let word = if one["verdict"] == "verified" { &one["witness"] } else { &one["reason"] };
        format!("{}: {}", one["format"].as_str().unwrap(), word.as_str().unwrap())
    };
    told.as_array().unwrap().iter().map(|one| (word(one), one["layout"].clone())).collect()
}

#[tokio::test]
async fn each_vector_is_found_under_its_tag_and_judged_as_the_tools_judge_it() {
    let digest = text("image", "digest.txt");
    for (folder, expected) in [
        ("A-rsa-pkcs1", "cosign: rsa2048"),
        ("A-ecdsa-p256", "cosign: p256"),
        ("A-repo-only-rsa-pkcs1", "cosign: rsa2048"),
        ("A-rsa-pss", "cosign: unknown_key"),
        ("A-tampered-payload", "cosign: unknown_key"),
        ("A-tampered-signature", "cosign: unknown_key"),
        ("A-wrong-digest", "cosign: other_digest"),
        ("B-rsa-pkcs1", "bundle: rsa2048"),
        ("B-ecdsa-p256", "bundle: p256"),
        ("B-rsa-pss", "bundle: unknown_key"),
        ("B-tampered-signature", "bundle: unknown_key"),
        ("C-jws-rsa-ps256", "notation: rsa2048"),
        ("C-jws-p256-es256", "notation: p256"),
        ("C-jws-rsa-ps256-config-type", "notation: rsa2048"),
        ("C-jws-rsa-rs256-INVALID", "notation: malformed"),
        ("C-cose-rsa-ps256", "notation-cose: rsa2048"),
        ("C-cose-p256-es256", "notation-cose: p256"),
    ] {
        for reference in [":1.0".to_owned(), format!("@{digest}")] {
            assert_eq!(told(folder, &reference).await, [(expected.to_owned(), Value::Null)], "{folder} by {reference}");
        }
    }
    let two = [("cosign: rsa2048".to_owned(), Value::Null), ("cosign: other_reference".to_owned(), Value::Null)];
    assert_eq!(told("A-two-tags-rsa-pkcs1", ":1.0").await, two);
    // cosign's reads it with `--experimental-oci11` only, and no other tool at all.
    assert_eq!(told("A-oci11-rsa-pkcs1", ":1.0").await, [("cosign: rsa2048".to_owned(), json!("oci-1-1"))]);
}

/// Anybody who can push can write any number of them, and each of the key's is a verification.
#[tokio::test]
async fn no_more_layers_of_referrers_are_judged_than_a_bound() {
    let fake = registry_with("A-oci11-rsa-pkcs1").await;
    let mut manifest: Value = serde_json::from_slice(&vector("A-oci11-rsa-pkcs1", "manifest.json")).unwrap();
    let mut index: Value = serde_json::from_slice(&vector("A-oci11-rsa-pkcs1", "referrers-index.json")).unwrap();
    manifest["layers"] = vec![manifest["layers"][0].clone(); 600].into();
    let mut entries = vec![];
    for name in ["one", "another"] {
        manifest["annotations"] = json!({ "name": name });
        let digest = fake.store().put(REPOSITORY, None, media_type::OCI_MANIFEST, &manifest);
        entries.push(json!({ "mediaType": media_type::OCI_MANIFEST, "digest": digest, "size": 1, "artifactType": manifest["artifactType"] }));
    }
    index["manifests"] = entries.into();
    fake.store().put(REPOSITORY, Some(&text("A-oci11-rsa-pkcs1", "referrers-tag.txt")), media_type::OCI_INDEX, &index);
    let keys = keys("rsa2048");
    let trust = Trust { witness: "release", keys: &keys, certificates: &[] };
    let reference = format!("{NAME}/{REPOSITORY}:1.0").parse().unwrap();
    let told =
        examine(&fake.client(), &reference, &[trust], "2026-11-21T09:00:00Z".parse().unwrap(), Depth::Statements).await.unwrap();
    assert_eq!((told.signatures.len(), told.verified().count()), (1000, 1000));
    assert!(told.unreadable.unwrap().contains("only 1000"));
}

#[tokio::test]
async fn a_key_that_is_two_witnesses_signs_for_both() {
    let fake = registry_with("A-two-tags-rsa-pkcs1").await;
    let keys = keys("rsa2048");
    let trusts = ["a", "b"].map(|witness| Trust { witness, keys: &keys, certificates: &[] });
    let reference = format!("{NAME}/{REPOSITORY}:1.0").parse().unwrap();
    let now = "2026-11-21T09:00:00Z".parse().unwrap();
    let told = examine(&fake.client(), &reference, &trusts, now, Depth::Verdicts).await.unwrap();
    assert_eq!(["a", "b", "c"].map(|witness| told.is_signed_by(witness)), [true, true, false]);
    let told = serde_json::to_value(&told.signatures).unwrap();
    for (at, verdict) in [(0, "verified"), (1, "rejected")] {
        assert_eq!(
            [&told[at]["verdict"], &told[at]["witness"], &told[at]["also"]],
            [&json!(verdict), &json!("a"), &json!(["b"])]
        );
    }
}

/// Anybody who can push can put anything under a tag.
#[tokio::test]
async fn what_makes_no_sense_in_one_place_does_not_hide_what_stands_in_the_other() {
    let fake = registry_with("A-rsa-pkcs1").await;
    let digest: Digest = text("image", "digest.txt").parse().unwrap();
    fake.store().put_as(REPOSITORY, Tag::referrers(&digest).as_str(), "text/plain", Bytes::from_static(b"no index"));
    let reference = format!("{NAME}/{REPOSITORY}:1.0").parse().unwrap();
    let (now, release, stranger) = ("2026-11-21T09:00:00Z".parse().unwrap(), keys("rsa2048"), keys("p256"));
    let client = fake.client();
    let by = |keys| [Trust { witness: "release", keys, certificates: &[] }];
    let told = examine(&client, &reference, &by(&release), now, Depth::Verdicts).await.unwrap();
    assert!(told.is_attested());
    assert!(told.unreadable.unwrap().contains("makes no sense"));
    let error = examine(&client, &reference, &by(&stranger), now, Depth::Verdicts).await.unwrap_err();
    assert!(matches!(error, registry::Error::Malformed { .. }), "{error:?}");
}

#[tokio::test]
async fn what_an_unknown_signature_says_is_read_for_those_who_ask_what_is_there_alone() {
    let fake = registry_with("A-rsa-pkcs1").await;
    let reference: Reference = format!("{NAME}/{REPOSITORY}:1.0").parse().unwrap();
    let now = "2026-11-21T09:00:00Z".parse().unwrap();
    for (depth, says) in [(Depth::Verdicts, false), (Depth::Statements, true)] {
        let told = examine(&fake.client(), &reference, &[], now, depth).await.unwrap();
        let Judgement::Rejected { witness: None, reference, reason: Rejection::UnknownKey, .. } = &told.signatures[0].verdict
        else {
            panic!("{told:?}")
        };
        assert_eq!(reference.as_deref(), says.then_some("registry.example.com/team/app:1.0"));
    }
}

#[test]
fn the_tags_of_the_vectors_are_ours() {
    let digest: Digest = text("image", "digest.txt").parse().unwrap();
    let folders = fs::read_dir(VECTORS).unwrap().map(|folder| folder.unwrap().file_name().into_string().unwrap());
    let mut seen = (0, 0);
    for folder in folders {
        if let Ok(tag) = fs::read_to_string(format!("{VECTORS}/{folder}/tag.txt")) {
            assert_eq!(Some(tag.trim()), Tag::cosign_signatures(&digest).as_ref().map(Tag::as_str), "{folder}");
            seen.0 += 1;
        }
        if let Ok(tag) = fs::read_to_string(format!("{VECTORS}/{folder}/referrers-tag.txt")) {
            assert_eq!(tag.trim(), Tag::referrers(&digest).as_str(), "{folder}");
            seen.1 += 1;
        }
    }
    assert_eq!(seen, (9, 11));
}

#[tokio::test]
async fn an_index_is_taken_with_its_platforms_and_with_all_that_is_in_it() {
    use crate::subject::{Children, Located, locate};
    let fake = Fake::start().await;
    let [index, amd64, arm64, attestation] = ["index.json", "manifest.json", "manifest-arm64.json", "attestation-manifest.json"]
        .map(|file| {
            let content = vector("image", file);
            let media_type = if file == "index.json" { media_type::OCI_INDEX } else { media_type::OCI_MANIFEST };
            let digest = Digest::of(&content);
            fake.store().put_as(REPOSITORY, digest.as_str(), media_type, content.into());
            digest
        });
    assert_eq!((index.as_str(), amd64.as_str()), (&*text("image", "index-digest.txt"), &*text("image", "digest.txt")));
    let repository: Repository = REPOSITORY.parse().unwrap();
    for (wanted, mut expected) in [(Children::Signed, vec![&amd64, &arm64]), (Children::All, vec![&amd64, &arm64, &attestation])]
    {
        let Located::Image(image) = locate(&fake.client(), &repository, None, &index, wanted).await.unwrap() else {
            panic!("it is an image")
        };
        expected.sort();
        assert_eq!(image.children.iter().map(crate::subject::Subject::digest).collect::<Vec<_>>(), expected, "{wanted:?}");
    }
    // By itself it is what it is.
    let alone = locate(&fake.client(), &repository, None, &attestation, Children::All).await.unwrap();
    assert!(matches!(alone, Located::Attachment), "{alone:?}");
}
