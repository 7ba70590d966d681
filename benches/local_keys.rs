//! How fast a key in a file signs, beside what Rust's libraries do bare: `cargo bench --bench local_keys`.
//!
//! One signature after the other on one thread, and as many at once as there are processors; the best of five rounds, because
//! whatever disturbs a round makes it slower. What is held to account is RSA-2048: at least 0.8 of the fastest of them.

use std::{
    fs,
    hint::black_box,
    path::Path,
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use aws_lc_rs::{
    digest::{Digest, SHA256},
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, RSA_PKCS1_SHA256, RsaKeyPair},
};
use countersign::{
    clock::Clock,
    kms::{self, Algorithm, Environment, KeySpec, SigningKey},
};
use rsa::{
    pkcs8::{DecodePrivateKey, SecretDocument},
    sha2::Sha256,
    signature::hazmat::PrehashSigner,
};
use tokio::runtime::Runtime;

const DIGEST: [u8; 32] = [7; 32];
const AIM: f64 = 0.8;

type Sign = Box<dyn Fn() + Send + Sync>;

fn main() -> ExitCode {
    if cfg!(debug_assertions) {
        println!("This is not an optimised build.");
    }
    let folder = tempfile::tempdir().expect("a folder for the keys");
    let runtime = Runtime::new().expect("an async runtime");
    let cores = thread::available_parallelism().map_or(1, usize::from);
    println!("{cores} processors; load average {}", fs::read_to_string("/proc/loadavg").unwrap_or_default().trim());
    let rsa = compare("RSA-2048, PKCS#1 v1.5", &runtime, cores, ours(&runtime, folder.path(), KeySpec::Rsa2048), rsa_2048);
    compare("P-256", &runtime, cores, ours(&runtime, folder.path(), KeySpec::EcP256), p256);
    if rsa >= AIM { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

struct Ours {
    key: Arc<dyn SigningKey>,
    pkcs8: SecretDocument,
}

fn ours(runtime: &Runtime, folder: &Path, spec: KeySpec) -> Ours {
    let path = folder.join(spec.name());
    kms::generate(spec, &path).expect("a key is made");
    let uri = format!("file://{}", path.display()).parse().expect("a path is a reference");
    let opened = runtime.block_on(kms::open_in(&uri, None, Clock::system(), &Environment::of([])));
    let (_, pkcs8) = SecretDocument::read_pem_file(&path).expect("the key's file is PEM");
    Ours { key: opened.expect("the key that was just made"), pkcs8 }
}

/// The others, each with the key that ours has.
fn rsa_2048(pkcs8: &SecretDocument) -> Vec<(&'static str, Sign)> {
    let der = pkcs8.as_bytes();
    let aws_lc = RsaKeyPair::from_pkcs8(der).expect("aws-lc reads it");
    let digest = Digest::import_less_safe(&DIGEST, &SHA256).expect("32 bytes");
    let ring = ring::signature::RsaKeyPair::from_pkcs8(der).expect("ring reads it");
    let random = ring::rand::SystemRandom::new();
    let rsa = rsa::pkcs1v15::SigningKey::<Sha256>::new(rsa::RsaPrivateKey::from_pkcs8_der(der).expect("rsa reads it"));
    vec![
        (
            "aws-lc-rs",
            Box::new(move || {
                let mut signature = [0; 256];
                aws_lc.sign_digest(&RSA_PKCS1_SHA256, &digest, &mut signature).expect("it signs");
                black_box(signature);
            }),
        ),
        (
            "ring",
            // It hashes by itself: 32 bytes more, which is nothing beside the rest.
            Box::new(move || {
                let mut signature = [0; 256];
                ring.sign(&ring::signature::RSA_PKCS1_SHA256, &random, &DIGEST, &mut signature).expect("it signs");
                black_box(signature);
            }),
        ),
        ("rsa", Box::new(move || drop(black_box(rsa.sign_prehash(&DIGEST).expect("it signs"))))),
    ]
}

fn p256(pkcs8: &SecretDocument) -> Vec<(&'static str, Sign)> {
    let der = pkcs8.as_bytes();
    let aws_lc = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, der).expect("aws-lc reads it");
    let random = SystemRandom::new();
    let ring_random = ring::rand::SystemRandom::new();
    let kind = &ring::signature::ECDSA_P256_SHA256_ASN1_SIGNING;
    let ring = ring::signature::EcdsaKeyPair::from_pkcs8(kind, der, &ring_random).expect("ring reads it");
    vec![
        ("aws-lc-rs", Box::new(move || drop(black_box(aws_lc.sign(&random, &DIGEST).expect("it signs"))))),
        ("ring", Box::new(move || drop(black_box(ring.sign(&ring_random, &DIGEST).expect("it signs"))))),
    ]
}

/// Prints a table; returns what share of the fastest one ours is, one after the other.
fn compare(
    what: &str,
    runtime: &Runtime,
    cores: usize,
    ours: Ours,
    others: fn(&SecretDocument) -> Vec<(&'static str, Sign)>,
) -> f64 {
    let others = others(&ours.pkcs8);
    let algorithm = Algorithm::ALL.into_iter().find(|algorithm| ours.key.public_key().supports(*algorithm));
    let algorithm = algorithm.expect("every key signs somehow");
    let mut best = vec![(0.0_f64, 0.0_f64); others.len() + 1];
    // Interleaved, so that what else the machine does meets all of them.
    for _ in 0..5 {
        let own = |at_once| runtime.block_on(own_rate(&ours.key, algorithm, at_once));
        let rates = others.iter().map(|(_, sign)| (bare_rate(sign, 1), bare_rate(sign, cores)));
        for (best, (one, many)) in best.iter_mut().zip([(own(1), own(cores))].into_iter().chain(rates)) {
            *best = (best.0.max(one), best.1.max(many));
        }
    }
    let fastest = best[1..].iter().fold((0.0_f64, 0.0_f64), |fastest, rate| (fastest.0.max(rate.0), fastest.1.max(rate.1)));
    println!(
        "\n{what}: signatures a second, and of the fastest library\n{:24}{:>10}{:>7}{:>14}{:>7}",
        "", "1 thread", "", "all threads", ""
    );
    for (name, (one, many)) in ["countersign, file://"].into_iter().chain(others.iter().map(|(name, _)| *name)).zip(&best) {
        println!("{name:24}{one:>10.0}{:>7.2}{many:>14.0}{:>7.2}", one / fastest.0, many / fastest.1);
    }
    best[0].0 / fastest.0
}

const ROUND: Duration = Duration::from_millis(400);

fn bare_rate(sign: &Sign, threads: usize) -> f64 {
    let begun = Instant::now();
    let made: usize = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let mut made = 0;
                    while begun.elapsed() < ROUND {
                        sign();
                        made += 1;
                    }
                    made
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().expect("a worker ends")).sum()
    });
    rate(made, begun)
}

async fn own_rate(key: &Arc<dyn SigningKey>, algorithm: Algorithm, at_once: usize) -> f64 {
    let begun = Instant::now();
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..at_once {
        let key = Arc::clone(key);
        workers.spawn(async move {
            let mut made = 0;
            while begun.elapsed() < ROUND {
                black_box(key.sign(algorithm, &DIGEST).await.expect("it signs"));
                made += 1;
            }
            made
        });
    }
    let made = workers.join_all().await.into_iter().sum();
    rate(made, begun)
}

fn rate(made: usize, begun: Instant) -> f64 {
    f64::from(u32::try_from(made).unwrap_or(u32::MAX)) / begun.elapsed().as_secs_f64()
}
