//! `countersign health`: is the daemon that runs here alive, and with `--ready`, can it do its work.

use std::{path::Path, process::ExitCode, time::Duration};

use anyhow::Context as _;
use serde::Serialize;
use serde_json::Value;

use super::{HealthArgs, Output, output};
use crate::config::Door;

/// Readiness takes two seconds when something that it asks does not answer.
const PATIENCE: Duration = Duration::from_secs(4);
/// An answer that names every witness and registry is far below this.
const LARGEST_ANSWER: usize = 1 << 20;

#[derive(Debug, Serialize)]
struct Answer {
    ok: bool,
    /// What was asked.
    url: String,
    /// The HTTP status of the answer.
    status: u16,
    /// Its body; null if that is none of ours.
    body: Value,
}

/// `config` is the file that the daemon runs with; only its listener is read.
///
/// # Errors
/// The file does not say where the daemon listens, or nobody answers there in time.
pub async fn run(config: &Path, args: &HealthArgs, output: Output) -> anyhow::Result<ExitCode> {
    let door = Door::load(config)?;
    let answer = ask(door, if args.ready { "readyz" } else { "livez" }).await?;
    output::print(output, &answer, render);
    Ok(if answer.ok { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

async fn ask(door: Door, probe: &str) -> anyhow::Result<Answer> {
    let url = format!("{}://{}/{probe}", if door.tls { "https" } else { "http" }, door.address);
    let client = reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(PATIENCE)
        .timeout(PATIENCE)
        // The certificate names the host that registries call, not this address. Nothing secret is sent, and whoever could
        // answer here in the daemon's place is on this machine already.
        .tls_danger_accept_invalid_certs(true)
        .build()
        .context("cannot build a client")?;
    let mut response = client.get(&url).send().await.with_context(|| format!("{url} does not answer"))?;
    let status = response.status();
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.with_context(|| format!("the answer of {url} broke off"))? {
        anyhow::ensure!(body.len() + chunk.len() <= LARGEST_ANSWER, "{url} answers without end; is it countersign?");
        body.extend_from_slice(&chunk);
    }
    Ok(Answer { ok: status.is_success(), url, status: status.as_u16(), body: serde_json::from_slice(&body).unwrap_or_default() })
}

fn render(answer: &Answer) -> String {
    let said = ["status", "detail"].iter().find_map(|member| answer.body.get(member)?.as_str());
    let mut text = match said {
        Some(said) => said.to_owned(),
        None => format!("{} answered {}", answer.url, answer.status),
    };
    for check in answer.body.get("checks").and_then(Value::as_array).into_iter().flatten() {
        let text_of = |member| check.get(member).and_then(Value::as_str).unwrap_or_default();
        if check.get("ok") == Some(&Value::Bool(false)) {
            text.push_str(&format!("\n  {}: {}", text_of("name"), text_of("reason")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use secrecy::SecretString;
    use tokio_util::{sync::CancellationToken, task::TaskTracker};

    use super::*;
    use crate::http::{Limits, Readiness, Server, Tls};

    /// A listener that is ready or not, as the daemon has it.
    async fn serve(tls: Option<Tls>, state: Result<(), String>) -> Door {
        let limits =
            Limits { max_body: 1000, header_timeout: PATIENCE, body_timeout: PATIENCE, max_requests: 10, max_connections: 10 };
        let door_tls = tls.is_some();
        let server = Server::bind("127.0.0.1:0".parse().unwrap(), limits, tls).await.unwrap();
        let address = server.local_addr().unwrap();
        let readiness = Arc::new(Readiness::new().check("registry x", move || {
            let state = state.clone();
            async move { state }
        }));
        let serving = server.serve(readiness.router(), CancellationToken::new(), CancellationToken::new());
        TaskTracker::new().spawn(serving);
        Door { address, tls: door_tls }
    }

    #[tokio::test]
    async fn a_daemon_that_answers_is_alive_and_one_that_can_work_is_ready() {
        let door = serve(None, Ok(())).await;
        for (probe, word) in [("livez", "alive"), ("readyz", "ready")] {
            let answer = ask(door, probe).await.unwrap();
            assert!(answer.ok);
            assert_eq!(render(&answer), word);
        }
    }

    #[tokio::test]
    async fn one_that_cannot_work_is_alive_and_says_why_it_is_not_ready() {
        let door = serve(None, Err("it does not answer".to_owned())).await;
        assert!(ask(door, "livez").await.unwrap().ok);
        let answer = ask(door, "readyz").await.unwrap();
        assert_eq!((answer.ok, answer.status), (false, 503));
        assert_eq!(render(&answer), "not ready\n  registry x: it does not answer");
    }

    #[tokio::test]
    async fn a_certificate_for_another_name_does_not_matter_here() {
        let certificate = include_bytes!("../http/server/testdata/first.cert.pem");
        let key = SecretString::from(include_str!("../http/server/testdata/first.key.pem"));
        let door = serve(Some(Tls::from_pem(certificate, &key).unwrap()), Ok(())).await;
        assert!(ask(door, "livez").await.unwrap().ok);
        ask(Door { tls: false, ..door }, "livez").await.unwrap_err();
    }

    #[tokio::test]
    async fn nobody_there_is_an_error_that_names_the_place() {
        let (_taken, address) = integration_tests::process::nobody().unwrap();
        let error = ask(Door { address, tls: false }, "livez").await.unwrap_err();
        assert_eq!(error.to_string(), format!("http://{address}/livez does not answer"));
    }
}
