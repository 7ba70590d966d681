//! `countersign verify -f` and `countersign resolve -f`: manifests, judged as the admission webhook would.

mod files;

use std::{path::Path, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context as _, anyhow};
use serde::Serialize;
use tokio::time::Instant;

use self::files::{Manifest, read_all};
use super::{ManifestArgs, Output, Usage, output};
use crate::{
    admission::{
        GivenResources, Image, Judge, MOST_IMAGES, Terms, Verdict, Why, chain,
        manifest::{self, Change, Object},
        of_image, shown,
    },
    app,
    clock::Clock,
    config::Config,
    oci::{Reference, Tag},
    policy::{Bound, Mode},
};

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
struct Judged<'a> {
    object: &'a Object,
    namespace: String,
    policies: usize,
    images: Vec<Image>,
    verdicts: Vec<Verdict>,
}

/// Says what a cluster would. 0 if all would be admitted.
pub async fn verify(config: &Config, clock: &Clock, args: &ManifestArgs, output: Output) -> anyhow::Result<ExitCode> {
    let manifests = read_all(&args.files)?;
    let judge = judge(config, clock, args, &manifests)?;
    let mut lines = vec![];
    for manifest in &manifests {
        for judged in examine(&judge, manifest, args).await? {
            lines.push(line(&manifest.path, &judged));
        }
    }
    if lines.is_empty() {
        eprintln!("warning: there was nothing to judge: no object in these manifests runs an image");
    }
    let admitted = lines.iter().all(|line| line.admitted);
    output::print(output, &lines, |lines| lines.iter().map(render).collect::<Vec<_>>().join("\n"));
    Ok(if admitted { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Prints the manifests with their tags pinned to the digests that verified. 1, and nothing printed, if one did not.
pub async fn resolve(config: &Config, clock: &Clock, args: &ManifestArgs) -> anyhow::Result<ExitCode> {
    let manifests = read_all(&args.files)?;
    let judge = judge(config, clock, args, &manifests)?;
    let mut pinned = String::new();
    let mut failed = false;
    for manifest in &manifests {
        let file = manifest.path.display();
        let judged = examine(&judge, manifest, args).await?;
        let mut changes = vec![];
        for one in &judged {
            for image in &one.images {
                let verdict = one.verdicts.iter().find(|verdict| verdict.text == image.text).expect("each text is judged");
                match pin(&judge, verdict).await? {
                    Pin::To(reference) => changes.push(Change {
                        object: one.object,
                        pointer: &image.pointer,
                        before: &image.text,
                        after: reference.to_string(),
                    }),
                    Pin::Not => {}
                    Pin::Unmet => {
                        failed = true;
                        eprintln!("{file}: {}", of_image(verdict, verdict.enforced()));
                    }
                }
            }
        }
        let text = manifest::replace(&manifest.text, &changes).map_err(|error| Usage(format!("{file}: {error}")))?;
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

/// By the policies of the configuration, and those that are given in manifests.
fn judge(config: &Config, clock: &Clock, args: &ManifestArgs, manifests: &[Manifest]) -> anyhow::Result<Judge> {
    let mut given = GivenResources::default();
    let mut take = |manifests: &[Manifest]| -> Vec<Result<bool, String>> {
        let objects = manifests.iter().flat_map(|manifest| manifest.objects.iter().map(|object| (&*manifest.path, object)));
        objects.map(|(path, object)| given.take(path, object)).collect()
    };
    let of_policies = take(&read_all(&args.policies)?);
    if !args.policies.is_empty() && of_policies.iter().all(|taken| *taken == Ok(false)) {
        eprintln!("warning: no SecurityPolicy and no Witness is in what --policies names");
    }
    let mut problems: Vec<_> = of_policies.into_iter().chain(take(manifests)).filter_map(Result::err).collect();
    let cluster = args.cluster.as_deref().or(config.admission.cluster.as_deref());
    let (judge, states) = app::judge(config, clock, cluster, &given.kept())?;
    problems.extend(states.iter().filter_map(|state| given.refusal(state)));
    if !problems.is_empty() {
        return Err(Usage(problems.join("\n")).into());
    }
    if judge.policies.all().is_empty() {
        eprintln!(
            "warning: no policy is enabled here: nothing is demanded of any image. Policies are the [[policy]]s of the \
             configuration, and the SecurityPolicy resources among the manifests and what --policies names"
        );
    }
    Ok(judge)
}

async fn examine<'a>(judge: &Judge, manifest: &'a Manifest, args: &ManifestArgs) -> anyhow::Result<Vec<Judged<'a>>> {
    let mut judged = vec![];
    for object in &manifest.objects {
        let wrong = |problem: String| {
            let (file, kind, name) = (manifest.path.display(), shown(&object.kind.kind), shown(&object.name));
            Usage(format!("{file}: {}: {kind} {name}: {problem}", object.place()))
        };
        let workload = judge.kinds.read(&object.kind, &object.content).map_err(|error| wrong(chain(&error)))?;
        let Some(workload) = workload else {
            if object.seems_to_run() {
                let Usage(said) = wrong("countersign does not know where its pods are: see [admission] kinds".to_owned());
                eprintln!("warning: {said}");
            }
            continue;
        };
        let namespace = args.namespace.clone().or_else(|| object.namespace.clone()).unwrap_or_else(|| "default".to_owned());
        let policies: Vec<Arc<Bound>> = judge.policies.of(&namespace);
        let terms = Terms { pins: true, fresh: false, deadline: Instant::now() + PATIENCE, patience: PATIENCE, logins: None };
        let texts = workload.images.iter().map(|image| image.text.as_str());
        let Some(verdicts) = judge.images(texts, &policies, terms).await else {
            return Err(wrong(format!("it has more than {MOST_IMAGES} different images")).into());
        };
        judged.push(Judged { object, namespace, policies: policies.len(), images: workload.images, verdicts });
    }
    Ok(judged)
}

fn line(file: &Path, judged: &Judged<'_>) -> Line {
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
