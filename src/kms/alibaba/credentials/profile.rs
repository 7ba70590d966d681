use std::path::PathBuf;

use serde::Deserialize;

use super::{Credentials, CredentialsError, Identity, Role};
use crate::kms::{Environment, refresh::text_of};

/// What a profile of the command line tool says about credentials.
pub(super) enum Plan {
    Keys(Credentials),
    Role(Role, Credentials),
    Identity(Identity),
    /// The instance's role, by name if that is said.
    Instance(Option<String>),
}

/// `~/.aliyun/config.json`, as `aliyun configure` writes it.
#[derive(Deserialize)]
struct File {
    #[serde(default)]
    current: String,
    #[serde(default)]
    profiles: Vec<Profile>,
}

#[derive(Deserialize)]
struct Profile {
    #[serde(default)]
    name: String,
    #[serde(default)]
    mode: String,
    access_key_id: Option<String>,
    access_key_secret: Option<String>,
    sts_token: Option<String>,
    ram_role_arn: Option<String>,
    ram_role_name: Option<String>,
    ram_session_name: Option<String>,
    external_id: Option<String>,
    oidc_provider_arn: Option<String>,
    oidc_token_file: Option<String>,
}

/// The profile that counts; `None` if there is no such file.
pub(super) fn plan(environment: &Environment) -> Result<Option<Plan>, CredentialsError> {
    if environment.get("ALIBABA_CLOUD_CLI_PROFILE_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        return Ok(None);
    }
    let path = PathBuf::from(environment.get("HOME").unwrap_or_default()).join(".aliyun/config.json");
    let Some(text) = text_of(&path)? else { return Ok(None) };
    let shown = path.display();
    // Not serde's own message, which can repeat what the file holds.
    let file: File = serde_json::from_str(&text).map_err(|error| {
        CredentialsError::Wrong(format!("{shown} is not the JSON of profiles (line {}, column {})", error.line(), error.column()))
    })?;
    let wanted = environment.get("ALIBABA_CLOUD_PROFILE").unwrap_or(file.current);
    let Some(profile) = file.profiles.into_iter().find(|profile| profile.name == wanted) else {
        return Err(CredentialsError::Wrong(format!("{shown} has no profile {wanted:?}")));
    };
    profile.plan(&shown.to_string()).map(Some)
}

impl Profile {
    fn plan(self, file: &str) -> Result<Plan, CredentialsError> {
        let Self { name, mode, .. } = &self;
        let needed = |value: &Option<String>, key: &str| {
            let missing = || CredentialsError::Wrong(format!("profile {name} of {file} is of mode {mode} and has no {key}"));
            value.clone().filter(|value| !value.is_empty()).ok_or_else(missing)
        };
        let keys = |token: Option<&str>| {
            let (id, secret) =
                (needed(&self.access_key_id, "access_key_id")?, needed(&self.access_key_secret, "access_key_secret")?);
            Credentials::checked(&format!("profile {name} of {file}"), &id, &secret, token, None)
        };
        let given = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
        let session = given(&self.ram_session_name);
        match mode.as_str() {
            "AK" => keys(None).map(Plan::Keys),
            "StsToken" => keys(Some(&needed(&self.sts_token, "sts_token")?)).map(Plan::Keys),
            "RamRoleArn" => {
                let arn = needed(&self.ram_role_arn, "ram_role_arn")?;
                let role = Role { arn, session, external_id: given(&self.external_id) };
                Ok(Plan::Role(role, keys(self.sts_token.as_deref())?))
            }
            "EcsRamRole" => Ok(Plan::Instance(given(&self.ram_role_name))),
            "OIDC" => Ok(Plan::Identity(Identity {
                role: needed(&self.ram_role_arn, "ram_role_arn")?,
                provider: needed(&self.oidc_provider_arn, "oidc_provider_arn")?,
                token_file: needed(&self.oidc_token_file, "oidc_token_file")?.into(),
                session,
            })),
            _ => Err(CredentialsError::Wrong(format!(
                "profile {name} of {file} is of mode {mode:?}: countersign has AK, StsToken, RamRoleArn, EcsRamRole and OIDC"
            ))),
        }
    }
}
