//! Referrers: by the API, by the fallback tag, and finding out which.

use std::sync::atomic::AtomicBool;

use serde_json::{Value, json};

use super::*;
use crate::registry::ReferrersIndex;

fn subject() -> Digest {
    Digest::of(b"subject")
}

fn api_path() -> String {
    format!("/v2/team/app/referrers/{}", subject())
}

fn tag_path() -> String {
    format!("/v2/team/app/manifests/sha256-{}", subject().encoded())
}

fn entry(name: &str, artifact_type: Option<&str>) -> Value {
    let mut entry = json!({ "mediaType": media_type::OCI_MANIFEST, "digest": Digest::of(name.as_bytes()), "size": 1 });
    if let Some(artifact_type) = artifact_type {
        entry["artifactType"] = artifact_type.into();
    }
    entry
}

fn index(entries: &[Value]) -> Response {
    index_as(media_type::OCI_INDEX, &[], entries)
}

fn index_as(content_type: &str, headers: &[(&str, &str)], entries: &[Value]) -> Response {
    let content = json!({ "schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": entries }).to_string();
    respond(200, &[&[("content-type", content_type)], headers].concat(), content)
}

async fn listed(registry: &Registry) -> (bool, Vec<Digest>) {
    let referrers = registry.referrers(&app(), &subject()).await.unwrap();
    (referrers.is_by_api(), referrers.entries().iter().map(|entry| entry.digest.clone()).collect())
}

#[tokio::test]
async fn the_api_lists_page_by_page() {
    let fake = Fake::start(|seen| match seen.target.strip_prefix(&api_path()) {
        Some("") => {
            let next = format!("<{}?last=1>; rel=\"next\"", api_path());
            index_as("application/vnd.oci.image.index.v1+json; charset=utf-8", &[("link", &next)], &[entry("one", None)])
        }
        Some("?last=1") => index(&[entry("two", None), json!("no descriptor")]),
        _ => status(500),
    })
    .await;
    assert_eq!(listed(&fake.client()).await, (true, vec![Digest::of(b"one"), Digest::of(b"two")]));
    assert_eq!(fake.seen().len(), 2);
}

#[tokio::test]
async fn pages_without_end_are_given_up() {
    let fake = Fake::start(|_| {
        let next = format!("<{}?last=1>; rel=\"next\"", api_path());
        index_as(media_type::OCI_INDEX, &[("link", &next)], &[entry("one", None)])
    })
    .await;
    let error = fake.client().referrers(&app(), &subject()).await.unwrap_err();
    assert!(matches!(error, Error::Oversized { .. }), "{error:?}");
    assert!(fake.seen().len() < 200);
}

#[tokio::test]
async fn pages_full_of_annotations_are_given_up_before_they_fill_the_memory() {
    let fake = Fake::start(|_| {
        let next = format!("<{}?last=1>; rel=\"next\"", api_path());
        let mut long = entry("one", None);
        long["annotations"] = json!({ "long": "x".repeat(3 << 20) });
        index_as(media_type::OCI_INDEX, &[("link", &next)], &[long])
    })
    .await;
    let error = fake.client().referrers(&app(), &subject()).await.unwrap_err();
    assert!(matches!(error, Error::Oversized { .. }), "{error:?}");
    assert_eq!(fake.seen().len(), 6);
}

#[tokio::test]
async fn a_registry_without_the_api_is_known_by_any_of_its_answers_and_not_asked_again_at_once() {
    let unsupported: [fn() -> Response; 7] = [
        || respond(404, &[("content-type", "text/plain")], "404 page not found\n"),
        || refuse(400, "UNSUPPORTED", "no"),
        || refuse(405, "UNSUPPORTED", "no"),
        || status(406),
        || status(501),
        || respond(303, &[("location", "https://elsewhere.example.com/")], ""),
        || respond(200, &[("content-type", "text/html")], "<h1>Sign in</h1>"),
    ];
    for answer in unsupported {
        let fake = Fake::start(move |seen| match seen.target.as_str() {
            target if target == api_path() => answer(),
            target if target == tag_path() => index(&[entry("one", None)]),
            _ => status(500),
        })
        .await;
        let client = fake.client();
        for _ in 0..2 {
            assert_eq!(listed(&client).await, (false, vec![Digest::of(b"one")]));
        }
        let asked: Vec<_> = fake.seen().into_iter().map(|seen| seen.target).collect();
        assert_eq!(asked, [api_path(), tag_path(), tag_path()]);
    }
}

#[tokio::test]
async fn a_registry_that_had_no_api_is_asked_again_later_and_when_it_speaks_of_a_subject() {
    let fake = Fake::start(|seen| match seen.method {
        Method::PUT => respond(201, &[("oci-subject", subject().as_str())], ""),
        _ if seen.target == api_path() => status(404),
        _ => refuse(404, "MANIFEST_UNKNOWN", "no"),
    })
    .await;
    let client = fake.client();
    let asked = || fake.seen().iter().filter(|seen| seen.target == api_path()).count();
    for _ in 0..2 {
        assert_eq!(listed(&client).await, (false, vec![]));
        assert_eq!(asked(), 1);
    }
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(3601)).await;
    tokio::time::resume();
    listed(&client).await;
    assert_eq!(asked(), 2);
    let content = image();
    client.put_manifest(&app(), &Digest::of(&content).into(), media_type::OCI_MANIFEST, content).await.unwrap();
    listed(&client).await;
    assert_eq!(asked(), 3);
}

#[tokio::test]
async fn a_404_for_a_name_says_nothing_of_the_api() {
    let fake = Fake::start(|_| refuse(404, "NAME_UNKNOWN", "no such repository")).await;
    let client = fake.client();
    for times in 1..=2 {
        assert_eq!(listed(&client).await, (false, vec![]));
        assert_eq!(fake.seen().iter().filter(|seen| seen.target == api_path()).count(), times);
    }
}

#[tokio::test]
async fn one_strange_404_does_not_make_a_registry_lose_its_api() {
    let broken = Arc::new(AtomicBool::new(false));
    let is_broken = broken.clone();
    let fake = Fake::start(move |seen| match seen.target.as_str() {
        target if target == api_path() && !is_broken.load(SeqCst) => index(&[entry("one", None)]),
        target if target == api_path() => respond(404, &[], "<h1>a proxy's page</h1>"),
        _ => refuse(404, "MANIFEST_UNKNOWN", "no"),
    })
    .await;
    let client = fake.client();
    assert_eq!(listed(&client).await, (true, vec![Digest::of(b"one")]));
    broken.store(true, SeqCst);
    assert_eq!(listed(&client).await, (false, vec![]));
    broken.store(false, SeqCst);
    assert_eq!(listed(&client).await, (true, vec![Digest::of(b"one")]));
}

#[tokio::test]
async fn what_only_may_pass_is_an_error_and_no_answer() {
    for (code, word) in [(403, "DENIED"), (429, "TOOMANYREQUESTS"), (503, "UNAVAILABLE")] {
        let fake = Fake::start(move |_| refuse(code, word, "no")).await;
        assert!(fake.client().referrers(&app(), &subject()).await.is_err(), "{code}");
        assert!(fake.seen().iter().all(|seen| seen.target == api_path()), "{code}");
    }
    let fake = Fake::start(|_| respond(200, &[("content-type", media_type::OCI_INDEX)], "half a bo")).await;
    assert!(matches!(fake.client().referrers(&app(), &subject()).await, Err(Error::Malformed { .. })));
}

#[tokio::test]
async fn a_fallback_tag_that_holds_something_else_is_an_error() {
    let fake = Fake::start(|seen| if seen.target == tag_path() { serve_image() } else { status(404) }).await;
    let error = fake.client().referrers(&app(), &subject()).await.unwrap_err();
    assert!(matches!(error, Error::NoIndex { .. }), "{error:?}");
    assert!(error.to_string().contains("sha256-"), "{error}");
}

#[tokio::test]
async fn the_layout_that_a_registry_takes_is_believed_for_an_hour() {
    let client = Fake::start(|_| status(500)).await.client();
    assert!(!client.takes_older_layout());
    client.remember_layout(true);
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(3599)).await;
    assert!(client.takes_older_layout());
    tokio::time::advance(Duration::from_secs(2)).await;
    assert!(!client.takes_older_layout());
    client.remember_layout(true);
    client.remember_layout(false);
    assert!(!client.takes_older_layout());
}

#[test]
fn candidates_are_those_of_the_type_and_those_of_none() {
    let entries = [
        entry("ours", Some("a/b")),
        entry("untyped", None),
        entry("empty", Some("")),
        entry("cosign's", Some(media_type::OCI_EMPTY)),
        entry("other", Some("c/d")),
        json!({ "mediaType": media_type::OCI_INDEX, "digest": Digest::of(b"an index"), "size": 1 }),
    ];
    let content = json!({ "schemaVersion": 2, "manifests": entries }).to_string();
    let index = ReferrersIndex::read(media_type::OCI_INDEX, content.as_bytes()).unwrap();
    let found: Vec<_> =
        crate::registry::Referrers::of_index(index).candidates(&["a/b"]).map(|entry| entry.digest.clone()).collect();
    assert_eq!(found, ["ours", "untyped", "empty", "cosign's"].map(|name| Digest::of(name.as_bytes())));
}
