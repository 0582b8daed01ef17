//! From settings to a running daemon and back.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use backon::Retryable;
use tokio::net::{TcpListener, UnixListener, UnixStream};

use super::DataDir;
use super::signals::Signals;
use super::volumes::{Daemon, away_pauses};
use crate::admin::server::{metrics_router, router};
use crate::cache::FrameCache;
use crate::config::{Config, LogShape};
use crate::export::nbd::server::{Listen, Server};
use crate::export::nvme::server::Server as NvmeServer;
use crate::manifest::ManifestError;
use crate::program::explain;
use crate::program::notify;
use crate::reactor::{ReactorHandle, ReactorOptions};
use crate::store::{CountedStore, StoreConfig, StoreError};

/// How the identity of a store inside the data directory begins.
const EMBEDDED: &str = "dir:<data>/";

/// What is said to one start, not to every one.
#[derive(Clone, Copy, Debug, Default)]
pub struct ServeOptions {
    /// Take the configured store even if the data directory was used with another.
    pub accept_store: bool,
}

/// Serves until SIGTERM or SIGINT, then shuts down in order. A second signal ends the process at once.
///
/// # Errors
/// Whatever keeps the daemon from serving. What keeps a single volume from opening does not.
pub async fn run(config: Config, options: ServeOptions) -> anyhow::Result<()> {
    // Caught before anything is opened, so that no signal can come between.
    let signals = Signals::catch().context("cannot catch signals")?;
    run_with(config, options, signals, Announce::Aloud).await
}

/// The same inside another program, which says with `stop` when to shut down, and has signals and stdout for itself.
///
/// # Errors
/// As [`run`].
pub async fn run_embedded(
    config: Config,
    options: ServeOptions,
    stop: tokio::sync::mpsc::Receiver<()>,
) -> anyhow::Result<()> {
    run_with(config, options, Signals::Embedded(stop), Announce::No).await
}

/// Whether stdout and the service manager are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Announce {
    Aloud,
    No,
}

async fn run_with(
    mut config: Config,
    options: ServeOptions,
    mut signals: Signals,
    tell: Announce,
) -> anyhow::Result<()> {
    abort_on_panic();
    config.check().map_err(anyhow::Error::msg)?;
    let store_config = config.store_config();
    store_config.check()?;
    // Messages and clients in other working directories need the whole path.
    config.data =
        std::path::absolute(&config.data).context("cannot tell the working directory; give --data a whole path")?;
    raise_file_limit();

    let identity = store_identity(&config);
    let mut data = DataDir::open(&config.data, &identity, options.accept_store)?;
    if identity.starts_with(EMBEDDED) {
        // It is made inside the data directory, which must be known as ours by then.
        data.settle()?;
    }
    let store = tokio::select! {
        store = Box::pin(open_store(&store_config)) => store.with_context(|| format!("cannot open the store {}", store_config.url))?,
        signal = signals.next() => bail!("{signal} while the store {} was being opened", store_config.url),
    };
    // Not before: a store that was misspelt should not be remembered.
    data.settle()?;
    let frame_cache = open_frame_cache(&config, &data).await?;
    let reactors = (0..config.reactor_count())
        .map(|_| ReactorHandle::spawn(reactor_options(&config), tokio::runtime::Handle::current()))
        .collect::<io::Result<Vec<_>>>()
        .context(
            "cannot start a reactor; it needs io_uring (Linux 5.19 or later, not forbidden by seccomp or sysctl)",
        )?;
    let daemon = Arc::new(Daemon::new(config, data, store, reactors, frame_cache));

    let served = tokio::select! {
        served = serve(&daemon, tell) => served.map(|never| match never {}),
        signal = signals.next() => {
            tracing::info!("{signal}: shutting down; once more ends it at once");
            Ok(())
        }
    };
    if tell == Announce::Aloud {
        notify("STOPPING=1");
    }
    tokio::select! {
        () = daemon.close_all() => {}
        signal = signals.next() => {
            tracing::warn!("{signal} again: ending without closing the volumes; the next start recovers them from their logs");
            std::process::exit(1);
        }
    }
    served
}

/// Allows as many open files as the system lets this process have. The usual limit of 1024 is for programs that use
/// select(2); strangers who only connect could use it up, and the log could not grow any more.
fn raise_file_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls get a valid struct.
    let raised = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0
        }
    };
    if !raised {
        tracing::warn!("cannot raise the limit of open files: {}", io::Error::last_os_error());
    }
}

/// Ends the process when any thread panics. A volume whose reactor or whose job is gone would hang for ever, while a
/// restart recovers all of them from their logs.
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        eprintln!("blockd: this must not happen; ending, so that a restart recovers the volumes from their logs");
        std::process::abort();
    }));
}

/// Opens the store; while it cannot be reached, says so and tries again, as after a power cut that hit both.
async fn open_store(config: &StoreConfig) -> anyhow::Result<Arc<CountedStore>> {
    let transient = |error: &anyhow::Error| {
        error.chain().any(|cause| cause.downcast_ref::<StoreError>().is_some_and(StoreError::is_transient))
    };
    let again = |error: &anyhow::Error, pause| {
        tracing::warn!("{}; trying again in {pause:.0?}", explain(error));
    };
    (|| Box::pin(crate::store::open(config))).retry(away_pauses()).when(transient).notify(again).await
}

enum Never {}

/// Listens, opens the volumes, says so, and serves until dropped.
async fn serve(daemon: &Arc<Daemon>, tell: Announce) -> anyhow::Result<Never> {
    let config = &daemon.config;
    let admin_path = config.admin_path();
    let admin = bind_admin(&admin_path).await?;
    let _unlink = Unlink(&admin_path);
    let metrics = match config.metrics.on() {
        None => None,
        Some(addr) => {
            let bound = TcpListener::bind(addr).await;
            Some(bound.with_context(|| format!("cannot listen for metrics on {addr}"))?)
        }
    };
    let admin = async { axum::serve(admin, router(daemon.clone())).await.context("the admin socket failed") };
    let metrics = async {
        match metrics {
            Some(listener) => {
                axum::serve(listener, metrics_router(daemon.clone())).await.context("the metrics port failed")
            }
            None => std::future::pending().await,
        }
    };
    let volumes = async {
        // The admin socket answers meanwhile; NBD clients are let in when there is something to attach.
        let again = |error: &ManifestError, pause| {
            tracing::warn!("cannot list the volumes in {}: {error}; trying again in {pause:.0?}", config.store_url());
        };
        (|| Box::pin(daemon.open_all()))
            .retry(away_pauses())
            .when(ManifestError::is_transient)
            .notify(again)
            .await
            .with_context(|| format!("cannot list the volumes in {}", config.store_url()))?;
        let listens: Vec<Listen> = config
            .nbd_unix_path()
            .into_iter()
            .map(Listen::Unix)
            .chain(config.nbd_tcp_addrs().into_iter().map(Listen::Tcp))
            .collect();
        tokio::spawn(daemon.clone().watch_views());
        let server = Server::start(&listens, daemon.clone()).await?;
        let listens = daemon.listens.get_or_init(|| server.listens().to_vec());
        // Hosts are let in when all volumes are open that will be: one that finds none would give up.
        let nvme = NvmeServer::start(&config.nvme_addrs(), daemon.clone(), rand::random()).await?;
        let nvme = Arc::new(nvme);
        let _ = daemon.nvme.set(Arc::downgrade(&nvme));
        if tell == Announce::Aloud {
            announce(daemon, listens, nvme.listens(), &admin_path);
        }
        std::future::pending::<anyhow::Result<()>>().await
    };
    tokio::select! {
        ended = admin => ended?,
        ended = metrics => ended?,
        ended = volumes => ended?,
    }
    bail!("a listener ended unexpectedly")
}

fn announce(daemon: &Daemon, listens: &[Listen], nvme: &[SocketAddr], admin: &Path) {
    let nbd: Vec<String> = listens.iter().map(|listen| format!("NBD on {listen}")).collect();
    let nvme = nvme.iter().map(|listen| format!("NVMe/TCP on {listen}"));
    let places: Vec<String> = nbd.into_iter().chain(nvme).collect();
    let open = daemon.open_places().len();
    let known = daemon.entries().len();
    println!("blockd ready: {open} of {known} volumes open, {}, admin on {}", places.join(", "), admin.display());
    notify("READY=1");
}

fn reactor_options(config: &Config) -> ReactorOptions {
    ReactorOptions {
        log_shape: match config.log_shape {
            LogShape::Ring => crate::reactor::LogShape::Ring,
            LogShape::Thread => crate::reactor::LogShape::Thread,
        },
    }
}

async fn open_frame_cache(config: &Config, data: &DataDir) -> anyhow::Result<Option<FrameCache>> {
    let disk = config.read_cache_size();
    let memory = config.read_cache_memory.as_usize();
    let dir = data.cache();
    match (disk.0, memory) {
        (0, 0) => Ok(None),
        (0, _) => FrameCache::open(None, memory, 0).await.map(Some),
        (bytes, _) => FrameCache::open(Some(&dir), memory, bytes).await.map(Some),
    }
}

/// How the data directory remembers its store. A directory inside it is remembered by its place there, so that both
/// can be moved together.
pub(crate) fn store_identity(config: &Config) -> String {
    let store = config.store_config();
    let inside = store.url.strip_prefix("dir:").and_then(|dir| Path::new(dir).strip_prefix(&config.data).ok());
    match (inside, store.endpoint) {
        (Some(inside), _) => format!("{EMBEDDED}{}", inside.display()),
        (None, Some(endpoint)) => format!("{} at {endpoint}", store.url),
        (None, None) => store.url,
    }
}

/// Removes the socket at the end.
struct Unlink<'a>(&'a Path);

impl Drop for Unlink<'_> {
    fn drop(&mut self) {
        // If it is gone already, so much the better.
        let _ = std::fs::remove_file(self.0);
    }
}

async fn bind_admin(path: &Path) -> anyhow::Result<UnixListener> {
    let what = || format!("cannot listen on the admin socket {}", path.display());
    if let Ok(found) = std::fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            bail!("{}: something that is not a socket stands there; move it away", what());
        }
        match UnixStream::connect(path).await {
            // Left behind by a daemon that was killed.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).with_context(what)?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            _ => bail!("{}: another daemon answers there; choose another path with --admin", what()),
        }
    }
    let listener = UnixListener::bind(path).with_context(|| {
        let hint = if path.as_os_str().len() > 107 {
            " (longer than the 107 bytes a socket's path may have; choose another with --admin)"
        } else {
            ""
        };
        format!("{}{hint}", what())
    })?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).with_context(what)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Args, Command, FromArgMatches};

    fn config(args: &[&str]) -> Config {
        let args = std::iter::once("serve").chain(args.iter().copied());
        Config::from_arg_matches(&Config::augment_args(Command::new("serve")).get_matches_from(args)).unwrap()
    }

    #[test]
    fn the_embedded_store_moves_with_its_data_directory() {
        assert_eq!(store_identity(&config(&["--data", "/a/b"])), "dir:<data>/bucket");
        assert_eq!(store_identity(&config(&["--data", "/c"])), "dir:<data>/bucket");
        assert_eq!(store_identity(&config(&["--data", "/c", "--store", "dir:/d"])), "dir:/d");
        let s3 = config(&["--store", "s3://b/p", "--s3-endpoint", "http://localhost:1"]);
        assert_eq!(store_identity(&s3), "s3://b/p at http://localhost:1");
    }
}
