//! Signatures per second, event in to signature read back, beside a bare client that makes the same requests, and beside
//! the bare KMS; and what each process spends on one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, RSA_PKCS1_SHA256, RsaKeyPair};
use integration_tests::house::{Keys, rule};
use integration_tests::ministack::{Credentials, Ministack, REGION};
use integration_tests::registry::{Client, Registry};

use crate::Scale;
use crate::bare::{Signings, Writes};
use crate::meter;
use crate::report::{Aim, Cell, Table, float, median, number, text};
use crate::stage::{Plan, Pushed, Stage};
use crate::wire::{Until, at_once};

/// Of one image, in the row of images that have several.
const TAGS: usize = 8;

pub async fn measure(scale: Scale) -> Result<Table> {
    let columns = ["", "in flight", "sig/s", "of bare", "of bare+KMS", "CPU ms: daemon", "registry", "client"];
    let mut table = Table::new("signing", "Signatures per second, event in to signature read back", &columns);
    let kms = Ministack::start().await?;
    kms.key("ECC_NIST_P256", "release").await?;
    let user = kms.user("countersign", &["kms:Sign", "kms:GetPublicKey", "kms:DescribeKey"]).await?;
    for (in_flight, images, asked) in [(1, 240, 60), (8, 480, 120), (32, 640, 160)] {
        let cell = Cellblock::start(&kms, &user, in_flight).await?;
        let mut rounds = Vec::new();
        for round in 0..scale.rounds {
            rounds.push(cell.round(round, scale.of(images), scale.of(asked)).await?);
        }
        report(&mut table, in_flight, &rounds);
    }
    let (p256, rsa) = alone()?;
    table.note("of bare: beside a client with precomputed signatures that makes the same 7 requests over kept connections, as many at once");
    table.note("of bare+KMS: beside the bare client and then the bare KMS, one after the other (1 / (1/a + 1/b))");
    table.note(format!(
        "making one signature takes {p256:.3} ms of CPU with P-256 and {rsa:.3} ms with RSA-2048, nothing else counted"
    ));
    table.note("ratios are medians of the rounds' ratios; the registry, the daemon, the KMS and this client share the machine");
    table.close();
    Ok(table)
}

/// One number of signings in flight: three daemons that differ in their key, beside one registry.
struct Cellblock<'a> {
    registry: Registry,
    client: Client,
    kms: &'a Ministack,
    user: &'a Credentials,
    p256: Stage,
    rsa: Stage,
    remote: Stage,
    in_flight: usize,
}

struct Round {
    bare: Spent,
    p256: Spent,
    tags: Spent,
    rsa: Spent,
    remote: Spent,
    kms: Spent,
}

/// A run, and what each process spent on one signature of it, in milliseconds.
#[derive(Clone, Copy)]
struct Spent {
    rate: f64,
    daemon: f64,
    registry: f64,
    client: f64,
}

impl<'a> Cellblock<'a> {
    async fn start(kms: &'a Ministack, user: &'a Credentials, in_flight: usize) -> Result<Self> {
        let registry = Registry::start().await?;
        let plan = |keys| Plan { keys, ..Plan::new(registry.host(), in_flight, rule("bench", "bench", keys)) };
        let remote = Plan {
            key_uri: Some(format!("awskms://http://{}/alias/release?region={REGION}", kms.host())),
            environment: vec![
                ("AWS_ACCESS_KEY_ID", user.access_key_id.clone()),
                ("AWS_SECRET_ACCESS_KEY", user.secret_access_key.clone()),
            ],
            ..plan(Keys::P256)
        };
        Ok(Self {
            client: registry.client()?,
            p256: Stage::start(plan(Keys::P256)).await?,
            rsa: Stage::start(plan(Keys::Rsa2048)).await?,
            remote: Stage::start(remote).await?,
            registry,
            kms,
            user,
            in_flight,
        })
    }

    async fn round(&self, round: usize, images: usize, asked: usize) -> Result<Round> {
        let Self { kms, user, .. } = self;
        let bare = self.bare(&format!("bench/bare{round}"), images).await?;
        let p256 = self.ours(&self.p256, &format!("bench/p256-{round}"), images).await?;
        let tags = self.tags(&self.p256, &format!("bench/tags-{round}"), images / TAGS).await?;
        let rsa = self.ours(&self.rsa, &format!("bench/rsa-{round}"), images).await?;
        let remote = self.ours(&self.remote, &format!("bench/kms-{round}"), asked).await?;
        let signings = Arc::new(Signings::prepare(kms, user, "release", Keys::P256, asked));
        let kms = self
            .spending(asked, None, async { Ok(at_once(&kms.host(), self.in_flight, Until::Count(asked), &signings).await?.took) })
            .await?;
        Ok(Round { bare, p256, tags, rsa, remote, kms })
    }

    async fn bare(&self, repository: &str, images: usize) -> Result<Spent> {
        let pushed = Pushed::push(&self.client, repository, images).await?;
        let host = self.registry.host();
        let writes = Arc::new(Writes::prepare(&self.client, &host, &pushed, Keys::P256).await?);
        let run = async { Ok(at_once(&host, self.in_flight, Until::Count(images), &writes).await?.took) };
        self.spending(images, None, run).await
    }

    async fn ours(&self, stage: &Stage, repository: &str, images: usize) -> Result<Spent> {
        let pushed = Pushed::push(&self.client, repository, images).await?;
        let events = pushed.events(&self.registry.host());
        let run = stage.work_off(events, self.in_flight, "signed");
        let spent = self.spending(images, Some(stage), run).await?;
        stage.check(&self.client, &pushed, &[0, images / 2, images - 1]).await?;
        Ok(spent)
    }

    /// Images that have several tags each.
    async fn tags(&self, stage: &Stage, repository: &str, images: usize) -> Result<Spent> {
        let pushed = Pushed::push(&self.client, repository, images).await?;
        let events = pushed.with_tags(&self.client, &self.registry.host(), TAGS).await?;
        let count = events.len();
        self.spending(count, Some(stage), stage.work_off(events, self.in_flight, "signed")).await
    }

    async fn spending(&self, count: usize, stage: Option<&Stage>, run: impl Future<Output = Result<Duration>>) -> Result<Spent> {
        let registry = self.registry.pid().context("the registry is not running")?;
        let now = || {
            let daemon = stage.map_or(Ok(0.0), Stage::cpu)?;
            anyhow::Ok([daemon, meter::cpu(registry)?, meter::cpu(std::process::id())?])
        };
        let before = now()?;
        let took = run.await?;
        let after = now()?;
        let [daemon, registry, client] = std::array::from_fn(|index| (after[index] - before[index]) * 1e3 / float(count));
        Ok(Spent { rate: float(count) / took.as_secs_f64(), daemon, registry, client })
    }
}

fn report(table: &mut Table, in_flight: usize, rounds: &[Round]) {
    let of = |value: fn(&Round) -> f64| median(rounds.iter().map(value));
    let mut row =
        |what: &str, spent: fn(&Round) -> Spent, of_bare: Option<fn(&Round) -> f64>, of_both: Option<fn(&Round) -> f64>| {
            let of_spent = |field: fn(&Spent) -> f64| median(rounds.iter().map(|round| field(&spent(round))));
            let ratio = |ratio: Option<fn(&Round) -> f64>| ratio.map_or(Cell::None, |ratio| number(of(ratio), 2));
            let cpu = |value: f64| if value > 0.0 { number(value, 3) } else { Cell::None };
            table.row([
                text(what),
                number(float(in_flight), 0),
                number(of_spent(|spent| spent.rate), 0),
                ratio(of_bare),
                ratio(of_both),
                cpu(of_spent(|spent| spent.daemon)),
                cpu(of_spent(|spent| spent.registry)),
                cpu(of_spent(|spent| spent.client)),
            ]);
            let aim = format!("{what}, {in_flight} in flight");
            if of_bare.is_some() && of_both.is_none() {
                table.aim("of bare", Aim::AtLeast(0.85), format!("signatures, {aim}: of the bare client"));
            }
            if what == "P-256 file" {
                table.aim("CPU ms: daemon", Aim::AtMost(0.3), format!("signatures, {aim}: daemon CPU in ms"));
            }
        };
    row("bare client", |round| round.bare, None, None);
    row("P-256 file", |round| round.p256, Some(|round| round.p256.rate / round.bare.rate), None);
    let of_tags = format!("P-256 file, {TAGS} tags an image");
    row(&of_tags, |round| round.tags, Some(|round| round.tags.rate / round.bare.rate), None);
    row("RSA-2048 file", |round| round.rsa, Some(|round| round.rsa.rate / round.bare.rate), None);
    row(
        "P-256 in ministack",
        |round| round.remote,
        Some(|round| round.remote.rate / round.bare.rate),
        Some(|round| round.remote.rate * (1.0 / round.bare.rate + 1.0 / round.kms.rate)),
    );
    row("bare ministack", |round| round.kms, None, None);
}

/// Milliseconds that one signature takes, alone: P-256 and RSA-2048.
fn alone() -> Result<(f64, f64)> {
    let (random, message) = (SystemRandom::new(), [7; 200]);
    let time = |count: u32, sign: &mut dyn FnMut() -> Result<()>| {
        let begun = Instant::now();
        (0..count).try_for_each(|_| sign())?;
        anyhow::Ok(begun.elapsed().as_secs_f64() * 1e3 / f64::from(count))
    };
    let p256 = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING)?;
    let p256 = time(200, &mut || Ok(p256.sign(&random, &message).map(drop)?))?;
    let rsa = RsaKeyPair::generate(KeySize::Rsa2048)?;
    let mut signature = vec![0; rsa.public_modulus_len()];
    let rsa = time(50, &mut || Ok(rsa.sign(&RSA_PKCS1_SHA256, &random, &message, &mut signature)?))?;
    Ok((p256, rsa))
}
