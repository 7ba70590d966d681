//! What the webhook proves its name with, and when that is replaced.

use std::time::Duration;

use secrecy::ExposeSecret as _;
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use super::daemon::open_tls;
use crate::{
    admission::{Authority, RENEWAL},
    clock::Clock,
    config::{self, Certificate},
    http::Tls,
};

/// How often files with a certificate are looked at.
const LOOK: Duration = Duration::from_secs(10);

/// Where the certificate comes from.
pub(super) enum Serving {
    Files(config::Tls),
    Own { authority: Box<Authority>, names: Vec<String>, clock: Clock },
}

impl Serving {
    pub(super) fn open(certificate: &Certificate, clock: &Clock) -> anyhow::Result<Self> {
        Ok(match certificate {
            Certificate::Files(tls) => Self::Files(tls.clone()),
            Certificate::Own { folder, names } => Self::Own {
                authority: Box::new(Authority::open(folder, clock.now())?),
                names: names.clone(),
                clock: clock.clone(),
            },
        })
    }

    pub(super) fn issue(&self) -> anyhow::Result<Tls> {
        match self {
            Self::Files(files) => open_tls(files),
            Self::Own { authority, names, clock } => Ok(authority.issue(names, clock.now())?),
        }
    }

    /// Replaces the certificate as long as the process runs: a new one of our own every day, one in files when they change; and
    /// either at once when the configuration is to be read again.
    pub(super) async fn renew(self, tls: Tls, mut asked: watch::Receiver<u64>, drain: CancellationToken) {
        let mut seen = self.content();
        let pause = match self {
            Self::Files(_) => LOOK,
            Self::Own { .. } => RENEWAL,
        };
        while drain.run_until_cancelled(timeout(pause, asked.changed())).await.is_some() {
            let content = self.content();
            if content == seen && matches!(self, Self::Files(_)) {
                continue;
            }
            match self.issue() {
                Ok(renewed) => {
                    tls.replace(&renewed);
                    seen = content;
                    info!("the certificate was renewed");
                }
                // Half written, perhaps: it is looked at again.
                Err(error) => error!(error = format!("{error:#}"), "the certificate cannot be renewed: it stays as it was"),
            }
        }
    }

    /// What would be served, to be compared.
    fn content(&self) -> Option<(Vec<u8>, String)> {
        let Self::Files(files) = self else { return None };
        let certificate = std::fs::read(&files.certificate).ok()?;
        Some((certificate, files.key.again().ok()?.expose_secret().to_owned()))
    }
}
