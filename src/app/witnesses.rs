//! Witnesses from the configuration: what is known of them without their KMS, what opens them, and their certificates.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    sync::Arc,
};

use anyhow::{Context as _, anyhow, bail};
use futures::future::join_all;
use jiff::SignedDuration;
use tracing::{error, warn};

use super::{open_ledger, rules, state_folder};
use crate::{
    certificate::{self, Chain},
    clock::Clock,
    config::{self, Config},
    kms::{Algorithm, PublicKey},
    ledger::Ledger,
    outcome::{Classify, Verdict},
    rule::Rules,
    signature::Format,
    telemetry::Metrics,
    verify::Known,
    witness::{self, Observation, Operation, Pin, Probed, Rate, TrustedKeySettings, TrustedKeys, Witness, WitnessSettings},
};

fn witness_settings(config: &Config, witness: &config::Witness) -> anyhow::Result<WitnessSettings> {
    let verify = witness
        .verify
        .iter()
        .map(|former| {
            let pem = fs::read_to_string(&former.key)
                .with_context(|| format!("witness {}: {} cannot be read", witness.name, former.key.display()))?;
            let revoked = former.revoked.map(|at| (at, former.reason.clone().unwrap_or_default()));
            Ok(TrustedKeySettings { pem, until: former.until, revoked })
        })
        .collect::<anyhow::Result<_>>()?;
    let kept = || state_folder(config).join("witnesses").join(format!("{}.pub.pem", witness.name));
    let pin = witness.public_key.clone().map_or_else(|| Pin::Kept(kept()), Pin::Given);
    Ok(WitnessSettings {
        name: witness.name.clone(),
        description: witness.description.clone(),
        key: witness.key.clone(),
        login: witness.login.clone(),
        verify,
        rate: witness.rate.map(|rate| Rate { per_second: rate.per_second, burst: rate.burst }),
        pin: Some(pin),
    })
}

/// What is known of a witness without asking a KMS or the ledger.
pub fn known(config: &Config, witness: &config::Witness) -> anyhow::Result<Known> {
    Ok(known_by(config, witness, TrustedKeys::offline(&witness_settings(config, witness)?)?))
}

/// The same by keys that were read elsewhere.
pub fn known_by(config: &Config, witness: &config::Witness, keys: TrustedKeys) -> Known {
    let takes_pss = config.rules.iter().any(|rule| rule.witness == witness.name && rule.allow_unreadable);
    let certificates = witness.certificate.iter().cloned().collect();
    Known { witness: witness.name.clone(), keys: keys.taking_pss(takes_pss), certificates }
}

/// Adds the certificates that the ledger keeps, if it can be asked: without any, keys decide alone.
pub async fn with_certificates(config: &Config, witness: &config::Witness, mut known: Known, clock: &Clock) -> Known {
    let is_there = match &config.ledger {
        config::Ledger::Sqlite { path } => path.exists(),
        config::Ledger::Postgres(_) => true,
    };
    let Some(key) = known.keys.own().filter(|_| is_there && signs_notation(config, witness)) else {
        return known;
    };
    let kept = async {
        let ledger = open_ledger(config, clock).await?;
        anyhow::Ok(certificate::kept(&ledger, &witness.name, key.fingerprint()).await?)
    };
    match kept.await {
        Ok(kept) => known.certificates.extend(kept),
        Err(error) => {
            let error = format!("{error:#}");
            warn!(
                witness = witness.name,
                error,
                "the certificates that the ledger keeps of it are not known: of its notation signatures, one in the configuration \
                 decides, or else its key alone"
            );
        }
    }
    known
}

/// Whether its signatures name a certificate.
fn signs_notation(config: &Config, witness: &config::Witness) -> bool {
    let mut rules = config.rules.iter().filter(|rule| rule.witness == witness.name);
    rules.any(|rule| rule.formats.iter().any(|format| format.envelope().is_some()))
}

/// A witness's public key: what is known here, else what its KMS says.
pub async fn public_key(config: &Config, witness: &config::Witness, clock: &Clock) -> anyhow::Result<PublicKey> {
    let settings = witness_settings(config, witness)?;
    match known_key(&settings)? {
        Some(key) => Ok(key),
        // Not pinned from here: only the daemon decides which key it saw first.
        None => Ok(crate::kms::open(&settings.key, settings.login.as_ref(), clock.clone()).await?.public_key().clone()),
    }
}

/// None if only the KMS knows it. That it is another one than it was is an error.
fn known_key(settings: &WitnessSettings) -> Result<Option<PublicKey>, witness::Error> {
    match TrustedKeys::offline(settings) {
        Ok(known) => Ok(known.own().cloned()),
        Err(witness::Error::NoKeyOffline { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The certificates that a witness's notation signatures may name, the one that new ones do first: the administrator's, else
/// those that are kept, else one that its key signs now and that is kept from then on. `renew` puts another one before them.
pub async fn certificates(config: &Config, witness: &config::Witness, clock: &Clock, renew: bool) -> anyhow::Result<Vec<Chain>> {
    if let Some(chain) = &witness.certificate {
        let name = &witness.name;
        if renew {
            let words = format!("witness {name} has a `certificate` in the configuration: renew that file");
            return Err(crate::cli::Usage(words).into());
        }
        check_certificate(witness, &public_key(config, witness, clock).await?, clock)?;
        return Ok(vec![chain.clone()]);
    }
    let ledger = open_ledger(config, clock).await?;
    let settings = witness_settings(config, witness)?;
    let known = known_key(&settings)?;
    if let Some(key) = known.as_ref().filter(|_| !renew) {
        let kept = certificate::kept(&ledger, &witness.name, key.fingerprint()).await?;
        if let Some(first) = kept.first() {
            warn_of_end(&witness.name, first, clock);
            return Ok(kept);
        }
    }
    // Not pinned from here, but held against what is.
    let opened = Witness::open(&WitnessSettings { pin: None, ..settings }, clock.clone()).await?;
    if let Some(key) = known.filter(|key| key != opened.public_key()) {
        let (was, is) = (key.fingerprint(), opened.public_key().fingerprint());
        anyhow::bail!("witness {}: its key was sha256:{was} and is sha256:{is} now, so nothing was signed", witness.name);
    }
    let certificates = if renew {
        certificate::renewed(&ledger, &opened, &witness.subject, clock).await?
    } else {
        certificate::kept_or_made(&ledger, &opened, &witness.subject, clock).await?
    };
    Ok(certificates)
}

/// That an administrator's certificate is for the witness's key, and valid. Warns if it will not be for long.
pub fn check_certificate(witness: &config::Witness, key: &PublicKey, clock: &Clock) -> anyhow::Result<()> {
    hold_certificate(witness, key)?;
    check_validity(witness, clock)
}

fn check_validity(witness: &config::Witness, clock: &Clock) -> anyhow::Result<()> {
    let Some(chain) = &witness.certificate else { return Ok(()) };
    let (now, from, until) = (clock.now(), chain.not_before(), chain.not_after());
    if now < from || now > until {
        anyhow::bail!("witness {}: its `certificate` is valid only from {from} to {until}: renew it", witness.name);
    }
    warn_of_end(&witness.name, chain, clock);
    Ok(())
}

/// The same for the daemon, which goes on with one that has ended: there may be more to sign than what names it.
fn accept_certificate(witness: &config::Witness, key: &PublicKey, clock: &Clock) -> anyhow::Result<()> {
    hold_certificate(witness, key)?;
    if let Err(error) = check_validity(witness, clock) {
        error!("{error}");
    }
    Ok(())
}

fn hold_certificate(witness: &config::Witness, key: &PublicKey) -> anyhow::Result<()> {
    let Some(chain) = witness.certificate.as_ref().filter(|chain| chain.public_key() != key) else { return Ok(()) };
    let (name, certified, found) = (&witness.name, chain.public_key().fingerprint(), key.fingerprint());
    anyhow::bail!(
        "witness {name}: its `certificate` ({}) is for the key sha256:{certified}, and its `key` is sha256:{found}: have the issuer \
         certify the witness's own key (`countersign witness public-key {name}`)",
        chain.subject()
    )
}

/// Signatures end with their certificates, so that readers need the next one in time.
fn warn_of_end(witness: &str, chain: &Chain, clock: &Clock) {
    const AHEAD: SignedDuration = SignedDuration::from_hours(30 * 24);
    let left = chain.not_after().duration_since(clock.now());
    if left < AHEAD {
        warn!(witness, until = %chain.not_after(), "the certificate of its notation signatures ends soon, and all of them with it");
    }
}

/// A witness that cannot be opened for now, and why.
pub type Unopened = (config::Witness, Unready);

/// Why a witness cannot sign.
#[derive(Debug, thiserror::Error)]
pub enum Unready {
    #[error(transparent)]
    Witness(#[from] witness::Error),
    #[error(transparent)]
    Certificate(#[from] certificate::KeptError),
}

impl Classify for Unready {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Witness(error) => error.verdict(),
            Self::Certificate(error) => error.verdict(),
        }
    }
}

/// Opens every witness that an enabled rule names or that is named at all; pins the keys that are seen for the first time.
pub(super) async fn open_witnesses(
    config: &Config,
    ledger: &Ledger,
    clock: &Clock,
    metrics: &Metrics,
) -> anyhow::Result<(HashMap<String, Arc<Witness>>, Vec<Unopened>)> {
    let pins = state_folder(config).join("witnesses");
    fs::create_dir_all(&pins).with_context(|| format!("{}: cannot be created", pins.display()))?;
    let opened = config.witnesses.iter().map(|witness| open_witness(config, witness, ledger, clock, metrics));
    let (mut witnesses, mut unopened) = (HashMap::new(), vec![]);
    for (opened, witness) in join_all(opened).await.into_iter().zip(&config.witnesses) {
        match opened? {
            Ok(open) => drop(witnesses.insert(witness.name.clone(), open)),
            Err(error) => unopened.push((witness.clone(), error)),
        }
    }
    Ok((witnesses, unopened))
}

/// A witness with all that its rules need. What is wrong with the configuration is the outer error.
pub(super) async fn open_witness(
    config: &Config,
    witness: &config::Witness,
    ledger: &Ledger,
    clock: &Clock,
    metrics: &Metrics,
) -> anyhow::Result<Result<Arc<Witness>, Unready>> {
    let settings = witness_settings(config, witness)?;
    metrics.kms_called(&settings.name, "get_public_key");
    let open = match Witness::open(&settings, clock.clone()).await {
        Ok(open) => open,
        Err(error) => return Ok(Err(error.into())),
    };
    check_rules(config, &open)?;
    accept_certificate(witness, open.public_key(), clock)?;
    let certificates = match &witness.certificate {
        _ if !signs_notation(config, witness) => Ok(vec![]),
        // What was signed under those that it had before counts on.
        Some(chain) => certificate::kept(ledger, &witness.name, open.public_key().fingerprint())
            .await
            .map(|kept| [chain.clone()].into_iter().chain(kept).collect()),
        None => certificate::kept_or_made(ledger, &open, &witness.subject, clock).await,
    };
    let certificates: Vec<Chain> = match certificates {
        Ok(certificates) => certificates,
        Err(error) => return Ok(Err(error.into())),
    };
    if let (Some(first), None) = (certificates.first(), &witness.certificate) {
        warn_of_end(&witness.name, first, clock);
    }
    Ok(Ok(watched(open.certified(certificates), metrics)))
}

/// With its waits and its KMS's answers in the metrics.
fn watched(witness: Witness, metrics: &Metrics) -> Arc<Witness> {
    let (metrics, name) = (metrics.clone(), witness.name().to_owned());
    metrics.kms_went_away(&name, 0);
    Arc::new(witness.observed(witness::Observer::new(move |observation| match observation {
        Observation::Asked { operation, waited, result, took } => {
            metrics.kms_called(&name, operation.name());
            metrics.throttled(&name, waited);
            if operation == Operation::Sign {
                metrics.kms_asked(&name, result, took);
            }
        }
        Observation::Away(away) => metrics.kms_went_away(&name, u64::from(away)),
    })))
}

/// No rule may ask a key for what it cannot do.
fn check_rules(config: &Config, witness: &Witness) -> anyhow::Result<()> {
    for rule in config.rules.iter().filter(|rule| rule.witness == witness.name()) {
        config::check_rule_against_key(rule, witness.public_key().spec().name()).map_err(|problem| anyhow!(problem))?;
        if !witness.allows(rule.algorithm) {
            let (place, name, wanted, own) = (&rule.place, &rule.name, rule.algorithm, own_algorithm(witness));
            bail!(
                "{place}: rule \"{name}\" signs with {wanted}, and the KMS holds the key of its witness \"{}\" to {own}: name a \
                 key that was made for the former, or write algorithm = \"{own}\"",
                witness.name()
            );
        }
    }
    Ok(())
}

/// What the key signs with, and of two that which most verifiers take.
fn own_algorithm(witness: &Witness) -> Algorithm {
    let usual = Format::Cosign.algorithm(witness.public_key().spec());
    let mut all = usual.into_iter().chain(Algorithm::ALL);
    all.find(|algorithm| witness.allows(*algorithm)).or(usual).expect("cosign's format has an algorithm for every kind of key")
}

/// Sees whether a witness may sign all that its rules want, and how that was found out.
pub async fn probe(config: &Config, witness: &config::Witness, clock: &Clock) -> anyhow::Result<Probed> {
    let settings = WitnessSettings { pin: None, ..witness_settings(config, witness)? };
    let opened = Witness::open(&settings, clock.clone()).await?;
    check_rules(config, &opened)?;
    check_certificate(witness, opened.public_key(), clock)?;
    let mut probed = Probed::DryRun;
    for algorithm in algorithms_of(&rules(config)?, &opened) {
        probed = opened.probe(algorithm).await?;
    }
    Ok(probed)
}

/// What enabled rules want of a witness; if nothing, what its key signs with.
pub(super) fn algorithms_of(rules: &Rules, witness: &Witness) -> Vec<Algorithm> {
    let wanted = rules.all().iter().filter(|rule| rule.enabled && rule.witness == witness.name());
    let wanted: BTreeSet<_> = wanted.map(|rule| rule.algorithm).collect();
    if wanted.is_empty() { vec![own_algorithm(witness)] } else { wanted.into_iter().collect() }
}

/// Opens a witness's key to have its KMS verify: its public half is the one that the KMS gives now, held against the pinned one.
pub async fn remote_witness(config: &Config, witness: &config::Witness, clock: &Clock) -> anyhow::Result<Witness> {
    let settings = witness_settings(config, witness)?;
    let kept = settings.pin.as_ref().is_some_and(Pin::exists);
    // Only the daemon decides which key it saw first.
    let pin = settings.pin.filter(|_| kept);
    Ok(Witness::open(&WitnessSettings { pin, ..settings }, clock.clone()).await?)
}
