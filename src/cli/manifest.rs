//! `countersign verify -f` and `countersign resolve -f`: manifests, judged as the admission webhook would.

use std::{
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use serde::Serialize;
use tokio::time::Instant;

use super::{ManifestArgs, Output, Usage, output};
use crate::{
    admission::{
        Image, Judge, MOST_IMAGES, Terms, Verdict, Why,
        manifest::{self, Change, Object},
        of_image, shown,
    },
    app,
    clock::Clock,
    config::Config,
    oci::{Reference, Tag},
    policy::{Bound, Mode},
};

/// Manifests of whole clusters are some megabytes.
const LARGEST: u64 = 64 << 20;
/// Nobody waits for an API server here.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is to be said of one object.
#[derive(Debug, Serialize)]
struct Line {
    file: String,
    kind: String,
    name: String,
    namespace: String,
    /// How many policies are in force there.
    policies: usize,
    /// Whether the webhook would admit it.
    admitted: bool,
    images: Vec<ImageLine>,
}

/// What is to be said of one image.
#[derive(Debug, Serialize)]
pub(super) struct ImageLine {
    image: String,
    attested: bool,
    /// Policies that it does not meet.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unmet: Vec<UnmetLine>,
    /// The same for people.
    #[serde(skip)]
    pub text: String,
}

#[derive(Debug, Serialize)]
struct UnmetLine {
    policy: String,
    mode: Mode,
    reason: &'static str,
    message: String,
}

/// One object with what became of its images.
struct Judged {
    object: Object,
    namespace: String,
    policies: usize,
    images: Vec<Image>,
    verdicts: Vec<Verdict>,
}

/// Says what a cluster would. 0 if all would be admitted.
pub async fn verify(config: &Config, clock: &Clock, args: &ManifestArgs, output: Output) -> anyhow::Result<ExitCode> {
    let judge = judge(config, clock, args)?;
    let mut lines = vec![];
    for file in &args.files {
        let text = read(file)?;
        for judged in examine(&judge, &text, args).await.with_context(|| file.display().to_string())? {
            lines.push(line(file, &judged));
        }
    }
    let admitted = lines.iter().all(|line| line.admitted);
    output::print(output, &lines, |lines| lines.iter().map(render).collect::<Vec<_>>().join("\n"));
    Ok(if admitted { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Prints the manifests with their tags pinned to the digests that verified. 1, and nothing printed, if one did not.
pub async fn resolve(config: &Config, clock: &Clock, args: &ManifestArgs) -> anyhow::Result<ExitCode> {
    let judge = judge(config, clock, args)?;
    let mut pinned = String::new();
    let mut failed = false;
    for file in &args.files {
        let text = read(file)?;
        let judged = examine(&judge, &text, args).await.with_context(|| file.display().to_string())?;
        let mut changes = vec![];
        for one in &judged {
            for image in &one.images {
                let verdict = one.verdicts.iter().find(|verdict| verdict.text == image.text).expect("each text is judged");
                match pin(&judge, verdict).await? {
                    Pin::To(reference) => changes.push(Change {
                        object: &one.object,
                        pointer: &image.pointer,
                        before: &image.text,
                        after: reference.to_string(),
                    }),
                    Pin::Not => {}
                    Pin::Unmet => {
                        failed = true;
                        eprintln!("{}: {}", file.display(), of_image(verdict, verdict.enforced()));
                    }
                }
            }
        }
        let text = manifest::replace(&text, &changes).with_context(|| file.display().to_string())?;
        if !pinned.is_empty() && !text.starts_with("---") {
            pinned.push_str("---\n");
        }
        pinned.push_str(&text);
    }
    if failed {
        return Ok(ExitCode::from(1));
    }
    print!("{pinned}");
    Ok(ExitCode::SUCCESS)
}

enum Pin {
    To(Reference),
    /// It has a digest, or nothing is known here of its registry, and no policy demands anything.
    Not,
    Unmet,
}

async fn pin(judge: &Judge, verdict: &Verdict) -> anyhow::Result<Pin> {
    if let Some(pinned) = &verdict.pinned {
        return Ok(Pin::To(pinned.clone()));
    }
    // A policy that denies tags has nothing against the digest that it is about to get.
    let is_only_tag = |why: &Why| matches!(why, Why::Tag { otherwise: None, .. });
    if !verdict.enforced().all(|unmet| is_only_tag(&unmet.why)) {
        return Ok(Pin::Unmet);
    }
    let looked_at = verdict.unmet.iter().find_map(|unmet| match &unmet.why {
        Why::Tag { pinned, .. } => Some(&**pinned),
        _ => None,
    });
    if let Some(pinned) = looked_at {
        return Ok(Pin::To(pinned.clone()));
    }
    let Ok(mut image) = verdict.text.parse::<Reference>() else { return Ok(Pin::Not) };
    if image.digest.is_some() || !judge.examiner.knows(&image.registry) || judge.allow.hold(&image) {
        return Ok(Pin::Not);
    }
    image.tag.get_or_insert_with(Tag::latest);
    let digest =
        judge.examiner.resolve(&image, None).await.with_context(|| format!("{image}: the registry could not be asked"))?;
    image.digest = Some(digest.ok_or_else(|| anyhow!("{image}: the registry has no such image"))?);
    Ok(Pin::To(image))
}

fn judge(config: &Config, clock: &Clock, args: &ManifestArgs) -> anyhow::Result<Judge> {
    let cluster = args.cluster.as_deref().or(config.admission.cluster.as_deref());
    let judge = app::judge(config, clock, None, cluster)?;
    if judge.policies.all().is_empty() {
        eprintln!("warning: no [[policy]] is enabled here: nothing is demanded of any image");
    }
    Ok(judge)
}

async fn examine(judge: &Judge, text: &str, args: &ManifestArgs) -> anyhow::Result<Vec<Judged>> {
    let mut judged = vec![];
    for object in manifest::objects(text)? {
        let Some(workload) = judge.kinds.read(&object.kind, &object.content)? else { continue };
        let namespace = args.namespace.clone().or_else(|| object.namespace.clone()).unwrap_or_else(|| "default".to_owned());
        let policies: Vec<Arc<Bound>> = judge.policies.of(&namespace);
        let terms = Terms { pins: true, fresh: false, deadline: Instant::now() + PATIENCE, patience: PATIENCE, logins: None };
        let texts = workload.images.iter().map(|image| image.text.as_str());
        let Some(verdicts) = judge.images(texts, &policies, terms).await else {
            return Err(anyhow!("{} {} has more than {MOST_IMAGES} different images", object.kind.kind, shown(&object.name)));
        };
        judged.push(Judged { object, namespace, policies: policies.len(), images: workload.images, verdicts });
    }
    Ok(judged)
}

fn line(file: &Path, judged: &Judged) -> Line {
    Line {
        file: file.display().to_string(),
        kind: judged.object.kind.kind.clone(),
        name: judged.object.name.clone(),
        namespace: judged.namespace.clone(),
        policies: judged.policies,
        admitted: judged.verdicts.iter().all(|verdict| verdict.enforced().next().is_none()),
        images: judged.verdicts.iter().map(ImageLine::from).collect(),
    }
}

impl From<&Verdict> for ImageLine {
    fn from(verdict: &Verdict) -> Self {
        let unmet = verdict.unmet.iter().map(|unmet| UnmetLine {
            policy: unmet.bound.policy.name.clone(),
            mode: unmet.bound.policy.mode,
            reason: unmet.why.name(),
            message: unmet.why.to_string(),
        });
        let attested = verdict.unmet.is_empty();
        let text = if attested {
            format!("image {} is attested", shown(&verdict.text))
        } else {
            of_image(verdict, verdict.unmet.iter())
        };
        Self { image: shown(&verdict.text), attested, unmet: unmet.collect(), text }
    }
}

fn render(line: &Line) -> String {
    let Line { file, kind, name, namespace, .. } = line;
    let (kind, name, namespace) = (shown(kind), shown(name), shown(namespace));
    let admitted = match (line.admitted, line.policies) {
        (true, 0) => "admitted: no policy is in force there",
        (true, _) => "admitted",
        (false, _) => "denied",
    };
    let mut text = format!("{file}: {kind} {namespace}/{name}: {admitted}");
    if line.policies > 0 {
        for image in &line.images {
            text.push_str(&format!("\n  {}", image.text.replace('\n', "\n  ")));
        }
    }
    text
}

/// `-` is standard input.
fn read(file: &PathBuf) -> anyhow::Result<String> {
    let mut text = String::new();
    let bounded = |reader: &mut dyn std::io::Read, text: &mut String| reader.take(LARGEST + 1).read_to_string(text);
    let read = if file.as_os_str() == "-" {
        bounded(&mut std::io::stdin().lock(), &mut text)
    } else {
        fs::File::open(file).and_then(|mut file| bounded(&mut file, &mut text))
    };
    read.map_err(|error| Usage(format!("{}: {error}", file.display())))?;
    if text.len() as u64 > LARGEST {
        return Err(Usage(format!("{}: it is larger than {LARGEST} bytes", file.display())).into());
    }
    Ok(text)
}
