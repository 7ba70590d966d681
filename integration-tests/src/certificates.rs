//! Certificates for a server on 127.0.0.1 and for its clients, made by the openssl that RabbitMQ comes with.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::process::scratch;

/// Two authorities: `ca`, of the `server`, of the `client` and of one that has `expired`; and `other`, of a `stranger`. Each is
/// NAME.pem and NAME.key. Their folder goes with it.
#[derive(Debug)]
pub struct Certificates(TempDir);

impl Certificates {
    pub fn make() -> Result<Self> {
        let made = Self(scratch()?);
        made.authority("ca")?;
        made.authority("other")?;
        made.signed("server", "ca", "30")?;
        made.signed("client", "ca", "30")?;
        made.signed("expired", "ca", "-1")?;
        made.signed("stranger", "other", "30")?;
        Ok(made)
    }

    pub fn folder(&self) -> &Path {
        self.0.path()
    }

    pub fn read(&self, name: &str) -> Result<String> {
        Ok(fs::read_to_string(self.folder().join(name))?)
    }

    /// Lines for [`crate::rabbitmq::RabbitMq::start_with`]: it speaks TLS as well, and with nobody who shows no certificate of
    /// `ca`. Such a one may say who it is in place of a password.
    pub fn demanded_by_rabbitmq(&self) -> String {
        let folder = self.folder().display();
        format!(
            "listeners.ssl.1 = 127.0.0.1:{{tls}}\n\
             ssl_options.cacertfile = {folder}/ca.pem\n\
             ssl_options.certfile = {folder}/server.pem\n\
             ssl_options.keyfile = {folder}/server.key\n\
             ssl_options.verify = verify_peer\n\
             ssl_options.fail_if_no_peer_cert = true\n\
             auth_mechanisms.1 = PLAIN\n\
             auth_mechanisms.2 = EXTERNAL\n\
             ssl_cert_login_from = common_name\n"
        )
    }

    fn openssl(&self, arguments: &str) -> Result<()> {
        openssl(self.folder(), arguments)
    }

    fn authority(&self, name: &str) -> Result<()> {
        self.openssl(&format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN={name} -keyout {name}.key -out {name}.pem"
        ))
    }

    fn signed(&self, name: &str, by: &str, days: &str) -> Result<()> {
        fs::write(self.folder().join("ext"), "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")?;
        self.openssl(&format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr"
        ))?;
        self.openssl(&format!(
            "x509 -req -in {name}.csr -CA {by}.pem -CAkey {by}.key -CAcreateserial -days {days} -extfile ext -out {name}.pem"
        ))
    }
}

/// Runs openssl in this folder, with arguments that have no spaces in them.
pub fn openssl(folder: &Path, arguments: &str) -> Result<()> {
    let output = Command::new("openssl").args(arguments.split(' ')).current_dir(folder).output();
    let output = output.context("openssl must be installed: apt-get install openssl")?;
    ensure!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
