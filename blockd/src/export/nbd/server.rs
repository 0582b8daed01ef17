//! Listening, and handing clients to the reactor of the export they ask for.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use super::handshake::{self, HandshakeError};
use super::session::SessionParams;
use crate::reactor::{DeviceKey, ReactorHandle};

/// Clients that may negotiate at the same time, per listener; more are turned away.
const MAX_NEGOTIATING: usize = 1024;
/// Pause after a failed accept (out of descriptors, mostly), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A volume as clients may see it.
#[derive(Clone)]
pub struct Export {
    /// Its canonical name.
    pub name: String,
    /// Text for people; may be empty.
    pub description: String,
    /// Size in bytes, now.
    pub size: u64,
    /// Refuse writes.
    pub read_only: bool,
    /// Where it lives.
    pub reactor: ReactorHandle,
    /// Its device there.
    pub key: DeviceKey,
}

/// What a server exports; may change while it runs.
pub trait Exports: Send + Sync {
    /// All names.
    fn list(&self) -> Vec<String>;
    /// Text for people about one of them, without making ready what is not: what [`Export::description`] would be. May be empty.
    fn describe(&self, name: &str) -> String {
        self.find(name).map_or_else(String::new, |export| export.description)
    }
    /// Gets ready for [`Exports::find`] what is not served all the time.
    fn prepare<'a>(&'a self, _name: &'a str) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(async {})
    }
    /// The export of a name. The server itself takes an empty name for the only export.
    fn find(&self, name: &str) -> Option<Export>;
    /// Why a name that is known has no export at the moment.
    fn refusal(&self, _name: &str) -> Option<String> {
        None
    }
}

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A TCP address.
    Tcp(SocketAddr),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Tcp(address) => write!(f, "{address}"),
            Listen::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Why listening failed.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address cannot be had.
    #[error("cannot listen for NBD clients on {listen}: {source}")]
    Bind {
        /// Where.
        listen: Listen,
        /// The cause.
        source: io::Error,
    },
    /// Another process answers on the socket.
    #[error("cannot listen for NBD clients on unix:{}: another server answers there; stop it or choose another path", .0.display())]
    InUse(PathBuf),
    /// The path is something other than a socket.
    #[error("cannot listen for NBD clients on unix:{}: something that is not a socket stands there; move it away", .0.display())]
    NotASocket(PathBuf),
}

/// A running server. Dropping it stops listening; clients already served stay with their reactors.
pub struct Server {
    listens: Vec<Listen>,
    tasks: Vec<JoinHandle<()>>,
}

impl Server {
    /// Listens on all of `listens` and begins to serve. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// One of the addresses cannot be had; then none is kept.
    pub async fn start(listens: &[Listen], exports: Arc<dyn Exports>) -> Result<Self, ListenError> {
        let mut server = Self { listens: Vec::new(), tasks: Vec::new() };
        for listen in listens {
            let failed = |source| ListenError::Bind { listen: listen.clone(), source };
            match listen {
                Listen::Tcp(address) => {
                    let listener = TcpListener::bind(address).await.map_err(failed)?;
                    let bound = listener.local_addr().map_err(failed)?;
                    server.listens.push(Listen::Tcp(bound));
                    server.tasks.push(tokio::spawn(serve(listener, exports.clone())));
                }
                Listen::Unix(path) => {
                    remove_stale(path).await?;
                    let listener = UnixListener::bind(path).map_err(failed)?;
                    server.listens.push(listen.clone());
                    server.tasks.push(tokio::spawn(serve(listener, exports.clone())));
                }
            }
        }
        Ok(server)
    }

    /// Where it listens, with the ports the system chose.
    pub fn listens(&self) -> &[Listen] {
        &self.listens
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        for listen in &self.listens {
            if let Listen::Unix(path) = listen {
                // It is ours, and if it is gone already, so much the better.
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

/// Removes the socket a dead server left behind.
async fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let Ok(found) = std::fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !found.file_type().is_socket() {
        return Err(ListenError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)
            .map_err(|source| ListenError::Bind { listen: Listen::Unix(path.to_owned()), source }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // A busy server's full backlog is an answer too.
        _ => Err(ListenError::InUse(path.to_owned())),
    }
}

/// A listening socket of either kind.
trait Acceptor: Send + 'static {
    type Stream: Stream;
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, String)>> + Send;
}

/// A client's socket of either kind.
trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static {
    /// The socket itself, in blocking mode: the reactor's ring waits by itself.
    fn into_fd(self) -> io::Result<OwnedFd>;
}

impl Acceptor for TcpListener {
    type Stream = TcpStream;
    async fn accept(&self) -> io::Result<(TcpStream, String)> {
        let (stream, peer) = TcpListener::accept(self).await?;
        // Replies are batched already; waiting for more would only add delay.
        stream.set_nodelay(true)?;
        Ok((stream, peer.to_string()))
    }
}

impl Stream for TcpStream {
    fn into_fd(self) -> io::Result<OwnedFd> {
        let stream = self.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(stream.into())
    }
}

impl Acceptor for UnixListener {
    type Stream = UnixStream;
    async fn accept(&self) -> io::Result<(UnixStream, String)> {
        let (stream, _) = UnixListener::accept(self).await?;
        let pid = stream.peer_cred().ok().and_then(|cred| cred.pid());
        let peer = pid.map_or("unix".to_owned(), |pid| format!("unix:pid {pid}"));
        Ok((stream, peer))
    }
}

impl Stream for UnixStream {
    fn into_fd(self) -> io::Result<OwnedFd> {
        let stream = self.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(stream.into())
    }
}

async fn serve<A: Acceptor>(listener: A, exports: Arc<dyn Exports>) {
    let negotiating = Arc::new(Semaphore::new(MAX_NEGOTIATING));
    // Dropped with this task, and the negotiations with it.
    let mut clients = JoinSet::new();
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => match negotiating.clone().try_acquire_owned() {
                Ok(permit) => {
                    let exports = exports.clone();
                    clients.spawn(async move {
                        welcome(stream, &peer, exports.as_ref()).await;
                        drop(permit);
                    });
                }
                Err(_) => {
                    tracing::warn!(peer, "client turned away: too many clients are negotiating")
                }
            },
            Err(error) => {
                tracing::warn!(%error, "accepting an NBD client failed; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
        while clients.try_join_next().is_some() {}
    }
}

/// Negotiates with a client and hands it over.
async fn welcome<S: Stream>(mut stream: S, peer: &str, exports: &dyn Exports) {
    let settled: Result<Option<(Export, SessionParams)>, HandshakeError> =
        handshake::negotiate(&mut stream, exports, peer).await;
    match settled {
        Ok(Some((export, params))) => match stream.into_fd() {
            Ok(fd) => {
                tracing::debug!(peer, export = export.name, "client connected");
                export.reactor.add_connection(fd, params, export.key);
            }
            Err(error) => tracing::warn!(peer, %error, "client lost before it could be served"),
        },
        Ok(None) => tracing::debug!(peer, "client took its leave"),
        // Port scanners and health checks connect and leave.
        Err(HandshakeError::Io(error)) => {
            tracing::debug!(peer, %error, "client left during negotiation")
        }
        Err(error) => tracing::warn!(peer, %error, "client dropped"),
    }
}
