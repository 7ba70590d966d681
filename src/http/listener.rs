use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::{Error, Tls};

/// Where connections come from.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp { listener: TcpListener, tls: Option<Tls> },
    Unix { file: SocketFile, listener: UnixListener },
}

/// A connection that nothing was read from yet.
pub(super) enum Stream {
    Tcp(TcpStream),
    Tls(TcpStream, Tls),
    Unix(UnixStream),
}

impl Listener {
    pub(super) async fn tcp(address: SocketAddr, tls: Option<Tls>) -> Result<Self, Error> {
        let listener = TcpListener::bind(address).await.map_err(|source| Error::Bind { address, source })?;
        Ok(Self::Tcp { listener, tls })
    }

    /// Listens where only this user can connect. A file that nobody listens on any more is replaced.
    pub(super) async fn unix(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Socket { path: path.to_owned(), source };
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => return Err(Error::NotASocket(path.to_owned())),
            Ok(_) => match UnixStream::connect(path).await {
                Ok(_) => return Err(Error::InUse(path.to_owned())),
                Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {}
                Err(error) => return Err(failed(error)),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        // Made aside and moved, so that at its own name it never lets others in.
        let mut aside = path.to_owned().into_os_string();
        aside.push(".new");
        match fs::remove_file(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&aside).map_err(failed)?;
        fs::set_permissions(&aside, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let owner = fs::metadata(&aside).map_err(failed)?.uid();
        fs::rename(&aside, path).map_err(failed)?;
        Ok(Self::Unix { file: SocketFile { path: path.to_owned(), owner }, listener })
    }

    /// Cancel-safe.
    pub(super) async fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp { listener, tls } => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(match tls {
                    Some(tls) => Stream::Tls(stream, tls.clone()),
                    None => Stream::Tcp(stream),
                })
            }
            Self::Unix { file, listener } => {
                let (stream, _) = listener.accept().await?;
                let peer = stream.peer_cred()?.uid();
                if peer == file.owner || peer == 0 {
                    Ok(Stream::Unix(stream))
                } else {
                    Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("user {peer} is not the user of this daemon")))
                }
            }
        }
    }

    pub(super) fn local_addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp { listener, .. } => listener.local_addr().ok(),
            Self::Unix { .. } => None,
        }
    }
}

/// Removed when it is dropped, which is before its listener closes: a successor's file is never taken for ours.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    owner: u32,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // What stays behind is found stale by the next start.
        let _ = fs::remove_file(&self.path);
    }
}
