//! The stock tools that sign, signing the same images with the same key: cosign of both kinds, notation and skopeo.

use std::time::Instant;

use anyhow::{Context, Result};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use integration_tests::house::{Keys, rule};
use integration_tests::registry::{Client, Options, Registry};
use integration_tests::verifier::{Cosign, KeyPair, Notation, Skopeo};

use crate::Scale;
use crate::report::{Aim, Table, float, median, number, text};
use crate::stage::{Plan, Pushed, Stage, tag};

#[derive(Debug, Clone, Copy)]
enum Tool {
    Cosign2,
    Cosign3,
    Notation,
    Skopeo,
}

impl Tool {
    const ALL: [Self; 4] = [Self::Cosign2, Self::Cosign3, Self::Notation, Self::Skopeo];

    /// What a user types.
    fn command(self) -> &'static str {
        match self {
            Self::Cosign2 => "cosign 2.5 sign",
            Self::Cosign3 => "cosign 3.1 sign",
            Self::Notation => "notation sign",
            Self::Skopeo => "skopeo copy --sign-by-…",
        }
    }

    /// How many times as many signatures are aimed at. Notation's key lies open in a file; the others spend their time on decrypting it.
    fn times(self) -> f64 {
        match self {
            Self::Cosign2 | Self::Cosign3 | Self::Skopeo => 20.0,
            Self::Notation => 1.0,
        }
    }

    /// What it writes, and so what is written beside it.
    fn format(self) -> &'static str {
        match self {
            Self::Cosign2 | Self::Skopeo => "cosign",
            Self::Cosign3 => "bundle",
            Self::Notation => "notation",
        }
    }
}

pub async fn measure(scale: Scale) -> Result<Table> {
    let columns = ["", "at once", "sig/s", "tool sig/s", "times", "requests", "tool requests"];
    let title = "Beside the stock tools that sign (same images, same P-256 key, no transparency log; requests per signature)";
    let mut table = Table::new("cosign", title, &columns);
    for (at_once, images, by_tool) in [(1, 200, 12), (4, 400, 24)] {
        let bench = Bench::start(at_once).await?;
        for tool in Tool::ALL {
            let mut rounds = Vec::new();
            for round in 0..scale.rounds {
                rounds.push(bench.round(tool, round, scale.of(images), scale.of(by_tool)).await?);
            }
            let of = |value: fn(&Round) -> f64| median(rounds.iter().map(value));
            let tool_requests = of(|round| round.tool.requests);
            table.row([
                text(format!("{}: {}", tool.format(), tool.command())),
                number(float(at_once), 0),
                number(of(|round| round.ours.rate), 0),
                number(of(|round| round.tool.rate), 1),
                number(of(|round| round.ours.rate / round.tool.rate), 1),
                number(of(|round| round.ours.requests), 2),
                number(tool_requests, 2),
            ]);
            let what = format!("beside `{}`, {at_once} at once", tool.command());
            table.aim("times", Aim::AtLeast(tool.times()), format!("{what}: times its signatures"));
            table.aim("requests", Aim::AtMost(tool_requests), format!("{what}: requests a signature"));
        }
    }
    table.note("each tool is a process a signature; cosign and skopeo spend most of its time on opening the key; skopeo copies onto the image itself");
    table.note("what a repository needs once is not in it: each has signed there before it is measured");
    table.close();
    Ok(table)
}

/// A daemon that writes each format in a namespace of its own, and the tools with its key.
struct Bench {
    at_once: usize,
    stage: Stage,
    client: Client,
    cosign: KeyPair,
    notation: Notation,
    registry: Registry,
}

struct Round {
    ours: Spent,
    tool: Spent,
}

struct Spent {
    /// Signatures a second.
    rate: f64,
    /// Of one signature.
    requests: f64,
}

impl Bench {
    async fn start(at_once: usize) -> Result<Self> {
        let registry = Registry::start_with(Options { count_requests: true, ..Options::default() }).await?;
        let rules: String = ["cosign", "bundle", "notation"]
            .map(|format| {
                rule(format, &format!("bench/{format}"), Keys::P256).replace("[\"cosign\"]", &format!("[\"{format}\"]"))
            })
            .join("\n");
        let stage = Stage::start(Plan::new(registry.host(), at_once, rules)).await?;
        let key = stage.key();
        let notation = Notation::with_key(&key, &stage.certificate_pem().await?)?;
        let (client, cosign) = (registry.client()?, KeyPair::import(&key).await?);
        Ok(Self { at_once, stage, client, cosign, notation, registry })
    }

    async fn round(&self, tool: Tool, round: usize, images: usize, by_tool: usize) -> Result<Round> {
        // The same manifests in two repositories, so that nobody finds the other's signatures; the first is the warm-up's.
        let name = format!("{tool:?}-{round}").to_lowercase();
        let ours = Pushed::push(&self.client, &format!("bench/{}/{name}", tool.format()), images + 1).await?;
        let theirs = Pushed { repository: format!("tool/{name}"), manifests: ours.manifests[..=by_tool].to_vec() };
        theirs.copy(&self.client, &theirs.repository).await?;
        let mut events = ours.events(&self.registry.host());

        self.sign(tool, &theirs, 0).await?;
        let tool = self.spent(by_tool, async {
            let signed = (1..=by_tool).map(|number| self.sign(tool, &theirs, number));
            stream::iter(signed).buffer_unordered(self.at_once).try_collect::<Vec<()>>().await.map(drop)
        });
        let tool = tool.await?;

        self.stage.work_off(vec![events.remove(0)], 1, "signed").await?;
        let ours = self.spent(images, async { self.stage.work_off(events, self.at_once, "signed").await.map(drop) }).await?;
        Ok(Round { ours, tool })
    }

    async fn sign(&self, tool: Tool, pushed: &Pushed, number: usize) -> Result<()> {
        let repository = format!("{}/{}", self.registry.host(), pushed.repository);
        let digest = &pushed.manifests[number].digest;
        let (pinned, tagged) = (format!("{repository}@{digest}"), format!("{repository}:{}", tag(number)));
        let signed = match tool {
            Tool::Cosign2 => Cosign::V2.sign(&self.cosign, &pinned).await,
            Tool::Cosign3 => Cosign::sign_bundle(&self.cosign, &pinned).await,
            Tool::Notation => self.notation.sign(&pinned, true).await,
            Tool::Skopeo => Skopeo::sign(&self.cosign, &tagged).await,
        };
        signed.with_context(|| format!("{} {pinned}", tool.command()))
    }

    /// What so many signatures take, while nobody else talks to the registry.
    async fn spent(&self, signatures: usize, work: impl Future<Output = Result<()>>) -> Result<Spent> {
        let before = self.registry.requests()?.len();
        let begun = Instant::now();
        work.await?;
        let rate = float(signatures) / begun.elapsed().as_secs_f64();
        let requests = float(self.registry.requests()?.len() - before) / float(signatures);
        Ok(Spent { rate, requests })
    }
}
