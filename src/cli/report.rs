//! `countersign report`: what runs in a cluster and would not be admitted any more.

use std::process::ExitCode;

use serde::Serialize;

use super::{Output, ReportArgs, manifest::ImageLine, output};
use crate::{
    admission::{Finding, Findings, shown},
    app,
    clock::Clock,
    config::Config,
};

/// Pods of one image that are named to people.
const NAMED: usize = 5;

#[derive(Debug, Serialize)]
struct Report {
    /// Pods that run.
    pods: usize,
    /// Images in namespaces where policies are in force.
    images: usize,
    unmet: Vec<Line>,
}

#[derive(Debug, Serialize)]
struct Line {
    namespace: String,
    /// Whether it would be denied now. Otherwise a policy warns or audits, or its registry did not answer.
    denied: bool,
    /// Whether all that is against it is that its registry did not answer.
    unknown: bool,
    #[serde(flatten)]
    image: ImageLine,
    pods: Vec<String>,
}

/// 0 if all that runs would be admitted; 1 if not.
pub async fn run(config: &Config, clock: &Clock, args: &ReportArgs, output: Output) -> anyhow::Result<ExitCode> {
    let findings = app::look_at_what_runs(config, clock, args).await?;
    let is_denied = findings.unmet.iter().any(Finding::is_denied);
    output::print(output, &Report::from(&findings), render);
    Ok(if is_denied { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

impl From<&Findings> for Report {
    fn from(findings: &Findings) -> Self {
        let line = |finding: &Finding| Line {
            namespace: finding.namespace.clone(),
            denied: finding.is_denied(),
            unknown: finding.is_unknown(),
            image: ImageLine::from(&finding.verdict),
            pods: finding.pods.iter().map(|pod| pod.name.clone()).collect(),
        };
        Self { pods: findings.pods, images: findings.images, unmet: findings.unmet.iter().map(line).collect() }
    }
}

fn render(report: &Report) -> String {
    let mut text = String::new();
    for line in &report.unmet {
        let what = match line {
            Line { denied: true, .. } => "would be denied now",
            Line { unknown: true, .. } => "cannot be told now",
            _ => "is only told of",
        };
        let mut pods: Vec<_> = line.pods.iter().take(NAMED).map(|name| shown(name)).collect();
        if line.pods.len() > NAMED {
            pods.push(format!("and {} more", line.pods.len() - NAMED));
        }
        let image = line.image.text.replace('\n', "\n  ");
        text.push_str(&format!("{}: {what}\n  {image}\n  pods: {}\n", shown(&line.namespace), pods.join(", ")));
    }
    let denied = report.unmet.iter().filter(|line| line.denied).count();
    let Report { pods, images, .. } = report;
    text.push_str(&format!("{pods} pods run; of {images} images where policies are in force, {denied} would be denied now"));
    text
}
