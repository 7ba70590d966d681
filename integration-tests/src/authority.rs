//! A certificate authority of an administrator's, by openssl: its root signs certificates for keys that others hold.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::certificates::openssl;
use crate::process::scratch;

const CONFIG: &str = "[req]\ndistinguished_name=dn\nprompt=no\n[dn]\nCN=unused\n\
                      [ca]\nbasicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n\
                      [leaf]\nbasicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=codeSigning\n";

#[derive(Debug)]
pub struct Authority {
    folder: TempDir,
}

impl Authority {
    pub fn new() -> Result<Self> {
        let own = Self { folder: scratch()? };
        fs::write(own.folder.path().join("openssl.cnf"), CONFIG)?;
        own.openssl("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out root.key")?;
        own.openssl("req -new -config openssl.cnf -key root.key -subj /C=DE/ST=Berlin/O=Example/CN=root -out root.csr")?;
        own.openssl("x509 -req -days 99 -in root.csr -signkey root.key -extfile openssl.cnf -extensions ca -out root.pem")?;
        Ok(own)
    }

    /// The root's certificate, as PEM.
    pub fn root(&self) -> Result<String> {
        self.read("root.pem")
    }

    /// A certificate of `subject` (`/C=DE/…`) for signing code with this key, and the root's after it, as PEM.
    pub fn chain(&self, public_key: &Path, subject: &str) -> Result<String> {
        // A request has to be signed by some key; its holder is asked for nothing.
        self.openssl("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out request.key")?;
        self.openssl(&format!("req -new -config openssl.cnf -key request.key -subj {subject} -out leaf.csr"))?;
        fs::copy(public_key, self.folder.path().join("leaf.pub"))?;
        self.openssl(&format!(
            "x509 -req -days 60 -in leaf.csr -force_pubkey leaf.pub -CA root.pem -CAkey root.key -set_serial {} -extfile openssl.cnf \
             -extensions leaf -out leaf.pem",
            fastrand::u32(1..)
        ))?;
        Ok(self.read("leaf.pem")? + &self.root()?)
    }

    fn read(&self, file: &str) -> Result<String> {
        fs::read_to_string(self.folder.path().join(file)).with_context(|| format!("read {file}"))
    }

    fn openssl(&self, arguments: &str) -> Result<()> {
        openssl(self.folder.path(), arguments)
    }
}
