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

/// Events.
pub async fn intake(scale: Scale) -> Result<Table> {
    let columns = ["", "in flight", "per s", "of bare", "of bare+copy", "CPU us: daemon", "broker", "client"];
    let mut table = Table::new("rabbitmq-intake", "Events into RabbitMQ", &columns);
    for in_flight in [32, 256] {
        take_in(&mut table, scale, in_flight).await?;
    }
    table.note(
        "intake: webhook to 202, confirmed in a quorum queue and copied to the stream of the past; nothing is handled meanwhile",
    );
    table.note("of bare: beside lapin that publishes the same messages to as many quorum queues; of bare+copy: to the daemon's own exchange");
    table.note("the broker and this client share the machine");
    table.close();
    Ok(table)
}

/// Signatures.
pub async fn signing(scale: Scale) -> Result<Table> {
    let columns = ["", "in flight", "per s", "of bare", "CPU us: daemons", "broker", "client", "registry", "database"];
    let mut table = Table::new("rabbitmq-signing", "Signatures through RabbitMQ", &columns);
    signatures(&mut table, scale, 32).await?;
    table.note("signatures: webhook to read back; bare: lapin that publishes and consumes with acks, and makes the requests of a signature for each");
    table.note("replicas share the broker and a PostgreSQL; everybody shares the machine");
    table.close();
    Ok(table)
}

fn plan(broker: &RabbitMq, registry: &str, in_flight: usize, ledger: &str) -> Plan {
    let queue = format!("backend = \"amqp\"\nurl = {{ env = \"AMQP_URL\" }}\n{ledger}");
    let environment = vec![("AMQP_URL", broker.url())];
    Plan { queue, environment, ..Plan::new(registry, in_flight, rule("bench", "bench", Keys::P256)) }
}

/// Per second, and microseconds of processor time for each: of the daemons, the broker, this client, the registry and the database.
#[derive(Clone, Copy)]
struct Spent {
    rate: f64,
    cpu: [f64; 5],
}

/// What everybody has used so far, in seconds.
fn used(stages: &[&Stage], broker: &RabbitMq, registry: Option<&Registry>, database: Option<&Postgres>) -> Result<[f64; 5]> {
    let daemons = stages.iter().map(|stage| stage.cpu()).sum::<Result<f64>>()?;
    let broker = meter::cpu(broker.pid().context("the broker is not running")?)?;
    let registry = registry.and_then(Registry::pid).map_or(Ok(0.0), meter::cpu)?;
    let database = database.and_then(Postgres::pid).map_or(Ok(0.0), meter::cpu_of_family)?;
    Ok([daemons, broker, meter::cpu(std::process::id())?, registry, database])
}

fn spent(rate: f64, count: f64, before: [f64; 5], after: [f64; 5]) -> Spent {
    Spent { rate, cpu: std::array::from_fn(|index| (after[index] - before[index]) * 1e6 / count) }
}

fn row<const R: usize>(
    table: &mut Table,
    what: &str,
    in_flight: usize,
    rounds: &[Spent],
    ratios: [Option<f64>; R],
    users: usize,
) {
    let of = |field: &dyn Fn(&Spent) -> f64| median(rounds.iter().map(field));
    let ratio = |ratio: Option<f64>| ratio.map_or(Cell::None, |ratio| number(ratio, 2));
    let cpu =
        (0..users).map(|index| of(&|spent| spent.cpu[index])).map(|cpu| if cpu > 0.0 { number(cpu, 0) } else { Cell::None });
    let first = [text(what), number(float(in_flight), 0), number(of(&|spent| spent.rate), 0)];
    table.row(first.into_iter().chain(ratios.map(ratio)).chain(cpu));
}

async fn take_in(table: &mut Table, scale: Scale, in_flight: usize) -> Result<()> {
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
            let before = used(&[], &broker, None, None)?;
            let rate = client.publish(&template, in_flight, span, to_ours).await?;
            rounds.push(spent(rate, rate * span.as_secs_f64(), before, used(&[], &broker, None, None)?));
            client.purge().await?;
        }
        let before = used(&[&stage], &broker, None, None)?;
        let done = at_once(stage.host(), in_flight, Until::Time(span), &flood).await?;
        ours.push(spent(done.per_second(), float(done.each.len()), before, used(&[&stage], &broker, None, None)?));
    }
    let ratio = |of: &[Spent]| Some(median(ours.iter().zip(of).map(|(ours, bare)| ours.rate / bare.rate)));
    row(table, "bare publisher", in_flight, &bare, [None, None], 3);
    row(table, "bare publisher, with the copy", in_flight, &copied, [None, None], 3);
    row(table, "intake", in_flight, &ours, [ratio(&bare), ratio(&copied)], 3);
    table.aim(
        "of bare+copy",
        Aim::AtLeast(0.8),
        format!("RabbitMQ, {in_flight} in flight: intake of the bare publisher with the copy"),
    );
    Ok(())
}

async fn signatures(table: &mut Table, scale: Scale, in_flight: usize) -> Result<()> {
    let (broker, registry, database) = (RabbitMq::start().await?, Registry::start().await?, Postgres::start()?);
    let client = registry.client()?;
    let shared = format!("[ledger]\nurl = \"{}\"\n", database.url(&database.database()?));
    let machine = Machine { broker, registry, database, client, images: scale.of(600), in_flight };
    let start = |ledger: &str| Stage::start(plan(&machine.broker, &machine.registry.host(), in_flight, ledger));
    let mut stages = vec![start("").await?];
    let bare_client = Bare::connect(&machine.broker).await?;
    let mut wire = Wire::open(stages[0].host()).await?;
    // Of a repository that no rule is about.
    let flood = Flood::new(&machine.registry.host(), "elsewhere/app");
    let template = bare_client.tap(post(&mut wire, flood.event(1))).await?;
    let (mut bare, mut one) = (vec![], vec![]);
    for round in 0..scale.rounds {
        bare.push(machine.by_hand(&bare_client, &template, round).await?);
        one.push(machine.by_replicas(&stages, &format!("alone{round}")).await?);
    }
    let ratio = |of: &[Spent]| [Some(median(of.iter().zip(&bare).map(|(ours, bare)| ours.rate / bare.rate)))];
    row(table, "bare publisher, consumer, writer", in_flight, &bare, [None], 5);
    row(table, "1 daemon, ledger in SQLite", in_flight, &one, ratio(&one), 5);
    table.aim("of bare", Aim::AtLeast(0.8), format!("RabbitMQ, {in_flight} in flight: signatures of the bare chain"));
    for replicas in 1..=3 {
        // The newcomer's partitions come to it when those of the first are let go: all begin anew, at once.
        stages.clear();
        stages = futures::future::try_join_all((0..replicas).map(|_| start(&shared))).await?;
        let mut rounds = vec![];
        for round in 0..scale.rounds {
            rounds.push(machine.by_replicas(&stages, &format!("of{replicas}-{round}")).await?);
        }
        row(table, &format!("{replicas} with PostgreSQL"), in_flight, &rounds, ratio(&rounds), 5);
    }
    Ok(())
}

/// What all share.
struct Machine {
    broker: RabbitMq,
    registry: Registry,
    database: Postgres,
    client: Client,
    images: usize,
    in_flight: usize,
}

impl Machine {
    fn used(&self, stages: &[&Stage]) -> Result<[f64; 5]> {
        used(stages, &self.broker, Some(&self.registry), Some(&self.database))
    }

    async fn by_hand(&self, bare: &Bare, template: &Template, round: usize) -> Result<Spent> {
        let (client, images) = (&self.client, self.images);
        let pushed = Pushed::push(client, &format!("bench/bare{round}"), images).await?;
        let writes = Arc::new(Writes::prepare(client, &self.registry.host(), &pushed, Keys::P256).await?);
        let before = self.used(&[])?;
        let took = bare.work_off(&self.registry.host(), template, self.in_flight, &writes, images).await?;
        Ok(spent(float(images) / took.as_secs_f64(), float(images), before, self.used(&[])?))
    }

    async fn by_replicas(&self, stages: &[Stage], name: &str) -> Result<Spent> {
        let pushed = Pushed::push(&self.client, &format!("bench/{name}"), self.images).await?;
        let all: Vec<&Stage> = stages.iter().collect();
        let (before, events) = (self.used(&all)?, pushed.events(&self.registry.host()));
        let took = stages[0].work_off_with(&stages[1..], events, self.in_flight, "signed").await?;
        Ok(spent(float(self.images) / took.as_secs_f64(), float(self.images), before, self.used(&all)?))
    }
}
