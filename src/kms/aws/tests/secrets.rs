use std::{fs, time::Duration};

use futures::future::join_all;
use jiff::SignedDuration;

use super::{
    super::{AwsKey, credentials::fake::Cloud},
    DIGEST, IMPATIENT, Scene,
    fake::{ACCESS_KEY, Fault, SECRET_KEY},
};
use crate::{
    kms::{Algorithm, Environment, SigningKey, logged::logged},
    outcome::{Classify, Verdict},
};

#[tokio::test]
async fn the_most_talkative_log_holds_no_secret() {
    let scene = Scene::set().await;
    scene.write_credentials(ACCESS_KEY, SECRET_KEY, Some("a-session-token"));
    scene.kms.set_token("a-session-token");
    let log = logged(async {
        // Twice: another test may meet an event's place for the first time in the same moment, and that nobody listened would
        // be remembered of it.
        for _ in 0..2 {
            let key = scene.open("alias/rsa").await.unwrap();
            scene.kms.then([Fault::error(400, "ExpiredTokenException")]);
            key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
            tracing::trace!(?key);
            tracing::callsite::rebuild_interest_cache();
        }
    })
    .await;
    assert!(log.contains("key opened") && log.contains("TRACE"), "{log}");
    for secret in [SECRET_KEY, "a-session-token", "Signature="] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}

#[tokio::test]
async fn credentials_that_end_mid_run_cost_no_signature_and_show_in_no_log() {
    let scene = Scene::set().await;
    let sts = Cloud::start(scene.clock.clone()).await;
    sts.issue_as(ACCESS_KEY, SECRET_KEY);
    let (token, url) = (scene.folder.path().join("token"), format!("http://{}", sts.address));
    fs::write(&token, "web.identity.token-1").unwrap();
    let environment = Environment::of([
        ("AWS_WEB_IDENTITY_TOKEN_FILE", token.to_str().unwrap()),
        ("AWS_ROLE_ARN", "arn:aws:iam::111122223333:role/pod"),
        ("AWS_ENDPOINT_URL_STS", &url),
    ]);
    let log = logged(async {
        scene.kms.set_token("issued-token-1==");
        let uri = scene.uri("alias/rsa");
        let key = AwsKey::open_patiently(&uri, scene.clock.clone(), &environment, IMPATIENT).await.unwrap();
        for hour in 2..5 {
            // The KMS's clock goes with ours, and takes only the tokens of this hour.
            scene.hand.advance(Duration::from_secs(3600));
            scene.kms.set_ahead(SignedDuration::from_hours(hour - 1));
            scene.kms.set_token(&format!("issued-token-{hour}=="));
            let signed = join_all((0..32).map(|_| key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST))).await;
            assert!(signed.iter().all(Result::is_ok), "{:?}", signed.iter().find(|signed| signed.is_err()));
        }
        // STS goes down in the last minutes, and stays down.
        scene.kms.requests();
        sts.requests();
        sts.then([(503, ""); 2]);
        scene.hand.advance(Duration::from_secs(57 * 60));
        scene.kms.set_ahead(SignedDuration::from_mins(3 * 60 + 57));
        key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap();
        scene.hand.advance(Duration::from_secs(3 * 60));
        let error = key.sign(Algorithm::RsaPkcs1Sha256, &DIGEST).await.unwrap_err();
        assert_eq!(error.verdict(), Verdict::TRANSIENT, "{error}");
        tracing::trace!(?error, ?key);
        assert_eq!((sts.requests().len(), scene.kms.requests().len()), (2, 1));
    })
    .await;
    assert!(log.contains("AWS credentials fetched") && log.contains("could not be renewed"), "{log}");
    for secret in [SECRET_KEY, "issued-token", "web.identity", "Signature="] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}
