//! Events through the whole pipeline, beside a registry that misbehaves on request.

mod cut_short;
pub(crate) mod fake;
mod house;
mod layouts;
mod referrers;
mod replay;
mod together;

use std::{
    collections::VecDeque,
    future::poll_fn,
    path::PathBuf,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
    },
    task::Poll,
};

use async_trait::async_trait;
use jiff::Timestamp;
use queue::{DeadLetter, Embedded, Kept, Message, Options, PartitionKey};
use serde_json::{Value, json};
use sha2::Digest as _;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::{
    write::{Desk, Written},
    *,
};
use crate::{
    kms::{self, Algorithm, KeySpec, KeyUri, PublicKey, RawSignature, SigningKey},
    oci::{Digest, Repository, Tag, media_type},
    outcome::{Classify as _, Skip},
    rule::{Rule, Scope, SignatureType, TagFilter},
    signature::{
        Format,
        cosign::{SignatureManifest, Statement},
    },
    subject::{self, Located},
    witness::{Rate, WitnessSettings},
};
use cut_short::dropped_after;
use fake::{Act, Fake, NAME, image, index};
use house::*;
pub(crate) use house::{House, rule};

#[test]
fn waits_double_up_to_the_longest_and_differ() {
    let patience = Patience { first: Duration::from_secs(1), longest: Duration::from_secs(10), give_up: Duration::from_secs(60) };
    for (attempts, full) in [(0, 1.0), (1, 2.0), (2, 4.0), (3, 8.0), (4, 10.0), (u32::MAX, 10.0)] {
        let waits: Vec<f64> = (0..50).map(|_| patience.wait(attempts).as_secs_f64()).collect();
        assert!(waits.iter().all(|wait| (full / 2.0..=full).contains(wait)), "after {attempts}: {waits:?}");
        let least = waits.iter().copied().fold(full, f64::min);
        let most = waits.iter().copied().fold(0.0, f64::max);
        assert!(most - least > full / 10.0, "after {attempts}, what failed together comes back together: {waits:?}");
    }
}

#[tokio::test]
async fn redelivered_event_is_signed_once() {
    let house = House::new().await;
    let pipeline = house.pipeline(release());
    let digest = house.image("once");
    for _ in 0..3 {
        house.push(Some("1.0"), &digest).await;
        house.settle(&pipeline).await;
    }
    assert_eq!(house.signed(&digest), [tagged("1.0")]);
    assert_eq!(house.calls(), 1);
    let sums = house.ledger.sums().await.unwrap();
    assert_eq!((sums.signed, sums.already_signed), (1, 2));
    // What the README says it costs: seven requests and two for the config that a repository needs once; then two.
    assert_eq!(house.registry.store().asked.len(), 7 + 2 + 2 * 2);
}

#[tokio::test]
async fn a_tag_that_moved_is_signed_by_digest_alone_or_superseded() {
    let house = House::new().await;
    let by_tag = Rule { tags: Some(TagFilter::parse(&["1.*"]).unwrap()), ..rule("by tag", "release") };
    let old = house.image("old");
    house.image("new");

    house.push(Some("1.0"), &old).await;
    house.settle(&house.pipeline(vec![by_tag.clone()])).await;
    assert!(house.signed(&old).is_empty());
    assert_eq!(house.outcome(&old).await.0, Outcome::Skipped(Skip::Superseded));
    assert_eq!(house.calls(), 0);

    house.push(Some("1.0"), &old).await;
    house.settle(&house.pipeline(vec![by_tag, rule("all", "release")])).await;
    assert_eq!(house.signed(&old), [pinned(&old)]);
    let (outcome, rules) = house.outcome(&old).await;
    assert_eq!(outcome, Outcome::Signed);
    assert_eq!(rules, [("all".into(), Outcome::Signed), ("by tag".into(), Outcome::Skipped(Skip::Superseded))]);
}

#[tokio::test]
async fn an_event_that_is_faster_than_its_image_or_its_tag_waits_for_them() {
    let house = House::new().await;
    let by_tag = Rule { tags: Some(TagFilter::parse(&["1.*"]).unwrap()), ..rule("by tag", "release") };
    let pipeline = house.pipeline(vec![by_tag]);
    // What comes soon is waited for with the event in hand; for what comes late the event goes back to the queue.
    for (name, half) in [("soon", 10), ("late", 400)] {
        house.image("old");
        let digest = Digest::of(image(name).to_string().as_bytes());
        house.push_received(Some("1.0"), &digest, Duration::ZERO).await;
        let coming = async {
            tokio::time::sleep(Duration::from_millis(half)).await;
            house.registry.store().put("team/app", None, media_type::OCI_MANIFEST, &image(name));
            tokio::time::sleep(Duration::from_millis(half)).await;
            house.image(name);
        };
        tokio::join!(house.settle(&pipeline), coming);
        assert_eq!(house.signed(&digest), [tagged("1.0")], "{name}");
    }
    // What does not come is not waited for for ever, and costs no patience meanwhile.
    let (old, _) = (house.image("superseded"), house.image("new"));
    house.push_received(Some("1.0"), &old, Duration::from_secs(3)).await;
    house.handle_next(&pipeline).await;
    let delivery = house.queue.pull().await.unwrap().unwrap();
    assert_eq!(delivery.waited(), Duration::ZERO);
    drop(delivery);
    house.settle(&pipeline).await;
    assert_eq!(house.outcome(&old).await.0, Outcome::Skipped(Skip::Superseded));
}

#[tokio::test]
async fn a_tag_that_moves_while_the_key_is_asked_is_not_signed_for_the_old_digest() {
    let house = House::new().await;
    let old = house.image("old");
    *house.key.slow.lock().unwrap() = Duration::from_millis(2100);
    house.push(Some("1.0"), &old).await;
    let pipeline = house.pipeline(release());
    let moving = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        house.image("new");
        *house.key.slow.lock().unwrap() = Duration::ZERO;
    };
    tokio::join!(house.settle(&pipeline), moving);
    assert_eq!(house.signed(&old), [pinned(&old)]);
}

#[tokio::test]
async fn one_rule_denied_and_one_signed_ends_dead_with_the_signature_written() {
    let house = House::new().await;
    let digest = house.image("mixed");
    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(vec![rule("works", "release"), rule("does not", "denied")])).await;
    assert_eq!(house.signed(&digest), [tagged("1.0")]);
    let dead = house.dead().await;
    assert_eq!((dead.len(), dead[0].burial.kind.as_str(), dead[0].attempts), (1, "refused", 0));
    for words in ["kms:Sign is not allowed", "allow countersign's identity"] {
        assert!(dead[0].burial.reason.contains(words), "{}", dead[0].burial.reason);
    }
    let (outcome, rules) = house.outcome(&digest).await;
    assert_eq!(outcome, Outcome::Dead);
    assert_eq!(rules, [("does not".into(), Outcome::Dead), ("works".into(), Outcome::Signed)]);
}

#[tokio::test]
async fn what_may_pass_is_tried_again_before_what_cannot_is_buried() {
    let house = House::new().await;
    let digest = house.image("mixed");
    let passing = kms::Error::Transient { key: key_uri(), what: "having a moment".into() };
    house.key.script.lock().unwrap().push_back(Err(passing));
    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(vec![rule("works", "release"), rule("does not", "denied")])).await;
    assert_eq!(house.signed(&digest), [tagged("1.0")]);
    let dead = house.dead().await;
    assert_eq!((dead.len(), dead[0].burial.kind.as_str(), dead[0].attempts), (1, "refused", 1));
}

#[tokio::test]
async fn throttling_uses_up_no_patience() {
    let house = House::new().await;
    let digest = house.image("throttled");
    for _ in 0..3 {
        let throttled = kms::Error::Throttled { key: key_uri(), what: "slow down".into(), retry_after: None };
        house.key.script.lock().unwrap().push_back(Err(throttled));
    }
    house.push(Some("1.0"), &digest).await;
    let pipeline = house.pipeline(release());
    for _ in 0..3 {
        house.handle_next(&pipeline).await;
        assert_eq!(house.queue.stats().await.unwrap().queued(), 1);
    }
    let delivery = house.queue.pull().await.unwrap().unwrap();
    assert_eq!((delivery.attempts(), delivery.waited()), (0, Duration::ZERO));
    drop(delivery);
    house.settle(&pipeline).await;
    assert_eq!(house.signed(&digest), [tagged("1.0")]);
}

#[tokio::test]
async fn a_deadline_that_is_spent_in_line_for_the_key_uses_up_no_patience() {
    let house = House::with_rate(Some(Rate { per_second: 1, burst: 1 })).await;
    let digest = house.image("in line");
    let witness = house.witnesses["release"].clone();
    witness.sign(Algorithm::EcdsaSha256, &[0; 32]).await.unwrap();
    assert!(!witness.is_waited_for());

    let pipeline = house.pipeline(release());
    let setup = pipeline.setup();
    let (registry, tag) = (&setup.registries[&NAME.parse().unwrap()], "1.0".parse().unwrap());
    let located = subject::locate(registry, &app(), Some(&tag), &digest, subject::Children::Signed).await;
    let Ok(Located::Image(image)) = located else { panic!("{located:?}") };
    let request = plan::Request { message_id: "1", pushed_at: Timestamp::UNIX_EPOCH, tag: &image.tag, rules: setup.rules.all() };
    let plan = plan::plan(&image, &[request], &setup.witnesses, Timestamp::UNIX_EPOCH);
    let desk = Desk {
        registry,
        ledger: &house.ledger,
        turns: &pipeline.turns,
        clock: &pipeline.clock,
        tags: &write::FreshTags::new(Instant::now()),
        deadline: Instant::now() + Duration::from_millis(300),
    };
    let answers = desk.see_to(&plan.targets[0]).await;
    let [Written::Failed(error)] = answers.as_slice() else { panic!("{answers:?}") };
    assert_eq!(error.verdict(), Verdict::Retry { after: None, throttled: true });
}

#[tokio::test]
async fn a_ledger_that_refuses_intents_keeps_the_key_unasked() {
    let house = House::new().await;
    let digest = house.image("off the record");
    let pipeline = house.pipeline(release());
    house.meddle("ALTER TABLE signature RENAME TO hidden");
    house.push(Some("1.0"), &digest).await;
    for _ in 0..3 {
        house.handle_next(&pipeline).await;
    }
    assert_eq!(house.calls(), 0);
    assert!(house.signed(&digest).is_empty());
    assert_eq!(house.queue.stats().await.unwrap().queued(), 1);
    house.meddle("ALTER TABLE hidden RENAME TO signature");
    house.settle(&pipeline).await;
    assert_eq!(house.signed(&digest), [tagged("1.0")]);
}

#[tokio::test]
async fn an_outcome_that_is_not_on_record_is_not_done() {
    let house = House::new().await;
    let digest = house.image("no outcome");
    let pipeline = house.pipeline(release());
    house.meddle("ALTER TABLE event RENAME TO hidden");
    house.push(Some("1.0"), &digest).await;
    for _ in 0..2 {
        house.handle_next(&pipeline).await;
    }
    assert_eq!(house.signed(&digest), [tagged("1.0")], "written all the same");
    assert_eq!(house.queue.stats().await.unwrap().queued(), 1);
    house.meddle("ALTER TABLE hidden RENAME TO event");
    house.settle(&pipeline).await;
    assert_eq!(house.signed(&digest), [tagged("1.0")]);
    assert_eq!(house.calls(), 1);
}

#[tokio::test]
async fn a_lost_signature_is_written_again() {
    let house = House::new().await;
    let digest = house.image("contended");
    let theirs = house.registry.store().put_blob(b"their payload");
    let own = house.registry.store().put_blob(b"{}");
    let foreign = json!({
        "schemaVersion": 2,
        "mediaType": media_type::OCI_MANIFEST,
        "config": { "mediaType": media_type::OCI_CONFIG, "digest": own, "size": 2 },
        "layers": [{
            "mediaType": crate::signature::cosign::LAYER_MEDIA_TYPE, "digest": theirs, "size": 13,
            "annotations": { crate::signature::cosign::SIGNATURE_ANNOTATION: "AAAA", "theirs": "kept" },
        }],
    });
    // Each of our first three writes is overwritten before we look.
    let (tag, mut overwrites, theirs) = (sig(&digest), 3, foreign.clone());
    let mut wrote = false;
    house.registry.on_request(move |asked, store| {
        let path = format!("team/app/manifests/{tag}");
        if std::mem::replace(&mut wrote, asked == format!("PUT {path}")) && overwrites > 0 {
            overwrites -= 1;
            store.put("team/app", Some(&tag), media_type::OCI_MANIFEST, &theirs);
        }
        Act::Serve
    });
    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(release())).await;
    assert_eq!(house.signed(&digest), [tagged("1.0")]);
    assert_eq!(house.calls(), 1, "a signature that was lost is written again, not made again");
    let stored = house.registry.signatures(&app(), &digest).unwrap();
    assert_eq!(stored["layers"][0], foreign["layers"][0], "what others wrote stays as it was");
    assert_eq!(house.ledger.sums().await.unwrap().signed, 1);
}

#[tokio::test]
async fn an_equal_signature_that_another_replica_wrote_meanwhile_is_not_doubled() {
    let house = House::new().await;
    let digest = house.image("replicas");
    let pipeline = house.pipeline(release());
    house.push(Some("1.0"), &digest).await;
    house.settle(&pipeline).await;
    let tag = sig(&digest);
    let written = house.registry.signatures(&app(), &digest).unwrap();
    house.registry.store().remove("team/app", &tag);

    // Not there at the first look; there at the second.
    let mut looks = 0;
    house.registry.on_request(move |asked, store| {
        if asked == format!("GET team/app/manifests/{tag}") {
            looks += 1;
            if looks == 2 {
                store.put("team/app", Some(&tag), media_type::OCI_MANIFEST, &written);
            }
        }
        Act::Serve
    });
    house.push(Some("1.0"), &digest).await;
    house.settle(&pipeline).await;
    assert_eq!(house.signed(&digest), [tagged("1.0")]);
    assert_eq!(house.outcome(&digest).await.0, Outcome::AlreadySigned);
}

#[tokio::test]
async fn an_index_is_signed_with_its_children() {
    let house = House::new().await;
    let (amd64, arm64) = {
        let mut store = house.registry.store();
        let put = |store: &mut fake::Store, name| store.put("team/app", None, media_type::OCI_MANIFEST, &image(name));
        (put(&mut store, "amd64"), put(&mut store, "arm64"))
    };
    let inner = house.registry.store().put("team/app", None, media_type::OCI_INDEX, &index([arm64.as_str()]));
    let outer = json!({
        "schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": [
            { "mediaType": media_type::OCI_MANIFEST, "digest": amd64, "size": 1 },
            { "mediaType": media_type::OCI_INDEX, "digest": inner, "size": 1 },
            { "mediaType": media_type::OCI_MANIFEST, "digest": Digest::of(b"sparse"), "size": 1 },
        ],
    });
    let outer = house.registry.store().put("team/app", Some("1.0"), media_type::OCI_INDEX, &outer);
    house.push(Some("1.0"), &outer).await;
    house.settle(&house.pipeline(release())).await;
    for digest in [&outer, &amd64, &inner, &arm64] {
        assert_eq!(house.signed(digest), [tagged("1.0")]);
    }
    assert!(house.signed(&Digest::of(b"sparse")).is_empty());
}

#[tokio::test]
async fn children_of_digests_that_no_verifier_looks_for_are_left_out() {
    let house = House::new().await;
    let known = house.registry.store().put("team/app", None, media_type::OCI_MANIFEST, &image("sha256"));
    let content = image("sha512").to_string();
    let unknown = format!("sha512:{}", hex::encode(sha2::Sha512::digest(content.as_bytes())));
    house.registry.store().put_as("team/app", &unknown, media_type::OCI_MANIFEST, content.into());
    let outer = index([known.as_str(), unknown.as_str()]);
    let outer = house.registry.store().put("team/app", Some("1.0"), media_type::OCI_INDEX, &outer);
    house.push(Some("1.0"), &outer).await;
    house.settle(&house.pipeline(release())).await;
    assert_eq!((house.signed(&outer), house.signed(&known)), (vec![tagged("1.0")], vec![tagged("1.0")]));
}

#[tokio::test]
async fn an_index_of_more_children_than_are_known_is_refused() {
    let house = House::new().await;
    for (children, signed) in [(256, 1), (257, 0)] {
        let digests: Vec<_> = (0..children).map(|n: usize| Digest::of(&n.to_le_bytes()).to_string()).collect();
        let content = index(digests.iter().map(String::as_str));
        let outer = house.registry.store().put("team/app", Some("1.0"), media_type::OCI_INDEX, &content);
        house.push(Some("1.0"), &outer).await;
        house.settle(&house.pipeline(release())).await;
        assert_eq!(house.signed(&outer).len(), signed, "{children} children");
    }
    assert!(house.dead().await[0].burial.reason.contains("more than 256 children"));
}

#[tokio::test]
async fn two_rules_of_one_witness_and_type_make_one_signature() {
    let house = House::new().await;
    let digest = house.image("two rules");
    let simple = Rule { signature_type: SignatureType::Simple, ..rule("simple", "release") };
    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(vec![rule("one", "release"), rule("other", "release"), simple])).await;
    assert_eq!(house.signed(&digest), [tagged("1.0"), pinned(&digest)]);
    assert_eq!(house.calls(), 2);
    assert_eq!(house.outcome(&digest).await.1.len(), 3);
}

#[tokio::test]
async fn a_rule_without_its_witness_waits_and_holds_up_no_other() {
    let house = House::new().await;
    let (old, new) = (house.image("old"), house.image("new"));
    let by_tag = Rule { tags: Some(TagFilter::parse(&["1.*"]).unwrap()), ..rule("waits", "shut") };
    let pipeline = house.pipeline(vec![rule("works", "release"), by_tag]);
    house.push(Some("1.0"), &new).await;
    house.handle_next(&pipeline).await;
    assert_eq!(house.signed(&new), [tagged("1.0")]);
    assert_eq!(house.queue.stats().await.unwrap().queued(), 1);
    let (outcome, rules) = house.outcome(&new).await;
    assert_eq!(outcome, Outcome::Retrying);
    assert_eq!(rules, [("waits".into(), Outcome::Retrying), ("works".into(), Outcome::Signed)]);

    // Where it had nothing to sign anyway, nothing waits for it.
    let house = House::new().await;
    house.image("other");
    house.registry.store().put("team/app", None, media_type::OCI_MANIFEST, &image("old"));
    let by_tag = Rule { tags: Some(TagFilter::parse(&["1.*"]).unwrap()), ..rule("waits", "shut") };
    house.push(Some("1.0"), &old).await;
    house.settle(&house.pipeline(vec![rule("works", "release"), by_tag])).await;
    assert_eq!(house.signed(&old), [pinned(&old)]);
}

#[tokio::test]
async fn what_stands_under_the_signature_tag_and_is_no_signature_manifest_is_never_overwritten() {
    let house = House::new().await;
    let pipeline = house.pipeline(release());
    let huge = json!({ "schemaVersion": 2, "mediaType": media_type::OCI_MANIFEST, "config": {}, "layers": [],
        "annotations": { "x": "x".repeat(4 * 1024 * 1024 - 200) } });
    for (kind, content) in [(media_type::OCI_INDEX, index([])), (media_type::OCI_MANIFEST, huge)] {
        let digest = house.image(kind);
        let before = house.registry.store().put("team/app", Some(&sig(&digest)), kind, &content);
        house.push(Some("1.0"), &digest).await;
        house.settle(&pipeline).await;
        let (_, after) = house.registry.store().manifest("team/app", &sig(&digest)).unwrap();
        assert_eq!(Digest::of(&after), before);
        assert!(house.dead().await.last().unwrap().burial.reason.contains("delete the tag"), "{:?}", house.dead().await);
    }
    assert_eq!(house.dead().await.len(), 2);
}

#[tokio::test]
async fn a_signature_manifest_of_dockers_type_is_added_to_and_becomes_an_oci_one() {
    let house = House::new().await;
    let digest = house.image("docker");
    let mut theirs: Value = image("theirs");
    theirs["mediaType"] = json!(media_type::DOCKER_MANIFEST);
    theirs["config"]["digest"] = json!(house.registry.store().put_blob(b"{\"not\":\"a config\"}"));
    house.registry.store().put("team/app", Some(&sig(&digest)), media_type::DOCKER_MANIFEST, &theirs);
    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(release())).await;
    assert_eq!(house.signed(&digest), [tagged("1.0")]);
    let (kind, content) = house.registry.store().manifest("team/app", &sig(&digest)).unwrap();
    let content: Value = serde_json::from_slice(&content).unwrap();
    assert_eq!((kind.as_str(), content["annotations"]["name"].as_str()), (media_type::OCI_MANIFEST, Some("theirs")));
}

#[tokio::test]
async fn a_config_that_lists_its_layers_lists_ours_too() {
    let house = House::new().await;
    let digest = house.image("listed");
    let config = house.registry.store().put_blob(br#"{"rootfs":{"type":"layers","diff_ids":[]},"history":[]}"#);
    let mut theirs = image("theirs");
    theirs["config"]["digest"] = json!(config);
    house.registry.store().put("team/app", Some(&sig(&digest)), media_type::OCI_MANIFEST, &theirs);
    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(release())).await;
    assert_eq!(house.signed(&digest), [tagged("1.0")]);
    let stored = house.registry.signatures(&app(), &digest).unwrap();
    let config = house.registry.store().blob(stored["config"]["digest"].as_str().unwrap()).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["rootfs"]["diff_ids"], json!([stored["layers"][0]["digest"]]));
}

#[tokio::test]
async fn a_body_that_is_no_event_is_buried_untouched() {
    let house = House::new().await;
    let pipeline = house.pipeline(release());
    let quarantined = house.enqueue(event::QUARANTINE_CONTENT_TYPE, "quarantine/main", b"\xff{".to_vec()).await;
    let foreign = house.enqueue(event::CONTENT_TYPE, "x", b"{\"specversion\":\"2.0\"}".to_vec()).await;
    house.settle(&pipeline).await;
    let mut dead = house.dead().await;
    dead.sort_by(|one, other| one.message.id.cmp(&other.message.id));
    let seen: Vec<_> = dead.iter().map(|letter| (&letter.message.id, letter.burial.kind.as_str())).collect();
    assert_eq!(seen, [(&quarantined, "poison"), (&foreign, "poison")]);
    assert_eq!(&dead[0].message.body[..], b"\xff{");
    assert!(house.registry.store().asked.is_empty());
}

#[tokio::test]
async fn a_registry_that_fails_for_a_while_delays_and_loses_nothing() {
    let house = House::new().await;
    let digest = house.image("later");
    let mut failures = 40;
    house.registry.on_request(move |_, _| {
        failures -= 1;
        if failures > 0 { Act::Refuse(503) } else { Act::Serve }
    });
    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(release())).await;
    assert_eq!(house.signed(&digest), [tagged("1.0")]);
}
