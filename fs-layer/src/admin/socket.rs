//! The socket, from both sides: one line of JSON asks, one answers, and the connection ends.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::{Answer, Request, Status};

/// How long asking, and an answer that is there, may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// A question and an answer are not longer than this, in bytes.
const REQUEST_BYTES_MAX: u64 = 64 << 10;
const ANSWER_BYTES_MAX: u64 = 16 << 20;
/// Questions that are answered at a time.
const ASKING_MAX: usize = 16;

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
    #[error("{path} answered something else than was asked for: {source}; is it an fsd of another version?")]
    Answer {
        /// The socket.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// What was asked for could not be done.
    #[error("{0}")]
    Refused(String),
}

/// What a running fsd does about requests. Called from many threads at once.
pub trait Answers: Send + Sync {
    /// The answer, however long it takes.
    fn answer(&self, request: Request) -> Answer;
}

/// A socket that answers. Removed when dropped.
pub struct Admin {
    path: PathBuf,
}

impl Admin {
    /// Answers everybody who connects, each in a thread of its own. Only this user may connect.
    pub fn listen(path: &Path, answers: Arc<dyn Answers>) -> Result<Admin, AdminError> {
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
        let asking = Arc::new(AtomicUsize::new(0));
        let serve = move || {
            for stream in listener.incoming().flatten() {
                let turn = Turn::take(&asking);
                let answers = answers.clone();
                let serve = move || {
                    let answer = match turn {
                        Some(_) => hear(&stream).map(|request| answers.answer(request)),
                        None => Err("too many requests at once; try again".to_owned()),
                    };
                    // Who does not listen to the answer does not want it.
                    let _ = tell(&stream, &answer.unwrap_or_else(Answer::Error));
                };
                if let Err(error) = thread::Builder::new().name("admin".to_owned()).spawn(serve) {
                    tracing::warn!("no thread for a request: {error}");
                }
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

/// One of those who are answered at a time.
struct Turn(Arc<AtomicUsize>);

impl Turn {
    fn take(asking: &Arc<AtomicUsize>) -> Option<Turn> {
        let turn = Turn(asking.clone());
        // Given back when dropped, also here.
        (turn.0.fetch_add(1, Ordering::SeqCst) < ASKING_MAX).then_some(turn)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn hear(stream: &UnixStream) -> Result<Request, String> {
    let mut line = Vec::new();
    let read = stream
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| BufReader::new(stream.take(REQUEST_BYTES_MAX)).read_until(b'\n', &mut line));
    read.map_err(|error| format!("no request came: {error}"))?;
    serde_json::from_slice(&line).map_err(|error| format!("not a request that this fsd knows: {error}"))
}

fn tell(mut stream: &UnixStream, answer: &Answer) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Asks the fsd behind the socket. `patience`: how long it may take; `None` waits for ever.
///
/// # Errors
/// If nobody answers, or what was asked for could not be done.
pub fn request(path: &Path, request: &Request, patience: Option<Duration>) -> Result<Answer, AdminError> {
    let nobody = |source| AdminError::Nobody { path: path.to_owned(), source };
    let strange = |source| AdminError::Answer { path: path.to_owned(), source };
    let stream = UnixStream::connect(path).map_err(nobody)?;
    let mut line = serde_json::to_vec(request).map_err(strange)?;
    line.push(b'\n');
    stream.set_write_timeout(Some(PATIENCE)).map_err(nobody)?;
    stream.set_read_timeout(patience).map_err(nobody)?;
    (&stream).write_all(&line).map_err(nobody)?;
    // Nothing more comes from here.
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).map_err(nobody)?;
    if answer.is_empty() {
        return Err(nobody(io::ErrorKind::UnexpectedEof.into()));
    }
    match serde_json::from_slice(&answer).map_err(strange)? {
        Answer::Error(why) => Err(AdminError::Refused(why)),
        answer => Ok(answer),
    }
}

/// Asks the fsd behind the socket what it does.
///
/// # Errors
/// As [`request`].
pub fn ask(path: &Path) -> Result<Status, AdminError> {
    match request(path, &Request::Status, Some(PATIENCE))? {
        Answer::Status(status) => Ok(*status),
        _ => {
            let source = serde::de::Error::custom("no status");
            Err(AdminError::Answer { path: path.to_owned(), source })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::sync::{Mutex, PoisonError};

    use super::*;

    /// Creation waits for a word.
    struct Slow(Mutex<Receiver<()>>);

    impl Answers for Slow {
        fn answer(&self, request: Request) -> Answer {
            match request {
                Request::SnapshotCreate { name } => {
                    let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    Answer::Error(format!("no {name}"))
                }
                _ => Answer::Done,
            }
        }
    }

    fn listen() -> (tempfile::TempDir, PathBuf, Admin, Sender<()>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (sender, receiver) = channel();
        let admin = Admin::listen(&path, Arc::new(Slow(Mutex::new(receiver)))).unwrap();
        (dir, path, admin, sender)
    }

    #[test]
    fn others_are_answered_while_one_waits() {
        let (_dir, path, _admin, go_on) = listen();
        let create = Request::SnapshotCreate { name: "a".into() };
        thread::scope(|scope| {
            let slow = scope.spawn(|| request(&path, &create, None));
            for _ in 0..3 {
                assert!(matches!(request(&path, &Request::Status, Some(PATIENCE)), Ok(Answer::Done)));
            }
            assert!(!slow.is_finished());
            go_on.send(()).unwrap();
            let error = slow.join().unwrap().unwrap_err();
            assert_eq!(error.to_string(), "no a");
        });
        assert!(matches!(Admin::listen(&path, Arc::new(Slow(Mutex::new(channel().1)))), Err(AdminError::Taken(_))));
    }

    #[test]
    fn what_is_no_request_is_told_so() {
        let (_dir, path, _admin, _go_on) = listen();
        for line in ["", "\n", "{}\n", "{\"request\":\"dance\"}\n", "nonsense"] {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(line.as_bytes()).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("{\"error\":\"not a request"), "{line}: {answer}");
        }
        assert!(matches!(request(&path.with_extension("x"), &Request::Status, None), Err(AdminError::Nobody { .. })));
    }
}
