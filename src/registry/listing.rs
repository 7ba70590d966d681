//! Listings: a repository's tags and a registry's repositories, page by page (distribution-spec 1.1, "Content Discovery").

use std::{collections::HashSet, str::FromStr};

use http::{Method, StatusCode};
use serde::Deserialize;

use super::{
    Error, Registry,
    auth::Access,
    transport::{Call, Outgoing},
};
use crate::oci::{Repository, Tag};

/// distribution 2.8 gives all tags of a repository on one page, whatever it is asked for.
const PAGE_LIMIT: usize = 32 * 1024 * 1024;
const MOST_ENTRIES: usize = 1_000_000;
const MOST_PAGES: usize = 10_000;

impl Registry {
    /// All tags of a repository, as they come; none if the registry does not know it. Those that are no tags are left out.
    pub async fn tags(&self, repository: &Repository) -> Result<Vec<Tag>, Error> {
        #[derive(Deserialize)]
        struct Page {
            tags: Option<Vec<String>>,
        }
        let call = Call { doing: "list the tags of", repository: Some(repository), item: None, access: Access::Pull };
        self.list(&call, "/tags/list?n=1000", |page: Page| page.tags.unwrap_or_default()).await
    }

    /// All repositories that the account may see. Not every registry has this. Those whose names are malformed are left out.
    pub async fn repositories(&self) -> Result<Vec<Repository>, Error> {
        #[derive(Deserialize)]
        struct Page {
            repositories: Option<Vec<String>>,
        }
        // distribution refuses a larger page than its `catalog.maxentries`; a hundred is what it gives unasked.
        let call = Call { doing: "list the repositories", repository: None, item: None, access: Access::Catalog };
        self.list(&call, "_catalog?n=100", |page: Page| page.repositories.unwrap_or_default()).await
    }

    async fn list<P, T>(&self, call: &Call<'_>, first: &str, entries: impl Fn(P) -> Vec<String>) -> Result<Vec<T>, Error>
    where
        P: for<'de> Deserialize<'de>,
        T: FromStr,
    {
        let mut listed = Vec::new();
        let mut seen = HashSet::new();
        let mut next = Some(self.url(call, first)?);
        while let Some(url) = next {
            let answer = self.exchange(call, Outgoing::new(Method::GET, url.clone()), PAGE_LIMIT).await?;
            if call.repository.is_some() && answer.says_absent() {
                return Ok(listed);
            }
            if answer.status != StatusCode::OK {
                return Err(self.failure(call, &answer));
            }
            let page: P = serde_json::from_slice(&answer.body)
                .map_err(|error| Error::Malformed { at: self.at_call(call), problem: format!("it is no listing: {error}") })?;
            listed.extend(entries(page).iter().filter_map(|name| name.parse::<T>().ok()));
            next = self.next_page(call, &url, &answer)?;
            if !seen.insert(url) {
                return Err(Error::Malformed { at: self.at_call(call), problem: "its pages go round in a circle".to_owned() });
            }
            if listed.len() > MOST_ENTRIES || seen.len() > MOST_PAGES {
                let limit = format!("{MOST_ENTRIES} entries or {MOST_PAGES} pages");
                return Err(Error::Oversized { at: self.at_call(call), limit });
            }
        }
        Ok(listed)
    }
}
