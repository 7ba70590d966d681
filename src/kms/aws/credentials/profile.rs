use std::path::PathBuf;

use super::{Credentials, CredentialsError, checked, sts::Identity, sts::Role};
use crate::kms::{
    Environment,
    refresh::{Text, text_of},
};

/// How a profile gets its credentials: from `base`, and then by taking each role in turn.
pub(super) struct Plan {
    pub(super) profile: String,
    pub(super) base: Base,
    pub(super) roles: Vec<Role>,
}

pub(super) enum Base {
    Keys(Credentials),
    WebIdentity(Identity),
    Environment,
    Container,
    Instance,
}

/// More would be a mistake.
const MOST_ROLES: usize = 8;
const ID: &str = "aws_access_key_id";
const SECRET: &str = "aws_secret_access_key";

/// What the profile that counts says about credentials; `None` if there is no such profile, or it says nothing about them.
/// <https://docs.aws.amazon.com/sdkref/latest/guide/feature-assume-role-credentials.html>
pub(super) fn plan(environment: &Environment) -> Result<Option<Plan>, CredentialsError> {
    let files = SharedFiles::of(environment);
    let texts = files.read()?;
    let first = files.profile.as_str();
    if !SharedFiles::has(&texts, first) {
        // Somebody wants that one: another one's credentials are not what is meant.
        return match environment.get("AWS_PROFILE") {
            Some(_) => {
                Err(CredentialsError::Wrong(format!("AWS_PROFILE names profile {first}, and {files} have none of that name")))
            }
            None => Ok(None),
        };
    }
    let (mut roles, mut seen) = (Vec::new(), Vec::new());
    let mut profile = first.to_owned();
    let base = loop {
        let at = |name| SharedFiles::value(&texts, &profile, name);
        let wrong = |what: String| CredentialsError::Wrong(format!("profile {profile}: {what}"));
        let is_source = !seen.is_empty();
        // A profile that is a source, its own included, gives its keys if it has any.
        let role = at("role_arn").filter(|_| !(is_source && at(ID).is_some()));
        let Some(arn) = role else {
            break match keys(&texts, &profile)? {
                Some(credentials) => Base::Keys(credentials),
                None if is_source => return Err(wrong("it is a source_profile and has no credentials".to_owned())),
                None => return Ok(None),
            };
        };
        if seen.contains(&profile) {
            return Err(wrong("its source_profile leads back to it".to_owned()));
        }
        if seen.len() == MOST_ROLES {
            return Err(wrong(format!("more than {MOST_ROLES} roles in a row")));
        }
        let session = at("role_session_name").map(str::to_owned);
        let base = match (at("source_profile"), at("credential_source"), at("web_identity_token_file")) {
            (None, None, Some(file)) => {
                break Base::WebIdentity(Identity { role: arn.to_owned(), session, token_file: file.into() });
            }
            (Some(source), None, None) => Err(source.to_owned()),
            (None, Some("Environment"), None) => Ok(Base::Environment),
            (None, Some("EcsContainer"), None) => Ok(Base::Container),
            (None, Some("Ec2InstanceMetadata"), None) => Ok(Base::Instance),
            (None, Some(_), None) => {
                let known = "Environment, EcsContainer and Ec2InstanceMetadata";
                return Err(wrong(format!("its credential_source is none that is known: {known}")));
            }
            _ => {
                let needed = "source_profile, credential_source and web_identity_token_file";
                return Err(wrong(format!("beside its role_arn there has to be one of {needed}, and only one")));
            }
        };
        if at("mfa_serial").is_some() {
            let instead = "nobody is there to type the code; use a role without that condition";
            return Err(CredentialsError::Unsupported { setting: "mfa_serial", profile, instead });
        }
        let duration =
            at("duration_seconds").map(|text| text.parse().map_err(|_| wrong("duration_seconds is no number".to_owned())));
        let external_id = at("external_id").map(str::to_owned);
        roles.push(Role { arn: arn.to_owned(), session, external_id, duration: duration.transpose()? });
        match base {
            Ok(base) => break base,
            Err(source) => {
                if !SharedFiles::has(&texts, &source) {
                    return Err(wrong(format!("its source_profile {source} is not in {files}")));
                }
                seen.push(std::mem::replace(&mut profile, source));
            }
        }
    };
    // The last profile's role is the first to be taken.
    roles.reverse();
    Ok(Some(Plan { profile: first.to_owned(), base, roles }))
}

/// A setting of the profile that counts, if the files can be read at all.
pub(in crate::kms::aws) fn setting_of_profile(environment: &Environment, name: &str) -> Option<String> {
    let files = SharedFiles::of(environment);
    let texts = files.read().ok()?;
    SharedFiles::value(&texts, &files.profile, name).map(str::to_owned)
}

/// At the end of the chain.
pub(super) fn nothing_found(environment: &Environment, instance: &str) -> CredentialsError {
    let SharedFiles { profile, credentials, .. } = SharedFiles::of(environment);
    CredentialsError::None(format!(
        "there are no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give profile {profile} an aws_access_key_id \
         and aws_secret_access_key or a role_arn in {}, or give the pod, the task or the instance a role (this one has none: {instance})",
        credentials.display()
    ))
}

/// The keys of a profile without a role.
fn keys(texts: &[Text; 2], profile: &str) -> Result<Option<Credentials>, CredentialsError> {
    let at = |name| SharedFiles::value(texts, profile, name);
    match (at(ID), at(SECRET)) {
        (Some(id), Some(secret)) => {
            return checked(&format!("profile {profile}"), id, secret, at("aws_session_token"), None).map(Some);
        }
        (Some(_), None) => return Err(CredentialsError::Half { one: ID, other: SECRET }),
        (None, Some(_)) => return Err(CredentialsError::Half { one: SECRET, other: ID }),
        (None, None) => {}
    }
    // What AWS's own tools would go on to: said rather than passed over.
    for (setting, instead) in [
        ("credential_process", "give countersign a role, or keys in the credentials file"),
        ("sso_session", "signing on is for people; give countersign a role, or keys in the credentials file"),
        ("sso_account_id", "signing on is for people; give countersign a role, or keys in the credentials file"),
        ("login_session", "signing on is for people; give countersign a role, or keys in the credentials file"),
        ("web_identity_token_file", "add the role_arn that it is for"),
        ("source_profile", "add the role_arn that it is for"),
        ("credential_source", "add the role_arn that it is for"),
    ] {
        if at(setting).is_some() {
            return Err(CredentialsError::Unsupported { setting, profile: profile.to_owned(), instead });
        }
    }
    Ok(None)
}

/// AWS's files of credentials and settings, and the profile in them that counts.
struct SharedFiles {
    profile: String,
    credentials: PathBuf,
    config: PathBuf,
}

impl SharedFiles {
    fn of(environment: &Environment) -> Self {
        let home = PathBuf::from(environment.get("HOME").unwrap_or_default());
        let path = |variable, name: &str| environment.get(variable).map_or_else(|| home.join(".aws").join(name), PathBuf::from);
        Self {
            profile: environment.get("AWS_PROFILE").unwrap_or_else(|| "default".to_owned()),
            credentials: path("AWS_SHARED_CREDENTIALS_FILE", "credentials"),
            config: path("AWS_CONFIG_FILE", "config"),
        }
    }

    /// The texts of both; one that is not there is empty.
    fn read(&self) -> Result<[Text; 2], CredentialsError> {
        let read = |path| text_of(path).map(Option::unwrap_or_default);
        Ok([read(&self.credentials)?, read(&self.config)?])
    }

    fn has([credentials, config]: &[Text; 2], profile: &str) -> bool {
        sections(credentials).any(|section| section == profile) || sections(config).any(|section| is_config_of(section, profile))
    }

    /// A setting of a profile: as the credentials file has it, or else the config file.
    fn value<'a>([credentials, config]: &'a [Text; 2], profile: &str, name: &str) -> Option<&'a str> {
        setting(credentials, name, |section| section == profile)
            .or_else(|| setting(config, name, |section| is_config_of(section, profile)))
    }
}

impl std::fmt::Display for SharedFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} and {}", self.credentials.display(), self.config.display())
    }
}

/// `[default]` and `[profile NAME]`.
fn is_config_of(section: &str, profile: &str) -> bool {
    let named = section.strip_prefix("profile").filter(|rest| rest.starts_with([' ', '\t'])).map(str::trim);
    named.map_or(section == "default" && profile == "default", |named| named == profile)
}

fn sections(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(section)
}

fn section(line: &str) -> Option<&str> {
    Some(line.strip_prefix('[')?.split_once(']')?.0.trim())
}

/// Looks a setting up in AWS's kind of INI file (AWS SDKs and Tools Reference Guide, "Shared config and credentials files").
fn setting<'a>(text: &'a str, name: &str, is_section: impl Fn(&str) -> bool) -> Option<&'a str> {
    let mut inside = false;
    let mut found = None;
    for line in text.lines() {
        // An indented line belongs to a nested setting, such as those of S3.
        if line.starts_with([' ', '\t', '#', ';']) {
            continue;
        }
        if let Some(section) = section(line) {
            inside = is_section(section);
        } else if inside
            && let Some((key, value)) = line.split_once('=')
            && key.trim().eq_ignore_ascii_case(name)
        {
            let comment = [" #", " ;", "\t#", "\t;"].into_iter().filter_map(|mark| value.find(mark)).min();
            let value = comment.map_or(value, |at| &value[..at]).trim();
            found = (!value.is_empty()).then_some(value);
        }
    }
    found
}
