//! Stranded writes as the daemon keeps, shows, exports and sets them aside.
//!
//! They stay in the volume's log, which keeps the volume from being opened here, until somebody discards them. That
//! moves the log to `DIR/stranded/<volume>-<epoch>/wal`, with a file `about` that says what it is; it is never deleted.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};

use super::volumes::{Daemon, Phase, VolumeError};
use crate::admin::api::{ExportStranded, ExportedStranded, StrandedStatus};
use crate::chunk::{BlockReader, ChunkName, ReadError, read_index};
use crate::crypt::Keys;
use crate::explain::explain;
use crate::manifest::{self, Manifest};
use crate::store::ObjectStore;
use crate::table::{Applied, Mapped, MemKv, Rebuild, Table, Target};
use crate::text::{bytes, date};
use crate::types::{BLOCK, BLOCK_SIZE, VolumeId};
use crate::volume::{Stranded, StrandedKind, StrandedWrite};
use crate::wal::device::{FileLog, LogDevice};

const ABOUT: &str = "about";
const MAGIC: &str = "blockd stranded writes, format 1";
/// Between two looks at a manifest whose new owner has not settled its epoch yet, and how many there are.
const LOOK_PAUSE: Duration = Duration::from_secs(2);
const LOOKS: usize = 60;

/// A log with stranded writes.
struct Found {
    log: FileLog,
    stranded: Stranded,
    status: StrandedStatus,
    size: u64,
}

/// What `about` says of a log that was set aside.
struct About {
    volume: VolumeId,
    name: String,
    size: u64,
    epoch: u64,
    taken_epoch: u64,
    bucket_lsn: u64,
}

impl About {
    fn text(&self) -> String {
        let Self { volume, name, size, epoch, taken_epoch, bucket_lsn } = self;
        format!(
            "{MAGIC}\nvolume {volume}\nname {name}\nsize {size}\nepoch {epoch}\ntaken-epoch {taken_epoch}\nbucket-lsn \
             {bucket_lsn}\n"
        )
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        (lines.next()? == MAGIC).then_some(())?;
        let mut field = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
        Some(Self {
            volume: VolumeId(*uuid::Uuid::try_parse(field("volume")?).ok()?.as_bytes()),
            name: field("name")?.to_owned(),
            size: field("size")?.parse().ok()?,
            epoch: field("epoch")?.parse().ok()?,
            taken_epoch: field("taken-epoch")?.parse().ok()?,
            bucket_lsn: field("bucket-lsn")?.parse().ok()?,
        })
    }
}

fn status(name: &str, id: VolumeId, stranded: &Stranded, log: &Path, set_aside: bool) -> StrandedStatus {
    let (first_lsn, last_lsn) = stranded.lsns();
    let mut status = StrandedStatus {
        volume: name.to_owned(),
        id: id.to_string(),
        epoch: stranded.epoch,
        taken_epoch: stranded.taken_epoch,
        first_lsn,
        last_lsn,
        log: log.to_owned(),
        set_aside,
        ..Default::default()
    };
    for write in stranded.writes() {
        status.writes += 1;
        status.bytes += if write.kind == StrandedKind::Zeroes { 0 } else { write.len };
        status.first_ms = if status.first_ms == 0 { write.time_ms } else { status.first_ms };
        status.last_ms = write.time_ms;
    }
    status
}

/// In place: in the log of the volume of `manifest` in `dir`.
fn find_in_place(dir: &Path, manifest: &Manifest, host: [u8; 16]) -> anyhow::Result<Option<Found>> {
    let path = dir.join("wal");
    let Some(log) = FileLog::look(&path)? else { return Ok(None) };
    let Some(stranded) = Stranded::find(&log, manifest, host)? else { return Ok(None) };
    let status = status(&manifest.name, manifest.id, &stranded, &path, false);
    Ok(Some(Found { log, stranded, status, size: manifest.size }))
}

/// Set aside in `dir`.
fn find_aside(dir: &Path) -> anyhow::Result<Option<Found>> {
    let about = match fs::read_to_string(dir.join(ABOUT)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let about = About::parse(&about).with_context(|| format!("{}/{ABOUT} makes no sense", dir.display()))?;
    let path = dir.join("wal");
    let Some(log) = FileLog::look(&path)? else { return Ok(None) };
    let found = Stranded::beyond(&log, about.volume, (about.epoch, about.taken_epoch), about.bucket_lsn)?;
    let Some(stranded) = found else { return Ok(None) };
    let status = status(&about.name, about.volume, &stranded, &path, true);
    Ok(Some(Found { log, stranded, status, size: about.size }))
}

/// Moves the log away. First what it is, durably, then the log itself, by one rename.
fn set_aside(data: &Path, dir: &Path, found: &Found, manifest: &Manifest) -> anyhow::Result<PathBuf> {
    let all = data.join("stranded");
    let stem = format!("{}-{}", manifest.id, found.stranded.epoch);
    let target = (1..)
        .map(|n| if n == 1 { all.join(&stem) } else { all.join(format!("{stem}-{n}")) })
        .find(|path| !path.join("wal").exists())
        .expect("some number is free");
    fs::create_dir_all(&target)?;
    let about = About {
        volume: manifest.id,
        name: manifest.name.clone(),
        size: manifest.size,
        epoch: found.stranded.epoch,
        taken_epoch: found.stranded.taken_epoch,
        bucket_lsn: found.stranded.bucket_lsn,
    };
    let mut file = File::create(target.join(ABOUT))?;
    file.write_all(about.text().as_bytes())?;
    file.sync_all()?;
    for path in [&target, &all, &data.to_owned()] {
        File::open(path)?.sync_all()?;
    }
    fs::rename(dir.join("wal"), target.join("wal"))?;
    for path in [target.as_path(), dir] {
        File::open(path)?.sync_all()?;
    }
    Ok(target)
}

/// Reads what stranded copies by reference refer to: chunks of the volume. Its new owner knows nothing of those copies, so some
/// chunks may be gone.
struct Referred {
    reader: BlockReader,
    runtime: tokio::runtime::Handle,
}

impl Referred {
    /// Finds the chunks that `stranded` names. Those that are not there are noticed when they are read.
    async fn find(
        store: Arc<dyn ObjectStore>,
        manifest: &Manifest,
        keys: Option<Keys>,
        stranded: &Stranded,
    ) -> anyhow::Result<Self> {
        let seqs: BTreeSet<u64> = stranded
            .writes()
            .filter_map(|write| match write.kind {
                StrandedKind::Copy { seq, .. } => Some(seq),
                StrandedKind::Data | StrandedKind::Zeroes => None,
            })
            .collect();
        let table = Table::in_memory(MemKv::new(), manifest.id)?;
        let upto = Applied { seq: seqs.last().copied().unwrap_or(0), lsn: 0 };
        let mut chunks = Rebuild::begin(&table, upto)?;
        for seq in seqs {
            let name = ChunkName { volume: manifest.id, epoch: manifest.epoch_of(seq), seq };
            match read_index(store.as_ref(), &name, keys.as_ref()).await {
                Ok(index) => chunks.add(&index)?,
                Err(error) => tracing::warn!("what was copied of {name} cannot be read: {error}"),
            }
        }
        drop(chunks);
        let reader = BlockReader::new(manifest.id, Arc::new(table), store, None).with_keys(keys);
        Ok(Self { reader, runtime: tokio::runtime::Handle::current() })
    }

    /// Reads into `bytes` from the payload block `index` of the chunk `seq` on. Not on an async thread.
    fn read(&self, seq: u64, index: u16, bytes: &mut [u8]) -> Result<(), ReadError> {
        let target = Target::Chunk { seq, index };
        let blocks = (bytes.len() / BLOCK) as u64;
        self.runtime.block_on(self.reader.read_mapped(0, &[Mapped { lba: 0, blocks, target }], bytes)).map(drop)
    }
}

/// Writes stranded writes to a file. Returns where the list of them is, and how many bytes could not be had.
fn export(found: &Found, request: &ExportStranded, referred: Option<&Referred>) -> anyhow::Result<(PathBuf, u64)> {
    let list_path = PathBuf::from(format!("{}.list", request.file.display()));
    let what = |path: &Path| format!("cannot write {}", path.display());
    let new = |path: &Path| File::options().write(true).create_new(true).open(path).with_context(|| what(path));
    let mut list = BufWriter::new(new(&list_path)?);
    let image = if request.apply {
        let file = File::options().read(true).write(true).open(&request.file).with_context(|| what(&request.file))?;
        // A block device has its size; a file may be a shorter copy of the volume.
        if file.metadata()?.is_file() && file.metadata()?.len() < found.size {
            file.set_len(found.size)?;
        }
        file
    } else {
        let file = new(&request.file)?;
        file.set_len(found.size)?;
        file
    };
    let status = &found.status;
    writeln!(
        list,
        "# volume {}, {} writes of epoch {}, {} bytes\n# lsn\ttime\twhat\toffset\tbytes",
        status.volume, status.writes, status.epoch, status.bytes
    )?;
    let mut lost_bytes = 0;
    found.stranded.replay(&found.log, |write, content| {
        let kind = match (write.kind, content) {
            (_, Some(bytes)) => {
                image.write_all_at(bytes, write.offset)?;
                "data"
            }
            (StrandedKind::Copy { seq, index }, None) => match copy(&image, write, (seq, index), referred)? {
                0 => "copy",
                lost => {
                    lost_bytes += lost;
                    "copy, lost"
                }
            },
            (_, None) => {
                zero(&image, write)?;
                "zeroes"
            }
        };
        writeln!(list, "{}\t{}\t{kind}\t{}\t{}", write.lsn, date(write.time_ms), write.offset, write.len)
    })?;
    list.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    image.sync_all().with_context(|| what(&request.file))?;
    Ok((list_path, lost_bytes))
}

/// Writes what a copy refers to. Returns how many bytes of it cannot be read; they are left as they are.
fn copy(file: &File, write: &StrandedWrite, (seq, index): (u64, u16), referred: Option<&Referred>) -> io::Result<u64> {
    const PART: u64 = 256;
    let Some(referred) = referred else { return Ok(write.len) };
    let blocks = write.len / BLOCK_SIZE;
    let mut bytes = vec![0; PART as usize * BLOCK];
    for first in (0..blocks).step_by(PART as usize) {
        let part = &mut bytes[..(blocks - first).min(PART) as usize * BLOCK];
        if let Err(error) = referred.read(seq, index + first as u16, part) {
            tracing::warn!(lsn = write.lsn, "a stranded copy cannot be read: {error}");
            return Ok(write.len - first * BLOCK_SIZE);
        }
        file.write_all_at(part, write.offset + first * BLOCK_SIZE)?;
    }
    Ok(0)
}

/// Makes a range read as zeroes.
fn zero(file: &File, write: &StrandedWrite) -> io::Result<()> {
    let (offset, len) = (write.offset as libc::off_t, write.len as libc::off_t);
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: fallocate takes no pointers, and the descriptor is open.
    if unsafe { libc::fallocate(file.as_raw_fd(), punch, offset, len) } == 0 {
        return Ok(());
    }
    let zeroes = vec![0; 1 << 20];
    let end = write.offset + write.len;
    let mut at = write.offset;
    while at < end {
        let n = (end - at).min(zeroes.len() as u64);
        file.write_all_at(&zeroes[..n as usize], at)?;
        at += n;
    }
    Ok(())
}

/// Why the volume cannot be opened, for people.
pub(super) fn why_not(status: &StrandedStatus) -> String {
    let StrandedStatus { volume, epoch, taken_epoch, first_lsn, last_lsn, .. } = status;
    format!(
        "another host took volume {volume:?} over (epoch {taken_epoch}), while this host's log still holds writes \
         {first_lsn} to {last_lsn} of epoch {epoch}, {} written until {}, that never reached the bucket. `blockd volume \
         stranded export {volume} FILE` saves them; `blockd volume stranded discard {volume}` sets them aside, so that \
         the volume can be opened here again, without them",
        bytes(status.bytes),
        date(status.last_ms)
    )
}

impl Daemon {
    /// What is stranded in the log of the volume of `manifest`.
    pub(super) async fn stranded_in_place(&self, manifest: &Manifest) -> Result<Option<StrandedStatus>, VolumeError> {
        Ok(self.find_in_place(manifest).await?.map(|found| found.status))
    }

    async fn find_in_place(&self, manifest: &Manifest) -> Result<Option<Found>, VolumeError> {
        let (dir, manifest, host) = (self.data.volume(manifest.id), manifest.clone(), self.data.host());
        let name = manifest.name.clone();
        blocking(move || find_in_place(&dir, &manifest, host)).await.map_err(|error| {
            VolumeError::Failed(format!("cannot look into the log of volume {name:?}: {}", explain(&error)))
        })
    }

    /// After a volume was lost: finds out what is stranded, as soon as its new owner has settled where it goes on.
    pub(super) async fn look_for_stranded(self: Arc<Self>, name: &str) {
        for _ in 0..LOOKS {
            if let Ok((manifest, _)) = manifest::load(self.store.as_ref(), name).await {
                match self.stranded_in_place(&manifest).await {
                    Ok(None) => {}
                    Ok(Some(found)) => {
                        tracing::error!(volume = %name, "{}", why_not(&found));
                        return self.note_stranded(name, Some(found));
                    }
                    Err(error) => tracing::warn!(volume = %name, "{error}"),
                }
                let settled = manifest.epochs.iter().rev().find(|e| e.first_seq > 0);
                if settled.is_some_and(|last| last.owner != self.data.host()) {
                    return;
                }
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }

    /// Everything stranded on this host, in place or set aside.
    pub async fn stranded(&self) -> Result<Vec<StrandedStatus>, VolumeError> {
        let mut all = Vec::new();
        let names: Vec<String> = self.entries().keys().cloned().collect();
        for name in names {
            let Ok((manifest, _)) = manifest::load(self.store.as_ref(), &name).await else { continue };
            // An open volume's log is in use, and was looked at when it was opened.
            if matches!(self.entry(&name), Ok(entry) if matches!(entry.phase, Phase::Open(_) | Phase::Opening)) {
                continue;
            }
            all.extend(self.stranded_in_place(&manifest).await?);
        }
        all.extend(self.aside().await?.into_iter().map(|found| found.status));
        Ok(all)
    }

    async fn aside(&self) -> Result<Vec<Found>, VolumeError> {
        let all = self.data.path().join("stranded");
        let found = blocking(move || {
            let entries = match fs::read_dir(&all) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                other => other?,
            };
            let mut found = Vec::new();
            for entry in entries {
                found.extend(find_aside(&entry?.path())?);
            }
            Ok(found)
        });
        found.await.map_err(|error| {
            VolumeError::Failed(format!("cannot look at what was set aside as stranded: {}", explain(&error)))
        })
    }

    /// Writes stranded writes of a volume to a file.
    pub async fn export_stranded(&self, name: &str, request: ExportStranded) -> Result<ExportedStranded, VolumeError> {
        let failed = |error: anyhow::Error| {
            VolumeError::Failed(format!("cannot export the stranded writes of volume {name:?}: {}", explain(&error)))
        };
        if !request.file.is_absolute() {
            return Err(VolumeError::Invalid("the file must be named by its whole path".into()));
        }
        let mut found: Vec<Found> = self.aside().await?;
        found.retain(|found| found.status.volume == name);
        let manifest = manifest::load(self.store.as_ref(), name).await.ok().map(|(manifest, _)| manifest);
        if let Some(manifest) = &manifest {
            let open = matches!(self.entry(name), Ok(entry) if matches!(entry.phase, Phase::Open(_) | Phase::Opening));
            if !open {
                found.extend(self.find_in_place(manifest).await?);
            }
        }
        found.retain(|found| request.epoch.is_none_or(|epoch| epoch == found.status.epoch));
        let found = match found.len() {
            0 => return Err(VolumeError::Conflict(format!("no stranded writes of volume {name:?} are here"))),
            1 => found.remove(0),
            _ => {
                let epochs: Vec<String> = found.iter().map(|found| found.status.epoch.to_string()).collect();
                return Err(VolumeError::Conflict(format!(
                    "volume {name:?} has stranded writes of epochs {}; say which with --epoch",
                    epochs.join(", ")
                )));
            }
        };
        let stranded = found.status.clone();
        let referred = match manifest.filter(|manifest| manifest.id.to_string() == stranded.id) {
            Some(manifest) if found.stranded.writes().any(|write| matches!(write.kind, StrandedKind::Copy { .. })) => {
                let keys = self.keys.keys_of(&manifest).await.map_err(|error| failed(error.into()))?;
                let referred = Referred::find(self.store.clone(), &manifest, keys, &found.stranded).await;
                Some(referred.map_err(failed)?)
            }
            _ => None,
        };
        let exported = blocking(move || export(&found, &request, referred.as_ref())).await;
        let (list, lost_bytes) = exported.map_err(failed)?;
        Ok(ExportedStranded { stranded, list, lost_bytes })
    }

    /// Sets the stranded writes of a volume aside, so that it can be opened here again. Returns where they are.
    pub async fn discard_stranded(&self, name: &str) -> Result<StrandedStatus, VolumeError> {
        let (manifest, _) = self.load(name).await?;
        self.close_fenced(name).await?;
        let Some(found) = self.find_in_place(&manifest).await? else {
            return Err(VolumeError::Conflict(format!(
                "no stranded writes of volume {name:?} are in its log; `blockd volume stranded list` shows what there is"
            )));
        };
        let (data, dir) = (self.data.path().to_owned(), self.data.volume(manifest.id));
        let moved = blocking(move || {
            if found.log.segments().is_empty() {
                bail!("its log is empty");
            }
            let target = set_aside(&data, &dir, &found, &manifest)?;
            find_aside(&target)?.map(|found| found.status).context("it cannot be found again")
        });
        let moved = moved.await.map_err(|error| {
            VolumeError::Failed(format!("cannot set the stranded writes of {name:?} aside: {}", explain(&error)))
        })?;
        tracing::warn!(volume = %name, "stranded writes set aside in {}", moved.log.display());
        self.note_stranded(name, None);
        Ok(moved)
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> anyhow::Result<T> + Send + 'static) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await?
}
