use std::{fmt::Write as _, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use crate::{
    kms::{Algorithm, Login, SecretSource},
    policy::{Mode, Policy, SignedAs, Tags},
    rule::{SignatureType, Trigger},
    signature::Format,
};

use super::{
    Backend, Breakglass, Cache, Certificate, Config, CustomKind, DEFAULT_TOML, Ledger, Log, LogFormat, Problem, Problems, ROOT,
    Rate, Retry, Rule, Scope, SourceAuth, check_rule_against_key, in_full,
    outside::{Contents, Outside, Unreadable},
    shape::Kind,
};

/// Every key of every section, with a value that is not its default.
const EVERYTHING: &str = r#"
[server]
listen = "[::1]:9000"
tls = { certificate = "server.pem", key = { file = "server.key" } }
grace = "1m"
max_body = "1MiB"
max_requests = 1_000
header_timeout = "1s"
body_timeout = "2s"

[queue]
backend = "embedded"
path = "state"
in_flight = 0x8
retry = { first = "100ms", longest = "1m", give_up = "7d" }
history = "30d"
history_size = "5GiB"

[ledger]
url = "sqlite:///srv/ledger.db"

[log]
format = "json"
level = "debug"

[[registry]]
name = "Registry.Example.com:5000"
url = "http://127.0.0.1:5000"
username = "countersign"
password = { file = "registry" }

[[registry]]
name = "docker.io"
ca = "ca.pem"

[[source]]
name = "main"
kind = "distribution"
registry = "registry.example.com:5000"
token = { env = "TOKEN" }
token_old = { file = "/run/secrets/old" }

[[source]]
name = "hub"
kind = "distribution"
registry = "index.docker.io"
basic = { username = "hub", password = { file = "hub" } }

[[witness]]
name = "release"
description = "Signs everything that production may run"
key = "awskms:///alias/image-signing?region=eu-west-1"
public_key = "release.pub.pem"
certificate = "release.chain.pem"
rate = { per_second = 100 }

[[witness.verify]]
key = "old.pub.pem"
until = 2027-03-01T00:00:00+01:00

[[witness.verify]]
key = "leaked.pub.pem"
revoked = 2026-12-24 03:00Z
reason = "found in a build log"

[[witness]]
name = "vault"
key = "openbao://release?version=3&address=https://bao.internal:8200"
subject = "O=Example, C=DE, ST=Berlin"
login = { method = "approle", path = "auth/teams/ci/", role_id = "59d6d1ca", secret_id = { file = "secret-id" } }

[[witness]]
name = "pod"
key = "hashivault://release"
login = { method = "kubernetes", role = "countersign" }

[[witness]]
name = "ci"
key = "hashivault://release"
login = { method = "jwt", role = "countersign", jwt = { env = "TOKEN" } }

[[witness]]
name = "agent"
key = "hashivault://release"
login = { method = "token", token = { file = "/run/agent/token" } }

[[witness]]
name = "token"
key = "pkcs11:token=images;object=release?module-path=/usr/lib/softhsm/libsofthsm2.so"
pin = { env = "TOKEN" }

[[witness]]
name = "local"
key = "file:///etc/countersign/key.pem"
passphrase = { file = "secret-id" }

[[rule]]
name = "production"
registry = "registry.example.com:5000"
scope = "production"
exclude = ["production/scratch/**", "production/tmp"]
tags = ["v*", "latest"]
created = 2026-11-21T09:00:00.5Z
witness = "release"
algorithm = "RSA_PKCS1_SHA_256"
signature_type = "simple"
trigger = "manual"
formats = ["cosign", "cosign"]
allow_unreadable = false
untagged = true
enabled = false

[[policy]]
name = "payments"
witnesses = ["release", "vault"]
clusters = ["prod-*", "staging"]
namespaces = ["payments", "pay-*"]
enabled = true
mode = "audit"
note = "Agreed with the payments team"
formats = ["cosign", "cosign"]
signed_as = "tag"
through_index = true
max_age = "90d"
tags = "resolve"
allow = ["registry.k8s.io/**", "alpine:3.11"]

[[policy]]
name = "everything-else"
witness = "release"
cluster = "prod-eu"
namespace = "*"

[admission]
listen = "[::]:9443"
tls = { certificate = "server.pem", key = { file = "server.key" } }
cluster = "prod-eu"
deadline = "3s"
cache = { entries = 1_000, keep = "1h" }
allow = ["registry.k8s.io/**"]
breakglass = { users = ["anna"], groups = ["oncall"], longest = "2h" }
kinds = [{ group = "argoproj.io", kind = "Rollout", paths = ["spec.template", ".spec.jobs.*.template"] }]
daemon = "unix:///var/lib/countersign/countersign.sock"
docker_config = "config.json"
"#;

mod default_file;
mod mistakes;

const SECRET: &str = "hunter2+hunter2+hunter2+hunter2+hunter2+";

/// A machine on which every file is there, and holds a secret, unless its name says otherwise.
fn imagined() -> Outside {
    let read_file = |path: &Path, limit| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let contents = |text: &str| Ok(Contents { bytes: text.into(), world_readable: name.starts_with("open") });
        match name.as_str() {
            "missing" => Err(Unreadable::Missing),
            "folder" => Err(Unreadable::NotAFile),
            "huge" => Err(Unreadable::TooLarge(limit)),
            "denied" => Err(Unreadable::Io(std::io::ErrorKind::PermissionDenied.into())),
            "empty" => contents(""),
            "newline" => contents("\n"),
            "release.chain.pem" => contents(include_str!("../../tests/data/vectors/keys/p256.notation.crt.pem")),
            "nameless.chain.pem" => contents(&nameless()),
            "short" => contents("hunter2\n"),
            "spaced" => contents("hunter2 is a password\n"),
            "binary" => Ok(Contents { bytes: vec![0xff; 40], world_readable: false }),
            "ledger_url" => contents(&format!("postgres://countersign:{SECRET}@postgres/countersign?sslmode=disable\n")),
            _ => contents(&format!("{SECRET}\n")),
        }
    };
    Outside::imagined(read_file, |name| {
        matches!(name, "TOKEN" | "REGISTRY_PASSWORD" | "WEBHOOK_PASSWORD").then(|| SECRET.to_owned())
    })
}

/// A certificate whose subject is a common name and a country.
fn nameless() -> String {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CountryName, "DE");
    params.distinguished_name.push(rcgen::DnType::CommonName, "release");
    params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
    params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem()
}

fn parse(text: &str) -> Result<(Config, Vec<Problem>), Problems> {
    Config::parse_with(text, Path::new("countersign.toml"), imagined())
}

#[test]
fn an_empty_file_and_the_default_file_mean_the_same() {
    let (empty, warnings) = parse("").unwrap();
    assert!(warnings.is_empty());
    let default = Config::embedded_default();
    assert_eq!(format!("{empty:?}"), format!("{default:?}"));
    assert_eq!(default.server.listen.to_string(), "127.0.0.1:8080");
    assert_eq!(default.queue.backend, Backend::Embedded { path: "/var/lib/countersign".into() });
    assert_eq!(default.log.format, LogFormat::Human);
    assert!(parse(DEFAULT_TOML).unwrap().1.is_empty());
}

#[test]
fn no_text_makes_it_panic_or_hang() {
    // Deterministic: the same damage in every run.
    let mut random = fastrand::Rng::with_seed(2);
    let whole = [DEFAULT_TOML.replace("\n#", "\n"), EVERYTHING.to_owned()];
    for text in &whole {
        for end in (0..text.len()).filter(|end| text.is_char_boundary(*end)) {
            let _ = parse(&text[..end]);
        }
        for _ in 0..1000 {
            let mut bytes = text.clone().into_bytes();
            for _ in 0..random.usize(1..8) {
                let at = random.usize(..bytes.len());
                match random.u8(..4) {
                    0 => bytes[at] = random.u8(..),
                    1 => bytes[at] = *random.choice(b"\"'[]{}=.,#\n\\\0").unwrap(),
                    2 => drop(bytes.remove(at)),
                    _ => bytes.insert(at, random.u8(..)),
                }
            }
            let _ = parse(&String::from_utf8_lossy(&bytes));
        }
    }
    for deep in ["a.", "[", "{a=", "[a.", "[[a]]\n[a", "a = [[", "\"\"\"", "x = {x.x=", "[[rule]]\nx y\n", "\n"] {
        let _ = parse(&deep.repeat(20_000));
        let _ = parse(&format!("{}b]]", deep.repeat(10_000)));
    }
}

#[test]
fn every_key_is_read_into_what_the_code_needs() {
    let (config, warnings) = parse(EVERYTHING).unwrap();
    assert!(warnings.is_empty(), "{}", in_full(&warnings));
    let Config { server, queue, ledger, log, registries, sources, witnesses, rules, policies, admission } = config;

    assert_eq!(server.listen, "[::1]:9000".parse().unwrap());
    assert_eq!(server.tls.as_ref().unwrap().certificate, Path::new("/etc/countersign/server.pem"));
    assert_eq!(server.tls.unwrap().key.expose(), SECRET);
    assert_eq!((server.grace, server.max_body, server.max_requests), (Duration::from_secs(60), 1 << 20, 1000));
    assert_eq!((server.header_timeout, server.body_timeout), (Duration::from_secs(1), Duration::from_secs(2)));

    assert_eq!(queue.backend, Backend::Embedded { path: "/etc/countersign/state".into() });
    assert_eq!(queue.in_flight, 8);
    assert_eq!((queue.history, queue.history_size), (Duration::from_secs(30 * 86_400), 5 << 30));
    let retry =
        Retry { first: Duration::from_millis(100), longest: Duration::from_secs(60), give_up: Duration::from_secs(7 * 86_400) };
    assert_eq!(queue.retry, retry);
    assert_eq!(ledger, Ledger::Sqlite { path: "/srv/ledger.db".into() });
    assert_eq!(log, Log { format: LogFormat::Json, level: tracing::Level::DEBUG });

    let [ours, hub] = registries.as_slice() else { panic!("{registries:?}") };
    assert_eq!((ours.name.as_str(), ours.url.as_str()), ("registry.example.com:5000", "http://127.0.0.1:5000/"));
    let login = ours.login.as_ref().unwrap();
    assert_eq!((login.username.as_str(), login.password.expose()), ("countersign", SECRET));
    assert_eq!((hub.name.as_str(), hub.url.as_str()), ("docker.io", "https://registry-1.docker.io/"));
    assert_eq!(hub.ca.as_deref(), Some(Path::new("/etc/countersign/ca.pem")));
    assert!(hub.login.is_none());

    assert_eq!((sources[0].name.as_str(), &sources[0].registry), ("main", &ours.name));
    assert!(matches!(&sources[0].auth, SourceAuth::Bearer { token, token_old: Some(old) } if token.expose() == old.expose()));
    assert!(matches!(&sources[1].auth, SourceAuth::Basic(login) if login.username == "hub"));
    assert_eq!(sources[1].registry, hub.name);

    let [witness, vault, pod, ci, agent, token, local] = witnesses.as_slice() else { panic!("{witnesses:?}") };
    assert_eq!(witness.key.to_string(), "awskms:///alias/image-signing?region=eu-west-1");
    assert_eq!(witness.rate, Some(Rate { per_second: 100, burst: 100 }));
    assert_eq!(witness.verify[0].until, Some("2027-02-28T23:00:00Z".parse().unwrap()));
    assert_eq!(witness.verify[1].revoked, Some("2026-12-24T03:00:00Z".parse().unwrap()));
    assert_eq!(witness.place.to_string(), "countersign.toml:49:1");
    assert_eq!(witness.certificate.as_ref().unwrap().subject(), "CN=kms-test-p256,O=Example,ST=Test,C=XX");
    assert_eq!(vault.subject.to_string(), "C=DE, ST=Berlin, O=Example, CN=vault");
    assert_eq!(pod.subject.to_string(), "C=XX, ST=none, O=countersign, CN=pod");
    assert_eq!(witness.login, None);
    assert_eq!(vault.key.to_string(), "openbao://release?address=https://bao.internal:8200&version=3");
    let jwt = |path: &str, jwt| Some(Login::Jwt { path: path.to_owned(), role: "countersign".to_owned(), jwt });
    let (secret_id, role_id) = (SecretSource::File("/etc/countersign/secret-id".into()), "59d6d1ca".to_owned());
    assert_eq!(vault.login, Some(Login::AppRole { path: "teams/ci".to_owned(), role_id, secret_id: Some(secret_id) }));
    let service_account = SecretSource::File("/var/run/secrets/kubernetes.io/serviceaccount/token".into());
    assert_eq!(pod.login, jwt("kubernetes", service_account));
    assert_eq!(ci.login, jwt("jwt", SecretSource::Variable("TOKEN".to_owned())));
    assert_eq!(agent.login, Some(Login::Token { token: SecretSource::File("/run/agent/token".into()) }));

    assert_eq!(token.login, Some(Login::Secret(SecretSource::Variable("TOKEN".to_owned()))));
    assert_eq!(local.login, Some(Login::Secret(SecretSource::File("/etc/countersign/secret-id".into()))));

    let [rule] = rules.as_slice() else { panic!("{rules:?}") };
    assert_eq!(rule.registry.as_ref(), Some(&ours.name));
    assert_eq!(rule.scope, Scope::Namespace("production".to_owned()));
    let glob = Scope::Glob("production/scratch/**".to_owned());
    assert_eq!(rule.exclude, [glob, Scope::Namespace("production/tmp".to_owned())]);
    assert_eq!(rule.tags, ["v*", "latest"]);
    assert_eq!(rule.created, Some("2026-11-21T09:00:00.5Z".parse().unwrap()));
    assert_eq!((rule.algorithm, rule.formats.as_slice()), (Algorithm::RsaPkcs1Sha256, [Format::Cosign].as_slice()));
    assert_eq!((rule.signature_type, rule.trigger), (SignatureType::Simple, Trigger::Manual));
    assert!(rule.untagged && !rule.enabled);

    let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
    let payments = Policy {
        witnesses: texts(&["release", "vault"]),
        clusters: texts(&["prod-*", "staging"]),
        namespaces: texts(&["payments", "pay-*"]),
        enabled: true,
        mode: Mode::Audit,
        note: "Agreed with the payments team".to_owned(),
        formats: vec![Format::Cosign],
        signed_as: SignedAs::Tag,
        through_index: true,
        max_age: Some(Duration::from_secs(90 * 86_400)),
        tags: Tags::Resolve,
        allow: texts(&["registry.k8s.io/**", "alpine:3.11"]),
        ..Policy::new("payments", "", "")
    };
    let rest = Policy { clusters: texts(&["prod-eu"]), ..Policy::new("everything-else", "release", "*") };
    assert_eq!(policies, [payments, rest]);

    assert_eq!((admission.listen, admission.deadline), ("[::]:9443".parse().unwrap(), Duration::from_secs(3)));
    assert!(matches!(admission.certificate, Certificate::Files(tls) if tls.key.expose() == SECRET));
    assert_eq!(admission.cluster.as_deref(), Some("prod-eu"));
    assert_eq!(admission.cache, Cache { entries: 1000, keep: Duration::from_secs(3600) });
    assert_eq!(admission.allow, ["registry.k8s.io/**"]);
    let (users, groups) = (texts(&["anna"]), texts(&["oncall"]));
    assert_eq!(admission.breakglass, Some(Breakglass { users, groups, longest: Duration::from_secs(7200) }));
    let paths = vec![texts(&["spec", "template"]), texts(&["spec", "jobs", "*", "template"])];
    assert_eq!(admission.kinds, [CustomKind { group: "argoproj.io".to_owned(), kind: "Rollout".to_owned(), paths }]);
    assert_eq!(admission.daemon.unwrap().path(), "/var/lib/countersign/countersign.sock");
    assert_eq!(admission.docker_config.as_deref(), Some(Path::new("/etc/countersign/config.json")));
}

#[test]
fn what_an_own_certificate_does_not_say_is_as_by_default() {
    let own = |tls: &str| match parse(&format!("[admission]\n{tls}")).unwrap().0.admission.certificate {
        Certificate::Own { folder, names } => (folder.display().to_string(), names),
        Certificate::Files(files) => panic!("{files:?}"),
    };
    let (folder, names) = own("");
    assert_eq!(own("tls = {}"), (folder.clone(), names.clone()));
    assert_eq!(own("tls = { folder = \"/a\" }"), ("/a".to_owned(), names));
    assert_eq!(own("tls = { names = [\"::1\"] }"), (folder, vec!["::1".to_owned()]));
}

#[test]
fn no_secret_is_in_what_is_printed_of_a_configuration() {
    let (config, _) = parse(EVERYTHING).unwrap();
    assert!(!format!("{config:?}").contains("hunter2"));
    assert!(format!("{config:?}").contains("<redacted>"));
}

#[test]
fn a_rule_and_a_key_that_do_not_fit_are_told_apart_with_the_cure() {
    let (config, _) = parse(EVERYTHING).unwrap();
    let rsa = &config.rules[0];
    let ecdsa = Rule { algorithm: Algorithm::EcdsaSha256, ..rsa.clone() };
    assert_eq!(check_rule_against_key(rsa, "RSA_2048"), Ok(()));
    assert_eq!(check_rule_against_key(&ecdsa, "ECC_NIST_P256"), Ok(()));
    assert_eq!(check_rule_against_key(&ecdsa, "EC_P256"), Ok(()));
    let wrong = check_rule_against_key(rsa, "ECC_NIST_P256").unwrap_err();
    assert_eq!(
        wrong,
        "countersign.toml:97:1: rule \"production\" signs with RSA_PKCS1_SHA_256, and the key of its witness \"release\" \
         is ECC_NIST_P256: write algorithm = \"ECDSA_SHA_256\""
    );
    assert!(check_rule_against_key(&ecdsa, "RSA_4096").unwrap_err().ends_with("write algorithm = \"RSA_PKCS1_SHA_256\""));
    let notation = Rule { algorithm: Algorithm::RsaPssSha256, formats: vec![Format::Notation], ..rsa.clone() };
    assert_eq!(check_rule_against_key(&notation, "RSA_2048"), Ok(()));
    for large in ["RSA_3072", "RSA_4096"] {
        let wrong = check_rule_against_key(&notation, large).unwrap_err();
        assert!(wrong.contains(large) && wrong.contains("name an RSA_2048 or a P-256 key"), "{wrong}");
    }
    for other in ["ECC_NIST_P384", "ECC_SECG_P256K1", "ED25519", "RSA_1024", ""] {
        assert!(check_rule_against_key(&ecdsa, other).unwrap_err().contains("use a key of"), "{other}");
    }
}

#[test]
fn the_words_for_algorithms_and_choices_are_the_names_of_their_types() {
    let rule = |name| {
        ROOT.key("rule").and_then(|key| match key.kind {
            Kind::Tables(table) => table.key(name),
            _ => None,
        })
    };
    let words = |name| match rule(name).unwrap().kind {
        Kind::Choice(choice) | Kind::List(&Kind::Choice(choice)) => choice.words.iter().map(|word| word.text).collect::<Vec<_>>(),
        _ => panic!("{name} is no choice"),
    };
    assert_eq!(words("algorithm"), Algorithm::ALL.map(Algorithm::name));
    assert_eq!(words("signature_type"), [SignatureType::Default, SignatureType::Simple].map(SignatureType::name));
    assert_eq!(words("trigger"), [Trigger::Automatic, Trigger::Manual].map(Trigger::name));
    assert_eq!(words("formats"), Format::ALL.map(Format::name));
    let of_policy = |name| match ROOT.key("policy").map(|key| &key.kind) {
        Some(Kind::Tables(table)) => match table.key(name).unwrap().kind {
            Kind::Choice(choice) => choice.words.iter().map(|word| word.text).collect::<Vec<_>>(),
            _ => panic!("{name} is no choice"),
        },
        _ => panic!("policies are tables"),
    };
    assert_eq!(of_policy("mode"), Mode::ALL.map(Mode::name));
    assert_eq!(of_policy("signed_as"), SignedAs::ALL.map(SignedAs::name));
    assert_eq!(of_policy("tags"), Tags::ALL.map(Tags::name));
}

#[test]
fn a_namespace_holds_what_is_below_it_and_nothing_beside_it() {
    let namespace = |text: &str| Scope::Namespace(text.to_owned());
    let glob = |text: &str| Scope::Glob(text.to_owned());
    for (outer, inner) in [
        (namespace("a"), namespace("a")),
        (namespace("a"), namespace("a/b")),
        (namespace("a"), glob("a/b*")),
        (glob("**"), namespace("a")),
        (glob("a/*"), glob("a/*")),
    ] {
        assert!(outer.holds(&inner), "{outer} {inner}");
    }
    for (outer, inner) in [
        (namespace("a/b"), namespace("a")),
        (namespace("a"), namespace("ab")),
        (namespace("a"), glob("a*")),
        (namespace("a"), glob("**")),
        (glob("a/*"), namespace("a/b")),
    ] {
        assert!(!outer.holds(&inner), "{outer} {inner}");
    }
}

#[test]
fn a_file_on_the_disk_is_read_with_the_secrets_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("countersign.toml");
    let write = |name: &str, text: &[u8]| std::fs::write(folder.path().join(name), text).unwrap();
    write("password", b"hunter2\r\n");
    write("countersign.toml", b"[[registry]]\nname = \"r.example.com\"\nusername = \"u\"\npassword = { file = \"password\" }\n");
    let password = |mode| {
        std::fs::set_permissions(folder.path().join("password"), std::fs::Permissions::from_mode(mode)).unwrap();
        let (config, warnings) = Config::load(&path).unwrap();
        (config.registries[0].login.as_ref().unwrap().password.expose().to_owned(), warnings.len())
    };
    assert_eq!(password(0o640), ("hunter2".to_owned(), 0));
    assert_eq!(password(0o644), ("hunter2".to_owned(), 1));

    std::fs::remove_file(folder.path().join("password")).unwrap();
    let problems = Config::load(&path).unwrap_err().to_string();
    assert!(problems.contains("password: there is no such file"), "{problems}");

    write("countersign.toml", b"[server]\n# caf\xe9\n");
    let problems = Config::load(&path).unwrap_err().to_string();
    assert!(problems.contains("no UTF-8") && problems.contains("countersign.toml:2:6"), "{problems}");
    for not_a_file in [folder.path(), Path::new("/dev/zero"), &folder.path().join("none")] {
        let problems = Config::load(not_a_file).unwrap_err().to_string();
        assert!(problems.contains("the configuration cannot be used"), "{problems}");
    }
}

#[test]
fn problems_are_told_to_machines_as_well() {
    let problems = parse("[server]\nlisen = \"hunter2\"\n").unwrap_err();
    let told: serde_json::Value = problems.iter().map(Problem::to_json).collect();
    let expected = serde_json::json!([{
        "severity": "error",
        "file": "countersign.toml",
        "line": 2,
        "column": 1,
        "message": "unknown key `lisen` in [server]",
        "help": "did you mean `listen`?",
        "excerpt": "lisen = <not shown>",
    }]);
    assert_eq!(told, expected);
}

#[test]
fn ten_thousand_rules_are_read_in_no_time() {
    let mut text = EVERYTHING.to_owned();
    for number in 0..10_000 {
        write!(
            text,
            "[[rule]]\nname = \"r{number}\"\nscope = \"team-{number}\"\nwitness = \"release\"\nalgorithm = \"RSA_PKCS1_SHA_256\"\n"
        )
        .unwrap();
    }
    assert_eq!(parse(&text).unwrap().0.rules.len(), 10_001);
}

#[test]
fn a_certificate_that_notation_can_name_nobody_by_is_warned_of() {
    let text = "[[witness]]\nname = \"release\"\nkey = \"file:///k\"\ncertificate = \"CHAIN\"\n";
    let (_, warnings) = parse(&text.replace("CHAIN", "release.chain.pem")).unwrap();
    assert!(warnings.is_empty(), "{}", in_full(&warnings));
    let (config, warnings) = parse(&text.replace("CHAIN", "nameless.chain.pem")).unwrap();
    let said = in_full(&warnings);
    assert!(said.contains("the certificate's subject (CN=release,C=DE) has no ST and no O"), "{said}");
    assert!(said.contains("countersign.toml:4:15"), "{said}");
    let chain = config.witnesses[0].certificate.as_ref().unwrap();
    assert_eq!((chain.trusted_identity(), chain.nameless().as_deref()), (None, Some("has no ST and no O")));
}

#[test]
fn every_example_is_a_configuration_without_warnings() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/examples");
    let mut read = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        let (config, warnings) = parse(&text).unwrap_or_else(|problems| panic!("{problems}"));
        assert!(warnings.is_empty(), "{}", in_full(&warnings));
        assert!(!config.rules.is_empty() || !config.policies.is_empty());
        read += 1;
    }
    assert_eq!(read, 6);
}
