//! `blockd serve`.

use std::path::PathBuf;

use anyhow::Context;
use clap::{ArgMatches, Args};

use crate::config::{Config, merge_file};
use crate::daemon::{self, ServeOptions};

const EXAMPLES: &str = "\
Examples:
  blockd serve
  blockd serve --data /srv/blockd --nbd-tcp 10.0.0.5:10809
  blockd serve --data /srv/blockd --store s3://bucket/prefix --s3-region eu-central-1
  blockd serve --data /srv/blockd --store s3://bucket --s3-endpoint http://127.0.0.1:7480
  blockd serve --config /etc/blockd.toml --print-config

Sizes: 4096, 64KiB, 16MiB, 4GiB, 1TiB. Times: 500ms, 5s, 2m, 1h.
Every flag under a heading is also a key of the configuration file, without the dashes before it. Flags win over
the environment, that over the file. SIGTERM and SIGINT shut down in order, a second one at once.";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(super) struct ServeArgs {
    /// TOML file with any of the settings below
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Print the settings as they come out of file, environment and flags, and do nothing else
    #[arg(long)]
    print_config: bool,

    /// Take the configured store even if the data directory was used with another until now
    #[arg(long)]
    accept_store: bool,

    #[command(flatten)]
    settings: Config,
}

pub(super) fn run(args: ServeArgs, matches: &ArgMatches) -> anyhow::Result<()> {
    let config = match &args.config {
        Some(path) => merge_file(&args.settings, matches, path)?,
        None => args.settings,
    };
    if args.print_config {
        return crate::program::print(&toml::to_string(&config.resolved())?);
    }
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(config.log_level.filter())
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.worker_count())
        .thread_name("worker")
        .enable_all()
        .build()
        .context("cannot start the worker threads")?;
    let options = ServeOptions { accept_store: args.accept_store };
    let result = runtime.block_on(daemon::run(config, options));
    // What still runs belongs to clients that are gone.
    runtime.shutdown_background();
    result
}
