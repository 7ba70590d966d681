//! The certificates that witnesses signed for themselves, kept in the ledger: every replica names the same one, and it is the one
//! that users were given.

use super::{Chain, MakeError, SubjectName, make};
use crate::{
    clock::Clock,
    ledger::{self, KeptCertificate, Ledger},
    outcome::{Classify, Verdict},
    witness::Witness,
};

/// Why a witness's certificate cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the certificate of witness {witness} cannot be looked up or kept")]
    Ledger { witness: String, source: ledger::Error },
    #[error("certificate {number} of witness {witness} in the ledger is damaged")]
    Damaged { witness: String, number: u32, source: super::Error },
    #[error(transparent)]
    Make(#[from] MakeError),
    /// The database did not tell of what it had just been told to keep.
    #[error("the ledger did not keep the certificate of witness {witness}")]
    Lost { witness: String },
}

impl Classify for Error {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Ledger { source, .. } => source.verdict(),
            Self::Make(error) => error.verdict(),
            Self::Damaged { .. } => {
                Verdict::Refuse { cure: "restore the ledger's table of certificates, or delete the damaged row of it" }
            }
            Self::Lost { .. } => Verdict::TRANSIENT,
        }
    }
}

/// The certificates that are kept of a witness's key, by its fingerprint: the one that signatures name comes first, then those
/// that it replaced, whose signatures count on.
pub async fn kept(ledger: &Ledger, witness: &str, key: &str) -> Result<Vec<Chain>, Error> {
    let kept = ledger.certificates(witness, key).await.map_err(|source| Error::Ledger { witness: witness.to_owned(), source })?;
    let chain = |kept: &KeptCertificate| {
        let damaged = |source| Error::Damaged { witness: witness.to_owned(), number: kept.number, source };
        Chain::from_pem(&kept.pem).map_err(damaged)
    };
    kept.iter().map(chain).collect()
}

/// The same; if there is none yet, the witness signs one, and it is kept.
pub async fn kept_or_made(ledger: &Ledger, witness: &Witness, subject: &SubjectName, clock: &Clock) -> Result<Vec<Chain>, Error> {
    let kept = kept(ledger, witness.name(), witness.public_key().fingerprint()).await?;
    if kept.is_empty() { renewed(ledger, witness, subject, clock).await } else { Ok(kept) }
}

/// The same with another one before them, whatever there is: what users have in their trust stores does not know it yet.
pub async fn renewed(ledger: &Ledger, witness: &Witness, subject: &SubjectName, clock: &Clock) -> Result<Vec<Chain>, Error> {
    let (name, key) = (witness.name(), witness.public_key().fingerprint());
    let failed = |source| Error::Ledger { witness: name.to_owned(), source };
    let newest = ledger.certificates(name, key).await.map_err(failed)?.first().map_or(0, |kept| kept.number);
    let chain = make(witness, subject, clock.now()).await?;
    let made =
        KeptCertificate { witness: name.to_owned(), key: key.to_owned(), number: newest.saturating_add(1), pem: chain.to_pem() };
    ledger.keep_certificate(made).await.map_err(failed)?;
    // Another replica may have been first: then its certificate is the one.
    let kept = kept(ledger, name, key).await?;
    if kept.is_empty() { Err(Error::Lost { witness: name.to_owned() }) } else { Ok(kept) }
}
