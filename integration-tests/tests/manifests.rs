//! `countersign verify -f` and `countersign resolve -f`: CI judges manifests by the policies that a cluster has.

use std::fs;

use anyhow::Result;
use integration_tests::daemon::{Output, run};
use integration_tests::house::{House, Plan};
use integration_tests::image::Image;
use integration_tests::process::scratch;
use integration_tests::webhook::{POLICY, Webhook, witnessed};
use serde_json::json;
use tempfile::TempDir;

/// A signed image in `team/app:1.0`, an unsigned one in `other/app:1.0`, and a folder.
struct Scene {
    house: House,
    folder: TempDir,
    signed: Image,
    unsigned: Image,
}

impl Scene {
    async fn set() -> Result<Self> {
        let house = House::start(Plan::default()).await?;
        let (signed, unsigned) = (Image::oci("signed")?, Image::oci("unsigned")?);
        house.push(&signed, "team/app", &["1.0"]).await?;
        house.push(&unsigned, "other/app", &["1.0"]).await?;
        house.wait_signed("team/app", &signed.manifest.digest, &["1.0"]).await?;
        Ok(Self { house, folder: scratch()?, signed, unsigned })
    }

    /// Writes a file, folders before it included.
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.folder.path().join(name);
        fs::create_dir_all(path.parent().expect("it is in the folder"))?;
        Ok(fs::write(path, text)?)
    }

    /// Runs a command with the house's registry and no policy; words that begin with `@` are files of the folder.
    async fn run(&self, line: &str) -> Result<Output> {
        let (host, url) = (self.house.registry.host(), self.house.registry.url());
        self.write("ci.toml", &format!("[[registry]]\nname = \"{host}\"\nurl = \"{url}\"\n"))?;
        let place = |word: &str| match word.strip_prefix('@') {
            Some(name) => self.folder.path().join(name).display().to_string(),
            None => word.to_owned(),
        };
        let words: Vec<String> = line.split(' ').chain(["--config", "@ci.toml"]).map(place).collect();
        run(&words.iter().map(String::as_str).collect::<Vec<_>>(), &[]).await
    }

    fn pod(&self, digest_of: &Image, repository: &str) -> String {
        let image = self.house.reference(repository, &digest_of.manifest.digest);
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: payments}}\nspec:\n  containers:\n  - name: web\n    image: {image}\n"
        )
    }

    fn witness(&self) -> Result<String> {
        let pem = fs::read_to_string(self.house.public_key_path())?.trim_end().replace('\n', "\n    ");
        Ok(format!(
            "apiVersion: countersign.dev/v1\nkind: Witness\nmetadata: {{name: release}}\nspec:\n  publicKey: |\n    {pem}\n"
        ))
    }
}

fn policy(name: &str, spec: &str) -> String {
    format!("apiVersion: countersign.dev/v1\nkind: SecurityPolicy\nmetadata: {{name: {name}}}\nspec: {{{spec}, enabled: true}}\n")
}

#[tokio::test]
async fn manifests_are_judged_and_pinned_on_the_command_line_by_the_same_policies() -> Result<()> {
    let Scene { house, folder, signed, unsigned } = Scene::set().await?;
    let digest = &signed.manifest.digest;
    let webhook = Webhook::start(&witnessed(&house, POLICY)).await?;
    let (tag, other) = (house.reference("team/app", "1.0"), house.reference("other/app", "1.0"));
    let manifest = |name: &str, image: &str| -> Result<String> {
        let path = folder.path().join(name);
        fs::write(
            &path,
            format!(
                "# The web.\napiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: web, namespace: payments}}\nspec:\n  \
                 template:\n    spec:\n      containers:\n      - name: web\n        image: {image} # this one\n---\n\
                 apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: c}}\n"
            ),
        )?;
        Ok(path.to_str().expect("a text").to_owned())
    };
    let by_tag = manifest("tag.yaml", &tag)?;
    let judged = webhook.run(&["verify", "-f", &by_tag]).await?.expect_code(1)?;
    assert!(judged.stdout.contains(&format!("image {tag} is not attested\n")), "{judged:?}");

    let resolved = webhook.run(&["resolve", "-f", &by_tag]).await?.expect_code(0)?;
    let expected = fs::read_to_string(&by_tag)?.replace(&tag, &format!("{tag}@{digest}"));
    assert_eq!(resolved.stdout, expected);
    let pinned = folder.path().join("pinned.yaml");
    fs::write(&pinned, &resolved.stdout)?;
    let pinned = pinned.to_str().expect("a text");
    let judged = webhook.run(&["verify", "-f", pinned, "--output", "json"]).await?.expect_code(0)?.json()?;
    assert_eq!((&judged[0]["admitted"], &judged[0]["images"][0]["attested"]), (&json!(true), &json!(true)));

    let refused = webhook.run(&["resolve", "-f", &manifest("other.yaml", &other)?]).await?.expect_code(1)?;
    assert!(refused.stdout.is_empty() && refused.stderr.contains("is not attested"), "{refused:?}");
    // Where nothing is demanded, tags are pinned all the same.
    let elsewhere = webhook.run(&["resolve", "-n", "default", "-f", &manifest("other.yaml", &other)?]).await?.expect_code(0)?;
    assert!(elsewhere.stdout.contains(&format!("{other}@{}", unsigned.manifest.digest)), "{elsewhere:?}");
    webhook.run(&["verify", "-n", "default", "-f", &by_tag]).await?.expect_code(0)?;
    webhook.run(&["verify", "-f", "/nonexistent"]).await?.expect_code(2)?;
    Ok(())
}

#[tokio::test]
async fn policies_that_are_resources_count_as_they_do_in_a_cluster_that_has_them() -> Result<()> {
    let scene = Scene::set().await?;
    let (signed, unsigned) = (scene.pod(&scene.signed, "team/app"), scene.pod(&scene.unsigned, "other/app"));
    let payments = policy("payments", "witness: release, namespace: payments");
    scene.write("signed.yaml", &signed)?;
    scene.write("unsigned.yaml", &unsigned)?;
    scene.write("policies/witness.yml", &scene.witness()?)?;
    scene.write(
        "policies/payments.yaml",
        &format!("# Ours.\n---\n{payments}---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: payments}}\n"),
    )?;
    scene.write("policies/README", "no manifest")?;

    let nothing = scene.run("verify -f @unsigned.yaml").await?.expect_code(0)?;
    assert!(nothing.stderr.starts_with("warning: no policy is enabled here"), "{nothing:?}");
    scene.run("verify -f @signed.yaml --policies @policies").await?.expect_code(0)?;
    let denied =
        scene.run("verify -f @unsigned.yaml --policies @policies/witness.yml --policies @policies").await?.expect_code(1)?;
    let why = "is not attested\n    policy payments: it is not signed, and witness release must have signed it\n";
    assert!(denied.stdout.contains(why) && denied.stderr.is_empty(), "{denied:?}");

    // As they are applied together.
    scene.write("all.yaml", &[scene.witness()?, payments.clone(), unsigned.clone()].join("---\n"))?;
    let denied = scene.run("verify -f @all.yaml").await?.expect_code(1)?;
    assert!(denied.stdout.contains(why), "{denied:?}");
    // As `kubectl get --output=yaml` writes them, with what a cluster adds.
    let listed: Vec<_> = [scene.witness()?, payments].map(|text| format!("- {}", text.trim_end().replace('\n', "\n  "))).into();
    let listed = format!("apiVersion: v1\nkind: List\nitems:\n{}\n", listed.join("\n"));
    let listed = listed.replace(
        "{name: payments}",
        "{name: payments, uid: 705ab4f5-abcd, generation: 2, creationTimestamp: 2026-11-22T12:00:00Z}",
    );
    scene.write("listed.yaml", &listed)?;
    scene.run("verify -f @unsigned.yaml --policies @listed.yaml").await?.expect_code(1)?;

    // A policy that resolves tags has them pinned, and stays as it is.
    let by_tag = signed.replace(&format!("@{}", scene.signed.manifest.digest), ":1.0");
    let resolving = policy("payments", "witness: release, namespace: payments, cluster: prod-eu, tags: resolve");
    scene.write("tag.yaml", &format!("{by_tag}---\n{resolving}"))?;
    let resolved = scene.run("resolve -f @tag.yaml --policies @policies/witness.yml --cluster prod-eu").await?.expect_code(0)?;
    let pinned = by_tag.replace(":1.0\n", &format!(":1.0@{}\n", scene.signed.manifest.digest));
    assert_eq!(resolved.stdout, format!("{pinned}---\n{resolving}"));
    Ok(())
}

#[tokio::test]
async fn what_is_wrong_with_a_file_is_said_with_its_document_and_field() -> Result<()> {
    let scene = Scene::set().await?;
    scene.write("pod.yaml", &scene.pod(&scene.signed, "team/app"))?;
    let late = policy("late", "witness: release, namespace: late, maxAge: soon");
    let lost = policy("lost", "witness: relaese, namespace: lost");
    scene.write("policies.yaml", &[scene.witness()?, late, lost].join("---\n"))?;
    scene.write("old.yaml", &policy("old", "witness: release, namespace: old").replace("/v1", "/v1alpha1"))?;
    let refused = scene.run("verify -f @pod.yaml --policies @policies.yaml --policies @old.yaml").await?.expect_code(2)?;
    for (file, what) in [
        ("policies.yaml", "document 2: SecurityPolicy late: `maxAge`: \"soon\" is no length of time"),
        (
            "policies.yaml",
            "document 3: SecurityPolicy lost: `witness`: no Witness is named \"relaese\": did you mean \"release\"?",
        ),
        ("old.yaml", "document 1: SecurityPolicy old: `apiVersion`: there is no version \"v1alpha1\": write countersign.dev/v1"),
    ] {
        let line = format!("{}: {what}", scene.folder.path().join(file).display());
        assert!(refused.stderr.contains(&line), "{line}: {refused:?}");
    }

    scene.write("broken.yaml", "a: [")?;
    scene.write("text.yaml", "just: text")?;
    scene.write("odd.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: odd}\nspec: {containers: 7}\n")?;
    scene.write("empty/README", "")?;
    scene.write("nothing.yaml", "---\n")?;
    for (line, what) in [
        ("verify -f @broken.yaml", "broken.yaml: it is no YAML"),
        ("verify -f @text.yaml", "text.yaml: document 1 is no Kubernetes object"),
        ("resolve -f @odd.yaml", "odd.yaml: document 1: Pod odd: "),
        ("verify -f @empty", "there is no file *.json, *.yaml, *.yml in this folder"),
        ("verify -f @pod.yaml --policies @nowhere", "nowhere: No such file"),
        ("verify --policies @policies.yaml example.com/app:1", "cannot be used with"),
        ("verify --cluster prod-eu example.com/app:1", "cannot be used with"),
        ("resolve --policies @policies.yaml", "--filename"),
        ("resolve", "--filename"),
    ] {
        let refused = scene.run(line).await?.expect_code(2)?;
        assert!(refused.stderr.contains(what), "{line}: {refused:?}");
    }
    let rollout = scene.pod(&scene.unsigned, "other/app").replace("v1\nkind: Pod", "argoproj.io/v1\nkind: Rollout");
    scene.write("rollout.yaml", &rollout)?;
    for (line, what) in [
        ("verify -f @nothing.yaml", "warning: there was nothing to judge"),
        ("verify -f @rollout.yaml", "rollout.yaml: document 1: Rollout web: countersign does not know where its pods are"),
    ] {
        let warned = scene.run(line).await?.expect_code(0)?;
        assert!(warned.stderr.contains(what), "{line}: {warned:?}");
    }
    let none = scene.run("verify -f @pod.yaml --policies @pod.yaml").await?.expect_code(0)?;
    assert!(none.stderr.contains("warning: no SecurityPolicy and no Witness is in what --policies names"), "{none:?}");
    Ok(())
}
