//! What runs in the cluster, looked at again: by the webhook as long as it runs, and once by `countersign report`.

use std::{collections::HashSet, mem, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;
use k8s_openapi::api::core::v1::ObjectReference;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use sha2::{Digest as _, Sha256};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    admission::{Finding, Findings, Looks, Running, Webhook, of_image, shown},
    cli::{ReportArgs, Usage},
    clock::Clock,
    config::{Config, Kubernetes, Recheck},
    kubernetes::{Cluster, Notice},
};

/// Pods of one answer of the API: some megabytes at most.
const PAGE: usize = 200;
/// The longest that the first look waits: replicas that were started together do not look together.
const FIRST: Duration = Duration::from_secs(60);
/// Nobody waits for an API server here.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pods of one image that Events are written on.
const MOST_TOLD: usize = 20;

/// Looks at what runs again and again, and tells.
pub(super) struct Rounds {
    pub cluster: Cluster,
    pub webhook: Arc<Webhook>,
    pub settings: Recheck,
    /// For one image.
    pub patience: Duration,
    pub looks: Arc<Looks>,
    pub clock: Clock,
    /// What was found the last time, by namespace and image: it is logged once.
    pub known: HashSet<(String, String)>,
}

impl Rounds {
    pub(super) async fn run(mut self, drain: CancellationToken) {
        let mut pause = self.settings.every.min(FIRST).mul_f64(fastrand::f64());
        while drain.run_until_cancelled(sleep(pause)).await.is_some() {
            if drain.run_until_cancelled(self.look()).await.is_none() {
                return;
            }
            pause = self.settings.every.mul_f64(0.9 + 0.2 * fastrand::f64());
        }
    }

    async fn look(&mut self) {
        let at = self.clock.now();
        let running = match list(&self.cluster, None).await {
            Ok(running) => running,
            Err(error) => {
                error!(error = format!("{error:#}"), "what runs cannot be listed, and was not looked at");
                return;
            }
        };
        let findings = self.webhook.judge().recheck(&running, self.settings.pause(), self.patience).await;
        self.looks.found(&findings, at);
        let denied = || findings.unmet.iter().filter(|finding| finding.is_denied());
        let known = denied().map(|finding| (finding.namespace.clone(), finding.verdict.text.clone())).collect();
        let before = mem::replace(&mut self.known, known);
        for finding in denied() {
            if !before.contains(&(finding.namespace.clone(), finding.verdict.text.clone())) {
                log(finding);
            }
            self.tell(finding);
        }
        info!(pods = findings.pods, images = findings.images, denied = self.known.len(), "looked at what runs");
    }

    /// By an Event on each pod, so that it is found where people look: one as long as the cluster keeps it.
    fn tell(&self, finding: &Finding) {
        let judge = self.webhook.judge();
        let Some(events) = &judge.events else { return };
        let note = of_image(&finding.verdict, finding.verdict.enforced());
        let about = hex::encode(&Sha256::digest(&note)[..8]);
        for pod in finding.pods.iter().take(MOST_TOLD) {
            events.report(Notice {
                regarding: ObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    namespace: Some(finding.namespace.clone()),
                    name: Some(pod.name.clone()),
                    uid: Some(pod.uid.clone()),
                    ..ObjectReference::default()
                },
                reason: "NotAttested",
                action: "Rechecked",
                note: note.clone(),
                once: Some(format!("{}.{about}", pod.uid)),
            });
        }
    }
}

fn log(finding: &Finding) {
    let reasons: Vec<_> =
        finding.verdict.enforced().take(8).map(|unmet| (unmet.bound.policy.name.as_str(), unmet.why.name())).collect();
    warn!(
        namespace = finding.namespace,
        image = shown(&finding.verdict.text),
        pods = finding.pods.len(),
        pod = finding.pods.first().map(|pod| pod.name.as_str()),
        reasons = ?reasons,
        "an image runs that would be denied now"
    );
}

/// What `countersign report` looks at.
pub async fn look_at_what_runs(config: &Config, clock: &Clock, args: &ReportArgs) -> anyhow::Result<Findings> {
    let settings = settings(config, args.kubeconfig.clone())?;
    let cluster = super::admission::reach(&settings).await?;
    let name = args.cluster.as_deref().or(config.admission.cluster.as_deref());
    let judge = super::admission::judge_of(config, clock, name, &cluster, &settings).await?;
    if judge.policies.all().is_empty() {
        eprintln!("warning: no policy is enabled here: nothing is demanded of any image");
    }
    let running = list(&cluster, args.namespace.as_deref()).await?;
    let pause = settings.recheck.unwrap_or_default().pause();
    Ok(judge.recheck(&running, pause, PATIENCE).await)
}

fn settings(config: &Config, kubeconfig: Option<PathBuf>) -> Result<Kubernetes, Usage> {
    match (config.admission.kubernetes.clone(), kubeconfig) {
        (Some(settings), None) => Ok(settings),
        (settings, Some(path)) => Ok(Kubernetes { kubeconfig: Some(path), ..settings.unwrap_or_default() }),
        (None, None) => Err(Usage(
            "it is not said where the cluster's API is: give --kubeconfig FILE, or write `kubernetes` into [admission]"
                .to_owned(),
        )),
    }
}

/// All pods, or those of a namespace.
async fn list(cluster: &Cluster, namespace: Option<&str>) -> anyhow::Result<Running> {
    let encoded = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
    let path = namespace.map_or_else(|| "pods".to_owned(), |name| format!("namespaces/{}/pods", encoded(name)));
    let client = cluster.client();
    let mut running = Running::default();
    let mut next = None;
    loop {
        let place = next.as_deref().map(|next| format!("&continue={}", encoded(next))).unwrap_or_default();
        let request = http::Request::get(format!("/api/v1/{path}?limit={PAGE}{place}")).body(vec![])?;
        let page = cluster.ask(client.request_text(request)).await.context("the pods that run cannot be listed")?;
        next = running.add(&page)?;
        if next.is_none() {
            return Ok(running);
        }
    }
}
