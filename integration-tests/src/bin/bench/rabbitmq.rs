//! Events and signatures through RabbitMQ, beside bare lapin clients with the same messages, as many in flight at once.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use integration_tests::house::{Keys, rule};
use integration_tests::postgres::Postgres;
use integration_tests::rabbitmq::RabbitMq;
use integration_tests::registry::{Client, Registry};

use crate::bare::Writes;
use crate::broker::{Bare, Template};
use crate::events::Silence;
use crate::report::{Aim, Cell, Table, float, median, number, text};
use crate::stage::{Flood, Plan, Pushed, Stage, post};
use crate::wire::{Until, Wire, at_once};
use crate::{Scale, meter};

pub async fn measure(scale: Scale) -> Result<Table> {
    let columns = ["", "in flight", "per s", "of bare", "of bare+copy", "CPU us: daemons", "broker", "registry", "client"];
    let mut table = Table::new("rabbitmq", "Events and signatures through RabbitMQ", &columns);
    for in_flight in [32, 256] {
        intake(&mut table, scale, in_flight).await?;
    }
    signatures(&mut table, scale, 32).await?;
    table.note(
        "intake: webhook to 202, confirmed in a quorum queue and copied to the stream of the past; nothing is handled meanwhile",
    );
    table.note("of bare: beside lapin that publishes the same messages to as many quorum queues; of bare+copy: to the daemon's own exchange");
    table.note("signatures: webhook to read back; bare: lapin that publishes and consumes with acks, and makes the requests of a signature for each");
    table.note(
        "replicas share the broker and a PostgreSQL; the broker, the registry, the database and this client share the machine",
    );
    table.close();
    Ok(table)
}

fn plan(broker: &RabbitMq, registry: &str, in_flight: usize, ledger: &str) -> Plan {
    let queue = format!("backend = \"amqp\"\nurl = {{ env = \"AMQP_URL\" }}\n{ledger}");
    let environment = vec![("AMQP_URL", broker.url())];
    Plan { queue, environment, ..Plan::new(registry, in_flight, rule("bench", "bench", Keys::P256)) }
}

/// Per second, and microseconds of processor time for each: of the daemons, the broker, the registry, this client.
#[derive(Clone, Copy)]
struct Spent {
    rate: f64,
    cpu: [f64; 4],
}

/// What everybody has used so far, in seconds.
fn used(stages: &[&Stage], broker: &RabbitMq, registry: Option<&Registry>) -> Result<[f64; 4]> {
    let daemons = stages.iter().map(|stage| stage.cpu()).sum::<Result<f64>>()?;
    let broker = meter::cpu(broker.pid().context("the broker is not running")?)?;
    let registry = registry.and_then(Registry::pid).map_or(Ok(0.0), meter::cpu)?;
    Ok([daemons, broker, registry, meter::cpu(std::process::id())?])
}

fn spent(rate: f64, count: f64, before: [f64; 4], after: [f64; 4]) -> Spent {
    Spent { rate, cpu: std::array::from_fn(|index| (after[index] - before[index]) * 1e6 / count) }
}

fn row(table: &mut Table, what: &str, in_flight: usize, rounds: &[Spent], ratios: [Option<f64>; 2]) {
    let of = |field: &dyn Fn(&Spent) -> f64| median(rounds.iter().map(field));
    let ratio = |ratio: Option<f64>| ratio.map_or(Cell::None, |ratio| number(ratio, 2));
    let cpu = (0..4).map(|index| of(&|spent| spent.cpu[index])).map(|cpu| if cpu > 0.0 { number(cpu, 0) } else { Cell::None });
    let first = [text(what), number(float(in_flight), 0), number(of(&|spent| spent.rate), 0)];
    table.row(first.into_iter().chain(ratios.map(ratio)).chain(cpu));
}

async fn intake(table: &mut Table, scale: Scale, in_flight: usize) -> Result<()> {
    let span = Duration::from_millis(if scale.quick { 500 } else { 3000 });
    let (mut ours, mut bare, mut copied) = (vec![], vec![], vec![]);
    for _ in 0..scale.rounds {
        // Each round on a broker with nothing in it.
        let broker = RabbitMq::start().await?;
        let silence = Silence::bind()?;
        let stage = Stage::start(plan(&broker, &silence.host, 1, "")).await?;
        let flood = Arc::new(Flood::new(&silence.host, "bench/events"));
        let client = Bare::connect(&broker).await?;
        let mut wire = Wire::open(stage.host()).await?;
        let template = client.tap(post(&mut wire, flood.event(usize::MAX))).await?;

        for (to_ours, rounds) in [(false, &mut bare), (true, &mut copied)] {
            let before = used(&[], &broker, None)?;
            let rate = client.publish(&template, in_flight, span, to_ours).await?;
            rounds.push(spent(rate, rate * span.as_secs_f64(), before, used(&[], &broker, None)?));
            client.purge().await?;
        }
        let before = used(&[&stage], &broker, None)?;
        let done = at_once(stage.host(), in_flight, Until::Time(span), &flood).await?;
        ours.push(spent(done.per_second(), float(done.each.len()), before, used(&[&stage], &broker, None)?));
    }
    let ratio = |of: &[Spent]| Some(median(ours.iter().zip(of).map(|(ours, bare)| ours.rate / bare.rate)));
    row(table, "bare publisher", in_flight, &bare, [None, None]);
    row(table, "bare publisher, with the copy", in_flight, &copied, [None, None]);
    row(table, "intake", in_flight, &ours, [ratio(&bare), ratio(&copied)]);
    table.aim("of bare", Aim::AtLeast(0.8), format!("RabbitMQ, {in_flight} in flight: intake of the bare publisher"));
    Ok(())
}

async fn signatures(table: &mut Table, scale: Scale, in_flight: usize) -> Result<()> {
    let (broker, registry, database) = (RabbitMq::start().await?, Registry::start().await?, Postgres::start()?);
    let client = registry.client()?;
    let ledger = format!("[ledger]\nurl = \"{}\"\n", database.url(&database.database()?));
    let images = scale.of(600);
    let mut stages = vec![Stage::start(plan(&broker, &registry.host(), in_flight, &ledger)).await?];
    let bare_client = Bare::connect(&broker).await?;
    let mut wire = Wire::open(stages[0].host()).await?;
    // Of a repository that no rule is about.
    let flood = Flood::new(&registry.host(), "elsewhere/app");
    let template = bare_client.tap(post(&mut wire, flood.event(1))).await?;
    let (mut bare, mut one) = (vec![], vec![]);
    for round in 0..scale.rounds {
        bare.push(by_hand(&bare_client, &template, &broker, (&registry, &client), in_flight, (round, images)).await?);
        one.push(by_replicas(&stages, &broker, (&registry, &client), in_flight, (round, images)).await?);
    }
    let ratio = |of: &[Spent]| Some(median(of.iter().zip(&bare).map(|(ours, bare)| ours.rate / bare.rate)));
    row(table, "bare publisher, consumer, writer", in_flight, &bare, [None, None]);
    row(table, "signatures, 1 replica", in_flight, &one, [ratio(&one), None]);
    table.aim("of bare", Aim::AtLeast(0.8), format!("RabbitMQ, {in_flight} in flight: signatures of the bare chain"));
    for replicas in [2, 3] {
        // The newcomer's partitions come to it when those of the first are let go: all begin anew, at once.
        stages.clear();
        let plans = (0..replicas).map(|_| Stage::start(plan(&broker, &registry.host(), in_flight, &ledger)));
        stages = futures::future::try_join_all(plans).await?;
        let mut rounds = vec![];
        for round in 0..scale.rounds {
            rounds.push(by_replicas(&stages, &broker, (&registry, &client), in_flight, (round, images)).await?);
        }
        row(table, &format!("signatures, {replicas} replicas"), in_flight, &rounds, [ratio(&rounds), None]);
    }
    Ok(())
}

async fn by_hand(
    bare: &Bare,
    template: &Template,
    broker: &RabbitMq,
    (registry, client): (&Registry, &Client),
    in_flight: usize,
    (round, images): (usize, usize),
) -> Result<Spent> {
    let pushed = Pushed::push(client, &format!("bench/bare{round}"), images).await?;
    let writes = Arc::new(Writes::prepare(client, &registry.host(), &pushed, Keys::P256).await?);
    let before = used(&[], broker, Some(registry))?;
    let took = bare.work_off(&registry.host(), template, in_flight, &writes, images).await?;
    Ok(spent(float(images) / took.as_secs_f64(), float(images), before, used(&[], broker, Some(registry))?))
}

async fn by_replicas(
    stages: &[Stage],
    broker: &RabbitMq,
    (registry, client): (&Registry, &Client),
    in_flight: usize,
    (round, images): (usize, usize),
) -> Result<Spent> {
    let pushed = Pushed::push(client, &format!("bench/of{}-{round}", stages.len()), images).await?;
    let all: Vec<&Stage> = stages.iter().collect();
    let before = used(&all, broker, Some(registry))?;
    let took = stages[0].work_off_with(&stages[1..], pushed.events(&registry.host()), in_flight, "signed").await?;
    Ok(spent(float(images) / took.as_secs_f64(), float(images), before, used(&all, broker, Some(registry))?))
}
