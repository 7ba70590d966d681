use serde_json::{Value, json};

use super::*;
use crate::intake::{
    Kind,
    distribution::tests::{assert_reads_as, fixture},
};

const DIGEST: &str = "sha256:db7da600462e7b3a21648206747f051da90b506b23d75769901304bb36317a08";

fn fixtures(prefix: &str) -> Vec<(String, Value)> {
    let index: Value = serde_json::from_slice(&fixture("INDEX.json")).unwrap();
    let entries = index["fixtures"].as_array().unwrap().iter();
    let named = entries.filter_map(|entry| Some((entry["file"].as_str()?.to_owned(), entry.clone())));
    let found: Vec<_> = named.filter(|(file, _)| file.starts_with(prefix)).collect();
    assert!(!found.is_empty());
    found
}

fn assert_all_read_as(file: &str, parsed: Parsed<'_>, expected: &Value) {
    let expected = expected["expect"].as_array().unwrap();
    if expected[0]["class"] == "reject" {
        let refused = match parsed {
            Ok(entries) => entries.iter().all(|entry| matches!(entry, Entry::Refused { .. })),
            Err(_) => true,
        };
        assert!(refused, "{file}");
        return;
    }
    let entries = parsed.unwrap_or_else(|refusal| panic!("{file}: {refusal:?}"));
    assert_eq!(entries.len(), expected.len(), "{file}");
    for (entry, expected) in entries.iter().zip(expected) {
        assert_reads_as(file, entry, expected);
    }
}

#[test]
fn every_mode_of_http_is_read() {
    for (file, entry) in fixtures("cloudevents-") {
        let mut headers = HeaderMap::new();
        for (name, value) in entry["headers"].as_object().unwrap() {
            headers.insert(name.parse::<http::HeaderName>().unwrap(), value.as_str().unwrap().parse().unwrap());
        }
        let incoming = Incoming::by_http(&headers, fixture(&file).into());
        assert_all_read_as(&file, Kind::CloudEvents.parse(&incoming), &entry);
    }
}

#[test]
fn what_a_broker_delivers_is_read_by_the_kind_of_its_source() {
    for (file, entry) in fixtures("amqp-") {
        let delivery: Value = serde_json::from_slice(&fixture(&file)).unwrap();
        let properties = &delivery["properties"];
        let headers = properties["headers"].as_object().unwrap();
        let headers = headers.iter().filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())));
        let content_type = properties["content_type"].as_str().map(str::to_owned);
        let body = delivery["body"].as_str().unwrap().to_owned();
        let incoming = Incoming::by_broker(content_type, headers, body.into());
        let kind = if file.contains("distribution") { Kind::Distribution } else { Kind::CloudEvents };
        assert_all_read_as(&file, kind.parse(&incoming), &entry);
    }
}

fn event(change: impl FnOnce(&mut Value)) -> Incoming {
    let mut event = json!({
        "specversion": "1.0", "id": "1", "source": "ci", "type": "com.example.image.pushed",
        "data": { "repository": "team/app", "tag": "1.0", "digest": DIGEST },
    });
    change(&mut event);
    Incoming { body: event.to_string().into(), ..Incoming::default() }
}

fn only(incoming: &Incoming) -> Entry<'_> {
    let mut entries = Kind::CloudEvents.parse(incoming).unwrap();
    assert_eq!(entries.len(), 1);
    entries.remove(0)
}

#[test]
fn what_is_no_push_is_dropped_and_what_cannot_be_read_is_kept() {
    assert!(matches!(only(&event(|_| ())), Entry::Push(push) if push.id == "1" && push.pushed_at.is_none()));
    let ours = event(|event| event["type"] = json!("io.countersign.image.pushed.v1"));
    assert!(matches!(only(&ours), Entry::Push(_)));
    let ignored: [fn(&mut Value); 4] = [
        |event| event["type"] = json!("com.example.image.deleted"),
        |event| event["data"]["tag"] = json!(format!("sha256-{}.sig", "0".repeat(64))),
        |event| event["data"]["mediaType"] = json!("application/octet-stream"),
        |event| event["type"] = json!("image.pushed.twice"),
    ];
    for change in ignored {
        let incoming = event(change);
        assert!(matches!(only(&incoming), Entry::Ignored(_)), "{incoming:?}");
    }
    let refused: [fn(&mut Value); 8] = [
        |event| event["specversion"] = json!("0.3"),
        |event| drop(event.as_object_mut().unwrap().remove("specversion")),
        |event| drop(event.as_object_mut().unwrap().remove("type")),
        |event| drop(event.as_object_mut().unwrap().remove("data")),
        |event| event["data_base64"] = json!("AAAA"),
        |event| event["data"]["digest"] = json!("sha256:no"),
        |event| event["data"]["repository"] = json!("../up"),
        |event| drop(event["data"].as_object_mut().unwrap().remove("digest")),
    ];
    for change in refused {
        let incoming = event(change);
        match only(&incoming) {
            Entry::Refused { json, .. } => assert_eq!(json.as_bytes(), incoming.body),
            entry => panic!("{incoming:?} was read as {entry:?}"),
        }
    }
}

#[test]
fn one_bad_event_of_a_batch_does_not_spoil_its_neighbours() {
    let [good, bad] = [event(|_| ()), event(|event| event["data"]["digest"] = json!("x"))].map(|incoming| incoming.body);
    let body = [b"[", &good[..], b",", &bad, b",", &good, b"]"].concat();
    let content_type = Some("Application/CloudEvents-Batch+JSON; charset=utf-8".to_owned());
    let incoming = Incoming { body: body.into(), content_type, ..Incoming::default() };
    let entries = Kind::CloudEvents.parse(&incoming).unwrap();
    assert!(matches!(&entries[..], [Entry::Push(_), Entry::Refused { .. }, Entry::Push(_)]));
    // What is kept is part of what came.
    if let Entry::Refused { json, .. } = entries[1] {
        assert_eq!(incoming.body.slice_ref(json.as_bytes()), bad);
    }
}

#[test]
fn an_envelope_of_a_registry_can_be_the_data_whole_or_in_base64() {
    let envelope: Value = serde_json::from_slice(&fixture("recorded-distribution-2.8-push-manifest-tag.json")).unwrap();
    let encoded = BASE64_STANDARD.encode(envelope.to_string());
    for incoming in [
        event(|event| event["data"] = envelope.clone()),
        event(|event| {
            event.as_object_mut().unwrap().remove("data");
            event["data_base64"] = json!(encoded);
        }),
    ] {
        let incoming = Incoming { content_type: Some("application/cloudevents+json".into()), ..incoming };
        let entries = Kind::Distribution.parse(&incoming).unwrap();
        assert!(matches!(&entries[..], [Entry::Push(_)]), "{entries:?}");
    }
    let bare = Incoming { body: envelope.to_string().into(), ..Incoming::default() };
    assert!(matches!(&Kind::Distribution.parse(&bare).unwrap()[..], [Entry::Push(_)]));
}

#[test]
fn attributes_in_headers_are_percent_decoded_and_bytes_that_are_no_text_are_refused() {
    let mut headers = HeaderMap::new();
    for (name, value) in [("ce-specversion", "1.0"), ("ce-id", "a%C3%A9b"), ("ce-type", "image.pushed")] {
        headers.insert(name, value.parse().unwrap());
    }
    let data = json!({ "repository": "team/app", "digest": DIGEST }).to_string();
    let incoming = Incoming::by_http(&headers, data.clone().into());
    assert_eq!(incoming.attributes["id"], "a\u{e9}b");
    // No graphic ASCII, so not fit for a log: the data's digest stands for it.
    assert!(matches!(only(&incoming), Entry::Push(push) if push.id.starts_with("sha256:")));
    let incoming = Incoming::by_http(&headers, Bytes::from_static(b"\xff"));
    assert!(Kind::CloudEvents.parse(&incoming).is_err());
}
