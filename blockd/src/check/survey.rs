//! What is there, what should be, and whether the two agree.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use futures::{FutureExt, StreamExt, stream};

use super::chunks::{self, Chunk};
use super::report::{Kind, Report};
use super::{CheckOptions, Progress};
use crate::checkpoint::rebuild::{self, Listed};
use crate::checkpoint::{Checkpoint, CheckpointError, collect, restore};
use crate::chunk::{ChunkIndex, ChunkKind, ChunkName, ReadError, read_index};
use crate::crypt::Keys;
use crate::manifest::{self, CheckpointName, CheckpointPointer, HELD, Manifest, ManifestError};
use crate::store::{self, ObjectStore, StoreErrorKind};
use crate::table::{Applied, Position, Table, TableError, TableHome};
use crate::types::VolumeId;
use crate::volume::{Beginning, Blocking, OBJECT_PUTS_MAX, OpenError};

/// Headers of the history's end read at the same time.
const READ_AHEAD: usize = rebuild::READ_AHEAD;
/// Most findings of missing chunks told one by one.
const HOLES_TOLD: u64 = 100;

pub(super) async fn survey(options: &CheckOptions<'_>, manifest: &Manifest) -> anyhow::Result<Report> {
    let store = options.store.as_ref();
    let mut report = Report::new(&manifest.name);
    report.id = manifest.id.to_string();
    look_for_lease(store, manifest, &mut report).await?;
    look_at_family(store, manifest, &mut report).await?;
    look_for_abandoned(store, &mut report).await?;

    let listed =
        rebuild::list_chunks(store, manifest.id, |done, total| (options.progress)("listing", done, total)).await?;
    let objects = collect::list(store, manifest.id).await?;
    let (table, mut reached) = checkpoint(options, manifest, &mut report).await?;
    held((options.store.as_ref(), options.keys.as_ref()), manifest, &objects, &mut reached, &mut report).await?;

    // From here on the table is made to say what the bucket says.
    let found: BTreeMap<ChunkName, u64> = listed.iter().map(|chunk| (chunk.name, chunk.size)).collect();
    let source = (store, options.keys.as_ref());
    let filled = match table_begins_at(manifest, &table) {
        Some(upto) => do_without(source, manifest, upto, &listed, &table, &mut report).await?,
        None => true,
    };
    let end = match filled {
        true => apply_history(source, manifest, &found, &table, options.progress, &mut report).boxed().await?,
        false => End { applied: Applied::default(), whole: false },
    };
    report.last_seq = end.applied.seq;
    report.last_lsn = end.applied.lsn;

    let uses = chunks::uses(&table)?;
    report.mapped_blocks = uses.values().map(|u| u.blocks).sum();
    let chunks = classify(options, manifest, &listed, (&table, &uses), &end, &mut report);
    chunks::verify(options, &table, &uses, &chunks, &mut report).await?;
    orphaned_checkpoints(options, manifest, &objects, &reached, &mut report);
    if let Some(home) = &options.local {
        local_table(home, manifest, (&table, &uses), end.applied, &found, &mut report)?;
    }
    Ok(report)
}

async fn look_for_lease(store: &dyn ObjectStore, manifest: &Manifest, report: &mut Report) -> anyhow::Result<()> {
    match store.head(&format!("volumes/{}/lease", manifest.name)).await {
        Ok(_) => report.notes.push("the volume has a lease: a host serves it, or did so last".to_owned()),
        Err(e) if e.kind == StoreErrorKind::NotFound => {}
        Err(e) => return Err(e.into()),
    }
    Ok(())
}

/// What the volume shares with others: the origin must hold for it, and its clones are told.
async fn look_at_family(store: &dyn ObjectStore, manifest: &Manifest, report: &mut Report) -> anyhow::Result<()> {
    for snapshot in &manifest.snapshots {
        let clones: Vec<&str> = snapshot.holds.iter().map(|hold| hold.name.as_str()).collect();
        let state = if snapshot.hidden { " (deleted)" } else { "" };
        let made = if clones.is_empty() { String::new() } else { format!(", held for {}", clones.join(", ")) };
        report.notes.push(format!("snapshot {}{state} stands at chunk {}{made}", snapshot.name, snapshot.seq));
    }
    if let Some(origin) = &manifest.origin {
        if crate::volume::is_held(store, origin, manifest.id).await? {
            report.notes.push(format!("the volume is a clone of {}, up to chunk {}", origin.name, origin.seq));
        } else {
            let detail = format!(
                "it does not know of its clone {}, whose chunks may be deleted there; copy the clone to a new volume",
                manifest.name
            );
            report.add(Kind::Manifest, origin.name.clone(), detail, false);
        }
    }
    Ok(())
}

/// What deleted volumes keep for clones of which none is there: nobody else comes across it, so any check tells it.
async fn look_for_abandoned(store: &dyn ObjectStore, report: &mut Report) -> anyhow::Result<()> {
    for entry in store::list_all(store, HELD).await? {
        let id = entry.key.strip_prefix(HELD).and_then(|id| uuid::Uuid::parse_str(id).ok());
        let Some(id) = id.map(|id| VolumeId(*id.as_bytes())) else {
            report.add(Kind::Orphan, entry.key, "it is not blockd's; remove it yourself", false);
            continue;
        };
        match manifest::load_held(store, id).await {
            Ok(Some((held, _))) if crate::volume::is_left_alone(store, &held).await? => {
                let detail =
                    format!("volume {} was deleted and is kept for clones, none of which is there any more", held.name);
                report.add(Kind::Orphan, entry.key, detail, true);
            }
            Ok(_) => {}
            Err(error @ ManifestError::Damaged { .. }) => {
                report.add(Kind::Manifest, entry.key, format!("{error}; clones need it, restore it"), false);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Verifies the checkpoint and makes a table of it; an empty one where there is none to be relied on. Also returns the
/// keys it reaches.
async fn checkpoint(
    options: &CheckOptions<'_>,
    manifest: &Manifest,
    report: &mut Report,
) -> anyhow::Result<(Table, BTreeSet<String>)> {
    let store = options.store.as_ref();
    let home = TableHome::Dir { dir: options.scratch.clone(), memory_bytes: options.memory_bytes };
    let mut reached = BTreeSet::new();
    // What an earlier attempt made is of an earlier manifest.
    home.discard()?;
    let Some(pointer) = &manifest.checkpoint else {
        return Ok((beginning(options, manifest, &home, report).await?, reached));
    };
    report.checkpoint_seq = pointer.seq;
    (options.progress)("checkpoint", 0, 1);
    let restored = restore::restore(store, &home, manifest.id, pointer, Blocking::Threads, options.keys.as_ref()).await;
    (options.progress)("checkpoint", 1, 1);
    match restored {
        Ok(restored) => {
            report.checkpoint_files = restored.checkpoint.files.len() as u64;
            reached.extend(restored.checkpoint.keys());
            Ok((restored.table, reached))
        }
        Err(error) if error.is_damage() => {
            tell_flaws((store, options.keys.as_ref()), pointer, error, &mut reached, report).await?;
            Ok((beginning(options, manifest, &home, report).await?, reached))
        }
        Err(error) => Err(error.into()),
    }
}

/// The table before any chunk of the volume's own: an empty one, or that of the snapshot a clone was made of.
async fn beginning(
    options: &CheckOptions<'_>,
    manifest: &Manifest,
    home: &TableHome,
    report: &mut Report,
) -> anyhow::Result<Table> {
    home.discard()?;
    let Some(origin) = &manifest.origin else { return Ok(home.open(manifest.id)?) };
    let (store, keys) = (options.store.as_ref(), options.keys.as_ref());
    let flaws: Mutex<Vec<(String, String)>> = Mutex::default();
    let lost = |error: &CheckpointError| {
        if let CheckpointError::Damaged { key, flaw } = error {
            flaws.lock().expect("no code panics while it holds this lock").push((key.clone(), flaw.to_string()));
        }
    };
    let beginning = Beginning { store, home, blocking: Blocking::Threads, keys, lost: &lost };
    let table = beginning.table(origin, manifest.id).await;
    for (key, flaw) in flaws.into_inner().expect("no code panics while it holds this lock") {
        if report.findings.iter().all(|finding| finding.object != key) {
            report.add(Kind::Checkpoint, key, format!("{flaw}; the clone began with it"), false);
        }
    }
    Ok(table?)
}

/// Names every bad object of a checkpoint that cannot be used.
async fn tell_flaws(
    (store, keys): (&dyn ObjectStore, Option<&Keys>),
    pointer: &CheckpointPointer,
    first: CheckpointError,
    reached: &mut BTreeSet<String>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let key = pointer.object.key();
    reached.insert(key.clone());
    let add = |report: &mut Report, error: CheckpointError| match error {
        CheckpointError::Damaged { key, flaw } => {
            report.add(Kind::Checkpoint, key, flaw.to_string(), true);
            Ok(())
        }
        other => Err(other),
    };
    let Ok(checkpoint) = restore::fetch_checkpoint(store, pointer, keys).await else { return Ok(add(report, first)?) };
    reached.extend(checkpoint.keys());
    let before = report.findings.len();
    for file in &checkpoint.files {
        match restore::fetch_file(store, &key, file, keys).await {
            Ok(_) => report.checkpoint_files += 1,
            Err(error) => add(report, error)?,
        }
    }
    match report.findings.len() == before {
        // The files are what they were, and yet no table.
        true => Ok(add(report, first)?),
        false => Ok(()),
    }
}

/// Checkpoints that are held beside the newest one: whether all their files are there.
async fn held(
    (store, keys): (&dyn ObjectStore, Option<&Keys>),
    manifest: &Manifest,
    objects: &[(String, u64)],
    reached: &mut BTreeSet<String>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let there: BTreeSet<&str> = objects.iter().map(|(key, _)| key.as_str()).collect();
    let newest = manifest.checkpoint.map(|pointer| pointer.object);
    for name in manifest.held_checkpoints().into_iter().filter(|name| Some(*name) != newest) {
        reached.insert(name.key());
        let checkpoint: Checkpoint = match restore::fetch_object(store, &name, keys).await {
            Ok(checkpoint) => checkpoint,
            Err(CheckpointError::Damaged { key, flaw }) => {
                report.add(Kind::Checkpoint, key, format!("{flaw}; a snapshot needs it"), false);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        for key in checkpoint.keys() {
            // Files of a clone's origin are listed with that.
            if key.starts_with(&CheckpointName::prefix(manifest.id)) && !there.contains(key.as_str()) {
                report.add(Kind::Checkpoint, key.clone(), "is missing from the bucket; a snapshot needs it", false);
            }
            reached.insert(key);
        }
    }
    Ok(())
}

/// Up to where the table has to be made of all headers there are: to where the checkpoint stands, if that is of no use, or
/// to where the volume went back to a snapshot last. None when headers can be applied to it one after the other.
fn table_begins_at(manifest: &Manifest, table: &Table) -> Option<Applied> {
    let pointer = manifest.checkpoint.map(|pointer| Applied { seq: pointer.seq, lsn: pointer.lsn });
    if let Some(pointer) = pointer.filter(|pointer| pointer.seq > table.applied().seq) {
        return Some(pointer);
    }
    let last = manifest.restores.last().filter(|_| crate::volume::missed_restore(table, manifest))?;
    // The epoch that did it began there.
    let began = manifest.epochs.iter().find(|e| e.epoch == last.epoch)?;
    Some(Applied { seq: last.from_seq, lsn: began.first_lsn.saturating_sub(1) })
}

/// Makes the table what the chunk headers say at the position of a checkpoint that is of no use. Returns whether that
/// could be done.
async fn do_without(
    (store, keys): (&dyn ObjectStore, Option<&Keys>),
    manifest: &Manifest,
    upto: Applied,
    listed: &[Listed],
    table: &Table,
    report: &mut Report,
) -> anyhow::Result<bool> {
    let history = rebuild::history(manifest, listed, upto.seq);
    // As long as one is told the manifest keeps the checkpoint, whose position says up to where chunks may be missing.
    let holes = history.holes.iter().flat_map(|(first, last)| *first..=*last);
    for seq in holes.take(HOLES_TOLD as usize) {
        let name = ChunkName { volume: manifest.id, epoch: manifest.epoch_of(seq), seq };
        report.add(
            Kind::ChunkMissing,
            name.key(),
            "is not there; without the checkpoint it cannot be told whether it was needed, or deleted because it was not",
            false,
        );
    }
    let keep = |basis| basis <= upto.seq;
    match rebuild::fill::<OpenError>(store, keys, &history, table, upto, keep, || ()).boxed().await {
        Ok(()) => Ok(true),
        Err(OpenError::Table(error @ TableError::ReferenceLost { id, .. })) => {
            let name = ChunkName { volume: manifest.id, epoch: manifest.epoch_of(id), seq: id };
            report.notes.push(format!("the table could not be made of chunk headers either: {error}"));
            report.add(Kind::ChunkMissing, name.key(), error.to_string(), false);
            Ok(false)
        }
        Err(OpenError::Chunk(ReadError::Store(error))) => Err(error.into()),
        Err(OpenError::Chunk(error)) => {
            report.notes.push(format!("the table could not be made of chunk headers either: {error}"));
            let name = match &error {
                ReadError::Header { name, .. } | ReadError::Truncated { name, .. } | ReadError::Missing { name } => {
                    name.key()
                }
                _ => manifest.name.clone(),
            };
            report.add(Kind::ChunkDamaged, name, format!("{error}; restore it"), false);
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

/// Where the history that could be followed ends.
pub(super) struct End {
    pub applied: Applied,
    /// Whether it is really the end, not a place where something is wrong.
    pub whole: bool,
}

/// Applies the headers after the table's position, as far as they go.
async fn apply_history(
    (store, keys): (&dyn ObjectStore, Option<&Keys>),
    manifest: &Manifest,
    found: &BTreeMap<ChunkName, u64>,
    table: &Table,
    progress: Progress<'_>,
    report: &mut Report,
) -> anyhow::Result<End> {
    let chunk = |seq| ChunkName { volume: manifest.id, epoch: manifest.epoch_of(seq), seq };
    let settled = manifest.settled().map_or(0, |e| e.first_seq);
    let first = table.applied().seq + 1;
    debug_assert!(!crate::volume::missed_restore(table, manifest), "what does not count is not applied");
    let newest = found.keys().filter(|name| !name.is_relocated()).map(|name| name.seq).max().unwrap_or(0);
    // Chunks of the last epoch may be on their way; those of epochs before it have all arrived.
    let mut last = settled.saturating_sub(1).max(first - 1);
    while found.contains_key(&chunk(last + 1)) {
        last += 1;
    }
    let headers = (first..=last).map(|seq| read_index_owned(store, chunk(seq), keys).boxed());
    let mut headers = stream::iter(headers).buffered(READ_AHEAD);
    let (mut seq, mut missing) = (first, 0);
    while let Some(header) = headers.next().await {
        let name = chunk(seq);
        match header {
            Ok(index) if index.kind == ChunkKind::Seal => {
                // Somebody claimed the volume and ended the epoch here, without settling yet.
                return Ok(End { applied: table.applied(), whole: true });
            }
            Ok(index) if missing == 0 => {
                if let Err(error) = table.apply(&index) {
                    report.add(Kind::ChunkDisagrees, name.key(), error.to_string(), false);
                    missing += 1;
                }
            }
            Ok(_) => {}
            Err(ReadError::Missing { .. }) => {
                if missing < HOLES_TOLD {
                    report.add(
                        Kind::ChunkMissing,
                        name.key(),
                        "is part of the history after the checkpoint; restore it",
                        false,
                    );
                }
                missing += 1;
            }
            Err(error @ (ReadError::Header { .. } | ReadError::Truncated { .. })) => {
                report.add(Kind::ChunkDamaged, name.key(), format!("{error}; restore it"), false);
                missing += 1;
            }
            Err(error) => return Err(error.into()),
        }
        progress("headers", seq + 1 - first, last + 1 - first);
        seq += 1;
    }
    drop(headers);
    let beyond = chunk(last + OBJECT_PUTS_MAX as u64 + 1);
    if missing == 0
        && newest >= beyond.seq
        && found.keys().any(|n| n.epoch == beyond.epoch && n.seq >= beyond.seq && !n.is_relocated())
    {
        let name = chunk(last + 1);
        report.add(
            Kind::ChunkMissing,
            name.key(),
            "is missing although chunks long after it are there; restore it",
            false,
        );
        missing += 1;
    }
    if missing > 0 {
        report.notes.push(format!(
            "the history could be followed up to chunk {} only; what comes after it was not compared",
            table.applied().seq
        ));
    }
    Ok(End { applied: table.applied(), whole: missing == 0 })
}

async fn read_index_owned(
    store: &dyn ObjectStore,
    name: ChunkName,
    keys: Option<&Keys>,
) -> Result<ChunkIndex, ReadError> {
    read_index(store, &name, keys).await
}

/// Sorts the chunks that are there into those that count and those that nothing refers to.
fn classify(
    options: &CheckOptions<'_>,
    manifest: &Manifest,
    listed: &[Listed],
    (table, uses): (&Table, &BTreeMap<u64, chunks::Use>),
    end: &End,
    report: &mut Report,
) -> Vec<Chunk> {
    let last_epoch = manifest.settled().map_or(0, |e| e.epoch);
    // Who was fenced may not have noticed for a while, and who reads may still read.
    let old = manifest.settled().is_some_and(|e| e.opened_ms.saturating_add(options.grace_ms) <= options.now_ms);
    // What earlier owners moved is in the present owner's table, if anywhere, and so in every checkpoint of its own.
    let settled_by_owner = manifest.checkpoint.is_some_and(|pointer| pointer.object.epoch == last_epoch);
    let mut chunks = Vec::new();
    for Listed { name, size } in listed {
        let relocated = name.is_relocated();
        let in_history = !relocated && manifest.epoch_of(name.seq) == name.epoch && name.epoch > 0;
        let used = uses.get(&name.seq).is_some_and(|u| u.name == *name);
        // One whose zeroes and holes alone are needed, or that is dead and waits for its deletion.
        let known = relocated && table.knows(name.seq) && table.directory(name.seq).is_ok_and(|d| d.name == *name);
        if used || known || (in_history && name.seq <= end.applied.seq) {
            match used {
                true => (report.live_chunks, report.live_bytes) = (report.live_chunks + 1, report.live_bytes + size),
                false => (report.dead_chunks, report.dead_bytes) = (report.dead_chunks + 1, report.dead_bytes + size),
            }
            chunks.push(Chunk { name: *name, size: *size });
        } else if is_seal_place(manifest, name) {
            // It keeps an old owner out, for ever.
        } else if name.epoch >= last_epoch || !end.whole || !old || (relocated && !settled_by_owner) {
            report.pending_objects += 1;
        } else {
            report.add(Kind::Orphan, name.key(), "no history and no table knows this chunk", true);
        }
    }
    chunks
}

/// Whether a seal belongs there: at the place after an epoch's last chunk.
fn is_seal_place(manifest: &Manifest, name: &ChunkName) -> bool {
    let next = manifest.epochs.iter().find(|e| e.epoch > name.epoch && e.first_seq > 0);
    let own = manifest.epochs.iter().any(|e| e.epoch == name.epoch && e.first_seq > 0);
    own && next.is_some_and(|next| next.first_seq == name.seq)
}

fn orphaned_checkpoints(
    options: &CheckOptions<'_>,
    manifest: &Manifest,
    objects: &[(String, u64)],
    reached: &BTreeSet<String>,
    report: &mut Report,
) {
    let last = manifest.settled();
    let old = last.is_some_and(|e| e.opened_ms.saturating_add(options.grace_ms) <= options.now_ms);
    for (key, _) in objects.iter().filter(|(key, _)| !reached.contains(key)) {
        match CheckpointName::parse(key) {
            None => report.add(Kind::Orphan, key, "it is not blockd's; remove it yourself", false),
            Some(name) if old && last.is_some_and(|last| name.epoch < last.epoch) => {
                report.add(Kind::Orphan, key, "no checkpoint refers to it", true);
            }
            Some(_) => report.pending_objects += 1,
        }
    }
}

/// This host's table: whether it can be used, and says what the bucket says.
fn local_table(
    home: &TableHome,
    manifest: &Manifest,
    (bucket, known): (&Table, &BTreeMap<u64, chunks::Use>),
    end: Applied,
    found: &BTreeMap<ChunkName, u64>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let place = match home {
        TableHome::Dir { dir, .. } => dir.join("table").display().to_string(),
        TableHome::Memory(_) => "the table".to_owned(),
    };
    let mut bad = |detail: String| report.add(Kind::LocalTable, place.clone(), detail, true);
    let table = match home.look(manifest.id) {
        Ok(None) => return Ok(()),
        Ok(Some(table)) => table,
        Err(error) => {
            bad(format!("{error}; it is made anew from the bucket"));
            return Ok(());
        }
    };
    let applied = table.applied();
    let Ok(uses) = chunks::uses(&table) else {
        bad("entries of it are damaged; it is made anew from the bucket".to_owned());
        return Ok(());
    };
    if applied.seq > end.seq {
        bad(format!("it is at chunk {}, while the bucket goes up to {} only", applied.seq, end.seq));
    } else if let Some(used) = uses.iter().find(|(seq, used)| {
        // What the bucket's table needs as well is found missing there.
        used.name.volume == manifest.id && !found.contains_key(&used.name) && !known.contains_key(*seq)
    }) {
        // It may be older than what was deleted since; the next opening takes the checkpoint then.
        let (_, used) = used;
        if manifest.checkpoint.is_none_or(|pointer| Position::from(&pointer) <= table.position()) {
            bad(format!("it maps block {} to {}, which is not there", used.first_lba, used.name.key()));
        }
    } else if table.position() == bucket.position() && !chunks::same(&table, bucket)? {
        bad("it maps blocks elsewhere than checkpoint and chunk headers do".to_owned());
    }
    Ok(())
}
