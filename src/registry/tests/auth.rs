//! Registries that ask for credentials, and try to have them sent elsewhere.

use super::*;
use crate::outcome::{Classify, Verdict};

fn challenge(value: &str) -> Response {
    respond(401, &[("www-authenticate", value)], r#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#)
}

/// A token service that gives every comer a token.
async fn service() -> Fake {
    Fake::start(|_| respond(200, &[], r#"{"token":"t0ken-t0ken","expires_in":300}"#)).await
}

fn bearer(service: &Fake) -> String {
    format!(r#"Bearer realm="{}",service="registry",scope="repository:team/app:pull""#, service.url("/token"))
}

#[tokio::test]
async fn a_registry_that_is_never_content_is_asked_twice_at_most() {
    let service = service().await;
    let value = bearer(&service);
    let fake = Fake::start(move |_| challenge(&value)).await;
    let registry = fake.member();
    let error = registry.manifest(&app(), &one()).await.unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error:?}");
    assert!(matches!(error.verdict(), Verdict::Refuse { .. }));
    assert_eq!((fake.seen().len(), service.seen().len()), (2, 1));
    let error = registry.manifest(&app(), &one()).await.unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error:?}");
    assert_eq!((fake.seen().len(), service.seen().len()), (4, 2), "the kept token, then a fresh one");

    let basic = Fake::start(|_| challenge("Basic realm=\"x\"")).await;
    let registry = basic.member();
    for requests in [2, 3] {
        assert!(matches!(registry.ping().await, Err(Error::Unauthorized { .. })));
        assert_eq!(basic.seen().len(), requests);
    }
    let mute = Fake::start(|_| status(401)).await;
    assert!(matches!(mute.member().ping().await, Err(Error::Unauthorized { .. })));
    assert_eq!(mute.seen().len(), 1);
}

#[tokio::test]
async fn a_token_that_is_revoked_early_is_replaced() {
    let count = Arc::new(AtomicUsize::new(0));
    let counter = count.clone();
    let service = Fake::start(move |_| {
        let token = counter.fetch_add(1, SeqCst);
        respond(200, &[], format!(r#"{{"access_token":"t{token}"}}"#))
    })
    .await;
    let value = bearer(&service);
    let valid = Arc::new(AtomicUsize::new(0));
    let now = valid.clone();
    let fake = Fake::start(move |seen| {
        let good = format!("Bearer t{}", now.load(SeqCst));
        if seen.header("authorization") == Some(&good) { serve_image() } else { challenge(&value) }
    })
    .await;
    let registry = fake.member();
    registry.manifest(&app(), &one()).await.unwrap().unwrap();
    registry.manifest(&app(), &one()).await.unwrap().unwrap();
    valid.store(1, SeqCst);
    registry.manifest(&app(), &one()).await.unwrap().unwrap();
    registry.manifest(&app(), &one()).await.unwrap().unwrap();
    assert_eq!(count.load(SeqCst), 2);
}

#[tokio::test]
async fn credentials_go_to_no_token_service_without_https_on_another_host() {
    let fake = Fake::start(|_| challenge(r#"Bearer realm="http://collector.example.com/token",service="registry""#)).await;
    let error = fake.member().ping().await.unwrap_err();
    assert!(matches!(error, Error::Elsewhere { .. }), "{error:?}");
    assert!(error.to_string().contains("http://collector.example.com"), "{error}");

    let registry = Registry::new(settings("https://registry.example.com")).unwrap();
    let grant = super::super::auth::Grant { repository: None, access: super::super::auth::Access::Enter };
    for good in ["https://auth.example.com/token", "https://registry.example.com/token?x=y"] {
        assert!(registry.realm(&grant, good).is_ok(), "{good}");
    }
    for bad in [
        "http://auth.example.com/token",
        "http://registry.example.com/token",
        "http://127.0.0.1/token",
        "http://localhost/token",
        "https://u:p@auth.example.com/token",
        "ftp://auth.example.com",
        "file:///etc/passwd",
        "/token",
        "",
    ] {
        assert!(registry.realm(&grant, bad).is_err(), "{bad}");
    }
    let plain = Registry::new(settings("http://registry.example.com:5000")).unwrap();
    assert!(plain.realm(&grant, "http://registry.example.com:5001/token").is_ok());
    assert!(plain.realm(&grant, "http://127.0.0.1/token").is_err(), "only a registry on this machine");
    let local = Registry::new(settings("http://[::1]:5000")).unwrap();
    assert!(local.realm(&grant, "http://localhost:5001/token").is_ok());
}

#[tokio::test]
async fn anonymous_clients_get_tokens_too_and_say_so_when_that_is_not_enough() {
    let service = service().await;
    let value = bearer(&service);
    let fake = Fake::start(move |seen| match (seen.header("authorization"), &seen.method) {
        (Some("Bearer t0ken-t0ken"), &Method::GET) => serve_image(),
        _ => challenge(&value),
    })
    .await;
    let registry = fake.client();
    registry.manifest(&app(), &one()).await.unwrap().unwrap();
    assert!(service.seen().iter().all(|seen| seen.header("authorization").is_none()));
    assert!(service.seen()[0].is("GET", "/token?service=registry&scope=repository%3Ateam%2Fapp%3Apull"), "{:?}", service.seen());
    let error = registry.ensure_blob(&app(), Bytes::new()).await.unwrap_err();
    assert!(error.to_string().contains("a client without an account is not let in, or may not push"), "{error}");
}

#[tokio::test]
async fn a_failing_token_service_is_asked_once_by_all_who_wait() {
    let service = Fake::start(|_| {
        std::thread::sleep(Duration::from_millis(30));
        respond(503, &[("retry-after", "9")], "")
    })
    .await;
    let value = bearer(&service);
    let fake = Fake::start(move |_| challenge(&value)).await;
    let registry = fake.member();
    let reads = (0..16).map(|_| async { registry.manifest(&app(), &one()).await.unwrap_err() });
    for error in futures::future::join_all(reads).await {
        assert!(matches!(error, Error::ServerError { .. }), "{error:?}");
        assert_eq!(error.verdict(), Verdict::Retry { after: Some(Duration::from_secs(9)), throttled: false });
    }
    assert!(service.seen().len() <= 2, "{}", service.seen().len());
}

#[tokio::test]
async fn nonsense_from_a_token_service_is_an_error_that_shows_none_of_it() {
    for answer in ["", "[]", "{}", r#"{"token":""}"#, r#"{"token":"s3cret\nX-Evil: 1"}"#, r#"{"token":7,"x":"s3cret"}"#, "s3cret"]
    {
        let service = Fake::start(move |_| respond(200, &[], answer)).await;
        let value = bearer(&service);
        let fake = Fake::start(move |_| challenge(&value)).await;
        let error = fake.member().manifest(&app(), &one()).await.unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{answer}: {error:?}");
        assert!(!format!("{error} {error:?}").contains("s3cret"), "{error:?}");
    }
    let service = Fake::start(|_| respond(302, &[("location", "http://elsewhere.example.com/")], "")).await;
    let value = bearer(&service);
    let fake = Fake::start(move |_| challenge(&value)).await;
    let error = fake.member().manifest(&app(), &one()).await.unwrap_err();
    assert!(matches!(error, Error::Unexpected { .. }), "credentials follow no redirect: {error:?}");
}

#[tokio::test]
async fn no_secret_is_in_any_message_or_debug_output() {
    let service = service().await;
    let value = bearer(&service);
    let fake = Fake::start(move |seen| match seen.header("authorization") {
        None => challenge(&value),
        Some(authorization) => {
            let token = authorization.split_once(' ').unwrap().1;
            refuse(400, token, &format!("you sent {authorization} and the password {PASSWORD}"))
        }
    })
    .await;
    let registry = fake.member();
    let error = registry.manifest(&app(), &one()).await.unwrap_err();
    let text = format!("{error} {error:?} {registry:?} {:?}", fake.settings());
    assert!(text.contains("withheld"), "{text}");
    assert!(!text.contains("t0ken") && !text.contains(PASSWORD), "{text}");

    let basic = Fake::start(|seen| match seen.header("authorization") {
        None => challenge("Basic"),
        Some(authorization) => refuse(403, "DENIED", authorization),
    })
    .await;
    let error = basic.member().ping().await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error:?}");
    assert!(error.to_string().contains("withheld"), "{error}");

    let mut careless = settings("https://ann:hunter2-hunter2@registry.example.com");
    let text = format!("{careless:?}");
    assert!(!text.contains(PASSWORD), "{text}");
    let error = Registry::new(careless.clone()).unwrap_err();
    assert!(!format!("{error} {error:?}").contains(PASSWORD), "{error:?}");
    careless.url = "https://registry.example.com/?token=hunter2-hunter2".parse().unwrap();
    let error = Registry::new(careless).unwrap_err();
    assert!(!format!("{error} {error:?}").contains(PASSWORD), "{error:?}");
}

#[tokio::test]
async fn settings_that_cannot_work_are_refused_at_once() {
    let wrong = |change: fn(&mut Settings)| {
        let mut settings = settings("https://registry.example.com");
        change(&mut settings);
        let error = Registry::new(settings).unwrap_err();
        assert!(matches!(error, Error::Settings { .. }), "{error:?}");
        error.to_string()
    };
    assert!(wrong(|s| s.url = "ftp://registry.example.com".parse().unwrap()).contains("https://"));
    assert!(wrong(|s| s.ca = Some(b"no certificate".to_vec())).contains("PEM"));
    assert!(wrong(|s| s.credentials.as_mut().unwrap().username = "a:b".into()).contains("colon"));
    let nested = Registry::new(settings("https://artifacts.example.com/api/docker/main/")).unwrap();
    assert_eq!(nested.0.base, "https://artifacts.example.com/api/docker/main/v2/");
}

/// As Harbor has it in a project that lets only signed images be pulled: one that is not signed yet may be read by who may push and is
/// called cosign, and by nobody else.
#[tokio::test]
async fn an_image_that_may_not_be_pulled_unsigned_is_read_by_the_right_to_push() {
    let rights = |may_push: bool| {
        Fake::start(move |seen| {
            let scope = if seen.target.contains("push") && may_push { "pull,push" } else { "pull" };
            respond(200, &[], format!(r#"{{"token":"{scope}","expires_in":300}}"#))
        })
    };
    for may_push in [true, false] {
        let service = rights(may_push).await;
        let value = bearer(&service);
        let fake = Fake::start(move |seen| match seen.header("authorization") {
            Some("Bearer pull,push") if seen.header("user-agent").unwrap().contains("cosign") => serve_image(),
            Some(_) => refuse(412, "PROJECTPOLICYVIOLATION", "The image is not signed by cosign."),
            None => challenge(&value),
        })
        .await;
        let registry = fake.member();
        let read = registry.manifest(&app(), &one()).await;
        if may_push {
            read.unwrap().unwrap();
            assert_eq!((fake.seen().len(), service.seen().len()), (3, 2), "the challenge, the refusal, the image");
            continue;
        }
        let error = read.unwrap_err();
        assert!(matches!(error, Error::Policy { .. }), "{error:?}");
        let Verdict::Refuse { cure } = error.verdict() else { panic!("{error:?}") };
        assert!(cure.contains("to push to this repository"), "{cure}");
        assert!(fake.seen().len() <= 4, "{:?}", fake.seen());
    }
}
