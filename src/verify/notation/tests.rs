use super::*;
use crate::{
    certificate::{SubjectName, make},
    clock::Clock,
    kms::{KeySpec, generate},
    signature::{
        self, Artifact,
        notation::{Envelope, Prepared},
        referrer::Referrer,
    },
    subject::Subject,
    verify::{Trust, Verified, Wanted, fresh, signature},
    witness::{TrustedKeySettings, TrustedKeys, Witness, WitnessSettings},
};

const NOW: &str = "2026-11-21T09:00:00Z";
const REFERENCE: &str = "registry.example.com/team/app:1.0";

fn vector(folder: &str, file: &str) -> Vec<u8> {
    let path = format!("{}/tests/data/vectors/{folder}/{file}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn text(folder: &str, file: &str) -> String {
    String::from_utf8(vector(folder, file)).unwrap()
}

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn subject() -> Subject {
    Subject::in_test(REFERENCE, &vector("image", "manifest.json"))
}

fn keys(name: &str, until: Option<&str>, revoked: Option<&str>) -> TrustedKeys {
    let settings = WitnessSettings {
        name: "release".into(),
        description: String::new(),
        key: "awskms:///alias/never-asked?region=eu-west-1".parse().unwrap(),
        login: None,
        verify: vec![TrustedKeySettings {
            pem: text("keys", &format!("{name}.pub.pem")),
            until: until.map(at),
            revoked: revoked.map(|since| (at(since), "stolen".to_owned())),
        }],
        rate: None,
        pin: None,
    };
    TrustedKeys::offline(&settings).unwrap()
}

fn certificate(name: &str) -> Chain {
    Chain::from_pem(&text("keys", &format!("{name}.notation.crt.pem"))).unwrap()
}

fn judged(
    folder: &str,
    keys: &TrustedKeys,
    certificates: &[Chain],
    wanted: &Target,
    now: Timestamp,
) -> Result<Verified, &'static str> {
    let (envelope, file) =
        if folder.contains("jws") { (Envelope::Jws, "envelope.json") } else { (Envelope::Cose, "envelope.cbor") };
    judge(envelope, &vector(folder, file), keys, certificates, wanted, now).map_err(|rejection| rejection.name())
}

fn judge(
    envelope: Envelope,
    content: &[u8],
    keys: &TrustedKeys,
    certificates: &[Chain],
    wanted: &Target,
    now: Timestamp,
) -> Result<Verified, Rejection> {
    let claim = signature::notation::read(envelope, content).map_err(Rejection::Malformed)?;
    let wanted = asked(wanted);
    signature(envelope.into(), &claim, &wanted, &[Trust { witness: "release", keys, certificates }], now)
}

fn asked(manifest: &Target) -> Wanted {
    Wanted { manifest: manifest.clone(), reference: REFERENCE.parse().unwrap() }
}

const GOOD: [(&str, &str); 5] = [
    ("C-jws-rsa-ps256", "rsa2048"),
    ("C-jws-rsa-ps256-config-type", "rsa2048"),
    ("C-jws-p256-es256", "p256"),
    ("C-cose-rsa-ps256", "rsa2048"),
    ("C-cose-p256-es256", "p256"),
];

#[test]
fn the_vectors_that_notation_accepts_are_accepted_and_the_other_is_refused() {
    let wanted = Target::of(&subject());
    for (folder, key_name) in GOOD {
        let (keys, certificate) = (keys(key_name, None, None), certificate(key_name));
        let foreign = self::certificate(if key_name == "p256" { "rsa2048" } else { "p256" });
        // Those of another key say nothing of this one's.
        for certificates in
            [&[certificate.clone()][..], &[], std::slice::from_ref(&foreign), &[foreign.clone(), certificate.clone()]]
        {
            let approval =
                judged(folder, &keys, certificates, &wanted, at(NOW)).unwrap_or_else(|name| panic!("{folder}: {name}"));
            assert_eq!((approval.witness(), approval.reference()), ("release", None));
            assert_eq!(approval.until(), Some(certificate.not_after()));
        }
    }
    let rsa = keys("rsa2048", None, None);
    assert_eq!(judged("C-jws-rsa-rs256-INVALID", &rsa, &[], &wanted, at(NOW)), Err("malformed"));
}

#[test]
fn a_signature_counts_for_its_manifest_its_key_and_its_certificate_alone() {
    let wanted = Target::of(&subject());
    let other = Target { digest: crate::oci::Digest::of(b"other"), ..wanted.clone() };
    let (sized, typed) = (Target { size: 400, ..wanted.clone() }, Target { media_type: "text/plain".into(), ..wanted.clone() });
    for (folder, key) in GOOD {
        let foreign = if key == "p256" { "rsa2048" } else { "p256" };
        let (own, stranger) = (keys(key, None, None), keys(foreign, None, None));
        for (keys, certificates, wanted, now, expected) in [
            (&stranger, vec![], &wanted, NOW, "unknown_key"),
            (&own, vec![], &other, NOW, "other_digest"),
            (&own, vec![], &sized, NOW, "malformed"),
            (&own, vec![], &typed, NOW, "malformed"),
            (&own, vec![], &wanted, "2023-12-31T23:59:59Z", "certificate_invalid"),
            (&own, vec![], &wanted, "2049-01-01T00:00:01Z", "certificate_invalid"),
            (&self::keys(key, Some("2026-11-20T00:00:00Z"), None), vec![], &wanted, NOW, "expired"),
            (&self::keys(key, None, Some("2026-11-20T00:00:00Z")), vec![], &wanted, NOW, "revoked"),
        ] {
            assert_eq!(judged(folder, keys, &certificates, wanted, at(now)), Err(expected), "{folder}");
        }
    }
}

async fn witness(folder: &std::path::Path, spec: KeySpec) -> Witness {
    let file = folder.join(format!("{spec}.pem"));
    generate(spec, &file).unwrap();
    let settings = WitnessSettings {
        name: "release".into(),
        description: String::new(),
        key: format!("file://{}", file.display()).parse().unwrap(),
        login: None,
        verify: vec![],
        rate: None,
        pin: None,
    };
    Witness::open(&settings, Clock::manual(at(NOW)).0).await.unwrap()
}

#[tokio::test]
async fn what_a_witness_signs_counts_until_it_expires() {
    let folder = tempfile::tempdir().unwrap();
    let wanted = Target::of(&subject());
    for spec in [KeySpec::Rsa2048, KeySpec::EcP256] {
        let witness = witness(folder.path(), spec).await;
        let chain = make(&witness, &SubjectName::unnamed(), at(NOW)).await.unwrap();
        let witness = witness.certified(vec![chain.clone()]);
        for envelope in Envelope::ALL {
            let day = std::time::Duration::from_secs(86_400);
            let prepared = Prepared::new(envelope, &subject(), &chain, at(NOW), Some(day));
            let signed = witness.sign(prepared.algorithm(), prepared.sha256()).await.unwrap();
            let artifact = prepared.assemble(signed.raw()).unwrap();
            let fresh = |signed| {
                let artifact = Artifact::Notation(envelope, artifact.clone());
                fresh(artifact, &asked(&wanted), &witness, prepared.algorithm(), signed, at(NOW)).map(drop)
            };
            fresh(&signed).unwrap();
            let judge = |artifact: &Referrer, now| {
                let certificates = std::slice::from_ref(&chain);
                super::tests::judge(envelope, artifact.blob(), witness.trusted_keys(), certificates, &wanted, at(now))
            };
            assert_eq!(judge(&artifact, NOW).unwrap().until(), Some(at("2026-11-22T09:00:00Z")));
            assert!(judge(&artifact, "2026-11-22T08:59:59Z").is_ok());
            assert_eq!(judge(&artifact, "2026-11-22T09:00:00Z").unwrap_err().name(), "signature_expired");

            // Another signature by the same key, and this one under another certificate for the same key.
            let again = witness.sign(prepared.algorithm(), &[7; 32]).await.unwrap();
            let forged = prepared.assemble(again.raw()).unwrap();
            assert_eq!(judge(&forged, NOW).unwrap_err(), Rejection::UnknownKey);
            assert_eq!(fresh(&again).unwrap_err(), Rejection::UnknownKey);
            let renewed = make(&witness, &SubjectName::unnamed(), at(NOW)).await.unwrap();
            let swapped = Prepared::new(envelope, &subject(), &renewed, at(NOW), Some(day)).assemble(signed.raw()).unwrap();
            assert_eq!(judge(&swapped, NOW).unwrap_err().name(), "other_certificate");
        }
    }
}
