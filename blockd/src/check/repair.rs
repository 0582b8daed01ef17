//! Doing what is safe about what a check found.

use anyhow::{Context, bail};

use super::report::{Finding, Kind, Report};
use super::{CheckOptions, Repairer};
use crate::checkpoint::collect;
use crate::lease::{self, LeaseState};
use crate::manifest::{self, HELD, Manifest};
use crate::store;
use crate::table::Applied;
use crate::types::VolumeId;
use crate::volume::Claimant;

/// Repairs what is safe, and says what it did in the findings.
pub(super) async fn repair(options: &CheckOptions<'_>, by: &Repairer, report: &mut Report) -> anyhow::Result<()> {
    let wanted = |kind: Kind| move |finding: &&mut Finding| finding.kind == kind && finding.repairable;
    for finding in report.findings.iter_mut().filter(|f| wanted(Kind::LocalTable)(f)) {
        match &options.local {
            Some(home) => {
                home.discard()?;
                done(finding, "set aside; the next opening makes a new one");
            }
            None => finding.repair = Some("not done: a daemon has it open".to_owned()),
        }
    }
    settle_abandoned(options, report).await?;
    let of_bucket = |finding: &Finding| {
        finding.repairable && !finding.repaired && matches!(finding.kind, Kind::Checkpoint | Kind::Orphan)
    };
    if !report.findings.iter().any(of_bucket) {
        return Ok(());
    }
    let manifest = hold(options, by, report).await.context("the volume cannot be held for a repair")?;
    let epoch = manifest.epochs.last().map_or(0, |e| e.epoch);
    let store = options.store.as_ref();
    let blind = report
        .findings
        .iter()
        .any(|f| matches!(f.kind, Kind::ChunkMissing | Kind::ChunkDamaged | Kind::ChunkDisagrees) && !f.repaired);
    if report.findings.iter().any(|f| f.kind == Kind::Checkpoint && f.repairable) {
        // Chunk headers make up for it only if they are all there.
        if !blind {
            let keys = options.keys.as_ref();
            manifest::update(store, &options.name, epoch, keys, |manifest| manifest.checkpoint = None).await?;
        }
        for finding in report.findings.iter_mut().filter(|f| wanted(Kind::Checkpoint)(f)) {
            match blind {
                false => done(finding, "the manifest names no checkpoint any more, until the next one is made"),
                true => {
                    let why = "not done: chunks that would make up for it are not there either; restore this object";
                    finding.repair = Some(why.to_owned());
                }
            }
        }
    }
    let orphans: Vec<String> = report.findings.iter().filter(|f| is_orphan(f)).map(|f| f.object.clone()).collect();
    delete_orphans(options, epoch, &orphans).await?;
    for finding in report.findings.iter_mut().filter(|f| is_orphan(f)) {
        done(finding, "removed");
    }
    Ok(())
}

fn is_orphan(finding: &Finding) -> bool {
    finding.kind == Kind::Orphan && finding.repairable && !finding.object.starts_with(HELD)
}

/// Lets go of what deleted volumes keep for clones that are gone. That is nobody's, so no volume has to be held for it; a clone
/// that is being made at this very moment fails.
async fn settle_abandoned(options: &CheckOptions<'_>, report: &mut Report) -> anyhow::Result<()> {
    let abandoned = |f: &&mut Finding| f.kind == Kind::Orphan && f.repairable && f.object.starts_with(HELD);
    for finding in report.findings.iter_mut().filter(abandoned) {
        let id = finding.object.strip_prefix(HELD).and_then(|id| uuid::Uuid::parse_str(id).ok());
        let Some(id) = id else { continue };
        let volume = VolumeId(*id.as_bytes());
        match crate::volume::settle_held(options.store.as_ref(), volume, options.keys.as_ref()).await? {
            true => done(finding, "removed, with all that is left of that volume"),
            false => finding.repair = Some("not done: one of its clones is there again".to_owned()),
        }
    }
    Ok(())
}

fn done(finding: &mut Finding, what: &str) {
    finding.repair = Some(what.to_owned());
    finding.repaired = true;
}

/// Takes the volume, so that nobody else changes what is repaired: whoever had it is fenced.
async fn hold(options: &CheckOptions<'_>, by: &Repairer, report: &Report) -> anyhow::Result<Manifest> {
    let store = options.store.as_ref();
    // This host's own lease is of a process that is gone: whoever checks holds the data directory.
    match lease::load(store, &options.name).await? {
        Some((lease, _)) if lease.state == LeaseState::Held && lease.host != by.owner => {
            bail!("{} holds it; release it there first", lease.host_name);
        }
        _ => {}
    }
    let claimant = Claimant { owner: by.owner, expected: None, now_ms: options.now_ms };
    let known = Applied { seq: report.last_seq, lsn: report.last_lsn };
    let claim = crate::volume::claim(store, &options.name, claimant, known, options.keys.as_ref()).await?;
    Ok(claim.manifest)
}

/// Deletes what nothing refers to: chunks outside the recorded history of epochs that ended, and files of checkpoints.
async fn delete_orphans(options: &CheckOptions<'_>, epoch: u64, keys: &[String]) -> anyhow::Result<()> {
    let store = options.store.as_ref();
    let (files, chunks): (Vec<String>, Vec<String>) =
        keys.iter().cloned().partition(|key| key.starts_with("checkpoints/"));
    if !files.is_empty() {
        // Compares with what the manifest reaches now.
        collect::collect(store, &options.name, epoch, options.keys.as_ref(), &files).await?;
    }
    Ok(store::delete_all(store, &chunks).await?)
}
