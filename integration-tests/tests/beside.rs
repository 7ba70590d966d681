//! Four writers at one digest, in any order: countersign, cosign 3, notation and oras. After each write, each of them lists and
//! verifies whatever is there by then.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use integration_tests::formats::{Referrers, found, ours, wait_for};
use integration_tests::house::{House, Keys, Plan, rule_of_all_formats};
use integration_tests::image::Image;
use integration_tests::oras::{Listed, Oras};
use integration_tests::process::eventually;
use integration_tests::signature::tag_of;
use integration_tests::verifier::{Branch, Cosign, KeyPair, Notation, Ruling};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);
const FORMATS: [&str; 3] = ["bundle", "cosign", "notation"];
const NOTE: &str = "application/vnd.example.note";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writer {
    Countersign,
    Cosign,
    Notation,
    Oras,
}

const WRITERS: [Writer; 4] = [Writer::Countersign, Writer::Cosign, Writer::Notation, Writer::Oras];

/// Everybody who writes, and how the image is called.
struct Scene<'a> {
    house: &'a House,
    kind: Referrers,
    /// Of cosign's own.
    key: &'a KeyPair,
    oras: &'a Oras,
    /// With a key of its own.
    notation: Notation,
    /// That trusts countersign's.
    judge: Notation,
    image: Image,
    repository: String,
    pinned: String,
}

impl<'a> Scene<'a> {
    async fn set(house: &'a House, kind: Referrers, key: &'a KeyPair, oras: &'a Oras, name: &str) -> Result<Self> {
        let (image, repository) = (Image::oci(name)?, format!("team/{name}"));
        let full = format!("{}/{repository}", house.registry.host());
        let (notation, judge) = (Notation::signing(&full).await?, Notation::trusting_witness(house, "*").await?);
        house.push(&image, &repository, &[]).await?;
        let pinned = house.reference(&repository, &image.manifest.digest);
        Ok(Self { house, kind, key, oras, notation, judge, image, repository, pinned })
    }

    async fn write(&self, writer: Writer) -> Result<()> {
        match writer {
            Writer::Countersign => {
                self.kind.push(self.house, &self.image, &self.repository, "1.0").await?;
                wait_for(self.house, &self.pinned, &FORMATS).await
            }
            Writer::Cosign => Cosign::sign_bundle(self.key, &self.pinned).await,
            // As it is by default: under the fallback tag whatever the registry can.
            Writer::Notation => self.notation.sign(&self.pinned, true).await,
            Writer::Oras => self.oras.attach(NOTE, &self.pinned).await,
        }
    }

    /// Has each tool list and verify what these have written.
    async fn check(&self, written: &[Writer]) -> Result<()> {
        let has = |writer| written.contains(&writer);
        let (house, pinned, key) = (self.house, &self.pinned, self.house.public_key_path());
        let listed = self.oras.discover(pinned).await?;
        let count = |word: &str| listed.iter().filter(|one| one.artifact_type.contains(word)).count();
        // A bundle and an envelope of ours, and one of each other writer. cosign lists its own under a type that says nothing.
        let all = if has(Writer::Countersign) { written.len() + 1 } else { written.len() };
        ensure!(listed.len() == all, "oras lists {listed:?}");
        ensure!(count(NOTE) == usize::from(has(Writer::Oras)), "oras does not list its own: {listed:?}");
        let notations = usize::from(has(Writer::Notation)) + usize::from(has(Writer::Countersign));
        ensure!(count("cncf.notary") == notations, "oras lists {listed:?}");
        let list = self.notation.list(pinned).await?;
        // The image, and each of them.
        let names = list.words.matches("sha256:").count();
        ensure!(notations == 0 || names == 1 + notations, "notation lists {}", list.words);

        if has(Writer::Countersign) {
            ensure!(count("sigstore.bundle") >= 1, "oras lists {listed:?}");
            for cosign in [Cosign::V2, Cosign::V3] {
                accepts("cosign verify, of ours", &cosign.verify(&key, pinned).await?)?;
                let (tree, stored) = (cosign.tree(pinned).await?, self.branches(cosign, &listed).await?);
                ensure!(tree == stored, "{cosign:?} lists {tree:?}, and there is {stored:?}");
            }
            accepts("notation verify, of ours", &self.judge.verify(pinned).await?)?;
            let found = found(house, pinned).await?;
            let stands: Vec<_> = found.iter().filter(|one| FORMATS.map(ours).contains(one)).collect();
            ensure!(stands.len() == FORMATS.len(), "each of ours once: {found:?}");
        }
        if has(Writer::Cosign) {
            accepts("cosign verify, of its own", &Cosign::V3.verify(&self.key.public(), pinned).await?)?;
        }
        if has(Writer::Notation) {
            accepts("notation verify, of its own", &self.notation.verify(pinned).await?)?;
        }
        Ok(())
    }
}

impl Scene<'_> {
    /// What is stored, as this cosign lists it: the second looks at no referrers.
    async fn branches(&self, cosign: Cosign, listed: &[Listed]) -> Result<Vec<Branch>> {
        let repository = format!("{}/{}", self.house.registry.host(), self.repository);
        let read = async |reference: &str| {
            let manifest = self.house.client.manifest(&self.repository, reference).await?.context("it is gone")?;
            let manifest: Value = serde_json::from_slice(&manifest.bytes)?;
            let layers = manifest["layers"].as_array().context("no layers")?;
            let blobs = layers.iter().filter_map(|layer| layer["digest"].as_str()).map(str::to_owned).collect();
            anyhow::Ok((manifest, blobs))
        };
        let tag = tag_of(&self.image.manifest.digest);
        let (_, blobs) = read(&tag).await?;
        let mut branches = vec![Branch { kind: "Signatures for an image tag".into(), at: format!("{repository}:{tag}"), blobs }];
        for referrer in listed.iter().filter(|_| cosign == Cosign::V3) {
            let (manifest, blobs) = read(&referrer.digest).await?;
            // What a bundle states rather than that it is one.
            let kind =
                manifest["annotations"]["dev.sigstore.bundle.predicateType"].as_str().or(manifest["artifactType"].as_str());
            // notation itself has its type in the config.
            let kind = kind.or(manifest["config"]["mediaType"].as_str()).context("of no type")?;
            let kind = format!("{kind} artifacts via OCI referrer");
            branches.push(Branch { kind, at: format!("{repository}@{}", referrer.digest), blobs });
        }
        branches.sort();
        Ok(branches)
    }
}

fn accepts(what: &str, ruling: &Ruling) -> Result<()> {
    ensure!(ruling.accepted, "{what}: {}", ruling.words);
    Ok(())
}

async fn all_live_together(kind: Referrers, orders: Vec<Vec<Writer>>) -> Result<()> {
    let rules = rule_of_all_formats("team", "team", Keys::P256) + "formats = [\"cosign\", \"bundle\", \"notation\"]\n";
    let house = House::start(Plan { registry: kind.registry(), rules: Some(rules), ..Plan::default() }).await?;
    let (key, oras) = (KeyPair::generate().await?, Oras::new()?);
    let stories = orders.iter().enumerate().map(async |(number, order)| {
        let scene = Scene::set(&house, kind, &key, &oras, &format!("order-{number}")).await?;
        for (index, writer) in order.iter().enumerate() {
            let written = &order[..=index];
            scene.write(*writer).await?;
            scene.check(written).await.map_err(|error| error.context(format!("{kind:?}, after {written:?}")))?;
        }
        anyhow::Ok(())
    });
    stream::iter(stories).buffer_unordered(3).try_collect::<Vec<()>>().await?;
    let settled = async || Ok((house.daemon.metrics().await?.queued() == 0).then_some(()));
    eventually("nothing is queued", LIMIT, settled).await?;
    let metrics = house.daemon.metrics().await?;
    assert_eq!((metrics.ended("dead"), metrics.ended("signed")), (0, u64::try_from(orders.len())?), "{metrics:?}");
    Ok(())
}

#[tokio::test]
async fn in_any_order_all_live_together_under_the_fallback_tag() -> Result<()> {
    let mut orders = vec![vec![]];
    for _ in WRITERS {
        let longer = |order: &Vec<Writer>| {
            let order = order.clone();
            let next = WRITERS.into_iter().filter(|writer| !order.contains(writer)).collect::<Vec<_>>();
            next.into_iter().map(move |writer| [order.clone(), vec![writer]].concat())
        };
        orders = orders.iter().flat_map(longer).collect();
    }
    assert_eq!(orders.len(), 24);
    all_live_together(Referrers::FallbackTag, orders).await
}

/// Here nobody writes what another has written: each before and after each other is enough.
#[tokio::test]
async fn before_and_after_each_other_all_live_together_with_the_referrers_api() -> Result<()> {
    let forwards = WRITERS.to_vec();
    let backwards = WRITERS.into_iter().rev().collect();
    all_live_together(Referrers::Api, vec![forwards, backwards]).await
}
