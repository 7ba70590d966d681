//! What is served and what is said of it: nothing is believed, and a 404 only in a registry's own words.

use super::*;
use crate::outcome::{Classify, Verdict};

#[tokio::test]
async fn other_bytes_than_the_digest_says_are_never_returned() {
    let fake = Fake::start(|seen| match seen.target.as_str() {
        "/v2/team/app/manifests/1" => respond(
            200,
            &[("content-type", media_type::OCI_MANIFEST), ("docker-content-digest", Digest::of(b"lie").as_str())],
            image(),
        ),
        target if target.contains("/manifests/") => serve_image(),
        _ => respond(200, &[], "other bytes"),
    })
    .await;
    let asked = Digest::of(b"asked");
    let by_digest = fake.client().manifest(&app(), &Address::Digest(asked.clone())).await.unwrap_err();
    let by_tag = fake.client().manifest(&app(), &one()).await.unwrap_err();
    let blob = fake.client().blob(&app(), &asked, 100).await.unwrap_err();
    for error in [by_digest, by_tag, blob] {
        assert!(matches!(error, Error::DigestMismatch { .. }), "{error:?}");
        assert_eq!(error.verdict(), Verdict::TRANSIENT);
    }
}

#[tokio::test]
async fn sha512_digests_are_verified_as_such() {
    let sha512 = |content: &[u8]| -> Digest {
        format!("sha512:{}", hex::encode(<sha2::Sha512 as sha2::Digest>::digest(content))).parse().unwrap()
    };
    let fake = Fake::start(move |_| serve_image()).await;
    let asked = sha512(&image());
    let manifest = fake.client().manifest(&app(), &Address::Digest(asked.clone())).await.unwrap().unwrap();
    assert_eq!(manifest.digest(), &asked);
    let other = Address::Digest(sha512(b"other"));
    assert!(matches!(fake.client().manifest(&app(), &other).await, Err(Error::DigestMismatch { .. })));
}

#[tokio::test]
async fn not_there_is_believed_only_in_a_registrys_own_words() {
    let absent: [fn() -> Response; 4] = [
        || refuse(404, "MANIFEST_UNKNOWN", "manifest unknown"),
        || refuse(404, "NAME_UNKNOWN", "repository name not known to registry"),
        || refuse(404, "NOT_FOUND", "artifact not found"),
        || status(404),
    ];
    for answer in absent {
        let fake = Fake::start(move |_| answer()).await;
        assert_eq!(fake.client().manifest(&app(), &one()).await.unwrap(), None);
        assert_eq!(fake.client().resolve(&app(), &tag("1")).await.unwrap(), None);
        assert_eq!(fake.client().blob(&app(), &Digest::of(b""), 1).await.unwrap(), None);
        assert_eq!(fake.client().tags(&app()).await.unwrap(), []);
    }
    let anything_else: [fn() -> Response; 8] = [
        || respond(404, &[("content-type", "text/html")], "<h1>Not Found</h1>"),
        || respond(404, &[], "404 page not found\n"),
        || respond(404, &[], r#"{"errors":[]}"#),
        || refuse(404, "DENIED", "no"),
        || refuse(404, "MANIFEST_UNKNOWN", "OCI manifest found, but accept header does not support OCI manifests"),
        || refuse(410, "MANIFEST_UNKNOWN", "gone"),
        || status(204),
        || status(400),
    ];
    for answer in anything_else {
        let fake = Fake::start(move |_| answer()).await;
        assert!(fake.client().manifest(&app(), &one()).await.is_err(), "{:?}", answer());
        assert!(fake.client().resolve(&app(), &tag("1")).await.is_err(), "{:?}", answer());
        assert!(fake.client().blob(&app(), &Digest::of(b""), 1).await.is_err(), "{:?}", answer());
    }
}

#[tokio::test]
async fn a_tag_whose_manifest_is_deleted_in_that_moment_is_not_taken_for_no_tag() {
    let gone = || {
        let detail = serde_json::json!({ "Name": "team/app", "Revision": Digest::of(b"before") });
        let body =
            serde_json::json!({ "errors": [{ "code": "MANIFEST_UNKNOWN", "message": "manifest unknown", "detail": detail }] });
        respond(404, &[("content-type", "application/json")], body.to_string())
    };
    let fake = Fake::in_turn(vec![gone, gone, serve_image]).await;
    assert!(fake.client().manifest(&app(), &one()).await.unwrap().is_some());
    // A tag that names nothing for good is as good as none.
    let fake = Fake::start(move |_| gone()).await;
    assert_eq!(fake.client().manifest(&app(), &one()).await.unwrap(), None);
    assert!((2..10).contains(&fake.seen().len()));
    // By its digest it is simply not there.
    let fake = Fake::start(move |_| gone()).await;
    assert_eq!(fake.client().manifest(&app(), &Digest::of(b"before").into()).await.unwrap(), None);
    assert_eq!(fake.seen().len(), 1);
}

#[tokio::test]
async fn a_tag_is_resolved_by_its_content_where_the_header_is_missing() {
    let fake = Fake::start(|seen| if seen.method == Method::HEAD { status(200) } else { serve_image() }).await;
    assert_eq!(fake.client().resolve(&app(), &tag("1")).await.unwrap(), Some(Digest::of(&image())));
    let nonsense = Fake::start(|_| {
        respond(200, &[("docker-content-digest", "sha256:nonsense"), ("content-type", media_type::OCI_MANIFEST)], image())
    })
    .await;
    assert_eq!(nonsense.client().resolve(&app(), &tag("1")).await.unwrap(), Some(Digest::of(&image())));
    let named = Fake::start(|_| respond(200, &[("docker-content-digest", Digest::of(b"x").as_str())], "")).await;
    assert_eq!(named.client().resolve(&app(), &tag("1")).await.unwrap(), Some(Digest::of(b"x")));
    assert_eq!(named.seen().len(), 1, "one HEAD is enough");
}

#[tokio::test]
async fn content_that_is_no_manifest_is_refused_for_good_only_if_it_is_what_was_asked_for() {
    let fake = Fake::start(|_| respond(200, &[("content-type", "text/html")], "<html>maintenance</html>")).await;
    let error = fake.client().manifest(&app(), &one()).await.unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }), "{error:?}");
    assert_eq!(error.verdict(), Verdict::TRANSIENT, "a page of a proxy goes away");
    let digest = Digest::of(b"<html>maintenance</html>");
    let error = fake.client().manifest(&app(), &Address::Digest(digest)).await.unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
    assert!(matches!(error.verdict(), Verdict::Refuse { .. }), "these bytes stay what they are");
}

#[tokio::test]
async fn endless_answers_end_at_a_bound() {
    let fake = Fake::start(|seen| {
        let endless = futures::stream::repeat_with(|| Ok::<_, std::io::Error>(Bytes::from(vec![b' '; 1 << 16])));
        respond(if seen.target.ends_with("/1") { 200 } else { 502 }, &[], Body::from_stream(endless))
    })
    .await;
    let error = fake.client().manifest(&app(), &one()).await.unwrap_err();
    assert!(matches!(error, Error::Oversized { .. }), "{error:?}");
    let error = fake.client().manifest(&app(), &Address::Tag(tag("2"))).await.unwrap_err();
    assert!(matches!(error, Error::ServerError { .. }), "{error:?}");
}

#[tokio::test]
async fn a_blob_of_exactly_the_limit_is_read_and_one_byte_more_is_not() {
    let fake = Fake::start(|_| respond(200, &[], "12345")).await;
    let digest = Digest::of(b"12345");
    assert_eq!(fake.client().blob(&app(), &digest, 5).await.unwrap().as_deref(), Some(&b"12345"[..]));
    assert!(matches!(fake.client().blob(&app(), &digest, 4).await, Err(Error::Oversized { .. })));
}

#[tokio::test]
async fn pages_are_followed_on_our_own_host_only_and_never_in_a_circle() {
    let fake = Fake::start(|seen| match seen.target.as_str() {
        "/v2/team/app/tags/list?n=1000" => respond(
            200,
            &[("link", r#"</v2/team/app/tags/list?n=2&last=b>; rel="next""#)],
            r#"{"name":"team/app","tags":["a","-no-tag-","b"]}"#,
        ),
        "/v2/team/app/tags/list?n=2&last=b" => respond(200, &[], r#"{"name":"team/app","tags":null}"#),
        "/v2/circle/tags/list?n=1000" => respond(200, &[("link", "<?n=1000>; rel=next")], r#"{"name":"circle","tags":["a"]}"#),
        "/v2/abroad/tags/list?n=1000" => {
            respond(200, &[("link", "<http://elsewhere.example.com/v2/x>; rel=\"next\"")], r#"{"tags":["a"]}"#)
        }
        _ => respond(200, &[], "[]"),
    })
    .await;
    assert_eq!(fake.client().tags(&app()).await.unwrap(), [tag("a"), tag("b")]);
    let error = fake.client().tags(&"circle".parse().unwrap()).await.unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }), "{error:?}");
    let error = fake.client().tags(&"abroad".parse().unwrap()).await.unwrap_err();
    assert!(matches!(error, Error::Elsewhere { .. }), "{error:?}");
    assert!(matches!(fake.client().repositories().await, Err(Error::Malformed { .. })));
}

#[tokio::test]
async fn refused_writes_say_whether_to_come_again() {
    let put = async |answer: fn() -> Response| {
        let fake = Fake::start(move |_| answer()).await;
        fake.client().put_manifest(&app(), &one(), media_type::OCI_MANIFEST, image()).await.unwrap_err()
    };
    for answer in [
        || refuse(400, "MANIFEST_BLOB_UNKNOWN", "blob unknown to registry"),
        || refuse(404, "BLOB_UNKNOWN", "blob unknown to registry"),
        || refuse(400, "DIGEST_INVALID", "provided digest did not match uploaded content"),
    ] {
        let error = put(answer).await;
        assert!(matches!(error, Error::BlobUnknown { .. }), "{error:?}");
        assert_eq!(error.verdict(), Verdict::TRANSIENT);
    }
    for answer in [
        || refuse(400, "TAG_INVALID", "The image tag 'x' already exists … cannot be overwritten because the tag is immutable."),
        || refuse(412, "PRECONDITION", "Failed to process request due to 'app:1' configured as immutable."),
        || refuse(403, "DENIED", "tag immutability is on"),
    ] {
        let error = put(answer).await;
        assert!(matches!(error, Error::ImmutableTag { .. }), "{error:?}");
        let Verdict::Refuse { cure } = error.verdict() else { panic!("{error:?}") };
        assert!(cure.contains("immutability"));
    }
    for answer in [
        || status(405),
        || refuse(405, "UNSUPPORTED", "The operation is unsupported."),
        || refuse(403, "DENIED", "The system is in read only mode. Any modification is prohibited."),
    ] {
        let error = put(answer).await;
        assert!(matches!(error, Error::ReadOnly { .. }), "{error:?}");
        assert_eq!(error.verdict(), Verdict::TRANSIENT);
    }
    for answer in [
        || {
            refuse(
                403,
                "DENIED",
                "adding 1.0 KiB of storage resource, which when updated to … will exceed the configured upper limit",
            )
        },
        || refuse(403, "DENIED", "quota\n\u{1b}[31m exceeded"),
        || refuse(400, "QUOTA_EXCEEDED", "Quota has been exceeded on namespace"),
    ] {
        let error = put(answer).await;
        assert!(matches!(error, Error::Quota { .. }), "{error:?}");
        let Verdict::Refuse { cure } = error.verdict() else { panic!("{error:?}") };
        assert!(cure.contains("quota") && !error.to_string().contains('\n'), "{error}: {cure}");
    }
    let error = put(|| refuse(403, "DENIED", "no\n\u{1b}[31m way")).await;
    assert!(matches!(error, Error::Denied { .. }), "{error:?}");
    assert!(error.to_string().contains(r"no\n\u{1b}[31m way"), "{error}");
    let error = put(|| refuse(413, "SIZE_INVALID", &"long ".repeat(10_000))).await;
    assert!(matches!(error, Error::Rejected { .. }), "{error:?}");
    assert!(error.to_string().len() < 600, "{error}");
    let error = put(|| respond(201, &[("docker-content-digest", Digest::of(b"other").as_str())], "")).await;
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error:?}");
    let error = put(|| status(200)).await;
    assert!(matches!(error, Error::Unexpected { .. }), "{error:?}");
}
