//! Stock cosign, signing the same images.

use anyhow::Result;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use integration_tests::house::{Keys, rule};
use integration_tests::registry::Registry;
use integration_tests::verifier::{Cosign, KeyPair};
use std::time::Instant;

use crate::Scale;
use crate::report::{Aim, Table, float, median, number, text};
use crate::stage::{Plan, Pushed, Stage};

pub async fn measure(scale: Scale) -> Result<Table> {
    let columns = ["", "at once", "sig/s", "cosign sig/s", "times cosign"];
    let mut table = Table::new("cosign", "Beside stock `cosign sign` (2.5, key pair, no transparency log)", &columns);
    let key = KeyPair::generate().await?;
    for (at_once, images, by_cosign) in [(1, 200, 12), (4, 400, 24)] {
        let registry = Registry::start().await?;
        let client = registry.client()?;
        let stage = Stage::start(Plan::new(registry.host(), at_once, rule("bench", "bench", Keys::P256))).await?;
        let (images, by_cosign) = (scale.of(images), scale.of(by_cosign));
        let mut rounds = Vec::new();
        for round in 0..scale.rounds {
            // The same manifests in two repositories, so that nobody finds the other's signatures.
            let ours = Pushed::push(&client, &format!("bench/{round}"), images).await?;
            let theirs = Pushed { repository: format!("cosign/{round}"), manifests: ours.manifests.clone() };
            ours.copy(&client, &theirs.repository).await?;
            let host = registry.host();

            let begun = Instant::now();
            let signed = theirs.manifests[..by_cosign]
                .iter()
                .map(async |manifest| Cosign::V2.sign(&key, &format!("{host}/{}@{}", theirs.repository, manifest.digest)).await);
            stream::iter(signed).buffer_unordered(at_once).try_collect::<Vec<()>>().await?;
            let cosign = float(by_cosign) / begun.elapsed().as_secs_f64();

            let took = stage.work_off(ours.events(&host), at_once, "signed").await?;
            rounds.push((float(images) / took.as_secs_f64(), cosign));
        }
        let of = |value: fn(&(f64, f64)) -> f64| median(rounds.iter().map(value));
        table.row([
            text(if at_once == 1 { "one by one".to_owned() } else { format!("{at_once} at a time") }),
            number(float(at_once), 0),
            number(of(|round| round.0), 0),
            number(of(|round| round.1), 1),
            number(of(|round| round.0 / round.1), 1),
        ]);
        table.aim("times cosign", Aim::AtLeast(20.0), format!("times `cosign sign`, {at_once} at once"));
    }
    table.close();
    Ok(table)
}
