use std::{fs, path::PathBuf};

use serde_json::{Value, json};

use super::*;
use crate::{
    intake::{entry::LONGEST_TEXT, json::MOST_MEMBERS},
    oci::Digest,
};

const DIGEST: &str = "sha256:db7da600462e7b3a21648206747f051da90b506b23d75769901304bb36317a08";

#[test]
fn recorded_upstream_and_hostile_bodies_are_read_as_their_index_says() {
    let index: Value = serde_json::from_slice(&fixture("INDEX.json")).unwrap();
    for entry in index["fixtures"].as_array().unwrap() {
        let file = entry["file"].as_str().unwrap();
        // In an envelope of another kind: the neighbour's tests.
        if file.starts_with("cloudevents-") || file.starts_with("amqp-") {
            continue;
        }
        let Some(expected) = entry["expect"].as_array() else { continue };
        let body = fixture(file);
        let entries = parse(&body).unwrap_or_else(|refusal| panic!("{file}: {refusal:?}"));
        match &expected[..] {
            [only] if only["class"] == "ignore" && entries.is_empty() => assert_eq!(only["why"], "no events", "{file}"),
            [only] if only["class"] == "reject" => {
                assert!(!entries.is_empty(), "{file}");
                for entry in &entries {
                    assert!(matches!(entry, Entry::Refused { .. }), "{file}: {entry:?}");
                }
            }
            each => {
                assert_eq!(entries.len(), each.len(), "{file}");
                for (entry, expected) in entries.iter().zip(each) {
                    assert_reads_as(file, entry, expected);
                }
            }
        }
    }
}

pub(in crate::intake) fn assert_reads_as(file: &str, entry: &Entry<'_>, expected: &Value) {
    match (entry, expected["class"].as_str().unwrap()) {
        (Entry::Push(push), "push") => {
            let text = |name: &str| expected[name].as_str();
            assert_eq!(Some(push.id.as_str()), text("event_id"), "{file}");
            assert_eq!(Some(push.repository.as_str()), text("repository"), "{file}");
            assert_eq!(push.tag.as_ref().map(Tag::as_str), text("tag"), "{file}");
            assert_eq!(Some(push.digest.as_str()), text("digest"), "{file}");
            assert_eq!(push.pushed_at, text("pushed_at").map(|time| time.parse().unwrap()), "{file}");
            assert_eq!(push.actor.as_deref(), text("actor"), "{file}");
        }
        (Entry::Ignored(reason), "ignore") => {
            let expected = match expected["why"].as_str().unwrap() {
                "action delete" => Ignored::Delete,
                "action mount" => Ignored::Mount,
                "action pull" => Ignored::Pull,
                "blob push (application/octet-stream)" | "layer push" => Ignored::Blob,
                "signature or referrers tag" => Ignored::Attachment,
                other => panic!("{file}: {other}"),
            };
            assert_eq!(*reason, expected, "{file}");
        }
        (entry, class) => panic!("{file}: expected {class}, read {entry:?}"),
    }
}

#[test]
fn whole_recordings_hold_nothing_that_is_refused() {
    for file in ["2.8-sequence-main", "2.8-sequence-auth", "3.1-sequence-main", "3.1-sequence-auth"] {
        let requests: Value = serde_json::from_slice(&fixture(&format!("recorded-distribution-{file}.json"))).unwrap();
        let requests = requests.as_array().unwrap();
        assert!(!requests.is_empty());
        let mut pushes = 0;
        for request in requests {
            for entry in parse(request["body"].as_str().unwrap().as_bytes()).unwrap() {
                match entry {
                    Entry::Push(_) => pushes += 1,
                    Entry::Ignored(reason) => assert_ne!(reason, Ignored::UnknownAction),
                    Entry::Refused { refusal, json } => panic!("{refusal:?}: {json}"),
                }
            }
        }
        assert!(pushes > 0, "{file}");
    }
}

pub(in crate::intake) fn fixture(file: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("integration-tests/data/events").join(file);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn what_is_no_envelope_is_refused_as_a_whole() {
    let deep = "[".repeat(100_000);
    let deep_member = format!(r#"{{"x":{}}}"#, "[".repeat(100_000));
    for body in [
        "",
        " ",
        "null",
        "true",
        "5",
        "[]",
        r#""events""#,
        "{",
        r#"{"events":[}"#,
        r#"{"events":5}"#,
        r#"{"events":{}}"#,
        r#"{"events":"x"}"#,
        "{} x",
        r#"{"events":[],"events":[]}"#,
        r#"{"no":0}"#,
        r#"{"x":1,"x":1}"#,
        r#"{"x":{"y":1,"y":1}}"#,
        &deep,
        &deep_member,
        "username=a&password=b",
        "<html>",
    ] {
        assert!(matches!(parse(body.as_bytes()), Err(Refusal::Malformed(_))), "{body:.80}");
    }
    assert!(matches!(parse(b"{\"events\":[\"\xff\"]}"), Err(Refusal::Malformed(_))));
}

#[test]
fn nothing_is_brought_by_an_envelope_without_events() {
    for body in ["{}", r#"{"events":null}"#, r#"{"events":[]}"#, r#" {"version":3,"events":[],"x":{"y":[1e3,-1,true]}} "#] {
        assert!(parse(body.as_bytes()).unwrap().is_empty(), "{body}");
    }
}

#[test]
fn more_events_than_any_relay_sends_are_refused_as_a_whole() {
    let body = |count: usize| format!(r#"{{"events":[{}]}}"#, vec!["{}"; count].join(","));
    assert_eq!(parse(body(MOST_EVENTS).as_bytes()).unwrap().len(), MOST_EVENTS);
    assert!(matches!(parse(body(MOST_EVENTS + 1).as_bytes()), Err(Refusal::TooMany(_))));
}

#[test]
fn a_bad_event_is_refused_with_its_own_text_and_its_neighbours_are_taken() {
    let good = event().to_string();
    for bad in [
        "null",
        "5",
        "[]",
        "{}",
        r#"{"action":5}"#,
        r#"{"action":"push"}"#,
        r#"{"action":"push","target":5}"#,
        r#"{"action":"push","target":{"mediaType":"application/vnd.oci.image.manifest.v1+json"}}"#,
        r#"{"id":"\ud800","action":"push"}"#,
    ] {
        let body = format!(r#"{{"events":[{good}, {bad} ,{good}]}}"#);
        let entries = parse(body.as_bytes()).unwrap();
        assert!(matches!(entries[..], [Entry::Push(_), Entry::Refused { .. }, Entry::Push(_)]), "{bad}: {entries:?}");
        let Entry::Refused { json, .. } = &entries[1] else { unreachable!() };
        assert_eq!(*json, bad);
    }
    let deep = format!(r#"{{"action":"push","x":{}{}}}"#, "[".repeat(10_000), "]".repeat(10_000));
    let crowded = (0..=MOST_MEMBERS).map(|n| format!(r#""{n}":0"#)).collect::<Vec<_>>().join(",");
    for bad in [deep, format!(r#"{{{crowded},"action":"push"}}"#)] {
        let body = format!(r#"{{"events":[{bad},{good}]}}"#);
        assert!(matches!(parse(body.as_bytes()).unwrap()[..], [Entry::Refused { .. }, Entry::Push(_)]));
    }
}

#[test]
fn a_member_named_twice_is_refused_wherever_it_stands() {
    let good = event().to_string();
    for (once, twice) in [
        (r#""action":"push""#, r#""action":"pull","action":"push""#),
        (r#""action":"push""#, r#""action":"push","\u0061ction":"push""#),
        (r#""tag":"1.0""#, r#""tag":"1.0","tag":"2.0""#),
        (r#""tag":"1.0""#, r#""tag":"1.0","x":[{"y":1,"y":1}]"#),
        (r#""name":"ci""#, r#""name":"ci","name":"admin""#),
    ] {
        let bad = good.replace(once, twice);
        assert_ne!(good, bad);
        assert!(matches!(read(&bad), Entry::Refused { refusal: Refusal::Malformed(_), .. }), "{bad}");
    }
}

#[test]
fn numbers_strangers_and_nothings_are_taken_leniently() {
    for (path, value) in [
        ("/target/size", json!(4.18e2)),
        ("/target/size", json!("418")),
        ("/target/length", json!(null)),
        ("/target/references", json!("none")),
        ("/target/references", json!([5])),
        ("/target/x", json!({ "y": [1, 2] })),
        ("/actor", json!(null)),
        ("/actor", json!("ci")),
        ("/actor", json!({ "name": 7, "groups": ["a"] })),
        ("/request", json!([])),
        ("/request", json!({ "useragent": 5 })),
        ("/timestamp", json!("yesterday")),
        ("/timestamp", json!(0)),
        ("/timestamp", json!(null)),
        ("/id", json!("")),
        ("/id", json!(null)),
        ("/id", json!(17)),
    ] {
        let mut event = event();
        set(&mut event, path, value);
        let push = push(&event);
        assert_eq!(push.digest.as_str(), DIGEST);
        if path == "/id" {
            assert_eq!(push.id, Digest::of(event.to_string().as_bytes()).to_string());
        }
        if path == "/timestamp" {
            assert_eq!(push.pushed_at, None);
        }
    }
    for nothing in [json!(""), json!(null), json!(0)] {
        let mut event = event();
        set(&mut event, "/target/tag", nothing);
        assert_eq!(push(&event).tag, None);
    }
}

#[test]
fn a_tag_that_is_no_text_is_not_taken_for_none() {
    for tag in [json!(1), json!(1.5), json!(true), json!(["1.0"]), json!({})] {
        let mut event = event();
        set(&mut event, "/target/tag", tag);
        assert!(matches!(read(&event.to_string()), Entry::Refused { .. }));
    }
}

#[test]
fn text_for_the_log_is_bounded() {
    let mut event = event();
    set(&mut event, "/actor", json!({ "name": "ü".repeat(100_000) }));
    set(&mut event, "/id", json!("line\nbreak"));
    let long = push(&event);
    assert_eq!(long.actor, Some("ü".repeat(LONGEST_TEXT / 2)));
    assert!(long.id.starts_with("sha256:"));
    set(&mut event, "/id", json!("x".repeat(LONGEST_TEXT + 1)));
    assert!(push(&event).id.starts_with("sha256:"));
    set(&mut event, "/actor", json!({ "name": format!("{}ü", "x".repeat(LONGEST_TEXT - 1)) }));
    assert_eq!(push(&event).actor, Some("x".repeat(LONGEST_TEXT - 1)));
}

#[test]
fn what_is_not_an_image_is_ignored_for_its_reason() {
    use crate::oci::media_type::OCI_CONFIG as CONFIG;
    const EMPTY: &str = "application/vnd.oci.empty.v1+json";
    let types = |types: &[&str]| {
        Value::from(
            types.iter().map(|media_type| json!({ "mediaType": media_type, "size": 1, "digest": DIGEST })).collect::<Vec<_>>(),
        )
    };
    for (path, value, reason) in [
        ("/action", json!("scan"), Ignored::UnknownAction),
        ("/target/mediaType", json!("application/vnd.docker.distribution.manifest.v1+prettyjws"), Ignored::Schema1),
        ("/target/mediaType", json!("application/vnd.docker.distribution.manifest.v1+json"), Ignored::Schema1),
        ("/target/mediaType", json!("application/octet-stream"), Ignored::Blob),
        ("/target/tag", json!(format!("{}.att", DIGEST.replace(':', "-"))), Ignored::Attachment),
        ("/request", json!({ "useragent": "countersign/1.2.3" }), Ignored::Own),
        ("/target/references", types(&[CONFIG, "application/vnd.dev.cosign.simplesigning.v1+json"]), Ignored::Attachment),
        (
            "/target/references",
            types(&[CONFIG, "application/vnd.in-toto+json", "application/vnd.in-toto+json"]),
            Ignored::Attachment,
        ),
        ("/target/references", types(&[EMPTY, "application/vnd.dev.sigstore.bundle.v0.3+json"]), Ignored::Attachment),
        ("/target/references", types(&["application/vnd.cncf.notary.signature", "application/jose+json"]), Ignored::Attachment),
        ("/target/references", types(&["application/vnd.dev.cosign.artifact.sig.v1+json", "x/y"]), Ignored::Attachment),
    ] {
        let mut event = event();
        set(&mut event, path, value);
        assert!(matches!(read(&event.to_string()), Entry::Ignored(found) if found == reason), "{event}");
    }
    for references in [
        types(&[]),
        types(&[CONFIG]),
        types(&[EMPTY]),
        types(&[CONFIG, "application/vnd.oci.image.layer.v1.tar+gzip"]),
        types(&[CONFIG, "application/vnd.in-toto+json", "application/vnd.oci.image.layer.v1.tar+gzip"]),
        types(&["application/vnd.cncf.helm.config.v1+json", "application/vnd.cncf.helm.chart.content.v1.tar+gzip"]),
    ] {
        let mut event = event();
        set(&mut event, "/target/references", references);
        push(&event);
    }
    let mut index = event();
    set(&mut index, "/target/mediaType", json!(media_type::OCI_INDEX));
    set(&mut index, "/target/references", types(&["application/vnd.in-toto+json"; 2]));
    push(&index);
}

#[test]
fn hosts_of_an_event_are_not_read() {
    for path in ["/request/host", "/target/url", "/source", "/request/addr"] {
        let mut event = event();
        let before = push(&event);
        set(&mut event, path, json!("169.254.169.254"));
        assert_eq!(push(&event), before);
    }
}

#[test]
fn no_cut_or_changed_byte_of_a_body_panics() {
    let body = fixture("recorded-distribution-3.1-push-actor-and-references.json");
    for end in 0..body.len() {
        let _ = parse(&body[..end]);
    }
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..20_000 {
        let mut body = body.clone();
        for _ in 0..random.usize(1..4) {
            let at = random.usize(..body.len());
            body[at] = *random.choice(br#"{}[]",:\0 e-"#).unwrap();
        }
        for entry in parse(&body).into_iter().flatten() {
            if let Entry::Push(push) = entry {
                assert!(push.actor.is_none_or(|actor| actor.len() <= LONGEST_TEXT));
            }
        }
    }
}

fn event() -> Value {
    json!({
        "id": "1",
        "timestamp": "2026-01-15T09:12:44Z",
        "action": "push",
        "target": { "mediaType": media_type::OCI_MANIFEST, "digest": DIGEST, "size": 418, "repository": "team/app", "tag": "1.0" },
        "request": { "host": "registry.example.com", "useragent": "skopeo/1.9.3" },
        "actor": { "name": "ci" },
    })
}

fn set(event: &mut Value, path: &str, value: Value) {
    let (parent, name) = path.rsplit_once('/').unwrap();
    event.pointer_mut(parent).unwrap()[name] = value;
}

fn push(event: &Value) -> Push {
    match read(&event.to_string()) {
        Entry::Push(push) => push,
        entry => panic!("{event}: {entry:?}"),
    }
}
