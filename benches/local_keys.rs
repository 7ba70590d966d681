//! How fast a key in a file signs, beside what Rust's libraries do bare: `cargo bench --bench local_keys`.
//!
//! Signatures per second of this process's processor time, which what else the machine does hardly touches; the best of five
//! interleaved rounds. What is held to account is RSA-2048: at least 0.8 of the fastest of them.

use std::{fs, hint::black_box, path::Path, process::ExitCode, sync::Arc};

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

type Sign = Box<dyn Fn()>;

fn main() -> ExitCode {
    if cfg!(debug_assertions) {
        println!("This is not an optimised build.");
    }
    let folder = tempfile::tempdir().expect("a folder for the keys");
    let runtime = Runtime::new().expect("an async runtime");
    let rsa = compare("RSA-2048, PKCS#1 v1.5", &runtime, &ours(&runtime, folder.path(), KeySpec::Rsa2048), rsa_2048);
    compare("P-256", &runtime, &ours(&runtime, folder.path(), KeySpec::EcP256), p256);
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
        (
            "rsa",
            Box::new(move || {
                black_box(rsa.sign_prehash(&DIGEST).expect("it signs"));
            }),
        ),
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
        (
            "aws-lc-rs",
            Box::new(move || {
                black_box(aws_lc.sign(&random, &DIGEST).expect("it signs"));
            }),
        ),
        (
            "ring",
            Box::new(move || {
                black_box(ring.sign(&ring_random, &DIGEST).expect("it signs"));
            }),
        ),
    ]
}

/// Prints a table; returns what share of the fastest one ours is.
fn compare(what: &str, runtime: &Runtime, ours: &Ours, others: fn(&SecretDocument) -> Vec<(&'static str, Sign)>) -> f64 {
    let algorithm = Algorithm::ALL.into_iter().find(|algorithm| ours.key.public_key().supports(*algorithm));
    let algorithm = algorithm.expect("every key signs somehow");
    let key = Arc::clone(&ours.key);
    // As the daemon does: on an async thread, which hands what takes long to another.
    let own: Box<dyn Fn() + '_> = Box::new(move || {
        black_box(runtime.block_on(key.sign(algorithm, &DIGEST)).expect("it signs"));
    });
    let all: Vec<_> = [("countersign, file://", own)].into_iter().chain(others(&ours.pkcs8)).collect();
    let mut best = vec![0.0_f64; all.len()];
    for _ in 0..5 {
        for (best, (_, sign)) in best.iter_mut().zip(&all) {
            *best = best.max(rate(sign));
        }
    }
    let fastest = best[1..].iter().copied().fold(0.0, f64::max);
    println!("\n{what}: signatures a second of processor time, and of the fastest library");
    for ((name, _), rate) in all.iter().zip(&best) {
        println!("{name:24}{rate:>10.0}{:>7.2}", rate / fastest);
    }
    best[0] / fastest
}

fn rate(sign: &dyn Fn()) -> f64 {
    let (begun, mut made) = (processor_time(), 0_u32);
    loop {
        for _ in 0..16 {
            sign();
        }
        made += 16;
        let spent = processor_time() - begun;
        if spent >= 0.4 {
            return f64::from(made) / spent;
        }
    }
}

/// Seconds that all threads of this process have had so far (proc(5), `/proc/pid/stat`).
fn processor_time() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").expect("Linux tells of a process");
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let ticks: u32 = fields.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u32>().expect("a number")).sum();
    f64::from(ticks) / 100.0
}
