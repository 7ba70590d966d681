use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use toml::de::{DeTable, DeValue};

use super::{Problems, Severity, outside::Outside, problem::Source, report::Report, server, syntax};

/// Where a daemon that runs with a file answers its neighbours on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Door {
    /// Of this machine: a loopback address where it listens on every one.
    pub address: SocketAddr,
    /// Whether it speaks TLS there.
    pub tls: bool,
}

impl Door {
    /// Reads as little of a file as this takes, and none of its secrets. A daemon keeps working with what it had when its file
    /// was spoilt later, so whether it is well must not hang on the rest of the file.
    ///
    /// # Errors
    /// The file cannot be read, its `listen` is no address, or it is so broken that it may have one where none can be read.
    pub fn load(path: &Path) -> Result<Self, Problems> {
        Self::parse(&super::text_of(path)?, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, Problems> {
        let outside = Outside::machine(path.parent().unwrap_or(Path::new("")));
        let mut report = Report::new(Source::new(text, path), outside);
        let readable = syntax::readable(text, &mut report);
        let document = syntax::document(&readable, &mut report);
        let server = document.get("server").and_then(|server| server.get_ref().as_table());
        let of_server = |key: &str| server.and_then(|server: &DeTable<'_>| server.get(key));
        let tls = of_server("tls").is_some();
        let Some(listen) = of_server("listen") else {
            // It may stand in what could not be read.
            let problems = report.into_problems();
            let is_broken = problems.iter().any(|problem| problem.severity == Severity::Error);
            let default = Self { address: nearby(server::default_listen()), tls };
            return if is_broken { Err(Problems::new(problems)) } else { Ok(default) };
        };
        let address = match listen.get_ref() {
            DeValue::String(text) => server::address(text),
            _ => server::address(""),
        };
        match address {
            Ok(address) => Ok(Self { address: nearby(address), tls }),
            Err(wrong) => {
                report.error(listen.span(), wrong.message, wrong.help);
                Err(Problems::new(report.into_problems()))
            }
        }
    }
}

/// "All addresses" is none that can be connected to.
fn nearby(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

#[cfg(test)]
mod tests {
    use super::*;

    fn door(text: &str) -> Result<(String, bool), String> {
        let door = Door::parse(text, Path::new("/nowhere/countersign.toml")).map_err(|problems| problems.to_string())?;
        Ok((door.address.to_string(), door.tls))
    }

    #[test]
    fn the_door_of_a_file_is_on_this_machine() {
        for (text, address) in [
            ("", "127.0.0.1:8080"),
            ("[server]\ngrace = \"1s\"", "127.0.0.1:8080"),
            ("[server]\nlisten = \"0.0.0.0:9000\"", "127.0.0.1:9000"),
            ("[server]\nlisten = \"[::]:9000\"", "[::1]:9000"),
            ("[server]\nlisten = \"192.0.2.7:9000\"", "192.0.2.7:9000"),
        ] {
            assert_eq!(door(text), Ok((address.to_owned(), false)), "{text}");
        }
        let tls = "[server]\ntls = { certificate = \"gone.pem\", key = { file = \"gone.key\" } }";
        assert_eq!(door(tls), Ok(("127.0.0.1:8080".to_owned(), true)));
    }

    #[test]
    fn a_file_that_was_spoilt_elsewhere_still_tells_the_door() {
        let spoilt = "[server]\nlisten = \"127.0.0.1:9000\"\n\n[[rule]]\nname\nscpe = \"team\"\ntoken = { env = \"UNSET\" }\n";
        assert_eq!(door(spoilt), Ok(("127.0.0.1:9000".to_owned(), false)));
    }

    #[test]
    fn what_may_be_the_wrong_door_is_not_guessed() {
        let lost = door("[server\nlisten = \"127.0.0.1:9000\"\n").unwrap_err();
        assert!(lost.contains("countersign.toml:1:"), "{lost}");
        for wrong in ["listen = \"localhost:9000\"", "listen = 9000"] {
            let wrong = door(&format!("[server]\n{wrong}\n")).unwrap_err();
            assert!(wrong.contains("countersign.toml:2:10") && wrong.contains("host names are not looked up"), "{wrong}");
        }
    }
}
