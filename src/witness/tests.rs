mod asking;

use std::{collections::VecDeque, fs, path::Path, sync::Mutex, time::Duration};

use async_trait::async_trait;
use tempfile::TempDir;
use tokio::time::Instant;

use super::*;
use crate::{clock::ManualClock, kms::KeySpec};

const RSA_PUBLIC: &str = include_str!("../../tests/data/vectors/keys/rsa2048.pub.pem");
const DIGEST: [u8; 32] = [7; 32];

fn time(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn clock() -> (Clock, ManualClock) {
    Clock::manual(time("2026-11-21T09:00:00Z"))
}

fn generated(folder: &TempDir, name: &str) -> (KeyUri, PublicKey) {
    let path = folder.path().join(name);
    let public_key = kms::generate(KeySpec::EcP256, &path).unwrap();
    (KeyUri::File(path), public_key)
}

fn settings(key: KeyUri) -> WitnessSettings {
    WitnessSettings {
        name: "release".into(),
        description: "Signs it all".into(),
        key,
        login: None,
        verify: vec![],
        rate: None,
        pin: None,
    }
}

fn trusted(key: &PublicKey) -> TrustedKeySettings {
    TrustedKeySettings { pem: key.to_pem(), until: None, revoked: None }
}

fn fingerprints<'a>(keys: impl Iterator<Item = &'a PublicKey>) -> Vec<&'a str> {
    keys.map(PublicKey::fingerprint).collect()
}

/// Answers as it is told to, and honestly after that.
#[derive(Debug)]
struct Scripted {
    honest: Arc<dyn SigningKey>,
    script: Mutex<VecDeque<Result<RawSignature, kms::Error>>>,
    calls: Mutex<u32>,
    /// The digests that were to be signed.
    digests: Mutex<Vec<[u8; 32]>>,
    dry_runs: Mutex<Option<u32>>,
    /// Every call fails so after this time.
    gone: Mutex<Option<Duration>>,
}

#[async_trait]
impl SigningKey for Scripted {
    fn uri(&self) -> &KeyUri {
        self.honest.uri()
    }
    fn resolved(&self) -> &str {
        self.honest.resolved()
    }
    fn public_key(&self) -> &PublicKey {
        self.honest.public_key()
    }
    async fn sign(&self, algorithm: Algorithm, digest: &[u8; 32]) -> Result<RawSignature, kms::Error> {
        *self.calls.lock().unwrap() += 1;
        self.digests.lock().unwrap().push(*digest);
        let gone = *self.gone.lock().unwrap();
        if let Some(after) = gone {
            tokio::time::sleep(after).await;
            return Err(unreachable());
        }
        let scripted = self.script.lock().unwrap().pop_front();
        match scripted {
            Some(answer) => answer,
            None => self.honest.sign(algorithm, digest).await,
        }
    }
    async fn dry_run(&self, _: Algorithm, _: &[u8; 32]) -> Result<bool, kms::Error> {
        let mut made = self.dry_runs.lock().unwrap();
        if let Some(made) = &mut *made {
            *made += 1;
        }
        Ok(made.is_some())
    }
}

impl Scripted {
    fn calls(&self) -> u32 {
        *self.calls.lock().unwrap()
    }
}

fn unreachable() -> kms::Error {
    kms::Error::Unreachable { key: Arc::new(release()), at: "kms.test".into(), source: "timed out".into() }
}

async fn scripted(folder: &TempDir, script: Vec<Result<RawSignature, kms::Error>>) -> (Witness, Arc<Scripted>) {
    let (uri, _) = generated(folder, &format!("scripted-{}", fastrand::u64(..)));
    let honest = kms::open(&uri, None, clock().0).await.unwrap();
    let key = Arc::new(Scripted {
        honest,
        script: Mutex::new(script.into()),
        calls: Mutex::default(),
        digests: Mutex::default(),
        dry_runs: Mutex::default(),
        gone: Mutex::default(),
    });
    (Witness::from_key(&settings(uri), key.clone(), clock().0).unwrap(), key)
}

fn release() -> KeyUri {
    "awskms:///alias/release".parse().unwrap()
}

#[tokio::test]
async fn a_witness_signs_with_its_key_and_says_who_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (uri, public_key) = generated(&folder, "key.pem");
    let witness = Witness::open(&settings(uri.clone()), clock().0).await.unwrap();
    assert_eq!((witness.name(), witness.description()), ("release", "Signs it all"));
    assert_eq!((witness.key_uri(), witness.public_key()), (&uri, &public_key));
    let signature = witness.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();
    assert_eq!(public_key.verify(Algorithm::EcdsaSha256, &DIGEST, signature.raw().as_ref()), Ok(()));
}

#[tokio::test]
async fn an_algorithm_that_the_key_has_not_is_refused_without_asking_the_kms() {
    let folder = tempfile::tempdir().unwrap();
    let (witness, key) = scripted(&folder, vec![]).await;
    let error = witness.sign(Algorithm::RsaPssSha256, &DIGEST).await.unwrap_err();
    assert!(matches!(error, kms::Error::WrongAlgorithm { .. }), "{error}");
    assert_eq!(*key.calls.lock().unwrap(), 0);
}

#[tokio::test]
async fn a_wrong_signature_is_asked_for_once_more_and_never_returned() {
    let folder = tempfile::tempdir().unwrap();
    let (uri, _) = generated(&folder, "other.pem");
    let other = kms::open(&uri, None, clock().0).await.unwrap();
    let wrong = other.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();

    let (witness, key) = scripted(&folder, vec![Ok(wrong.clone())]).await;
    witness.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();
    assert_eq!(*key.calls.lock().unwrap(), 2);

    let (witness, key) = scripted(&folder, vec![Ok(wrong.clone()), Ok(RawSignature(vec![]))]).await;
    let error = witness.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap_err();
    assert_eq!(*key.calls.lock().unwrap(), 2);
    assert!(
        error.to_string().contains("was exchanged") && error.to_string().contains(witness.public_key().fingerprint()),
        "{error}"
    );
    assert!(matches!(error.verdict(), Verdict::Refuse { cure } if cure.contains("restart")));
}

#[tokio::test]
async fn other_failures_go_to_the_caller_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let denied = || Err(kms::Error::Denied { key: Arc::new(release()), what: "not allowed".into() });
    let (witness, scripted) = scripted(&folder, vec![denied()]).await;
    let error = witness.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap_err();
    assert!(matches!(error, kms::Error::Denied { .. }), "{error}");
    assert_eq!(*scripted.calls.lock().unwrap(), 1);
}

#[tokio::test(start_paused = true)]
async fn after_a_throttling_the_next_call_waits_as_long_as_the_kms_said() {
    let folder = tempfile::tempdir().unwrap();
    let after = Some(Duration::from_secs(3));
    let throttled = Err(kms::Error::Throttled { key: Arc::new(release()), what: "slow down".into(), retry_after: after });
    let (witness, _) = scripted(&folder, vec![throttled]).await;
    let error = witness.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap_err();
    assert_eq!(error.verdict(), Verdict::Retry { after, throttled: true });
    let start = Instant::now();
    witness.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();
    assert!(start.elapsed() >= Duration::from_secs(3));
}

#[tokio::test]
async fn the_key_is_pinned_once_and_another_one_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (uri, first) = generated(&folder, "key.pem");
    let pin = folder.path().join("release.pub.pem");
    let settings = WitnessSettings { pin: Some(Pin::Kept(pin.clone())), ..settings(uri) };
    for _ in 0..2 {
        Witness::open(&settings, clock().0).await.unwrap();
        assert_eq!(fs::read_to_string(&pin).unwrap(), first.to_pem());
    }

    fs::remove_file(folder.path().join("key.pem")).unwrap();
    let (_, second) = generated(&folder, "key.pem");
    for error in [Witness::open(&settings, clock().0).await.unwrap_err(), TrustedKeys::offline(&settings).unwrap_err()] {
        let text = error.to_string();
        for part in [first.fingerprint(), second.fingerprint(), pin.to_str().unwrap(), "`verify`", "remove the file"] {
            assert!(text.contains(part), "{text:?} does not say {part:?}");
        }
    }
    assert_eq!(fs::read_to_string(&pin).unwrap(), first.to_pem());

    // Listing the old one is saying that the change was meant.
    let rotated = WitnessSettings { verify: vec![trusted(&first)], ..settings };
    let witness = Witness::open(&rotated, clock().0).await.unwrap();
    assert_eq!(fs::read_to_string(&pin).unwrap(), second.to_pem());
    let now = clock().0.now();
    assert_eq!(fingerprints(witness.trusted_keys().at(now)), [second.fingerprint(), first.fingerprint()]);
    // And when the old one is listed no longer, the new one is the pinned one.
    Witness::open(&WitnessSettings { verify: vec![], ..rotated }, clock().0).await.unwrap();
}

#[tokio::test]
async fn a_damaged_pin_is_refused_and_an_unwritable_one_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (uri, _) = generated(&folder, "key.pem");
    let pin = folder.path().join("release.pub.pem");
    fs::write(&pin, "-----BEGIN PUBLIC KEY-----\n").unwrap();
    let damaged = WitnessSettings { pin: Some(Pin::Kept(pin.clone())), ..settings(uri.clone()) };
    let error = Witness::open(&damaged, clock().0).await.unwrap_err();
    assert!(matches!(error, Error::PinDamaged { .. }), "{error}");
    let nowhere = WitnessSettings { pin: Some(Pin::Kept(folder.path().join("no/such/folder.pem"))), ..settings(uri) };
    let error = Witness::open(&nowhere, clock().0).await.unwrap_err();
    assert!(error.to_string().contains("no/such/folder.pem"), "{error}");
}

#[test]
fn offline_the_keys_come_from_the_file_the_pin_or_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let (file, own) = generated(&folder, "key.pem");
    let rsa = PublicKey::from_pem(RSA_PUBLIC).unwrap();
    let now = clock().0.now();
    let aws = release();

    let from_file = TrustedKeys::offline(&settings(file)).unwrap();
    assert_eq!(fingerprints(from_file.at(now)), [own.fingerprint()]);
    assert_eq!(from_file.own(), Some(&own));

    let error = TrustedKeys::offline(&settings(aws.clone())).unwrap_err().to_string();
    assert!(error.contains("awskms:///alias/release") && error.contains("`verify`"), "{error}");

    let pin = folder.path().join("release.pub.pem");
    fs::write(&pin, own.to_pem()).unwrap();
    let pinned = WitnessSettings { pin: Some(Pin::Kept(pin.clone())), ..settings(aws.clone()) };
    assert_eq!(fingerprints(TrustedKeys::offline(&pinned).unwrap().at(now)), [own.fingerprint()]);

    let configured = WitnessSettings { verify: vec![trusted(&rsa)], ..settings(aws) };
    let keys = TrustedKeys::offline(&configured).unwrap();
    assert_eq!((keys.own(), fingerprints(keys.at(now))), (None, vec![rsa.fingerprint()]));

    let unreadable = KeyUri::File(Path::new("/nonexistent/key.pem").into());
    let pinned = WitnessSettings { pin: Some(Pin::Kept(pin)), ..settings(unreadable.clone()) };
    assert_eq!(TrustedKeys::offline(&pinned).unwrap().own(), Some(&own));
    assert!(matches!(TrustedKeys::offline(&settings(unreadable)), Err(Error::Key { .. })));
}

#[test]
fn a_key_counts_until_its_end_and_until_its_revocation() {
    let folder = tempfile::tempdir().unwrap();
    let (uri, own) = generated(&folder, "key.pem");
    let (ended, revoked) = (generated(&folder, "ended.pem").1, generated(&folder, "revoked.pem").1);
    let until = time("2027-03-01T00:00:00Z");
    let since = time("2026-12-24T03:00:00Z");
    let settings = WitnessSettings {
        verify: vec![
            TrustedKeySettings { until: Some(until), ..trusted(&ended) },
            TrustedKeySettings {
                until: Some(until),
                revoked: Some((since, "the laptop was stolen".into())),
                ..trusted(&revoked)
            },
        ],
        ..settings(uri)
    };
    let keys = TrustedKeys::offline(&settings).unwrap();
    let second = Duration::from_secs(1);
    assert_eq!(keys.at(since - second).count(), 3);
    assert_eq!(fingerprints(keys.at(since)), [own.fingerprint(), ended.fingerprint()]);
    assert_eq!(keys.at(until - second).count(), 2);
    assert_eq!(fingerprints(keys.at(until)), [own.fingerprint()]);
    let next = [since - second, since, until].map(|now| keys.next_change(now));
    assert_eq!(next, [Some(since), Some(until), None]);
    let says = |key| keys.standing(key, until).unwrap().to_string();
    assert_eq!(says(&ended), "counted until 2027-03-01T00:00:00Z");
    assert_eq!(says(&revoked), "was revoked on 2026-12-24T03:00:00Z: the laptop was stolen");
    assert_eq!(keys.standing(&PublicKey::from_pem(RSA_PUBLIC).unwrap(), until), None);
}

#[tokio::test]
async fn a_witness_whose_own_key_is_revoked_signs_nothing_from_then_on() {
    let folder = tempfile::tempdir().unwrap();
    let (uri, own) = generated(&folder, "key.pem");
    let since = time("2026-12-24T03:00:00Z");
    let revoked = TrustedKeySettings { revoked: Some((since, "leaked".into())), ..trusted(&own) };
    let settings = WitnessSettings { verify: vec![revoked], ..settings(uri) };
    let (clock, hand) = clock();
    let witness = Witness::open(&settings, clock.clone()).await.unwrap();
    witness.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();
    hand.advance(Duration::from_secs(40 * 24 * 3600));
    let error = witness.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap_err();
    assert!(error.to_string().contains("was revoked on 2026-12-24T03:00:00Z: leaked"), "{error}");
    assert!(matches!(Witness::open(&settings, clock).await, Err(Error::Retired { .. })));
}

#[tokio::test]
async fn what_is_wrong_under_verify_is_named_by_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let (uri, own) = generated(&folder, "key.pem");
    let private = fs::read_to_string(folder.path().join("key.pem")).unwrap();
    let mistaken = TrustedKeySettings { pem: private.clone(), until: None, revoked: None };
    let settings = WitnessSettings { verify: vec![trusted(&own), mistaken], ..settings(uri) };
    let error = Witness::open(&settings, clock().0).await.unwrap_err();
    assert!(error.to_string().contains("key 2 under `verify`"), "{error}");
    let secret = private.lines().nth(1).unwrap();
    assert!(!format!("{settings:?} {error:?}").contains(secret));

    let twice = WitnessSettings { verify: vec![trusted(&own), trusted(&own)], ..settings };
    let error = Witness::open(&twice, clock().0).await.unwrap_err();
    assert!(error.to_string().contains("keys 1 and 2 under `verify` are the same"), "{error}");
}

#[tokio::test]
async fn a_public_key_that_the_administrator_gave_is_compared_and_never_written() {
    let folder = tempfile::tempdir().unwrap();
    let (key, given) = (folder.path().join("key.pem"), folder.path().join("given.pub.pem"));
    let own = kms::generate(KeySpec::EcP256, &key).unwrap();
    let other = kms::generate(KeySpec::EcP256, &folder.path().join("other.pem")).unwrap();
    let uri: KeyUri = format!("file://{}", key.display()).parse().unwrap();
    let verify = vec![TrustedKeySettings { pem: other.to_pem(), until: None, revoked: None }];
    let settings = WitnessSettings { pin: Some(Pin::Given(given.clone())), verify, ..settings(uri) };

    let missing = Witness::open(&settings, Clock::system()).await.unwrap_err();
    assert!(matches!(missing, Error::Pin { what: "read", .. }), "{missing}");
    assert!(!given.exists());

    std::fs::write(&given, own.to_pem()).unwrap();
    Witness::open(&settings, Clock::system()).await.unwrap();

    // Also not taken for a rotation, though the old key is listed.
    std::fs::write(&given, other.to_pem()).unwrap();
    let changed = Witness::open(&settings, Clock::system()).await.unwrap_err();
    assert!(matches!(changed, Error::KeyChanged { .. }), "{changed}");
    assert_eq!(std::fs::read_to_string(&given).unwrap(), other.to_pem());
}
