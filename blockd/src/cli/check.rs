//! `blockd volume check`: works on the store itself, whether a daemon runs or not.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Command, FromArgMatches};

use super::transfer;
use crate::check::{self, CheckOptions, Repairer, Report};
use crate::config::{Config, Interval, merge_file};
use crate::daemon::{DataDir, DataDirError, KeyRing, store_identity};
use crate::manifest;
use crate::program::text::bytes;
use crate::program::{print, print_json};
use crate::table::TableHome;
use crate::volume::wall_ms;

/// Memory for the tables that are compared.
const MEMORY_BYTES: usize = 64 << 20;

const EXAMPLES: &str = "\
Examples:
  blockd volume check disk --data-dir /srv/blockd
  blockd volume check disk --data-dir /srv/blockd --data
  blockd volume check disk --store s3://bucket/prefix --s3-region eu-central-1
  blockd volume check disk --config /etc/blockd.toml --repair

The store is found as `blockd serve` finds it. While a daemon serves the volume a check only reads, and leaves the table
of its data directory alone. Exit code 0: nothing is wrong. 1: something is, or the check could not be made.";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(super) struct CheckArgs {
    /// The volume
    #[arg(value_parser = super::volume::parse_name)]
    name: String,

    /// Verify every byte of its chunks, not only their headers
    #[arg(long)]
    data: bool,

    /// Repair what is safe: set a bad local table aside, drop a bad checkpoint that chunk headers make up for, remove
    /// orphans. No daemon may serve the volume
    #[arg(long)]
    repair: bool,

    /// Leave orphans alone that may be younger than this: somebody may be about to use them, or still read them
    #[arg(long, value_name = "TIME", default_value = "15m")]
    grace: Interval,

    /// Data directory of blockd on this host
    #[arg(long, value_name = "DIR", default_value = "blockd-data", env = "BLOCKD_DATA", help_heading = "Store")]
    data_dir: PathBuf,

    /// TOML file with the settings of `blockd serve`
    #[arg(long, value_name = "FILE", help_heading = "Store")]
    config: Option<PathBuf>,

    /// The bucket: dir:PATH, s3://BUCKET or s3://BUCKET/PREFIX [default: dir:<data-dir>/bucket]
    #[arg(long, value_name = "URL", help_heading = "Store")]
    store: Option<String>,

    /// URL of an S3-compatible server
    #[arg(long, value_name = "URL", help_heading = "Store")]
    s3_endpoint: Option<String>,

    /// Region of the bucket
    #[arg(long, value_name = "REGION", help_heading = "Store")]
    s3_region: Option<String>,

    /// Profile of the AWS configuration to take credentials from
    #[arg(long, value_name = "NAME", help_heading = "Store")]
    s3_profile: Option<String>,

    /// Its key file, if it is encrypted
    #[arg(long, value_name = "FILE", conflicts_with = "passphrase_file", help_heading = "Encryption")]
    key_file: Option<PathBuf>,

    /// A file with its passphrase, if it is encrypted
    #[arg(long, value_name = "FILE", help_heading = "Encryption")]
    passphrase_file: Option<PathBuf>,

    /// Directory for the table that is made of the bucket [default: in the data directory, or the system's temporary one]
    #[arg(long, value_name = "DIR", help_heading = "Store")]
    scratch: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl CheckArgs {
    /// The settings `blockd serve` would have.
    fn settings(&self) -> anyhow::Result<Config> {
        let mut line = vec!["serve".to_owned(), "--data".to_owned(), self.data_dir.display().to_string()];
        let given = [
            ("--store", &self.store),
            ("--s3-endpoint", &self.s3_endpoint),
            ("--s3-region", &self.s3_region),
            ("--s3-profile", &self.s3_profile),
        ];
        for (flag, value) in given {
            line.extend(value.iter().flat_map(|value| [flag.to_owned(), value.clone()]));
        }
        for (flag, file) in [("--key-file", &self.key_file), ("--passphrase-file", &self.passphrase_file)] {
            line.extend(file.iter().flat_map(|file| [flag.to_owned(), format!("{}={}", self.name, file.display())]));
        }
        let matches = Config::augment_args(Command::new("serve")).try_get_matches_from(line)?;
        let settings = Config::from_arg_matches(&matches)?;
        let mut settings = match &self.config {
            Some(path) => merge_file(&settings, &matches, path)?,
            None => settings,
        };
        settings.data = std::path::absolute(&settings.data).context("cannot tell the working directory")?;
        Ok(settings)
    }
}

pub(super) async fn run(args: CheckArgs) -> anyhow::Result<()> {
    let settings = args.settings()?;
    let config = settings.store_config();
    config.check()?;
    if let Some(dir) = config.url.strip_prefix("dir:")
        && !Path::new(dir).is_dir()
    {
        bail!("there is no store in {dir}; name the one that is meant with --data-dir, --config or --store");
    }
    // Held until the end, so that no daemon starts on it meanwhile.
    let data = match settings.data.join("blockd").exists() {
        false => None,
        true => match DataDir::open(&settings.data, &store_identity(&settings), false) {
            Ok(data) => Some(data),
            Err(error @ DataDirError::InUse { .. }) if args.repair => return Err(error.into()),
            Err(DataDirError::InUse { .. } | DataDirError::OtherStore { .. }) => None,
            Err(error) => return Err(error.into()),
        },
    };
    if args.repair && data.is_none() {
        bail!("--repair needs a data directory of this store, whose host takes the volume; name it with --data-dir");
    }
    let store = crate::store::open(&config).await.with_context(|| format!("cannot open the store {}", config.url))?;
    let (found, _) = match manifest::load(store.as_ref(), &args.name).await {
        Ok((found, version)) => (Some(found), Some(version)),
        // The check says it in its own words.
        Err(manifest::ManifestError::Damaged { .. }) => (None, None),
        Err(error) => return Err(error.into()),
    };
    let keys = match &found {
        Some(manifest) => KeyRing::new(&settings).keys_of(manifest).await.context("its key is needed: --key-file")?,
        None => None,
    };
    let place = match (&args.scratch, &data) {
        (Some(dir), _) => dir.clone(),
        (None, Some(_)) => settings.data.clone(),
        (None, None) => std::env::temp_dir(),
    };
    let scratch = Scratch::new(&place)?;
    let bar = transfer::count_bar("", args.json);
    let stage = Mutex::new("");
    let progress = |what: &'static str, done: u64, total: u64| {
        let mut stage = stage.lock().expect("no code panics while it holds this lock");
        if *stage != what {
            *stage = what;
            bar.set_message(what);
        }
        bar.set_length(total);
        bar.set_position(done);
    };
    let local = found
        .as_ref()
        .zip(data.as_ref())
        .map(|(manifest, data)| TableHome::Dir { dir: data.volume(manifest.id), memory_bytes: MEMORY_BYTES });
    let options = CheckOptions {
        store,
        name: args.name.clone(),
        data: args.data,
        scratch: scratch.0.clone(),
        memory_bytes: MEMORY_BYTES,
        local,
        grace_ms: u64::try_from(args.grace.0.min(Duration::from_secs(1 << 40)).as_millis()).unwrap_or(u64::MAX),
        keys,
        now_ms: wall_ms(),
        progress: &progress,
    };
    let repairer = data.as_ref().filter(|_| args.repair).map(|data| Repairer { owner: data.host() });
    let mut report = check::check(&options, repairer).await?;
    bar.finish_and_clear();
    if data.is_none() {
        report.notes.push("no translation table of this host was compared".to_owned());
    }
    match args.json {
        true => print_json(&report)?,
        false => print(&page(&report))?,
    }
    match report.findings.iter().filter(|finding| !finding.repaired).count() {
        0 => Ok(()),
        1 => bail!("volume {} has a problem", args.name),
        count => bail!("volume {} has {count} problems", args.name),
    }
}

/// The report as people read it.
fn page(report: &Report) -> String {
    let line = |label: &str, value: String| format!("{label:<11} {value}\n");
    let mut text = line("volume", format!("{} ({})", report.volume, report.id));
    text += &line("history", format!("up to chunk {}, LSN {}", report.last_seq, report.last_lsn));
    text += &match report.checkpoint_seq {
        0 => line("checkpoint", "none".to_owned()),
        seq => line("checkpoint", format!("at chunk {seq}, {} sound files", report.checkpoint_files)),
    };
    text += &line("live", format!("{} chunks, {}", report.live_chunks, bytes(report.live_bytes)));
    text += &line("dead", format!("{} chunks, {}", report.dead_chunks, bytes(report.dead_bytes)));
    text += &line("mapped", format!("{} blocks, {}", report.mapped_blocks, bytes(report.mapped_blocks * 4096)));
    if report.frames_verified > 0 {
        text += &line("verified", format!("{} frames", report.frames_verified));
    }
    if report.pending_objects > 0 {
        text += &line("pending", format!("{} objects nothing refers to yet or any more", report.pending_objects));
    }
    for note in &report.notes {
        text += &line("note", note.clone());
    }
    for finding in &report.findings {
        let (mark, repair) = match (&finding.repair, finding.repaired) {
            (Some(what), true) => ("repaired", format!(": {what}")),
            (Some(what), false) => ("!", format!(": {what}")),
            (None, _) if finding.repairable => ("!", "; --repair can do something about it".to_owned()),
            (None, _) => ("!", String::new()),
        };
        text += &line(mark, format!("{} {}{repair}", finding.object, finding.detail));
    }
    if report.findings.is_empty() {
        text += "nothing is wrong\n";
    }
    text
}

/// A directory of one's own, removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(place: &Path) -> anyhow::Result<Self> {
        let dir = place.join(format!("check-{}", uuid::Uuid::new_v4().simple()));
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!("cannot remove {}: {error}", self.0.display());
        }
    }
}
