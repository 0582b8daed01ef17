//! Starting and stopping the daemon.

use std::io;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use blockd::admin::api::CreateVolume;
use blockd::cli::Client;
use blockd::config::Config;
use blockd::daemon::{self, ServeOptions};
use clap::{Args, Command, FromArgMatches};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use super::sharing::EngineDisk;
use super::{Engine, EngineOptions, VOLUME_BYTES};
use crate::disk::nbd::{NbdDisk, NbdError, NbdOptions, NbdUrl};

/// How often the daemon is looked after while it starts.
const LOOK_PERIOD: Duration = Duration::from_millis(20);

/// A daemon in a thread of its own.
pub(super) struct Running {
    stop: mpsc::Sender<()>,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Engine {
    /// Starts the daemon, makes the volume if that is wanted, and connects to it.
    ///
    /// # Errors
    /// Whatever keeps the daemon from serving; and if there is no such volume.
    pub fn start(options: &EngineOptions) -> anyhow::Result<(Engine, EngineDisk)> {
        let data = std::path::absolute(&options.data)
            .context("cannot tell the working directory; give --data as a whole path")?;
        std::fs::create_dir_all(&data).with_context(|| format!("cannot make {}", data.display()))?;
        let config = config(options, &data)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(config.worker_count())
            .thread_name("engine")
            .enable_all()
            .build()
            .context("cannot start the threads of the engine")?;
        let (stop, stopped) = mpsc::channel(1);
        let thread = std::thread::Builder::new()
            .name("engine-main".to_owned())
            .spawn(move || serve(runtime, config, stopped))
            .context("cannot start a thread for the engine")?;
        let running = Running { stop, thread };
        let url = NbdUrl::Unix { socket: data.join("nbd.sock"), export: options.volume.clone() };
        let disk = connect(&running, options, &data, &url).and_then(|disk| {
            let client = Client::new(data.join("admin.sock"), &data);
            EngineDisk::new(disk, client, options.volume.clone()).context("cannot start a thread for the engine")
        });
        match disk {
            Ok(disk) => Ok((Engine { running }, disk)),
            // What the daemon itself said is better than that it can't be reached.
            Err(error) if running.thread.is_finished() => Err(running.join().err().unwrap_or(error)),
            Err(error) => {
                let _ = running.stop();
                Err(error)
            }
        }
    }

    /// Lets the daemon close its volumes. Nobody may use the disk any more.
    ///
    /// # Errors
    /// Whatever went wrong while it served.
    pub fn stop(self) -> anyhow::Result<()> {
        self.running.stop()
    }
}

impl Running {
    fn stop(self) -> anyhow::Result<()> {
        // One that has ended needs no asking.
        let _ = self.stop.blocking_send(());
        self.join()
    }

    fn join(self) -> anyhow::Result<()> {
        self.thread.join().map_err(|_| anyhow!("the engine panicked"))?
    }
}

fn serve(runtime: Runtime, config: Config, stopped: mpsc::Receiver<()>) -> anyhow::Result<()> {
    let result = runtime.block_on(daemon::run_embedded(config, ServeOptions::default(), stopped));
    runtime.shutdown_background();
    result
}

/// The daemon's settings: ours, then those of the user, which win.
fn config(options: &EngineOptions, data: &Path) -> anyhow::Result<Config> {
    let mut args = vec!["engine".to_owned()];
    let mut say = |key: &str, value: &str| {
        if !options.settings.iter().any(|given| given.split('=').next() == Some(key)) {
            args.push(format!("--{key}={value}"));
        }
    };
    say("data", data.to_str().context("the data directory has a name that is not UTF-8")?);
    say("store", &options.store);
    say("nbd-tcp", "none");
    say("volumes", &options.volume);
    args.extend(options.settings.iter().map(|given| format!("--{given}")));
    let matches = Config::augment_args(Command::new("engine")).try_get_matches_from(&args);
    let matches =
        matches.map_err(|error| anyhow!("--engine: {}", error.to_string().trim_start_matches("error: ").trim_end()))?;
    Ok(Config::from_arg_matches(&matches)?)
}

fn connect(running: &Running, options: &EngineOptions, data: &Path, url: &NbdUrl) -> anyhow::Result<NbdDisk> {
    let nbd = NbdOptions { connections: options.connections, ..NbdOptions::default() };
    let mut made = false;
    loop {
        match NbdDisk::connect(url, nbd.clone()) {
            Ok(disk) => return Ok(disk),
            Err(NbdError::Connect { source, .. })
                if source.kind() == io::ErrorKind::NotFound && source.raw_os_error().is_none() =>
            {
                // The daemon has opened what there is, and this is not among it.
                if made {
                    return Err(source).with_context(|| format!("volume {} was made and is not there", options.volume));
                }
                make(options, data)?;
                made = true;
            }
            Err(NbdError::Connect { source, .. })
                if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                if running.thread.is_finished() {
                    bail!("the engine ended");
                }
                std::thread::sleep(LOOK_PERIOD);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn make(options: &EngineOptions, data: &Path) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let client = Client::new(data.join("admin.sock"), data);
    let known = runtime.block_on(client.volumes())?;
    if let Some(volume) = known.iter().find(|volume| volume.info.name == options.volume) {
        // It says itself why it is not served.
        runtime.block_on(client.open(&volume.info.name, false))?;
        return Ok(());
    }
    if !options.create {
        bail!(
            "there is no volume {} in {}; fsd mkfs with the same --data and --store makes it",
            options.volume,
            options.store
        );
    }
    let request = CreateVolume {
        name: options.volume.clone(),
        size: VOLUME_BYTES,
        durability: None,
        codec: None,
        chunk_bytes: None,
        secret: None,
    };
    runtime.block_on(client.create(&request)).with_context(|| format!("cannot make volume {}", options.volume))?;
    Ok(())
}
