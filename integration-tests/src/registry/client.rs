//! The few requests that tests make of a registry themselves.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use futures::future::try_join_all;
use reqwest::header::{ACCEPT, CONTENT_TYPE, LOCATION};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};

use crate::image::{DOCKER_LIST, DOCKER_MANIFEST, Image, Manifest, OCI_INDEX, OCI_MANIFEST, digest};
use crate::issuer::Issuer;
use crate::process::http_client;

/// Talks to one registry; cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
    login: Login,
}

/// How it shows that it may.
#[derive(Debug, Clone)]
pub enum Login {
    None,
    Basic(&'static str, &'static str),
    /// By a token for the repository that it is about.
    Tokens(Arc<Issuer>),
}

impl Client {
    pub fn new(url: &str, login: Login) -> Result<Self> {
        Ok(Self { http: http_client()?, base: Url::parse(url)?, login })
    }

    /// Pushes the image and lets each of `tags` point to it, all at once; by digest alone if there are none.
    pub async fn push(&self, image: &Image, repository: &str, tags: &[&str]) -> Result<()> {
        try_join_all(image.blobs.iter().map(|blob| self.push_blob(repository, blob))).await?;
        for (_, child) in &image.children {
            self.put_manifest(repository, &child.digest, child).await?;
        }
        if tags.is_empty() {
            self.put_manifest(repository, &image.manifest.digest, &image.manifest).await?;
        }
        try_join_all(tags.iter().map(|tag| self.put_manifest(repository, tag, &image.manifest))).await?;
        Ok(())
    }

    /// `reference` is a tag or the manifest's digest.
    pub async fn put_manifest(&self, repository: &str, reference: &str, manifest: &Manifest) -> Result<()> {
        // This registry has moments in which it forgets a blob that somebody is uploading again; engines try again too.
        for pause in [10, 50, 250, 1000, 0] {
            let request = self.request(Method::PUT, &format!("{repository}/manifests/{reference}"))?;
            let response = request.header(CONTENT_TYPE, &manifest.media_type).body(manifest.bytes.clone()).send().await?;
            match response.status() {
                StatusCode::CREATED => return Ok(()),
                StatusCode::BAD_REQUEST | StatusCode::INTERNAL_SERVER_ERROR if pause > 0 => {
                    tokio::time::sleep(Duration::from_millis(pause)).await;
                }
                _ => bail!("put manifest {repository} {reference}: {}", complaint(response).await),
            }
        }
        unreachable!("the last round returns")
    }

    pub async fn push_blob(&self, repository: &str, bytes: &Bytes) -> Result<()> {
        let response = self.request(Method::POST, &format!("{repository}/blobs/uploads/"))?.send().await?;
        ensure!(response.status() == StatusCode::ACCEPTED, "begin an upload to {repository}: {}", complaint(response).await);
        let location = response.headers().get(LOCATION).context("an upload without a Location")?.to_str()?;
        let mut location = self.base.join(location)?;
        // It may announce another name than the one it is reached by.
        location.set_host(self.base.host_str())?;
        location.set_port(self.base.port()).ok().context("a base that cannot have a port")?;
        location.query_pairs_mut().append_pair("digest", &digest(bytes));
        let response = self.with_login(self.http.put(location), repository).body(bytes.clone()).send().await?;
        ensure!(response.status() == StatusCode::CREATED, "upload a blob to {repository}: {}", complaint(response).await);
        Ok(())
    }

    /// The manifest as it is stored, or none.
    pub async fn manifest(&self, repository: &str, reference: &str) -> Result<Option<Manifest>> {
        let accept = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST].join(", ");
        // A tag that is being written is answered with 500 for a moment.
        for pause in [10, 50, 250, 1000, 0] {
            let request = self.request(Method::GET, &format!("{repository}/manifests/{reference}"))?;
            let response = request.header(ACCEPT, &accept).send().await?;
            match response.status() {
                StatusCode::OK => {
                    let media_type =
                        response.headers().get(CONTENT_TYPE).context("a manifest without a type")?.to_str()?.to_owned();
                    return Ok(Some(Manifest::new(&media_type, response.bytes().await?)));
                }
                StatusCode::NOT_FOUND => return Ok(None),
                StatusCode::INTERNAL_SERVER_ERROR if pause > 0 => tokio::time::sleep(Duration::from_millis(pause)).await,
                _ => bail!("get manifest {repository} {reference}: {}", complaint(response).await),
            }
        }
        unreachable!("the last round returns")
    }

    pub async fn blob(&self, repository: &str, digest: &str) -> Result<Bytes> {
        let response = self.request(Method::GET, &format!("{repository}/blobs/{digest}"))?.send().await?;
        ensure!(response.status() == StatusCode::OK, "get blob {repository}@{digest}: {}", complaint(response).await);
        Ok(response.bytes().await?)
    }

    pub async fn delete_blob(&self, repository: &str, digest: &str) -> Result<()> {
        let response = self.request(Method::DELETE, &format!("{repository}/blobs/{digest}"))?.send().await?;
        ensure!(response.status() == StatusCode::ACCEPTED, "delete blob {repository}@{digest}: {}", complaint(response).await);
        Ok(())
    }

    /// All tags of the repository, those of signatures included; none if there is no such repository.
    pub async fn tags(&self, repository: &str) -> Result<Vec<String>> {
        let response = self.request(Method::GET, &format!("{repository}/tags/list"))?.send().await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(Vec::new());
        }
        ensure!(response.status() == StatusCode::OK, "list tags of {repository}: {}", complaint(response).await);
        let list: serde_json::Value = response.json().await?;
        Ok(serde_json::from_value(list["tags"].clone()).unwrap_or_default())
    }

    /// `path` begins with the repository.
    fn request(&self, method: Method, path: &str) -> Result<RequestBuilder> {
        let kinds = ["/manifests/", "/blobs/", "/tags/"];
        let repository = kinds.iter().find_map(|kind| path.rsplit_once(kind)).map_or("", |(repository, _)| repository);
        Ok(self.with_login(self.http.request(method, self.base.join("/v2/")?.join(path)?), repository))
    }

    fn with_login(&self, request: RequestBuilder, repository: &str) -> RequestBuilder {
        match &self.login {
            Login::None => request,
            Login::Basic(name, password) => request.basic_auth(name, Some(password)),
            Login::Tokens(issuer) => request.bearer_auth(issuer.token(&format!("repository:{repository}:pull,push"))),
        }
    }
}

async fn complaint(response: Response) -> String {
    let status = response.status();
    format!("{status} {}", response.text().await.unwrap_or_default())
}
