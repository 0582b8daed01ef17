//! Listing directories.
//!
//! The position after `.` is 1, after `..` 2, after any other entry its cookie, which is above 2.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use fuser::{FileAttr, Generation, INodeNo, ReplyDirectory, ReplyDirectoryPlus};

use super::convert::{attributes, file_type, nothing};
use crate::vfs::{Attributes, Credentials, DirEntry, FileKind, Ino, Part, Result, Vfs, VfsError};

/// Entries asked of the tree at a time.
const PAGE_ENTRIES: usize = 256;

/// Takes entries until it is full.
pub(super) trait Sink {
    /// Takes one; false if there was no room.
    fn take(&mut self, ino: Ino, position: u64, kind: FileKind, name: &[u8], known: Option<&Attributes>) -> bool;

    /// Whether it wants attributes.
    fn wants_attributes(&self) -> bool;
}

impl Sink for ReplyDirectory {
    fn take(&mut self, ino: Ino, position: u64, kind: FileKind, name: &[u8], _: Option<&Attributes>) -> bool {
        !self.add(INodeNo(ino.0), position, file_type(kind), OsStr::from_bytes(name))
    }

    fn wants_attributes(&self) -> bool {
        false
    }
}

/// A listing with attributes, which the kernel may keep for a while. Of entries without attributes it takes only what they are.
pub(super) struct Plus {
    pub reply: ReplyDirectoryPlus,
    pub keep: Duration,
}

impl Sink for Plus {
    fn take(&mut self, ino: Ino, position: u64, kind: FileKind, name: &[u8], known: Option<&Attributes>) -> bool {
        let name = OsStr::from_bytes(name);
        match known {
            Some(known) => {
                !self.reply.add(INodeNo(ino.0), position, name, &self.keep, &attributes(known), Generation(0))
            }
            // Number 0 says that nothing was looked up; that of the entry stands in the attributes.
            None => {
                let entry = FileAttr { ino: INodeNo(ino.0), kind: file_type(kind), ..nothing() };
                !self.reply.add(INodeNo(0), position, name, &Duration::ZERO, &entry, Generation(0))
            }
        }
    }

    fn wants_attributes(&self) -> bool {
        true
    }
}

/// Fills `sink` from `position` on.
pub(super) fn fill(tree: &dyn Vfs, dir: Ino, position: u64, sink: &mut impl Sink) -> Result<()> {
    for (at, name) in [(1, &b"."[..]), (2, b"..")] {
        if position < at && !dots(tree, dir, at, name, sink)? {
            return Ok(());
        }
    }
    let mut after = if position <= 2 { 0 } else { position };
    loop {
        let page = tree.readdir(&Credentials::system(), dir, after, PAGE_ENTRIES)?;
        for entry in &page.entries {
            if !one(tree, dir, entry, sink)? {
                return Ok(());
            }
            after = entry.cookie;
        }
        if page.end || page.entries.is_empty() {
            return Ok(());
        }
    }
}

fn dots(tree: &dyn Vfs, dir: Ino, position: u64, name: &[u8], sink: &mut impl Sink) -> Result<bool> {
    // A removed directory that is still open has no parent any more.
    let ino = if position == 1 { dir } else { tree.parent(dir).unwrap_or(dir) };
    // Only the number and the kind of these two are looked at, the attributes never.
    let known = if sink.wants_attributes() { Some(tree.getattr(dir)?) } else { None };
    let known = known.map(|known| Attributes { ino, ..known });
    Ok(sink.take(ino, position, FileKind::Directory, name, known.as_ref()))
}

fn one(tree: &dyn Vfs, dir: Ino, entry: &DirEntry, sink: &mut impl Sink) -> Result<bool> {
    // To look at each snapshot would open it.
    let wanted = sink.wants_attributes() && tree.part(dir) != Part::SnapshotList;
    let known = match wanted.then(|| tree.getattr(entry.ino)) {
        None => None,
        Some(Ok(known)) => Some(known),
        // Removed since the page was read.
        Some(Err(VfsError::Stale | VfsError::NotFound)) => return Ok(true),
        Some(Err(error)) => return Err(error),
    };
    Ok(sink.take(entry.ino, entry.cookie, entry.kind, &entry.name, known.as_ref()))
}
