//! What a database's refusal means: for the transaction, and for whoever waits for it.

use std::{io, sync::Arc};

use crate::ledger::{Cause, Error};

/// Why one go at the database came to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// The database's word, or the network's.
    Database(tokio_postgres::Error),
    /// The database did not answer. What was asked of it may be done or not.
    Silent,
    /// Another replica told of the same event at the same moment: what was decided on is no longer so.
    Raced,
    /// A row holds what this version did not write.
    Damaged(&'static str),
    /// The database is no place for this ledger.
    Unfit(Error),
}

impl From<tokio_postgres::Error> for Failure {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Database(error)
    }
}

/// What a SQLSTATE asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// The transaction met another one: the same again, at once.
    Again,
    /// May pass: tell whoever waits, and take a new connection.
    Passing,
    /// Stays so until an administrator does this.
    Standing(&'static str),
}

/// By the first entry that the SQLSTATE begins with; what none fits may pass.
/// <https://www.postgresql.org/docs/15/errcodes-appendix.html>
const MEANINGS: &[(&str, Meaning)] = &[
    // Protocol violations come from poolers that lend a connection for a transaction and forget what was prepared on it.
    ("08P01", Meaning::Standing(POOLER)),
    ("26", Meaning::Standing(POOLER)),
    ("42P05", Meaning::Standing(POOLER)),
    ("40", Meaning::Again),
    ("28", Meaning::Standing("correct the user and password in [ledger] url, or let this user in in the database's pg_hba.conf")),
    ("3D", Meaning::Standing("create the database, or correct its name in [ledger] url")),
    (
        "42501",
        Meaning::Standing(
            "let the user of [ledger] url create a schema (GRANT CREATE ON DATABASE), or make it the owner of the schema countersign",
        ),
    ),
    ("42", Meaning::Standing(RESTORE)),
    ("3F", Meaning::Standing(RESTORE)),
    // Connections (08), resources (53), locks (55), shutdown, start and time-outs (57), read-only transactions (25), the disk
    // (58) and what else there is pass, or are for the next try to meet again: nothing was recorded, and nothing is lost.
];

const POOLER: &str = "let [ledger] url name the database itself, or a pooler that keeps a session on its connection";
const RESTORE: &str = "restore the tables of the schema countersign, or drop it and a new ledger is begun";

pub(super) fn meaning(sqlstate: &str) -> Meaning {
    let found = MEANINGS.iter().find(|(begin, _)| sqlstate.starts_with(begin));
    found.map_or(Meaning::Passing, |(_, meaning)| *meaning)
}

impl Failure {
    pub(super) fn meaning(&self) -> Meaning {
        match self {
            Self::Database(error) => match error.code() {
                Some(code) => meaning(code.code()),
                None if is_without_password(error) => Meaning::Standing("write the user's password into [ledger] url"),
                None => Meaning::Passing,
            },
            Self::Raced => Meaning::Again,
            Self::Silent | Self::Damaged(_) | Self::Unfit(_) => Meaning::Passing,
        }
    }

    /// Whether it was the connection: cut, or ended by a database that stops. Another one may do.
    pub(super) fn is_lost(&self) -> bool {
        match self {
            Self::Database(error) => error.code().is_none_or(|code| code.code().starts_with("57P")),
            Self::Silent | Self::Raced | Self::Damaged(_) | Self::Unfit(_) => false,
        }
    }

    /// For whoever waits for the ledger to be `what` ("written", "read").
    pub(super) fn into_error(self, what: &'static str) -> Error {
        let meaning = self.meaning();
        let source: Cause = match self {
            Self::Unfit(error) => return error,
            Self::Database(error) => Arc::new(error),
            Self::Silent => Arc::new(io::Error::new(io::ErrorKind::TimedOut, "the database does not answer")),
            Self::Raced => Arc::new(io::Error::other("other replicas tell of the same event all the time")),
            Self::Damaged(column) => {
                let what = format!("what stands in column {column:?} was not written by this version");
                Arc::new(io::Error::new(io::ErrorKind::InvalidData, what))
            }
        };
        match meaning {
            Meaning::Standing(cure) => Error::Refused { cure, source },
            Meaning::Again | Meaning::Passing => Error::Unavailable { what, source },
        }
    }
}

/// The server asks for a password and none was given. The client has no other word for it.
fn is_without_password(error: &tokio_postgres::Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.to_string() == "password missing")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sqlstate_is_tried_again_or_told_with_its_cure() {
        for code in ["40001", "40P01"] {
            assert_eq!(meaning(code), Meaning::Again, "{code}");
        }
        for code in ["08006", "25006", "53100", "53300", "55P03", "57014", "57P01", "57P03", "58030", "XX000", "22021", "23505"] {
            assert_eq!(meaning(code), Meaning::Passing, "{code}");
        }
        for (code, cure) in [
            ("28P01", "password"),
            ("28000", "pg_hba"),
            ("3D000", "create the database"),
            ("42501", "GRANT"),
            ("42P01", "restore"),
            ("3F000", "restore"),
            ("26000", "pooler"),
            ("42P05", "pooler"),
        ] {
            assert!(matches!(meaning(code), Meaning::Standing(words) if words.contains(cure)), "{code}");
        }
    }
}
