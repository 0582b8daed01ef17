//! A tree in memory that checks no permissions: as much as the kernel needs to be content.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

use bytes::Bytes;

use crate::vfs::*;

struct Node {
    known: Attributes,
    data: Vec<u8>,
    entries: BTreeMap<Vec<u8>, (Ino, u64)>,
    parent: Ino,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    holds: u64,
    locks: Vec<FileLock>,
}

type Waiting = Vec<(Ino, Box<dyn FnOnce() + Send>)>;

#[derive(Default)]
struct State {
    nodes: HashMap<Ino, Node>,
    next: u64,
    next_cookie: u64,
}

/// See the module.
pub struct MemoryTree {
    state: Mutex<State>,
    waiting: Mutex<Waiting>,
}

impl State {
    fn node(&mut self, ino: Ino) -> Result<&mut Node> {
        self.nodes.get_mut(&ino).ok_or(VfsError::Stale)
    }

    fn dir(&mut self, ino: Ino) -> Result<&mut Node> {
        let node = self.node(ino)?;
        if node.known.kind == FileKind::Directory { Ok(node) } else { Err(VfsError::NotDirectory) }
    }

    fn find(&mut self, dir: Ino, name: &[u8]) -> Result<Ino> {
        if name.len() > NAME_MAX {
            return Err(VfsError::NameTooLong);
        }
        let node = self.dir(dir)?;
        match name {
            b"." => Ok(dir),
            b".." => Ok(node.parent),
            name => node.entries.get(name).map(|(ino, _)| *ino).ok_or(VfsError::NotFound),
        }
    }

    fn add(&mut self, ino: Ino, kind: FileKind, parent: Ino) {
        let now = Time::now();
        let known = Attributes {
            ino,
            kind,
            mode: 0o755,
            links: if kind == FileKind::Directory { 2 } else { 1 },
            uid: 0,
            gid: 0,
            size: 0,
            stored_bytes: 0,
            device: (0, 0),
            accessed: now,
            modified: now,
            changed: now,
            made: now,
            change: 1,
        };
        let (data, entries, xattrs, locks) = Default::default();
        self.nodes.insert(ino, Node { known, data, entries, parent, xattrs, holds: 0, locks });
    }

    fn enter(&mut self, dir: Ino, name: &[u8], ino: Ino) -> Result<DirChange> {
        if name.len() > NAME_MAX {
            return Err(VfsError::NameTooLong);
        }
        if self.dir(dir)?.known.links == 0 {
            return Err(VfsError::NotFound);
        }
        self.next_cookie += 1;
        let cookie = self.next_cookie + 2;
        let is_dir = self.node(ino)?.known.kind == FileKind::Directory;
        if is_dir {
            self.node(ino)?.parent = dir;
        }
        let node = self.dir(dir)?;
        node.entries.insert(name.to_vec(), (ino, cookie));
        node.known.links += u32::from(is_dir);
        Ok(node.touch(true))
    }

    fn leave(&mut self, dir: Ino, name: &[u8]) -> Result<DirChange> {
        let node = self.dir(dir)?;
        let (ino, _) = node.entries.remove(name).ok_or(VfsError::NotFound)?;
        let is_dir = self.node(ino)?.known.kind == FileKind::Directory;
        let node = self.dir(dir)?;
        node.known.links -= u32::from(is_dir);
        Ok(node.touch(true))
    }

    fn drop_link(&mut self, ino: Ino) -> Result<()> {
        let node = self.node(ino)?;
        node.known.links = if node.known.kind == FileKind::Directory { 0 } else { node.known.links - 1 };
        node.touch(false);
        self.reap(ino);
        Ok(())
    }

    fn reap(&mut self, ino: Ino) {
        if self.nodes.get(&ino).is_some_and(|node| node.known.links == 0 && node.holds == 0) {
            self.nodes.remove(&ino);
        }
    }
}

impl Node {
    fn touch(&mut self, contents: bool) -> DirChange {
        let before = self.known.change;
        self.known.change += 1;
        self.known.changed = Time::now();
        if contents {
            self.known.modified = self.known.changed;
        }
        DirChange { before, after: self.known.change }
    }

    fn resize(&mut self, size: u64) {
        self.data.resize(size as usize, 0);
        self.known.size = size;
        self.known.stored_bytes = size;
        self.touch(true);
    }

    fn in_the_way(&self, lock: &FileLock) -> Option<FileLock> {
        let other = |held: &&FileLock| {
            held.space == lock.space
                && held.owner != lock.owner
                && (held.exclusive || lock.exclusive)
                && held.start <= lock.last
                && lock.start <= held.last
        };
        self.locks.iter().find(other).copied()
    }

    fn cut(&mut self, lock: &FileLock) {
        let mut kept = Vec::new();
        for held in self.locks.drain(..) {
            if held.owner != lock.owner || held.space != lock.space || held.last < lock.start || held.start > lock.last
            {
                kept.push(held);
                continue;
            }
            if held.start < lock.start {
                kept.push(FileLock { last: lock.start - 1, ..held });
            }
            if held.last > lock.last {
                kept.push(FileLock { start: lock.last + 1, ..held });
            }
        }
        self.locks = kept;
    }
}

impl MemoryTree {
    pub fn new() -> MemoryTree {
        let mut state = State { next: 1, ..State::default() };
        state.add(ROOT, FileKind::Directory, ROOT);
        MemoryTree { state: Mutex::new(state), waiting: Mutex::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn wake(&self, ino: Ino) {
        let all = std::mem::take(&mut *self.waiting.lock().unwrap());
        let (now, later): (Waiting, Waiting) = all.into_iter().partition(|(at, _)| *at == ino);
        self.waiting.lock().unwrap().extend(later);
        now.into_iter().for_each(|(_, then)| then());
    }
}

impl Vfs for MemoryTree {
    fn statfs(&self) -> Result<FsStat> {
        let files_total = 1 << 40;
        let files_free = files_total - self.state().nodes.len() as u64;
        Ok(FsStat { id: [7; 16], bytes_total: 1 << 60, bytes_free: 1 << 59, files_total, files_free, read_only: false })
    }

    fn lookup(&self, _: &Credentials, dir: Ino, name: &[u8]) -> Result<Attributes> {
        let mut state = self.state();
        let ino = state.find(dir, name)?;
        Ok(state.node(ino)?.known.clone())
    }

    fn make(&self, who: &Credentials, dir: Ino, name: &[u8], what: &Make, with: &NewAttributes) -> Result<Made> {
        let mut state = self.state();
        match state.find(dir, name) {
            Ok(ino) if *what == (Make::File { exclusive: false }) => {
                let attributes = state.node(ino)?.known.clone();
                return Ok(Made { attributes, made: false, dir: DirChange { before: 0, after: 0 } });
            }
            Ok(_) => return Err(VfsError::Exists),
            Err(VfsError::NotFound) => {}
            Err(error) => return Err(error),
        }
        let parent = state.dir(dir)?.known.clone();
        state.next += 1;
        let ino = Ino(state.next);
        let kind = match what {
            Make::File { .. } => FileKind::File,
            Make::Directory => FileKind::Directory,
            Make::Symlink(_) => FileKind::Symlink,
            Make::Special { kind, .. } => *kind,
        };
        state.add(ino, kind, dir);
        let node = state.node(ino)?;
        let inherits = parent.mode & libc::S_ISGID != 0;
        node.known.mode = with.mode | if inherits && kind == FileKind::Directory { libc::S_ISGID } else { 0 };
        node.known.uid = with.uid.unwrap_or(who.uid);
        node.known.gid = with.gid.unwrap_or(if inherits { parent.gid } else { who.gid });
        match what {
            Make::Symlink(target) => {
                node.data = target.clone();
                node.known.size = target.len() as u64;
            }
            Make::Special { device, .. } => node.known.device = *device,
            _ => {}
        }
        let attributes = node.known.clone();
        match state.enter(dir, name, ino) {
            Ok(dir) => Ok(Made { attributes, made: true, dir }),
            Err(error) => {
                state.nodes.remove(&ino);
                Err(error)
            }
        }
    }

    fn link(&self, _: &Credentials, ino: Ino, dir: Ino, name: &[u8]) -> Result<Linked> {
        let mut state = self.state();
        if state.find(dir, name).is_ok() {
            return Err(VfsError::Exists);
        }
        let node = state.node(ino)?;
        if node.known.links >= LINK_MAX {
            return Err(VfsError::TooManyLinks);
        }
        let dir = state.enter(dir, name, ino)?;
        let node = state.node(ino)?;
        node.known.links += 1;
        node.touch(false);
        Ok(Linked { attributes: node.known.clone(), dir })
    }

    fn unlink(&self, _: &Credentials, dir: Ino, name: &[u8]) -> Result<DirChange> {
        let mut state = self.state();
        let ino = state.find(dir, name)?;
        if state.node(ino)?.known.kind == FileKind::Directory {
            return Err(VfsError::IsDirectory);
        }
        let change = state.leave(dir, name)?;
        state.drop_link(ino)?;
        Ok(change)
    }

    fn rmdir(&self, _: &Credentials, dir: Ino, name: &[u8]) -> Result<DirChange> {
        let mut state = self.state();
        let ino = state.find(dir, name)?;
        if !state.dir(ino)?.entries.is_empty() {
            return Err(VfsError::NotEmpty);
        }
        let change = state.leave(dir, name)?;
        state.drop_link(ino)?;
        Ok(change)
    }

    fn rename(
        &self,
        _: &Credentials,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        how: Rename,
    ) -> Result<(DirChange, DirChange)> {
        let mut state = self.state();
        let ino = state.find(from.0, from.1)?;
        let over = match state.find(to.0, to.1) {
            Ok(over) => Some(over),
            Err(VfsError::NotFound) => None,
            Err(error) => return Err(error),
        };
        let same = DirChange { before: 0, after: 0 };
        match (how, over) {
            (Rename::NoReplace, Some(_)) => return Err(VfsError::Exists),
            (Rename::Exchange, None) => return Err(VfsError::NotFound),
            (_, Some(over)) if over == ino => return Ok((same, same)),
            _ => {}
        }
        let is_dir = |state: &mut State, ino| Ok::<_, VfsError>(state.node(ino)?.known.kind == FileKind::Directory);
        let moved_dir = is_dir(&mut state, ino)?;
        if let (Rename::Replace, Some(over)) = (how, over) {
            match (moved_dir, is_dir(&mut state, over)?) {
                (true, false) => return Err(VfsError::NotDirectory),
                (false, true) => return Err(VfsError::IsDirectory),
                (true, true) if !state.dir(over)?.entries.is_empty() => return Err(VfsError::NotEmpty),
                _ => {}
            }
        }
        state.leave(from.0, from.1)?;
        if let Some(over) = over {
            state.leave(to.0, to.1)?;
            match how {
                Rename::Exchange => drop(state.enter(from.0, from.1, over)?),
                _ => state.drop_link(over)?,
            }
        }
        let change = state.enter(to.0, to.1, ino)?;
        state.node(ino)?.touch(false);
        Ok((same, change))
    }

    fn readdir(&self, _: &Credentials, dir: Ino, cookie: u64, max: usize) -> Result<DirPage> {
        let mut state = self.state();
        let mut found: Vec<(Vec<u8>, (Ino, u64))> = state.dir(dir)?.entries.clone().into_iter().collect();
        found.retain(|(_, (_, at))| *at > cookie);
        found.sort_by_key(|(_, (_, at))| *at);
        let end = found.len() <= max;
        found.truncate(max);
        let mut entries = Vec::new();
        for (name, (ino, cookie)) in found {
            entries.push(DirEntry { name, ino, kind: state.node(ino)?.known.kind, cookie });
        }
        Ok(DirPage { entries, end })
    }

    fn parent(&self, dir: Ino) -> Result<Ino> {
        Ok(self.state().dir(dir)?.parent)
    }

    fn getattr(&self, ino: Ino) -> Result<Attributes> {
        Ok(self.state().node(ino)?.known.clone())
    }

    fn setattr(&self, _: &Credentials, ino: Ino, set: &SetAttributes, _: bool) -> Result<Attributes> {
        let mut state = self.state();
        let node = state.node(ino)?;
        if let Some(size) = set.size {
            if size > 1 << 32 {
                return Err(VfsError::TooLarge);
            }
            node.resize(size);
        }
        node.known.mode = set.mode.unwrap_or(node.known.mode);
        node.known.uid = set.uid.unwrap_or(node.known.uid);
        node.known.gid = set.gid.unwrap_or(node.known.gid);
        let time = |set: SetTime| match set {
            SetTime::Now => Time::now(),
            SetTime::At(time) => time,
        };
        node.touch(false);
        node.known.accessed = set.accessed.map_or(node.known.accessed, time);
        node.known.modified = set.modified.map_or(node.known.modified, time);
        Ok(node.known.clone())
    }

    fn access(&self, _: &Credentials, _: Ino, asked: Access) -> Result<Access> {
        Ok(asked)
    }

    fn readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        Ok(self.state().node(ino)?.data.clone())
    }

    fn getxattr(&self, _: &Credentials, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        if name.starts_with(b"system.") {
            return Err(VfsError::NotSupported);
        }
        self.state().node(ino)?.xattrs.get(name).cloned().ok_or(VfsError::NoData)
    }

    fn listxattr(&self, _: &Credentials, ino: Ino) -> Result<Vec<Vec<u8>>> {
        Ok(self.state().node(ino)?.xattrs.keys().cloned().collect())
    }

    fn setxattr(&self, _: &Credentials, ino: Ino, name: &[u8], value: &[u8], how: SetXattr) -> Result<()> {
        if name.starts_with(b"system.") {
            return Err(VfsError::NotSupported);
        }
        let mut state = self.state();
        let node = state.node(ino)?;
        match (how, node.xattrs.contains_key(name)) {
            (SetXattr::Create, true) => return Err(VfsError::Exists),
            (SetXattr::Replace, false) => return Err(VfsError::NoData),
            _ => {}
        }
        node.xattrs.insert(name.to_vec(), value.to_vec());
        node.touch(false);
        Ok(())
    }

    fn removexattr(&self, _: &Credentials, ino: Ino, name: &[u8]) -> Result<()> {
        self.state().node(ino)?.xattrs.remove(name).map(drop).ok_or(VfsError::NoData)
    }

    fn hold(&self, ino: Ino) -> Result<()> {
        self.state().node(ino)?.holds += 1;
        Ok(())
    }

    fn release(&self, ino: Ino) {
        let mut state = self.state();
        if let Ok(node) = state.node(ino) {
            node.holds -= 1;
        }
        state.reap(ino);
    }

    fn read(&self, ino: Ino, offset: u64, len: u32) -> Result<ReadData> {
        let mut state = self.state();
        let data = &state.node(ino)?.data;
        let start = (offset as usize).min(data.len());
        let end = (start + len as usize).min(data.len());
        Ok(ReadData { data: Bytes::copy_from_slice(&data[start..end]), end: end == data.len() })
    }

    fn write(&self, who: &Credentials, ino: Ino, at: WriteAt, data: &[u8]) -> Result<Written> {
        let mut state = self.state();
        let node = state.node(ino)?;
        let offset = match at {
            WriteAt::Offset(offset) => offset,
            WriteAt::End => node.known.size,
        };
        if node.known.size < offset + data.len() as u64 {
            node.resize(offset + data.len() as u64);
        }
        node.data[offset as usize..][..data.len()].copy_from_slice(data);
        node.touch(true);
        if who.uid != 0 {
            let group_runs = node.known.mode & libc::S_IXGRP != 0;
            node.known.mode &= !libc::S_ISUID & if group_runs { !libc::S_ISGID } else { !0 };
        }
        Ok(Written { offset, attributes: node.known.clone() })
    }

    fn fsync(&self, ino: Ino, _: bool) -> Result<()> {
        self.state().node(ino).map(drop)
    }

    fn fallocate(&self, _: &Credentials, ino: Ino, how: Fallocate, offset: u64, len: u64) -> Result<Attributes> {
        let mut state = self.state();
        let node = state.node(ino)?;
        let grows = matches!(how, Fallocate::Allocate | Fallocate::ZeroRange);
        if grows && node.known.size < offset + len {
            node.resize(offset + len);
        }
        if !matches!(how, Fallocate::Allocate | Fallocate::KeepSize) {
            let start = (offset as usize).min(node.data.len());
            let end = ((offset + len) as usize).min(node.data.len());
            node.data[start..end].fill(0);
            node.touch(true);
        }
        Ok(node.known.clone())
    }

    fn seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64> {
        let mut state = self.state();
        let size = state.node(ino)?.known.size;
        match what {
            _ if offset >= size => Err(VfsError::NoSuchAddress),
            Seek::Data => Ok(offset),
            Seek::Hole => Ok(size),
        }
    }

    fn clone_range(&self, _: &Credentials, from: (Ino, u64), to: (Ino, u64), len: u64) -> Result<u64> {
        let data = self.read(from.0, from.1, len as u32)?.data;
        self.write(&Credentials::system(), to.0, WriteAt::Offset(to.1), &data)?;
        Ok(data.len() as u64)
    }

    fn lock(&self, ino: Ino, lock: &FileLock) -> Result<Option<FileLock>> {
        let mut state = self.state();
        let node = state.node(ino)?;
        if let Some(other) = node.in_the_way(lock) {
            return Ok(Some(other));
        }
        node.cut(lock);
        node.locks.push(*lock);
        drop(state);
        self.wake(ino);
        Ok(None)
    }

    fn test_lock(&self, ino: Ino, lock: &FileLock) -> Result<Option<FileLock>> {
        Ok(self.state().node(ino)?.in_the_way(lock))
    }

    fn unlock(&self, ino: Ino, lock: &FileLock) -> Result<()> {
        self.state().node(ino)?.cut(lock);
        self.wake(ino);
        Ok(())
    }

    fn unlock_all(&self, ino: Ino, owner: LockOwner) -> Result<()> {
        self.state().node(ino)?.locks.retain(|lock| lock.owner != owner);
        self.wake(ino);
        Ok(())
    }

    fn wait_for_unlock(&self, ino: Ino, then: Box<dyn FnOnce() + Send>) {
        self.waiting.lock().unwrap().push((ino, then));
    }

    fn commit(&self) -> Result<()> {
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn write_verifier(&self) -> [u8; 8] {
        [1; 8]
    }
}
