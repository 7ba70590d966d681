//! The URL of a PostgreSQL database, as libpq has it.
//! <https://www.postgresql.org/docs/15/libpq-connect.html#LIBPQ-CONNSTRING>

use std::path::PathBuf;

use tokio_postgres::config::{Host, SslMode};

use super::report::Wrong;
use crate::ledger::{Authorities, Limits, Postgres, Trust};

const EXAMPLE: &str = "for example \"postgres://countersign@db.example.com:5432/countersign?sslmode=verify-full\"";

/// Parameters that mean here what they mean to libpq.
const KNOWN: &[&str] = &[
    "user",
    "password",
    "dbname",
    "host",
    "hostaddr",
    "port",
    "application_name",
    "options",
    "channel_binding",
    "load_balance_hosts",
    "target_session_attrs",
];
/// libpq has them, and they are not here: their names may be repeated.
const UNKNOWN: &[&str] = &[
    "connect_timeout",
    "fallback_application_name",
    "gssencmode",
    "gsslib",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "krbsrvname",
    "max_protocol_version",
    "min_protocol_version",
    "passfile",
    "require_auth",
    "requirepeer",
    "service",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
    "sslcert",
    "sslcompression",
    "sslcrl",
    "sslcrldir",
    "sslkey",
    "sslnegotiation",
    "sslpassword",
    "sslsni",
    "tcp_user_timeout",
];

/// Reads a URL. `file` finds a file that it names. Nothing of it is repeated but words that are known.
pub(crate) fn read(url: &str, file: impl Fn(&str) -> Result<PathBuf, Wrong>) -> Result<Postgres, Wrong> {
    let (whole, query) = url.split_once('?').unwrap_or((url, ""));
    let (mut mode, mut root, mut rest) = (None, None, vec![]);
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').ok_or_else(|| {
            Wrong::new("`url` has a parameter without a value", format!("write name=value after the question mark; {EXAMPLE}"))
        })?;
        match name {
            "sslmode" => mode = Some(value),
            "sslrootcert" => root = Some(value),
            _ if KNOWN.contains(&name) => rest.push(parameter),
            _ => {
                let name = UNKNOWN.iter().find(|known| **known == name).map_or_else(String::new, |name| format!(" `{name}`"));
                let help = format!("it can have sslmode, sslrootcert, {}", KNOWN.join(", "));
                return Err(Wrong::new(format!("`url` has a parameter{name} that is not known here"), help));
            }
        }
    }
    let connection = if rest.is_empty() { whole.to_owned() } else { format!("{whole}?{}", rest.join("&")) };
    // What is wrong is not repeated: it may be a password with a sign in it that should have been escaped.
    let mut connection: tokio_postgres::Config = connection.parse().map_err(|_| {
        let help =
            format!("signs that mean something in a URL are written as % and two hex digits, also in a password; {EXAMPLE}");
        Wrong::new("`url` is no PostgreSQL URL", help)
    })?;
    if connection.get_hosts().is_empty() && connection.get_hostaddrs().is_empty() {
        let help = format!(
            "the folder of a local socket is a host too: postgres://countersign@/countersign?host=/run/postgresql; {EXAMPLE}"
        );
        return Err(Wrong::new("`url` names no host", help));
    }
    if connection.get_user().is_none_or(str::is_empty) {
        return Err(Wrong::new("`url` names no user", EXAMPLE));
    }
    let local = connection.get_hosts().iter().all(|host| matches!(host, Host::Unix(_))) && !connection.get_hosts().is_empty();
    let (mode, trust) = security(mode, root, file)?;
    // There is no TLS on a socket of this machine, nor need of it.
    connection.ssl_mode(if local { SslMode::Disable } else { mode });
    Ok(Postgres { connection, trust, limits: Limits::default() })
}

/// <https://www.postgresql.org/docs/15/libpq-ssl.html#LIBPQ-SSL-PROTECTION>
fn security(
    mode: Option<&str>,
    root: Option<&str>,
    file: impl Fn(&str) -> Result<PathBuf, Wrong>,
) -> Result<(SslMode, Trust), Wrong> {
    let authorities = match root {
        None | Some("system") => Authorities::Machine,
        Some(path) => Authorities::File(file(path)?),
    };
    match (mode, root) {
        (Some("disable"), _) => Ok((SslMode::Disable, Trust::Anything)),
        (None | Some("prefer"), _) => Ok((SslMode::Prefer, Trust::Anything)),
        (Some("require"), None) => Ok((SslMode::Require, Trust::Anything)),
        // As with libpq: whoever names authorities wants them asked.
        (Some("require" | "verify-ca"), _) => Ok((SslMode::Require, Trust::Issuer(authorities))),
        (Some("verify-full"), _) => Ok((SslMode::Require, Trust::Host(authorities))),
        (Some(_), _) => Err(Wrong::new(
            "`url` has an `sslmode` that is not known here",
            "it is one of disable, prefer, require, verify-ca, verify-full",
        )),
    }
}

/// Whether whoever stands between could read along, or be taken for the database, and nobody has said that this is fine.
pub(crate) fn is_exposed(settings: &Postgres) -> bool {
    let here = |host: &Host| match host {
        Host::Unix(_) => true,
        Host::Tcp(name) => name == "localhost" || name.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback()),
    };
    settings.connection.get_ssl_mode() != SslMode::Disable
        && settings.trust == Trust::Anything
        && !settings.connection.get_hosts().iter().all(here)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<Postgres, String> {
        read(url, |path| Ok(PathBuf::from("/etc").join(path))).map_err(|wrong| wrong.message)
    }

    #[test]
    fn sslmode_and_sslrootcert_are_read_as_libpq_reads_them() {
        let file = || Authorities::File("/etc/ca.pem".into());
        for (parameters, mode, trust) in [
            ("", SslMode::Prefer, Trust::Anything),
            ("?sslmode=disable", SslMode::Disable, Trust::Anything),
            ("?sslmode=prefer", SslMode::Prefer, Trust::Anything),
            ("?sslmode=require", SslMode::Require, Trust::Anything),
            ("?sslmode=require&sslrootcert=ca.pem", SslMode::Require, Trust::Issuer(file())),
            ("?sslrootcert=ca.pem&sslmode=verify-ca", SslMode::Require, Trust::Issuer(file())),
            ("?sslmode=verify-full", SslMode::Require, Trust::Host(Authorities::Machine)),
            ("?sslmode=verify-full&sslrootcert=system", SslMode::Require, Trust::Host(Authorities::Machine)),
            ("?application_name=one&sslmode=verify-full&sslrootcert=ca.pem", SslMode::Require, Trust::Host(file())),
        ] {
            let settings = parse(&format!("postgres://u@db/ledger{parameters}")).unwrap();
            assert_eq!((settings.connection.get_ssl_mode(), settings.trust), (mode, trust), "{parameters}");
        }
    }

    #[test]
    fn hosts_user_password_and_database_are_read_and_the_password_is_never_shown() {
        let settings = parse("postgresql://u:p%40ss%2Fhunter2@one:1,two:2/ledger?options=-csearch_path%3Dx").unwrap();
        let connection = &settings.connection;
        assert_eq!(connection.get_password(), Some(b"p@ss/hunter2".as_slice()));
        assert_eq!((connection.get_user(), connection.get_dbname()), (Some("u"), Some("ledger")));
        assert_eq!((connection.get_hosts().len(), connection.get_ports()), (2, [1, 2].as_slice()));
        assert_eq!(settings.place(), "postgres://one:1,two:2/ledger");
        assert!(!format!("{settings:?}").contains("hunter2"));
        assert!(parse("postgres://u@/ledger?host=/run/postgresql").is_ok_and(|settings| !is_exposed(&settings)));
    }

    #[test]
    fn only_a_database_elsewhere_that_nobody_vouches_for_is_exposed() {
        for (url, expected) in [
            ("postgres://u@db/l", true),
            ("postgres://u@db/l?sslmode=require", true),
            ("postgres://u@localhost,db/l", true),
            ("postgres://u@db/l?sslmode=disable", false),
            ("postgres://u@db/l?sslmode=verify-full", false),
            ("postgres://u@127.0.0.1,localhost/l", false),
        ] {
            assert_eq!(is_exposed(&parse(url).unwrap()), expected, "{url}");
        }
    }
}
