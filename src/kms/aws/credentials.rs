use std::{
    fmt,
    fs::File,
    io::{self, Read},
    path::PathBuf,
};

use aws_credential_types::Credentials;
use secrecy::zeroize::Zeroizing;
use tokio::sync::Mutex;

use super::Environment;

/// Where the credentials come from: the environment, or else a profile's static ones in the shared files.
/// They are read once, and again when the KMS no longer takes them.
pub(super) struct Provider {
    environment: Environment,
    /// Held while they are read anew, so that many callers whose credentials expired read them once.
    held: Mutex<Option<Credentials>>,
}

/// Why there are no credentials. Says where they were looked for, never what was found.
#[derive(Debug, thiserror::Error)]
pub(super) enum CredentialsError {
    #[error(
        "there are no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give profile {profile} an \
         aws_access_key_id and aws_secret_access_key in {}",
        file.display()
    )]
    None { profile: String, file: PathBuf },
    #[error("{one} is set without {other}")]
    Half { one: &'static str, other: &'static str },
    #[error("{0} cannot be used yet: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN) instead")]
    NotYet(String),
    #[error("the AWS credentials hold characters that cannot be sent: {0}")]
    Unsendable(&'static str),
    #[error("{} cannot be read: {source}", file.display())]
    Unreadable { file: PathBuf, source: io::Error },
}

impl Provider {
    pub(super) fn new(environment: Environment) -> Self {
        Self { environment, held: Mutex::new(None) }
    }

    pub(super) async fn current(&self) -> Result<Credentials, CredentialsError> {
        let mut held = self.held.lock().await;
        if let Some(credentials) = &*held {
            return Ok(credentials.clone());
        }
        let credentials = read(&self.environment)?;
        *held = Some(credentials.clone());
        Ok(credentials)
    }

    /// The credentials after the KMS refused these ones as expired or unknown: read anew, unless somebody else just did.
    pub(super) async fn renewed(&self, refused: &Credentials) -> Result<Credentials, CredentialsError> {
        let mut held = self.held.lock().await;
        if let Some(credentials) = &*held
            && !same(credentials, refused)
        {
            return Ok(credentials.clone());
        }
        let credentials = read(&self.environment)?;
        *held = Some(credentials.clone());
        Ok(credentials)
    }
}

impl fmt::Debug for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Provider")
    }
}

/// The region that the profile names, if it can be read at all.
pub(super) fn region_of_profile(environment: &Environment) -> Option<String> {
    let files = SharedFiles::of(environment);
    let [credentials, config] = files.read().ok()?;
    let found = files.value(&credentials, &config, "region")?;
    Some(found.to_owned())
}

fn same(one: &Credentials, other: &Credentials) -> bool {
    one.access_key_id() == other.access_key_id()
        && one.secret_access_key() == other.secret_access_key()
        && one.session_token() == other.session_token()
}

fn read(environment: &Environment) -> Result<Credentials, CredentialsError> {
    const ID: &str = "AWS_ACCESS_KEY_ID";
    const SECRET: &str = "AWS_SECRET_ACCESS_KEY";
    match (environment.get(ID), environment.get(SECRET)) {
        (Some(id), Some(secret)) => {
            let token = environment.get("AWS_SESSION_TOKEN");
            return checked(&id, &secret, token.as_deref(), "environment");
        }
        (Some(_), None) => return Err(CredentialsError::Half { one: ID, other: SECRET }),
        (None, Some(_)) => return Err(CredentialsError::Half { one: SECRET, other: ID }),
        (None, None) => {}
    }

    let files = SharedFiles::of(environment);
    let [credentials, config] = files.read()?;
    let value = |name| files.value(&credentials, &config, name);
    match (value("aws_access_key_id"), value("aws_secret_access_key")) {
        (Some(id), Some(secret)) => return checked(id, secret, value("aws_session_token"), "profile"),
        (Some(_), None) => return Err(CredentialsError::Half { one: "aws_access_key_id", other: "aws_secret_access_key" }),
        (None, Some(_)) => return Err(CredentialsError::Half { one: "aws_secret_access_key", other: "aws_access_key_id" }),
        (None, None) => {}
    }
    // What AWS's own tools would go on to: said rather than passed over.
    for name in ["role_arn", "credential_process", "sso_session", "sso_account_id", "web_identity_token_file"] {
        if value(name).is_some() {
            return Err(CredentialsError::NotYet(format!("{name} of profile {}", files.profile)));
        }
    }
    for name in ["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"] {
        if environment.get(name).is_some() {
            return Err(CredentialsError::NotYet(name.to_owned()));
        }
    }
    Err(CredentialsError::None { profile: files.profile, file: files.credentials })
}

fn checked(id: &str, secret: &str, token: Option<&str>, source: &'static str) -> Result<Credentials, CredentialsError> {
    let sendable = |text: &str| text.bytes().all(|b| b.is_ascii_graphic());
    let (id, secret, token) = (id.trim(), secret.trim(), token.map(str::trim));
    if id.is_empty() || !sendable(id) || id.contains(['/', ',']) {
        return Err(CredentialsError::Unsendable("the access key id"));
    }
    if token.is_some_and(|token| !sendable(token)) {
        return Err(CredentialsError::Unsendable("the session token"));
    }
    Ok(Credentials::new(id, secret, token.map(str::to_owned), None, source))
}

/// AWS's files of credentials and settings, and the profile in them that counts.
struct SharedFiles {
    profile: String,
    credentials: PathBuf,
    config: PathBuf,
}

type Text = Zeroizing<String>;

const LARGEST_FILE: u64 = 1024 * 1024;

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
        let read = |path: &PathBuf| {
            let mut text = Text::default();
            match File::open(path).and_then(|file| file.take(LARGEST_FILE).read_to_string(&mut text)) {
                Ok(_) => Ok(text),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Text::default()),
                Err(source) => Err(CredentialsError::Unreadable { file: path.clone(), source }),
            }
        };
        Ok([read(&self.credentials)?, read(&self.config)?])
    }

    /// A setting of the profile: as the credentials file has it, or else the config file.
    fn value<'a>(&self, credentials: &'a Text, config: &'a Text, name: &str) -> Option<&'a str> {
        setting(credentials, name, |section| section == self.profile).or_else(|| {
            setting(config, name, |section| {
                let named = section.strip_prefix("profile").filter(|rest| rest.starts_with([' ', '\t'])).map(str::trim);
                named.map_or(section == "default" && self.profile == "default", |named| named == self.profile)
            })
        })
    }
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
        if let Some(section) = line.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            inside = is_section(section.0.trim());
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn found<const N: usize>(variables: [(&str, &str); N]) -> Result<(String, String, Option<String>), String> {
        let credentials = read(&Environment::of(variables)).map_err(|error| error.to_string())?;
        let token = credentials.session_token().map(str::to_owned);
        Ok((credentials.access_key_id().to_owned(), credentials.secret_access_key().to_owned(), token))
    }

    fn keys(id: &str, secret: &str, token: Option<&str>) -> (String, String, Option<String>) {
        (id.to_owned(), secret.to_owned(), token.map(str::to_owned))
    }

    const CREDENTIALS: &str = "\
# the shared file
[default]
aws_access_key_id = AKIADEFAULT
aws_secret_access_key=se/cr+et== # ours
s3 =
  aws_access_key_id = nested

[prod]
aws_access_key_id\t=\tAKIAPROD
aws_secret_access_key = prod/secret
aws_session_token = token==
[half]
aws_access_key_id = AKIAHALF
";
    const CONFIG: &str = "\
[default]
region = eu-west-1
[profile prod]
region = sa-east-1
aws_access_key_id = overridden
[profile role]
role_arn = arn:aws:iam::111122223333:role/signer
source_profile = default
[profile elsewhere]
aws_access_key_id = AKIACONFIG
aws_secret_access_key = config/secret
[prod2]
region = nowhere
";

    #[test]
    fn the_environment_comes_first() {
        let variables = [("AWS_ACCESS_KEY_ID", "AKIA"), ("AWS_SECRET_ACCESS_KEY", "secret\n"), ("AWS_SESSION_TOKEN", "token")];
        assert_eq!(found(variables).unwrap(), keys("AKIA", "secret", Some("token")));
        let error = found([("AWS_ACCESS_KEY_ID", "AKIA")]).unwrap_err();
        assert!(error.contains("AWS_SECRET_ACCESS_KEY") && !error.contains("AKIA,"), "{error}");
    }

    #[test]
    fn profiles_are_read_from_both_files() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(".aws")).unwrap();
        fs::write(folder.path().join(".aws/credentials"), CREDENTIALS).unwrap();
        fs::write(folder.path().join(".aws/config"), CONFIG).unwrap();
        let home = folder.path().to_str().unwrap();
        let with = |profile: &str| found([("HOME", home), ("AWS_PROFILE", profile)]);
        assert_eq!(found([("HOME", home)]).unwrap(), keys("AKIADEFAULT", "se/cr+et==", None));
        assert_eq!(with("prod").unwrap(), keys("AKIAPROD", "prod/secret", Some("token==")));
        assert_eq!(with("elsewhere").unwrap(), keys("AKIACONFIG", "config/secret", None));
        for (profile, part) in [
            ("half", "without aws_secret_access_key"),
            ("role", "role_arn of profile role cannot be used yet"),
            ("nobody", "profile nobody"),
        ] {
            let error = with(profile).unwrap_err();
            assert!(error.contains(part), "{error:?} does not say {part:?}");
        }
        let region = |profile: &str| region_of_profile(&Environment::of([("HOME", home), ("AWS_PROFILE", profile)]));
        assert_eq!(region("prod").as_deref(), Some("sa-east-1"));
        assert_eq!(region("default").as_deref(), Some("eu-west-1"));
        assert_eq!(region("prod2"), None);
        let moved = folder.path().join("moved");
        fs::write(&moved, "[default]\naws_access_key_id=AKIAMOVED\naws_secret_access_key=s\n").unwrap();
        let variables = [("HOME", home), ("AWS_SHARED_CREDENTIALS_FILE", moved.to_str().unwrap())];
        assert_eq!(found(variables).unwrap(), keys("AKIAMOVED", "s", None));
    }

    #[test]
    fn what_is_missing_is_said_with_where_it_was_looked_for() {
        let error = found([("HOME", "/nonexistent")]).unwrap_err();
        assert!(error.contains("/nonexistent/.aws/credentials") && error.contains("AWS_ACCESS_KEY_ID"), "{error}");
        let error = found([("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://169.254.170.23/")]).unwrap_err();
        assert!(error.contains("AWS_CONTAINER_CREDENTIALS_FULL_URI cannot be used yet"), "{error}");
    }

    #[test]
    fn what_cannot_stand_in_a_header_is_refused_and_not_repeated() {
        let secret = ("AWS_SECRET_ACCESS_KEY", "hunter2");
        for variables in [
            [("AWS_ACCESS_KEY_ID", "AK\u{1}IA"), secret, ("AWS_SESSION_TOKEN", "")],
            [("AWS_ACCESS_KEY_ID", "AKIA"), secret, ("AWS_SESSION_TOKEN", "to\nken")],
        ] {
            let error = found(variables).unwrap_err();
            assert!(error.contains("cannot be sent") && !error.contains("hunter2") && !error.contains("ken\""), "{error}");
        }
    }

    #[tokio::test]
    async fn credentials_that_were_refused_are_read_anew_once() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("credentials");
        let write = |id: &str| fs::write(&file, format!("[default]\naws_access_key_id={id}\naws_secret_access_key=s\n")).unwrap();
        write("AKIA1");
        let provider = Provider::new(Environment::of([("AWS_SHARED_CREDENTIALS_FILE", file.to_str().unwrap())]));
        let first = provider.current().await.unwrap();
        write("AKIA2");
        assert_eq!(provider.current().await.unwrap().access_key_id(), "AKIA1");
        assert_eq!(provider.renewed(&first).await.unwrap().access_key_id(), "AKIA2");
        write("AKIA3");
        // Somebody else was refused with the first ones, too, and need not read the file.
        assert_eq!(provider.renewed(&first).await.unwrap().access_key_id(), "AKIA2");
        assert!(!format!("{provider:?}").contains("AKIA"));
    }
}
