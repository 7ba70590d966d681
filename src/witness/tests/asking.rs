//! What a witness asks of its KMS, and what it does when it gets no answer.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_kms_that_does_not_answer_five_times_in_a_row_is_asked_one_thing_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let (witness, key) = scripted(&folder, (0..5).map(|_| Err(unreachable())).collect()).await;
    let told = Arc::new(Mutex::new(vec![]));
    let kept = told.clone();
    let witness = witness.observed(Observer::new(move |observation| {
        if let Observation::Away(away) = observation {
            kept.lock().unwrap().push(away);
        }
    }));
    for _ in 0..5 {
        let error = witness.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap_err();
        assert_eq!(error.verdict(), Verdict::TRANSIENT, "what was tried costs an attempt");
    }
    let error = witness.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap_err();
    assert!(
        error.to_string().contains("away since 2026-11-21T09:00:00Z and was not asked: it is tried again at 2026-"),
        "{error}"
    );
    let Verdict::Retry { after: Some(after), throttled: true } = error.verdict() else { panic!("{error:?}") };
    assert!(after <= Duration::from_secs(1));
    assert_eq!((key.calls(), witness.status().state.as_str()), (5, "away"));
    tokio::time::advance(after).await;
    witness.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();
    let status = witness.status();
    assert_eq!((status.state.as_str(), status.last_error.unwrap().kind.as_str()), ("ok", "unreachable"));
    assert_eq!(*told.lock().unwrap(), [true, false]);
}

#[tokio::test(start_paused = true)]
async fn a_kms_that_refuses_or_throttles_is_not_away() {
    let folder = tempfile::tempdir().unwrap();
    let denied = || kms::Error::Denied { key: Arc::new(release()), what: "not allowed".into() };
    let throttled = || kms::Error::Throttled { key: Arc::new(release()), what: "slow down".into(), retry_after: None };
    let script = (0..20).map(|number| Err(if number % 2 == 0 { denied() } else { throttled() })).collect();
    let (witness, key) = scripted(&folder, script).await;
    for _ in 0..20 {
        witness.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap_err();
    }
    assert_eq!((key.calls(), witness.status().away.is_none()), (20, true));
    assert_eq!(witness.status().state, "ok", "throttled last, so it is there");
    key.script.lock().unwrap().push_back(Err(denied()));
    witness.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap_err();
    assert_eq!(witness.status().state, "failing");
    witness.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();
    assert_eq!(witness.status().state, "ok");
}

/// 200 signatures are wanted of a KMS that is gone for ten minutes and takes five seconds each time to say nothing.
#[tokio::test(start_paused = true)]
async fn a_kms_that_is_gone_for_ten_minutes_is_asked_little_meanwhile_and_signs_it_all_when_it_is_back() {
    let folder = tempfile::tempdir().unwrap();
    let (witness, key) = scripted(&folder, vec![]).await;
    *key.gone.lock().unwrap() = Some(Duration::from_secs(5));
    let (start, gone) = (Instant::now(), Duration::from_secs(600));
    let attempts = Mutex::new(0);
    // What the pipeline does with an event, by the error's verdict.
    let wanted = (0..200).map(|number| {
        let (witness, attempts) = (&witness, &attempts);
        async move {
            let mut tried = 0_u32;
            loop {
                let Err(error) = witness.sign(Algorithm::EcdsaSha256, &[number; 32]).await else { return start.elapsed() };
                let Verdict::Retry { after, throttled } = error.verdict() else { panic!("{error}") };
                if !throttled {
                    tried += 1;
                    *attempts.lock().unwrap() += 1;
                }
                let own = Duration::from_secs(1 << tried.min(6));
                tokio::time::sleep(if throttled { after.unwrap().max(Duration::from_secs(1)) } else { own }).await;
            }
        }
    });
    let back = async {
        tokio::time::sleep(gone).await;
        *key.gone.lock().unwrap() = None;
        key.calls()
    };
    let (signed, asked) = tokio::join!(futures::future::join_all(wanted), back);
    assert!((16..=60).contains(&asked), "{asked} calls to a KMS that was gone");
    assert_eq!(*attempts.lock().unwrap(), asked, "only what was asked costs an attempt");
    let last = signed.iter().max().unwrap();
    assert!(*last >= gone && *last <= gone + Duration::from_secs(90), "{last:?}");
    assert_eq!(key.calls(), asked + 200);
}

#[tokio::test(start_paused = true)]
async fn a_probe_is_a_dry_run_or_a_signature_that_says_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (witness, key) = scripted(&folder, vec![]).await;
    assert_eq!(witness.probe(Algorithm::EcdsaSha256).await.unwrap(), Probed::Signed);
    let digest: [u8; 32] = sha2::Sha256::digest(b"countersign probe: this signature approves nothing").into();
    assert_eq!(*key.digests.lock().unwrap(), [digest]);
    assert_eq!(witness.status().last_signed, None, "no image was");
    *key.dry_runs.lock().unwrap() = Some(0);
    assert_eq!(witness.probe(Algorithm::EcdsaSha256).await.unwrap(), Probed::DryRun);
    assert_eq!((key.calls(), *key.dry_runs.lock().unwrap()), (1, Some(1)));
}

#[tokio::test(start_paused = true)]
async fn whether_it_is_ready_costs_a_probe_in_five_minutes_and_two_a_minute_while_it_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let denied = || Err(kms::Error::Denied { key: Arc::new(release()), what: "not allowed".into() });
    let (witness, key) = scripted(&folder, vec![]).await;
    let ask = async |seconds: u64| {
        let before = key.calls();
        let mut ready = 0;
        for _ in 0..seconds {
            ready += u64::from(witness.ready(Algorithm::EcdsaSha256).await.is_ok());
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        (ready, key.calls() - before)
    };
    assert_eq!(ask(600).await, (600, 2));
    // What is signed tells as much.
    witness.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap();
    assert_eq!(ask(290).await, (290, 0));
    tokio::time::advance(Duration::from_secs(60)).await;
    key.script.lock().unwrap().extend((0..4).map(|_| denied()));
    assert_eq!(ask(130).await, (10, 5));
}

#[tokio::test(start_paused = true)]
async fn a_witness_whose_kms_is_away_is_not_ready_and_a_probe_finds_it_back() {
    let folder = tempfile::tempdir().unwrap();
    let (witness, key) = scripted(&folder, vec![]).await;
    *key.gone.lock().unwrap() = Some(Duration::from_millis(1));
    for _ in 0..5 {
        witness.sign(Algorithm::EcdsaSha256, &DIGEST).await.unwrap_err();
    }
    let why = witness.ready(Algorithm::EcdsaSha256).await.unwrap_err();
    assert!(why.contains("away since"), "{why}");
    *key.gone.lock().unwrap() = None;
    tokio::time::advance(Duration::from_secs(1)).await;
    witness.ready(Algorithm::EcdsaSha256).await.unwrap();
    assert_eq!((key.calls(), witness.status().state.as_str()), (6, "ok"));
}
