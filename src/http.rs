//! HTTP, served: the listeners with their limits, problem documents (RFC 9457), and the probes.

mod body;
mod impatient;
mod listener;
mod probes;
mod problem;
mod server;
mod tls;

use std::{io, net::SocketAddr, path::PathBuf};

pub use self::{
    body::collect,
    probes::{Check, Readiness},
    problem::Problem,
    server::{Counters, Limits, Server},
    tls::Tls,
};

/// Why nothing can be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot listen on {address}")]
    Bind {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("cannot listen on the socket {}", path.display())]
    Socket {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("another process listens on {}: stop it first, or give this one a folder of its own", .0.display())]
    InUse(PathBuf),
    #[error("{} is not a socket: move it away, so that the local socket can be made there", .0.display())]
    NotASocket(PathBuf),
    #[error("the TLS certificate cannot be used: {0}; expected PEM, the server's own certificate first")]
    Certificate(String),
    #[error("the TLS key cannot be used: {0}; expected one unencrypted PEM key that belongs to the certificate")]
    Key(String),
}
