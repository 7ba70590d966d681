//! Signatures per second and the time that one takes, through countersign's clients of KMSs and by the same requests made bare.

use std::future::Future;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aws_lc_rs::digest::{Digest, SHA256};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use countersign::clock::Clock;
use countersign::kms::{self, Algorithm, Environment, KeySpec};
use countersign::witness::{Witness, WitnessSettings};
use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, ObjectClass};
use cryptoki::slot::Slot;
use integration_tests::alibaba::{self, Fake, NEW};
use integration_tests::house::Keys;
use integration_tests::keys::{in_ministack, in_openbao};
use integration_tests::ministack::{Credentials, Ministack};
use integration_tests::openbao::OpenBao;
use integration_tests::softhsm::{MODULE, SoftHsm, TOKEN};
use integration_tests::{azure, google};
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde_json::json;
use tokio::task::JoinSet;

use crate::Scale;
use crate::report::{Aim, Cell, Table, float, median, milliseconds, number, percentile, text};
use crate::wire::Done;

/// Of the clouds' fakes: about as near as a KMS of the same region, so that what is compared is not this machine's processor with itself.
const DISTANCE: Duration = Duration::from_millis(5);
/// Of the key in the token.
const LABEL: &str = "release";

/// As many as a witness has under way at most.
const AT_ONCE: usize = 16;

pub async fn measure(scale: Scale) -> Result<Table> {
    let columns = ["P-256", "in flight", "ours/s", "bare/s", "of bare", "ours ms", "bare ms", "added ms"];
    let mut table = Table::new("kms", "Signatures of KMSs, by countersign's clients and by bare requests", &columns);

    let ministack = Ministack::start().await?;
    let (plan, _) = in_ministack(&ministack, &ministack.host(), Keys::P256).await?;
    let [(_, access_key_id), (_, secret_access_key)] = plan.environment.clone().try_into().ok().context("two variables")?;
    let who = Credentials { access_key_id, secret_access_key };
    let ours = witness(&plan.key_uri.context("a key")?, &plan.environment).await?;
    let bare = |digest: &[u8; 32]| {
        let message = STANDARD.encode(digest);
        let body =
            json!({"KeyId": "alias/release", "Message": message, "MessageType": "DIGEST", "SigningAlgorithm": "ECDSA_SHA_256"});
        let body = body.to_string();
        Request::new(format!("http://{}/", ministack.host()), ministack.kms_headers(&who, "Sign", &body), body)
    };
    compare(&mut table, scale, "ministack", &ours, bare, 1200).await?;

    let bao = OpenBao::start().await?;
    let (plan, token) = in_openbao(&bao, Keys::P256).await?;
    let ours = witness(&plan.key_uri.context("a key")?, &plan.environment).await?;
    let bare = |digest: &[u8; 32]| {
        let body = json!({"input": STANDARD.encode(digest), "prehashed": true, "key_version": 1, "marshaling_algorithm": "asn1"});
        let headers = [("x-vault-token", token.as_str()), ("content-type", "application/json"), ("x-vault-request", "true")];
        let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        Request::new(format!("{}/v1/transit/sign/release/sha2-256", bao.url()), headers, body.to_string())
    };
    compare(&mut table, scale, "OpenBao", &ours, bare, 6000).await?;

    #[expect(clippy::disallowed_methods, reason = "the fake has a clock of its own")]
    let fake = Fake::start(Arc::new(jiff::Timestamp::now)).await;
    fake.stand_off(DISTANCE);
    let names = ["ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET"];
    let environment: Vec<_> = names.into_iter().zip(alibaba::BASE.map(str::to_owned)).collect();
    let ours = witness(&format!("alibabakms://http://{}//key-ec/versions/{NEW}", fake.address), &environment).await?;
    let bare = |digest: &[u8; 32]| {
        let (query, headers) = fake.signing(digest);
        Request::new(format!("http://{}/?{query}", fake.address), headers, String::new())
    };
    compare(&mut table, scale, "Alibaba Cloud (fake)", &ours, bare, 6000).await?;

    #[expect(clippy::disallowed_methods, reason = "the fake has a clock of its own")]
    let fake = google::Fake::start(Arc::new(jiff::Timestamp::now)).await;
    fake.stand_off(DISTANCE);
    let account = tempfile::NamedTempFile::new()?;
    std::fs::write(account.path(), fake.service_account().to_string())?;
    let account = account.path().to_str().context("a path that is no text")?.to_owned();
    let version = "EC_SIGN_P256_SHA256/cryptoKeyVersions/10";
    let ours = witness(&fake.uri(version), &[("GOOGLE_APPLICATION_CREDENTIALS", account)]).await?;
    let bare = |digest: &[u8; 32]| {
        let (path, headers, body) = fake.signing(version, digest);
        Request::new(format!("http://{}{path}", fake.address), headers, body)
    };
    compare(&mut table, scale, "Google Cloud (fake)", &ours, bare, 6000).await?;

    #[expect(clippy::disallowed_methods, reason = "the fake has a clock of its own")]
    let fake = azure::Fake::start(Arc::new(jiff::Timestamp::now)).await;
    fake.stand_off(DISTANCE);
    let key = format!("EC-P256/{}", azure::NEW);
    let ours = witness(&fake.uri(&key), &fake.variables()).await?;
    let bare = |digest: &[u8; 32]| {
        let (path, headers, body) = fake.signing(&key, digest);
        Request::new(format!("http://{}{path}", fake.address), headers, body)
    };
    compare(&mut table, scale, "Azure (fake)", &ours, bare, 6000).await?;

    soft_hsm(&mut table, scale).await?;
    file(&mut table, scale).await?;
    table.note("ours: credentials, the request's signature, the KMS's answer, and its signature verified; bare: requests made beforehand, on one reqwest client");
    table.note(
        "the fakes of clouds answer after 5 ms, about as the nearest of their KMSs do; what is added is the same at any distance",
    );
    table.note("rounds of the two are interleaved; times and ratios are medians; KMSs and clients share the machine");
    table.close();
    Ok(table)
}

async fn witness(uri: &str, environment: &[(&'static str, String)]) -> Result<Arc<Witness>> {
    let key = uri.parse()?;
    let environment = Environment::of_all(environment.iter().map(|(name, value)| (*name, value.as_str())));
    let open = kms::open_in(&key, None, Clock::system(), &environment).await?;
    let settings = WitnessSettings {
        name: "bench".to_owned(),
        description: String::new(),
        key,
        login: None,
        verify: vec![],
        rate: None,
        pin: None,
    };
    Ok(Arc::new(Witness::from_key(&settings, open, Clock::system())?))
}

/// A request that is ready to be sent.
struct Request {
    url: String,
    headers: HeaderMap,
    body: Bytes,
}

impl Request {
    fn new(url: String, headers: Vec<(String, String)>, body: String) -> Self {
        let header = |(name, value): (String, String)| {
            let name = HeaderName::from_bytes(name.as_bytes()).expect("it is a header's name");
            (name, HeaderValue::from_str(&value).expect("it is a header's value"))
        };
        // The client says the same host itself.
        let headers = headers.into_iter().filter(|(name, _)| name != "host").map(header).collect();
        Self { url, headers, body: body.into() }
    }
}

async fn compare(
    table: &mut Table,
    scale: Scale,
    name: &str,
    ours: &Arc<Witness>,
    bare: impl Fn(&[u8; 32]) -> Request,
    count: usize,
) -> Result<()> {
    let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(30)).build()?;
    for (at_once, count) in [(1, scale.of(count / 4)), (AT_ONCE, scale.of(count))] {
        let mut rounds = Vec::new();
        // Another digest each time. The first round warms both up.
        for round in 0..=scale.rounds {
            let digests: Arc<Vec<[u8; 32]>> = Arc::new((0..count).map(|_| std::array::from_fn(|_| fastrand::u8(..))).collect());
            let requests: Arc<Vec<Request>> = Arc::new(digests.iter().map(&bare).collect());
            let http = http.clone();
            let asked = run(at_once, count, move |number| {
                let (http, requests) = (http.clone(), Arc::clone(&requests));
                async move {
                    let Request { url, headers, body } = &requests[number];
                    let sent = http.post(url).headers(headers.clone()).body(body.clone()).send().await?;
                    let (status, text) = (sent.status(), sent.bytes().await?);
                    ensure!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&text));
                    Ok(())
                }
            })
            .await?;
            let ours = Arc::clone(ours);
            let signed = run(at_once, count, move |number| {
                let (ours, digests) = (Arc::clone(&ours), Arc::clone(&digests));
                async move { Ok(ours.sign(Algorithm::EcdsaSha256, &digests[number]).await.map(drop)?) }
            })
            .await?;
            if round > 0 {
                rounds.push((signed, asked));
            }
        }
        row(table, name, at_once, rounds);
        if at_once == AT_ONCE {
            table.aim("of bare", Aim::AtLeast(0.9), format!("signatures of {name}, of those by bare requests"));
        }
    }
    Ok(())
}

/// A key in SoftHSM, beside bare calls of its module, a session for each that is under way. This process sees the token because
/// [`with_a_token`] has started it.
async fn soft_hsm(table: &mut Table, scale: Scale) -> Result<()> {
    let hsm = SoftHsm::here().context("this process sees no token")?;
    let ours = witness(&hsm.uri(LABEL), &[]).await?;
    let module = Pkcs11::new(MODULE)?;
    // The witness has done so.
    let _ = module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK));
    let slots = module.get_slots_with_initialized_token()?;
    let is_ours = |slot: &&Slot| module.get_token_info(**slot).is_ok_and(|token| token.label() == TOKEN);
    let slot = *slots.iter().find(is_ours).context("the token is there")?;
    let sessions = (0..AT_ONCE).map(|_| {
        let session = module.open_ro_session(slot)?;
        let wanted = [Attribute::Class(ObjectClass::PRIVATE_KEY), Attribute::Label(LABEL.into())];
        let key = *session.find_objects(&wanted)?.first().context("the key is there")?;
        anyhow::Ok(std::sync::Mutex::new((session, key)))
    });
    let sessions: Arc<Vec<_>> = Arc::new(sessions.collect::<Result<_>>()?);
    for (at_once, count) in [(1, scale.of(1500)), (AT_ONCE, scale.of(6000))] {
        let sessions = Arc::clone(&sessions);
        let bare = move |number: usize| {
            let sessions = Arc::clone(&sessions);
            async move {
                let signing = tokio::task::spawn_blocking(move || {
                    let held = sessions[number % at_once].lock();
                    let (session, key) = &*held.unwrap_or_else(std::sync::PoisonError::into_inner);
                    session.sign(&Mechanism::Ecdsa, *key, &[7; 32]).map(drop)
                });
                Ok(signing.await??)
            }
        };
        let rounds = beside(scale, &ours, at_once, count, bare).await?;
        row(table, "SoftHSM (bare: its module alone)", at_once, rounds);
    }
    Ok(())
}

/// Runs this command once more, as a process that sees a token with a key: a module reads from its environment which it sees.
pub fn with_a_token() -> Result<Option<ExitStatus>> {
    if SoftHsm::here().is_some() {
        return Ok(None);
    }
    let hsm = SoftHsm::start()?;
    hsm.key("EC:prime256v1", LABEL, 1)?;
    let mut again = Command::new(std::env::current_exe()?);
    Ok(Some(again.args(std::env::args_os().skip(1)).envs(hsm.there()).status()?))
}

/// A key in a file, beside the library that signs for it.
async fn file(table: &mut Table, scale: Scale) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("key.pem");
    kms::generate(KeySpec::EcP256, &path)?;
    let ours = witness(&format!("file://{}", path.display()), &[]).await?;
    let base64: String = std::fs::read_to_string(&path)?.lines().filter(|line| !line.starts_with('-')).collect();
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &STANDARD.decode(base64)?);
    let pair = Arc::new(pair.ok().context("it is a P-256 key")?);
    for at_once in [1, AT_ONCE] {
        let pair = Arc::clone(&pair);
        let bare = move |_| {
            let signed = Digest::import_less_safe(&[7; 32], &SHA256).map(|digest| pair.sign_digest(&digest).map(drop));
            async move { signed.ok().and_then(Result::ok).context("it does not sign") }
        };
        let rounds = beside(scale, &ours, at_once, scale.of(20_000), bare).await?;
        row(table, "file (bare: aws-lc-rs alone)", at_once, rounds);
    }
    Ok(())
}

/// Rounds of a witness that signs one digest, each after one of what is bare.
async fn beside<F: Future<Output = Result<()>> + Send>(
    scale: Scale,
    ours: &Arc<Witness>,
    at_once: usize,
    count: usize,
    bare: impl Fn(usize) -> F + Clone + Send + 'static,
) -> Result<Vec<(Done, Done)>> {
    let mut rounds = Vec::new();
    for _ in 0..scale.rounds {
        let bare = run(at_once, count, bare.clone()).await?;
        let ours = Arc::clone(ours);
        let signed = run(at_once, count, move |_| {
            let ours = Arc::clone(&ours);
            async move { Ok(ours.sign(Algorithm::EcdsaSha256, &[7; 32]).await.map(drop)?) }
        })
        .await?;
        rounds.push((signed, bare));
    }
    Ok(rounds)
}

fn row(table: &mut Table, name: &str, at_once: usize, rounds: Vec<(Done, Done)>) {
    let ratio = median(rounds.iter().map(|(ours, bare)| ours.per_second() / bare.per_second()));
    let (ours, bare) =
        (median(rounds.iter().map(|(ours, _)| ours.per_second())), median(rounds.iter().map(|(_, bare)| bare.per_second())));
    let mut times: [Vec<Duration>; 2] = [Vec::new(), Vec::new()];
    for (ours, bare) in rounds {
        times[0].extend(ours.each);
        times[1].extend(bare.each);
    }
    let [our_time, bare_time] = times.map(|mut times| percentile(&mut times, 0.5));
    let added: Cell = number((our_time.as_secs_f64() - bare_time.as_secs_f64()) * 1e3, 3);
    table.row([
        text(name),
        number(float(at_once), 0),
        number(ours, 0),
        number(bare, 0),
        number(ratio, 2),
        milliseconds(our_time),
        milliseconds(bare_time),
        added,
    ]);
}

/// Does it `count` times, `at_once` at a time.
async fn run<F: Future<Output = Result<()>> + Send>(
    at_once: usize,
    count: usize,
    one: impl Fn(usize) -> F + Clone + Send + 'static,
) -> Result<Done> {
    let next = Arc::new(AtomicUsize::new(0));
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..at_once {
        let (next, one) = (Arc::clone(&next), one.clone());
        tasks.spawn(async move {
            let mut each = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return anyhow::Ok(each);
                }
                let start = Instant::now();
                one(number).await?;
                each.push(start.elapsed());
            }
        });
    }
    let mut each = Vec::new();
    while let Some(ended) = tasks.join_next().await {
        each.extend(ended??);
    }
    Ok(Done { took: begun.elapsed(), each })
}
