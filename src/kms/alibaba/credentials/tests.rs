use std::fs;

use integration_tests::alibaba::{BASE, Fake, Fault, PROVIDER, ROLE};
use jiff::SignedDuration;
use tempfile::TempDir;

use super::*;
use crate::{clock::ManualClock, kms::alibaba::tests::fake};

struct Machine {
    cloud: Fake,
    clock: Clock,
    hand: ManualClock,
    folder: TempDir,
}

impl Machine {
    async fn set() -> Self {
        let (clock, hand) = Clock::manual("2026-11-22T05:00:00Z".parse().unwrap());
        Self { cloud: fake(&clock).await, clock, hand, folder: tempfile::tempdir().unwrap() }
    }

    fn write(&self, name: &str, text: &str) -> String {
        let path = self.folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn provider(&self, role: Option<&str>, variables: &[(&str, &str)]) -> Kept<Chain> {
        let home = [("HOME", self.folder.path().to_str().unwrap())];
        let environment = Environment::of_all(home.into_iter().chain(variables.iter().copied()));
        let uri = format!("alibabakms://{}//k", self.cloud.address).parse().unwrap();
        let mut place = Place::of(&uri, &environment).unwrap();
        (place.sts, place.metadata) = (place.endpoint.clone(), place.endpoint.clone());
        provider(environment, self.clock.clone(), &place, role).unwrap()
    }

    /// The access key, or what is wrong.
    async fn found(&self, role: Option<&str>, variables: &[(&str, &str)]) -> Result<String, String> {
        let found = self.provider(role, variables).current().await;
        found.map(|credentials| credentials.id).map_err(|error| error.to_string())
    }
}

const KEYS: [(&str, &str); 2] = [("ALIBABA_CLOUD_ACCESS_KEY_ID", BASE[0]), ("ALIBABA_CLOUD_ACCESS_KEY_SECRET", BASE[1])];
const OFF: (&str, &str) = ("ALIBABA_CLOUD_ECS_METADATA_DISABLED", "true");

#[tokio::test]
async fn the_environment_comes_first_with_its_token() {
    let machine = Machine::set().await;
    let [id, secret] = KEYS;
    let credentials = machine.provider(None, &[id, secret, ("ALIBABA_CLOUD_SECURITY_TOKEN", "tok\n")]).current().await.unwrap();
    assert_eq!((credentials.id.as_str(), credentials.secrets().collect::<Vec<_>>()), (BASE[0], vec![BASE[1], "tok"]));
    let shown = format!("{credentials:?}");
    assert!(shown.contains(BASE[0]) && !shown.contains(BASE[1]) && !shown.contains("tok"), "{shown}");
    assert_eq!(machine.cloud.requests(), [""; 0]);
}

#[tokio::test]
async fn a_role_that_the_reference_names_is_taken_with_what_the_chain_gives() {
    let machine = Machine::set().await;
    assert_eq!(machine.found(Some(ROLE), &KEYS).await.unwrap(), "STS.1");
    assert_eq!(machine.found(Some(ROLE), &[]).await.unwrap(), "STS.3");
    {
        let given = machine.cloud.given();
        assert_eq!(given.signers, [BASE[0], "STS.2"]);
        assert_eq!(given.parameters[0]["RoleSessionName"], "countersign");
    }
    let error = machine.found(Some("acs:ram::1:role/other"), &KEYS).await.unwrap_err();
    assert!(error.contains("NoPermission") && error.contains("acs:ram::1:role/other"), "{error}");
}

#[tokio::test]
async fn an_oidc_token_is_exchanged_and_read_each_time() {
    let machine = Machine::set().await;
    let token = machine.write("token", "oidc.token-1\n");
    let variables = [
        ("ALIBABA_CLOUD_OIDC_TOKEN_FILE", token.as_str()),
        ("ALIBABA_CLOUD_OIDC_PROVIDER_ARN", PROVIDER),
        ("ALIBABA_CLOUD_ROLE_ARN", ROLE),
        ("ALIBABA_CLOUD_ROLE_SESSION_NAME", "images"),
    ];
    let provider = machine.provider(None, &variables);
    assert_eq!(provider.current().await.unwrap().id, "STS.1");
    assert_eq!(machine.cloud.given().parameters[0]["RoleSessionName"], "images");
    machine.write("token", "oidc.token-2");
    machine.cloud.given().oidc_token = "oidc.token-2".into();
    machine.hand.advance(Duration::from_secs(3600));
    assert_eq!(provider.current().await.unwrap().id, "STS.2");
    machine.cloud.given().oidc_token = "oidc.token-3".into();
    machine.hand.advance(Duration::from_secs(3600));
    let error = provider.current().await.unwrap_err();
    assert!(!error.is_passing() && error.to_string().contains("OIDCToken.Expired"), "{error}");
    assert!(!format!("{error} {error:?}").contains("oidc.token"), "{error:?}");

    for missing in 1..3 {
        let mut variables = variables.to_vec();
        let (name, _) = variables.remove(missing);
        let error = machine.found(None, &variables).await.unwrap_err();
        assert!(error.contains("ALIBABA_CLOUD_OIDC_TOKEN_FILE is set without") && error.contains(name), "{error}");
    }
}

#[tokio::test]
async fn an_instance_gets_its_roles_in_the_hardened_mode_only() {
    let machine = Machine::set().await;
    assert_eq!(machine.found(None, &[]).await.unwrap(), "STS.1");
    let roles = "GET /latest/meta-data/ram/security-credentials/";
    assert_eq!(machine.cloud.requests(), ["PUT /latest/api/token", roles, &format!("{roles}signer-role")]);
    assert_eq!(machine.found(None, &[("ALIBABA_CLOUD_ECS_METADATA", "signer-role")]).await.unwrap(), "STS.2");
    assert_eq!(machine.cloud.requests(), ["PUT /latest/api/token", &format!("{roles}signer-role")]);
    for role in ["another", "../../user-data"] {
        let error = machine.found(None, &[("ALIBABA_CLOUD_ECS_METADATA", role)]).await.unwrap_err();
        assert!(!error.contains("there are no"), "{error}");
    }
    machine.cloud.requests();
    machine.cloud.then([Fault::Error(404, "")]);
    let error = machine.found(None, &[]).await.unwrap_err();
    assert!(error.contains("there are no Alibaba Cloud credentials") && error.contains("hardened"), "{error}");
    assert_eq!(machine.cloud.requests(), ["PUT /latest/api/token"]);
    assert!(machine.found(None, &[OFF]).await.unwrap_err().contains("ALIBABA_CLOUD_ACCESS_KEY_ID"));
}

#[tokio::test]
async fn profiles_of_the_command_line_tool_are_read() {
    let machine = Machine::set().await;
    let token = machine.write("token", "oidc.token-1");
    let profiles = serde_json::json!({ "current": "keys", "profiles": [
        { "name": "keys", "mode": "AK", "access_key_id": BASE[0], "access_key_secret": BASE[1], "region_id": "cn-hangzhou" },
        { "name": "token", "mode": "StsToken", "access_key_id": "STS.x", "access_key_secret": "s", "sts_token": "t" },
        { "name": "role", "mode": "RamRoleArn", "access_key_id": BASE[0], "access_key_secret": BASE[1], "ram_role_arn": ROLE,
          "ram_session_name": "images", "sts_token": "" },
        { "name": "instance", "mode": "EcsRamRole", "ram_role_name": "" },
        { "name": "pod", "mode": "OIDC", "ram_role_arn": ROLE, "oidc_provider_arn": PROVIDER, "oidc_token_file": token },
        { "name": "half", "mode": "AK", "access_key_id": BASE[0], "access_key_secret": "" },
        { "name": "people", "mode": "CloudSSO" },
    ]});
    let file = machine.write(".aliyun/config.json", &profiles.to_string());
    for (profile, id) in [("", BASE[0]), ("token", "STS.x"), ("role", "STS.1"), ("instance", "STS.2"), ("pod", "STS.3")] {
        assert_eq!(machine.found(None, &[("ALIBABA_CLOUD_PROFILE", profile), OFF]).await.unwrap(), id, "{profile}");
    }
    machine.cloud.requests();
    for (profile, part) in [("half", "has no access_key_secret"), ("people", "CloudSSO"), ("nobody", "has no profile \"nobody\"")]
    {
        let error = machine.found(None, &[("ALIBABA_CLOUD_PROFILE", profile)]).await.unwrap_err();
        assert!(error.contains(part) && error.contains(&file), "{error}");
    }
    machine.write(".aliyun/config.json", "{ \"access_key_secret\": hunter2");
    let error = machine.found(None, &[]).await.unwrap_err();
    assert!(error.contains("is not the JSON of profiles (line 1") && !error.contains("hunter2"), "{error}");
    assert_eq!(machine.cloud.requests(), [""; 0], "no link is passed over");
    assert_eq!(machine.found(None, &[("ALIBABA_CLOUD_CLI_PROFILE_DISABLED", "true")]).await.unwrap(), "STS.4");
}

#[tokio::test]
async fn what_is_half_there_or_cannot_be_sent_is_said_and_not_repeated() {
    let machine = Machine::set().await;
    let [id, secret] = KEYS;
    for (variables, part) in [
        (vec![id], "is set without ALIBABA_CLOUD_ACCESS_KEY_SECRET"),
        (vec![secret], "is set without ALIBABA_CLOUD_ACCESS_KEY_ID"),
        (vec![id, ("ALIBABA_CLOUD_ACCESS_KEY_SECRET", " ")], "cannot be sent"),
        (vec![id, secret, ("ALIBABA_CLOUD_SECURITY_TOKEN", "to\nken")], "cannot be sent"),
    ] {
        let error = machine.found(None, &variables).await.unwrap_err();
        assert!(error.contains(part) && !error.contains(BASE[1]) && !error.contains("ken\""), "{error}");
    }
    assert_eq!(machine.cloud.requests(), [""; 0]);
}

#[tokio::test]
async fn sts_is_signed_to_by_its_own_clock_and_its_faults_are_sorted() {
    let machine = Machine::set().await;
    for minutes in [20, -20] {
        machine.cloud.given().ahead = SignedDuration::from_mins(minutes);
        machine.found(Some(ROLE), &KEYS).await.unwrap();
        assert_eq!(machine.cloud.requests(), ["AssumeRole"; 2]);
    }
    machine.cloud.given().ahead = SignedDuration::ZERO;
    for (fault, passing) in [
        (Fault::Error(400, "Throttling.User"), true),
        (Fault::Error(503, "ServiceUnavailable"), true),
        (Fault::Error(500, ""), true),
        (Fault::NoAnswer, true),
        (Fault::Says("<html>".into()), true),
        (Fault::Error(403, "NoPermission"), false),
        (Fault::Error(404, "EntityNotExist.Role"), false),
    ] {
        machine.cloud.then([fault.clone()]);
        let error = machine.provider(Some(ROLE), &KEYS).current().await.unwrap_err();
        assert_eq!(error.is_passing(), passing, "{fault:?}: {error}");
    }
    let [id, _] = KEYS;
    let error = machine.found(Some(ROLE), &[id, ("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "notTheSecret")]).await.unwrap_err();
    assert!(error.contains("SignatureDoesNotMatch") && !error.contains("CanonicalRequest"), "{error}");
}
