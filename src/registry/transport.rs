//! One request to a registry and its answer: authorised, bounded in time and size, redirected with care.

use std::{net::IpAddr, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderValue, Method, Request, StatusCode, Uri,
    header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, DATE, LINK, LOCATION, RETRY_AFTER, USER_AGENT},
    uri::Scheme,
};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use reqwest::Url;
use tokio::time::Instant;

use super::{
    Registry,
    auth::{Access, Authorization, Grant},
    challenge::Challenge,
    error::{self, At, Broken, Error, Object, Reported},
};
use crate::{
    clock::Clock,
    oci::{Digest, Repository, media_type},
};

/// Error bodies are read this far, and token answers may not be longer.
pub(super) const ERROR_LIMIT: usize = 64 * 1024;
const MOST_REDIRECTS: u32 = 3;
/// Harbor's code for what a project's policy forbids, in either spelling.
const AGAINST_POLICY: &[&str] = &["PROJECTPOLICYVIOLATION", "PROJECT_POLICY_VIOLATION"];
/// Reads that meet docker-registry's 500 (it gives one while the tag is being written) are repeated this often.
const MOST_REPEATS: u32 = 4;
/// `countersign/VERSION` first, by which its own writes are known. `cosign` is in it because Harbor asks for that: in a project
/// that lets only signed images be pulled, a client of that name that may push may read what it is about to sign (Harbor's
/// `SkipPolicyChecking`).
const AGENT: &str = concat!("countersign/", env!("CARGO_PKG_VERSION"), " (signs as cosign does)");
/// No peer can put an event off for longer than this.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// What is asked, of which repository, and the right that it takes.
pub(super) struct Call<'a> {
    /// A verb for messages: `read the manifest`.
    pub(super) doing: &'static str,
    pub(super) repository: Option<&'a Repository>,
    /// `:tag` or `@digest`.
    pub(super) item: Option<(char, &'a str)>,
    pub(super) access: Access,
}

/// A request that can be sent more than once.
pub(super) struct Outgoing {
    method: Method,
    target: Uri,
    accept_manifests: bool,
    stays: bool,
    content: Option<(HeaderValue, Bytes)>,
}

impl Outgoing {
    pub(super) fn new(method: Method, target: Uri) -> Self {
        Self { method, target, accept_manifests: false, stays: false, content: None }
    }

    pub(super) fn accepting_manifests(mut self) -> Self {
        self.accept_manifests = true;
        self
    }

    /// A redirect to another host is the answer, and not followed.
    pub(super) fn staying(mut self) -> Self {
        self.stays = true;
        self
    }

    pub(super) fn with_content(mut self, media_type: HeaderValue, content: Bytes) -> Self {
        self.content = Some((media_type, content));
        self
    }

    fn request(&self, authorization: &Authorization) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::default());
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.target.clone();
        let headers = request.headers_mut();
        headers.insert(USER_AGENT, const { HeaderValue::from_static(AGENT) });
        if self.accept_manifests {
            headers.insert(ACCEPT, const { HeaderValue::from_static(media_type::ACCEPT_MANIFESTS) });
        }
        if let Some(authorization) = authorization.header() {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        let mut length = 0;
        if let Some((media_type, content)) = &self.content {
            headers.insert(CONTENT_TYPE, media_type.clone());
            length = content.len();
            *request.body_mut() = Full::new(content.clone());
        }
        if length == 0 && !self.is_read() {
            // RFC 9110 section 8.6; hyper leaves it out for an empty body, and some registries then answer 411.
            request.headers_mut().insert(CONTENT_LENGTH, const { HeaderValue::from_static("0") });
        }
        request
    }

    fn is_read(&self) -> bool {
        matches!(self.method, Method::GET | Method::HEAD)
    }
}

/// An answer, read to its end.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    /// Cut at [`ERROR_LIMIT`] unless the status is a success.
    pub(super) body: Bytes,
    /// Whether it came from the registry itself, and not from where it redirected to.
    own: bool,
    /// What was sent along.
    shown: Authorization,
}

impl Answer {
    pub(super) fn header(&self, name: impl http::header::AsHeaderName) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    pub(super) fn content_digest(&self) -> Option<Digest> {
        self.header("docker-content-digest").and_then(|text| text.parse().ok())
    }

    /// Whether a 404 says, in a registry's own words, that the thing is not there.
    ///
    /// Everything else must not be taken for that: a proxy's page, a storage host's answer, or distribution 2.8's 404 for a
    /// manifest that is there but of a type that the request's Accept line, as it arrived, does not name.
    pub(super) fn says_absent(&self) -> bool {
        const ABSENT: &[&str] = &["MANIFEST_UNKNOWN", "NAME_UNKNOWN", "BLOB_UNKNOWN", "NOT_FOUND"];
        if self.status != StatusCode::NOT_FOUND || !self.own {
            return false;
        }
        let reported = Reported::read(self.status, &self.body, &[]);
        if reported.codes().next().is_none() {
            return !reported.is_foreign();
        }
        reported.has(ABSENT) && !reported.message().to_ascii_lowercase().contains("accept header")
    }

    /// Whether a 404 for a tag says that the tag is there, and the manifest that it named is not any more: distribution looks the
    /// one up after the other, and in between somebody wrote the tag and deleted what it had named. Notation does so each time.
    fn says_tag_was_written(&self, call: &Call<'_>) -> bool {
        self.status == StatusCode::NOT_FOUND
            && matches!(call.item, Some((':', _)))
            && Reported::read(self.status, &self.body, &[]).names_revision()
    }

    /// Whether an image may not be pulled as it is, such as unsigned: Harbor, in a project with that policy.
    fn says_against_policy(&self) -> bool {
        self.status == StatusCode::PRECONDITION_FAILED && Reported::read(self.status, &self.body, &[]).has(AGAINST_POLICY)
    }
}

impl Registry {
    pub(super) fn at(&self, doing: &str, object: &Object<'_>) -> At {
        At::new(&self.0.name, doing, object)
    }

    pub(super) fn at_call(&self, call: &Call<'_>) -> At {
        self.at(call.doing, &Object { repository: call.repository, item: call.item })
    }

    /// Sends `outgoing` with whatever authorization it takes, following redirects of reads. Returns any answer but a 401.
    /// A success has at most `limit` bytes.
    pub(super) async fn exchange(&self, call: &Call<'_>, outgoing: Outgoing, limit: usize) -> Result<Answer, Error> {
        let began = Instant::now();
        let result = self.exchange_unobserved(call, outgoing, limit).await;
        if let Some(observer) = &self.0.observer {
            let ended = match &result {
                Ok(answer) => word_of(answer.status),
                Err(Error::Unreachable { .. }) => "unreachable",
                Err(Error::Unauthorized { .. }) => "denied",
                Err(_) => "failed",
            };
            observer(call.doing, ended, began.elapsed());
        }
        result
    }

    async fn exchange_unobserved(&self, call: &Call<'_>, outgoing: Outgoing, limit: usize) -> Result<Answer, Error> {
        let since = Instant::now();
        let mut outgoing = outgoing;
        let mut grant = Grant { repository: call.repository.cloned(), access: call.access };
        let mut authorization = self.authorization(&grant).await?;
        let (mut own, mut challenged, mut lost) = (true, false, false);
        let (mut redirects, mut repeats) = (0, 0);
        loop {
            let shown = if own { &authorization } else { &Authorization::None };
            let mut answer = match self.send_once(&outgoing, shown, limit, &|| self.at_call(call)).await {
                // The server may have closed a kept connection in the very moment; what only reads can be asked again.
                Err(Error::Unreachable { source: Broken::Lost(_), .. }) if !lost && outgoing.is_read() => {
                    lost = true;
                    continue;
                }
                answer => answer?,
            };
            answer.own = own;
            tracing::trace!(
                registry = %self.0.name, doing = call.doing, repository = call.repository.map(Repository::as_str),
                status = answer.status.as_u16(), elapsed = ?since.elapsed(), "asked the registry"
            );
            match answer.status {
                StatusCode::UNAUTHORIZED if own => {
                    let met = if challenged {
                        None
                    } else {
                        self.meet(Challenge::read(&answer.headers), &grant, &authorization, since).await?
                    };
                    let Some(met) = met else {
                        let reported = self.reported(&answer);
                        let account = self.0.authenticator.account();
                        return Err(Error::Unauthorized { at: self.at_call(call), account, need: call.access.need(), reported });
                    };
                    challenged = true;
                    authorization = met;
                }
                status
                    if own
                        && outgoing.is_read()
                        && repeats < MOST_REPEATS
                        && (status == StatusCode::INTERNAL_SERVER_ERROR || answer.says_tag_was_written(call)) =>
                {
                    repeats += 1;
                    tokio::time::sleep(pause(repeats)).await;
                }
                // Who may push may read it all the same, and has to show so.
                _ if own && grant.access == Access::Pull && answer.says_against_policy() => {
                    grant.access = Access::Push;
                    authorization = self.authorization(&grant).await?;
                }
                status if status.is_redirection() && outgoing.is_read() && redirects < MOST_REDIRECTS => {
                    redirects += 1;
                    let target = match self.redirect(call, &outgoing.target, &answer) {
                        Ok(target) if !outgoing.stays || target.origin() == self.0.origin.origin() => target,
                        Err(error) if !outgoing.stays => return Err(error),
                        _ => return Ok(answer),
                    };
                    // Once elsewhere, never ours again: a way back would be one for whoever stands there to choose.
                    own = own && target.origin() == self.0.origin.origin();
                    outgoing.target = self.target(call, &target)?;
                }
                _ => return Ok(answer),
            }
        }
    }

    /// Where a read is redirected to.
    fn redirect(&self, call: &Call<'_>, from: &Uri, answer: &Answer) -> Result<Url, Error> {
        let target = answer.header(LOCATION).and_then(|location| join(from, location));
        let Some(target) = target.filter(|url| matches!(url.scheme(), "http" | "https") && url.host().is_some()) else {
            let problem = format!("a redirect (status {}) without a place to go", answer.status.as_u16());
            return Err(Error::Malformed { at: self.at_call(call), problem });
        };
        if from.scheme() == Some(&Scheme::HTTPS) && target.scheme() != "https" {
            return Err(Error::Elsewhere {
                at: self.at_call(call),
                target: origin_text(&target),
                problem: "which would lead from https to plain http",
                cure: "have the registry serve its storage by https, or by itself without redirects",
            });
        }
        Ok(target)
    }

    /// Sends one request, once.
    pub(super) async fn send_once(
        &self,
        outgoing: &Outgoing,
        authorization: &Authorization,
        limit: usize,
        at: &(dyn Fn() -> At + Sync),
    ) -> Result<Answer, Error> {
        let asked = async {
            let response = self.0.client.request(outgoing.request(authorization)).await.map_err(|error| {
                if error.is_connect() { Broken::Connect(Arc::new(error)) } else { Broken::Lost(Arc::new(error)) }
            })?;
            let (head, body) = response.into_parts();
            let most = if head.status.is_success() { limit } else { ERROR_LIMIT };
            let (body, is_whole) = read(body, most).await.map_err(|error| Broken::Cut(Arc::new(error)))?;
            Ok((head, body, is_whole))
        };
        let patience = self.0.timeouts.request;
        let answered = tokio::time::timeout(patience, asked).await.unwrap_or(Err(Broken::Slow(patience)));
        let (head, body, is_whole) = answered.map_err(|source| Error::Unreachable { at: at(), source })?;
        if head.status.is_success() && !is_whole {
            return Err(Error::Oversized { at: at(), limit: format!("{limit} bytes") });
        }
        Ok(Answer { status: head.status, headers: head.headers, body, own: true, shown: authorization.clone() })
    }

    /// What the registry said, without any credential that it may have repeated.
    pub(super) fn reported(&self, answer: &Answer) -> Reported {
        let secrets: Vec<&str> = answer.shown.secret().into_iter().chain(self.0.authenticator.password()).collect();
        Reported::read(answer.status, &answer.body, &secrets)
    }

    /// The error that an answer stands for, if it is not what the call hoped for.
    pub(super) fn failure(&self, call: &Call<'_>, answer: &Answer) -> Error {
        let reported = self.reported(answer);
        let at = self.at_call(call);
        if let Some(target) = answer.header(LOCATION).filter(|_| answer.status.is_redirection()) {
            let target = self.0.origin.join(target).map_or_else(|_| "nowhere".to_owned(), |url| origin_text(&url));
            let status = answer.status.as_u16();
            let problem = format!("a redirect (status {status}) to {target}; if the API is there, make it this registry's `url`");
            return Error::Malformed { at, problem };
        }
        if !answer.own {
            // Where the content is kept, and not the registry, says so: no word of it about rights or existence counts.
            return match answer.status {
                status if status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS => {
                    Error::Unexpected { at, reported }
                }
                _ => refusal(at, answer, reported),
            };
        }
        if answer.says_against_policy() {
            return Error::Policy { at, account: self.0.authenticator.account(), reported };
        }
        if answer.status == StatusCode::FORBIDDEN && !reported.has(&["TOOMANYREQUESTS"]) {
            return Error::Denied { at, account: self.0.authenticator.account(), need: call.access.need(), reported };
        }
        refusal(at, answer, reported)
    }

    /// Takes a URL that the registry gave for its own use (an upload's Location, a listing's Link), relative to `from`, to
    /// the configured origin. Refuses one that is on another host: credentials would follow it there.
    pub(super) fn own_url(&self, call: &Call<'_>, from: &Uri, text: &str) -> Result<Url, Error> {
        let Some(mut url) = join(from, text) else {
            let problem = format!("it points to {:?}, which is no URL", error::cut(text, 120));
            return Err(Error::Malformed { at: self.at_call(call), problem });
        };
        let origin = &self.0.origin;
        if url.origin() == origin.origin() {
            // A name and password in it would be sent as an Authorization of the registry's choice.
            let (_, _) = (url.set_username(""), url.set_password(None));
            return Ok(url);
        }
        // Behind a proxy a registry may know only its public name, or not know that it is reached by https.
        let authority = authority(&url);
        if matches!(url.scheme(), "http" | "https") && (authority == self.0.name.as_str() || authority == self::authority(origin))
        {
            let mut own = origin.clone();
            own.set_path(url.path());
            own.set_query(url.query());
            return Ok(own);
        }
        Err(Error::Elsewhere {
            at: self.at_call(call),
            target: origin_text(&url),
            problem: "which is another host than the registry's, where no credentials are sent",
            cure: "set the registry's `url` to the address that it announces, or have it announce the address in `url`",
        })
    }

    /// The URL as hyper takes it.
    pub(super) fn target(&self, call: &Call<'_>, url: &Url) -> Result<Uri, Error> {
        Uri::try_from(url.as_str()).map_err(|_| Error::Malformed {
            at: self.at_call(call),
            problem: format!("it points to {}, at an address that cannot be asked for", origin_text(url)),
        })
    }

    /// The URL of the next page, if there is one: RFC 8288, as distribution-spec 1.1 has it for listings.
    pub(super) fn next_page(&self, call: &Call<'_>, from: &Uri, answer: &Answer) -> Result<Option<Uri>, Error> {
        let mut links = answer.headers.get_all(LINK).iter().filter_map(|value| value.to_str().ok());
        let Some(link) = links.find_map(next_link) else { return Ok(None) };
        self.target(call, &self.own_url(call, from, link)?).map(Some)
    }
}

/// The target of a `Link` header whose relation is `next`.
pub(super) fn next_link(header: &str) -> Option<&str> {
    let mut rest = header;
    loop {
        let (_, after) = rest.split_once('<')?;
        let (target, after) = after.split_once('>')?;
        let parameters = after.split('<').next().unwrap_or_default();
        let is_next = parameters.split([';', ',']).any(|parameter| {
            parameter.split_once('=').is_some_and(|(name, value)| {
                name.trim().eq_ignore_ascii_case("rel") && value.trim().trim_matches('"').split(' ').any(|rel| rel == "next")
            })
        });
        if is_next {
            return Some(target);
        }
        rest = after;
    }
}

/// How an exchange ended, for those who count.
fn word_of(status: StatusCode) -> &'static str {
    match status.as_u16() {
        200..=399 => "ok",
        404 => "absent",
        429 => "throttled",
        401 | 403 => "denied",
        400..=499 => "refused",
        _ => "failed",
    }
}

/// The error of a status alone, whoever gave it.
pub(super) fn refusal(at: At, answer: &Answer, reported: Reported) -> Error {
    let retry_after = || retry_after(&answer.headers);
    match answer.status {
        StatusCode::TOO_MANY_REQUESTS => Error::Throttled { at, retry_after: retry_after(), reported },
        _ if reported.has(&["TOOMANYREQUESTS"]) => Error::Throttled { at, retry_after: retry_after(), reported },
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY => Error::ServerError { at, retry_after: retry_after(), reported },
        status if status.is_server_error() => Error::ServerError { at, retry_after: retry_after(), reported },
        // A registry's 404 has a code; what has none comes from something that stands before it, or is none.
        StatusCode::NOT_FOUND if reported.codes().next().is_none() => Error::Unexpected { at, reported },
        status if status.is_client_error() => Error::Rejected { at, reported },
        _ => Error::Unexpected { at, reported },
    }
}

/// `Retry-After` as seconds or as a date (RFC 9110 section 10.2.3), the latter by the peer's own clock if it tells the time.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let date = |text: &str| jiff::fmt::rfc2822::parse(text).ok().map(|zoned| zoned.timestamp());
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = if let Ok(seconds) = text.parse::<u64>() {
        Duration::from_secs(seconds)
    } else {
        let now = headers.get(DATE).and_then(|value| value.to_str().ok()).and_then(date);
        let until = date(text)?.duration_since(now.unwrap_or_else(|| Clock::system().now()));
        Duration::try_from(until).unwrap_or_default()
    };
    Some(wait.min(LONGEST_WAIT))
}

/// Reads a body as far as `limit` bytes, and whether that was all of it. Where it comes in one piece, it is not copied.
async fn read(mut body: Incoming, limit: usize) -> Result<(Bytes, bool), hyper::Error> {
    let mut first = Bytes::new();
    let mut whole = BytesMut::new();
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        let Ok(piece) = frame?.into_data() else { continue };
        if length + piece.len() > limit {
            return Ok((if whole.is_empty() { first } else { whole.freeze() }, false));
        }
        if length == 0 {
            first = piece;
            length = first.len();
            continue;
        }
        if whole.is_empty() {
            whole.extend_from_slice(&first);
        }
        whole.extend_from_slice(&piece);
        length = whole.len();
    }
    Ok((if whole.is_empty() { first } else { whole.freeze() }, true))
}

/// 5, 15, 45, 135 ms, give or take half.
fn pause(repeat: u32) -> Duration {
    let middle = 5.0 * 3f64.powi(repeat.cast_signed() - 1);
    Duration::from_secs_f64(middle * (0.5 + fastrand::f64()) / 1000.0)
}

pub(super) fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// A reference (RFC 3986 section 4.1) that was found at `from`.
fn join(from: &Uri, reference: &str) -> Option<Url> {
    Url::parse(&from.to_string()).ok()?.join(reference).ok()
}

/// `host` or `host:port`, as a registry's name has it.
fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// `scheme://host:port`, which holds nothing secret.
pub(super) fn origin_text(url: &Url) -> String {
    error::cut(&format!("{}://{}", url.scheme(), authority(url)), 120)
}
