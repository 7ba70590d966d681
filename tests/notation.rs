//! Notation's signatures and certificates before their judge: stock notation, at its level `strict`, on a real registry.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use bytes::Bytes;
use countersign::{
    certificate::Chain,
    clock::Clock,
    kms::{KeySpec, KeyUri, generate},
    oci::{Digest, Repository, Tag},
    registry::{Registry, Settings, Timeouts},
    signature::{
        EMPTY_CONFIG,
        notation::{ARTIFACT_TYPE, Envelope, Prepared, Target, read},
        referrer::Referrer,
    },
    subject::{Children, Image as Located, Located as Found, Subject, locate},
    verify::{Trust, Wanted, signature},
    witness::{Witness, WitnessSettings},
};
use integration_tests::{
    image::{Image, Manifest, OCI_INDEX, OCI_MANIFEST, digest},
    registry::{Client, Registry as Server},
    verifier::Notation,
};
use jiff::Timestamp;
use serde_json::{Value, json};
use tempfile::TempDir;

const REPOSITORY: &str = "team/app";
const DAY: Duration = Duration::from_secs(86_400);

/// A witness's key on this machine, and the configuration that names it.
struct Installation {
    folder: TempDir,
}

impl Installation {
    /// `more` is what else its `[[witness]]` says.
    fn new(spec: KeySpec, more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let key = folder.path().join("key.pem");
        generate(spec, &key).unwrap();
        let config = format!(
            "[queue]\npath = \"{}\"\n[[witness]]\nname = \"release\"\nkey = \"file://{}\"\n{more}\n",
            folder.path().join("state").display(),
            key.display()
        );
        fs::create_dir(folder.path().join("state")).unwrap();
        fs::write(folder.path().join("countersign.toml"), config).unwrap();
        Self { folder }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn countersign(&self, arguments: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_countersign"));
        command.args(arguments.split(' ')).arg("--config").arg(self.path().join("countersign.toml"));
        command.output().unwrap()
    }

    /// What `witness certificate` says as JSON.
    fn certificate(&self, more: &str) -> Value {
        let output = self.countersign(&format!("witness certificate release --output json{more}"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    async fn witness(&self) -> Witness {
        let settings = WitnessSettings {
            name: "release".into(),
            description: String::new(),
            key: KeyUri::File(self.path().join("key.pem")),
            login: None,
            verify: vec![],
            rate: None,
            pin: None,
        };
        Witness::open(&settings, Clock::system()).await.unwrap()
    }

    fn openssl(&self, arguments: &str) {
        let output = Command::new("openssl").args(arguments.split(' ')).current_dir(self.path()).output().unwrap();
        assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

fn text(answer: &Value, member: &str) -> String {
    answer[member].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
}

async fn subject(server: &Server, image: &Image) -> Subject {
    let settings = Settings {
        name: server.host().parse().unwrap(),
        url: server.url().parse().unwrap(),
        credentials: None,
        ca: None,
        timeouts: Timeouts::default(),
        observer: None,
    };
    let registry = Registry::new(settings).unwrap();
    let repository: Repository = REPOSITORY.parse().unwrap();
    let digest: Digest = image.manifest.digest.parse().unwrap();
    match locate(&registry, &repository, None::<&Tag>, &digest, Children::Signed).await.unwrap() {
        Found::Image(Located { root, .. }) => root,
        other => panic!("{other:?}"),
    }
}

/// Stores a signature as a referrer, with the fallback tag's index that this registry needs.
async fn push(client: &Client, subject: &Subject, artifact: &Referrer) {
    let manifest = Manifest::new(OCI_MANIFEST, artifact.manifest().clone());
    client.push_blob(REPOSITORY, artifact.blob()).await.unwrap();
    client.push_blob(REPOSITORY, &Bytes::from_static(EMPTY_CONFIG)).await.unwrap();
    client.put_manifest(REPOSITORY, &manifest.digest, &manifest).await.unwrap();
    let document: Value = serde_json::from_slice(&manifest.bytes).unwrap();
    let index = json!({
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [{
            "mediaType": OCI_MANIFEST,
            "digest": manifest.digest,
            "size": manifest.bytes.len(),
            "artifactType": ARTIFACT_TYPE,
            "annotations": document["annotations"],
        }],
    });
    let index = Manifest::new(OCI_INDEX, index.to_string());
    client.put_manifest(REPOSITORY, &subject.digest().as_str().replace(':', "-"), &index).await.unwrap();
}

async fn signed(
    witness: &Witness,
    envelope: Envelope,
    subject: &Subject,
    chain: &Chain,
    at: Timestamp,
    lifetime: Option<Duration>,
) -> Referrer {
    let prepared = Prepared::new(envelope, subject, chain, at, lifetime);
    let signed = witness.sign(prepared.algorithm(), prepared.sha256()).await.unwrap();
    prepared.assemble(signed.raw()).unwrap()
}

#[tokio::test]
async fn stock_notation_accepts_what_a_witness_signs_under_its_own_certificate() {
    let server = Server::start().await.expect("these tests run docker-registry and notation from .tools: `make tools`");
    let (client, name) = (server.client().unwrap(), format!("{}/{REPOSITORY}", server.host()));
    let now = Clock::system().now();
    for spec in [KeySpec::Rsa2048, KeySpec::EcP256] {
        let installation = Installation::new(spec, "subject = \"C=DE, ST=Berlin, O=Example Inc.\"");
        let answer = installation.certificate("");
        let (pem, identity) = (text(&answer, "certificate"), text(&answer, "trusted_identity"));
        let chain = Chain::from_pem(&pem).unwrap();
        let witness = installation.witness().await;
        assert_eq!(chain.public_key(), witness.public_key());
        let judge = Notation::trusting(&pem, &identity, &name).unwrap();
        let stranger =
            Notation::trusting(&text(&Installation::new(spec, "").certificate(""), "certificate"), "*", &name).unwrap();
        let namesake = Notation::trusting(&pem, "x509.subject: C=DE, ST=Berlin, O=Other, CN=release", &name).unwrap();
        for envelope in Envelope::ALL {
            for lifetime in [Some(DAY), None] {
                let image = Image::oci(&format!("{spec} {envelope:?} {lifetime:?}")).unwrap();
                client.push(&image, REPOSITORY, &["1.0"]).await.unwrap();
                let subject = subject(&server, &image).await;
                let reference = format!("{name}@{}", subject.digest());
                let artifact = signed(&witness, envelope, &subject, &chain, now, lifetime).await;
                push(&client, &subject, &artifact).await;

                for reference in [&reference, &format!("{name}:1.0")] {
                    let ruling = judge.verify(reference).await.unwrap();
                    assert!(ruling.accepted, "{spec} {envelope:?} {lifetime:?}: {}", ruling.words);
                }
                let ruling = stranger.verify(&reference).await.unwrap();
                assert!(!ruling.accepted && ruling.words.contains("any trusted certificate"), "{}", ruling.words);
                let ruling = namesake.verify(&reference).await.unwrap();
                assert!(!ruling.accepted && ruling.words.contains("identities"), "{}", ruling.words);
                let list = judge.list(&reference).await.unwrap();
                let listed = digest(artifact.manifest());
                assert!(list.accepted && list.words.contains(&listed), "{}", list.words);

                // And so do we, of what the registry has.
                let content = client.blob(REPOSITORY, &digest(artifact.blob())).await.unwrap();
                let claim = read(envelope, &content).unwrap();
                let wanted = Wanted { manifest: Target::of(&subject), reference: reference.parse().unwrap() };
                let certificates = std::slice::from_ref(&chain);
                let trust = Trust { witness: "release", keys: witness.trusted_keys(), certificates };
                signature(envelope.into(), &claim, &wanted, &[trust], now).unwrap();
            }
            let image = Image::oci(&format!("{spec} {envelope:?} expired")).unwrap();
            client.push(&image, REPOSITORY, &[]).await.unwrap();
            let subject = subject(&server, &image).await;
            let artifact = signed(&witness, envelope, &subject, &chain, now - 2 * DAY, Some(DAY)).await;
            push(&client, &subject, &artifact).await;
            let ruling = judge.verify(&format!("{name}@{}", subject.digest())).await.unwrap();
            assert!(!ruling.accepted && ruling.words.contains("expired"), "{}", ruling.words);
        }
    }
}

#[tokio::test]
async fn stock_notation_accepts_an_administrators_chain_by_its_root() {
    let server = Server::start().await.unwrap();
    let (client, name) = (server.client().unwrap(), format!("{}/{REPOSITORY}", server.host()));
    let installation = Installation::new(KeySpec::Rsa2048, "certificate = \"chain.pem\"");
    fs::write(
        installation.path().join("o.cnf"),
        "[req]\ndistinguished_name=dn\nprompt=no\n[dn]\nCN=x\n[ca]\nbasicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n\
         [leaf]\nbasicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=codeSigning\n",
    )
    .unwrap();
    installation.openssl("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out root.key");
    installation.openssl("req -new -config o.cnf -key root.key -subj /C=DE/ST=Berlin/O=Example/CN=root -out root.csr");
    installation.openssl("x509 -req -sha384 -days 99 -in root.csr -signkey root.key -extfile o.cnf -extensions ca -out root.crt");
    installation.openssl("req -new -config o.cnf -key key.pem -subj /C=DE/ST=Berlin/O=Example/CN=signing -out leaf.csr");
    installation.openssl(
        "x509 -req -sha384 -days 60 -in leaf.csr -CA root.crt -CAkey root.key -set_serial 7 -extfile o.cnf -extensions leaf -out leaf.crt",
    );
    let read = |file: &str| fs::read_to_string(installation.path().join(file)).unwrap();
    fs::write(installation.path().join("chain.pem"), read("leaf.crt") + &read("root.crt")).unwrap();

    let answer = installation.certificate("");
    assert_eq!(text(&answer, "certificate"), read("root.crt"));
    let chain = Chain::from_pem(&text(&answer, "chain")).unwrap();
    let judge = Notation::trusting(&text(&answer, "certificate"), &text(&answer, "trusted_identity"), &name).unwrap();
    for envelope in Envelope::ALL {
        let image = Image::index(&format!("{envelope:?}")).unwrap();
        client.push(&image, REPOSITORY, &["1.0"]).await.unwrap();
        let subject = subject(&server, &image).await;
        let artifact = signed(&installation.witness().await, envelope, &subject, &chain, Clock::system().now(), None).await;
        push(&client, &subject, &artifact).await;
        let ruling = judge.verify(&format!("{name}:1.0")).await.unwrap();
        assert!(ruling.accepted, "{envelope:?}: {}", ruling.words);
    }

    let refused = installation.countersign("witness certificate release --renew");
    assert_eq!(refused.status.code(), Some(2), "{}", String::from_utf8_lossy(&refused.stderr));
    let good = installation.countersign("check");
    assert!(good.status.success(), "{}", String::from_utf8_lossy(&good.stdout));
    // Another key under the same certificate.
    fs::remove_file(installation.path().join("key.pem")).unwrap();
    generate(KeySpec::Rsa2048, &installation.path().join("key.pem")).unwrap();
    for command in ["check", "check --online"] {
        let bad = installation.countersign(command);
        let words = String::from_utf8_lossy(&bad.stdout).into_owned();
        assert!(!bad.status.success() && words.contains("is for the key sha256:"), "{words}");
    }
    let bad = installation.countersign("witness certificate release");
    assert!(String::from_utf8_lossy(&bad.stderr).contains("is for the key sha256:"));
}

#[test]
fn a_witness_gives_the_same_certificate_each_time_until_it_is_renewed() {
    let installation = Installation::new(KeySpec::EcP256, "");
    let first = installation.certificate("");
    assert_eq!(installation.certificate(""), first);
    let printed = installation.countersign("witness certificate release");
    assert_eq!(String::from_utf8(printed.stdout).unwrap(), text(&first, "certificate"));
    assert_eq!(text(&first, "trusted_identity"), "x509.subject: CN=release,O=countersign,ST=none,C=XX");
    let renewed = installation.certificate(" --renew");
    assert_ne!(renewed["thumbprint"], first["thumbprint"]);
    assert_eq!(installation.certificate(""), renewed);
    let unknown = installation.countersign("witness certificate staging");
    assert_eq!(unknown.status.code(), Some(2));

    // Kept for the key, not for the name: a rotated key signs its own.
    fs::remove_file(installation.path().join("key.pem")).unwrap();
    generate(KeySpec::EcP256, &installation.path().join("key.pem")).unwrap();
    assert_ne!(installation.certificate("")["thumbprint"], renewed["thumbprint"]);
}
