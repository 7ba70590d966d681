//! What a review costs the cluster that waits for it: from memory and from the registry, with many containers and many
//! policies, beside a request to the same server that does nothing.

use std::fmt::Write as _;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures::future::try_join_all;
use integration_tests::house::{Keys, rule};
use integration_tests::process::scratch;
use integration_tests::registry::Registry;
use integration_tests::webhook::{Webhook, pod, review};
use serde_json::Value;

use crate::Scale;
use crate::report::{Aim, Table, median, milliseconds, number, percentile, text};
use crate::stage::{Plan, Pushed, Stage};

const AT_ONCE: usize = 50;
const CONTAINERS: usize = 30;
const POLICIES: usize = 1_000;

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
    let config = |policies: usize| {
        let mut text = String::new();
        for number in 0..policies {
            let policy = format!("name = \"p{number}\"\nwitness = \"release\"\nnamespace = \"payments\"\nenabled = true");
            writeln!(text, "[[policy]]\n{policy}\n").expect("a String takes everything");
        }
        format!(
            "[[registry]]\nname = \"{host}\"\nurl = \"http://{host}\"\n\n[[witness]]\nname = \"release\"\n\
             key = \"awskms:///alias/never-asked?region=eu-west-1\"\npublic_key = \"{}\"\n\n{text}",
            key.display(),
            host = registry.host(),
        )
    };
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
    let each = scale.of(40);
    let few = Webhook::start(&config(1)).await?;
    let many = Webhook::start(&config(POLICIES)).await?;

    let mut rows: Vec<(String, Vec<(Duration, Duration)>)> = Vec::new();
    let mut add = |what: String, times: (Duration, Duration)| match rows.iter_mut().find(|(known, _)| *known == what) {
        Some((_, all)) => all.push(times),
        None => rows.push((what, vec![times])),
    };
    for _ in 0..scale.rounds {
        add("GET /livez of the same server".to_owned(), baseline(&few, each).await?);
        for containers in [1, CONTAINERS] {
            // Reading the configuration again forgets what was remembered.
            few.reload(&config(1)).await?;
            add(format!("cold, {containers} containers"), reviews(&few, &of(containers), 1).await?);
            add(format!("warm, {containers} containers"), reviews(&few, &of(containers), each).await?);
            // Once, so that it is remembered.
            reviews(&many, &of(containers), 1).await?;
            add(format!("warm, {containers} containers, {POLICIES} policies"), reviews(&many, &of(containers), each).await?);
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
    let added = 1e3 * (p99("warm, 1 containers") - p99("GET /livez of the same server"));
    table.row([text("added by a warm review, 1 container"), crate::report::Cell::None, number(added, 2)]);
    table.aim("p99", Aim::AtMost(1.0), "added latency of a warm review, p99 in ms");
    table.note(format!(
        "{AT_ONCE} clients, each one request after the other, {each} of them (one when cold); HTTPS, kept connections"
    ));
    table.note("every container has another image; cold: each costs three requests to the registry");
    table.close();
    Ok(table)
}

/// The median and the 99th percentile of `each` requests of every client.
async fn baseline(webhook: &Webhook, each: usize) -> Result<(Duration, Duration)> {
    let client = |_| async {
        let mut times = Vec::with_capacity(each);
        for _ in 0..each {
            let begun = Instant::now();
            webhook.get("/livez").await?;
            times.push(begun.elapsed());
        }
        anyhow::Ok(times)
    };
    Ok(both(try_join_all((0..AT_ONCE).map(client)).await?.concat()))
}

async fn reviews(webhook: &Webhook, reviews: &[Value], each: usize) -> Result<(Duration, Duration)> {
    let client = |number: usize| async move {
        let review = &reviews[number % reviews.len()];
        let mut times = Vec::with_capacity(each);
        for _ in 0..each {
            let begun = Instant::now();
            let answer = webhook.call("/validate?timeout=30s", review).await?;
            times.push(begun.elapsed());
            ensure!(answer.allowed, "denied: {answer:?}");
        }
        Ok(times)
    };
    Ok(both(try_join_all((0..AT_ONCE).map(client)).await?.concat()))
}

fn both(mut times: Vec<Duration>) -> (Duration, Duration) {
    (percentile(&mut times, 0.5), percentile(&mut times, 0.99))
}
