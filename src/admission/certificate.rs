//! A certificate of the webhook's own making: an authority that is kept, and certificates signed by it that are not.
//!
//! The API server trusts the authority (`caBundle`); replicas that share its folder share it. The certificate that is
//! served lives in memory, for a month, and is made anew every day.

use std::{
    fmt, fs,
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::{Span, Timestamp, civil::Date, tz::TimeZone};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, date_time_ymd,
};
use secrecy::SecretString;

use crate::http::{self, Tls};

/// How often another certificate is made.
pub const RENEWAL: Duration = Duration::from_secs(24 * 3600);
const VALID_DAYS: i32 = 30;
const AUTHORITY_YEARS: i16 = 20;
const FILE: &str = "authority.pem";
const LARGEST: u64 = 64 << 10;

/// Signs the certificates that the webhook serves. `Debug` shows no key.
pub struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: the authority cannot be kept there", path.display())]
    Keep {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{}: it holds no certificate with its private key; remove it, and let the API server trust the one that is then made", .0.display())]
    Damaged(PathBuf),
    #[error("a certificate cannot be made")]
    Make(#[source] rcgen::Error),
    #[error(transparent)]
    Serve(#[from] http::Error),
}

impl Authority {
    /// The one that is kept in `folder`; the first to come makes it.
    pub fn open(folder: &Path, now: Timestamp) -> Result<Self, Error> {
        let path = folder.join(FILE);
        let failed = |source| Error::Keep { path: path.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
        let text = match read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make(now).map_err(Error::Make).and_then(|made| keep(folder, &path, &made).map_err(failed))?
            }
            Err(error) => return Err(failed(error)),
        };
        Self::parse(&text).ok_or(Error::Damaged(path))
    }

    fn parse(text: &str) -> Option<Self> {
        let begin = text.find("-----BEGIN PRIVATE KEY-----")?;
        let certificate = text.get(..begin)?.to_owned();
        certificate.contains("-----BEGIN CERTIFICATE-----").then_some(())?;
        let key = KeyPair::from_pem(text.get(begin..)?).ok()?;
        Some(Self { certificate, issuer: Issuer::new(subject(), key) })
    }

    /// PEM: what the API server has to trust.
    #[must_use]
    pub fn bundle(&self) -> &str {
        &self.certificate
    }

    /// A certificate for these host names and addresses.
    pub fn issue(&self, names: &[String], now: Timestamp) -> Result<Tls, Error> {
        let mut params = CertificateParams::new(names).map_err(Error::Make)?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "countersign admission");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        valid(&mut params, now, Span::new().days(VALID_DAYS));
        let key = KeyPair::generate().map_err(Error::Make)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(Error::Make)?;
        Ok(Tls::from_pem(certificate.pem().as_bytes(), &SecretString::from(key.serialize_pem()))?)
    }
}

/// Both in one file, so that neither is ever there without the other.
fn make(now: Timestamp) -> Result<String, rcgen::Error> {
    let key = KeyPair::generate()?;
    let mut params = subject();
    valid(&mut params, now, Span::new().years(AUTHORITY_YEARS));
    Ok(format!("{}{}", params.self_signed(&key)?.pem(), key.serialize_pem()))
}

fn subject() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "countersign admission authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// From yesterday, for clocks that are behind.
fn valid(params: &mut CertificateParams, now: Timestamp, span: Span) {
    let today = now.to_zoned(TimeZone::UTC).date();
    let moment = |date: Date| date_time_ymd(date.year().into(), date.month().unsigned_abs(), date.day().unsigned_abs());
    params.not_before = moment(today.saturating_sub(Span::new().days(1)));
    params.not_after = moment(today.saturating_add(span));
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(LARGEST).read_to_string(&mut text)?;
    Ok(text)
}

/// Keeps what was made, unless another process was faster: then what that one made counts.
fn keep(folder: &Path, path: &Path, made: &str) -> io::Result<String> {
    let aside = folder.join(format!("{FILE}.{}", std::process::id()));
    let kept = (|| {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        file.write_all(made.as_bytes())?;
        file.sync_all()?;
        match fs::hard_link(&aside, path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => read(path),
        }
    })();
    // What stays behind does no harm.
    let _ = fs::remove_file(&aside);
    kept
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority")
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn now() -> Timestamp {
        "2026-11-22T12:00:00Z".parse().unwrap()
    }

    #[test]
    fn the_authority_is_made_once_kept_from_others_and_signs_for_names_and_addresses() {
        let folder = tempfile::tempdir().unwrap();
        let first = Authority::open(&folder.path().join("new"), now()).unwrap();
        let second = Authority::open(&folder.path().join("new"), now()).unwrap();
        assert_eq!(first.bundle(), second.bundle());
        assert!(!first.bundle().contains("PRIVATE"));
        let mode = fs::metadata(folder.path().join("new").join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0);
        second.issue(&["countersign.svc".to_owned(), "127.0.0.1".to_owned()], now()).unwrap();
        assert!(!format!("{first:?}").contains("KEY"));
    }

    #[test]
    fn of_many_who_make_it_at_once_one_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        let (one, other) = (make(now()).unwrap(), make(now()).unwrap());
        assert_eq!(keep(folder.path(), &path, &one).unwrap(), one);
        assert_eq!(keep(folder.path(), &path, &other).unwrap(), one);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_authority_is_not_replaced_behind_the_api_servers_back() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FILE), "-----BEGIN CERTIFICATE-----\n").unwrap();
        assert!(matches!(Authority::open(folder.path(), now()), Err(Error::Damaged(_))));
    }
}
