use std::{path::Path, process::Command};

use async_trait::async_trait;

use super::*;
use crate::{
    clock::Clock,
    kms::{self, Algorithm, KeyUri, RawSignature, SigningKey, generate},
    witness::{Witness, WitnessSettings},
};

const NOW: &str = "2026-11-21T09:00:00Z";

fn vector(file: &str) -> String {
    let path = format!("{}/tests/data/vectors/keys/{file}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn settings(file: &Path) -> WitnessSettings {
    WitnessSettings {
        name: "release".into(),
        description: String::new(),
        key: KeyUri::File(file.to_owned()),
        login: None,
        verify: vec![],
        rate: None,
        pin: None,
    }
}

async fn witness(folder: &Path, spec: KeySpec) -> Witness {
    let file = folder.join(format!("{spec}.pem"));
    generate(spec, &file).unwrap();
    Witness::open(&settings(&file), Clock::manual(NOW.parse().unwrap()).0).await.unwrap()
}

fn openssl(folder: &Path, arguments: &str) -> String {
    let output = Command::new("openssl").args(arguments.split(' ')).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_vectors_certificates_are_taken() {
    for (name, thumbprint) in [("rsa2048", "c161ee623e8ed2c91efbf6c1986451e48db13e38cd0a2a50992e6c044fb6b56e"), ("p256", "")] {
        let pem = vector(&format!("{name}.notation.crt.pem"));
        let chain = Chain::from_pem(&pem).unwrap();
        assert!(chain.thumbprint().starts_with(thumbprint));
        assert_eq!(chain.public_key(), &PublicKey::from_pem(&vector(&format!("{name}.pub.pem"))).unwrap());
        assert_eq!(chain.subject(), format!("CN=kms-test-{name},O=Example,ST=Test,C=XX"));
        assert_eq!(chain.not_before().to_string(), "2024-01-01T00:00:00Z");
        assert_eq!(chain.not_after().to_string(), "2049-01-01T00:00:00Z");
        assert_eq!(Chain::from_pem(&chain.to_pem()).unwrap(), chain);
        assert_eq!(Chain::from_pem(&format!("a note\n{}", pem.replace('\n', "\r\n"))).unwrap(), chain);
    }
}

#[tokio::test]
async fn a_witness_certifies_itself_and_openssl_agrees() {
    let folder = tempfile::tempdir().unwrap();
    for spec in [KeySpec::Rsa2048, KeySpec::EcP256] {
        let witness = witness(folder.path(), spec).await;
        let subject: SubjectName = "C=DE, ST=Berlin, O=Exämple".parse().unwrap();
        let now: Timestamp = NOW.parse().unwrap();
        let chain = make(&witness, &subject.with_common_name("release"), now).await.unwrap();
        assert_eq!(chain.public_key(), witness.public_key());
        assert_eq!(chain.subject(), "CN=release,O=Exämple,ST=Berlin,C=DE");
        assert_eq!(chain.not_before().to_string(), "2026-11-21T08:00:00Z");
        assert_eq!(chain.not_after().to_string(), "2036-11-28T09:00:00Z");
        std::fs::write(folder.path().join("c.pem"), chain.to_pem()).unwrap();
        let said = openssl(folder.path(), "verify -check_ss_sig -attime 1800000000 -purpose any -CAfile c.pem c.pem");
        assert_eq!(said, "c.pem: OK\n");
        let said = openssl(folder.path(), "x509 -in c.pem -noout -ext keyUsage,basicConstraints,extendedKeyUsage");
        for expected in ["Key Usage: critical\n    Digital Signature\n", "Constraints: critical\n    CA:FALSE\n", "Code Signing"]
        {
            assert!(said.contains(expected), "{said}");
        }
        let again = make(&witness, &SubjectName::unnamed(), now).await.unwrap();
        assert_ne!(again.thumbprint(), chain.thumbprint());
    }
    let large = witness(folder.path(), KeySpec::Rsa3072).await;
    let refused = make(&large, &SubjectName::unnamed(), NOW.parse().unwrap()).await.unwrap_err();
    assert!(matches!(refused, MakeError::KeySpec { spec: KeySpec::Rsa3072, .. }), "{refused}");
}

/// A KMS that allows the key one padding only.
#[derive(Debug)]
struct OnlyPss(Arc<dyn SigningKey>);

#[async_trait]
impl SigningKey for OnlyPss {
    fn uri(&self) -> &KeyUri {
        self.0.uri()
    }
    fn resolved(&self) -> &str {
        self.0.resolved()
    }
    fn public_key(&self) -> &PublicKey {
        self.0.public_key()
    }
    async fn sign(&self, algorithm: Algorithm, digest: &[u8; 32]) -> Result<RawSignature, kms::Error> {
        if algorithm == Algorithm::RsaPssSha256 {
            return self.0.sign(algorithm, digest).await;
        }
        Err(kms::Error::KeyUnusable { key: Arc::new(self.uri().clone()), what: "the key signs with PSS alone".into() })
    }
}

#[tokio::test]
async fn a_key_that_signs_with_pss_alone_certifies_itself_too() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key.pem");
    generate(KeySpec::Rsa2048, &file).unwrap();
    let settings = settings(&file);
    let clock = Clock::manual(NOW.parse().unwrap()).0;
    let key = kms::open(&settings.key, None, clock.clone()).await.unwrap();
    let witness = Witness::from_key(&settings, Arc::new(OnlyPss(key)), clock).unwrap();
    let chain = make(&witness, &SubjectName::unnamed(), NOW.parse().unwrap()).await.unwrap();
    std::fs::write(folder.path().join("c.pem"), chain.to_pem()).unwrap();
    let said = openssl(folder.path(), "verify -check_ss_sig -attime 1800000000 -purpose any -CAfile c.pem c.pem");
    assert_eq!(said, "c.pem: OK\n");
    // Go takes the hash with an explicit NULL only.
    let der = hex::encode(chain.certificates().next().unwrap());
    assert_eq!(der.matches("a00f300d06096086480165030402010500a11c301a").count(), 2, "{der}");
}

const LEAF: &str =
    "[leaf]\nbasicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=codeSigning\n";

/// A root, an issuer and a leaf as an administrator makes them; `leaf` is the leaf's section of extensions.
fn authority(folder: &Path, leaf: &str) {
    let config = format!(
        "[req]\ndistinguished_name=dn\nprompt=no\n[dn]\nCN=x\n[ca]\nbasicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n\
         [narrow]\nbasicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=critical,keyCertSign\n{leaf}"
    );
    std::fs::write(folder.join("o.cnf"), config).unwrap();
    for (name, key) in
        [("root", "EC -pkeyopt ec_paramgen_curve:P-384"), ("issuer", "RSA"), ("leaf", "EC -pkeyopt ec_paramgen_curve:P-256")]
    {
        openssl(folder, &format!("genpkey -algorithm {key} -out {name}.key"));
        openssl(
            folder,
            &format!("req -new -config o.cnf -key {name}.key -subj /C=DE/ST=Berlin/O=Example/CN={name} -out {name}.csr"),
        );
    }
    let sign = |name: &str, by: &str, section: &str, options: &str| {
        let issuer = if name == by { format!("-signkey {by}.key") } else { format!("-CA {by}.crt -CAkey {by}.key") };
        openssl(
            folder,
            &format!(
                "x509 -req -days 3650 -in {name}.csr {issuer} -set_serial 7 -extfile o.cnf -extensions {section} -out {name}.crt {options}"
            ),
        );
    };
    sign("root", "root", "ca", "-sha384");
    sign("issuer", "root", "narrow", "-sha384");
    sign("leaf", "issuer", "leaf", "-sha256 -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:32");
}

fn joined(folder: &Path, names: &[&str]) -> Result<Chain, Error> {
    let read = |name: &&str| std::fs::read_to_string(folder.join(format!("{name}.crt"))).unwrap();
    Chain::from_pem(&names.iter().map(read).collect::<String>())
}

#[test]
fn an_administrators_chain_is_taken_whole_and_in_order_only() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    authority(folder, LEAF);
    let chain = joined(folder, &["leaf", "issuer", "root"]).unwrap();
    assert_eq!(chain.subject(), "CN=leaf,O=Example,ST=Berlin,C=DE");
    assert_eq!(chain.thumbprints().len(), 3);
    assert_eq!(chain.root_to_pem(), std::fs::read_to_string(folder.join("root.crt")).unwrap());
    for (names, what) in [
        (&["leaf"][..], "its issuers must follow it"),
        (&["leaf", "issuer"], "is the last and no root"),
        (&["leaf", "root"], "was not issued by the next"),
        (&["leaf", "root", "issuer"], "was not issued by the next"),
        (&["issuer", "root"], "only RSA_2048 and EC_P256 keys sign"),
        (&["root"], "cannot be used"),
        (&["leaf", "issuer", "root", "root"], "signed itself, but is not the last"),
        (&["leaf"; 11], "more than 10"),
        (&[], "holds no certificate"),
    ] {
        // The issuer's key is of 2048 bits by OpenSSL's default, so what is wrong with it as a leaf is that it is an authority.
        let what = if names == ["issuer", "root"] { "is an authority's" } else { what };
        let words = joined(folder, names).unwrap_err().to_string();
        assert!(words.contains(what), "{names:?}: {words}");
    }
}

#[test]
fn certificates_that_notation_refuses_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (leaf, what) in [
        ("keyUsage=critical,digitalSignature", ""),
        ("keyUsage=critical,digitalSignature,nonRepudiation\nextendedKeyUsage=codeSigning", ""),
        ("keyUsage=digitalSignature", "not marked critical"),
        ("extendedKeyUsage=codeSigning", "has no key usage"),
        ("keyUsage=critical,digitalSignature,keyAgreement", "digitalSignature and no other"),
        ("keyUsage=critical,keyCertSign", "digitalSignature and no other"),
        ("keyUsage=critical,digitalSignature\nbasicConstraints=critical,CA:TRUE", "is an authority's"),
        ("keyUsage=critical,digitalSignature\nextendedKeyUsage=codeSigning,serverAuth", "leave codeSigning alone"),
        ("keyUsage=critical,digitalSignature\n1.2.3.4=critical,ASN1:NULL", "critical extension that is not known"),
    ] {
        authority(folder, &format!("[leaf]\n{leaf}\n"));
        match joined(folder, &["leaf", "issuer", "root"]) {
            Ok(_) => assert_eq!(what, "", "{leaf}"),
            Err(error) => assert!(!what.is_empty() && error.to_string().contains(what), "{leaf}: {error}"),
        }
    }
}

#[test]
fn files_that_hold_something_else_are_told_apart() {
    let good = vector("p256.notation.crt.pem");
    let key = vector("p256.key.pem");
    for (text, expected) in [
        (String::new(), Error::Empty),
        ("certificate".into(), Error::Empty),
        (format!("{key}{good}"), Error::OtherLabel("PRIVATE KEY".into())),
        (good.replacen('M', "%", 1), Error::Damaged { number: 1 }),
        (good.replace("END", "ENT"), Error::Damaged { number: 1 }),
        (format!("{good}{}", pem(&[0x30, 0])), Error::Malformed { number: 2 }),
        (pem(&vec![0; MAX_CERTIFICATE + 1]), Error::Malformed { number: 1 }),
    ] {
        let found = Chain::from_pem(&text).unwrap_err();
        assert_eq!(found, expected);
        assert!(!found.to_string().contains("MIG"), "a private key is not shown");
    }
}
