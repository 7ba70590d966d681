//! Builds a small multi-platform image in memory and pushes it over plain HTTP: `push-image HOST/REPOSITORY:TAG...`.
//! The demo uses it, for there is nothing to pull where it runs.

use anyhow::{Context, Result, ensure};
use integration_tests::image::Image;
use integration_tests::registry::{Client, Login};

#[tokio::main]
async fn main() -> Result<()> {
    let references: Vec<String> = std::env::args().skip(1).collect();
    ensure!(!references.is_empty(), "usage: push-image HOST/REPOSITORY:TAG...");
    for reference in references {
        let (host, rest) = reference.split_once('/').with_context(|| format!("{reference} has no host"))?;
        let (repository, tag) = rest.rsplit_once(':').with_context(|| format!("{reference} has no tag"))?;
        let image = Image::index(&reference)?;
        Client::new(&format!("http://{host}"), Login::None)?.push(&image, repository, &[tag]).await?;
        println!("pushed {reference}");
        println!("  index        {}", image.manifest.digest);
        for (platform, manifest) in &image.children {
            println!("  {platform:12} {}", manifest.digest);
        }
    }
    Ok(())
}
