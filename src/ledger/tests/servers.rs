//! What only a database server can do to a ledger.

use super::*;
