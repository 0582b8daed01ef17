//! The offline check: reads everything that is on the disk and says what does not fit.
//!
//! The journal is replayed first: for a repair on the disk, else in memory only. Then every inode up to the last one leased is read, with
//! its directory, map and attributes, and compared with what the others say of it: names against link counts, addresses against each
//! other and against what was leased, orphans, counters. The filesystem must not be open meanwhile.
//!
//! Repair changes what follows from the rest without a doubt: link counts, parents, counts of blocks and files. It removes nothing.

mod walk;

use std::collections::BTreeMap;

use zerocopy::little_endian::{U32, U64};

use crate::alloc;
use crate::blocks::{BlockKind, Body};
use crate::disk::{BLOCK_BYTES, BlockAddress, Disk, OverlayDisk};
use crate::journal::{Replayed, replay};
use crate::layout::{
    FIRST_FREE_INO, Geometry, HostBody, INO_ORPHANS, InodeBody, Opened, flags, load_superblock, open, seal,
};
use crate::vfs::{FileKind, Ino, ROOT, Result, VfsError};
use walk::Walk;

/// How a check is done.
#[derive(Clone, Copy, Debug, Default)]
pub struct CheckOptions {
    /// Whether to mend what can be mended.
    pub repair: bool,
}

/// How far a check is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Inode numbers looked at.
    pub done: u64,
    /// Of so many.
    pub total: u64,
}

/// Something that does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file it is about, if it is about one.
    pub ino: Option<Ino>,
    /// What it is.
    pub what: String,
    /// Whether it was mended.
    pub repaired: bool,
}

/// What a check found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// What does not fit.
    pub problems: Vec<Problem>,
    /// What the journal held.
    pub replayed: Option<Replayed>,
    /// Files, directories included.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Files without names that opening will free.
    pub orphans: u64,
    /// Blocks of data and metadata, those of inodes included.
    pub blocks: u64,
}

impl Report {
    /// Whether nothing is wrong that was not mended.
    pub fn is_clean(&self) -> bool {
        self.problems.iter().all(|problem| problem.repaired)
    }
}

/// Checks a filesystem that is not open. `progress` is called now and then.
///
/// # Errors
/// [`VfsError::Io`] if the disk fails, or so much is damaged that there is nothing to check.
pub fn check(disk: &dyn Disk, options: CheckOptions, progress: &mut dyn FnMut(Progress)) -> Result<Report> {
    let overlay = OverlayDisk::new(disk);
    let disk: &dyn Disk = if options.repair { disk } else { &overlay };
    let geometry = load_superblock(disk)?;
    let replayed = replay(disk, &geometry, 0)?;
    let mut checker = Checker {
        disk,
        geometry,
        options,
        report: Report { replayed: Some(replayed), ..Report::default() },
        inodes: BTreeMap::new(),
        claims: Vec::new(),
    };
    checker.superblocks()?;
    let (next_ino, next_address, _) = alloc::load(disk, &geometry)?;
    checker.read_inodes(next_ino, progress)?;
    checker.addresses(next_address);
    checker.names()?;
    checker.counters()?;
    Ok(checker.report)
}

/// What is known of an inode.
struct Seen {
    version: u64,
    body: Box<Body>,
    kind: FileKind,
    /// Entries: the name, the file and what the entry says it is.
    entries: Vec<(Vec<u8>, Ino, u8)>,
    /// Names found.
    names: u32,
    /// Directories in it.
    directories: u32,
    /// The directory it was found in.
    parent: Option<Ino>,
    /// Blocks found.
    blocks: u64,
}

struct Checker<'a> {
    disk: &'a dyn Disk,
    geometry: Geometry,
    options: CheckOptions,
    report: Report,
    inodes: BTreeMap<Ino, Seen>,
    /// Addresses and whose they are.
    claims: Vec<(BlockAddress, u64, Ino)>,
}

impl Checker<'_> {
    fn problem(&mut self, ino: impl Into<Option<Ino>>, what: impl Into<String>) {
        self.report.problems.push(Problem { ino: ino.into(), what: what.into(), repaired: false });
    }

    /// Notes what can be mended; returns whether it is to be.
    fn mendable(&mut self, ino: Ino, what: String) -> bool {
        let repaired = self.options.repair;
        self.report.problems.push(Problem { ino: Some(ino), what, repaired });
        repaired
    }

    fn superblocks(&mut self) -> Result<()> {
        for at in [0, 1] {
            let mut block = [0; BLOCK_BYTES];
            self.disk.read(at, &mut block).map_err(failed)?;
            match open(None, at, BlockKind::Super, &block) {
                Opened::Sound { .. } => {}
                Opened::Empty => self.problem(None, format!("the superblock's copy at block {at} is empty")),
                Opened::Damaged(why) => self.problem(None, format!("the superblock's copy at block {at}: {why}")),
            }
        }
        Ok(())
    }

    fn read_inodes(&mut self, next_ino: u64, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        const STEP: u64 = 256;
        let mut first = 1;
        while first < next_ino {
            let count = STEP.min(next_ino - first);
            let mut bytes = vec![0; count as usize * BLOCK_BYTES];
            self.disk.read(self.geometry.inode_start + first, &mut bytes).map_err(failed)?;
            for (index, block) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
                let ino = Ino(first + index as u64);
                let at = self.geometry.inode_start + ino.0;
                let block = block.try_into().expect("whole blocks");
                match open(Some(self.geometry.fragment()), at, BlockKind::Inode, block) {
                    Opened::Empty => {}
                    Opened::Damaged(why) => self.problem(ino, format!("its block {at} is damaged: {why}")),
                    Opened::Sound { version, body } => self.read_inode(ino, version, body),
                }
            }
            first += count;
            progress(Progress { done: first, total: next_ino });
        }
        Ok(())
    }

    fn read_inode(&mut self, ino: Ino, version: u64, body: &Body) {
        let inode = InodeBody::of(body);
        if let Some(problem) = inode.problem(ino) {
            return self.problem(ino, problem);
        }
        let kind = inode.kind().expect("looked at above");
        let geometry = self.geometry;
        let mut walk = Walk::new(self.disk, &geometry);
        walk.inode(ino, body);
        for what in std::mem::take(&mut walk.problems) {
            self.problem(ino, what);
        }
        self.claims.extend(walk.claims.iter().map(|(at, count)| (*at, *count, ino)));
        let blocks = walk.claims.iter().map(|(_, count)| count).sum();
        let seen = Seen {
            version,
            body: Box::new(*body),
            kind,
            entries: walk.entries,
            names: 0,
            directories: 0,
            parent: None,
            blocks,
        };
        if seen.blocks != inode.stored_blocks.get() {
            let what = format!("it says that it takes {} blocks, and takes {blocks}", inode.stored_blocks);
            self.mendable(ino, what);
        }
        self.inodes.insert(ino, seen);
    }

    /// Nothing is in two places, and everything is where it was leased.
    fn addresses(&mut self, next_address: u64) {
        self.claims.sort_unstable();
        let claims = std::mem::take(&mut self.claims);
        for (index, (at, count, ino)) in claims.iter().enumerate() {
            if *at < self.geometry.data_start || at.saturating_add(*count) > next_address {
                self.problem(*ino, format!("its blocks {at}+{count} were never leased"));
            }
            if let Some((next, _, other)) = claims.get(index + 1)
                && at + count > *next
            {
                self.problem(*ino, format!("its blocks {at}+{count} are inode {}'s too", other.0));
            }
        }
    }

    fn names(&mut self) -> Result<()> {
        let directories: Vec<Ino> =
            self.inodes.iter().filter(|(_, seen)| seen.kind == FileKind::Directory).map(|(ino, _)| *ino).collect();
        let mut orphans = Vec::new();
        for dir in directories {
            let entries = self.inodes.get_mut(&dir).map(|seen| std::mem::take(&mut seen.entries)).unwrap_or_default();
            let internal = dir.0 >= INO_ORPHANS && dir.0 < FIRST_FREE_INO;
            for (name, ino, kind) in &entries {
                let shown = String::from_utf8_lossy(name);
                let Some(seen) = self.inodes.get_mut(ino) else {
                    self.problem(dir, format!("its entry {shown:?} names inode {}, which is not there", ino.0));
                    continue;
                };
                if internal {
                    orphans.push(*ino);
                    continue;
                }
                seen.names += 1;
                let is_dir = seen.kind == FileKind::Directory;
                let (found, before) = (seen.kind, seen.parent.replace(dir));
                if crate::vfs::kind_code(found) != *kind {
                    self.problem(dir, format!("its entry {shown:?} says kind {kind}, inode {} is {found:?}", ino.0));
                }
                if is_dir {
                    if before.is_some() || *ino == ROOT {
                        self.problem(*ino, "a directory with two names");
                    }
                    if let Some(seen) = self.inodes.get_mut(&dir) {
                        seen.directories += 1;
                    }
                }
            }
        }
        self.report.orphans = orphans.len() as u64;
        self.links(&orphans)?;
        self.reachable();
        Ok(())
    }

    fn links(&mut self, orphans: &[Ino]) -> Result<()> {
        let all: Vec<Ino> = self.inodes.keys().copied().collect();
        for ino in all {
            let Some(seen) = self.inodes.get(&ino) else { continue };
            let mut body = seen.body.clone();
            let (version, blocks) = (seen.version, seen.blocks);
            let inode = InodeBody::of_mut(&mut body);
            let internal = ino.0 >= INO_ORPHANS && ino.0 < FIRST_FREE_INO;
            let is_dir = seen.kind == FileKind::Directory;
            let (names, directories, parent) = (seen.names, seen.directories, seen.parent);
            let orphan = orphans.contains(&ino);
            if orphan != inode.has(flags::ORPHAN) {
                self.problem(
                    ino,
                    if orphan { "listed as an orphan without the flag" } else { "flagged as an orphan and not listed" },
                );
            }
            if names == 0 && ino != ROOT && !internal && !orphan {
                self.problem(ino, "no directory names it");
                continue;
            }
            let mut mend = blocks != inode.stored_blocks.get();
            let right = match is_dir {
                _ if orphan && names == 0 => 0,
                true => 2 + directories,
                false => names,
            };
            if inode.links.get() != right {
                let what = format!("it says it has {} links, and has {right}", inode.links);
                mend |= self.mendable(ino, what);
            }
            if let Some(parent) = parent
                && is_dir
                && inode.parent.get() != parent.0
            {
                let what = format!("it says it is in directory {}, and is in {}", inode.parent, parent.0);
                mend |= self.mendable(ino, what);
                inode.parent = U64::new(parent.0);
            }
            if mend && self.options.repair {
                inode.links = U32::new(right);
                inode.stored_blocks = U64::new(blocks);
                self.put(self.geometry.inode_start + ino.0, BlockKind::Inode, version + 1, &body)?;
            }
        }
        Ok(())
    }

    /// Every directory hangs on the root.
    fn reachable(&mut self) {
        let lost: Vec<Ino> = self
            .inodes
            .iter()
            .filter(|(_, seen)| seen.kind == FileKind::Directory && seen.parent.is_some())
            .map(|(ino, _)| *ino)
            .filter(|ino| {
                let (mut at, mut steps) = (*ino, 0);
                while at != ROOT && steps <= self.inodes.len() {
                    let Some(parent) = self.inodes.get(&at).and_then(|seen| seen.parent) else { return true };
                    at = parent;
                    steps += 1;
                }
                at != ROOT
            })
            .collect();
        for ino in lost {
            self.problem(ino, "the directory does not hang on the root");
        }
    }

    fn counters(&mut self) -> Result<()> {
        let internal = |ino: &Ino| ino.0 >= INO_ORPHANS && ino.0 < FIRST_FREE_INO;
        let files = self.inodes.keys().filter(|ino| !internal(ino)).count() as u64;
        let stored: u64 = self.inodes.values().map(|seen| seen.blocks).sum();
        let blocks = stored + files.saturating_sub(1);
        self.report.files = files;
        self.report.blocks = blocks;
        self.report.directories =
            self.inodes.iter().filter(|(ino, seen)| !internal(ino) && seen.kind == FileKind::Directory).count() as u64;
        let at = self.geometry.host(0);
        let mut block = [0; BLOCK_BYTES];
        self.disk.read(at, &mut block).map_err(failed)?;
        let (version, body) = match open(Some(self.geometry.fragment()), at, BlockKind::Host, &block) {
            Opened::Sound { version, body } => (version, body),
            Opened::Empty | Opened::Damaged(_) => {
                self.problem(None, format!("host slot 0 (block {at}) is damaged"));
                return Ok(());
            }
        };
        let counted: HostBody =
            zerocopy::FromBytes::read_from_bytes(&body[..]).expect("a host slot has the size of a body");
        let right = counted.with_counts(blocks as i64, files as i64);
        if self.report.problems.is_empty()
            && (counted.files.get() != right.files.get() || counted.stored_blocks.get() != right.stored_blocks.get())
        {
            let what = format!(
                "the counters say {} files and {} blocks, there are {files} and {blocks}",
                counted.files, counted.stored_blocks
            );
            let repaired = self.options.repair;
            self.report.problems.push(Problem { ino: None, what, repaired });
            if repaired {
                self.put(at, BlockKind::Host, version + 1, right.as_body())?;
            }
        }
        Ok(())
    }

    fn put(&self, at: BlockAddress, kind: BlockKind, version: u64, body: &Body) -> Result<()> {
        let mut block = [0; BLOCK_BYTES];
        seal(self.geometry.fragment(), at, kind, version, body, &mut block);
        self.disk.write(at, &block).and_then(|()| self.disk.flush()).map_err(failed)
    }
}

fn failed(error: std::io::Error) -> VfsError {
    VfsError::Io(format!("the disk failed: {error}"))
}
