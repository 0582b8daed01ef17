//! What `fsd mount` and `fsd serve` have in common: flags, how they begin, and how they say that they are ready.

use std::path::PathBuf;

use anyhow::Context;
use blockd::config::merge_file;
use blockd::program::print;
use clap::{ArgMatches, Args};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::LogLevel;
use super::background::Background;
use super::open::{self, OpenedTree};
use super::running::{self, Running};
use super::signals::Signals;
use crate::config::Place;

/// Flags beside the settings.
#[derive(Args, Debug)]
pub(super) struct ServiceArgs {
    /// Go to the background once everything is ready
    #[arg(long)]
    daemon: bool,

    /// TOML file with any of the settings below
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Print the settings as they come out of file, environment and flags, and do nothing else
    #[arg(long)]
    print_config: bool,
}

/// Settings of both.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct CommonSettings {
    #[command(flatten)]
    #[serde(flatten)]
    pub place: Place,

    #[command(flatten)]
    #[serde(flatten)]
    pub tree: open::TreeSettings,

    /// What is logged to stderr
    #[arg(long, value_name = "LEVEL", default_value = "info", help_heading = "Messages")]
    log_level: LogLevel,

    /// Where messages go with --daemon [default: <data>/fsd.log]
    #[arg(long, value_name = "FILE", help_heading = "Messages")]
    #[serde(skip_serializing_if = "Option::is_none")]
    log_file: Option<PathBuf>,
}

impl ServiceArgs {
    /// `given` completed by the file; nothing if the settings were only to be printed.
    pub(super) fn settle<T>(&self, given: T, matches: &ArgMatches) -> anyhow::Result<Option<T>>
    where
        T: Args + Serialize + DeserializeOwned,
    {
        let settings = match &self.config {
            Some(path) => merge_file(&given, matches, path)?,
            None => given,
        };
        if self.print_config {
            print(&toml::to_string(&settings)?)?;
            return Ok(None);
        }
        Ok(Some(settings))
    }

    /// Begins: before the first thread, because going to the background leaves all but the one that calls behind.
    pub(super) fn begin(&self, common: &mut CommonSettings) -> anyhow::Result<Beginning> {
        // In the background, and in messages, other working directories do not matter.
        common.place.make_absolute().context("cannot tell the working directory; give whole paths")?;
        let signals = Signals::catch();
        let background =
            if self.daemon { Some(Background::split().context("cannot go to the background")?) } else { None };
        common.log_level.start();
        running::abort_on_panic();
        Ok(Beginning { signals, background })
    }
}

/// A service that is not ready yet.
pub(super) struct Beginning {
    signals: Signals,
    background: Option<Background>,
}

impl Beginning {
    /// Tells everybody that `exports` are served, and has `stop` called when that is to end.
    pub(super) fn ready(
        self,
        common: &CommonSettings,
        opened: &OpenedTree,
        exports: Vec<String>,
        stop: impl FnOnce() + Send + 'static,
    ) -> anyhow::Result<Running> {
        let running = Running::start(&common.place, opened, exports)?;
        running.announce()?;
        if let Some(background) = self.background {
            let default = || common.place.data.join("fsd.log");
            let log = common.log_file.clone().unwrap_or_else(default);
            background.ready(&log).with_context(|| format!("cannot log to {}", log.display()))?;
        }
        running::on_signal(self.signals, stop)?;
        Ok(running)
    }
}
