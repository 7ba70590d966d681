//! Which verifier reads which of our signatures, run for real: the table in the README is what this test saw.
//!
//! `BLESS=1 cargo test -p integration-tests --test matrix` writes the table anew. A further verifier is a line in `Verifier::ALL` and
//! an arm in `Signed::ask`; a further format, or several written together, is a line in `WRITTEN`.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use integration_tests::house::{House, Keys, Plan, TOKEN, rule_of_all_formats};
use integration_tests::image::Image;
use integration_tests::process::{eventually, tool};
use integration_tests::registry::Options;
use integration_tests::verifier::{Cosign, Ruling, Skopeo};
use reqwest::StatusCode;

const LIMIT: Duration = Duration::from_secs(120);
const AT_ONCE: usize = 3;
const BEGIN: &str = "<!-- the matrix: written by integration-tests/tests/matrix.rs -->";
const END: &str = "<!-- the end of the matrix -->";

/// What one rule writes.
struct Written {
    /// The namespace that it is about.
    name: &'static str,
    /// `formats` in the rule.
    formats: &'static [&'static str],
}

const WRITTEN: &[Written] = &[
    Written { name: "cosign", formats: &["cosign"] },
    Written { name: "bundle", formats: &["bundle"] },
    Written { name: "both", formats: &["cosign", "bundle"] },
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verifier {
    Countersign,
    Cosign2,
    Cosign3,
    Skopeo,
}

impl Verifier {
    const ALL: &[Self] = &[Self::Countersign, Self::Cosign2, Self::Cosign3, Self::Skopeo];

    /// With the version that is run.
    fn name(self) -> Result<String> {
        Ok(match self {
            Self::Countersign => "countersign".to_owned(),
            Self::Cosign2 => format!("cosign {}", installed("cosign-2")?),
            Self::Cosign3 => format!("cosign {}", installed("cosign-3")?),
            Self::Skopeo => format!("skopeo {}", installed("skopeo")?),
        })
    }
}

/// `1.18` of what `make tools` unpacked as `skopeo 1.18.0+ds1-1 of Debian trixie`.
fn installed(name: &str) -> Result<String> {
    let text = fs::read_to_string(tool(name)?.join("VERSION"))?;
    let version = text.split_whitespace().nth(1).with_context(|| format!("no version in {text:?}"))?;
    Ok(version.split('.').take(2).collect::<Vec<_>>().join("."))
}

/// By what an image is asked for.
const ASKED: [&str; 5] = ["an image by tag", "by digest", "an index by tag", "by digest", "its platform by digest"];

/// Where, and signed with which keys: each cell is run in all of these.
const SETTINGS: [(bool, Keys); 4] = [(false, Keys::Rsa2048), (false, Keys::P256), (true, Keys::Rsa2048), (true, Keys::P256)];

fn setting_name((referrers_api, keys): (bool, Keys)) -> String {
    let registry = if referrers_api { "ferro-oci-server" } else { "docker-registry" };
    let keys = match keys {
        Keys::P256 => "P-256",
        Keys::Rsa2048 => "RSA",
    };
    format!("{keys} at {registry}")
}

/// An installation with images signed in every way of [`WRITTEN`].
struct Signed {
    house: House,
    setting: (bool, Keys),
    image: Image,
    index: Image,
}

impl Signed {
    async fn start(setting @ (referrers_api, keys): (bool, Keys)) -> Result<Self> {
        let registry = Options { referrers_api, ..Options::default() };
        let rules = WRITTEN
            .iter()
            .map(|Written { name, formats }| format!("{}formats = {formats:?}\n\n", rule_of_all_formats(name, name, keys)));
        let rules = Some(rules.collect());
        let house = House::start(Plan { keys, registry, rules, ..Plan::default() }).await?;
        let signed = Self { house, setting, image: Image::oci("matrix")?, index: Image::index("matrix")? };
        for written in WRITTEN {
            signed.sign(written, "image", &signed.image).await?;
            signed.sign(written, "index", &signed.index).await?;
        }
        Ok(signed)
    }

    async fn sign(&self, written: &Written, name: &str, image: &Image) -> Result<()> {
        let repository = format!("{}/{name}", written.name);
        self.house.push(image, &repository, &["1.0"]).await?;
        let event = House::event(&self.house.registry.host(), &repository, Some("1.0"), &image.manifest.digest);
        ensure!(self.house.notify(Some(TOKEN), &event).await? == StatusCode::ACCEPTED);
        let reference = self.house.reference(&repository, "1.0");
        eventually(&format!("{reference} is signed"), LIMIT, async || {
            let answer = self.house.run(&["verify", &reference, "--output", "json"]).await?.json()?;
            let found = answer[0]["signatures"].as_array().context("no signatures")?;
            let is_there = |format: &str| found.iter().any(|one| one["format"] == format && one["verdict"] == "verified");
            Ok(written.formats.iter().all(|format| is_there(format)).then_some(()))
        })
        .await?;
        // The children come with the index, but not before it.
        self.house.wait_settled(1, LIMIT).await.map(drop)
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

    async fn ask(&self, verifier: Verifier, reference: &str) -> Result<Ruling> {
        let (key, host) = (self.house.public_key_path(), self.house.registry.host());
        match verifier {
            Verifier::Countersign => {
                let output = self.house.run(&["verify", reference]).await?;
                ensure!(matches!(output.code, Some(0 | 1)), "{output:?}");
                Ok(Ruling { accepted: output.code == Some(0), words: output.stdout + &output.stderr })
            }
            Verifier::Cosign2 => Cosign::V2.verify(&key, reference).await,
            Verifier::Cosign3 => Cosign::V3.verify(&key, reference).await,
            Verifier::Skopeo => Skopeo::requiring(&key, &host)?.architecture("amd64").copy(reference).await,
        }
    }

    /// What was said, without what differs from run to run.
    fn without_names(&self, words: &str) -> String {
        let mut text = words.replace(&self.house.registry.host(), "HOST");
        for written in WRITTEN {
            text = text.replace(&format!("{}/image", written.name), "IMAGE").replace(&format!("{}/index", written.name), "IMAGE");
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
    let is_reason =
        |line: &&str| ["Error: ", "level=fatal", "it has no signatures", "does not count"].iter().any(|mark| line.contains(mark));
    let line = words.lines().find(is_reason).or_else(|| words.lines().next_back()).unwrap_or_default().trim();
    let line = line.split_once("msg=").map_or(line, |(_, message)| message.trim_matches('"'));
    let line = line.trim_start_matches("Error: ").trim_start_matches("copying system image from manifest list: ");
    match line.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}

/// One run: None if it was accepted, otherwise why not.
type Cell = Option<String>;

/// One line of the table: each cell in each of [`SETTINGS`].
struct Line {
    verifier: Verifier,
    written: &'static Written,
    cells: Vec<Vec<Cell>>,
}

async fn run() -> Result<Vec<Line>> {
    let mut lines: Vec<Line> = Verifier::ALL
        .iter()
        .flat_map(|verifier| {
            WRITTEN.iter().map(|written| Line { verifier: *verifier, written, cells: vec![vec![]; ASKED.len()] })
        })
        .collect();
    for setting in SETTINGS {
        let signed = Signed::start(setting).await?;
        let asked: Vec<(usize, usize, Verifier, String)> = lines
            .iter()
            .enumerate()
            .flat_map(|(row, line)| {
                let references = signed.references(line.written).into_iter().enumerate();
                references.map(move |(column, reference)| (row, column, line.verifier, reference))
            })
            .collect();
        let answers: Vec<(usize, usize, Cell)> = stream::iter(asked)
            .map(async |(row, column, verifier, reference)| {
                let Ruling { accepted, words } = signed.ask(verifier, &reference).await?;
                anyhow::Ok((row, column, (!accepted).then(|| refusal(&signed.without_names(&words)))))
            })
            .buffered(AT_ONCE)
            .try_collect()
            .await
            .with_context(|| setting_name(signed.setting))?;
        for (row, column, cell) in answers {
            lines[row].cells[column].push(cell);
        }
    }
    Ok(lines)
}

/// The table and its notes.
fn render(lines: &[Line]) -> Result<String> {
    let mut notes: Vec<String> = vec![];
    let mut note = |why: &str| {
        let at = notes.iter().position(|known| known == why).unwrap_or_else(|| {
            notes.push(why.to_owned());
            notes.len() - 1
        });
        format!("no ({})", at + 1)
    };
    let mut table = format!("| verifier | written | {} |\n|{}\n", ASKED.join(" | "), " --- |".repeat(ASKED.len() + 2));
    for Line { verifier, written, cells } in lines {
        write!(table, "| {} | `{}` |", verifier.name()?, written.formats.join("`, `"))?;
        for runs in cells {
            let mut word = |cell: &Cell| cell.as_deref().map_or_else(|| "yes".to_owned(), &mut note);
            let words: Vec<String> = runs.iter().map(&mut word).collect();
            if words.iter().all(|word| *word == words[0]) {
                write!(table, " {} |", words[0])?;
            } else {
                let named = words.iter().zip(SETTINGS).map(|(word, setting)| format!("{}: {word}", setting_name(setting)));
                write!(table, " {} |", named.collect::<Vec<_>>().join("; "))?;
            }
        }
        table.push('\n');
    }
    table.push('\n');
    for (at, note) in notes.iter().enumerate() {
        writeln!(table, "{}. `{note}`", at + 1)?;
    }
    Ok(table)
}

#[tokio::test]
async fn the_readme_shows_what_every_verifier_says_of_every_format() -> Result<()> {
    let table = render(&run().await?)?;
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("README.md");
    let readme = fs::read_to_string(&path)?;
    let (before, rest) = readme.split_once(BEGIN).context("the README has no matrix")?;
    let (shown, after) = rest.split_once(END).context("the README's matrix has no end")?;
    let expected = format!("\n{table}");
    if std::env::var_os("BLESS").is_some() {
        fs::write(&path, format!("{before}{BEGIN}{expected}{END}{after}"))?;
    } else {
        assert_eq!(shown, expected, "the README shows another table than was seen: BLESS=1 writes it anew");
    }
    Ok(())
}
