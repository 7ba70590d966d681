//! What a signature costs its registry in requests, and the least that writing one takes. Each event also has to ask for the image,
//! for what is there already, and at the end for what it has written: a signature is made of what the registry serves, once, and
//! `signed` is said of what was read back.

use std::time::Duration;

use anyhow::{Context, Result};
use integration_tests::formats::Referrers;
use integration_tests::house::{House, Keys, Plan, TOKEN, rule};
use integration_tests::image::Image;
use integration_tests::process::eventually;
use integration_tests::recorder::Recorder;
use integration_tests::registry::{Notify, Options};
use integration_tests::signature::tag_of;
use reqwest::Method;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);

const MANIFEST: usize = 1;

/// ferro-oci-server takes a blob with the POST; docker-registry, which has no referrers API, wants a PUT after it.
fn blob(kind: Referrers) -> usize {
    match kind {
        Referrers::Api => 1,
        Referrers::FallbackTag => 2,
    }
}

/// The least for writing one signature.
fn least(format: &str, kind: Referrers) -> usize {
    match kind {
        // The tag is read, and again right before it is written, because others write it too.
        _ if format == "cosign" => 1 + blob(kind) + 1 + MANIFEST,
        Referrers::Api => blob(kind) + MANIFEST,
        // And the index of referrers, read and written.
        Referrers::FallbackTag => blob(kind) + MANIFEST + 1 + MANIFEST,
    }
}

/// What one signature may cost: the image, a look (the `.sig` tag's is in the least), the writing, the look that reads it back.
fn allowed(format: &str, kind: Referrers) -> usize {
    let look = usize::from(format != "cosign");
    1 + look + least(format, kind) + 1
}

/// The same of several: there is one look at the `.sig` tag, and one at all referrers; and one write of an index.
fn allowed_for_all(formats: &[&str], kind: Referrers) -> usize {
    let each = |format: &str| if format == "cosign" { allowed(format, kind) - 1 } else { blob(kind) + MANIFEST };
    let once = |format: &str| allowed(format, kind) - 1 - each(format);
    let referrers = formats.iter().find(|format| **format != "cosign").map_or(0, |format| once(format));
    1 + referrers + formats.iter().map(|format| each(format)).sum::<usize>()
}

/// What one that is there may cost: the image, the `.sig`; or the list, and of each the manifest and the blob.
fn allowed_if_there(formats: &[&str]) -> usize {
    let cosign = usize::from(formats.contains(&"cosign"));
    let referrers = formats.len() - cosign;
    1 + cosign + usize::from(referrers > 0) + 2 * referrers
}

/// A daemon that writes these formats, and how often it has asked its registry.
struct Counted {
    house: House,
    kind: Referrers,
    recorder: Recorder,
}

impl Counted {
    async fn start(kind: Referrers, rules: String) -> Result<Self> {
        Self::start_with(kind, kind.registry(), rules).await
    }

    /// With a registry that tells nobody of pushes.
    async fn start_quiet(kind: Referrers, rules: String) -> Result<Self> {
        Self::start_with(kind, Options { notify: Some(Notify::nobody()), ..kind.registry() }, rules).await
    }

    async fn start_with(kind: Referrers, registry: Options, rules: String) -> Result<Self> {
        let registry = Options { count_requests: true, ..registry };
        let mut house = House::build(Plan { registry, rules: Some(rules), ..Plan::default() }).await?;
        let recorder = Recorder::start(&house.registry.host()).await?;
        house.route_registry(&recorder.url())?;
        house.daemon.start().await?;
        Ok(Self { house, kind, recorder })
    }

    /// How many requests handling this push takes.
    async fn push(&self, image: &Image, tag: &str) -> Result<usize> {
        let (before, events) = (self.count().await?, self.house.daemon.metrics().await?.received());
        self.kind.push(&self.house, image, "team/app", tag).await?;
        if self.kind == Referrers::FallbackTag {
            self.house.registry.wait_delivered(LIMIT).await?;
        }
        self.house.wait_settled(events + 1, LIMIT).await?;
        Ok(self.count().await? - before)
    }

    /// How many requests handling a push of all these tags takes, of which countersign hears in one notification.
    async fn push_tags(&self, image: &Image, tags: &[&str]) -> Result<usize> {
        let (before, events) = (self.count().await?, self.house.daemon.metrics().await?.received());
        self.house.push(image, "team/app", tags).await?;
        let host = self.house.registry.host();
        let mut notification = json!({ "events": [] });
        for tag in tags {
            let mut event = House::event(&host, "team/app", Some(tag), &image.manifest.digest);
            notification["events"].as_array_mut().context("a list")?.push(event["events"][0].take());
        }
        assert_eq!(self.house.notify(Some(TOKEN), &notification).await?, 202);
        self.house.wait_settled(events + u64::try_from(tags.len())?, LIMIT).await?;
        Ok(self.count().await? - before)
    }

    /// By the registry's own log; by what has passed on its way to a registry that has none.
    async fn count(&self) -> Result<usize> {
        let passed = self.recorder.exchanges().len();
        if self.kind == Referrers::FallbackTag {
            // It writes a request down when it has answered it.
            let logged = async || {
                let logged: usize = self.house.registry.count_requests("countersign/")?.values().sum();
                Ok((logged == passed).then_some(()))
            };
            eventually("the registry's log has all that has passed on its way there", LIMIT, logged).await?;
        }
        Ok(passed)
    }
}

async fn a_signature_costs_what_it_may(kind: Referrers) -> Result<()> {
    let all = ["cosign", "bundle", "notation", "notation-cose"];
    let each = all.iter().map(std::slice::from_ref);
    for formats in each.chain([&all[..2], &all[..]]) {
        let rules = rule("counted", "team", Keys::P256).replace("[\"cosign\"]", &format!("{formats:?}"));
        let counted = Counted::start(kind, rules).await?;
        // What a repository needs once (the config), and the registry (whether it has the API), comes with the first.
        counted.push(&Image::oci("first")?, "1").await?;
        let image = Image::oci("second")?;
        let (signed, there) = (counted.push(&image, "2").await?, counted.push(&image, "2").await?);
        let context = format!("{kind:?} {formats:?}: {:#?}", counted.recorder.exchanges());
        let limit = if let [format] = formats { allowed(format, kind) } else { allowed_for_all(formats, kind) };
        println!("{kind:?} {formats:?}: {signed} to sign ({limit} allowed), {there} if there");
        assert!(signed <= limit, "{signed} requests, and {limit} are allowed: {context}");
        assert!(there <= allowed_if_there(formats), "{there} requests for what is there: {context}");
    }
    Ok(())
}

#[tokio::test]
async fn a_signature_costs_what_it_may_with_the_fallback_tag() -> Result<()> {
    a_signature_costs_what_it_may(Referrers::FallbackTag).await
}

#[tokio::test]
async fn a_signature_costs_what_it_may_with_the_referrers_api() -> Result<()> {
    a_signature_costs_what_it_may(Referrers::Api).await
}

/// What the README and ARCHITECTURE.md say of it.
#[test]
fn what_it_may_cost_is_what_is_documented() {
    let both = |format| (allowed(format, Referrers::FallbackTag), allowed(format, Referrers::Api));
    assert_eq!([both("cosign"), both("bundle"), both("notation")], [(7, 6), (8, 5), (8, 5)]);
    assert_eq!(["cosign", "bundle"].map(|format| allowed_if_there(&[format])), [2, 4]);
    // The least that is known for each (with a second look at the `.sig` tag), whoever writes it.
    let writing = |format| (least(format, Referrers::FallbackTag), least(format, Referrers::Api));
    assert_eq!(["cosign", "bundle", "notation"].map(writing), [(5, 4), (5, 2), (5, 2)]);
    let two = ["cosign", "bundle"];
    assert_eq!([Referrers::FallbackTag, Referrers::Api].map(|kind| allowed_for_all(&two, kind)), [14, 10]);
}

#[tokio::test]
async fn two_signatures_of_one_push_share_every_look_and_the_write() -> Result<()> {
    let rules = rule("tags", "team", Keys::P256) + "\n" + &rule("digest", "team", Keys::P256) + "signature_type = \"simple\"\n";
    let counted = Counted::start(Referrers::FallbackTag, rules).await?;
    counted.push(&Image::oci("first")?, "1").await?;
    let signed = counted.push(&Image::oci("second")?, "2").await?;
    // A second payload, and nothing else, comes to what one signature costs.
    assert!(signed <= allowed("cosign", Referrers::FallbackTag) + 2, "{signed}: {:#?}", counted.recorder.exchanges());
    Ok(())
}

async fn tags_of_one_push_share_every_look_and_the_write(kind: Referrers) -> Result<()> {
    let formats = ["cosign", "bundle"];
    let rules = rule("counted", "team", Keys::P256).replace("[\"cosign\"]", &format!("{formats:?}"));
    let counted = Counted::start_quiet(kind, rules).await?;
    counted.push_tags(&Image::oci("first")?, &["first"]).await?;
    let (image, tags) = (Image::oci("second")?, ["1", "1.2", "1.2.3", "1.2.3-4", "stable", "latest", "blue", "green"]);
    let signed = counted.push_tags(&image, &tags).await?;
    // Each tag more is a question what it names, and a payload.
    let limit = allowed_for_all(&formats, kind) + (tags.len() - 1) * (1 + blob(kind));
    println!("{kind:?} {formats:?}, {} tags: {signed} to sign ({limit} allowed)", tags.len());
    let exchanges = counted.recorder.exchanges();
    assert!(signed <= limit, "{signed} requests, and {limit} are allowed: {exchanges:#?}");
    let path = format!("/v2/team/app/manifests/{}", tag_of(&image.manifest.digest));
    let writes = exchanges.iter().filter(|exchange| exchange.method == Method::PUT && exchange.path == path).count();
    assert_eq!(writes, 1, "{exchanges:#?}");
    counted.house.wait_signed("team/app", &image.manifest.digest, &tags).await?;
    assert_eq!(counted.house.daemon.metrics().await?.ended("signed"), 9);
    Ok(())
}

#[tokio::test]
async fn tags_of_one_push_share_every_look_and_the_write_with_the_fallback_tag() -> Result<()> {
    tags_of_one_push_share_every_look_and_the_write(Referrers::FallbackTag).await
}

#[tokio::test]
async fn tags_of_one_push_share_every_look_and_the_write_with_the_referrers_api() -> Result<()> {
    tags_of_one_push_share_every_look_and_the_write(Referrers::Api).await
}
