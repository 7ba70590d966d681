//! Which verifier reads which of our signatures, run for real: the table in the README, and all of it in docs/verifiers.md.
//!
//! `BLESS=1 cargo test -p integration-tests --test matrix` writes both anew. A further verifier is a line in `Verifier::ALL` and an
//! arm in `Signed::ask`; a further format, or several written together, is a line in `WRITTEN`.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use integration_tests::formats::{Referrers, wait_for};
use integration_tests::house::{House, Keys, Plan};
use integration_tests::image::Image;
use integration_tests::process::tool;
use integration_tests::verifier::{Cosign, KeyPair, Notation, Podman, Ruling, Skopeo, sigstore_js, sigstore_rs};

const LIMIT: Duration = Duration::from_secs(120);
const AT_ONCE: usize = 3;
const BEGIN: &str = "<!-- the matrix: written by integration-tests/tests/matrix.rs -->";
const END: &str = "<!-- the end of the matrix -->";

/// What one rule writes.
struct Written {
    /// The namespace that it is about.
    name: &'static str,
    keys: Keys,
    /// `algorithm` in the rule.
    algorithm: &'static str,
    /// `formats` in the rule.
    formats: &'static [&'static str],
}

const PKCS1: &str = "RSA_PKCS1_SHA_256";
const ECDSA: &str = "ECDSA_SHA_256";
const PSS: &str = "RSA_PSS_SHA_256";

const WRITTEN: &[Written] = &[
    Written { name: "cosign", keys: Keys::Rsa2048, algorithm: PKCS1, formats: &["cosign"] },
    Written { name: "bundle", keys: Keys::Rsa2048, algorithm: PKCS1, formats: &["bundle"] },
    Written { name: "both", keys: Keys::Rsa2048, algorithm: PKCS1, formats: &["cosign", "bundle"] },
    Written { name: "both", keys: Keys::Rsa3072, algorithm: PKCS1, formats: &["cosign", "bundle"] },
    Written { name: "both", keys: Keys::Rsa4096, algorithm: PKCS1, formats: &["cosign", "bundle"] },
    Written { name: "cosign", keys: Keys::P256, algorithm: ECDSA, formats: &["cosign"] },
    Written { name: "bundle", keys: Keys::P256, algorithm: ECDSA, formats: &["bundle"] },
    Written { name: "both", keys: Keys::P256, algorithm: ECDSA, formats: &["cosign", "bundle"] },
    Written { name: "jws", keys: Keys::P256, algorithm: ECDSA, formats: &["notation"] },
    Written { name: "cose", keys: Keys::P256, algorithm: ECDSA, formats: &["notation-cose"] },
    Written { name: "jws", keys: Keys::Rsa2048, algorithm: PSS, formats: &["notation"] },
    Written { name: "cose", keys: Keys::Rsa2048, algorithm: PSS, formats: &["notation-cose"] },
    Written { name: "pss", keys: Keys::Rsa2048, algorithm: PSS, formats: &["cosign"] },
];

impl Written {
    fn rule(&self) -> String {
        let Self { name, algorithm, formats, .. } = self;
        let insists = self.is_unreadable();
        format!(
            "[[rule]]\nname = \"{name}\"\nscope = \"{name}\"\nwitness = \"release\"\nalgorithm = \"{algorithm}\"\n\
             formats = {formats:?}\nallow_unreadable = {insists}\n\n"
        )
    }

    /// `check` refuses it to who does not insist.
    fn is_unreadable(&self) -> bool {
        self.algorithm == PSS && self.formats == ["cosign"]
    }

    /// The first two columns of its line.
    fn title(&self) -> String {
        let keys = match self.keys {
            Keys::P256 => "P-256",
            Keys::Rsa2048 => "RSA 2048",
            Keys::Rsa3072 => "RSA 3072",
            Keys::Rsa4096 => "RSA 4096",
        };
        let insists = if self.is_unreadable() { ", `allow_unreadable`" } else { "" };
        format!("`{}`, {keys} | `{}`{insists}", self.algorithm, self.formats.join("`, `"))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verifier {
    Countersign,
    Cosign2,
    Cosign3,
    Skopeo,
    Podman,
    SigstoreRs,
    SigstoreJs,
    Notation,
}

impl Verifier {
    const ALL: &[Self] = &[
        Self::Countersign,
        Self::Cosign2,
        Self::Cosign3,
        Self::Skopeo,
        Self::Podman,
        Self::SigstoreRs,
        Self::SigstoreJs,
        Self::Notation,
    ];

    /// With the version that is run.
    fn name(self) -> Result<String> {
        Ok(match self {
            Self::Countersign => "countersign".to_owned(),
            Self::Cosign2 => format!("cosign {}", installed("cosign-2")?),
            Self::Cosign3 => format!("cosign {}", installed("cosign-3")?),
            Self::Skopeo => format!("skopeo {}", installed("skopeo")?),
            Self::Podman => format!("podman {}", installed("podman-5")?),
            Self::SigstoreRs => format!("sigstore-rs {}", installed("sigstore-rs")?),
            Self::SigstoreJs => format!("sigstore-js {}", installed("sigstore-js")?),
            Self::Notation => format!("notation {}", installed("notation")?),
        })
    }

    /// How it is asked.
    fn question(self) -> &'static str {
        match self {
            Self::Countersign => "`countersign verify IMAGE`.",
            Self::Cosign2 | Self::Cosign3 => {
                "`cosign verify --key release.pub --insecure-ignore-tlog=true --allow-http-registry IMAGE`."
            }
            Self::Skopeo => {
                "`skopeo --override-os linux --override-arch amd64 copy docker://IMAGE dir:COPY`, with the `policy.json` and \
                 `registries.d` of the README."
            }
            Self::Podman => "`podman pull --os linux --arch amd64 IMAGE`, with the same.",
            Self::SigstoreRs => {
                "The crate `sigstore`: `trusted_signature_layers`, and `verify_constraints` with a `PublicKeyVerifier` of the public key \
                 ([the program](../integration-tests/verifiers/sigstore-rs/src/main.rs))."
            }
            Self::SigstoreJs => {
                "The package `@sigstore/verify`: a `Verifier` that is given the public key and no authorities. It verifies bundles, and it \
                 is handed them ([the program](../integration-tests/verifiers/sigstore-js/verify.js)): where there is none it is not asked."
            }
            Self::Notation => {
                "`notation verify --insecure-registry IMAGE`, at the level `strict`, with the certificate and the identity that `countersign \
                 witness certificate` prints."
            }
        }
    }
}

/// `1.18` of what `make tools` unpacked as `skopeo 1.18.0+ds1-1 of Debian trixie`.
fn installed(name: &str) -> Result<String> {
    let text = fs::read_to_string(tool(name)?.join("VERSION"))?;
    let version = text.split_whitespace().nth(1).with_context(|| format!("no version in {text:?}"))?;
    Ok(version.split('.').take(2).collect::<Vec<_>>().join("."))
}

/// By what an image is asked for.
const ASKED: [&str; 5] =
    ["an image by tag", "an image by digest", "an index by tag", "an index by digest", "an index's platform by digest"];

/// Where: all is run at each.
const REGISTRIES: [Referrers; 2] = [Referrers::FallbackTag, Referrers::Api];

fn registry_name(registry: Referrers) -> &'static str {
    match registry {
        Referrers::FallbackTag => "docker-registry",
        Referrers::Api => "ferro-oci-server",
    }
}

/// An installation with images signed in every way of [`WRITTEN`] that its key can.
struct Signed {
    house: House,
    image: Image,
    index: Image,
    notation: Notation,
}

impl Signed {
    async fn start(registry: Referrers, keys: Keys) -> Result<Self> {
        let written = || WRITTEN.iter().filter(|written| written.keys == keys);
        let rules = Some(written().map(Written::rule).collect());
        let house = House::start(Plan { keys, registry: registry.registry(), rules, ..Plan::default() }).await?;
        let (image, index) = (Image::oci("matrix")?, Image::index("matrix")?);
        for Written { name, formats, .. } in written() {
            for (kind, image) in [("image", &image), ("index", &index)] {
                let repository = format!("{name}/{kind}");
                registry.push(&house, image, &repository, "1.0").await?;
                wait_for(&house, &house.reference(&repository, "1.0"), formats).await?;
            }
        }
        // The children come with the index, but not before it.
        house.wait_settled(1, LIMIT).await?;
        let notation = match keys {
            Keys::P256 | Keys::Rsa2048 => Notation::trusting_witness(&house, "*").await?,
            // Of these notation wants longer digests than countersign signs, and there are no certificates.
            Keys::Rsa3072 | Keys::Rsa4096 => Notation::signing("*").await?,
        };
        Ok(Self { house, image, index, notation })
    }

    /// In the order of [`ASKED`].
    fn references(&self, written: &Written) -> [String; ASKED.len()] {
        let at = |name: &str, what: &str| self.house.reference(&format!("{}/{name}", written.name), what);
        [
            at("image", "1.0"),
            at("image", &self.image.manifest.digest),
            at("index", "1.0"),
            at("index", &self.index.manifest.digest),
            at("index", &self.index.child("amd64").digest),
        ]
    }

    async fn ask(&self, verifier: Verifier, reference: &str, key: &Path) -> Result<Ruling> {
        let host = self.house.registry.host();
        match verifier {
            Verifier::Countersign => {
                let output = self.house.run(&["verify", reference]).await?;
                ensure!(matches!(output.code, Some(0 | 1)), "{output:?}");
                Ok(Ruling { accepted: output.code == Some(0), words: output.stdout + &output.stderr })
            }
            Verifier::Cosign2 => Cosign::V2.verify(key, reference).await,
            Verifier::Cosign3 => Cosign::V3.verify(key, reference).await,
            Verifier::Skopeo => Skopeo::requiring(key, &host)?.architecture("amd64").copy(reference).await,
            Verifier::Podman => Podman::requiring(key, &host)?.pull(reference).await,
            Verifier::SigstoreRs => sigstore_rs(key, reference).await,
            Verifier::SigstoreJs => sigstore_js(key, reference).await,
            Verifier::Notation => self.notation.verify(reference).await,
        }
    }

    /// That a yes depends on the key, of those verifiers that are given one.
    async fn refused_by_another_key(&self) -> Result<()> {
        let other = KeyPair::generate().await?;
        let [reference, ..] =
            self.references(WRITTEN.iter().find(|written| written.name == "both").context("nothing is written in both")?);
        for verifier in Verifier::ALL {
            if !matches!(verifier, Verifier::Countersign | Verifier::Notation) {
                let ruling = self.ask(*verifier, &reference, &other.public()).await?;
                ensure!(!ruling.accepted, "{verifier:?} accepts what another key signed: {}", ruling.words);
            }
        }
        Ok(())
    }

    /// What was said, without what differs from run to run.
    fn without_names(&self, words: &str) -> String {
        let mut text = words.replace(&self.house.registry.host(), "HOST");
        for Written { name, .. } in WRITTEN {
            text = text.replace(&format!("{name}/image"), "IMAGE").replace(&format!("{name}/index"), "IMAGE");
        }
        for manifest in [&self.image.manifest, &self.index.manifest, self.index.child("amd64")] {
            text = text.replace(&manifest.digest, "DIGEST");
        }
        text
    }
}

/// Why it was refused, in the verifier's own words: the line that says so, shortened.
fn refusal(words: &str) -> String {
    const MOST: usize = 160;
    // What sigstore-rs passes over it names before it says that nothing is left.
    let marks = ["Skipping Sigstore", "Error: ", "level=fatal", "it has no signatures", "does not count"];
    let of_mark = |mark: &&str| words.lines().find(|line| line.contains(*mark));
    let line = marks.iter().find_map(of_mark).or_else(|| words.lines().next_back()).unwrap_or_default().trim();
    let line = line.split_once("msg=").map_or(line, |(_, message)| message.trim_matches('"'));
    let line = line.find("Source image rejected").map_or(line, |start| &line[start..]);
    let line = line.trim_start_matches("WARN ").trim_start_matches("Error: ").replace('`', "'");
    match line.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// What begins so is said by us of a verifier that there was nothing to hand to.
const NOT_ASKED: &str = "not asked";

fn quoted(words: &str) -> String {
    if words.starts_with(NOT_ASKED) { words.to_owned() } else { format!("`{words}`") }
}

/// One run: None if it was accepted, otherwise why not.
type Cell = Option<String>;

/// By index into [`WRITTEN`], [`Verifier::ALL`] and [`ASKED`]: what was seen at each of [`REGISTRIES`].
type Seen = BTreeMap<(usize, usize, usize), Vec<Cell>>;

async fn run() -> Result<Seen> {
    let mut seen = Seen::new();
    for registry in REGISTRIES {
        for keys in [Keys::Rsa2048, Keys::Rsa3072, Keys::Rsa4096, Keys::P256] {
            let signed = Signed::start(registry, keys).await?;
            let written = WRITTEN.iter().enumerate().filter(|(_, written)| written.keys == keys);
            let asked = written.flat_map(|(row, written)| {
                signed.references(written).into_iter().enumerate().flat_map(move |(place, reference)| {
                    Verifier::ALL
                        .iter()
                        .enumerate()
                        .map(move |(column, verifier)| ((row, column, place), *verifier, reference.clone()))
                })
            });
            let asked: Vec<_> = asked.collect();
            let answers: Vec<_> = stream::iter(asked)
                .map(async |(place, verifier, reference)| {
                    let Ruling { accepted, words } = signed.ask(verifier, &reference, &signed.house.public_key_path()).await?;
                    anyhow::Ok((place, (!accepted).then(|| refusal(&signed.without_names(&words)))))
                })
                .buffered(AT_ONCE)
                .try_collect()
                .await
                .with_context(|| format!("{keys:?} at {}", registry_name(registry)))?;
            for (place, cell) in answers {
                seen.entry(place).or_default().push(cell);
            }
            signed.refused_by_another_key().await?;
        }
    }
    Ok(seen)
}

/// What is quoted under a table, each text once.
#[derive(Default)]
struct Notes(Vec<String>);

impl Notes {
    /// The number of the note with this text.
    fn number(&mut self, text: String) -> usize {
        let known = self.0.iter().position(|known| *known == text);
        known.unwrap_or_else(|| {
            self.0.push(text);
            self.0.len() - 1
        }) + 1
    }

    fn list(&self) -> String {
        self.0.iter().enumerate().map(|(at, note)| format!("{}. {note}\n", at + 1)).collect::<Vec<_>>().concat()
    }
}

fn head(columns: &[String]) -> String {
    format!("| {} |\n|{}\n", columns.join(" | "), " --- |".repeat(columns.len()))
}

/// The README's table: one line for what a rule writes, one column a verifier.
fn short(seen: &Seen) -> Result<String> {
    let names: Vec<String> = Verifier::ALL.iter().map(|verifier| verifier.name()).collect::<Result<_>>()?;
    let mut table = head(&[&["algorithm, key".to_owned(), "written".to_owned()][..], &names].concat());
    let mut notes = Notes::default();
    for (row, written) in WRITTEN.iter().enumerate() {
        write!(table, "| {} |", written.title())?;
        for column in 0..Verifier::ALL.len() {
            // Where it is refused, by the words that say so.
            let mut refused: BTreeMap<&str, Vec<(usize, Referrers)>> = BTreeMap::new();
            for place in 0..ASKED.len() {
                for (cell, registry) in seen[&(row, column, place)].iter().zip(REGISTRIES) {
                    if let Some(words) = cell {
                        refused.entry(words).or_default().push((place, registry));
                    }
                }
            }
            let everywhere = refused.values().map(Vec::len).sum::<usize>() == ASKED.len() * REGISTRIES.len();
            let mut refused: Vec<_> = refused.into_iter().collect();
            refused.sort_by_key(|(_, places)| Reverse(places.len()));
            let said = |(words, places): &(&str, Vec<_>)| format!("{}: {}", joined(places), quoted(words));
            let mut texts = refused.iter().map(said).collect::<Vec<_>>();
            match refused.first() {
                None => table.push_str(" yes |"),
                Some((words, _)) if everywhere => {
                    texts[0] = quoted(words);
                    write!(table, " no ({}) |", notes.number(texts.join("; ")))?;
                }
                Some(_) => write!(table, " yes, but ({}) |", notes.number(format!("not {}", texts.join("; "))))?,
            }
        }
        table.push('\n');
    }
    Ok(format!("{table}\n{}", notes.list()))
}

/// `an index by tag at docker-registry`, or without the registry where it is said of each.
fn joined(places: &[(usize, Referrers)]) -> String {
    let mut texts = vec![];
    for (place, asked) in ASKED.iter().enumerate() {
        let at: Vec<_> = places.iter().filter(|(other, _)| *other == place).map(|(_, registry)| *registry).collect();
        if at == REGISTRIES {
            texts.push((*asked).to_owned());
        } else {
            texts.extend(at.iter().map(|registry| format!("{asked} at {}", registry_name(*registry))));
        }
    }
    texts.join(", ")
}

/// The page with every cell: a table for each verifier.
fn long(seen: &Seen) -> Result<String> {
    let mut page = "# What each verifier says of each signature\n\n\
        Written by integration-tests/tests/matrix.rs, which ran every cell, at docker-registry 2.8 (fallback tag) and at ferro-oci-server 1.0 \
        (referrers API); where they differ, both are told. A *no* quotes the verifier, or says that there \
        was nothing to ask it about.\n"
        .to_owned();
    let mut notes = Notes::default();
    for (column, verifier) in Verifier::ALL.iter().enumerate() {
        let columns: Vec<String> = ["algorithm, key", "written"].iter().chain(&ASKED).map(|&name| name.to_owned()).collect();
        write!(page, "\n## {}\n\n{}\n\n{}", verifier.name()?, verifier.question(), head(&columns))?;
        for (row, written) in WRITTEN.iter().enumerate() {
            write!(page, "| {} |", written.title())?;
            for place in 0..ASKED.len() {
                let mut word = |cell: &Cell| match cell {
                    Some(words) => format!("no ({})", notes.number(quoted(words))),
                    None => "yes".to_owned(),
                };
                let words: Vec<String> = seen[&(row, column, place)].iter().map(&mut word).collect();
                if words.iter().all(|word| *word == words[0]) {
                    write!(page, " {} |", words[0])?;
                } else {
                    let named =
                        words.iter().zip(REGISTRIES).map(|(word, registry)| format!("{}: {word}", registry_name(registry)));
                    write!(page, " {} |", named.collect::<Vec<_>>().join("; "))?;
                }
            }
            page.push('\n');
        }
    }
    Ok(format!("{page}\n## In their words\n\n{}", notes.list()))
}

#[tokio::test]
async fn the_readme_shows_what_every_verifier_says_of_every_format() -> Result<()> {
    let seen = run().await?;
    let top: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("");
    let readme = fs::read_to_string(top.join("README.md"))?;
    let (before, rest) = readme.split_once(BEGIN).context("the README has no matrix")?;
    let (_, after) = rest.split_once(END).context("the README's matrix has no end")?;
    let expected =
        [("README.md", format!("{before}{BEGIN}\n{}{END}{after}", short(&seen)?)), ("docs/verifiers.md", long(&seen)?)];
    for (name, text) in expected {
        if std::env::var_os("BLESS").is_some() {
            fs::write(top.join(name), text)?;
        } else {
            assert_eq!(
                fs::read_to_string(top.join(name))?,
                text,
                "{name} shows another table than was seen: BLESS=1 writes it anew"
            );
        }
    }
    Ok(())
}
