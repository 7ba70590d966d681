//! Connections that break and stall, and answers that point elsewhere.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::outcome::{Classify, Verdict};

#[tokio::test]
async fn a_peer_that_asks_for_time_gets_it() {
    const DATES: [(&str, &str); 2] =
        [("date", "Sun, 22 Nov 2026 09:00:00 GMT"), ("retry-after", "Sun, 22 Nov 2026 09:02:00 GMT")];

    let read = async |answer: fn() -> Response| {
        let fake = Fake::start(move |_| answer()).await;
        let error = fake.client().manifest(&app(), &one()).await.unwrap_err();
        assert_eq!(fake.seen().len(), 1, "left to the queue");
        error.verdict()
    };
    let retry = |seconds: u64, throttled| Verdict::Retry { after: Some(Duration::from_secs(seconds)), throttled };
    assert_eq!(read(|| respond(429, &[("retry-after", "7")], "slow down")).await, retry(7, true));
    assert_eq!(read(|| respond(429, &DATES, "")).await, retry(120, true));
    assert_eq!(read(|| respond(503, &[("retry-after", "3")], "")).await, retry(3, false));
    assert_eq!(read(|| respond(429, &[("retry-after", "99999999999")], "")).await, retry(3600, true), "bounded");
    assert_eq!(read(|| respond(429, &[("retry-after", "Sun, 01 Nov 2020 09:00:00 GMT")], "")).await, retry(0, true));
    assert_eq!(read(|| respond(429, &[("retry-after", "soon")], "")).await, Verdict::Retry { after: None, throttled: true });
    assert_eq!(read(|| refuse(403, "TOOMANYREQUESTS", "rate limit")).await, Verdict::Retry { after: None, throttled: true });
    assert_eq!(read(|| status(502)).await, Verdict::TRANSIENT);
}

#[tokio::test]
async fn a_read_that_meets_a_write_is_repeated_a_few_times() {
    let busy: fn() -> Response = || refuse(500, "UNKNOWN", "unknown error");
    let fake = Fake::in_turn(vec![busy, busy, busy, busy, serve_image]).await;
    fake.client().manifest(&app(), &one()).await.unwrap().unwrap();
    assert_eq!(fake.seen().len(), 5);
    let broken = Fake::in_turn(vec![busy]).await;
    let error = broken.client().manifest(&app(), &one()).await.unwrap_err();
    assert!(matches!(error, Error::ServerError { .. }), "{error:?}");
    assert_eq!(broken.seen().len(), 5, "and no more");
    let written = Fake::in_turn(vec![busy]).await;
    let error = written.client().put_manifest(&app(), &one(), media_type::OCI_MANIFEST, image()).await.unwrap_err();
    assert!(matches!(error, Error::ServerError { .. }), "{error:?}");
    assert_eq!(written.seen().len(), 1, "a write is not repeated: another writer may have come in between");
}

/// A server that reads one request per step and sends the step's bytes; an empty step closes the connection. It takes the
/// next connection where it is left. Returns the port and the counter of requests.
async fn raw(steps: Vec<&'static [u8]>) -> (u16, Arc<AtomicUsize>, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let count = Arc::new(AtomicUsize::new(0));
    let counter = count.clone();
    let mut server = JoinSet::new();
    server.spawn(async move {
        let mut steps = steps.into_iter().peekable();
        while steps.peek().is_some() {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = vec![0; 1 << 16];
            while let Some(step) = steps.peek().copied() {
                if !matches!(stream.read(&mut buffer).await, Ok(1..)) {
                    break;
                }
                counter.fetch_add(1, SeqCst);
                steps.next();
                stream.write_all(step).await.unwrap();
                if step.is_empty() || step.ends_with(b"CUT") {
                    break;
                }
            }
        }
    });
    (port, count, server)
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_no_answer() {
    let (port, count, _server) = raw(vec![b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf CUT"]).await;
    let registry = Registry::new(settings(&format!("http://127.0.0.1:{port}"))).unwrap();
    let error = registry.manifest(&app(), &one()).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert_eq!(error.verdict(), Verdict::TRANSIENT);
    assert_eq!(count.load(SeqCst), 1);
}

#[tokio::test]
async fn a_kept_connection_that_was_closed_costs_a_read_nothing_and_a_write_is_not_repeated() {
    const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    let (port, count, _server) = raw(vec![OK, b"", OK, b"", b"", OK]).await;
    let registry = Registry::new(settings(&format!("http://127.0.0.1:{port}"))).unwrap();
    registry.ping().await.unwrap();
    registry.ping().await.unwrap();
    assert_eq!(count.load(SeqCst), 3, "the second was sent twice");
    let error = registry.put_manifest(&app(), &one(), media_type::OCI_MANIFEST, image()).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert_eq!(count.load(SeqCst), 4);
}

#[tokio::test]
async fn a_registry_that_stalls_or_is_not_there_is_given_up_on() {
    let stalled = Fake::start(|_| {
        let slow = futures::stream::unfold((), async |()| {
            tokio::time::sleep(Duration::from_millis(100)).await;
            Some((Ok::<_, std::io::Error>(Bytes::from_static(b" ")), ()))
        });
        respond(200, &[], Body::from_stream(slow))
    })
    .await;
    let mut hasty = stalled.settings();
    hasty.timeouts.request = Duration::from_millis(300);
    let error = Registry::new(hasty).unwrap().manifest(&app(), &one()).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");

    let (_taken, nobody) = integration_tests::process::nobody().unwrap();
    for url in [format!("http://{nobody}"), "https://registry.invalid".to_owned()] {
        let error = Registry::new(settings(&url)).unwrap().ping().await.unwrap_err();
        assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
        assert_eq!(error.verdict(), Verdict::TRANSIENT);
        let text = format!("{error} {error:?}");
        assert!(text.contains("registry.example.com") && !text.contains(PASSWORD), "{text}");
    }
}

#[tokio::test]
async fn requests_have_what_registries_need_to_see() {
    let fake = Fake::start(|seen| match seen.method {
        Method::GET => serve_image(),
        Method::POST => respond(202, &[("location", "/v2/team/app/blobs/uploads/1?_state=a%2Bb%3D")], ""),
        _ => status(201),
    })
    .await;
    let registry = fake.client();
    registry.manifest(&app(), &one()).await.unwrap();
    registry.ensure_blob(&app(), Bytes::from_static(b"{}")).await.unwrap();
    registry.put_manifest(&app(), &one(), media_type::OCI_MANIFEST, image()).await.unwrap();
    let seen = fake.seen();
    assert_eq!(seen.len(), 4);
    let agent = |request: &Seen| request.header("user-agent").unwrap().to_owned();
    assert!(seen.iter().map(agent).all(|agent| agent.starts_with("countersign/") && agent.contains("cosign ")), "{seen:?}");
    assert!(seen.iter().all(|request| request.header("accept-encoding").is_none()));
    assert!(seen[0].is("GET", "/v2/team/app/manifests/1"));
    assert_eq!(seen[0].header("accept"), Some(media_type::ACCEPT_MANIFESTS));
    let digest = Digest::of(b"{}").to_string().replace(':', "%3A");
    assert!(seen[1].is("POST", &format!("/v2/team/app/blobs/uploads/?digest={digest}")), "{:?}", seen[1]);
    assert_eq!((seen[1].header("content-type"), &seen[1].body[..]), (Some("application/octet-stream"), &b"{}"[..]));
    assert!(seen[2].is("PUT", &format!("/v2/team/app/blobs/uploads/1?_state=a%2Bb%3D&digest={digest}")), "{:?}", seen[2]);
    assert_eq!(seen[2].header("content-type"), Some("application/octet-stream"));
    assert_eq!(&seen[2].body[..], b"{}");
    assert!(seen[3].is("PUT", "/v2/team/app/manifests/1"));
    assert_eq!(seen[3].header("content-type"), Some(media_type::OCI_MANIFEST));
    assert_eq!(seen[3].body, image());
    // It has not taken the content with the POST, and is not offered it again.
    registry.ensure_blob(&app(), Bytes::new()).await.unwrap();
    let seen = fake.seen();
    assert!(seen[4].is("POST", "/v2/team/app/blobs/uploads/"), "{:?}", seen[4]);
    assert!(seen[4..].iter().all(|request| request.header("content-length") == Some("0")), "{seen:?}");
}

#[tokio::test]
async fn a_blob_is_sent_with_the_post_where_the_registry_takes_it_so() {
    let methods = |fake: &Fake| fake.seen().into_iter().map(|request| request.method).collect::<Vec<_>>();
    let takes = Fake::start(|seen| status(if seen.method == Method::HEAD { 200 } else { 201 })).await;
    let registry = takes.client();
    for content in ["a", "b"] {
        registry.ensure_blob(&app(), Bytes::from_static(content.as_bytes())).await.unwrap();
    }
    // Whether it is there is looked at once.
    assert_eq!(methods(&takes), [Method::POST, Method::HEAD, Method::POST]);
    assert_eq!(takes.seen()[2].body, "b");

    // Unless it has not what it says that it has taken; says so of other content; or says so when it comes to the manifest.
    for (claims, has, knows) in [(None, 404, 201), (Some(Digest::of(b"")), 200, 201), (None, 200, 404)] {
        let claim = claims.as_ref().map(|digest| ("docker-content-digest", digest.to_string()));
        let liar = Fake::start(move |seen| match (&seen.method, seen.target.contains("digest=")) {
            (&Method::POST, true) => {
                respond(201, &claim.iter().map(|(name, value)| (*name, value.as_str())).collect::<Vec<_>>(), "")
            }
            (&Method::HEAD, _) => status(has),
            (&Method::POST, false) => respond(202, &[("location", "/up")], ""),
            (_, false) if knows == 404 => refuse(404, "MANIFEST_BLOB_UNKNOWN", "blob unknown to registry"),
            _ => status(201),
        })
        .await;
        let registry = liar.client();
        registry.ensure_blob(&app(), Bytes::from_static(b"x")).await.unwrap();
        let written = registry.put_manifest(&app(), &one(), media_type::OCI_MANIFEST, image()).await;
        assert_eq!(matches!(written, Err(Error::BlobUnknown { .. })), knows == 404, "{written:?}");
        registry.ensure_blob(&app(), Bytes::from_static(b"y")).await.unwrap();
        let (seen, sessions) = (liar.seen(), if knows == 404 { 1 } else { 2 });
        let by_put = seen.iter().filter(|seen| seen.method == Method::PUT && seen.target.starts_with("/up?"));
        assert_eq!(by_put.map(|seen| &seen.body[..]).collect::<Vec<_>>(), [b"x", b"y"][2 - sessions..]);
        assert_eq!(seen.iter().filter(|seen| seen.method == Method::POST && !seen.body.is_empty()).count(), 1, "{seen:?}");
    }
}

#[tokio::test]
async fn a_blob_that_is_refused_with_the_post_is_sent_by_a_session() {
    for refused in [400, 403, 404, 405, 411, 500, 501] {
        let fake = Fake::start(move |seen| match (&seen.method, &seen.body[..]) {
            (&Method::POST, b"") => respond(202, &[("location", "/up")], ""),
            (&Method::POST, _) => status(refused),
            _ => status(201),
        })
        .await;
        let registry = fake.client();
        for content in ["a", "b"] {
            registry.ensure_blob(&app(), Bytes::from_static(content.as_bytes())).await.unwrap();
        }
        // Asked once, and remembered.
        assert_eq!(fake.seen().len(), 3 + 2, "{refused}");
    }
    for busy in [429, 502, 503, 504] {
        let fake = Fake::start(move |seen| match (&seen.method, &seen.body[..]) {
            (&Method::POST, b"") => respond(202, &[("location", "/up")], ""),
            (&Method::POST, _) => status(busy),
            _ => status(201),
        })
        .await;
        let registry = fake.client();
        registry.ensure_blob(&app(), Bytes::from_static(b"x")).await.unwrap_err();
        assert_eq!(fake.seen().len(), 1, "{busy}: who is busy is not asked again at once");
        registry.ensure_blob(&app(), Bytes::from_static(b"x")).await.unwrap();
    }
    // What came with the POST was taken for the first part.
    let turn = AtomicUsize::new(0);
    let appends = Fake::start(move |seen| match seen.method {
        Method::POST => respond(202, &[("location", "/up")], ""),
        _ if turn.fetch_add(1, SeqCst) == 0 => refuse(400, "SIZE_INVALID", "too much"),
        _ => status(201),
    })
    .await;
    appends.client().ensure_blob(&app(), Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(appends.seen().len(), 4);
    let never = Fake::start(|_| refuse(403, "DENIED", "no pushes here")).await;
    let error = never.client().ensure_blob(&app(), Bytes::from_static(b"x")).await.unwrap_err();
    assert!(error.to_string().contains("no pushes here"), "{error}");
}

#[tokio::test]
async fn an_upload_goes_where_the_registry_says_but_only_on_its_own_host() {
    let upload = async |location: &'static str| {
        let fake = Fake::start(move |seen| match seen.method {
            Method::POST => {
                let location = location.replace("SELF", seen.header("host").unwrap());
                respond(202, &[("location", &location)], "")
            }
            _ => status(201),
        })
        .await;
        let done = fake.client().ensure_blob(&app(), Bytes::from_static(b"x")).await;
        let put = fake.seen().get(1).map(|seen| seen.target.split_once("digest=").unwrap().0.to_owned());
        (done, put)
    };
    for (location, expected) in [
        ("/v2/team/app/blobs/uploads/7", "/v2/team/app/blobs/uploads/7?"),
        ("/up?a=b", "/up?a=b&"),
        ("7", "/v2/team/app/blobs/uploads/7?"),
        ("?x", "/v2/team/app/blobs/uploads/?x&"),
        ("http://SELF/up/7", "/up/7?"),
        ("https://SELF/up/7", "/up/7?"),
        ("//SELF/up/7#part", "/up/7?"),
        ("http://u:p@SELF/up/7", "/up/7?"),
        ("https://registry.example.com/up/7?s=1", "/up/7?s=1&"),
        ("http://registry.example.com/up/7", "/up/7?"),
    ] {
        let (done, put) = upload(location).await;
        assert!(done.is_ok(), "{location}: {done:?}");
        assert_eq!(put.as_deref(), Some(expected), "{location}");
    }
    for location in [
        "http://elsewhere.example.com/up",
        "https://registry.example.com:444/up",
        "//registry.example.com.evil/up",
        "ftp://SELF/up",
    ] {
        let (done, put) = upload(location).await;
        assert!(matches!(done, Err(Error::Elsewhere { .. })), "{location}: {done:?}");
        assert_eq!(put, None, "{location}");
    }
    let (done, _) = upload("http://[").await;
    assert!(matches!(done, Err(Error::Malformed { .. })), "{done:?}");
}

#[tokio::test]
async fn an_upload_that_was_lost_begins_again_once() {
    let turn = AtomicUsize::new(0);
    let fake = Fake::start(move |seen| match seen.method {
        Method::POST => respond(202, &[("location", "/up")], ""),
        _ if turn.fetch_add(1, SeqCst) == 0 => refuse(404, "BLOB_UPLOAD_UNKNOWN", "blob upload unknown to registry"),
        _ => status(201),
    })
    .await;
    fake.client().ensure_blob(&app(), Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(fake.seen().len(), 4);
    let lost = Fake::start(|seen| match seen.method {
        Method::POST => respond(202, &[("location", "/up")], ""),
        _ => refuse(404, "BLOB_UPLOAD_UNKNOWN", "blob upload unknown to registry"),
    })
    .await;
    let registry = lost.client();
    for _ in 0..2 {
        let error = registry.ensure_blob(&app(), Bytes::from_static(b"x")).await.unwrap_err();
        assert!(matches!(error, Error::BlobUnknown { .. }), "{error:?}");
    }
    assert_eq!(lost.seen().len(), 8, "a failure is not remembered");
}

#[tokio::test]
async fn an_upload_goes_on_when_the_one_who_began_it_is_gone() {
    let fake = Fake::start(|seen| match seen.method {
        Method::POST => respond(202, &[("location", "/up")], ""),
        _ => status(201),
    })
    .await;
    let registry = fake.client();
    let (app, content) = (app(), Bytes::from_static(b"x"));
    let mut first = Box::pin(registry.ensure_blob(&app, content.clone()));
    let mut second = Box::pin(registry.ensure_blob(&app, content.clone()));
    assert!(futures::poll!(&mut first).is_pending() && futures::poll!(&mut second).is_pending());
    drop(first);
    second.await.unwrap();
    assert_eq!(fake.seen().len(), 2);

    let mut given_up = Box::pin(registry.ensure_blob(&app, Bytes::from_static(b"y")));
    assert!(futures::poll!(&mut given_up).is_pending());
    drop(given_up);
    registry.ensure_blob(&app, Bytes::from_static(b"y")).await.unwrap();
}

#[tokio::test]
async fn reads_are_redirected_without_credentials() {
    let storage = Fake::start(|seen| match seen.target.as_str() {
        "/content?X-Signature=s3cret" => serve_image(),
        "/asks" => respond(401, &[("www-authenticate", "Basic realm=\"give\"")], ""),
        "/gone" => status(404),
        _ => refuse(404, "MANIFEST_UNKNOWN", "says the wrong one"),
    })
    .await;
    let elsewhere = storage.url("");
    let fake = Fake::start(move |seen| {
        if seen.header("authorization").is_none() {
            return respond(401, &[("www-authenticate", "Basic realm=\"x\"")], "");
        }
        let name = seen.target.rsplit('/').next().unwrap();
        let to = match name {
            "1" => format!("{elsewhere}/content?X-Signature=s3cret"),
            "near" => "/v2/team/app/manifests/nearer".to_owned(),
            "nearer" => return serve_image(),
            "round" => "/v2/team/app/manifests/round".to_owned(),
            "nowhere" => "javascript:0".to_owned(),
            name => format!("{elsewhere}/{name}"),
        };
        respond(307, &[("location", &to)], "")
    })
    .await;
    let registry = fake.member();
    let read = async |name: &str| registry.manifest(&app(), &Address::Tag(tag(name))).await;
    assert_eq!(read("1").await.unwrap().unwrap().digest(), &Digest::of(&image()));
    assert_eq!(read("near").await.unwrap().unwrap().digest(), &Digest::of(&image()), "our own host sees them");
    let error = read("asks").await.unwrap_err();
    assert!(matches!(error, Error::Unexpected { .. }), "a stranger's challenge is not met: {error:?}");
    for missing in ["gone", "wrong"] {
        let error = read(missing).await.unwrap_err();
        assert!(matches!(error, Error::Unexpected { .. }), "a storage's 404 is not the registry's: {error:?}");
    }
    assert!(matches!(read("nowhere").await, Err(Error::Malformed { .. })));
    let before = fake.seen().len();
    let error = read("round").await.unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }), "{error:?}");
    assert_eq!(fake.seen().len() - before, 4, "three redirects at most");
    assert!(!storage.seen().is_empty());
    assert!(storage.seen().iter().all(|seen| seen.header("authorization").is_none()), "{:?}", storage.seen());

    let written = Fake::start(|_| respond(307, &[("location", "/elsewhere")], "")).await;
    let error = written.client().put_manifest(&app(), &one(), media_type::OCI_MANIFEST, image()).await.unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }), "{error:?}");
    assert!(error.to_string().contains(&format!("to {}", written.url(""))), "{error}");
    assert_eq!(written.seen().len(), 1, "writes are not redirected");
}
