//! `countersign copy-signatures`, between registries that list referrers themselves and such that do not.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::daemon::Output;
use integration_tests::house::{House, Keys, Plan, TOKEN, rule_of_all_formats};
use integration_tests::image::{Image, Manifest};
use integration_tests::oras::Oras;
use integration_tests::process::eventually;
use integration_tests::registry::{LOGIN, Options, Registry};
use integration_tests::signature::tag_of;
use integration_tests::verifier::{Cosign, KeyPair, Notation, Podman, Skopeo};
use reqwest::StatusCode;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);

/// An installation that signs `team` as `default`, `global` as `simple` and `notary` for notation, and a mirror that its configuration names too.
struct Pair {
    house: House,
    mirror: Registry,
}

impl Pair {
    async fn start(source: Options, mirror: Options) -> Result<Self> {
        let simple = rule_of_all_formats("global", "global", Keys::P256) + "signature_type = \"simple\"\n";
        let notary = rule_of_all_formats("notary", "notary", Keys::P256) + "formats = [\"notation\", \"notation-cose\"]\n";
        let rules = [rule_of_all_formats("team", "team", Keys::P256), simple, notary].join("\n");
        let house = House::build(Plan { rules: Some(rules), registry: source, ..Plan::default() }).await?;
        let login = mirror.login;
        let mirror = Registry::start_with(mirror).await?;
        let mut config = house.config();
        // A key is looked up in the table before it: this one comes first.
        let mut table = format!("[[registry]]\nname = \"{}\"\nurl = \"{}\"\n", mirror.host(), mirror.url());
        if login {
            writeln!(table, "username = \"{}\"\npassword = \"{}\"", LOGIN.0, LOGIN.1)?;
        }
        config = config.replacen("[[source]]", &format!("{table}\n[[source]]"), 1);
        // With two registries, a rule says whose images it signs.
        let host = house.registry.host();
        house.write_config(&config.replace("[[rule]]\n", &format!("[[rule]]\nregistry = \"{host}\"\n")))?;
        let mut pair = Self { house, mirror };
        pair.house.daemon.start().await?;
        Ok(pair)
    }

    /// Pushes the image, and waits until both formats are there.
    async fn push_signed(&self, image: &Image, repository: &str) -> Result<String> {
        self.house.push(image, repository, &["1.0"]).await?;
        let event = House::event(&self.house.registry.host(), repository, Some("1.0"), &image.manifest.digest);
        ensure!(self.house.notify(Some(TOKEN), &event).await? == StatusCode::ACCEPTED);
        let reference = self.house.reference(repository, "1.0");
        eventually("both formats are written", LIMIT, async || {
            let verified = self.found(&reference).await?.into_iter().filter(|(_, verdict)| verdict == "verified").count();
            Ok((verified >= 2).then_some(()))
        })
        .await?;
        // The platforms of an index are signed with it.
        self.house.wait_settled(1, LIMIT).await?;
        Ok(reference)
    }

    fn at_mirror(&self, repository: &str, tag: &str) -> String {
        format!("{}/{repository}:{tag}", self.mirror.host())
    }

    async fn copy(&self, source: &str, destination: &str, further: &[&str]) -> Result<Output> {
        let mut arguments = vec!["copy-signatures", source, destination, "--output", "json"];
        arguments.extend(further);
        self.house.run(&arguments).await
    }

    /// How many signatures `countersign copy-signatures` says have come to which state.
    async fn states(&self, source: &str, destination: &str, further: &[&str]) -> Result<BTreeMap<String, usize>> {
        let answer = self.copy(source, destination, further).await?.expect_code(0)?.json()?;
        let mut states = BTreeMap::new();
        for signature in answer["signatures"].as_array().with_context(|| format!("no signatures in {answer}"))? {
            *states.entry(text(&signature["state"])).or_default() += 1;
        }
        Ok(states)
    }

    /// What `countersign verify` finds: (format, verdict or why not) of each signature by a known key, sorted.
    async fn found(&self, reference: &str) -> Result<Vec<(String, String)>> {
        let answer = self.house.run(&["verify", reference, "--output", "json"]).await?.json()?[0].clone();
        let signatures = answer["signatures"].as_array().with_context(|| format!("no signatures in {answer}"))?;
        let ours = signatures.iter().filter(|one| one["witness"] == "release");
        let verdict = |one: &Value| text(if one["verdict"] == "verified" { &one["verdict"] } else { &one["reason"] });
        let mut found: Vec<_> = ours.map(|one| (text(&one["format"]), verdict(one))).collect();
        found.sort();
        Ok(found)
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or("nothing").to_owned()
}

fn states<const N: usize>(expected: [(&str, usize); N]) -> BTreeMap<String, usize> {
    expected.into_iter().map(|(state, count)| (state.to_owned(), count)).collect()
}

fn said(what: &str, how: &str) -> (String, String) {
    (what.to_owned(), how.to_owned())
}

async fn everybodys_signatures_are_copied(source: Options, mirror: Options) -> Result<()> {
    let pair = Pair::start(source, mirror).await?;
    let (theirs, already) = (KeyPair::generate().await?, KeyPair::generate().await?);
    let image = Image::index("mirrored")?;
    for (repository, cosign_counts) in [("team/app", false), ("global/app", true)] {
        let source = pair.push_signed(&image, repository).await?;
        Cosign::V2.sign(&theirs, &source).await?;
        Cosign::sign_bundle(&theirs, &source).await?;
        let destination = pair.at_mirror(repository, "stable");
        let client = pair.mirror.client()?;
        client.push(&image, repository, &["stable"]).await?;
        Cosign::V2.sign(&already, &destination).await?;
        Cosign::sign_bundle(&already, &destination).await?;

        // Of each: the index as `.sig` and bundle, its two platforms as `.sig`, and cosign's two.
        let digest = &image.manifest.digest;
        let before = client.manifest(repository, &tag_of(digest)).await?;
        assert_eq!(pair.states(&source, &destination, &["--dry-run"]).await?, states([("missing", 6)]));
        assert_eq!(client.manifest(repository, &tag_of(digest)).await?, before, "a dry run writes nothing");
        assert_eq!(pair.states(&source, &destination, &[]).await?, states([("copied", 6)]));
        let after = client.manifest(repository, &tag_of(digest)).await?;
        assert_eq!(pair.states(&source, &destination, &[]).await?, states([("present", 6)]));
        assert_eq!(client.manifest(repository, &tag_of(digest)).await?, after, "a second copy writes nothing");

        for (whose, key) in [("ours", pair.house.public_key_path()), ("theirs", theirs.public()), ("already", already.public())] {
            for cosign in [Cosign::V2, Cosign::V3] {
                let ruling = cosign.verify(&key, &destination).await?;
                assert!(ruling.accepted, "{cosign:?} refuses {whose} at {destination}: {}", ruling.words);
            }
        }
        // A signature of the digest alone counts under every name; one of a name, under that name; a bundle names nothing.
        let cosign = if cosign_counts { "verified" } else { "other_reference" };
        assert_eq!(pair.found(&destination).await?, [said("bundle", "verified"), said("cosign", cosign)]);
        let child = format!("{}/{repository}@{}", pair.mirror.host(), image.child("amd64").digest);
        assert_eq!(pair.found(&child).await?, [said("cosign", cosign)]);
        let text = pair.house.run(&["copy-signatures", &source, &destination]).await?.expect_code(0)?.stdout;
        assert_eq!(text.contains(&format!("approves {source} only")), !cosign_counts, "{text}");

        // What cosign wrote is at the mirror byte for byte.
        let (here, there) =
            (layers(&pair.house.client, repository, &tag_of(digest)).await?, layers(&client, repository, &tag_of(digest)).await?);
        assert!(here.iter().all(|layer| there.contains(layer)), "{here:?}\n{there:?}");
        assert_eq!(there.len(), here.len() + 1);
    }
    Ok(())
}

/// Of an index, its platforms and its build attestation, in every way in which cosign keeps them.
async fn signatures_of_every_manifest_of_an_index_are_copied(source: Options, mirror: Options) -> Result<()> {
    let pair = Pair::start(source, mirror).await?;
    let (image, repository, client) = (Image::index("each")?, "other/app", pair.mirror.client()?);
    pair.house.push(&image, repository, &["1.0"]).await?;
    client.push(&image, repository, &["stable"]).await?;
    let (source, destination) = (pair.house.reference(repository, "1.0"), pair.at_mirror(repository, "stable"));
    let manifests = [&image.manifest, image.child("amd64"), image.child("attestation")].map(|manifest| &manifest.digest);
    let keys = [KeyPair::generate().await?, KeyPair::generate().await?];
    for digest in manifests {
        let pinned = pair.house.reference(repository, digest);
        Cosign::V3.sign(&keys[0], &pinned).await?;
        Cosign::sign_bundle(&keys[0], &pinned).await?;
        // One with two layers: cosign repeats what is under the `.sig` tag. Of several it reads the last that is listed, whichever
        // that is.
        Cosign::V2.sign_referrer(&keys[1], &pinned).await?;
    }

    let answer = pair.copy(&source, &destination, &["--dry-run"]).await?.expect_code(0)?.json()?;
    let signatures = answer["signatures"].as_array().with_context(|| format!("no signatures in {answer}"))?;
    for digest in manifests {
        let mut formats: Vec<_> =
            signatures.iter().filter(|one| one["digest"] == **digest).map(|one| text(&one["format"])).collect();
        formats.sort();
        assert_eq!(formats, ["bundle", "cosign", "cosign-oci-1-1", "cosign-oci-1-1"], "{answer}");
    }
    let referrers = signatures.iter().filter(|one| one["format"] == "cosign-oci-1-1");
    let bare = format!("{}/{repository}", pair.house.registry.host());
    assert!(referrers.clone().all(|one| one["reference"] == bare && one["approves_destination"] == false), "{answer}");
    assert_eq!(pair.states(&source, &destination, &[]).await?, states([("copied", 12)]));
    assert_eq!(pair.states(&source, &destination, &[]).await?, states([("present", 12)]));

    for digest in manifests {
        let there = pair.at_mirror(repository, "").trim_end_matches(':').to_owned() + "@" + digest;
        for cosign in [Cosign::V2, Cosign::V3] {
            for key in &keys {
                let ruling = cosign.verify_referrer(&key.public(), &there).await?;
                assert!(ruling.accepted, "{cosign:?} refuses the referrer of {there}: {}", ruling.words);
            }
            let ruling = cosign.verify(&keys[0].public(), &there).await?;
            assert!(ruling.accepted, "{cosign:?} refuses {there}: {}", ruling.words);
        }
    }
    Ok(())
}

#[tokio::test]
async fn signatures_of_every_manifest_of_an_index_are_copied_to_a_registry_that_lists_referrers() -> Result<()> {
    let lists = Options { referrers_api: true, ..Options::default() };
    signatures_of_every_manifest_of_an_index_are_copied(Options::default(), lists).await
}

#[tokio::test]
async fn signatures_of_every_manifest_of_an_index_are_copied_to_a_registry_that_does_not() -> Result<()> {
    let lists = Options { referrers_api: true, ..Options::default() };
    signatures_of_every_manifest_of_an_index_are_copied(lists, Options::default()).await
}

#[tokio::test]
async fn a_signature_whose_content_the_source_has_lost_is_left_out_with_the_reason() -> Result<()> {
    let pair = Pair::start(Options::default(), Options::default()).await?;
    let (image, repository, client) = (Image::oci("lost")?, "other/app", pair.mirror.client()?);
    pair.house.push(&image, repository, &["1.0"]).await?;
    client.push(&image, repository, &["1.0"]).await?;
    let (source, destination) = (pair.house.reference(repository, "1.0"), pair.at_mirror(repository, "1.0"));
    let (lost, kept) = (KeyPair::generate().await?, KeyPair::generate().await?);
    let pinned = pair.house.reference(repository, &image.manifest.digest);
    Cosign::V3.sign(&lost, &pinned).await?;
    Cosign::sign_bundle(&lost, &pinned).await?;
    Cosign::V2.sign_referrer(&lost, &pinned).await?;

    // By its digest in the registry, which then has the manifests alone.
    let fallback = pair.house.client.manifest(repository, &image.manifest.digest.replace(':', "-")).await?;
    let index: Value = serde_json::from_slice(&fallback.context("no referrers")?.bytes)?;
    let referrers = index["manifests"].as_array().context("no entries")?;
    let mut payloads: BTreeSet<String> = layers(&pair.house.client, repository, &tag_of(&image.manifest.digest))
        .await?
        .iter()
        .map(|one| text(&one["digest"]))
        .collect();
    for referrer in referrers {
        payloads.extend(
            layers(&pair.house.client, repository, &text(&referrer["digest"])).await?.iter().map(|one| text(&one["digest"])),
        );
    }
    for payload in payloads {
        pair.house.client.delete_blob(repository, &payload).await?;
    }
    Cosign::sign_bundle(&kept, &pinned).await?;

    let answer = pair.copy(&source, &destination, &[]).await?.expect_code(0)?.json()?;
    let mut became: Vec<_> = answer["signatures"].as_array().context("no signatures")?.iter().map(became).collect();
    became.sort();
    let left_out =
        |format: &str, what: &str| format!("{format}: left_out, its {what} is missing in the source, so it counts nowhere");
    let expected = [
        "bundle: copied, nothing".to_owned(),
        left_out("bundle", "content"),
        left_out("cosign-oci-1-1", "content"),
        left_out("cosign", "payload"),
    ];
    assert_eq!(became, expected, "{answer}");
    let ruling = Cosign::V3.verify(&kept.public(), &destination).await?;
    assert!(ruling.accepted, "{}", ruling.words);
    assert_eq!(client.manifest(repository, &tag_of(&image.manifest.digest)).await?.map(|_| ()), None);
    Ok(())
}

fn became(signature: &Value) -> String {
    format!("{}: {}, {}", text(&signature["format"]), text(&signature["state"]), text(&signature["reason"]))
}

/// The witness's own key in cosign's hands: it counts, and it is said who else reads it.
#[tokio::test]
async fn what_cosign_keeps_as_a_referrer_is_judged_and_named_as_what_it_is() -> Result<()> {
    let house = House::start_quiet(None).await?;
    let key = house.config_path().with_file_name("release.key.pem");
    let (ours, theirs) = (KeyPair::import(&key).await?, KeyPair::generate().await?);
    for (name, by, code, verdict) in [("ours", &ours, 0, "verified"), ("theirs", &theirs, 1, "rejected")] {
        let (image, repository) = (Image::oci(name)?, format!("other/{name}"));
        house.push(&image, &repository, &["1.0"]).await?;
        let reference = house.reference(&repository, "1.0");
        Cosign::V2.sign_referrer(by, &house.reference(&repository, &image.manifest.digest)).await?;
        let answer = house.run(&["verify", &reference, "--output", "json"]).await?.expect_code(code)?.json()?;
        let signatures = answer[0]["signatures"].as_array().context("no signatures")?;
        assert_eq!(signatures.len(), 1, "{answer}");
        let found = ["format", "layout", "verdict"].map(|member| text(&signatures[0][member]));
        assert_eq!(found, ["cosign", "oci-1-1", verdict], "{answer}");
        let said = house.run(&["verify", &reference]).await?.expect_code(code)?.stdout;
        assert!(said.contains("as a referrer (oci-1-1), which cosign reads with --experimental-oci11 only"), "{said}");
        assert_eq!(said.contains("no key of the witnesses asked for made this signature"), code == 1, "{said}");
        let bare = format!("does not count: cosign signature of {}/{repository} as a referrer", house.registry.host());
        assert_eq!(said.contains(&bare), code == 1, "{said}");
        assert!(Cosign::V2.verify_referrer(&by.public(), &reference).await?.accepted);
        assert!(!Cosign::V2.verify(&by.public(), &reference).await?.accepted, "others do not see it");
    }
    Ok(())
}

async fn layers(client: &integration_tests::registry::Client, repository: &str, reference: &str) -> Result<Vec<Value>> {
    let manifest: Manifest = client.manifest(repository, reference).await?.context("no such manifest")?;
    let manifest: Value = serde_json::from_slice(&manifest.bytes)?;
    Ok(manifest["layers"].as_array().context("no layers")?.clone())
}

#[tokio::test]
async fn everybodys_signatures_are_copied_to_a_registry_that_lists_referrers() -> Result<()> {
    everybodys_signatures_are_copied(Options::default(), Options { referrers_api: true, ..Options::default() }).await
}

#[tokio::test]
async fn everybodys_signatures_are_copied_to_a_registry_that_does_not() -> Result<()> {
    everybodys_signatures_are_copied(Options { referrers_api: true, ..Options::default() }, Options::default()).await
}

/// Ours in both envelopes, and notation's own, which it lists under the fallback tag whatever the registry can.
async fn notations_signatures_are_copied(source: Options, mirror: Options) -> Result<()> {
    let pair = Pair::start(source, mirror).await?;
    let (image, repository, oras) = (Image::oci("notary")?, "notary/app", Oras::new()?);
    let source = pair.push_signed(&image, repository).await?;
    let (theirs, already) = (Notation::signing("*").await?, Notation::signing("*").await?);
    theirs.sign(&pair.house.reference(repository, &image.manifest.digest), true).await?;
    let destination = pair.at_mirror(repository, "stable");
    pair.mirror.client()?.push(&image, repository, &["stable"]).await?;
    already.sign(&format!("{}/{repository}@{}", pair.mirror.host(), image.manifest.digest), true).await?;

    assert_eq!(pair.states(&source, &destination, &["--dry-run"]).await?, states([("missing", 3)]));
    assert_eq!(pair.states(&source, &destination, &[]).await?, states([("copied", 3)]));
    let after = oras.discover(&destination).await?;
    assert_eq!(after.len(), 4, "{after:?}");
    assert!(after.iter().all(|one| one.artifact_type == "application/vnd.cncf.notary.signature"), "{after:?}");
    assert_eq!(pair.states(&source, &destination, &[]).await?, states([("present", 3)]));
    assert_eq!(oras.discover(&destination).await?, after, "a second copy writes nothing");

    for (whose, notation) in
        [("ours", &Notation::trusting_witness(&pair.house, "*").await?), ("theirs", &theirs), ("already", &already)]
    {
        let ruling = notation.verify(&destination).await?;
        assert!(ruling.accepted, "notation refuses {whose} at {destination}: {}", ruling.words);
    }
    assert_eq!(pair.found(&destination).await?, [said("notation", "verified"), said("notation-cose", "verified")]);
    Ok(())
}

#[tokio::test]
async fn notations_signatures_are_copied_to_a_registry_that_lists_referrers() -> Result<()> {
    notations_signatures_are_copied(Options::default(), Options { referrers_api: true, ..Options::default() }).await
}

#[tokio::test]
async fn notations_signatures_are_copied_to_a_registry_that_does_not() -> Result<()> {
    notations_signatures_are_copied(Options { referrers_api: true, ..Options::default() }, Options::default()).await
}

#[tokio::test]
async fn signatures_are_copied_with_the_logins_of_the_configuration_and_to_another_repository() -> Result<()> {
    let login = Options { login: true, ..Options::default() };
    let pair = Pair::start(login.clone(), login).await?;
    let image = Image::oci("logins")?;
    let source = pair.push_signed(&image, "global/app").await?;
    pair.mirror.client()?.push(&image, "far/away", &["1.0"]).await?;
    let there = pair.at_mirror("far/away", "1.0");
    assert_eq!(pair.states(&source, &there, &[]).await?, states([("copied", 2)]));
    assert_eq!(pair.found(&there).await?, [said("bundle", "verified"), said("cosign", "verified")]);
    pair.house.push(&image, "back/again", &["2.0"]).await?;
    let back = pair.house.reference("back/again", "2.0");
    assert_eq!(pair.states(&there, &back, &[]).await?, states([("copied", 2)]));
    pair.house.run(&["verify", &back]).await?.expect_code(0)?;
    Ok(())
}

#[tokio::test]
async fn skopeo_accepts_a_copied_signature_of_a_digest_where_the_policy_matches_the_name() -> Result<()> {
    let pair = Pair::start(Options::default(), Options::default()).await?;
    let image = Image::oci("skopeo")?;
    let source = pair.push_signed(&image, "team/app").await?;
    pair.mirror.client()?.push(&image, "team/app", &["1.0"]).await?;
    let there = pair.at_mirror("team/app", "1.0");
    pair.states(&source, &there, &[]).await?;
    // What mirrors' policies say: the name that was signed is the one before it was mirrored.
    let remap =
        serde_json::json!({"type": "remapIdentity", "prefix": pair.mirror.host(), "signedPrefix": pair.house.registry.host()});
    let key = pair.house.public_key_path();
    let ruling = Skopeo::with_identity(&key, &pair.mirror.host(), Some(&remap))?.copy(&there).await?;
    assert!(ruling.accepted, "{}", ruling.words);
    assert!(!Skopeo::requiring(&key, &pair.mirror.host())?.copy(&there).await?.accepted);
    Ok(())
}

/// It names the digest in the repository that was signed: that repository, or the digest in what stands for it, has to be asked for.
#[tokio::test]
async fn skopeo_and_podman_accept_a_copied_simple_signature_by_digest_and_by_the_repository_that_was_signed() -> Result<()> {
    let pair = Pair::start(Options::default(), Options::default()).await?;
    let (image, repository) = (Image::oci("simple")?, "global/app");
    let source = pair.push_signed(&image, repository).await?;
    pair.mirror.client()?.push(&image, repository, &["stable"]).await?;
    let tagged = pair.at_mirror(repository, "stable");
    assert_eq!(pair.states(&source, &tagged, &[]).await?, states([("copied", 2)]));
    let pinned = format!("{}/{repository}@{}", pair.mirror.host(), image.manifest.digest);
    let (host, key, there) = (pair.house.registry.host(), pair.house.public_key_path(), pair.mirror.host());
    let remap = serde_json::json!({"type": "remapIdentity", "prefix": there, "signedPrefix": host});
    let exact = serde_json::json!({"type": "exactRepository", "dockerRepository": format!("{host}/{repository}")});
    // By another tag than any that was signed, since none was.
    for (identity, reference, accepted) in [
        (Some(&remap), &pinned, true),
        (Some(&remap), &tagged, false),
        (Some(&exact), &pinned, true),
        (Some(&exact), &tagged, true),
        (None, &pinned, false),
    ] {
        let skopeo = Skopeo::with_identity(&key, &there, identity)?.copy(reference).await?;
        let podman = Podman::with_identity(&key, &there, identity)?.pull(reference).await?;
        for (judge, ruling) in [("skopeo", skopeo), ("podman", podman)] {
            assert_eq!(ruling.accepted, accepted, "{judge} of {reference}, {identity:?}: {}", ruling.words);
        }
    }
    // Without the copy there was nothing to accept.
    let other = KeyPair::generate().await?;
    assert!(!Skopeo::with_identity(&other.public(), &there, Some(&exact))?.copy(&tagged).await?.accepted);
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_copied_is_said_with_the_cure_and_an_exit_code() -> Result<()> {
    let mut pair = Pair::start(Options::default(), Options::default()).await?;
    let (image, other) = (Image::oci("one")?, Image::oci("another")?);
    let source = pair.push_signed(&image, "team/app").await?;
    let there = pair.at_mirror("team/app", "1.0");

    let absent = pair.copy(&source, &there, &[]).await?.expect_code(1)?.json()?;
    assert!(text(&absent["error"]).contains("skopeo copy --all --preserve-digests"), "{absent}");
    pair.mirror.client()?.push(&other, "team/app", &["1.0"]).await?;
    let differs = pair.copy(&source, &there, &[]).await?.expect_code(1)?.json()?;
    assert!(text(&differs["error"]).contains(&other.manifest.digest), "{differs}");
    let signatures = pair.house.reference("team/app", &tag_of(&image.manifest.digest));
    pair.copy(&signatures, &there, &[]).await?.expect_code(1)?;
    pair.copy(&pair.house.reference("team/app", "9"), &there, &[]).await?.expect_code(1)?;
    pair.copy(&source, &pair.house.reference("team/app", "2.0"), &[]).await?.expect_code(2)?;
    pair.copy(&source, "elsewhere.example.com/team/app:1.0", &[]).await?.expect_code(2)?;

    // Something else stands where the signatures go: it stays, and what goes elsewhere is copied.
    let client = pair.mirror.client()?;
    let index = Image::index("in the way")?;
    client.push(&image, "team/app", &["1.0"]).await?;
    client.push(&index, "team/app", &[&tag_of(&image.manifest.digest)]).await?;
    let in_the_way = pair.copy(&source, &there, &[]).await?.expect_code(1)?.json()?;
    let signatures = in_the_way["signatures"].as_array().context("no signatures")?;
    let mut became: Vec<_> = signatures.iter().map(|one| (text(&one["format"]), text(&one["state"]))).collect();
    became.sort();
    assert_eq!(became, [said("bundle", "copied"), said("cosign", "failed")], "{in_the_way}");
    let kept = client.manifest("team/app", &tag_of(&image.manifest.digest)).await?.context("it is gone")?;
    assert_eq!(kept.digest, index.manifest.digest);
    pair.mirror.kill()?;
    pair.copy(&source, &there, &[]).await?.expect_code(3)?;
    Ok(())
}
