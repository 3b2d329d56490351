//! The socket that plugins connect to. It is never taken from a runtime that lives.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};

use crate::error::Error;

/// A socket that this server made, and which file that was.
pub(crate) struct Socket {
    pub listener: UnixListener,
    path: PathBuf,
    file: (u64, u64),
    /// The folder, when it was made for the socket.
    made: Option<PathBuf>,
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|m| (m.dev(), m.ino()))
}

/// Makes the socket, in place of one that nobody listens on any more.
pub(crate) async fn listen(path: &Path) -> Result<Socket, Error> {
    let failed = |why: String| Error::Socket { path: path.to_owned(), why };
    let io = |e: io::Error| failed(e.to_string());
    let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let made = (!dir.exists()).then(|| dir.to_owned());
    if made.is_some() {
        // As upstream's: plugins are root's.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
    }
    // Against another server that is just looking, too. Held for a moment only.
    let held = File::open(dir).map_err(io)?;
    let locked = tokio::task::spawn_blocking(move || held.lock().map(|()| held)).await;
    let _held = locked.map_err(|e| failed(e.to_string()))?.map_err(io)?;
    match UnixStream::connect(path).await {
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(io)?,
        // Whoever does not take a connection just now may be busy.
        Ok(_) => return Err(Error::Taken { path: path.to_owned() }),
        Err(e) => return Err(failed(format!("something else is there: {e}"))),
    }
    let listener = UnixListener::bind(path).map_err(io)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(io)?;
    Ok(Socket { listener, path: path.to_owned(), file: identity(path).map_err(io)?, made })
}

/// Takes away a socket that nobody listens on any more.
pub async fn remove_dead_socket(path: &Path) {
    if UnixStream::connect(path).await.is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused) {
        // It is in nobody's way.
        let _ = fs::remove_file(path);
    }
}

impl Drop for Socket {
    /// Another runtime may have put its own there; upstream's do without asking.
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.file) {
            let _ = fs::remove_file(&self.path);
            // Unless somebody else uses it.
            let _ = self.made.as_ref().map(fs::remove_dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_living_runtimes_socket_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nri/nri.sock");
        let first = listen(&path).await.unwrap();
        let e = listen(&path).await.err().unwrap().to_string();
        assert!(e.contains("another runtime") && e.contains("nri.sock"), "{e}");
        remove_dead_socket(&path).await;
        assert!(path.exists());
        drop(first);
        assert!(!path.exists() && !path.parent().unwrap().exists());
        fs::create_dir(path.parent().unwrap()).unwrap();
        // Left by one that was killed.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let second = listen(&path).await.unwrap();
        fs::remove_file(&path).unwrap();
        let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        drop(second);
        assert!(path.exists(), "the other's was removed");
        drop(other);
        remove_dead_socket(&path).await;
        assert!(!path.exists());
    }
}
