use std::net::IpAddr;

use aws_credential_types::Credentials;
use http::{HeaderValue, StatusCode, header::AUTHORIZATION};
use reqwest::Url;
use secrecy::ExposeSecret;
use serde::Deserialize;

use super::{Chain, CredentialsError, Document};
use crate::kms::{
    exchange::{exchange, without},
    refresh::{is_sendable, token_of},
};

const RELATIVE: &str = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI";
const FULL: &str = "AWS_CONTAINER_CREDENTIALS_FULL_URI";
const TOKEN: &str = "AWS_CONTAINER_AUTHORIZATION_TOKEN";
const TOKEN_FILE: &str = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE";
const LARGEST: usize = 64 * 1024;

impl Chain {
    /// As ECS gives them to a task and EKS to a pod (Pod Identity); `None` if neither says that it does.
    /// <https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html>
    pub(super) async fn of_container(&self) -> Result<Option<Credentials>, CredentialsError> {
        let get = |name| self.environment.get(name);
        let url = match (get(RELATIVE), get(FULL)) {
            (Some(path), _) => self.relative(&path)?,
            (None, Some(url)) => full(&url)?,
            (None, None) => return Ok(None),
        };
        let from = format!("the container's credentials endpoint at {}", url.authority());
        let token = match (get(TOKEN_FILE), get(TOKEN)) {
            (Some(file), _) => Some(token_of(file.as_ref())?),
            (None, Some(token)) if is_sendable(token.trim()) => Some(token.trim().into()),
            (None, Some(_)) => {
                let what = format!("{TOKEN} holds characters that cannot be sent");
                return Err(CredentialsError::Wrong(what));
            }
            (None, None) => None,
        };
        let http = if url.scheme() == "https" { &self.outside } else { &self.inside };
        let mut request = http.get(url);
        if let Some(token) = &token {
            let mut value = HeaderValue::from_str(token.expose_secret()).expect("it was checked to be sendable");
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        let answer = exchange(request, LARGEST).await.map_err(|error| CredentialsError::unanswered(&from, error))?;
        if answer.status == StatusCode::OK {
            return Document::read(&from, &answer).map(Some);
        }
        let Complaint { code, message } = serde_json::from_slice(&answer.body).unwrap_or_default();
        let said = without(format!("{code} {message}"), token.iter().map(ExposeSecret::expose_secret));
        Err(CredentialsError::of_status(&from, answer.status, said.trim()))
    }

    fn relative(&self, path: &str) -> Result<Url, CredentialsError> {
        let wrong = || CredentialsError::Wrong(format!("{RELATIVE} is no path: it begins with a slash"));
        let host: Url = self.hosts.container.parse().expect("it is a constant, or a test's");
        let url = Some(path).filter(|path| path.starts_with('/')).and_then(|path| host.join(path).ok()).ok_or_else(wrong)?;
        // `//elsewhere/` begins with a slash, too.
        if url.authority() == host.authority() { Ok(url) } else { Err(wrong()) }
    }
}

/// A URL that credentials may come from: with a certificate from anywhere, and in the clear only from this machine and from the
/// addresses that ECS and EKS use. Names are not looked up for that, except for this machine's own.
fn full(text: &str) -> Result<Url, CredentialsError> {
    // The text is not repeated: it may hold a password.
    let wrong = |what: &str| CredentialsError::Wrong(format!("{FULL} {what}"));
    let url: Url = text.parse().map_err(|_| wrong("is no URL"))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong("holds a user name or password: the token belongs into AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"));
    }
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    let is_near = host == "localhost" || address.is_ok_and(is_near);
    match url.scheme() {
        "https" => Ok(url),
        "http" if is_near => Ok(url),
        "http" => Err(wrong("is plain http to elsewhere than this machine, ECS (169.254.170.2) or EKS (169.254.170.23)")),
        _ => Err(wrong("is neither https:// nor http://")),
    }
}

fn is_near(address: IpAddr) -> bool {
    let known = ["169.254.170.2", "169.254.170.23", "fd00:ec2::23"];
    address.is_loopback() || known.iter().any(|known| known.parse() == Ok(address))
}

#[derive(Deserialize, Default)]
struct Complaint {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_come_in_the_clear_only_from_this_machine_and_its_orchestrator() {
        for url in [
            "http://127.0.0.1:80/a",
            "http://127.1.2.3/",
            "http://[::1]:8080/",
            "http://localhost/",
            "http://169.254.170.2/v2/credentials",
            "http://169.254.170.23/v1/credentials",
            "http://[fd00:ec2::23]/v1/credentials",
            "https://credentials.example.com/",
        ] {
            assert!(full(url).is_ok(), "{url}");
        }
        for url in [
            "http://169.254.169.254/",
            "http://169.254.170.24/",
            "http://10.0.0.1/",
            "http://localhost.example.com/",
            "http://credentials.example.com/",
            "http://127.0.0.1.example.com/",
            "http://[fd00:ec2::24]/",
            "http://me:hunter2@127.0.0.1/",
            "ftp://127.0.0.1/",
            "/v2/credentials",
        ] {
            let error = full(url).unwrap_err().to_string();
            assert!(error.contains(FULL) && !error.contains("hunter2"), "{url}: {error}");
        }
    }
}
