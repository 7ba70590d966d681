pub(in crate::kms::aws) mod fake;

use std::fs;

use jiff::SignedDuration;
use tempfile::TempDir;

use super::*;
use crate::clock::ManualClock;
use fake::{BASE, Cloud, REGION};

/// A machine in AWS.
struct Machine {
    cloud: Cloud,
    clock: Clock,
    hand: ManualClock,
    folder: TempDir,
}

impl Machine {
    async fn set() -> Self {
        let (clock, hand) = Clock::manual("2026-11-22T05:00:00Z".parse().unwrap());
        Self { cloud: Cloud::start(clock.clone()).await, clock, hand, folder: tempfile::tempdir().unwrap() }
    }

    fn write(&self, name: &str, text: &str) -> String {
        let path = self.folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.cloud.address)
    }

    /// With these variables beside those that say where everything is.
    fn provider<const N: usize>(&self, variables: [(&str, &str); N]) -> Kept<Chain> {
        let sts = self.url("");
        let mut all =
            vec![("HOME", self.folder.path().to_str().unwrap()), ("AWS_ENDPOINT_URL_STS", &sts), ("AWS_REGION", REGION)];
        all.extend(variables);
        let hosts = Hosts { container: self.url(""), instance: self.url("") };
        let http = exchange::client(Duration::from_secs(2), Duration::from_secs(5)).no_proxy().build().unwrap();
        provider_at(hosts, Environment::of_all(all), self.clock.clone(), "us-east-2", http).unwrap()
    }

    /// The access key, or what is wrong.
    async fn found<const N: usize>(&self, variables: [(&str, &str); N]) -> Result<String, String> {
        let found = self.provider(variables).current().await;
        found.map(|credentials| credentials.access_key_id().to_owned()).map_err(|error| error.to_string())
    }
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
[base]
aws_access_key_id = AKIABASE
aws_secret_access_key = base/secret+key
";
const CONFIG: &str = "\
[default]
region = eu-west-1
[profile prod]
region = sa-east-1
aws_access_key_id = overridden
[profile role]
role_arn = arn:aws:iam::111122223333:role/signer
source_profile = base
external_id = a customer
role_session_name = images
duration_seconds = 900
[profile chain]
role_arn = arn:aws:iam::444455556666:role/far
source_profile = role
[profile own]
role_arn = arn:aws:iam::111122223333:role/own
source_profile = own
aws_access_key_id = AKIABASE
aws_secret_access_key = base/secret+key
[profile environment]
role_arn = arn:aws:iam::111122223333:role/signer
credential_source = Environment
[profile task]
role_arn = arn:aws:iam::111122223333:role/signer
credential_source = EcsContainer
[profile instance]
role_arn = arn:aws:iam::111122223333:role/signer
credential_source = Ec2InstanceMetadata
[profile elsewhere]
aws_access_key_id = AKIACONFIG
aws_secret_access_key = config/secret
[profile nothing]
region = eu-west-1
[profile round]
role_arn = arn:aws:iam::111122223333:role/a
source_profile = about
[profile about]
role_arn = arn:aws:iam::111122223333:role/b
source_profile = round
[profile lost]
role_arn = arn:aws:iam::111122223333:role/a
source_profile = nowhere
[profile dry]
role_arn = arn:aws:iam::111122223333:role/a
source_profile = nothing
[profile both]
role_arn = arn:aws:iam::111122223333:role/a
source_profile = base
credential_source = Environment
[profile neither]
role_arn = arn:aws:iam::111122223333:role/a
[profile other]
role_arn = arn:aws:iam::111122223333:role/a
credential_source = Cupboard
[profile mfa]
role_arn = arn:aws:iam::111122223333:role/a
source_profile = base
mfa_serial = arn:aws:iam::111122223333:mfa/me
[profile process]
credential_process = /bin/hunter2
[profile people]
sso_session = us
[prod2]
region = nowhere
";

impl Machine {
    async fn with_files() -> Self {
        let machine = Self::set().await;
        machine.write(".aws/credentials", CREDENTIALS);
        machine.write(".aws/config", CONFIG);
        machine
    }
}

#[tokio::test]
async fn the_environment_comes_first() {
    let machine = Machine::with_files().await;
    let variables = [("AWS_ACCESS_KEY_ID", "AKIA"), ("AWS_SECRET_ACCESS_KEY", "secret\n"), ("AWS_SESSION_TOKEN", "token")];
    let credentials = machine.provider(variables).current().await.unwrap();
    assert_eq!(credentials.access_key_id(), "AKIA");
    assert_eq!((credentials.secret_access_key(), credentials.session_token()), ("secret", Some("token")));
}

#[tokio::test]
async fn profiles_are_read_from_both_files() {
    let machine = Machine::with_files().await;
    let credentials = machine.provider([("AWS_PROFILE", "prod")]).current().await.unwrap();
    assert_eq!((credentials.secret_access_key(), credentials.session_token()), ("prod/secret", Some("token==")));
    assert_eq!(machine.found([]).await.unwrap(), "AKIADEFAULT");
    assert_eq!(machine.found([("AWS_PROFILE", "elsewhere")]).await.unwrap(), "AKIACONFIG");
    let moved = machine.write("moved", "[default]\naws_access_key_id=AKIAMOVED\naws_secret_access_key=s\n");
    assert_eq!(machine.found([("AWS_SHARED_CREDENTIALS_FILE", &moved)]).await.unwrap(), "AKIAMOVED");

    let home = machine.folder.path().to_str().unwrap();
    let region = |profile: &str| setting_of_profile(&Environment::of([("HOME", home), ("AWS_PROFILE", profile)]), "region");
    assert_eq!(region("prod").as_deref(), Some("sa-east-1"));
    assert_eq!(region("default").as_deref(), Some("eu-west-1"));
    assert_eq!(region("prod2"), None);
}

#[tokio::test]
async fn a_role_is_taken_with_the_keys_of_its_source() {
    let machine = Machine::with_files().await;
    assert_eq!(machine.found([("AWS_PROFILE", "role")]).await.unwrap(), "ASIA1");
    let form = machine.cloud.given().forms.pop().unwrap();
    for (name, value) in [
        ("Version", "2011-06-15"),
        ("RoleArn", "arn:aws:iam::111122223333:role/signer"),
        ("RoleSessionName", "images"),
        ("ExternalId", "a customer"),
        ("DurationSeconds", "900"),
    ] {
        assert_eq!(form[name], value);
    }
    assert_eq!(machine.found([("AWS_PROFILE", "own")]).await.unwrap(), "ASIA2");
    assert_eq!(machine.cloud.given().signers, [BASE[0], BASE[0]]);
}

#[tokio::test]
async fn roles_are_taken_one_after_another() {
    let machine = Machine::with_files().await;
    assert_eq!(machine.found([("AWS_PROFILE", "chain")]).await.unwrap(), "ASIA2");
    let given = machine.cloud.given();
    assert_eq!(given.signers, [BASE[0], "ASIA1"]);
    let roles: Vec<_> = given.forms.iter().map(|form| form["RoleArn"].as_str()).collect();
    assert_eq!(roles, ["arn:aws:iam::111122223333:role/signer", "arn:aws:iam::444455556666:role/far"]);
    assert_eq!(given.forms[1]["RoleSessionName"], "countersign");
}

#[tokio::test]
async fn a_role_is_taken_with_what_its_credential_source_gives() {
    let machine = Machine::with_files().await;
    let task = [("AWS_PROFILE", "task"), ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2/credentials/task")];
    assert_eq!(machine.found(task).await.unwrap(), "ASIA2");
    assert_eq!(machine.found([("AWS_PROFILE", "instance")]).await.unwrap(), "ASIA4");
    assert_eq!(machine.cloud.given().signers, ["ASIA1", "ASIA3"]);
    for (profile, part) in [("environment", "AWS_ACCESS_KEY_ID is not set"), ("task", "RELATIVE_URI and …_FULL_URI are not set")]
    {
        let error = machine.found([("AWS_PROFILE", profile)]).await.unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    let off = [("AWS_PROFILE", "instance"), ("AWS_EC2_METADATA_DISABLED", "TRUE")];
    assert!(machine.found(off).await.unwrap_err().contains("AWS_EC2_METADATA_DISABLED"));
}

#[tokio::test]
async fn a_link_that_is_set_up_wrongly_is_said_and_not_passed_over() {
    let machine = Machine::with_files().await;
    let folder = machine.folder.path().to_str().unwrap().to_owned();
    let token = machine.write("token", "web.identity.token-1");
    for (variables, part) in [
        ([("AWS_ACCESS_KEY_ID", "AKIA"), ("", "")], "AWS_ACCESS_KEY_ID is set without AWS_SECRET_ACCESS_KEY"),
        ([("AWS_SECRET_ACCESS_KEY", "hunter2"), ("", "")], "AWS_SECRET_ACCESS_KEY is set without AWS_ACCESS_KEY_ID"),
        ([("AWS_PROFILE", "half"), ("", "")], "without aws_secret_access_key"),
        ([("AWS_PROFILE", "nobody"), ("", "")], "AWS_PROFILE names profile nobody"),
        ([("AWS_PROFILE", "round"), ("", "")], "leads back"),
        ([("AWS_PROFILE", "lost"), ("", "")], "source_profile nowhere is not in"),
        ([("AWS_PROFILE", "dry"), ("", "")], "profile nothing: it is a source_profile and has no credentials"),
        ([("AWS_PROFILE", "both"), ("", "")], "only one"),
        ([("AWS_PROFILE", "neither"), ("", "")], "only one"),
        ([("AWS_PROFILE", "other"), ("", "")], "credential_source is none that is known"),
        ([("AWS_PROFILE", "mfa"), ("", "")], "mfa_serial of profile mfa is not supported"),
        ([("AWS_PROFILE", "process"), ("", "")], "credential_process of profile process is not supported"),
        ([("AWS_PROFILE", "people"), ("", "")], "sso_session of profile people is not supported"),
        ([("AWS_SHARED_CREDENTIALS_FILE", &folder), ("", "")], "cannot be read"),
        ([("AWS_PROFILE", "nothing"), ("AWS_WEB_IDENTITY_TOKEN_FILE", &token)], "is set without AWS_ROLE_ARN"),
        ([("AWS_PROFILE", "nothing"), ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "//evil/a")], "is no path"),
        ([("AWS_PROFILE", "nothing"), ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://10.0.0.1/")], "plain http to elsewhere"),
        ([("AWS_PROFILE", "nothing"), ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "metadata")], "is no URL"),
        ([("AWS_PROFILE", "role"), ("AWS_USE_FIPS_ENDPOINT", "true")], "AWS_USE_FIPS_ENDPOINT is true"),
        ([("AWS_PROFILE", "role"), ("AWS_USE_FIPS_ENDPOINT", "maybe")], "neither true nor false"),
    ] {
        let error = machine.found(variables).await.unwrap_err();
        assert!(error.contains(part) && !error.contains("hunter2"), "{variables:?}: {error:?} does not say {part:?}");
        assert_eq!(machine.cloud.requests(), [""; 0], "{variables:?}");
    }
}

#[tokio::test]
async fn what_cannot_stand_in_a_header_is_refused_and_not_repeated() {
    let machine = Machine::set().await;
    let secret = ("AWS_SECRET_ACCESS_KEY", "hunter2");
    for variables in [
        [("AWS_ACCESS_KEY_ID", "AK\u{1}IA"), secret, ("AWS_SESSION_TOKEN", "")],
        [("AWS_ACCESS_KEY_ID", "AKIA"), secret, ("AWS_SESSION_TOKEN", "to\nken")],
        [("AWS_ACCESS_KEY_ID", "AKIA"), ("AWS_SECRET_ACCESS_KEY", " "), ("AWS_SESSION_TOKEN", "")],
    ] {
        let error = machine.found(variables).await.unwrap_err();
        assert!(error.contains("cannot be sent") && !error.contains("hunter2") && !error.contains("ken\""), "{error}");
    }
}

#[tokio::test]
async fn a_web_identity_is_exchanged_and_its_token_read_each_time() {
    let machine = Machine::set().await;
    let token = machine.write("token", "web.identity.token-1\n");
    let role = "arn:aws:iam::111122223333:role/pod";
    let provider = machine.provider([("AWS_WEB_IDENTITY_TOKEN_FILE", token.as_str()), ("AWS_ROLE_ARN", role)]);
    let credentials = provider.current().await.unwrap();
    assert_eq!((credentials.access_key_id(), credentials.session_token()), ("ASIA1", Some("issued-token-1==")));
    assert_eq!(credentials.secret_access_key(), "issued/secret-1");
    let form = machine.cloud.given().forms.pop().unwrap();
    assert_eq!((form["RoleArn"].as_str(), form["RoleSessionName"].as_str()), (role, "countersign"));

    // The token is exchanged in place, as the kubelet does; then it is too old.
    machine.write("token", "web.identity.token-2\n");
    machine.cloud.given().web_token = "web.identity.token-2".into();
    machine.hand.advance(Duration::from_secs(3600));
    assert_eq!(provider.current().await.unwrap().access_key_id(), "ASIA2");
    machine.cloud.given().web_token = "web.identity.token-3".into();
    machine.hand.advance(Duration::from_secs(3600));
    let error = provider.current().await.unwrap_err();
    assert!(!error.is_passing() && error.to_string().contains("ExpiredTokenException"), "{error}");
    assert!(!format!("{error} {error:?}").contains("web.identity"), "{error:?}");

    fs::remove_file(&token).unwrap();
    let error = provider.current().await.unwrap_err();
    assert!(matches!(error, CredentialsError::NoToken { .. }), "{error}");
}

#[tokio::test]
async fn a_task_and_a_pod_get_theirs_from_their_endpoint() {
    let machine = Machine::set().await;
    let relative = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2/credentials/task");
    assert_eq!(machine.found([relative]).await.unwrap(), "ASIA1");

    let (url, file) = (machine.url("/v1/credentials"), machine.write("pod", "pod.token-1\n"));
    machine.cloud.given().container_token = Some("pod.token-1".into());
    let full = ("AWS_CONTAINER_CREDENTIALS_FULL_URI", url.as_str());
    let pod = [full, ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", &file), ("AWS_CONTAINER_AUTHORIZATION_TOKEN", "not that")];
    let provider = machine.provider(pod);
    assert_eq!(provider.current().await.unwrap().access_key_id(), "ASIA2");
    assert_eq!(machine.found([full, ("AWS_CONTAINER_AUTHORIZATION_TOKEN", "pod.token-1")]).await.unwrap(), "ASIA3");

    machine.cloud.given().container_token = Some("pod.token-2".into());
    machine.hand.advance(Duration::from_secs(3600));
    let error = provider.current().await.unwrap_err();
    assert!(!error.is_passing() && error.to_string().contains("InvalidAuthorization you sent <redacted>"), "{error}");
    machine.write("pod", "pod.token-2");
    assert_eq!(provider.current().await.unwrap().access_key_id(), "ASIA4");

    for (text, part) in [("two\nlines", "holds no token"), ("", "holds no token")] {
        machine.write("pod", text);
        let error = machine.found(pod).await.unwrap_err();
        assert!(error.contains(part) && !error.contains("two"), "{error}");
    }
    machine.cloud.given().container_token = None;
    for (answer, passing) in
        [((500, ""), true), ((429, ""), true), ((403, "{}"), false), ((200, "<html>"), true), ((302, ""), false)]
    {
        machine.cloud.then([answer]);
        let error = machine.provider([relative]).current().await.unwrap_err();
        assert_eq!(error.is_passing(), passing, "{answer:?}: {error}");
    }
}

#[tokio::test]
async fn an_instance_gets_its_roles_by_version_2_of_the_protocol() {
    let machine = Machine::set().await;
    assert_eq!(machine.found([]).await.unwrap(), "ASIA1");
    let roles = "/latest/meta-data/iam/security-credentials/";
    assert_eq!(
        machine.cloud.requests(),
        ["PUT /latest/api/token".to_owned(), format!("GET {roles}"), format!("GET {roles}signer+role")]
    );

    machine.cloud.given().has_role = false;
    let error = machine.found([]).await.unwrap_err();
    assert!(error.contains("there are no AWS credentials") && error.contains("the instance has no role"), "{error}");
    machine.cloud.given().has_role = true;
    for (status, part) in [(403, "switched off"), (404, "does not speak version 2"), (405, "does not speak version 2")] {
        machine.cloud.requests();
        machine.cloud.then([(status, "")]);
        let error = machine.found([]).await.unwrap_err();
        assert!(error.contains(part), "{error}");
        assert_eq!(machine.cloud.requests(), ["PUT /latest/api/token"], "version 1 is never fallen back to");
    }
    for role in ["../../user-data", "a/b", "", ".."] {
        machine.cloud.then([(200, "metadata-token=="), (200, role)]);
        let error = machine.provider([]).current().await.unwrap_err();
        assert!(matches!(error, CredentialsError::BadAnswer { .. }), "{error}");
    }
    machine.cloud.then([(200, "metadata-token=="), (200, "a"), (200, r#"{"Code":"AssumeRoleUnauthorizedAccess"}"#)]);
    assert!(machine.found([]).await.unwrap_err().contains("AssumeRoleUnauthorizedAccess"));

    let off = machine.found([("AWS_EC2_METADATA_DISABLED", "true")]).await.unwrap_err();
    assert!(off.contains(".aws/credentials") && off.contains("AWS_ACCESS_KEY_ID"), "{off}");
}

#[tokio::test]
async fn metadata_out_of_reach_is_an_error_of_setup_at_first_and_passing_later() {
    let machine = Machine::set().await;
    let provider = machine.provider([]);
    provider.current().await.unwrap();
    // A hop too far looks like that: nobody answers.
    let (_taken, nobody) = integration_tests::process::nobody().unwrap();
    let at_nobody = format!("http://{nobody}");
    let error = machine.found([("AWS_EC2_METADATA_SERVICE_ENDPOINT", at_nobody.as_str())]).await.unwrap_err();
    assert!(error.contains("there are no AWS credentials") && error.contains("HttpPutResponseHopLimit"), "{error}");

    machine.hand.advance(Duration::from_secs(3600));
    machine.cloud.then([(503, "")]);
    let error = provider.current().await.unwrap_err();
    assert!(error.is_passing(), "{error}");
    provider.current().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn endpoints_that_hang_are_waited_for_some_seconds_and_no_longer() {
    let (clock, _) = Clock::manual("2026-11-22T05:00:00Z".parse().unwrap());
    // Connected to by the kernel, and never answered.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let token = tempfile::NamedTempFile::new().unwrap();
    fs::write(token.path(), "token").unwrap();
    for variables in [
        vec![("AWS_CONTAINER_CREDENTIALS_FULL_URI", url.as_str())],
        vec![("AWS_EC2_METADATA_SERVICE_ENDPOINT", &url)],
        vec![
            ("AWS_WEB_IDENTITY_TOKEN_FILE", token.path().to_str().unwrap()),
            ("AWS_ROLE_ARN", "arn:aws:iam::111122223333:role/pod"),
            ("AWS_ENDPOINT_URL_STS", &url),
        ],
    ] {
        let start = tokio::time::Instant::now();
        let http = exchange::client(Duration::from_secs(2), Duration::from_secs(5)).no_proxy().build().unwrap();
        let environment = Environment::of_all(variables);
        let provider = provider(environment, clock.clone(), REGION, http).unwrap();
        let error = provider.current().await.unwrap_err();
        assert!(error.to_string().contains("no answer from"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    }
}

#[tokio::test]
async fn what_sts_says_is_sorted_into_passing_and_refused() {
    let machine = Machine::with_files().await;
    for (answer, passing, part) in [
        ((403, "<Error><Code>AccessDenied</Code><Message>not you</Message></Error>"), false, "AccessDenied: not you (for arn:"),
        ((400, "<Error><Code>Throttling</Code><Message>Rate exceeded</Message></Error>"), true, "Throttling"),
        ((400, "<Error><Code>IDPCommunicationError</Code></Error>"), true, "IDPCommunicationError"),
        ((400, "<Error><Code>ValidationError</Code></Error>"), false, "ValidationError"),
        ((403, "<Error><Code>RegionDisabledException</Code></Error>"), false, "RegionDisabled"),
        ((503, "<html>busy"), true, "HTTP 503"),
        ((200, "<html>welcome, guest"), true, "no Credentials"),
        ((200, "<Credentials><AccessKeyId>a</AccessKeyId></Credentials>"), true, "without"),
    ] {
        machine.cloud.then([answer]);
        let error = machine.provider([("AWS_PROFILE", "role")]).current().await.unwrap_err();
        assert_eq!(error.is_passing(), passing, "{answer:?}: {error}");
        let error = error.to_string();
        assert!(error.contains(part) && !error.contains("guest"), "{error}");
    }
}

#[tokio::test]
async fn sts_is_signed_to_by_its_own_clock_if_ours_is_wrong() {
    let machine = Machine::with_files().await;
    for minutes in [10, -10] {
        machine.cloud.given().ahead = SignedDuration::from_mins(minutes);
        machine.found([("AWS_PROFILE", "role")]).await.unwrap();
        assert_eq!(machine.cloud.requests(), ["AssumeRole"; 2]);
    }
    machine.cloud.given().ahead = SignedDuration::ZERO;
    machine.write(".aws/credentials", &CREDENTIALS.replace("base/secret+key", "another+secret"));
    let error = machine.found([("AWS_PROFILE", "role")]).await.unwrap_err();
    assert!(error.contains("SignatureDoesNotMatch") && !error.contains("Canonical"), "{error}");
    assert_eq!(machine.cloud.requests(), ["AssumeRole"]);
}

#[tokio::test]
async fn credentials_of_a_role_are_renewed_before_their_end_and_used_to_it_if_sts_is_down() {
    let machine = Machine::with_files().await;
    let provider = machine.provider([("AWS_PROFILE", "role")]);
    let now = async || provider.current().await.map(|credentials| credentials.access_key_id().to_owned());
    assert_eq!(now().await.unwrap(), "ASIA1");
    machine.hand.advance(Duration::from_secs(56 * 60));
    machine.cloud.then([(503, ""), (503, "")]);
    assert_eq!(now().await.unwrap(), "ASIA1");
    assert_eq!(now().await.unwrap(), "ASIA1");
    assert_eq!(machine.cloud.requests(), ["AssumeRole"; 2], "one try a minute");
    machine.hand.advance(Duration::from_secs(4 * 60));
    assert!(now().await.unwrap_err().is_passing());
    assert_eq!(now().await.unwrap(), "ASIA2");
}

#[tokio::test]
async fn credentials_that_were_refused_are_read_anew_once() {
    let machine = Machine::set().await;
    let write = |id: &str| {
        machine.write("credentials", &format!("[default]\naws_access_key_id={id}\naws_secret_access_key=s\n"));
    };
    write("AKIA1");
    let file = machine.folder.path().join("credentials");
    let provider = machine.provider([("AWS_SHARED_CREDENTIALS_FILE", file.to_str().unwrap())]);
    let first = provider.current().await.unwrap();
    write("AKIA2");
    assert_eq!(provider.current().await.unwrap().access_key_id(), "AKIA1");
    assert_eq!(provider.renewed(&first).await.unwrap().access_key_id(), "AKIA2");
    write("AKIA3");
    // Somebody else was refused with the first ones, too, and need not read the file.
    assert_eq!(provider.renewed(&first).await.unwrap().access_key_id(), "AKIA2");
    assert!(!format!("{provider:?}").contains("AKIA"));
}
