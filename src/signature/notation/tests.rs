use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use super::*;
use crate::{
    kms::{PublicKey, VerifyError},
    oci::media_type,
    registry::ReferrersIndex,
    signature::cosign::tests::vector,
};

const REFERENCE: &str = "registry.example.com/team/app:1.0";
const VECTORS: [(&str, Envelope, &str); 4] = [
    ("C-jws-rsa-ps256", Envelope::Jws, "rsa2048"),
    ("C-jws-p256-es256", Envelope::Jws, "p256"),
    ("C-cose-rsa-ps256", Envelope::Cose, "rsa2048"),
    ("C-cose-p256-es256", Envelope::Cose, "p256"),
];

fn time() -> Timestamp {
    "2025-01-02T03:04:05.678Z".parse().unwrap()
}

fn chain(key: &str) -> Chain {
    Chain::from_pem(std::str::from_utf8(&vector("keys", &format!("{key}.notation.crt.pem"))).unwrap()).unwrap()
}

fn key(key: &str) -> PublicKey {
    PublicKey::from_pem(std::str::from_utf8(&vector("keys", &format!("{key}.pub.pem"))).unwrap()).unwrap()
}

fn prepared(envelope: Envelope, key: &str, lifetime: Option<u64>) -> Prepared {
    let subject = Subject::in_test(REFERENCE, &vector("image", "manifest.json"));
    Prepared::new(envelope, &subject, &chain(key), time(), lifetime.map(Duration::from_secs))
}

fn stored(folder: &str, envelope: Envelope) -> Vec<u8> {
    vector(folder, if envelope == Envelope::Jws { "envelope.json" } else { "envelope.cbor" })
}

/// The vector's signature as a KMS would have answered it.
fn answered(folder: &str, envelope: Envelope) -> RawSignature {
    let claim = Claim::read(envelope, &stored(folder, envelope)).unwrap();
    RawSignature(claim.signature)
}

fn signed_by(claim: &Claim, name: &str) -> Result<(), VerifyError> {
    key(name).verify(claim.attributes.algorithm, &claim.sha256, &claim.signature)
}

fn wrong(envelope: Envelope, content: &[u8]) -> String {
    Claim::read(envelope, content).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn what_is_signed_is_the_vectors_byte_for_byte() {
    for (folder, envelope, key) in VECTORS {
        let prepared = prepared(envelope, key, None);
        assert_eq!(prepared.payload, vector(folder, "payload.json"), "{folder}");
        let signed = match envelope {
            Envelope::Jws => {
                assert_eq!(prepared.protected, vector(folder, "protected.json"), "{folder}");
                vector(folder, "signing-input.txt")
            }
            Envelope::Cose => vector(folder, "sig_structure.cbor"),
        };
        assert_eq!(prepared.sha256[..], Sha256::digest(signed)[..], "{folder}");
    }
}

#[test]
fn envelopes_and_manifests_are_the_vectors_but_for_who_wrote_them() {
    for (folder, envelope, key) in VECTORS {
        let artifact = prepared(envelope, key, None).assemble(&answered(folder, envelope)).unwrap();
        is_the_vectors(&artifact, folder, envelope, key);
    }
    let (folder, envelope, key) = ("C-jws-rsa-ps256-config-type", Envelope::Jws, "rsa2048");
    let artifact = prepared(envelope, key, None).assemble(&answered(folder, envelope)).unwrap();
    let older = artifact.older().expect("notation reads two layouts");
    is_the_vectors(older, folder, envelope, key);
    assert_eq!((older.blob(), older.older()), (artifact.blob(), None));
}

fn is_the_vectors(artifact: &Referrer, folder: &str, envelope: Envelope, key: &str) {
    assert_eq!(Claim::read(envelope, artifact.blob()), Claim::read(envelope, &stored(folder, envelope)), "{folder}");
    let mut ours: Value = serde_json::from_slice(artifact.manifest()).unwrap();
    let mut theirs: Value = serde_json::from_slice(&vector(folder, "manifest.json")).unwrap();
    for (manifest, content) in [(&mut ours, artifact.blob().to_vec()), (&mut theirs, stored(folder, envelope))] {
        assert_eq!(manifest["layers"][0]["digest"], Digest::of(&content).as_str(), "{folder}");
        assert_eq!(manifest["layers"][0]["size"], content.len(), "{folder}");
        manifest["layers"][0] = manifest["layers"][0]["mediaType"].take();
    }
    // Ours has the hint that bundles have, too.
    theirs["annotations"][HINT_ANNOTATION] = hint(&self::key(key)).into();
    assert_eq!(ours, theirs, "{folder}");
    // And so is the index that lists it.
    let mut index = ReferrersIndex::empty();
    index.add(artifact.descriptor()).unwrap();
    let mut ours: Value = serde_json::from_slice(&index.to_bytes().unwrap()).unwrap();
    let mut theirs: Value = serde_json::from_slice(&vector(folder, "referrers-index.json")).unwrap();
    assert_eq!(ours["manifests"][0]["digest"], Digest::of(artifact.manifest()).as_str(), "{folder}");
    assert_eq!(ours["manifests"][0]["size"], artifact.manifest().len(), "{folder}");
    for index in [&mut ours, &mut theirs] {
        for member in ["digest", "size"] {
            index["manifests"][0][member].take();
        }
    }
    theirs["manifests"][0]["annotations"][HINT_ANNOTATION] = hint(&self::key(key)).into();
    assert_eq!(ours, theirs, "{folder}");
}

#[test]
fn the_vectors_are_read_and_their_keys_made_them() {
    for (folder, envelope, name) in VECTORS {
        let claim = Claim::read(envelope, &stored(folder, envelope)).unwrap();
        assert_eq!(signed_by(&claim, name), Ok(()), "{folder}");
        assert_eq!(claim.chain(), &chain(name));
        assert_eq!(claim.signing_time(), "2025-01-02T03:04:05Z".parse().unwrap());
        assert_eq!(claim.expiry(), None);
    }
    let invalid = wrong(Envelope::Jws, &stored("C-jws-rsa-rs256-INVALID", Envelope::Jws));
    assert!(invalid.contains("RS256"), "{invalid}");
}

#[test]
fn a_changed_byte_is_another_signature_or_none() {
    for (folder, envelope, name) in VECTORS {
        let good = stored(folder, envelope);
        let claim = Claim::read(envelope, &good).unwrap();
        for at in 0..good.len() {
            let mut changed = good.clone();
            changed[at] ^= 1;
            let Ok(changed) = Claim::read(envelope, &changed) else { continue };
            let stands = signed_by(&changed, name).is_ok();
            // What is not signed, the agent and another spelling of the same, may change.
            let same = (&changed.target, &changed.attributes) == (&claim.target, &claim.attributes);
            assert!(!stands || same, "{folder}: byte {at}");
        }
    }
}

/// What is written with every attribute is read; over many times and lifetimes, with short numbers in the signature.
#[test]
fn what_is_written_is_read() {
    let mut random = fastrand::Rng::with_seed(20_261_122);
    for round in 0..400 {
        let (_, envelope, name) = VECTORS[round % VECTORS.len()];
        let now = Timestamp::new(random.i64(0..250_000_000_000), random.i32(0..999_999_999)).unwrap();
        let longest = 1 << random.u32(1..50);
        let lifetime = random.bool().then(|| Duration::from_millis(random.u64(0..longest)));
        let size = random.usize(0..300);
        let content: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(size).collect();
        let subject = Subject::in_test(REFERENCE, &content);
        let prepared = Prepared::new(envelope, &subject, &chain(name), now, lifetime);
        let signature = match prepared.algorithm() {
            Algorithm::EcdsaSha256 => {
                let mut raw = [0; 64];
                random.fill(&mut raw);
                raw[..random.usize(0..32)].fill(0);
                raw[32..32 + random.usize(0..32)].fill(0);
                numbers::to_der(&raw).unwrap()
            }
            _ => std::iter::repeat_with(|| random.u8(..)).take(256).collect(),
        };
        let artifact = prepared.assemble(&RawSignature(signature.clone())).unwrap();
        let claim = Claim::read(envelope, artifact.blob()).unwrap();
        assert_eq!(claim.target(), &Target::of(&subject));
        assert_eq!(claim.attributes, prepared.attributes);
        assert_eq!((&claim.sha256, &claim.signature), (prepared.sha256(), &signature));
        assert_eq!(claim.chain(), &chain(name));
        assert_eq!(claim.expiry().is_some(), lifetime.is_some());
        let manifest = SignatureManifest::read(media_type::OCI_MANIFEST, artifact.manifest()).unwrap();
        assert_eq!((&manifest.subject, manifest.envelope), (subject.digest(), envelope));
        assert_eq!(manifest.content, Digest::of(artifact.blob()));
        assert_eq!(manifest.size, artifact.blob().len() as u64);
        assert_eq!(manifest.thumbprints, [chain(name).thumbprint()]);
    }
}

/// The vector's JWS with its headers edited; what is signed is not looked at by the reader.
fn jws(edit: impl FnOnce(&mut Value, &mut Value)) -> Vec<u8> {
    let mut outer: Value = serde_json::from_slice(&stored("C-jws-p256-es256", Envelope::Jws)).unwrap();
    let encoded = outer["protected"].clone();
    let mut protected: Value =
        serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(encoded.as_str().unwrap()).unwrap()).unwrap();
    edit(&mut outer, &mut protected);
    if outer["protected"] == encoded {
        outer["protected"] = BASE64_URL_SAFE_NO_PAD.encode(protected.to_string()).into();
    }
    outer.to_string().into_bytes()
}

#[test]
fn jws_that_notation_refuses_are_refused() {
    let protected = |member: &str, value: Value| jws(|_, protected| protected[member] = value.clone());
    let without = |member: &str| {
        jws(|_, protected| {
            protected.as_object_mut().unwrap().remove(member).unwrap();
        })
    };
    let outer = |member: &str, value: Value| jws(|outer, _| outer[member] = value.clone());
    Claim::read(Envelope::Jws, &jws(|_, _| ())).unwrap();
    Claim::read(Envelope::Jws, &protected("note", json!("not critical"))).unwrap();
    for (what, content) in [
        ("algorithm", protected("alg", json!("none"))),
        ("algorithm", protected("alg", json!("RS256"))),
        ("algorithm", protected("alg", json!("PS256"))),
        ("content type", protected("cty", json!("text/plain"))),
        ("critical about \"b64\"", protected("crit", json!([SIGNING_SCHEME, "b64"]))),
        ("critical about \"io.cncf.notary.verificationPlugin\"", protected("crit", json!(["io.cncf.notary.verificationPlugin"]))),
        ("critical about \"io.cncf.notary.expiry\"", protected("crit", json!([SIGNING_SCHEME, EXPIRY]))),
        ("does not mark", protected("crit", json!([]))),
        ("twice", protected("crit", json!([SIGNING_SCHEME, SIGNING_SCHEME]))),
        ("does not mark", protected(EXPIRY, json!("2027-01-01T00:00:00Z"))),
        ("signing scheme", protected(SIGNING_SCHEME, json!("notary.x509.signingAuthority"))),
        ("another signing scheme", protected("io.cncf.notary.authenticSigningTime", json!("2025-01-02T03:04:05Z"))),
        ("missing field", without(SIGNING_TIME)),
        ("missing field", without("crit")),
        ("missing field", without("cty")),
        ("cannot be read", protected(SIGNING_TIME, json!(1_735_787_045))),
        ("unknown field", outer("signatures", json!([]))),
        ("protected header", outer("protected", json!("%"))),
        ("its signature", outer("signature", json!("AA=="))),
        ("no ECDSA signature", outer("signature", json!("AAAA"))),
        ("certificates", outer("header", json!({ "x5c": ["AA", ""] }))),
        ("certificates", outer("header", json!({ "x5c": [] }))),
        ("cannot be read", outer("header", json!({}))),
        ("its payload", outer("payload", json!(BASE64_URL_SAFE_NO_PAD.encode("{}")))),
        ("its payload", outer("payload", json!(BASE64_URL_SAFE_NO_PAD.encode(r#"{"targetArtifact":{},"more":1}"#)))),
        ("more than any", vec![b' '; usize::try_from(MAX_ENVELOPE).unwrap() + 1]),
    ] {
        let words = wrong(Envelope::Jws, &content);
        assert!(words.contains(what), "{what}: {words}");
    }
    let expiring = |expiry: &str| {
        jws(|_, protected| {
            protected["crit"] = json!([SIGNING_SCHEME, EXPIRY]);
            protected[EXPIRY] = json!(expiry);
        })
    };
    assert!(Claim::read(Envelope::Jws, &expiring("2025-01-02T03:04:06Z")).unwrap().expiry().is_some());
    assert!(wrong(Envelope::Jws, &expiring("2025-01-02T03:04:05Z")).contains("ends before it begins"));
    assert!(wrong(Envelope::Jws, &stored("C-cose-p256-es256", Envelope::Cose)).contains("JWS"));
}

/// The vector's COSE with its parts edited.
fn cose(edit: impl FnOnce(&mut coset::CoseSign1)) -> Vec<u8> {
    use coset::TaggedCborSerializable as _;
    let mut sign1 = coset::CoseSign1::from_tagged_slice(&stored("C-cose-p256-es256", Envelope::Cose)).unwrap();
    sign1.protected.original_data = None;
    edit(&mut sign1);
    sign1.to_tagged_vec().unwrap()
}

#[test]
fn cose_that_notation_refuses_is_refused() {
    use coset::{ContentType, Label, RegisteredLabelWithPrivate as Name, cbor::Value as Cbor, iana};
    let text = |name: &str| Label::Text(name.to_owned());
    let set = |name: &str, value: Cbor| {
        cose(|sign1| {
            let rest = &mut sign1.protected.header.rest;
            rest.retain(|(label, _)| *label != text(name));
            rest.push((text(name), value));
        })
    };
    let epoch = |seconds: i64| Cbor::Tag(1, Box::new(Cbor::Integer(seconds.into())));
    let chain = |value: Cbor| cose(|sign1| sign1.unprotected.rest[0].1 = value);
    Claim::read(Envelope::Cose, &cose(|_| ())).unwrap();
    for (what, content) in [
        ("algorithm", cose(|sign1| sign1.protected.header.alg = None)),
        ("algorithm", cose(|sign1| sign1.protected.header.alg = Some(Name::Assigned(iana::Algorithm::PS256)))),
        ("content type", cose(|sign1| sign1.protected.header.content_type = Some(ContentType::Text("text/plain".into())))),
        ("content type", cose(|sign1| sign1.protected.header.content_type = None)),
        (
            "critical about",
            cose(|sign1| sign1.protected.header.crit.push(Name::Text("io.cncf.notary.verificationPlugin".into()))),
        ),
        ("critical about", cose(|sign1| sign1.protected.header.crit.push(Name::Assigned(iana::HeaderParameter::Alg)))),
        ("critical about", cose(|sign1| sign1.protected.header.crit.push(Name::PrivateUse(-70_000)))),
        ("does not mark", cose(|sign1| sign1.protected.header.crit.clear())),
        ("does not mark", set(EXPIRY, epoch(1_900_000_000))),
        ("signing scheme", set(SIGNING_SCHEME, Cbor::Text("notary.x509.signingAuthority".into()))),
        ("seconds since 1970", set(SIGNING_TIME, Cbor::Text("2025-01-02T03:04:05Z".into()))),
        ("seconds since 1970", set(SIGNING_TIME, Cbor::Tag(0, Box::new(Cbor::Text("2025-01-02T03:04:05Z".into()))))),
        ("seconds since 1970", set(SIGNING_TIME, Cbor::Tag(1, Box::new(Cbor::Float(1.5))))),
        ("seconds since 1970", set(SIGNING_TIME, epoch(i64::MAX))),
        ("no payload", cose(|sign1| sign1.payload = None)),
        ("no ECDSA signature", cose(|sign1| sign1.signature.truncate(63))),
        ("no list of certificates", cose(|sign1| sign1.unprotected.rest.clear())),
        ("no list of certificates", chain(Cbor::Bytes(vec![1]))),
        ("something else", chain(Cbor::Array(vec![Cbor::Null]))),
        ("certificates", chain(Cbor::Array(vec![Cbor::Bytes(vec![0x30, 0])]))),
        ("its COSE", stored("C-jws-p256-es256", Envelope::Jws)),
        ("its COSE", [cose(|_| ()), vec![0]].concat()),
        ("its COSE", cose(|_| ())[1..].to_vec()),
        ("its COSE", vec![0x81; 100_000]),
    ] {
        let words = wrong(Envelope::Cose, &content);
        assert!(words.contains(what), "{what}: {words}");
    }
}

#[test]
fn manifests_that_are_no_notation_signature_are_refused() {
    let good: Value = serde_json::from_slice(&vector("C-jws-rsa-ps256", "manifest.json")).unwrap();
    let read = |manifest: &Value| SignatureManifest::read(media_type::OCI_MANIFEST, manifest.to_string().as_bytes());
    let edited = |pointer: &str, value: Value| {
        let mut manifest = good.clone();
        *manifest.pointer_mut(pointer).unwrap() = value;
        read(&manifest)
    };
    assert_eq!(read(&good).unwrap().thumbprints, [chain("rsa2048").thumbprint()]);
    for (pointer, value) in [
        ("/artifactType", json!("application/vnd.example")),
        ("/artifactType", json!(null)),
        ("/config/mediaType", json!(ARTIFACT_TYPE)),
        ("/config/mediaType", json!(media_type::OCI_CONFIG)),
        ("/layers", json!([])),
        ("/layers", json!([good["layers"][0], good["layers"][0]])),
        ("/layers/0/mediaType", json!("application/octet-stream")),
        ("/layers/0/size", json!(MAX_ENVELOPE + 1)),
        ("/layers/0/digest", json!("md5:00")),
        ("/subject", json!(null)),
    ] {
        assert!(edited(pointer, value.clone()).is_err(), "{pointer}: {value}");
    }
    // Annotations are hints: a bad one is none.
    let thumbprints = json!({ THUMBPRINTS: "[" });
    assert_eq!(edited("/annotations", thumbprints).unwrap().thumbprints, Vec::<String>::new());
    assert!(SignatureManifest::read(media_type::OCI_INDEX, good.to_string().as_bytes()).is_err());
}
