//! How many requests a signature costs the registry, counted in the registry's own log.

use std::collections::BTreeMap;

use anyhow::Result;
use integration_tests::house::{House, Keys, rule};
use integration_tests::image::Image;
use integration_tests::registry::{Client, Options, Registry};

use crate::Scale;
use crate::report::{Aim, Cell, Table, float, number, text};
use crate::stage::{Plan, Pushed, Stage};

/// How its writer names itself.
const AGENT: &str = "countersign/";

pub async fn measure(scale: Scale) -> Result<Table> {
    let mut table = Table::new("requests", "Requests per signature, from the registry's log", &["", "requests", "of them"]);
    let registry = Registry::start_with(Options { count_requests: true, ..Options::default() }).await?;
    let client = registry.client()?;
    let stage = Stage::start(Plan::new(registry.host(), 8, rule("bench", "bench", Keys::P256))).await?;

    // What a repository takes once is counted apart.
    let count = scale.of(40);
    let pushed = Pushed::push(&client, "bench/requests", count + 1).await?;
    let mut events = pushed.events(&registry.host());
    let before = registry.count_requests(AGENT)?;
    stage.work_off(vec![events.remove(0)], 1, "signed").await?;
    let first = registry.count_requests(AGENT)?;
    stage.work_off(events.clone(), 1, "signed").await?;
    let signed = registry.count_requests(AGENT)?;
    stage.work_off(events, 1, "already_signed").await?;
    let again = registry.count_requests(AGENT)?;
    index(&registry, &client, &stage).await?;
    let with_index = registry.count_requests(AGENT)?;

    row(&mut table, "first signature", &first_of(&first, &signed), count);
    table.aim("requests", Aim::AtMost(7.0), "requests for a first signature");
    row(&mut table, "one that is there", &first_of(&signed, &again), count);
    table.aim("requests", Aim::AtMost(3.0), "requests for a signature that is there");
    row(&mut table, "the first of a repository", &first_of(&before, &first), 1);
    row(&mut table, "an index and its two platforms: each of 3", &first_of(&again, &with_index), 3);
    table.close();
    Ok(table)
}

/// An index that is signed with its platforms, in a repository that has signatures already.
async fn index(registry: &Registry, client: &Client, stage: &Stage) -> Result<()> {
    let image = Image::index("requests")?;
    client.push(&image, "bench/requests", &["index"]).await?;
    let event = House::event(&registry.host(), "bench/requests", Some("index"), &image.manifest.digest);
    stage.work_off(vec![event.to_string().into()], 1, "signed").await?;
    Ok(())
}

fn first_of(before: &BTreeMap<String, usize>, after: &BTreeMap<String, usize>) -> BTreeMap<String, usize> {
    let new = |(kind, count): (&String, &usize)| (kind.clone(), count - before.get(kind).unwrap_or(&0));
    after.iter().map(new).filter(|(kind, count)| *count > 0 && !kind.ends_with(" other")).collect()
}

fn row(table: &mut Table, what: &str, requests: &BTreeMap<String, usize>, signatures: usize) {
    let each = |count: usize| float(count) / float(signatures);
    let kinds: Vec<String> = requests.iter().map(|(kind, count)| format!("{} {kind}", each(*count))).collect();
    let all: Cell = number(each(requests.values().sum()), 2);
    table.row([text(what), all, text(kinds.join(", "))]);
}
