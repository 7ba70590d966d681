use crate::{
    config::{
        reader::{Section, optional},
        report::Wrong,
        shape::{ANY_TEXT, Choice, Grammar, Key, Kind, Table, Word},
        value::Value,
    },
    kms::{Login, SecretSource, vault_path},
};

pub(super) static TABLE: Table = Table {
    title: "`login`",
    doc: "How a Vault or an OpenBao is told who asks. Files are read anew at each login.",
    keys: &[
        Key::required("method", Kind::Choice(&METHOD), "\"approle\"", "By which of the server's auth methods."),
        Key::optional(
            "path",
            Kind::Text(&PATH),
            "\"approle\"",
            "Where the method is mounted, below auth/. Where it is by default, if absent.",
        ),
        Key::optional(
            "token",
            Kind::Secret,
            "{ file = \"/run/secrets/vault-token\" }",
            "With method token: the token, or the file that an agent keeps one in.",
        ),
        Key::optional(
            "role_id",
            Kind::Text(&ANY_TEXT),
            "\"59d6d1ca-47bb-4e7e-a40b-8be3bc5a0ba8\"",
            "With method approle: the role's id.",
        ),
        Key::optional(
            "secret_id",
            Kind::Secret,
            "{ file = \"/run/secrets/secret-id\" }",
            "With method approle: a secret id of the role, unless the role does without (bind_secret_id = false).",
        ),
        Key::optional(
            "role",
            Kind::Text(&ANY_TEXT),
            "\"countersign\"",
            "With methods kubernetes and jwt: the role to log in for.",
        ),
        Key::optional(
            "jwt",
            Kind::Secret,
            "{ file = \"/var/run/secrets/tokens/vault\" }",
            "With methods kubernetes and jwt: the signed statement of who asks. With kubernetes, the pod's own service account token if absent.",
        ),
    ],
};

static METHOD: Choice = Choice {
    words: &[
        Word { text: "token", doc: "A token that somebody else obtained; it is renewed if it can be." },
        Word { text: "approle", doc: "A role's id and a secret id of it." },
        Word { text: "kubernetes", doc: "A pod's service account, which the cluster vouches for." },
        Word { text: "jwt", doc: "A token of an issuer that the server trusts." },
    ],
    later: &["cert", "ldap", "userpass", "aws", "azure", "gcp"],
};

static PATH: Grammar = Grammar { noun: "the path of an auth method's mount in quotes", pattern: None };

#[derive(Clone, Copy, PartialEq, Eq)]
enum Method {
    Token,
    AppRole,
    Kubernetes,
    Jwt,
}

impl Method {
    /// Its word, where it is mounted by default, and the keys that are for it.
    fn facts(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::Token => ("token", &["token"]),
            Self::AppRole => ("approle", &["path", "role_id", "secret_id"]),
            Self::Kubernetes => ("kubernetes", &["path", "role", "jwt"]),
            Self::Jwt => ("jwt", &["path", "role", "jwt"]),
        }
    }
}

/// Where the kubelet puts a pod's token unless it is told otherwise.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

pub(super) fn read(section: &Section<'_>) -> Option<Login> {
    let method =
        section.value("method").and_then(|value| value.choice([Method::Token, Method::AppRole, Method::Kubernetes, Method::Jwt]));
    let secret = |name| section.value(name).map(|value| value.secret_source());
    let text = |name| section.value(name).map(|value| value.text());
    let path = section.value("path").map(|value| mount(&value));
    let (token, secret_id, jwt) = (secret("token"), secret("secret_id"), secret("jwt"));
    let (role_id, role) = (text("role_id"), text("role"));
    let method = method?;
    let (word, keys) = method.facts();
    for name in ["path", "token", "role_id", "secret_id", "role", "jwt"] {
        if let Some(at) = section.written(name).filter(|_| !keys.contains(&name)) {
            let help = format!("with method \"{word}\", `login` has {}", keys.join(", "));
            section.report.error(at, format!("`{name}` is not for method \"{word}\""), help);
            return None;
        }
    }
    let needed = |name: &str, example: &str| {
        let message = format!("`login` with method \"{word}\" has no `{name}`");
        section.report.absent(section.span.clone(), message, format!("add {name} = {example}"));
    };
    let path = optional(path)?.unwrap_or_else(|| word.to_owned());
    match method {
        Method::Token => {
            if token.is_none() {
                needed("token", "{ file = \"/run/secrets/vault-token\" }, or leave `login` out to take VAULT_TOKEN");
            }
            Some(Login::Token { token: token?? })
        }
        Method::AppRole => {
            if role_id.is_none() {
                needed("role_id", "\"…\": `vault read auth/approle/role/NAME/role-id` says it");
            }
            Some(Login::AppRole { path, role_id: role_id??, secret_id: optional(secret_id)? })
        }
        Method::Kubernetes | Method::Jwt => {
            if role.is_none() {
                needed("role", "\"countersign\"");
            }
            if jwt.is_none() && method == Method::Jwt {
                needed("jwt", "{ file = \"/var/run/secrets/tokens/vault\" }");
                return None;
            }
            let jwt = optional(jwt)?.unwrap_or_else(|| SecretSource::File(SERVICE_ACCOUNT.into()));
            Some(Login::Jwt { path, role: role??, jwt })
        }
    }
}

fn mount(value: &Value<'_>) -> Option<String> {
    value.parse(|text| {
        let help = "write its path below auth/, for example \"kubernetes\" or \"clusters/prod-eu\"";
        vault_path(text.strip_prefix("auth/").unwrap_or(text))
            .ok_or_else(|| Wrong::new("`path` is no path of an auth method's mount", help))
    })
}
