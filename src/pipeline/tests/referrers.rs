//! Bundles: beside the `.sig` tag, in registries with the referrers API and without it.

use crate::{
    oci::Reference,
    signature::{Prepared, bundle, referrer::Referrer},
    subject::Subject,
};

use super::*;

fn bundles() -> Vec<Rule> {
    vec![Rule { formats: vec![Format::Bundle], ..rule("team", "release") }]
}

fn both() -> Vec<Rule> {
    vec![Rule { formats: vec![Format::Cosign, Format::Bundle], ..rule("team", "release") }]
}

fn fallback(digest: &Digest) -> String {
    Tag::referrers(digest).to_string()
}

impl House {
    /// How many of the listed referrers are bundles of the witness `release` for this digest. All of ours must be readable.
    fn bundled(&self, digest: &Digest) -> usize {
        let has_api = self.registry.store().has_api;
        let listed = if has_api {
            self.registry.store().referrers("team/app", digest.as_str())
        } else {
            self.registry.fallback(&app(), digest)
        };
        let store = self.registry.store();
        let ours = listed.iter().filter(|entry| {
            let (_, manifest) =
                store.manifest("team/app", entry["digest"].as_str().unwrap()).expect("a listed manifest is missing");
            let manifest: Value = serde_json::from_slice(&manifest).unwrap();
            let Some(blob) = store.blob(manifest["layers"][0]["digest"].as_str().unwrap_or_default()) else { return false };
            bundle::read(&blob).is_ok_and(|claim| {
                claim.digests == [digest.clone()]
                    && self.key.public_key().verify(Algorithm::EcdsaSha256, &claim.signed_sha256, &claim.signature).is_ok()
            })
        });
        ours.count()
    }

    /// A bundle that the witness `release` made elsewhere.
    async fn bundle_from_elsewhere(&self, name: &str, created: &str) -> Referrer {
        let subject = Subject::in_test(&tagged("1.0"), image(name).to_string().as_bytes());
        let prepared = bundle::Prepared::new(&subject, created.parse().unwrap());
        let witness = &self.witnesses["release"];
        let signed = witness.sign(Algorithm::EcdsaSha256, prepared.pae_sha256()).await.unwrap();
        prepared.assemble(signed.raw(), witness.public_key())
    }

    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.registry.store().asked)
    }
}

fn store_referrer(store: &mut fake::Store, referrer: &Referrer) {
    store.put_blob(Box::leak(referrer.blob().to_vec().into_boxed_slice()));
    store.put_blob(b"{}");
    store.put_as("team/app", referrer.digest().as_str(), media_type::OCI_MANIFEST, referrer.manifest().clone());
}

fn referrers_index(entries: &[Value]) -> Value {
    json!({ "schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": entries, "theirs": { "kept": true } })
}

#[tokio::test]
async fn a_bundle_is_written_once_in_either_kind_of_registry() {
    // Look, blob (2), manifest, look for it; without the API also the last look and the write of the index. The first time: the
    // config (2), and the question whether there is an API.
    for (has_api, first, later) in [(true, 5 + 2, 5), (false, 7 + 2 + 1, 7)] {
        let house = House::new().await;
        house.registry.store().has_api = has_api;
        let pipeline = house.pipeline(bundles());
        for (name, requests) in [("first", first), ("second", later)] {
            let digest = house.image(name);
            house.push(Some("1.0"), &digest).await;
            house.settle(&pipeline).await;
            assert_eq!(house.bundled(&digest), 1, "has_api: {has_api}");
            let asked = house.requests();
            assert_eq!(asked.len(), 1 + requests, "has_api: {has_api}, {asked:#?}");

            let calls = house.calls();
            house.push(Some("1.0"), &digest).await;
            house.settle(&pipeline).await;
            assert_eq!((house.bundled(&digest), house.calls()), (1, calls));
            // The image, the listing, our manifest and its blob.
            assert_eq!(house.requests().len(), 4);
        }
        assert!(!has_api || house.registry.fallback(&app(), &house.image("first")).is_empty());
        let sums = house.ledger.sums().await.unwrap();
        assert_eq!((sums.signed, sums.already_signed), (2, 2));
    }
}

/// distribution-spec 1.1 has `OCI-Subject` say that a registry lists referrers; some say so that do not, and the other way round.
#[tokio::test]
async fn whether_a_registry_lists_referrers_is_asked_and_not_taken_from_what_it_says_of_a_subject() {
    for (has_api, says_subject) in [(true, true), (true, false), (false, true), (false, false)] {
        let house = House::new().await;
        house.registry.store().has_api = has_api;
        house.registry.store().says_subject = Some(says_subject);
        let pipeline = house.pipeline(bundles());
        for name in ["first", "second"] {
            let digest = house.image(name);
            house.push(Some("1.0"), &digest).await;
            house.settle(&pipeline).await;
            assert_eq!(house.bundled(&digest), 1, "{has_api} {says_subject}");
            let index = house.registry.store().manifest("team/app", &fallback(&digest));
            assert_eq!(index.is_none(), has_api, "{has_api} {says_subject}");
        }
    }
}

#[tokio::test]
async fn witnesses_of_one_push_share_payload_and_write() {
    let house = House::new().await;
    let digest = house.image("witnesses");
    let rules = ["release", "other"].map(|witness| Rule { name: witness.into(), witness: witness.into(), ..both().remove(0) });
    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(rules.into())).await;
    let asked = house.requests();
    let count = |method: &str, part: &str| asked.iter().filter(|one| one.starts_with(method) && one.ends_with(part)).count();
    assert_eq!((count("PUT", &sig(&digest)), count("PUT", &fallback(&digest))), (1, 1), "{asked:#?}");
    // The payload that both sign, a bundle of each, the config.
    assert_eq!(count("POST", "/blobs/uploads/"), 1 + 2 + 1, "{asked:#?}");
    assert_eq!((house.bundled(&digest), house.registry.fallback(&app(), &digest).len()), (1, 2));
    let (_, manifest) = house.registry.store().manifest("team/app", &sig(&digest)).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let [first, second] = &manifest["layers"].as_array().unwrap()[..] else { panic!("{manifest}") };
    assert_eq!(first["digest"], second["digest"], "one payload");
    assert_ne!(first["annotations"], second["annotations"], "two signatures");
}

#[tokio::test]
async fn what_is_listed_says_type_and_annotations_and_others_entries_are_kept() {
    let house = House::new().await;
    let digest = house.image("kept");
    let theirs = json!({ "mediaType": media_type::OCI_MANIFEST, "digest": Digest::of(b"gone"), "size": 1, "odd": [1.0], "artifactType": "a/b" });
    let before = referrers_index(&[theirs.clone(), json!("no descriptor")]);
    house.registry.store().put("team/app", Some(&fallback(&digest)), media_type::OCI_INDEX, &before);
    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(bundles())).await;
    assert_eq!(house.registry.fallback(&app(), &digest)[..2], [theirs, json!("no descriptor")]);
    let ours = &house.registry.fallback(&app(), &digest)[2];
    assert_eq!(ours["artifactType"], bundle::MEDIA_TYPE);
    assert_eq!(ours["annotations"][bundle::PREDICATE_ANNOTATION], bundle::PREDICATE_TYPE);
    let (kind, after) = house.registry.store().manifest("team/app", &fallback(&digest)).unwrap();
    assert_eq!(kind, media_type::OCI_INDEX);
    assert_eq!(serde_json::from_slice::<Value>(&after).unwrap()["theirs"], before["theirs"]);
}

#[tokio::test]
async fn rules_and_formats_of_one_push_share_every_look_blob_and_write() {
    let house = House::new().await;
    let digest = house.image("together");
    let simple = Rule { signature_type: SignatureType::Simple, ..both().remove(0) };
    let rules =
        vec![both().remove(0), Rule { name: "again".into(), ..both().remove(0) }, Rule { name: "simple".into(), ..simple }];
    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(rules)).await;
    assert_eq!(house.signed(&digest), [tagged("1.0"), pinned(&digest)]);
    assert_eq!((house.bundled(&digest), house.calls()), (1, 3));
    let asked = house.requests();
    let count = |method: &str, end: &str| asked.iter().filter(|one| one.starts_with(method) && one.ends_with(end)).count();
    assert_eq!((count("PUT", &sig(&digest)), count("PUT", &fallback(&digest))), (1, 1));
    assert_eq!((count("GET", &sig(&digest)), count("GET", &fallback(&digest))), (3, 3));
    // Two payloads, one bundle, one config.
    assert_eq!(count("POST", "/blobs/uploads/"), 4);
    assert_eq!(house.outcome(&digest).await.1.len(), 3);
    let query =
        ledger::StoryQuery { registry: NAME.parse().unwrap(), repository: app(), tag: None, digest: Some(digest), limit: 1 };
    assert_eq!(house.ledger.story(query).await.unwrap()[0].rules.len(), 3);
}

#[tokio::test]
async fn only_what_was_pushed_is_bundled_and_not_its_platforms() {
    let house = House::new().await;
    let child = house.registry.store().put("team/app", None, media_type::OCI_MANIFEST, &image("amd64"));
    let outer = house.registry.store().put("team/app", Some("1.0"), media_type::OCI_INDEX, &index([child.as_str()]));
    house.push(Some("1.0"), &outer).await;
    house.settle(&house.pipeline(both())).await;
    assert_eq!((house.bundled(&outer), house.bundled(&child)), (1, 0));
    assert_eq!((house.signed(&outer).len(), house.signed(&child).len()), (1, 1));
}

#[tokio::test]
async fn a_lost_entry_is_added_again_and_not_made_again() {
    let house = House::new().await;
    let digest = house.image("contended");
    let theirs =
        json!({ "mediaType": media_type::OCI_MANIFEST, "digest": Digest::of(b"gone"), "size": 1, "artifactType": "a/b" });
    let (tag, mut overwrites, mut wrote) = (fallback(&digest), 3, false);
    let foreign = referrers_index(std::slice::from_ref(&theirs));
    house.registry.on_request(move |asked, store| {
        if std::mem::replace(&mut wrote, asked == format!("PUT team/app/manifests/{tag}")) && overwrites > 0 {
            overwrites -= 1;
            store.put("team/app", Some(&tag), media_type::OCI_INDEX, &foreign);
        }
        Act::Serve
    });
    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(bundles())).await;
    // Theirs is listed and its manifest is not there: nothing can be said about it.
    assert_eq!(house.registry.fallback(&app(), &digest)[0], theirs);
    assert_eq!((house.registry.fallback(&app(), &digest).len(), house.calls()), (2, 1));
    assert_eq!(house.ledger.sums().await.unwrap().signed, 1);
}

#[tokio::test]
async fn an_equal_bundle_that_another_replica_lists_meanwhile_is_not_doubled() {
    let house = House::new().await;
    let digest = house.image("replicas");
    let theirs = house.bundle_from_elsewhere("replicas", "2026-01-01T00:00:00Z").await;
    let (tag, mut looks) = (fallback(&digest), 0);
    // Not there at the first look; there at the second.
    house.registry.on_request(move |asked, store| {
        if asked == format!("GET team/app/manifests/{tag}") {
            looks += 1;
            if looks == 2 {
                store_referrer(store, &theirs);
                store.put("team/app", Some(&tag), media_type::OCI_INDEX, &referrers_index(&[json!(theirs.descriptor())]));
            }
        }
        Act::Serve
    });
    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(bundles())).await;
    assert_eq!(house.bundled(&digest), 1);
    assert_eq!(house.outcome(&digest).await.0, Outcome::AlreadySigned);
}

/// Whatever is read takes its time, in which others write.
#[tokio::test]
async fn what_is_read_for_the_first_time_is_read_before_the_look_that_is_written_by() {
    let house = House::new().await;
    let digest = house.image("read late");
    let entry = |name: &[u8]| json!({ "mediaType": media_type::OCI_MANIFEST, "digest": Digest::of(name), "size": 1, "artifactType": bundle::MEDIA_TYPE });
    let (unseen, later) = (entry(b"unseen"), entry(b"later"));
    let (tag, mut looks, mut reads) = (fallback(&digest), 0, 0);
    let (read, both) = (format!("GET team/app/manifests/{}", Digest::of(b"unseen")), [unseen.clone(), later.clone()]);
    house.registry.on_request(move |asked, store| {
        looks += u32::from(asked == format!("GET team/app/manifests/{tag}"));
        reads += u32::from(asked == read);
        // Nothing is there at the first look.
        if asked.ends_with(&tag) && looks == 2 {
            store.put("team/app", Some(&tag), media_type::OCI_INDEX, &referrers_index(&both[..1]));
        } else if asked == read && reads == 1 {
            store.put("team/app", Some(&tag), media_type::OCI_INDEX, &referrers_index(&both));
        }
        Act::Serve
    });
    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(bundles())).await;
    let listed = house.registry.fallback(&app(), &digest);
    assert_eq!(listed[..2], [unseen, later]);
    assert_eq!((listed.len(), house.calls()), (3, 1));
}

/// There nothing is read before the write, unless signing took so long that another replica may have been at it.
#[tokio::test]
async fn an_equal_bundle_that_another_replica_stores_while_the_key_is_slow_is_not_doubled() {
    let house = House::new().await;
    house.registry.store().has_api = true;
    let digest = house.image("slow");
    let theirs = house.bundle_from_elsewhere("slow", "2026-01-01T00:00:00Z").await;
    *house.key.slow.lock().unwrap() = Duration::from_millis(2100);
    let mut looks = 0;
    house.registry.on_request(move |asked, store| {
        if asked.starts_with("GET team/app/referrers/") {
            looks += 1;
            if looks == 2 {
                store_referrer(store, &theirs);
            }
        }
        Act::Serve
    });
    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(bundles())).await;
    assert_eq!(house.bundled(&digest), 1);
    assert_eq!(house.outcome(&digest).await.0, Outcome::AlreadySigned);
}

#[tokio::test]
async fn a_bundle_is_found_however_it_is_listed_and_none_but_a_signature_counts() {
    let house = House::new().await;
    let pipeline = house.pipeline(bundles());
    // As cosign lists its own in the fallback index.
    let digest = house.image("cosign's");
    let theirs = house.bundle_from_elsewhere("cosign's", "2026-01-01T00:00:00Z").await;
    store_referrer(&mut house.registry.store(), &theirs);
    let entry = json!({ "mediaType": media_type::OCI_MANIFEST, "digest": theirs.digest(), "size": theirs.manifest().len(), "artifactType": media_type::OCI_EMPTY });
    house.registry.store().put("team/app", Some(&fallback(&digest)), media_type::OCI_INDEX, &referrers_index(&[entry]));
    house.push(Some("1.0"), &digest).await;
    house.settle(&pipeline).await;
    assert_eq!(house.outcome(&digest).await.0, Outcome::AlreadySigned);

    // A bundle of another image that somebody lists here.
    let other = house.image("other");
    let entry = json!(theirs.descriptor());
    house.registry.store().put("team/app", Some(&fallback(&other)), media_type::OCI_INDEX, &referrers_index(&[entry]));
    house.push(Some("1.0"), &other).await;
    house.settle(&pipeline).await;
    assert_eq!((house.outcome(&other).await.0, house.registry.fallback(&app(), &other).len()), (Outcome::Signed, 2));
}

#[tokio::test]
async fn a_fallback_tag_that_holds_no_index_is_never_overwritten_and_holds_up_no_other_format() {
    let house = House::new().await;
    let digest = house.image("no index");
    let before = house.registry.store().put("team/app", Some(&fallback(&digest)), media_type::OCI_MANIFEST, &image("theirs"));
    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(both())).await;
    let (_, after) = house.registry.store().manifest("team/app", &fallback(&digest)).unwrap();
    assert_eq!(Digest::of(&after), before);
    assert_eq!(house.signed(&digest), [tagged("1.0")]);
    let dead = house.dead().await;
    assert!(dead.len() == 1 && dead[0].burial.reason.contains("delete the tag"), "{dead:?}");
    assert!(dead[0].burial.reason.contains("index"), "{dead:?}");
}

#[tokio::test]
async fn a_referrer_that_its_registry_does_not_list_is_not_called_signed() {
    let house = House::new().await;
    house.registry.store().has_api = true;
    let digest = house.image("unlisted");
    let mut hidden = 7;
    house.registry.on_request(move |asked, store| {
        if asked.contains("/referrers/") && hidden > 0 {
            hidden -= 1;
            // What the registry has not taken in yet, it does not list.
            let listed = store.referrers("team/app", asked.rsplit_once('/').unwrap().1);
            for entry in listed {
                store.remove("team/app", entry["digest"].as_str().unwrap());
            }
        }
        Act::Serve
    });
    house.push(Some("1.0"), &digest).await;
    let pipeline = house.pipeline(bundles());
    house.handle_next(&pipeline).await;
    assert_eq!(house.queue.stats().await.unwrap().queued(), 1);
    house.settle(&pipeline).await;
    assert_eq!(house.bundled(&digest), 1);
}

#[tokio::test]
async fn what_we_write_is_never_signed_even_where_untagged_pushes_are() {
    for has_api in [true, false] {
        let house = House::new().await;
        house.registry.store().has_api = has_api;
        let digest = house.image("ours");
        let pipeline = house.pipeline(vec![Rule { untagged: true, ..both().remove(0) }]);
        house.push(Some("1.0"), &digest).await;
        house.settle(&pipeline).await;
        let calls = house.calls();
        let written = house.registry.store().referrers("team/app", digest.as_str());
        assert_eq!(written.len(), 1);
        let written: Digest = written[0]["digest"].as_str().unwrap().parse().unwrap();
        house.push(None, &written).await;
        house.settle(&pipeline).await;
        assert_eq!(house.outcome(&written).await.0, Outcome::Skipped(Skip::Attachment));
        for tag in [sig(&digest), fallback(&digest)] {
            let Some((_, content)) = house.registry.store().manifest("team/app", &tag) else { continue };
            let written = Digest::of(&content);
            house.push(Some(&tag), &written).await;
            house.settle(&pipeline).await;
            assert_eq!(house.outcome(&written).await.0, Outcome::Skipped(Skip::Attachment), "{tag}");
        }
        assert_eq!(house.calls(), calls);
    }
}

#[tokio::test]
async fn handling_that_ends_at_any_await_point_ends_with_one_signature_in_each_format() {
    let house = House::new().await;
    let (mut polls, mut survived) = (0, 0);
    while survived < 2 {
        polls += 1;
        let digest = house.image(&format!("crash {polls}"));
        house.push(Some("1.0"), &digest).await;
        let first = house.pipeline(both());
        let delivery = house.queue.pull().await.unwrap().unwrap();
        survived += u32::from(dropped_after(polls, first.handle(vec![delivery])).await.is_some());
        house.settle(&house.pipeline(both())).await;
        assert_eq!(house.signed(&digest), [tagged("1.0")], "dropped after {polls} polls");
        assert_eq!(house.bundled(&digest), 1, "dropped after {polls} polls");
    }
    assert!(polls > 12, "only {polls} polls: the drops did not reach every stage");
}

#[tokio::test]
async fn all_that_is_found_is_told_with_its_format() {
    let house = House::new().await;
    let digest = house.image("told");
    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(both())).await;
    let keys = house.witnesses["release"].trusted_keys();
    let trusts = [crate::verify::Trust { witness: "release", keys, certificates: &[] }];
    let (client, now) = (house.registry.client(), Clock::system().now());
    for (asked, counting) in [(tagged("1.0"), 2), (pinned(&digest), 2), (tagged("1.0").replace("1.0", "2.0"), 1)] {
        house.registry.store().put("team/app", Some("2.0"), media_type::OCI_MANIFEST, &image("told"));
        let reference: Reference = asked.parse().unwrap();
        let examination =
            crate::verify::examine(&client, &reference, &trusts, now, crate::verify::Depth::Statements).await.unwrap();
        assert_eq!(examination.verified().count(), counting, "{asked}: {examination:?}");
        let told = serde_json::to_value(&examination.signatures).unwrap();
        assert_eq!((&told[0]["format"], &told[1]["format"]), (&json!("cosign"), &json!("bundle")));
        assert_eq!(
            (&told[1]["verdict"], &told[1]["reference"], &told[1]["witness"]),
            (&json!("verified"), &Value::Null, &json!("release"))
        );
        assert!(told[1]["time"].as_str().unwrap().ends_with('Z'));
        assert!(counting == 2 || told[0]["witness"] == "release" && told[0]["reason"] == "other_reference", "{told}");
    }
    // By nobody who is known.
    let examination =
        crate::verify::examine(&client, &tagged("1.0").parse().unwrap(), &[], now, crate::verify::Depth::Statements)
            .await
            .unwrap();
    assert!(!examination.is_attested());
    let told = serde_json::to_value(&examination.signatures).unwrap();
    assert_eq!((&told[0]["reason"], &told[1]["reason"]), (&json!("unknown_key"), &json!("unknown_key")));
    assert_eq!((&told[0]["reference"], &told[1]["reference"]), (&json!(tagged("1.0")), &Value::Null));
}

#[test]
fn formats_are_told_apart_by_what_they_name() {
    let subject = Subject::in_test(&tagged("1.0"), b"image");
    let prepared = Prepared::Bundle(bundle::Prepared::new(&subject, Timestamp::UNIX_EPOCH));
    assert_eq!((prepared.format(), prepared.reference()), (Format::Bundle, None));
}

#[tokio::test]
async fn ours_is_found_among_any_number_of_referrers_and_no_more_than_a_bound_are_read() {
    let house = House::new().await;
    let digest = house.image("crowd");
    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(bundles())).await;
    let ours = house.registry.fallback(&app(), &digest);
    let crowd = (0..500)
        .map(|n: u32| json!({ "mediaType": media_type::OCI_MANIFEST, "digest": Digest::of(&n.to_le_bytes()), "size": 1 }));
    let entries: Vec<_> = crowd.chain(ours).collect();
    house.registry.store().put("team/app", Some(&fallback(&digest)), media_type::OCI_INDEX, &referrers_index(&entries));
    house.requests();

    house.push(Some("1.0"), &digest).await;
    house.settle(&house.pipeline(bundles())).await;
    assert_eq!((house.outcome(&digest).await.0, house.calls()), (Outcome::AlreadySigned, 1));
    // The image, the question for the API, the index, our manifest and its blob.
    assert_eq!(house.requests().len(), 5);

    let keys = house.witnesses["release"].trusted_keys();
    let trusts = [crate::verify::Trust { witness: "release", keys, certificates: &[] }];
    let reference: Reference = pinned(&digest).parse().unwrap();
    let examination = crate::verify::examine(
        &house.registry.client(),
        &reference,
        &trusts,
        Clock::system().now(),
        crate::verify::Depth::Statements,
    )
    .await
    .unwrap();
    assert!(examination.is_attested());
    assert!(examination.unreadable.unwrap().contains("only 100 of 501"));
    assert!(house.requests().len() < 110);
}
