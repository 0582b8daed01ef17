//! The socket, from both sides.

use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::Status;

/// How long an answer may take, on either side.
const PATIENCE: Duration = Duration::from_secs(10);
/// An answer is not longer than this, in bytes.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// Why nobody could be asked, or could not listen.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// No socket, or nobody behind it.
    #[error("no fsd answers at {path}: {source}; say with --data which one is meant, or start it")]
    Nobody {
        /// The socket.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Another fsd has the same data directory.
    #[error("another fsd answers at {0}; choose another data directory with --data")]
    Taken(PathBuf),
    /// The socket cannot be made.
    #[error("cannot listen on {path}: {source}")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Not what an fsd says.
    #[error("{path} answered something else than a status: {source}")]
    Answer {
        /// The socket.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
}

/// A socket that answers. Removed when dropped.
pub struct Admin {
    path: PathBuf,
}

impl Admin {
    /// Answers everybody who connects with what `status` says then. Only this user may connect.
    pub fn listen(path: &Path, status: Arc<dyn Fn() -> Option<Status> + Send + Sync>) -> Result<Admin, AdminError> {
        let failed = |source| AdminError::Listen { path: path.to_owned(), source };
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(failed)?;
        }
        match UnixStream::connect(path) {
            Ok(_) => return Err(AdminError::Taken(path.to_owned())),
            // Left behind by one that was killed.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)?
            }
            Err(_) => {}
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let serve = move || {
            for stream in listener.incoming().flatten() {
                let answer = status().and_then(|status| serde_json::to_vec(&status).ok());
                let _ = stream.set_write_timeout(Some(PATIENCE));
                // Who does not listen to the answer does not want it.
                let _ = answer.map(|answer| (&stream).write_all(&answer));
            }
        };
        thread::Builder::new().name("admin".to_owned()).spawn(serve).map_err(failed)?;
        Ok(Admin { path: path.to_owned() })
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Asks the fsd behind the socket.
pub fn ask(path: &Path) -> Result<Status, AdminError> {
    let nobody = |source| AdminError::Nobody { path: path.to_owned(), source };
    let stream = UnixStream::connect(path).map_err(nobody)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(nobody)?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).map_err(nobody)?;
    serde_json::from_slice(&answer).map_err(|source| AdminError::Answer { path: path.to_owned(), source })
}
