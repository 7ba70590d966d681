//! How much memory the daemon keeps resident: idle, after work, and with a backlog.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use bytes::Bytes;
use integration_tests::house::{Keys, rule};
use integration_tests::process::memory;
use integration_tests::registry::Registry;
use serde_json::Value;

use crate::Scale;
use crate::events::Silence;
use crate::report::{Aim, Table, float, number, text};
use crate::stage::{Events, Flood, Plan, Pushed, Stage};
use crate::wire::{Until, Wire, at_once};

/// Events of one notification of the backlog, so that making it takes seconds.
const AT_ONCE: usize = 10;
const WORKERS: usize = 32;

pub async fn measure(scale: Scale) -> Result<Table> {
    let mut table = Table::new("memory", "Resident memory of the daemon (MiB)", &["", "VmRSS", "at most"]);
    let rule = rule("bench", "bench", Keys::P256);
    let row = |table: &mut Table, what: &str, stage: &Stage| {
        table.row([text(what), number(memory(stage.pid()?, "VmRSS")?, 1), number(memory(stage.pid()?, "VmHWM")?, 1)]);
        anyhow::Ok(())
    };

    let registry = Registry::start().await?;
    let stage = Stage::start(Plan { on_disk: true, ..Plan::new(registry.host(), WORKERS, &rule) }).await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    row(&mut table, "idle, just started", &stage)?;
    table.aim("VmRSS", Aim::AtMost(40.0), "memory idle, MiB");
    let count = scale.of(1000);
    let pushed = Pushed::push(&registry.client()?, "bench/memory", count).await?;
    stage.work_off(pushed.events(&registry.host()), WORKERS, "signed").await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    row(&mut table, &format!("idle, after {count} signatures, {WORKERS} at once"), &stage)?;
    table.aim("VmRSS", Aim::AtMost(40.0), "memory idle after work, MiB");
    drop((stage, registry));

    // With a registry that does not answer, all of the workers have an event in hand and the rest waits.
    let silence = Silence::bind()?;
    let stage = Stage::start(Plan { on_disk: true, ..Plan::new(&silence.host, WORKERS, &rule) }).await?;
    let flood = Flood::new(&silence.host, "bench/memory");
    let backlog = scale.of(100_000).next_multiple_of(AT_ONCE);
    let notifications = (0..backlog / AT_ONCE).map(|number| {
        let events = (0..AT_ONCE).map(|event| flood.event(number * AT_ONCE + event));
        together(events)
    });
    let notifications = Events(notifications.collect::<Result<_>>()?);
    at_once(stage.host(), WORKERS, Until::Count(backlog / AT_ONCE), &Arc::new(notifications)).await?;
    let metrics = stage.metrics(&mut Wire::open(stage.host()).await?).await?;
    ensure!(metrics.queued() == u64::try_from(backlog)?, "{} of {backlog} events are queued", metrics.queued());
    tokio::time::sleep(Duration::from_secs(1)).await;
    row(&mut table, &format!("{backlog} events queued"), &stage)?;
    table.aim("VmRSS", Aim::AtMost(80.0), "memory with the backlog, MiB");
    table.note(format!("at most: VmHWM, the most that it has been since the start; default settings, {WORKERS} events in hand"));
    table.note(format!("the backlog came in {} events a notification, {WORKERS} notifications at once", float(AT_ONCE)));
    table.close();
    Ok(table)
}

/// One notification of several events.
fn together(events: impl Iterator<Item = Bytes>) -> Result<Bytes> {
    let mut all = Vec::new();
    for event in events {
        let mut event: Value = serde_json::from_slice(&event)?;
        all.push(event["events"][0].take());
    }
    Ok(serde_json::json!({"events": all}).to_string().into())
}
