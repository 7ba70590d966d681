use super::*;
use crate::{
    admission::evidence,
    signature::Format,
    verify::{Examined, Judgement},
};

const DIGEST: &str = "sha256:e9b028cb7b49c4dae3dc661c2e147f3d78b9b4d1165c406256db92f18d4a0454";

fn image(tag: &str) -> Reference {
    format!("r.example.com/team/app{tag}@{DIGEST}").parse().unwrap()
}

fn stands(witness: &str, reference: &str) -> Signature {
    Signature::Stands { witness: witness.into(), format: Format::Cosign, reference: reference.parse().ok() }
}

fn policy() -> Policy {
    Policy::new("p", "release", "default")
}

fn judged(policy: &Policy, tag: &str, signatures: &[Signature]) -> &'static str {
    objection(policy, &image(tag), &Evidence::in_test(signatures.to_vec())).map_or("met", |why| why.name())
}

#[test]
fn the_nearest_miss_is_the_reason() {
    let revoked = || Rejection::Revoked { witness: "release".into(), at: jiff::Timestamp::UNIX_EPOCH, reason: "stolen".into() };
    let of_other = || Rejection::Revoked { witness: "dev".into(), at: jiff::Timestamp::UNIX_EPOCH, reason: String::new() };
    let elsewhere =
        || Signature::Elsewhere { witness: "release".into(), format: Format::Cosign, reference: "r.example.com/other:1".into() };
    let unknown = || Signature::Falls(Rejection::UnknownKey);
    for (signatures, expected) in [
        (vec![], "unsigned"),
        (vec![unknown()], "other_key"),
        (vec![Signature::Falls(of_other())], "other_key"),
        (vec![unknown(), Signature::Falls(Rejection::NoPayload)], "no_payload"),
        (vec![unknown(), stands("dev", "r.example.com/team/app")], "other_witness"),
        (vec![stands("dev", "r.example.com/team/app"), elsewhere()], "other_reference"),
        (vec![elsewhere(), Signature::Falls(revoked())], "revoked"),
        (vec![unknown(), Signature::Falls(revoked()), stands("release", "r.example.com/team/app:1")], "met"),
    ] {
        assert_eq!(judged(&policy(), "", &signatures), expected, "{signatures:?}");
    }
}

#[test]
fn every_witness_must_have_signed() {
    let both = Policy { witnesses: vec!["release".into(), "security".into()], ..policy() };
    let release = stands("release", "r.example.com/team/app:1");
    let security = stands("security", "r.example.com/team/app:1");
    assert_eq!(judged(&both, "", std::slice::from_ref(&release)), "other_witness");
    assert_eq!(judged(&both, "", &[release, security]), "met");
}

#[test]
fn a_key_that_is_two_witnesses_counts_for_both() {
    let both = Policy { witnesses: vec!["release".into(), "security".into()], signed_as: SignedAs::Digest, ..policy() };
    let elsewhere = "m.example.com/app:1".to_owned();
    let examined = Examined {
        format: Format::Cosign,
        layout: None,
        also: vec!["security".into()],
        time: None,
        verdict: Judgement::Rejected {
            witness: Some("release".into()),
            reference: Some(elsewhere.clone()),
            reason: Rejection::OtherReference(elsewhere),
            message: String::new(),
        },
    };
    assert_eq!(judged(&both, "", &evidence::read(Examined { also: vec![], ..examined.clone() })), "other_witness");
    assert_eq!(judged(&both, "", &evidence::read(examined)), "met");
}

#[test]
fn the_name_that_was_signed_counts_as_the_policy_says() {
    let simple = format!("r.example.com/team/app@{DIGEST}");
    let elsewhere =
        Signature::Elsewhere { witness: "release".into(), format: Format::Cosign, reference: "m.example.com/app:1".into() };
    for (signature, tag, name, by_tag, digest) in [
        (stands("release", "r.example.com/team/app:1"), ":1", true, true, true),
        (stands("release", "r.example.com/team/app:1"), "", true, false, true),
        (stands("release", "r.example.com/team/app:1"), ":2", false, false, true),
        (stands("release", "r.example.com/team/app"), ":2", true, false, true),
        (stands("release", &simple), ":2", true, false, true),
        (Signature::Stands { witness: "release".into(), format: Format::Cosign, reference: None }, ":2", true, false, true),
        (elsewhere, ":1", false, false, true),
    ] {
        for (signed_as, expected) in [(SignedAs::Name, name), (SignedAs::Tag, by_tag), (SignedAs::Digest, digest)] {
            let policy = Policy { signed_as, ..policy() };
            let met = judged(&policy, tag, std::slice::from_ref(&signature)) == "met";
            assert_eq!(met, expected, "{signed_as:?} {tag} {signature:?}");
        }
    }
}

#[test]
fn only_signatures_in_the_formats_of_the_policy_count() {
    let bundle = Signature::Stands { witness: "release".into(), format: Format::Bundle, reference: None };
    let cosign = Policy { formats: vec![Format::Cosign], ..policy() };
    assert_eq!(judged(&cosign, "", std::slice::from_ref(&bundle)), "other_format");
    assert_eq!(judged(&policy(), "", &[bundle]), "met");
}

#[test]
fn absurd_references_are_refused_without_being_read() {
    for (text, expected) in [
        ("a".repeat(3 << 20), "more than any has"),
        ("https://r.example.com/app".to_owned(), "not a valid"),
        ("r.example.com/app@sha256:12".to_owned(), "not a valid"),
        ("\u{0}".to_owned(), "not a valid"),
    ] {
        let why = parse(&text).unwrap_err().to_string();
        assert!(why.contains(expected) && why.len() < 600, "{why}");
    }
}
