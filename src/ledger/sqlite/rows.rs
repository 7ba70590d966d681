//! How values stand in SQLite's columns, both ways.

use std::str::FromStr;

use jiff::Timestamp;
use rusqlite::{
    Row, ToSql,
    types::{FromSql, FromSqlError, FromSqlResult, ToSqlOutput, Type, Value, ValueRef},
};

use crate::{
    ledger::columns::{digest_column, read_digest, read_outcome},
    oci::Digest,
    outcome::Outcome,
};

/// Raw bytes: 32 are SHA-256, 64 are SHA-512.
pub(super) struct DigestColumn(pub(super) Digest);

impl ToSql for DigestColumn {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Owned(Value::Blob(digest_column(&self.0))))
    }
}

impl FromSql for DigestColumn {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        read_digest(value.as_blob()?).map(Self).map_err(FromSqlError::other)
    }
}

/// Microseconds since 1970 in UTC.
pub(super) struct TimeColumn(pub(super) Timestamp);

impl ToSql for TimeColumn {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(self.0.as_microsecond().into())
    }
}

impl FromSql for TimeColumn {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        Timestamp::from_microsecond(value.as_i64()?).map(Self).map_err(FromSqlError::other)
    }
}

/// From the columns `outcome` and `reason`.
pub(super) fn outcome(row: &Row<'_>) -> rusqlite::Result<Outcome> {
    let name: String = row.get("outcome")?;
    let reason: Option<String> = row.get("reason")?;
    read_outcome(&name, reason.as_deref()).ok_or_else(|| damaged(row, "outcome"))
}

/// A column that is read by a parser.
pub(super) fn parsed<T: FromStr>(row: &Row<'_>, column: &str) -> rusqlite::Result<Option<T>> {
    let text: Option<String> = row.get(column)?;
    text.map(|text| text.parse().ok().ok_or_else(|| damaged(row, column))).transpose()
}

/// For a column whose content nothing here can have written.
pub(super) fn damaged(row: &Row<'_>, column: &str) -> rusqlite::Error {
    let index = row.as_ref().column_index(column).unwrap_or_default();
    let what = format!("what stands in column {column:?} was not written by this version");
    rusqlite::Error::FromSqlConversionFailure(index, Type::Text, what.into())
}
