//! The registry client against the real thing: Debian's `docker-registry`, without authentication, with a password file, and
//! with a token service of the test's own.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use countersign::{
    oci::{Digest, Repository, Tag, media_type},
    outcome::{Classify, Verdict},
    registry::{Address, Credentials, Error, Registry, Settings, Timeouts},
};
use integration_tests::{
    issuer::Issuer,
    recorder::{Exchange, Recorder},
    registry::{LOGIN, Options, Registry as Server},
};
use reqwest::{Method, StatusCode};
use tokio::task::JoinSet;

const CONFIG: &[u8] = b"{}";
const PASSWORD: &str = "correct horse";

/// A registry, and what was asked of it: it writes its own log when it has answered, which may be too late to be counted.
struct Site {
    server: Server,
    recorder: Recorder,
}

impl Site {
    async fn start(options: Options) -> Self {
        let server = Server::start_with(options).await.unwrap();
        let recorder = Recorder::start(&server.host()).await.unwrap();
        Self { server, recorder }
    }

    async fn open() -> Self {
        Self::start(Options::default()).await
    }

    async fn with_tokens(issuer: &Arc<Issuer>) -> Self {
        Self::start(Options { tokens: Some(issuer.clone()), ..Options::default() }).await
    }

    fn count(&self, is_meant: impl Fn(&Exchange) -> bool) -> usize {
        self.recorder.exchanges().iter().filter(|exchange| is_meant(exchange)).count()
    }

    fn uploads(&self) -> usize {
        self.count(|exchange| exchange.method == Method::POST)
    }

    fn answered(&self, status: StatusCode) -> usize {
        self.count(|exchange| exchange.status == status)
    }
}

fn client(site: &Site, credentials: Option<(&str, &str)>) -> Registry {
    let credentials =
        credentials.map(|(username, password)| Credentials { username: username.into(), password: password.to_owned().into() });
    let url: reqwest::Url = site.recorder.url().parse().unwrap();
    let name = url.authority().parse().unwrap();
    Registry::new(Settings { name, url, credentials, ca: None, timeouts: Timeouts::default(), observer: None }).unwrap()
}

fn repository(name: &str) -> Repository {
    name.parse().unwrap()
}

fn tag(name: &str) -> Tag {
    name.parse().unwrap()
}

/// A small image manifest over the config `{}` and one layer.
fn manifest(layer: &[u8]) -> Bytes {
    let descriptor = |media_type: &str, content: &[u8]| serde_json::json!({ "mediaType": media_type, "digest": Digest::of(content), "size": content.len() });
    serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2,
        "mediaType": media_type::OCI_MANIFEST,
        "config": descriptor(media_type::OCI_CONFIG, CONFIG),
        "layers": [descriptor("application/octet-stream", layer)],
    }))
    .unwrap()
    .into()
}

/// Pushes [`manifest`] of `layer` and returns its digest.
async fn push(registry: &Registry, repository: &Repository, name: &str, layer: &'static [u8]) -> Result<Digest, Error> {
    registry.ensure_blob(repository, Bytes::from_static(CONFIG)).await?;
    registry.ensure_blob(repository, Bytes::from_static(layer)).await?;
    let content = manifest(layer);
    registry.put_manifest(repository, &tag(name).into(), media_type::OCI_MANIFEST, content.clone()).await?;
    Ok(Digest::of(&content))
}

#[tokio::test]
async fn what_is_pushed_is_read_back_by_tag_and_by_digest() {
    let site = Site::open().await;
    let registry = client(&site, None);
    let app = repository("team/app");
    registry.ping().await.unwrap();
    assert_eq!(registry.manifest(&app, &tag("1.0").into()).await.unwrap(), None, "an unknown repository");
    assert_eq!(registry.resolve(&app, &tag("1.0")).await.unwrap(), None);
    assert_eq!(registry.tags(&app).await.unwrap(), []);

    let digest = push(&registry, &app, "1.0", b"layer").await.unwrap();
    let by_tag = registry.manifest(&app, &tag("1.0").into()).await.unwrap().unwrap();
    let by_digest = registry.manifest(&app, &digest.clone().into()).await.unwrap().unwrap();
    assert_eq!(by_tag, by_digest);
    assert_eq!((by_tag.digest(), by_tag.media_type()), (&digest, media_type::OCI_MANIFEST));
    assert_eq!(by_tag.content(), &manifest(b"layer"));
    assert_eq!(registry.resolve(&app, &tag("1.0")).await.unwrap(), Some(digest.clone()));

    assert_eq!(registry.manifest(&app, &tag("2.0").into()).await.unwrap(), None, "an unknown tag");
    assert_eq!(registry.manifest(&app, &Digest::of(b"none").into()).await.unwrap(), None, "an unknown digest");
    assert_eq!(registry.resolve(&app, &tag("2.0")).await.unwrap(), None);

    let layer = Digest::of(b"layer");
    assert_eq!(registry.blob(&app, &layer, 5).await.unwrap().as_deref(), Some(&b"layer"[..]));
    assert!(matches!(registry.blob(&app, &layer, 4).await, Err(Error::Oversized { .. })));
    assert_eq!(registry.blob(&app, &Digest::of(b"none"), 5).await.unwrap(), None);
    assert_eq!(registry.blob(&repository("other"), &layer, 5).await.unwrap(), None, "blobs belong to their repository");

    let content = manifest(b"layer");
    registry.put_manifest(&app, &Address::Digest(digest), media_type::OCI_MANIFEST, content).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_many_want_at_once_is_uploaded_once() {
    let site = Site::open().await;
    let registry = client(&site, None);
    let app = repository("app");
    let mut tasks = JoinSet::new();
    for n in 0..32 {
        let (registry, app) = (registry.clone(), app.clone());
        tasks.spawn(async move { push(&registry, &app, &format!("t{n}"), b"layer").await.unwrap() });
    }
    let digests = tasks.join_all().await;
    assert_eq!(digests.iter().collect::<BTreeSet<_>>().len(), 1);
    assert_eq!(site.uploads(), 2, "the config and the layer");

    registry.forget_blob(&app, &Digest::of(CONFIG));
    registry.ensure_blob(&app, Bytes::from_static(CONFIG)).await.unwrap();
    registry.ensure_blob(&app, Bytes::from_static(CONFIG)).await.unwrap();
    registry.ensure_blob(&repository("other"), Bytes::from_static(CONFIG)).await.unwrap();
    assert_eq!(site.uploads(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_is_read_while_it_is_written_is_read_all_the_same() {
    let site = Site::open().await;
    let registry = client(&site, None);
    let app = repository("app");
    let digest = push(&registry, &app, "busy", b"layer").await.unwrap();
    let mut tasks = JoinSet::new();
    for writer in 0..4 {
        let (registry, app, digest) = (registry.clone(), app.clone(), digest.clone());
        tasks.spawn(async move {
            for _ in 0..100 {
                if writer == 0 {
                    push(&registry, &app, "busy", b"layer").await.unwrap();
                } else {
                    let read = registry.manifest(&app, &tag("busy").into()).await.unwrap().unwrap();
                    assert_eq!(read.digest(), &digest);
                    assert_eq!(registry.resolve(&app, &tag("busy")).await.unwrap().as_ref(), Some(&digest));
                }
            }
        });
    }
    tasks.join_all().await;
}

/// Notation deletes the index that it has replaced: who reads the tag in between is told of a manifest that is not there.
#[tokio::test]
async fn a_tag_whose_manifest_is_being_deleted_is_asked_for_again_before_it_counts_as_none() {
    let site = Site::open().await;
    let registry = client(&site, None);
    let app = repository("app");
    let digest = push(&registry, &app, "moved", b"layer").await.unwrap();
    let absent = || site.count(|exchange| exchange.status == StatusCode::NOT_FOUND && exchange.path.contains("/manifests/"));
    assert_eq!(registry.manifest(&app, &tag("never").into()).await.unwrap(), None);
    assert_eq!(absent(), 1);
    site.server.delete_revision(app.as_str(), digest.as_str()).unwrap();
    assert_eq!(registry.manifest(&app, &tag("moved").into()).await.unwrap(), None);
    assert!(absent() > 2, "{:#?}", site.recorder.exchanges());
    let now = push(&registry, &app, "moved", b"another layer").await.unwrap();
    let read = registry.manifest(&app, &tag("moved").into()).await.unwrap();
    assert_eq!(read.map(|manifest| manifest.digest().clone()), Some(now));
}

#[tokio::test]
async fn a_manifest_whose_blobs_are_missing_asks_for_them_again() {
    let site = Site::open().await;
    let registry = client(&site, None);
    let app = repository("app");
    registry.ensure_blob(&app, Bytes::from_static(CONFIG)).await.unwrap();
    let content = manifest(b"never uploaded");
    let error = registry.put_manifest(&app, &tag("1").into(), media_type::OCI_MANIFEST, content).await.unwrap_err();
    assert!(matches!(error, Error::BlobUnknown { .. }), "{error:?}");
    assert_eq!(error.verdict(), Verdict::TRANSIENT);
    assert!(error.to_string().contains("MANIFEST_BLOB_UNKNOWN"), "{error}");
    registry.ensure_blob(&app, Bytes::from_static(CONFIG)).await.unwrap();
    assert_eq!(site.uploads(), 2, "what was known of the repository's blobs is forgotten");
}

#[tokio::test]
async fn a_manifest_that_the_registry_does_not_take_is_refused_with_the_registrys_words() {
    let site = Site::open().await;
    let registry = client(&site, None);
    let content = manifest(b"served as another type");
    let error =
        registry.put_manifest(&repository("app"), &tag("1").into(), media_type::DOCKER_MANIFEST, content).await.unwrap_err();
    assert!(matches!(error, Error::Rejected { .. }), "{error:?}");
    assert!(matches!(error.verdict(), Verdict::Refuse { .. }));
    assert!(error.to_string().contains("MANIFEST_INVALID"), "{error}");
}

#[tokio::test]
async fn long_listings_are_read_page_by_page() {
    let site = Site::open().await;
    let registry = client(&site, None);
    let mut expected = Vec::new();
    for n in 0..205 {
        let name = format!("r{n:04}");
        push(&registry, &repository(&name), "1", b"layer").await.unwrap();
        expected.push(repository(&name));
    }
    assert_eq!(registry.repositories().await.unwrap(), expected);
    assert_eq!(site.count(|exchange| exchange.path.starts_with("/v2/_catalog")), 3);

    let app = repository("app");
    for name in ["1.0", "1.1", "latest"] {
        push(&registry, &app, name, b"layer").await.unwrap();
    }
    let tags: BTreeSet<_> = registry.tags(&app).await.unwrap().into_iter().collect();
    assert_eq!(tags, ["1.0", "1.1", "latest"].map(tag).into());
}

#[tokio::test]
async fn a_password_is_asked_for_once_and_then_sent_without_being_asked() {
    let site = Site::start(Options { login: true, ..Options::default() }).await;
    let registry = client(&site, Some(LOGIN));
    let app = repository("app");
    registry.ping().await.unwrap();
    push(&registry, &app, "1", b"layer").await.unwrap();
    assert_eq!(site.answered(StatusCode::UNAUTHORIZED), 1);

    for (credentials, account) in [(Some(("ann", "wrong")), "\"ann\""), (None, "without an account")] {
        let error = client(&site, credentials).ping().await.unwrap_err();
        assert!(matches!(error, Error::Unauthorized { .. }), "{error:?}");
        assert!(matches!(error.verdict(), Verdict::Refuse { .. }));
        let text = format!("{error} {error:?}");
        assert!(text.contains(account) && !text.contains("wrong"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_asked_for_once_per_repository_and_right() {
    let issuer = Arc::new(Issuer::start(PASSWORD).await.unwrap());
    let site = Site::with_tokens(&issuer).await;
    let registry = client(&site, Some(("ann", PASSWORD)));
    registry.ping().await.unwrap();
    let app = repository("team/app");
    let mut tasks = JoinSet::new();
    for n in 0..16 {
        let (registry, app) = (registry.clone(), app.clone());
        tasks.spawn(async move {
            registry.manifest(&app, &tag("1").into()).await.unwrap();
            push(&registry, &app, &format!("t{n}"), b"layer").await.unwrap()
        });
    }
    tasks.join_all().await;
    registry.repositories().await.unwrap();
    let mut scopes = issuer.scopes();
    scopes.sort();
    let expected = ["", "registry:catalog:*", "repository:team/app:pull", "repository:team/app:pull,push"];
    assert_eq!(scopes, expected, "one token each");
    assert_eq!(site.answered(StatusCode::UNAUTHORIZED), 1, "asked for a token once, then sent without being asked");
}

#[tokio::test]
async fn an_account_without_the_right_to_push_is_told_so_and_by_name() {
    let issuer = Arc::new(Issuer::start(PASSWORD).await.unwrap());
    let site = Site::with_tokens(&issuer).await;
    let reader = client(&site, Some((Issuer::READER, PASSWORD)));
    let app = repository("team/app");
    push(&client(&site, Some(("ann", PASSWORD))), &app, "1", b"layer").await.unwrap();
    reader.manifest(&app, &tag("1").into()).await.unwrap().unwrap();
    let before = issuer.scopes().len();
    let error = push(&reader, &app, "2", b"layer").await.unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("\"reader\"") && text.contains("push to this repository") && text.contains("team/app"), "{text}");
    assert_eq!(issuer.scopes().len(), before + 1, "a fresh token that lacks the right is not asked for again");

    let stranger = client(&site, Some(("ann", "wrong")));
    let error = stranger.manifest(&app, &tag("1").into()).await.unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error:?}");
    assert!(error.to_string().contains("get a token to pull from team/app"), "{error}");
}

#[tokio::test]
async fn a_token_is_renewed_before_it_expires() {
    let issuer = Arc::new(Issuer::start(PASSWORD).await.unwrap());
    issuer.expire_after(1);
    let site = Site::with_tokens(&issuer).await;
    let registry = client(&site, Some(("ann", PASSWORD)));
    let app = repository("app");
    let began = std::time::Instant::now();
    for _ in 0..10 {
        registry.manifest(&app, &tag("1").into()).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    let (asked, seconds) = (issuer.scopes().len(), began.elapsed().as_secs());
    assert!(asked >= 2 && asked <= 4 + 2 * usize::try_from(seconds).unwrap(), "{asked} tokens in {seconds} seconds");
    assert_eq!(site.answered(StatusCode::UNAUTHORIZED), 1, "never with an expired one");
}
