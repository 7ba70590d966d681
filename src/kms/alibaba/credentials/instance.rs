use http::{HeaderValue, StatusCode};

use super::{Chain, Credentials, CredentialsError, Document};
use crate::kms::{
    exchange::{Answer, exchange},
    refresh::is_sendable,
};

const ROLES: &str = "/latest/meta-data/ram/security-credentials/";
const LARGEST: usize = 64 * 1024;
/// Asked for anew with each set of credentials, so it need not last.
const TOKEN_SECONDS: &str = "300";

impl Chain {
    /// As ECS gives them to an instance with a RAM role, in its hardened mode only: the other hands them to whoever can make this
    /// machine send a GET. The role's name is asked for if it is not said.
    /// <https://www.alibabacloud.com/help/en/ecs/user-guide/view-instance-metadata>
    pub(super) async fn of_instance(&self, role: Option<&str>) -> Result<Credentials, CredentialsError> {
        let from = format!("instance metadata at {}", self.metadata.authority());
        let at = |path: &str| self.metadata.join(path).expect("the paths are constants, and names that were checked");
        let request = self.inside.put(at("/latest/api/token")).header("x-aliyun-ecs-metadata-token-ttl-seconds", TOKEN_SECONDS);
        let answer = exchange(request, LARGEST).await.map_err(|error| CredentialsError::unanswered(&from, error))?;
        if answer.status != StatusCode::OK {
            let said = "it gave no token for its hardened mode (PUT /latest/api/token)";
            return Err(CredentialsError::of_status(&from, answer.status, said));
        }
        let token = answer.text().trim();
        if !is_sendable(token) {
            return Err(CredentialsError::BadAnswer { from, what: "the token cannot be sent".to_owned() });
        }
        let mut header = HeaderValue::from_str(token).expect("it was checked to be sendable");
        header.set_sensitive(true);
        let get = async |path: &str| -> Result<Answer, CredentialsError> {
            let request = self.inside.get(at(path)).header("x-aliyun-ecs-metadata-token", header.clone());
            exchange(request, LARGEST).await.map_err(|error| CredentialsError::unanswered(&from, error))
        };

        let role = if let Some(role) = role {
            role.to_owned()
        } else {
            let roles = get(ROLES).await?;
            match roles.status {
                StatusCode::OK => roles.text().lines().next().unwrap_or_default().trim().to_owned(),
                StatusCode::NOT_FOUND => {
                    return Err(CredentialsError::of_status(&from, roles.status, "the instance has no RAM role"));
                }
                status => return Err(CredentialsError::of_status(&from, status, "it did not name the instance's RAM role")),
            }
        };
        // What RAM allows in a role's name: it becomes part of a path.
        if role.is_empty() || !role.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) || role.starts_with('.') {
            return Err(CredentialsError::BadAnswer { from, what: "the name of the instance's RAM role is none".to_owned() });
        }
        let answer = get(&format!("{ROLES}{role}")).await?;
        if answer.status != StatusCode::OK {
            let said = format!("it gave no credentials for RAM role {role}");
            return Err(CredentialsError::of_status(&from, answer.status, &said));
        }
        match serde_json::from_slice::<Document>(&answer.body) {
            Ok(document) => document.checked(&from),
            Err(_) => Err(CredentialsError::BadAnswer { from, what: "what came is not the JSON of credentials".to_owned() }),
        }
    }
}
