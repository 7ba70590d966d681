//! Notation's signatures in registries that refuse a manifest for how it says what it is.

use crate::{
    certificate::{SubjectName, make},
    signature::notation::ARTIFACT_TYPE,
};

use super::*;

fn notation() -> Vec<Rule> {
    vec![Rule { formats: vec![Format::Notation], ..rule("team", "release") }]
}

/// Refuses what OCI image-spec 1.1 has come with.
fn of_before_1_1(manifest: &Value) -> bool {
    !manifest["artifactType"].is_null() || manifest["config"]["mediaType"] == media_type::OCI_EMPTY
}

/// Refuses configs that are no image's.
fn of_images(manifest: &Value) -> bool {
    manifest["config"]["mediaType"] == ARTIFACT_TYPE
}

impl House {
    /// One whose witness `release` has a certificate.
    pub(super) async fn with_certificate() -> Self {
        let mut house = Self::new().await;
        let witness = Arc::into_inner(house.witnesses.remove("release").unwrap()).unwrap();
        let chain = make(&witness, &SubjectName::unnamed(), Clock::system().now()).await.unwrap();
        house.witnesses.insert("release".into(), Arc::new(witness.certified(vec![chain])));
        house
    }

    /// Pushes an image, has it handled, and says which layout its signatures have: whether the type is the manifest's own.
    async fn layouts(&self, pipeline: &Pipeline, digest: &Digest) -> Vec<bool> {
        self.push(Some("1.0"), digest).await;
        self.settle(pipeline).await;
        let store = self.registry.store();
        let typed = store.referrers("team/app", digest.as_str());
        typed.iter().map(|entry| entry["artifactType"] == ARTIFACT_TYPE).collect()
    }

    /// How many manifests were put there by their digest since this was asked last, taken or not.
    fn manifests_tried(&self) -> usize {
        let asked = std::mem::take(&mut self.registry.store().asked);
        asked.iter().filter(|one| one.starts_with("PUT team/app/manifests/sha256:")).count()
    }
}

#[tokio::test]
async fn where_a_manifest_with_a_type_is_refused_the_layout_of_notation_1_is_written_and_remembered() {
    for has_api in [true, false] {
        let house = House::with_certificate().await;
        house.registry.store().has_api = has_api;
        house.registry.store().refuses = Some(of_before_1_1);
        let pipeline = house.pipeline(notation());
        for (name, tried) in [("first", 2), ("second", 1)] {
            let digest = house.image(name);
            assert_eq!(house.layouts(&pipeline, &digest).await, [false], "{name}");
            assert_eq!(house.manifests_tried(), tried, "{name}");
            // What stands there is found again, and by those who verify.
            assert_eq!(house.layouts(&pipeline, &digest).await, [false], "{name}");
            assert_eq!((house.manifests_tried(), house.outcome(&digest).await.0), (0, Outcome::AlreadySigned), "{name}");
            let witness = &house.witnesses["release"];
            let trust =
                crate::verify::Trust { witness: "release", keys: witness.trusted_keys(), certificates: witness.certificates() };
            let (client, now) = (house.registry.client(), Clock::system().now());
            let told = crate::verify::examine(
                &client,
                &pinned(&digest).parse().unwrap(),
                &[trust],
                now,
                crate::verify::Depth::Statements,
            )
            .await
            .unwrap();
            assert!(told.is_attested(), "{name}: {told:?}");
            if !has_api {
                // Listed by its type all the same, for those who filter.
                let listed = house.registry.fallback(&app(), &digest);
                assert_eq!((listed.len(), &listed[0]["artifactType"]), (1, &json!(ARTIFACT_TYPE)), "{name}");
            }
        }

        // The registry is another one by now.
        house.registry.store().refuses = Some(of_images);
        for (name, tried) in [("third", 2), ("fourth", 1)] {
            assert_eq!(house.layouts(&pipeline, &house.image(name)).await, [true], "{name}");
            assert_eq!(house.manifests_tried(), tried, "{name}");
        }
    }
}

#[tokio::test]
async fn a_registry_that_refuses_both_layouts_is_quoted_and_nothing_is_learned_from_it() {
    let house = House::with_certificate().await;
    let pipeline = house.pipeline(notation());
    house.registry.store().refuses = Some(|manifest| !manifest["subject"].is_null());
    assert_eq!(house.layouts(&pipeline, &house.image("refused")).await, [] as [bool; 0]);
    let [letter] = &house.dead().await[..] else { panic!("no dead letter") };
    assert!(letter.burial.reason.contains("MANIFEST_INVALID"), "{}", letter.burial.reason);
    house.registry.store().refuses = None;
    house.manifests_tried();
    assert_eq!(house.layouts(&pipeline, &house.image("taken")).await, [true]);
    assert_eq!(house.manifests_tried(), 1);
}

#[tokio::test]
async fn what_a_registry_says_of_the_other_layout_does_not_hide_what_it_said_of_the_first() {
    let house = House::with_certificate().await;
    house.registry.store().refuses = Some(of_before_1_1);
    let mut tried = 0;
    house.registry.on_request(move |asked, _| {
        tried += u32::from(asked.starts_with("PUT team/app/manifests/sha256:"));
        if tried == 2 { Act::Refuse(403) } else { Act::Serve }
    });
    assert_eq!(house.layouts(&house.pipeline(notation()), &house.image("denied")).await, [] as [bool; 0]);
    let [letter] = &house.dead().await[..] else { panic!("no dead letter") };
    assert!(letter.burial.reason.contains("MANIFEST_INVALID"), "{}", letter.burial.reason);
}

#[tokio::test]
async fn a_registry_that_is_only_throttling_gets_no_other_layout() {
    let house = House::with_certificate().await;
    let mut left = 1;
    house.registry.on_request(move |asked, _| {
        if asked.starts_with("PUT team/app/manifests/sha256:") && left > 0 {
            left -= 1;
            return Act::Refuse(503);
        }
        Act::Serve
    });
    assert_eq!(house.layouts(&house.pipeline(notation()), &house.image("busy")).await, [true]);
}
