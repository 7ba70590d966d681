//! `WWW-Authenticate`: what a registry asks for. RFC 9110 section 11.6.1, and distribution's token authentication.

use http::HeaderMap;
use http::header::WWW_AUTHENTICATE;

/// What a registry asks to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    /// The best of the challenges in `headers`: a token rather than a password. None if there is none that we can meet.
    pub(super) fn read(headers: &HeaderMap) -> Option<Self> {
        /// Longer headers are not read: no registry sends one.
        const LONGEST: usize = 8 * 1024;

        let mut basic = false;
        for header in headers.get_all(WWW_AUTHENTICATE) {
            let Some(text) = header.to_str().ok().filter(|text| text.len() <= LONGEST) else { continue };
            for (scheme, parameters) in parse(text) {
                let find = |name: &str| parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, v)| v.clone());
                if scheme.eq_ignore_ascii_case("bearer") {
                    if let Some(realm) = find("realm") {
                        return Some(Self::Bearer { realm, service: find("service"), scope: find("scope") });
                    }
                } else if scheme.eq_ignore_ascii_case("basic") {
                    basic = true;
                }
            }
        }
        basic.then_some(Self::Basic)
    }
}

type Parameters = Vec<(String, String)>;

/// Splits a header into its challenges. A word that no `=` follows begins the next one; whatever else does not fit is skipped.
fn parse(text: &str) -> Vec<(String, Parameters)> {
    let mut rest = text;
    let mut challenges: Vec<(String, Parameters)> = Vec::new();
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let word = token(&mut rest);
        if word.is_empty() {
            // Not a token character: step over it, so that this always ends.
            let mut characters = rest.chars();
            if characters.next().is_none() {
                return challenges;
            }
            rest = characters.as_str();
            continue;
        }
        let after = rest.trim_start_matches([' ', '\t']);
        match (after.strip_prefix('='), challenges.last_mut()) {
            (Some(value), Some((_, parameters))) => {
                rest = value.trim_start_matches([' ', '\t']);
                let value = if rest.starts_with('"') { quoted(&mut rest) } else { token(&mut rest).to_owned() };
                parameters.push((word.to_owned(), value));
            }
            _ => challenges.push((word.to_owned(), Parameters::new())),
        }
    }
}

/// Takes a token (RFC 9110 section 5.6.2) off the front.
fn token<'a>(rest: &mut &'a str) -> &'a str {
    let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~:/?@".contains(c);
    let end = rest.find(|c| !is_token(c)).unwrap_or(rest.len());
    let (word, after) = rest.split_at(end);
    *rest = after;
    word
}

/// Takes a quoted string off the front, without its quotes and escapes. One that does not end goes on to the end.
fn quoted(rest: &mut &str) -> String {
    let mut value = String::new();
    let mut characters = rest[1..].chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => break,
            '\\' => value.extend(characters.next()),
            _ => value.push(character),
        }
    }
    *rest = characters.as_str();
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(headers: &[&str]) -> Option<Challenge> {
        let mut map = HeaderMap::new();
        for header in headers {
            map.append(WWW_AUTHENTICATE, header.parse().unwrap());
        }
        Challenge::read(&map)
    }

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer { realm: realm.into(), service: service.map(Into::into), scope: scope.map(Into::into) }
    }

    #[test]
    fn challenges_are_read_in_every_shape_that_registries_send() {
        let realm = "https://auth.example.com/token";
        let full = Some(bearer(realm, Some("registry.example.com"), Some("repository:a/b:pull,push")));
        for header in [
            r#"Bearer realm="https://auth.example.com/token",service="registry.example.com",scope="repository:a/b:pull,push""#,
            r#"bearer Realm = "https://auth.example.com/token" , service="registry.example.com", scope="repository:a/b:pull,push","#,
            r#"Basic realm="a, Bearer b", Bearer scope="repository:a/b:pull,push",service="registry.example.com",realm="https:\/\/auth.example.com/token""#,
            r#"Negotiate, Bearer realm="https://auth.example.com/token",service=registry.example.com,scope="repository:a/b:pull,push",error="insufficient_scope""#,
        ] {
            assert_eq!(read(&[header]), full, "{header}");
        }
        assert_eq!(read(&["Bearer realm=https://auth.example.com/token"]), Some(bearer(realm, None, None)));
        assert_eq!(
            read(&[r#"Basic realm="x""#, r#"Bearer realm="https://auth.example.com/token""#]),
            Some(bearer(realm, None, None))
        );
        assert_eq!(read(&["Basic"]), Some(Challenge::Basic));
        assert_eq!(read(&[r#"BASIC realm="Registry Realm", charset="UTF-8""#]), Some(Challenge::Basic));
        assert_eq!(read(&[r#"Bearer realm="https://auth.example.com/token"#]), Some(bearer(realm, None, None)), "an open quote");
    }

    #[test]
    fn what_is_no_challenge_for_us_is_none() {
        for headers in
            [&[][..], &[""], &["Bearer"], &["Digest realm=\"x\""], &["=,=,\"\""], &["Bearer service=x"], &["\"Basic\""]]
        {
            assert!(matches!(read(headers), None | Some(Challenge::Basic)), "{headers:?}");
        }
        assert_eq!(read(&["Bearer service=x"]), None);
    }
}
