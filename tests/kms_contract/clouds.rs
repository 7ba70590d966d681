//! The clouds that are played by fakes.

use std::sync::Arc;

use async_trait::async_trait;
use countersign::{
    clock::Clock,
    kms::{self, Environment, Error, KeySpec, SigningKey},
};
use integration_tests::{
    alibaba, azure,
    fake::{self, Fault},
    google,
};

use crate::{Ending, Provider, holds};

/// The time that the fakes go by.
fn now() -> fake::Now {
    let clock = Clock::system();
    Arc::new(move || clock.now())
}

/// Ways in which every service fails, with its own codes for being away and for a key that is not there.
fn passing_or_not(way: usize, away: &'static str, no_key: &'static str) -> Option<(Fault, Ending)> {
    Some(match way {
        0 => (Fault::Throttled { retry_after: 1 }, Ending::Retry),
        1 => (Fault::Reset, Ending::Retry),
        2 => (Fault::NoAnswer, Ending::Retry),
        3 => (Fault::Error(503, away), Ending::Retry),
        4 => (Fault::Error(404, no_key), Ending::Refuse),
        _ => return None,
    })
}

struct Alibaba(alibaba::Fake);

#[async_trait]
impl Provider for Alibaba {
    async fn open(&self, spec: KeySpec) -> Result<Arc<dyn SigningKey>, Error> {
        let uri = format!("alibabakms://{}//alias/{spec}", self.0.address).parse().unwrap();
        let [id, secret] = alibaba::BASE;
        let keys = [("ALIBABA_CLOUD_ACCESS_KEY_ID", id), ("ALIBABA_CLOUD_ACCESS_KEY_SECRET", secret)];
        kms::open_in(&uri, None, Clock::system(), &Environment::of(keys)).await
    }

    fn secrets(&self) -> Vec<&str> {
        vec![alibaba::BASE[1], "Signature="]
    }

    fn verifies(&self) -> bool {
        true
    }

    async fn fail(&self, way: usize, _: KeySpec) -> Option<Ending> {
        match way {
            0 | 1 => {
                self.0.given().key_state = ["Disabled", "PendingDeletion"][way];
                Some(Ending::Refuse)
            }
            _ => {
                let (fault, ending) = passing_or_not(way - 2, "ServiceUnavailableTemporary", "Forbidden.KeyNotFound")?;
                // One for the key that is open, and one for the one that is opened.
                self.0.then([fault.clone(), fault]);
                Some(ending)
            }
        }
    }

    async fn mend(&self, _: usize, _: KeySpec) {
        self.0.given().key_state = "Enabled";
    }
}

#[tokio::test]
async fn it_holds_for_alibaba_clouds_kms() {
    holds(&Alibaba(alibaba::Fake::start(now()).await)).await;
}

struct Google {
    cloud: google::Fake,
    /// Every version signs with one padding.
    rsa: &'static str,
    account: tempfile::NamedTempFile,
}

impl Google {
    async fn with(rsa: &'static str) -> Self {
        let cloud = google::Fake::start(now()).await;
        let account = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(account.path(), cloud.service_account().to_string()).unwrap();
        Self { cloud, rsa, account }
    }
}

#[async_trait]
impl Provider for Google {
    async fn open(&self, spec: KeySpec) -> Result<Arc<dyn SigningKey>, Error> {
        let rsa = |bits| format!("RSA_SIGN_{}_{bits}_SHA256", self.rsa);
        let name = match spec {
            KeySpec::Rsa2048 => rsa(2048),
            KeySpec::Rsa3072 => rsa(3072),
            KeySpec::Rsa4096 => rsa(4096),
            KeySpec::EcP256 => "EC_SIGN_P256_SHA256".to_owned(),
        };
        let environment = Environment::of([("GOOGLE_APPLICATION_CREDENTIALS", self.account.path().to_str().unwrap())]);
        let uri = self.cloud.uri(&format!("{name}/cryptoKeyVersions/10")).parse().unwrap();
        kms::open_in(&uri, None, Clock::system(), &environment).await
    }

    fn secrets(&self) -> Vec<&str> {
        vec!["issuedToken", "PRIVATE KEY", "eyJ"]
    }

    async fn fail(&self, way: usize, _: KeySpec) -> Option<Ending> {
        match way {
            0 | 1 => self.cloud.given().versions.insert(10, ["DISABLED", "DESTROYED"][way]).map(|_| Ending::Refuse),
            2 => {
                self.cloud.given().denied = Some("service account");
                Some(Ending::Refuse)
            }
            // The key that is opened has a token to ask for at first.
            _ => {
                let (fault, ending) = passing_or_not(way - 3, "UNAVAILABLE", "NOT_FOUND")?;
                self.cloud.then([fault.clone(), fault]);
                Some(ending)
            }
        }
    }

    async fn mend(&self, _: usize, _: KeySpec) {
        let mut given = self.cloud.given();
        given.denied = None;
        given.versions.insert(10, "ENABLED");
    }
}

#[tokio::test]
async fn it_holds_for_google_cloud_kms_with_pkcs1_keys() {
    holds(&Google::with("PKCS1").await).await;
}

#[tokio::test]
async fn it_holds_for_google_cloud_kms_with_pss_keys() {
    holds(&Google::with("PSS").await).await;
}

struct Azure {
    cloud: azure::Fake,
    variables: [(&'static str, String); 4],
}

#[async_trait]
impl Provider for Azure {
    async fn open(&self, spec: KeySpec) -> Result<Arc<dyn SigningKey>, Error> {
        let uri = self.cloud.uri(&spec.name().replace('_', "-")).parse().unwrap();
        let variables = self.variables.each_ref().map(|(name, value)| (*name, value.as_str()));
        kms::open_in(&uri, None, Clock::system(), &Environment::of(variables)).await
    }

    fn secrets(&self) -> Vec<&str> {
        vec!["issuedToken", azure::CLIENT[1]]
    }

    fn verifies(&self) -> bool {
        true
    }

    async fn fail(&self, way: usize, _: KeySpec) -> Option<Ending> {
        match way {
            0 => self.cloud.given().enabled = false,
            1 => self.cloud.given().key_ops = vec!["verify"],
            2 => self.cloud.given().denied = Some("ForbiddenByRbac"),
            3 => self.cloud.given().deleted = true,
            _ => {
                let (fault, ending) = passing_or_not(way - 4, "ServiceUnavailable", "KeyNotFound")?;
                self.cloud.then([fault.clone(), fault]);
                return Some(ending);
            }
        }
        Some(Ending::Refuse)
    }

    async fn mend(&self, _: usize, _: KeySpec) {
        let mut given = self.cloud.given();
        (given.enabled, given.key_ops, given.denied, given.deleted) = (true, vec!["sign", "verify"], None, false);
    }
}

#[tokio::test]
async fn it_holds_for_azure_key_vault() {
    let cloud = azure::Fake::start(now()).await;
    let variables = cloud.variables();
    holds(&Azure { cloud, variables }).await;
}
