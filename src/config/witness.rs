use std::path::PathBuf;

use jiff::Timestamp;

use crate::{
    certificate::{self, Chain, SubjectName},
    kms::{KeyUri, Login, PublicKey, UriError},
    witness::TrustedKeySettings,
};

mod login;

use super::{
    names::{self, PLAIN},
    problem::Place,
    reader::{Section, optional},
    report::{Wrong, cut},
    shape::{ANY_TEXT, Grammar, Key, Kind, Table},
};

/// A named signing identity.
#[derive(Debug, Clone)]
pub struct Witness {
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// The key that signs.
    pub key: KeyUri,
    /// Who asks a Vault or an OpenBao; None: whom the environment's token belongs to. Or what opens the key: a passphrase, a PIN.
    pub login: Option<Login>,
    /// PEM (SPKI): what the key's public half must be. None: what it is when it is first opened.
    pub public_key: Option<PathBuf>,
    /// What its notation signatures name. None: a certificate that its own key signs, and that is kept in the ledger.
    pub certificate: Option<Chain>,
    /// Whom a certificate that its own key signs is for.
    pub subject: SubjectName,
    /// Further public keys whose signatures count.
    pub verify: Vec<FormerKey>,
    /// None: as fast as the KMS allows.
    pub rate: Option<Rate>,
    /// Where its section begins, for messages about it.
    pub place: Place,
}

/// A public key that signed before, or that signs elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormerKey {
    /// PEM (SPKI).
    pub key: PathBuf,
    /// From then on its signatures do not count any more: the end of a rotation.
    pub until: Option<Timestamp>,
    /// From then on somebody else may have signed with it.
    pub revoked: Option<Timestamp>,
    /// Why it was revoked, for people.
    pub reason: Option<String>,
}

/// A witness's share of its KMS's quota: a token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Signatures.
    pub per_second: u32,
    /// Signatures that may be made at once after a pause.
    pub burst: u32,
}

/// A witness as others verify it, with all that is public of it at hand.
#[derive(Debug, Clone)]
pub struct Given {
    pub public_key: PublicKey,
    /// What its notation signatures name. None: its keys decide alone.
    pub certificate: Option<Chain>,
    /// Further public keys whose signatures count.
    pub verify: Vec<TrustedKeySettings>,
}

pub(crate) static TABLE: Table = Table {
    title: "[[witness]]",
    doc: "A named signing identity: one asymmetric key in one KMS.",
    keys: &[
        Key::required("name", Kind::Text(&PLAIN), "\"release\"", "What rules and people call it."),
        Key::optional(
            "description",
            Kind::Text(&ANY_TEXT),
            "\"Signs everything that production may run\"",
            "What its signature means, for people.",
        ),
        Key::required(
            "key",
            Kind::Text(&KEY_URI),
            "\"awskms:///alias/image-signing?region=eu-west-1\"",
            "The key that signs: awskms://[ENDPOINT]/KEY for AWS KMS, alibabakms://ENDPOINT/[INSTANCE]/KEY for Alibaba Cloud KMS, \
             gcpkms://projects/PROJECT/locations/LOCATION/keyRings/RING/cryptoKeys/KEY for Google Cloud KMS, \
             azurekms://VAULT.vault.azure.net/KEY for Azure Key Vault, hashivault://KEY or openbao://KEY for a Transit engine of Vault or OpenBao, \
             pkcs11:token=LABEL;object=LABEL?module-path=PATH for a hardware security module, or file:///path/key.pem for a key on \
             this machine.",
        ),
        Key::optional(
            "login",
            Kind::Table(&login::TABLE),
            "{ method = \"kubernetes\", role = \"countersign\" }",
            "How a Vault or an OpenBao is told who asks. If absent, by VAULT_TOKEN, BAO_TOKEN or ~/.vault-token.",
        ),
        Key::optional(
            "pin",
            Kind::Secret,
            "{ file = \"/run/secrets/pin\" }",
            "The PIN of a pkcs11: key's token. One that the token refuses is not tried a second time.",
        ),
        Key::optional(
            "passphrase",
            Kind::Secret,
            "{ file = \"/run/secrets/passphrase\" }",
            "The passphrase of a file:// key that is encrypted.",
        ),
        Key::optional(
            "public_key",
            Kind::Path,
            "\"release.pub.pem\"",
            "The public key that it must turn out to have, as PEM. If absent, the one that it has at first is kept in the queue's folder.",
        ),
        Key::optional(
            "certificate",
            Kind::Path,
            "\"release.chain.pem\"",
            "The certificate that notation's signatures name, as PEM, with its issuers after it up to the root. If absent, the witness's \
             key signs one for itself when it is first needed, and it is kept in the ledger.",
        ),
        Key::optional(
            "subject",
            Kind::Text(&SUBJECT),
            "\"C=DE, ST=Berlin, O=Example\"",
            "Whom a certificate that the witness's key signs for itself is for: C, ST and O at least; CN is the witness's name, if absent. \
             One that is kept already stays as it is until it is renewed.",
        ),
        Key::optional(
            "verify",
            Kind::Tables(&VERIFY),
            "[{ key = \"release-2025.pub.pem\", until = 2027-03-01T00:00:00Z }]",
            "Further public keys whose signatures count: rotation by overlap, revocation by date.",
        ),
        Key::optional(
            "rate",
            Kind::Table(&RATE),
            "{ per_second = 100, burst = 200 }",
            "This witness's share of the KMS's quota. As fast as the KMS allows, if absent.",
        ),
    ],
};

static KEY_URI: Grammar = Grammar {
    noun: "a key's URI in quotes",
    pattern: Some("^((file|awskms|alibabakms|gcpkms|azurekms|hashivault|openbao)://|pkcs11:)"),
};

static SUBJECT: Grammar = Grammar { noun: "a distinguished name in quotes", pattern: Some("=") };

static VERIFY: Table = Table {
    title: "`verify`",
    doc: "A public key that signed before, or that signs elsewhere.",
    keys: &[
        Key::required("key", Kind::Path, "\"release-2025.pub.pem\"", "The public key, as PEM."),
        VERIFY_UNTIL,
        VERIFY_REVOKED,
        VERIFY_REASON,
    ],
};

const VERIFY_UNTIL: Key =
    Key::optional("until", Kind::Time, "2027-03-01T00:00:00Z", "From then on its signatures do not count any more.");
const VERIFY_REVOKED: Key =
    Key::optional("revoked", Kind::Time, "2026-12-24T03:00:00Z", "From then on somebody else may have signed with it.");
const VERIFY_REASON: Key =
    Key::optional("reason", Kind::Text(&ANY_TEXT), "\"found in a build log\"", "Why it was revoked, for people.");

/// A witness as a cluster keeps it: no key that signs, and no files.
pub(crate) static GIVEN: Table = Table {
    title: "[[witness]]",
    doc: "A named signing identity: who signs is known by public keys.",
    keys: &[
        Key::required("name", Kind::Text(&PLAIN), "\"release\"", "What policies and people call it."),
        Key::optional("description", Kind::Text(&ANY_TEXT), "\"\"", "What its signature means, for people."),
        Key::required(
            "public_key",
            Kind::Text(&PUBLIC_PEM),
            "\"-----BEGIN PUBLIC KEY-----…\"",
            "The public key, as PEM: what `countersign witness public-key` prints.",
        ),
        Key::optional(
            "certificate",
            Kind::Text(&CERTIFICATE_PEM),
            "\"-----BEGIN CERTIFICATE-----…\"",
            "The certificate that notation's signatures must name, as PEM, with its issuers after it up to the root. If absent, the public \
             keys decide alone.",
        ),
        Key::optional(
            "verify",
            Kind::Tables(&GIVEN_VERIFY),
            "[]",
            "Further public keys whose signatures count: rotation by overlap, revocation by date.",
        ),
    ],
};

static GIVEN_VERIFY: Table = Table {
    title: "`verify`",
    doc: VERIFY.doc,
    keys: &[
        Key::required("key", Kind::Text(&PUBLIC_PEM), "\"-----BEGIN PUBLIC KEY-----…\"", "The public key, as PEM."),
        VERIFY_UNTIL,
        VERIFY_REVOKED,
        VERIFY_REASON,
    ],
};

static PUBLIC_PEM: Grammar = Grammar { noun: "a public key as PEM", pattern: Some("-----BEGIN PUBLIC KEY-----") };
static CERTIFICATE_PEM: Grammar = Grammar { noun: "certificates as PEM", pattern: Some("-----BEGIN CERTIFICATE-----") };

static RATE: Table = Table {
    title: "`rate`",
    doc: "How often a key is used.",
    keys: &[
        Key::required("per_second", Kind::Count { least: 1, most: 1_000_000 }, "100", "Signatures a second."),
        Key::optional(
            "burst",
            Kind::Count { least: 1, most: 1_000_000 },
            "200",
            "Signatures that may be made at once after a pause. As many as `per_second`, if absent.",
        ),
    ],
};

pub(crate) fn read(section: &Section<'_>) -> Option<Witness> {
    let name = section.value("name").and_then(|value| value.parse(names::plain));
    let description = section.value("description").map(|value| value.text());
    let key = section.value("key").and_then(|value| {
        let key = value.parse(key_uri);
        if matches!(&key, Some(KeyUri::Pkcs11(reference)) if reference.holds_pin()) {
            let help = "keep it in a file of its own: pin = { file = \"/run/secrets/pin\" } in this witness".to_owned();
            section.report.warning(value.span.clone(), "the PIN stands in the configuration file itself", help);
        }
        key
    });
    let login = section.value("login").map(|value| value.table().as_ref().and_then(login::read));
    if let (Some(key), Some(at)) = (&key, section.written("login"))
        && !matches!(key, KeyUri::Vault(_))
    {
        let help = "remove it: other keys take what they need from the environment".to_owned();
        section.report.error(at, "`login` is for hashivault:// and openbao:// keys", help);
    }
    if let Some(key) = &key {
        only_for(section, "pin", "pkcs11:", matches!(key, KeyUri::Pkcs11(_)));
        only_for(section, "passphrase", "file://", matches!(key, KeyUri::File(_)));
    }
    let secret = |name| section.value(name).map(|value| value.secret_source());
    let (pin, passphrase) = (secret("pin"), secret("passphrase"));
    let public_key = section.value("public_key").map(|value| value.readable_file());
    let certificate = section.value("certificate").map(|value| value.read_file(certificate::MAX_PEM, chain));
    let subject = section.value("subject").map(|value| value.parse(subject));
    if let (Some(_), Some(at)) = (&certificate, section.written("subject")) {
        let help = "remove it: `certificate` says whom it is for".to_owned();
        section.report.error(at, "`subject` is for certificates that are made here", help);
    }
    if let Some(Some(chain)) = &certificate
        && let Some(why) = chain.nameless()
    {
        let message = format!("the certificate's subject ({}) {why}", chain.subject());
        let help = "no trust policy of notation's can name it, and one that trusts everybody (`trustedIdentities`: \"*\") trusts whomever \
                    its root certifies: have one made whose subject has C, ST and O, and of the rest L, OU and CN at most, each once";
        section.report.warning(section.value_span("certificate"), message, help.to_owned());
    }
    let verify = section.value("verify").map(|value| value.each_table(former_key));
    let rate = section.value("rate").map(|value| value.table().as_ref().and_then(rate));
    Some(Witness {
        subject: optional(subject)?.unwrap_or_else(SubjectName::unnamed).with_common_name(name.as_deref()?),
        name: name?,
        description: description.unwrap_or_else(|| Some(String::new()))?,
        key: key?,
        login: optional(login)?.or(optional(pin)?.or(optional(passphrase)?).map(Login::Secret)),
        public_key: optional(public_key)?,
        certificate: optional(certificate)?,
        verify: verify.unwrap_or_else(|| Some(Vec::new()))?,
        rate: optional(rate)?,
        place: section.report.place(&section.span),
    })
}

/// Refuses what opens keys of one kind beside a key of another.
fn only_for(section: &Section<'_>, name: &'static str, scheme: &str, is_such: bool) {
    if let Some(at) = section.written(name).filter(|_| !is_such) {
        section.report.error(at, format!("`{name}` is for {scheme} keys"), "remove it".to_owned());
    }
}

fn key_uri(text: &str) -> Result<KeyUri, Wrong> {
    const EXAMPLES: &str = "write file:///path/key.pem, awskms:///alias/NAME?region=REGION, alibabakms://ENDPOINT//alias/NAME, \
                            gcpkms://projects/…/cryptoKeys/KEY, azurekms://VAULT.vault.azure.net/KEY, hashivault://NAME or \
                            pkcs11:token=LABEL;object=LABEL?module-path=PATH";
    let shown = cut(text);
    text.parse().map_err(|error| match error {
        UriError::NoScheme(_) if text.starts_with('/') => {
            Wrong::new(format!("\"{shown}\" is a path, not a key's URI"), format!("write \"file://{shown}\""))
        }
        UriError::NoScheme(_) => Wrong::new(format!("\"{shown}\" is no key's URI: it has no scheme"), EXAMPLES),
        UriError::UnknownScheme(_) => Wrong::new(format!("\"{shown}\" names no key provider"), EXAMPLES),
        UriError::Secret => Wrong::new(
            "`key` holds a user or password",
            "remove it: credentials come from the environment, an AWS profile or `login`",
        ),
        UriError::Malformed { uri, what } => Wrong::new(format!("\"{}\" is no key's URI", cut(&uri)), what),
    })
}

fn chain(pem: &str) -> Result<Chain, Wrong> {
    Chain::from_pem(pem).map_err(|error| {
        let because = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
        let help = "notation's readers want a certificate for signing code, then its issuers up to the root";
        Wrong::new(format!("it is no chain that can be used: {error}{because}"), help)
    })
}

fn subject(text: &str) -> Result<SubjectName, Wrong> {
    text.parse()
        .map_err(|wrong| Wrong::new(format!("\"{}\" is no subject: {wrong}", cut(text)), "write \"C=DE, ST=Berlin, O=Example\""))
}

/// The same of a witness as a cluster keeps it.
pub(crate) fn read_given(section: &Section<'_>) -> Option<Given> {
    let name = section.value("name").and_then(|value| value.parse(names::plain));
    let description = section.value("description").map(|value| value.text());
    let public_key = section.value("public_key").and_then(|value| value.parse(public_key));
    let certificate = section.value("certificate").map(|value| value.parse(chain));
    let verify = section.value("verify").map(|value| value.each_table(former_given));
    name?;
    optional(description)?;
    Some(Given {
        public_key: public_key?,
        certificate: optional(certificate)?,
        verify: verify.unwrap_or_else(|| Some(Vec::new()))?,
    })
}

fn public_key(pem: &str) -> Result<PublicKey, Wrong> {
    PublicKey::from_pem(pem).map_err(|error| {
        Wrong::new(format!("it is no public key that can be used: {error}"), "`countersign witness public-key` prints one")
    })
}

fn former_given(section: &Section<'_>) -> Option<TrustedKeySettings> {
    let pem = section.value("key").and_then(|value| value.parse(|pem| public_key(pem).map(|_| pem.to_owned())));
    let (until, revoked, reason) = ends(section)?;
    Some(TrustedKeySettings { pem: pem?, until, revoked: revoked.map(|at| (at, reason.unwrap_or_default())) })
}

fn former_key(section: &Section<'_>) -> Option<FormerKey> {
    let key = section.value("key").and_then(|value| value.readable_file());
    let (until, revoked, reason) = ends(section)?;
    Some(FormerKey { key: key?, until, revoked, reason })
}

/// When a former key's signatures stop to count, and why.
fn ends(section: &Section<'_>) -> Option<(Option<Timestamp>, Option<Timestamp>, Option<String>)> {
    let until = section.value("until").map(|value| value.time());
    let revoked = section.value("revoked").map(|value| value.time());
    let reason = section.value("reason").map(|value| value.text());
    if reason.is_some() && revoked.is_none() {
        let message = "`reason` without `revoked`: this key's signatures still count";
        let help = "add revoked = and the time from which they do not".to_owned();
        section.report.absent_warning(section.value_span("reason"), message, help);
    }
    Some((optional(until)?, optional(revoked)?, optional(reason)?))
}

fn rate(section: &Section<'_>) -> Option<Rate> {
    let per_second = section.value("per_second").and_then(|value| value.count());
    let burst = section.value("burst").map(|value| value.count());
    Some(Rate { per_second: per_second?, burst: optional(burst)?.or(per_second)? })
}
