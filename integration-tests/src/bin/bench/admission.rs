//! What a review costs the cluster that waits for it: from memory and from the registry, with many containers and many
//! policies, beside a request to the same server that does nothing, and beside stock `cosign verify` of the same images. How far
//! the registry may be away, and how much memory ever more images take, are measured with a registry that has any number of them.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use futures::future::try_join_all;
use integration_tests::endless::Endless;
use integration_tests::house::{Keys, rule};
use integration_tests::process::{memory, scratch};
use integration_tests::proxy::Proxy;
use integration_tests::registry::Registry;
use integration_tests::verifier::Cosign;
use integration_tests::webhook::{POLICY, Webhook, pod, review, settings};
use serde_json::Value;

use crate::Scale;
use crate::report::{Aim, Cell, Table, float, median, milliseconds, number, percentile, text};
use crate::stage::{Plan, Pushed, Stage};

const AT_ONCE: usize = 50;
const CONTAINERS: usize = 30;
const POLICIES: usize = 1_000;
/// In how many parts warm reviews and the baseline beside them are asked for.
const TURNS: usize = 4;
const BASELINE: &str = "GET /livez of the same server";

pub async fn measure(scale: Scale) -> Result<Table> {
    let mut table =
        Table::new("admission", format!("Reviews of the admission webhook, {AT_ONCE} at once (ms)"), &["", "p50", "p99"]);
    let registry = Registry::start().await?;
    let stage = Stage::start(Plan::new(registry.host(), 8, rule("bench", "bench", Keys::P256))).await?;
    let images = AT_ONCE * CONTAINERS / if scale.quick { 5 } else { 1 };
    let pushed = Pushed::push(&registry.client()?, "bench/admission", images).await?;
    stage.work_off(pushed.events(&registry.host()), 8, "signed").await?;
    let folder = scratch()?;
    let key = folder.path().join("release.pub.pem");
    fs::write(&key, stage.public_key_pem().await?)?;
    let config = |demands: Demands| settings(&registry.host(), &registry.url(), &key, &demands.policies());
    let references: Vec<_> = pushed
        .manifests
        .iter()
        .map(|manifest| format!("{}/{}@{}", registry.host(), pushed.repository, manifest.digest))
        .collect();
    let of = |containers: usize| -> Vec<Value> {
        let pods = references.chunks_exact(containers).take(AT_ONCE).map(|images| {
            let images: Vec<_> = images.iter().map(String::as_str).collect();
            review("CREATE", "payments", "/v1", "Pod", &pod(&images), &Value::Null)
        });
        pods.collect()
    };
    // What is answered from memory for one container takes so little that the first of all clients, at once, must not be most of it.
    let each = |containers: usize| scale.of(if containers == 1 { 400 } else { 40 });
    let mut webhooks = vec![];
    for demands in Demands::ALL {
        webhooks.push((Webhook::start(&config(demands)).await?, demands));
    }

    let mut rows: Vec<(String, Vec<(Duration, Duration)>)> = Vec::new();
    let mut add = |what: String, times: Vec<Duration>| match rows.iter_mut().find(|(known, _)| *known == what) {
        Some((_, all)) => all.push(both(times)),
        None => rows.push((what, vec![both(times)])),
    };
    // Connections are made, and what is made once is.
    for (webhook, _) in &webhooks {
        baseline(webhook, each(1)).await?;
    }
    for _ in 0..scale.rounds {
        for containers in [1, CONTAINERS] {
            for (webhook, demands) in &webhooks {
                // Reading the configuration again forgets what was remembered.
                webhook.reload(&config(*demands)).await?;
                let what = |how: &str| format!("{how}, {}, {}", plural(containers, "container"), demands.name());
                add(what("cold"), reviews(webhook, &of(containers), 1).await?);
                apart(webhook, true)?;
                if *demands != Demands::One || containers != 1 {
                    add(what("warm"), reviews(webhook, &of(containers), each(containers)).await?);
                } else {
                    // By turns, and as many, so that what slows the machine down slows both.
                    let (mut warm, mut nothing) = (vec![], vec![]);
                    for _ in 0..TURNS {
                        warm.extend(reviews(webhook, &of(containers), each(containers).div_ceil(TURNS)).await?);
                        nothing.extend(baseline(webhook, each(containers).div_ceil(TURNS)).await?);
                    }
                    add(what("warm"), warm);
                    add(BASELINE.to_owned(), nothing);
                }
                apart(webhook, false)?;
            }
            add(format!("cosign verify, {}", plural(containers, "image")), cosign(&key, &references, containers, scale).await?);
        }
    }
    let middle = |all: &[(Duration, Duration)], pick: fn(&(Duration, Duration)) -> Duration| {
        Duration::from_secs_f64(median(all.iter().map(|both| pick(both).as_secs_f64())))
    };
    for (what, all) in &rows {
        table.row([text(what), milliseconds(middle(all, |both| both.0)), milliseconds(middle(all, |both| both.1))]);
    }
    let p99 = |what: &str| {
        let all = rows.iter().find(|(known, _)| known == what).map(|(_, all)| middle(all, |both| both.1).as_secs_f64());
        all.unwrap_or_default()
    };
    let added = 1e3 * (p99(&format!("warm, 1 container, {}", Demands::One.name())) - p99(BASELINE));
    table.row([text("added by a warm review, 1 container, 1 policy"), Cell::None, number(added, 2)]);
    table.aim("p99", Aim::AtMost(1.0), "added latency of a warm review, p99 in ms");
    table.note(format!(
        "{AT_ONCE} clients, each one request after the other, {} of them with 1 container, {} with {CONTAINERS}, one when cold; HTTPS, kept connections",
        each(1),
        each(CONTAINERS),
    ));
    table.note(format!("GET /livez: as many requests by the same clients of the same server, in {TURNS} turns with the warm reviews of 1 container and 1 policy"));
    table.note("warm: the webhook and its clients on processors of their own");
    table.note("every container has another image; cold: each costs five requests to the registry");
    table.note("cosign verify 2.5: one process after the other, as it is run by hand");
    drop((webhooks, stage, registry));
    far_away(scale, &mut table).await?;
    ever_more(scale, &mut table).await?;
    table.close();
    Ok(table)
}

/// Keeps webhook and client from each other's processors, as on two machines, or no more. Otherwise what is slow, one time in a
/// hundred, is that either waits for the other to be taken off its processor.
fn apart(webhook: &Webhook, are_apart: bool) -> Result<()> {
    let processors = fs::read_to_string("/sys/devices/system/cpu/online")?;
    let (ours, theirs) = match processors.trim().split_once('-') {
        Some((first, last)) if are_apart => (first.to_owned(), format!("{}-{last}", first.parse::<u32>()? + 1)),
        // Or there is but one.
        _ => (processors.trim().to_owned(), processors.trim().to_owned()),
    };
    for (pid, processors) in [(std::process::id(), ours), (webhook.pid().context("it runs")?, theirs)] {
        let output =
            Command::new("taskset").args(["--all-tasks", "--cpu-list", "--pid", &processors, &pid.to_string()]).output()?;
        ensure!(output.status.success(), "taskset: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// How many policies there are, and for whom.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Demands {
    One,
    /// All of them hold in the namespace that is asked about.
    Many,
    /// Each for a namespace of its own; one is for the one that is asked about.
    Spread,
}

impl Demands {
    const ALL: [Self; 3] = [Self::One, Self::Many, Self::Spread];

    fn name(self) -> String {
        match self {
            Self::One => "1 policy".to_owned(),
            Self::Many => format!("{POLICIES} policies that all hold for this namespace"),
            Self::Spread => format!("{POLICIES} policies, one of which is for this namespace"),
        }
    }

    fn policies(self) -> String {
        let mut text = String::new();
        for number in 0..if self == Self::One { 1 } else { POLICIES } {
            let namespace = if self == Self::Spread && number > 0 { format!("team-{number}") } else { "payments".to_owned() };
            let policy = format!("name = \"p{number}\"\nwitness = \"release\"\nnamespace = \"{namespace}\"\nenabled = true");
            writeln!(text, "[[policy]]\n{policy}\n").expect("a String takes everything");
        }
        text
    }
}

fn plural(count: usize, one: &str) -> String {
    match (count, one.strip_suffix('y')) {
        (1, _) => format!("1 {one}"),
        (_, Some(stem)) => format!("{count} {stem}ies"),
        (_, None) => format!("{count} {one}s"),
    }
}

/// Stock cosign, that many images at once, each time others.
async fn cosign(key: &Path, references: &[String], images: usize, scale: Scale) -> Result<Vec<Duration>> {
    let mut times = vec![];
    for some in references.chunks_exact(images).take(scale.of(20)) {
        let begun = Instant::now();
        for reference in some {
            let ruling = Cosign::V2.verify(key, reference).await?;
            ensure!(ruling.accepted, "{}", ruling.words);
        }
        times.push(begun.elapsed());
    }
    Ok(times)
}

/// A webhook before a registry of any number of signed images, reached at `url`.
async fn before(endless: &Endless, url: &str) -> Result<Webhook> {
    let folder = scratch()?;
    let key = folder.path().join("release.pub.pem");
    endless.write_public_key(&key)?;
    Webhook::start(&settings(endless.host(), url, &key, POLICY)).await
}

/// How often a cold review waits for a registry that is far away.
async fn far_away(scale: Scale, table: &mut Table) -> Result<()> {
    const ONE_WAY: Duration = Duration::from_millis(25);
    let endless = Endless::start().await?;
    let proxy = Proxy::start(endless.host()).await?;
    let webhook = before(&endless, &proxy.url()).await?;
    // Whether it lists referrers is asked once.
    ensure!(webhook.create("payments", &endless.reference(0)).await?.allowed, "the first image is denied");
    proxy.delay(ONE_WAY);
    let mut times = vec![];
    for number in 1..=scale.of(60) {
        let begun = Instant::now();
        let answer = webhook.create("payments", &endless.reference(number.try_into()?)).await?;
        ensure!(answer.allowed, "{answer:?}");
        times.push(begun.elapsed());
    }
    let (p50, p99) = both(times);
    let trips = |time: Duration| time.as_secs_f64() / (2.0 * ONE_WAY.as_secs_f64());
    table.row([text("cold, in round trips to a registry 50 ms away"), number(trips(p50), 2), number(trips(p99), 2)]);
    // The least is two: the signature's manifest, and what it says is signed.
    table.aim("p50", Aim::AtMost(4.0), "round trips of a cold review, two of which nobody can spare");
    Ok(())
}

/// What the webhook keeps resident while a million different images are asked for.
async fn ever_more(scale: Scale, table: &mut Table) -> Result<()> {
    let images: u64 = if scale.quick { 2_000 } else { 1_000_000 };
    let endless = Endless::start().await?;
    let webhook = before(&endless, &format!("http://{}", endless.host())).await?;
    let pid = webhook.pid().context("it runs")?;
    let at_once = u64::try_from(AT_ONCE)?;
    let mut resident = vec![];
    for quarter in 0..4 {
        let numbers = quarter * images / 4..(quarter + 1) * images / 4;
        let client = async |first: u64| {
            for number in numbers.clone().skip(usize::try_from(first)?).step_by(AT_ONCE) {
                let answer = webhook.create("payments", &endless.reference(number)).await?;
                ensure!(answer.allowed, "{number}: {answer:?}");
            }
            anyhow::Ok(())
        };
        try_join_all((0..at_once).map(client)).await?;
        resident.push(memory(pid, "VmRSS")?);
    }
    let what = format!("MiB resident after {} different images, and after {images}", images / 4);
    table.row([text(what), number(resident[0], 1), number(resident[3], 1)]);
    table.row([text("the second over the first"), Cell::None, number(resident[3] / resident[0], 3)]);
    if !scale.quick {
        // Of fewer, all are remembered.
        table.aim("p99", Aim::AtMost(1.1), "growth of memory over the last three quarters of all images");
    }
    table.note(format!("memory: {} reviews of another signed image each, 100,000 remembered", float(images)));
    Ok(())
}

/// `each` requests of every client.
async fn baseline(webhook: &Webhook, each: usize) -> Result<Vec<Duration>> {
    let client = |_| async {
        let mut times = Vec::with_capacity(each);
        for _ in 0..each {
            let begun = Instant::now();
            webhook.get("/livez").await?;
            times.push(begun.elapsed());
        }
        anyhow::Ok(times)
    };
    Ok(try_join_all((0..AT_ONCE).map(client)).await?.concat())
}

/// All clients share a processor, so a review is made before, and of its answer no more is looked at than has to be.
async fn reviews(webhook: &Webhook, reviews: &[Value], each: usize) -> Result<Vec<Duration>> {
    let client = |number: usize| async move {
        let review = Bytes::from(reviews[number % reviews.len()].to_string());
        let mut times = Vec::with_capacity(each);
        for _ in 0..each {
            let begun = Instant::now();
            let answer = webhook.post("/validate?timeout=30s", review.clone()).await?;
            times.push(begun.elapsed());
            let answer = str::from_utf8(&answer)?;
            ensure!(answer.contains("\"allowed\":true"), "denied: {answer}");
        }
        Ok(times)
    };
    Ok(try_join_all((0..AT_ONCE).map(client)).await?.concat())
}

/// The median and the 99th percentile.
fn both(mut times: Vec<Duration>) -> (Duration, Duration) {
    (percentile(&mut times, 0.5), percentile(&mut times, 0.99))
}
