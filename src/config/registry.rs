use std::path::PathBuf;

use reqwest::Url;

use crate::oci::RegistryName;

use super::{
    Secret,
    reader::{Section, optional},
    report::{Span, Wrong, cut},
    shape::{ANY_TEXT, Grammar, Key, Kind, Table},
};

/// A registry whose images are signed.
#[derive(Debug, Clone)]
pub struct Registry {
    /// As it stands in image references.
    pub name: RegistryName,
    /// Where its API is: scheme, host and port, with the path `/`.
    pub url: Url,
    /// None: requests are anonymous.
    pub login: Option<Login>,
    /// PEM: certificates that are trusted for this registry beside the usual ones.
    pub ca: Option<PathBuf>,
}

/// A user name and its password.
#[derive(Debug, Clone)]
pub struct Login {
    /// Holds no colon (RFC 7617 section 2).
    pub username: String,
    pub password: Secret,
}

pub(crate) static TABLE: Table = Table {
    title: "[[registry]]",
    doc: "A registry whose images are signed. No other registry is ever contacted.",
    keys: &[
        Key::required(
            "name",
            Kind::Text(&NAME),
            "\"registry.example.com\"",
            "The registry's name as it stands in image references, with its port where clients type one.",
        ),
        Key::optional(
            "url",
            Kind::Text(&URL),
            "\"https://registry.internal:5000\"",
            "Where the registry's API is, if elsewhere: https:// and the name, if absent. Plain HTTP is spoken only to an http:// URL.",
        ),
        Key::optional(
            "username",
            Kind::Text(&ANY_TEXT),
            "\"countersign\"",
            "The user that may pull and push. Requests are anonymous, if absent.",
        ),
        Key::optional("password", Kind::Secret, "{ file = \"/run/secrets/registry\" }", "That user's password or token."),
        Key::optional(
            "ca",
            Kind::Path,
            "\"registry-ca.pem\"",
            "A PEM file with the certificates that this registry's own leads to, if the machine does not trust them already.",
        ),
    ],
};

pub(crate) static NAME: Grammar = Grammar { noun: "a registry's name in quotes", pattern: Some("^[^/\\s]+$") };
static URL: Grammar = Grammar { noun: "a URL in quotes", pattern: Some("^[A-Za-z]+://[^/?#\\s]+/?$") };

pub(crate) fn read(section: &Section<'_>) -> Option<Registry> {
    let name: Option<RegistryName> = section.value("name").and_then(|value| value.parse(registry_name));
    let url = match section.value("url") {
        Some(value) => value.parse(api_url),
        None => name.as_ref().and_then(|name| default_url(section, name)),
    };
    let username = section.value("username").and_then(|value| value.parse(username));
    let password = section.value("password").and_then(|value| value.secret());
    let ca = section.value("ca").map(|value| value.readable_file());
    let login = match (section.written("username"), section.written("password")) {
        (None, None) => Some(None),
        (Some(_), Some(_)) => username.zip(password).map(|(username, password)| Some(Login { username, password })),
        (Some(at), None) => missing_half(section, at, "`username` without `password`"),
        (None, Some(at)) => missing_half(section, at, "`password` without `username`"),
    };
    if let Some(url) = &url {
        report_plain_http(section, url);
    }
    Some(Registry { name: name?, url: url?, login: login?, ca: optional(ca)? })
}

/// A registry's name, also where another section refers to it.
pub(crate) fn registry_name(text: &str) -> Result<RegistryName, Wrong> {
    text.parse().map_err(|_| {
        let host = text.split_once("://").map_or(text, |(_, rest)| rest);
        let host = host.split('/').next().unwrap_or_default();
        let help = match host.parse::<RegistryName>() {
            Ok(name) if host != text => format!("without scheme and path: \"{name}\""),
            _ => {
                "a host name or address, with :port if clients type one: \"registry.example.com\", \"127.0.0.1:5000\"".to_owned()
            }
        };
        Wrong::new(format!("\"{}\" is no registry's name", cut(text)), help)
    })
}

fn default_url(section: &Section<'_>, name: &RegistryName) -> Option<Url> {
    // Docker Hub's API has never been at its name.
    let host = if *name == RegistryName::docker_hub() { "registry-1.docker.io" } else { name.as_str() };
    let url = format!("https://{host}").parse().ok();
    if url.is_none() {
        let message = format!("{name} is no host that can be reached");
        section.report.error(section.value_span("name"), message, "write in `url` where the registry's API is".to_owned());
    }
    url
}

fn api_url(text: &str) -> Result<Url, Wrong> {
    const EXAMPLE: &str = "write scheme and host, with a port if needed: \"https://registry.internal:5000\"";
    if text.contains('@') {
        return Err(Wrong::new("`url` holds a user", "remove it from the URL, and use `username` and `password`"));
    }
    if !text.contains("://") {
        return Err(Wrong::new("`url` has no scheme", format!("write \"https://{}\"", cut(text))));
    }
    if text.contains(char::is_whitespace) {
        return Err(Wrong::new("there is a blank in `url`", EXAMPLE));
    }
    let url: Url = text.parse().map_err(|error| Wrong::new(format!("`url` is no URL: {error}"), EXAMPLE))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(Wrong::new("`url` does not begin with https:// or http://", EXAMPLE));
    }
    if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
        return Err(Wrong::new(
            "`url` goes on after the host",
            format!("a registry's API is at /v2/ of its host: write \"{}\"", url.origin().ascii_serialization()),
        ));
    }
    Ok(url)
}

pub(crate) fn username(text: &str) -> Result<String, Wrong> {
    if text.is_empty() || text.contains(':') || text.chars().any(char::is_control) {
        return Err(Wrong::new("`username` is no user name", "at least one character, and no colon or control character"));
    }
    Ok(text.to_owned())
}

fn missing_half<T>(section: &Section<'_>, at: Span, message: &str) -> Option<T> {
    section.report.absent(at, message, "write both, or neither for anonymous requests".to_owned());
    None
}

fn report_plain_http(section: &Section<'_>, url: &Url) {
    if url.scheme() != "http" {
        return;
    }
    if section.written("ca").is_some() {
        let message = "`ca` has no effect: the registry's URL begins with http://";
        section.report.warning(section.value_span("ca"), message, "write https:// in `url`, or remove `ca`".to_owned());
    }
    let is_local = url.host_str().is_some_and(|host| {
        host == "localhost" || host.trim_matches(['[', ']']).parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
    });
    if !is_local && section.written("password").is_some() {
        let message = "the registry's password goes over the network unencrypted";
        section.report.warning(section.value_span("url"), message, "write https:// if the registry speaks it".to_owned());
    }
}
