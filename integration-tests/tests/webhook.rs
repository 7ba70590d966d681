//! The webhook as a server: its certificate is replaced while it runs, one of its replicas may die, and its memory has a bound.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::future::{join, try_join_all};
use integration_tests::endless::Endless;
use integration_tests::fake::pair;
use integration_tests::house::{House, Plan};
use integration_tests::image::Image;
use integration_tests::process::{eventually, memory, scratch};
use integration_tests::webhook::{Answer, POLICY, Webhook, pod, review, settings, witnessed};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(60);

/// An authority, and certificates of it for 127.0.0.1.
struct Certificates(TempDir);

impl Certificates {
    fn begin() -> Result<Self> {
        let this = Self(scratch()?);
        fs::write(this.path("extensions"), "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")?;
        this.openssl(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN=authority -keyout ca.key -out ca.pem",
        )?;
        Ok(this)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `NAME.pem` and `NAME.key`; returns what is in them, and the certificate as DER.
    fn issue(&self, name: &str) -> Result<Issued> {
        self.openssl(&format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr"
        ))?;
        self.openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 -extfile extensions -out {name}.pem"
        ))?;
        self.openssl(&format!("x509 -in {name}.pem -outform DER -out {name}.der"))?;
        let read = |suffix: &str| fs::read(self.path(&format!("{name}.{suffix}")));
        Ok(Issued { pem: read("pem")?, key: read("key")?, der: read("der")? })
    }

    fn openssl(&self, arguments: &str) -> Result<()> {
        let output = Command::new("openssl").args(arguments.split(' ')).current_dir(self.0.path()).output()?;
        ensure!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

struct Issued {
    pem: Vec<u8>,
    key: Vec<u8>,
    der: Vec<u8>,
}

/// A cluster's configuration without a registry to ask: these tests need none.
const NO_REGISTRY: &str = "[[registry]]\nname = \"127.0.0.1:9\"\n";

#[tokio::test]
async fn a_certificate_in_files_is_replaced_when_both_are_and_a_half_replaced_one_changes_nothing() -> Result<()> {
    let certificates = Certificates::begin()?;
    let (first, second) = (certificates.issue("first")?, certificates.issue("second")?);
    let (certificate, key) = (certificates.path("tls.crt"), certificates.path("tls.key"));
    put(&certificate, &first.pem)?;
    put(&key, &first.key)?;
    let root = fs::read(certificates.path("ca.pem"))?;
    let webhook = Webhook::start_with_files(NO_REGISTRY, &certificate, &key, &[&root]).await?;
    assert_eq!(webhook.served().await?, first.der);

    // Whoever replaces them does one after the other: the new certificate does not go with the old key.
    put(&certificate, &second.pem)?;
    let told = async || Ok(webhook.logged().contains("the certificate cannot be renewed: it stays as it was").then_some(()));
    eventually("it is told that they do not belong together", LIMIT, told).await?;
    assert_eq!(webhook.served().await?, first.der);

    put(&key, &second.key)?;
    let replaced = async || Ok((webhook.served().await? == second.der).then_some(()));
    eventually("the second certificate is served, without being told to", LIMIT, replaced).await?;
    assert!(webhook.create("payments", "nothing/is:demanded").await?.allowed);

    // Gone for a moment, as a mounted Secret can be: no reason to stop.
    fs::remove_file(&certificate)?;
    webhook.signal(Signal::HUP)?;
    let told = async || Ok(webhook.logged().contains("tls.crt").then_some(()));
    eventually("it is told that there is none", LIMIT, told).await?;
    assert_eq!(webhook.served().await?, second.der);
    let third = certificates.issue("third")?;
    put(&certificate, &third.pem)?;
    put(&key, &third.key)?;
    webhook.signal(Signal::HUP)?;
    let replaced = async || Ok((webhook.served().await? == third.der).then_some(()));
    eventually("the third certificate is served", LIMIT, replaced).await
}

/// A whole file or none, as whoever rotates secrets writes them.
fn put(path: &Path, content: &[u8]) -> Result<()> {
    let aside = path.with_extension("new");
    fs::write(&aside, content)?;
    Ok(fs::rename(aside, path)?)
}

#[tokio::test]
async fn its_own_certificate_is_made_anew_while_it_runs_and_the_authority_stays() -> Result<()> {
    let mut webhook = Webhook::start(NO_REGISTRY).await?;
    let first = webhook.served().await?;
    assert_eq!(webhook.served().await?, first, "one for all connections");
    webhook.signal(Signal::HUP)?;
    // Every call trusts nothing but the authority that was there at the start.
    let renewed = async || Ok((webhook.served().await? != first).then_some(()));
    eventually("another certificate is served", LIMIT, renewed).await?;
    assert!(webhook.create("payments", "nothing/is:demanded").await?.allowed);

    let other = webhook.replica().await?;
    assert_ne!(other.served().await?, webhook.served().await?, "the authority is shared, and no key that is served");
    webhook.kill()?;
    webhook.start_again().await?;
    webhook.served().await?;
    Ok(())
}

/// What stands between an API server and the replicas: each review goes to the next of them. Asked again, once and of the other one, is what
/// got no whole answer: its connection was refused, or ended first. What was answered is never asked again, and what takes too
/// long is an error.
struct Service<'a> {
    replicas: [&'a Webhook; 2],
    next: AtomicUsize,
    answered: AtomicUsize,
    refused: AtomicUsize,
    cut: AtomicUsize,
}

impl<'a> Service<'a> {
    fn of(replicas: [&'a Webhook; 2]) -> Self {
        let zero = AtomicUsize::default;
        Self { replicas, next: zero(), answered: zero(), refused: zero(), cut: zero() }
    }

    async fn create(&self, image: &str) -> Result<Answer> {
        let turn = self.next.fetch_add(1, Relaxed);
        let answer = match self.replicas[turn % 2].create("payments", image).await {
            Ok(answer) => answer,
            Err(error) => {
                let cause = error.downcast_ref::<reqwest::Error>().filter(|cause| !cause.is_timeout());
                let counter = match cause.with_context(|| format!("no answer, and no broken connection: {error:#}"))? {
                    cause if cause.is_connect() => &self.refused,
                    cause if cause.is_request() || cause.is_body() || cause.is_decode() => &self.cut,
                    _ => return Err(error),
                };
                counter.fetch_add(1, Relaxed);
                self.replicas[(turn + 1) % 2].create("payments", image).await.context("the other one did not answer either")?
            }
        };
        self.answered.fetch_add(1, Relaxed);
        Ok(answer)
    }
}

#[tokio::test]
async fn a_crash_of_one_replica_under_load_loses_no_review_that_the_other_can_answer() -> Result<()> {
    const CLIENTS: usize = 20;
    const EACH: usize = 50;
    let house = House::start(Plan::default()).await?;
    let mut images = vec![];
    for number in 0..12 {
        let image = Image::oci(&format!("replica {number}"))?;
        let (signed, tag) = (number % 3 != 0, format!("1.{number}"));
        // The rule signs what is in `team`.
        let repository = if signed { "team/app" } else { "other/app" };
        house.push(&image, repository, &[&tag]).await?;
        if signed {
            house.wait_signed(repository, &image.manifest.digest, &[&tag]).await?;
        }
        images.push((house.reference(repository, &image.manifest.digest), signed));
    }
    let mut one = Webhook::start(&witnessed(&house, POLICY)).await?;
    let other = one.replica().await?;
    let client = async |service: &Service<'_>, number: usize| {
        for turn in 0..EACH {
            let (image, signed) = &images[(number * 5 + turn) % images.len()];
            let began = Instant::now();
            let answer = service.create(image).await?;
            ensure!(began.elapsed() < Duration::from_secs(30), "{image}: only after {:?}", began.elapsed());
            if *signed {
                ensure!(answer.allowed, "{answer:?}");
            } else {
                ensure!(answer.why(image)?.contains("it is not signed"), "{answer:?}");
            }
        }
        anyhow::Ok(())
    };

    // Neither knows an image: the one that is left has verified but a part of them when the other dies.
    let service = Service::of([&one, &other]);
    let crash = async {
        let under_load = async || Ok((service.answered.load(Relaxed) >= CLIENTS * EACH / 4).then_some(()));
        eventually("a quarter is answered", LIMIT, under_load).await?;
        one.signal(Signal::KILL)
    };
    let (clients, crash) = join(try_join_all((0..CLIENTS).map(|number| client(&service, number))), crash).await;
    clients?;
    crash?;
    let (refused, cut) = (service.refused.load(Relaxed), service.cut.load(Relaxed));
    println!("{CLIENTS} clients, {} reviews: {cut} cut by the crash, {refused} refused after it", CLIENTS * EACH);
    assert_eq!(service.answered.load(Relaxed), CLIENTS * EACH);
    assert!(cut <= CLIENTS, "no more than were under way: {cut}");
    assert!(refused > 0, "the crash came before the end");

    // Back, it takes its share again, and nothing is refused.
    one.start_again().await?;
    let service = Service::of([&one, &other]);
    try_join_all((0..CLIENTS).map(|number| client(&service, number))).await?;
    assert_eq!((service.refused.load(Relaxed), service.cut.load(Relaxed)), (0, 0));
    assert!(one.metrics().await?.count("countersign_admission_review_seconds_count", &[("endpoint", "validate")]) >= 400);
    Ok(())
}

#[tokio::test]
async fn what_is_remembered_of_ever_more_images_has_a_bound() -> Result<()> {
    const AT_ONCE: u64 = 8;
    let (registry, folder) = (Endless::start().await?, scratch()?);
    let key = folder.path().join("release.pub.pem");
    registry.write_public_key(&key)?;
    let rest = format!("cache = {{ entries = 256 }}\n{POLICY}");
    let webhook = Webhook::start(&settings(registry.host(), &format!("http://{}", registry.host()), &key, &rest)).await?;
    let pid = webhook.pid().context("it runs")?;
    let verify = async |numbers: std::ops::Range<u64>| {
        let client = async |first: u64| {
            for number in numbers.clone().skip(usize::try_from(first)?).step_by(usize::try_from(AT_ONCE)?) {
                let answer = webhook.create("payments", &registry.reference(number)).await?;
                ensure!(answer.allowed, "{number}: {answer:?}");
            }
            anyhow::Ok(())
        };
        try_join_all((0..AT_ONCE).map(client)).await?;
        memory(pid, "VmRSS")
    };
    let full = verify(0..1_000).await?;
    let end = verify(1_000..5_000).await?;
    println!("{full:.1} MiB resident with 1,000 images asked for, {end:.1} MiB with 5,000");
    // What is known of 4,000 more takes 5 MiB.
    assert!(end < full + 2.0, "{full} MiB became {end} MiB");
    let metrics = webhook.metrics().await?;
    assert_eq!(metrics.count("countersign_admission_images_attested_total", &[]), 5_000);
    Ok(())
}

#[tokio::test]
async fn enormous_reviews_are_answered_and_what_no_api_server_sends_is_refused() -> Result<()> {
    let folder = scratch()?;
    let key = folder.path().join("release.pub.pem");
    fs::write(&key, pair("EC_P256").public_pem())?;
    // No image here is of that registry, so none is asked.
    let webhook = Webhook::start(&settings("127.0.0.1:9", "http://127.0.0.1:9", &key, POLICY)).await?;
    let answer = async |images: &[&str]| {
        let review = review("CREATE", "payments", "/v1", "Pod", &pod(images), &Value::Null);
        webhook.call("/validate?timeout=10s", &review).await
    };
    let first = "image alpine:3.11 is not attested\n";
    let same = answer(&vec!["alpine:3.11"; 10_000]).await?;
    assert!(!same.allowed && same.message.starts_with(first) && same.message.lines().count() == 2, "{}", same.message);
    let texts: Vec<_> = (0..10_000).map(|number| format!("alpine:{number}")).collect();
    let different = answer(&texts.iter().map(String::as_str).collect::<Vec<_>>()).await?;
    assert!(!different.allowed && different.message.contains("more than 512 different images"), "{}", different.message);
    let absurd =
        ["", ":", "@", "a@sha256:", "..//..", "\u{202e}x:1", "x\0y", "a:b:c@d:e", "[::1]:5000/x", "%2e%2e/x", "UPPER/case:1"];
    let each = answer(&absurd).await?;
    // One without an image is the API server's to refuse.
    assert!(!each.allowed && each.message.matches(" is not attested\n").count() == absurd.len() - 1, "{}", each.message);
    let long = "x".repeat(3 << 20);
    let denied = answer(&[&long]).await?;
    assert!(!denied.allowed && denied.message.len() < 2_000, "{} bytes", denied.message.len());
    let longer = "x".repeat(6 << 20);
    let refused = answer(&[&longer]).await.unwrap_err().to_string();
    assert!(refused.starts_with("413"), "{refused}");
    assert!(!answer(&["alpine:3.11"]).await?.allowed, "it goes on");
    Ok(())
}
