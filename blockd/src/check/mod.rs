//! Verifying a volume as it stands in the bucket, and what of it is on this host.
//!
//! [`report`] is what a check says, [`survey`] finds out what is there and what should be, [`chunks`] compares chunks
//! with what a table says of them, [`repair`] does what is safe. A check only reads; it may run while a daemon serves
//! the volume, and then begins again when what it looked at was replaced under it.

mod chunks;
mod repair;
pub mod report;
mod survey;

use std::path::PathBuf;
use std::sync::Arc;

use crate::crypt::Keys;
use crate::manifest::{self, ManifestError};
use crate::store::ObjectStore;
use crate::table::TableHome;

pub use report::{Finding, Kind, Report};

/// How often a check begins again because the volume changed meanwhile.
const ATTEMPTS: usize = 4;

/// Hears what a check is doing: the stage, and how many of how many of its things are done.
pub type Progress<'a> = &'a (dyn Fn(&'static str, u64, u64) + Sync);

/// What to check, and how.
pub struct CheckOptions<'a> {
    /// The bucket.
    pub store: Arc<dyn ObjectStore>,
    /// The volume.
    pub name: String,
    /// Read every byte of the chunks, not only their headers.
    pub data: bool,
    /// A directory for the table that is made of the bucket; emptied at the end.
    pub scratch: PathBuf,
    /// Memory for that, in bytes.
    pub memory_bytes: usize,
    /// This host's table of the volume, which nobody may have open.
    pub local: Option<TableHome>,
    /// What nothing refers to counts only when it is this old, in milliseconds: others may not know yet, or still read.
    pub grace_ms: u64,
    /// Keys of the volume, if it is encrypted.
    pub keys: Option<Keys>,
    /// The wall clock, in milliseconds.
    pub now_ms: u64,
    /// Hears how far it is.
    pub progress: Progress<'a>,
}

/// Who may repair what a check found.
pub struct Repairer {
    /// The identity under which the volume is claimed.
    pub owner: [u8; 16],
}

/// Verifies a volume; with `repairer` also repairs what is safe.
///
/// # Errors
/// The store or the local disk failed, so nothing can be said. What is wrong with the volume is in the report.
pub async fn check(options: &CheckOptions<'_>, repairer: Option<Repairer>) -> anyhow::Result<Report> {
    let mut attempt = 1;
    let mut report = loop {
        let before = manifest::load(options.store.as_ref(), &options.name).await;
        let (manifest, version) = match before {
            Ok(found) => found,
            Err(error @ ManifestError::Damaged { .. }) => {
                let key = manifest::key(&options.name);
                let mut report = Report::new(&options.name);
                report.add(Kind::Manifest, key, format!("{error}; restore it from a copy or an older version"), false);
                return Ok(report);
            }
            Err(error) => return Err(error.into()),
        };
        let report = survey::survey(options, &manifest).await;
        // A daemon that serves the volume deletes what a newer manifest does not need.
        let trouble = report.as_ref().map_or(true, |report| !report.is_clean());
        let unchanged =
            matches!(manifest::load(options.store.as_ref(), &options.name).await, Ok((_, v)) if v == version);
        if !trouble || unchanged || attempt == ATTEMPTS {
            break report?;
        }
        attempt += 1;
    };
    if let Some(repairer) = repairer {
        repair::repair(options, &repairer, &mut report).await?;
    }
    Ok(report)
}
