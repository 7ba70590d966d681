use aws_credential_types::Credentials;
use http::{HeaderValue, StatusCode};
use reqwest::Url;

use super::{Chain, CredentialsError, Document};
use crate::kms::{
    exchange::{Answer, exchange},
    refresh::is_sendable,
};

const DISABLED: &str = "AWS_EC2_METADATA_DISABLED";
const ENDPOINT: &str = "AWS_EC2_METADATA_SERVICE_ENDPOINT";
const MODE: &str = "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE";
const ROLES: &str = "/latest/meta-data/iam/security-credentials/";
const LARGEST: usize = 64 * 1024;
/// Asked for anew with each set of credentials, so it need not last.
const TOKEN_SECONDS: &str = "300";

impl Chain {
    /// As EC2 gives them to an instance with a role, by version 2 of its protocol only: version 1 hands them to whoever can make
    /// this machine send a GET. `None` if instance metadata is switched off here.
    /// <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html>
    pub(super) async fn of_instance(&self) -> Result<Option<Credentials>, CredentialsError> {
        if self.environment.get(DISABLED).is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return Ok(None);
        }
        let host = self.instance_host()?;
        let from = format!("instance metadata at {}", host.authority());
        let at = |path: &str| host.join(path).expect("the paths are constants, and names that were checked");

        let request = self.inside.put(at("/latest/api/token")).header("x-aws-ec2-metadata-token-ttl-seconds", TOKEN_SECONDS);
        let answer = exchange(request, LARGEST).await.map_err(|error| match CredentialsError::unanswered(&from, error) {
            CredentialsError::Unanswered { from, why } => {
                let hint = "in a container on EC2, raise the instance's HttpPutResponseHopLimit to 2";
                CredentialsError::Unanswered { from, why: format!("{why}; {hint}") }
            }
            other => other,
        })?;
        let token = answer.text().trim();
        if answer.status != StatusCode::OK {
            let said = match answer.status {
                StatusCode::FORBIDDEN => "the instance has its metadata switched off (HttpEndpoint)",
                StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => "it does not speak version 2 (PUT /latest/api/token)",
                _ => "it gave no token",
            };
            return Err(CredentialsError::of_status(&from, answer.status, said));
        }
        if !is_sendable(token) {
            return Err(CredentialsError::BadAnswer { from, what: "the token cannot be sent".to_owned() });
        }
        let mut header = HeaderValue::from_str(token).expect("it was checked to be sendable");
        header.set_sensitive(true);
        let get = async |path: &str| -> Result<Answer, CredentialsError> {
            let request = self.inside.get(at(path)).header("x-aws-ec2-metadata-token", header.clone());
            exchange(request, LARGEST).await.map_err(|error| CredentialsError::unanswered(&from, error))
        };

        let roles = get(ROLES).await?;
        let role = match roles.status {
            StatusCode::OK => roles.text().lines().next().unwrap_or_default().trim(),
            StatusCode::NOT_FOUND => return Err(CredentialsError::of_status(&from, roles.status, "the instance has no role")),
            status => return Err(CredentialsError::of_status(&from, status, "it did not name the instance's role")),
        };
        // What IAM allows in a role's name: it becomes part of a path.
        if role.is_empty() || !role.bytes().all(|b| b.is_ascii_alphanumeric() || b"+=,.@_-".contains(&b)) || role.starts_with('.')
        {
            return Err(CredentialsError::BadAnswer { from, what: "the name of the instance's role is none".to_owned() });
        }
        let answer = get(&format!("{ROLES}{role}")).await?;
        if answer.status != StatusCode::OK {
            return Err(CredentialsError::of_status(&from, answer.status, "it gave no credentials for the instance's role"));
        }
        Document::read(&from, &answer).map(Some)
    }

    fn instance_host(&self) -> Result<Url, CredentialsError> {
        if let Some(endpoint) = self.environment.get(ENDPOINT) {
            let url = endpoint.parse::<Url>().ok().filter(|url| {
                matches!(url.scheme(), "http" | "https")
                    && url.has_host()
                    && url.username().is_empty()
                    && url.password().is_none()
            });
            return url.ok_or_else(|| CredentialsError::Wrong(format!("{ENDPOINT} is no URL of http:// or https://")));
        }
        let host = match self.environment.get(MODE) {
            Some(mode) if mode.eq_ignore_ascii_case("ipv6") => "http://[fd00:ec2::254]",
            Some(mode) if !mode.eq_ignore_ascii_case("ipv4") => {
                return Err(CredentialsError::Wrong(format!("{MODE} is neither IPv4 nor IPv6")));
            }
            _ => &self.hosts.instance,
        };
        Ok(host.parse().expect("it is a constant, or a test's"))
    }
}
