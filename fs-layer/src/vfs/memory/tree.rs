//! Files, directories and the rules of POSIX about them.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;

use super::contents::Contents;
use crate::vfs::*;

/// A file of any kind.
struct Node {
    attributes: Attributes,
    contents: Contents,
    target: Vec<u8>,
    names: HashMap<Vec<u8>, u64>,
    entries: BTreeMap<u64, (Vec<u8>, Ino)>,
    parent: Ino,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    holds: u64,
}

pub struct Tree {
    nodes: HashMap<Ino, Node>,
    next_ino: u64,
    next_cookie: u64,
}

fn check_name(name: &[u8]) -> Result<()> {
    match name {
        b"" | b"." | b".." => Err(VfsError::Invalid),
        _ if name.len() > NAME_MAX => Err(VfsError::NameTooLong),
        _ if name.contains(&b'/') || name.contains(&0) => Err(VfsError::Invalid),
        _ => Ok(()),
    }
}

impl Node {
    fn touch(&mut self, contents: bool) {
        let now = Time::now();
        self.attributes.changed = now;
        if contents {
            self.attributes.modified = now;
        }
        self.attributes.change += 1;
    }

    fn permits(&self, who: &Credentials, bits: u32) -> bool {
        let a = &self.attributes;
        if who.uid == 0 {
            return bits & 1 == 0 || a.kind == FileKind::Directory || a.mode & 0o111 != 0;
        }
        let shift = if who.uid == a.uid {
            6
        } else if who.in_group(a.gid) {
            3
        } else {
            0
        };
        a.mode >> shift & bits == bits
    }

    fn need(&self, who: &Credentials, bits: u32) -> Result<()> {
        if self.permits(who, bits) { Ok(()) } else { Err(VfsError::Access) }
    }

    fn sync_size(&mut self) {
        self.attributes.size = self.contents.size;
        self.attributes.stored_bytes = self.contents.stored_bytes();
    }

    fn regular(&self) -> Result<()> {
        match self.attributes.kind {
            FileKind::File => Ok(()),
            FileKind::Directory => Err(VfsError::IsDirectory),
            _ => Err(VfsError::Invalid),
        }
    }

    /// What writing does to set-id bits.
    fn drop_set_id(&mut self, who: &Credentials) {
        if who.uid != 0 {
            let group = if self.attributes.mode & 0o010 != 0 { 0o2000 } else { 0 };
            self.attributes.mode &= !(0o4000 | group);
        }
    }
}

impl Tree {
    pub fn new() -> Tree {
        let mut tree = Tree { nodes: HashMap::new(), next_ino: 1, next_cookie: 3 };
        let who = Credentials::system();
        let root = tree.add(FileKind::Directory, (who.uid, who.gid), 0o755, ROOT);
        tree.nodes.get_mut(&root).expect("it was added").attributes.links = 2;
        tree
    }

    pub fn usage(&self) -> (u64, u64) {
        (self.nodes.len() as u64, self.nodes.values().map(|node| node.attributes.stored_bytes).sum())
    }

    pub fn holds(&self) -> u64 {
        self.nodes.values().map(|node| node.holds).sum()
    }

    fn add(&mut self, kind: FileKind, owner: (u32, u32), mode: u32, parent: Ino) -> Ino {
        let ino = Ino(self.next_ino);
        self.next_ino += 1;
        let now = Time::now();
        let attributes = Attributes {
            ino,
            kind,
            mode: mode & 0o7777,
            links: 0,
            uid: owner.0,
            gid: owner.1,
            size: 0,
            stored_bytes: 0,
            device: (0, 0),
            accessed: now,
            modified: now,
            changed: now,
            made: now,
            change: 1,
        };
        let node = Node {
            attributes,
            contents: Contents::default(),
            target: Vec::new(),
            names: HashMap::new(),
            entries: BTreeMap::new(),
            parent,
            xattrs: BTreeMap::new(),
            holds: 0,
        };
        self.nodes.insert(ino, node);
        ino
    }

    fn node(&self, ino: Ino) -> Result<&Node> {
        self.nodes.get(&ino).ok_or(VfsError::Stale)
    }

    fn node_mut(&mut self, ino: Ino) -> Result<&mut Node> {
        self.nodes.get_mut(&ino).ok_or(VfsError::Stale)
    }

    fn dir(&self, ino: Ino) -> Result<&Node> {
        let node = self.node(ino)?;
        if node.attributes.kind == FileKind::Directory { Ok(node) } else { Err(VfsError::NotDirectory) }
    }

    fn find(&self, dir: Ino, name: &[u8]) -> Option<Ino> {
        let node = self.nodes.get(&dir)?;
        node.names.get(name).and_then(|cookie| node.entries.get(cookie)).map(|entry| entry.1)
    }

    fn change(&self, dir: Ino) -> u64 {
        self.nodes.get(&dir).map_or(0, |node| node.attributes.change)
    }

    fn put(&mut self, dir: Ino, name: &[u8], ino: Ino) {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        if let Some(node) = self.nodes.get_mut(&dir) {
            node.names.insert(name.to_vec(), cookie);
            node.entries.insert(cookie, (name.to_vec(), ino));
            node.attributes.size += 1;
            node.touch(true);
        }
    }

    fn take(&mut self, dir: Ino, name: &[u8]) {
        if let Some(node) = self.nodes.get_mut(&dir)
            && let Some(cookie) = node.names.remove(name)
        {
            node.entries.remove(&cookie);
            node.attributes.size -= 1;
            node.touch(true);
        }
    }

    pub fn lookup(&self, who: &Credentials, dir: Ino, name: &[u8]) -> Result<Attributes> {
        let node = self.dir(dir)?;
        node.need(who, 1)?;
        match name {
            b"." => return self.getattr(dir),
            b".." => return self.getattr(node.parent),
            _ => check_name(name)?,
        }
        self.getattr(self.find(dir, name).ok_or(VfsError::NotFound)?)
    }

    pub fn make(
        &mut self,
        who: &Credentials,
        dir: Ino,
        name: &[u8],
        what: &Make,
        with: &NewAttributes,
    ) -> Result<Made> {
        check_name(name)?;
        let parent = self.dir(dir)?;
        parent.need(who, 1)?;
        let before = parent.attributes.change;
        if let Some(ino) = self.find(dir, name) {
            let attributes = self.getattr(ino)?;
            return match what {
                Make::File { exclusive: false } if attributes.kind == FileKind::File => {
                    Ok(Made { attributes, made: false, dir: DirChange { before, after: before } })
                }
                _ => Err(VfsError::Exists),
            };
        }
        parent.need(who, 3)?;
        if parent.attributes.links == 0 {
            return Err(VfsError::NotFound);
        }
        let set_group = parent.attributes.mode & 0o2000 != 0;
        let mut gid = if set_group { parent.attributes.gid } else { who.gid };
        if with.uid.is_some_and(|uid| uid != who.uid) && who.uid != 0 {
            return Err(VfsError::NotPermitted);
        }
        if let Some(wanted) = with.gid {
            if who.uid != 0 && !who.in_group(wanted) && wanted != gid {
                return Err(VfsError::NotPermitted);
            }
            gid = wanted;
        }
        let (kind, mut mode) = match what {
            Make::File { .. } => (FileKind::File, with.mode),
            Make::Directory => (FileKind::Directory, with.mode | if set_group { 0o2000 } else { 0 }),
            Make::Symlink(_) => (FileKind::Symlink, 0o777),
            Make::Special { kind, .. } => (*kind, with.mode),
        };
        if matches!(kind, FileKind::CharDevice | FileKind::BlockDevice) && who.uid != 0 {
            return Err(VfsError::NotPermitted);
        }
        if kind != FileKind::Directory && who.uid != 0 && !who.in_group(gid) {
            mode &= !0o2000;
        }
        let ino = self.add(kind, (with.uid.unwrap_or(who.uid), gid), mode, dir);
        let node = self.node_mut(ino)?;
        node.attributes.links = if kind == FileKind::Directory { 2 } else { 1 };
        match what {
            Make::Symlink(target) => {
                node.attributes.size = target.len() as u64;
                node.target = target.clone();
            }
            Make::Special { device, .. } => node.attributes.device = *device,
            _ => {}
        }
        if let Some(size) = with.size {
            node.contents.set_size(size);
            node.sync_size();
        }
        node.attributes.accessed = with.accessed.unwrap_or(node.attributes.accessed);
        node.attributes.modified = with.modified.unwrap_or(node.attributes.modified);
        self.put(dir, name, ino);
        if kind == FileKind::Directory {
            self.node_mut(dir)?.attributes.links += 1;
        }
        Ok(Made { attributes: self.getattr(ino)?, made: true, dir: DirChange { before, after: self.change(dir) } })
    }

    pub fn link(&mut self, who: &Credentials, ino: Ino, dir: Ino, name: &[u8]) -> Result<Linked> {
        check_name(name)?;
        let file = self.node(ino)?;
        if file.attributes.kind == FileKind::Directory {
            return Err(VfsError::NotPermitted);
        }
        if file.attributes.links == 0 {
            return Err(VfsError::NotFound);
        }
        if file.attributes.links >= LINK_MAX {
            return Err(VfsError::TooManyLinks);
        }
        self.dir(dir)?.need(who, 1)?;
        if self.find(dir, name).is_some() {
            return Err(VfsError::Exists);
        }
        self.dir(dir)?.need(who, 3)?;
        let before = self.change(dir);
        let node = self.node_mut(ino)?;
        node.attributes.links += 1;
        node.touch(false);
        self.put(dir, name, ino);
        Ok(Linked { attributes: self.getattr(ino)?, dir: DirChange { before, after: self.change(dir) } })
    }

    /// Whether `who` may take an entry away: write permission, and of a sticky directory ownership.
    fn may_remove(&self, who: &Credentials, dir: Ino, ino: Ino) -> Result<()> {
        let node = self.dir(dir)?;
        node.need(who, 3)?;
        let sticky = node.attributes.mode & 0o1000 != 0;
        if sticky && who.uid != 0 && who.uid != node.attributes.uid && who.uid != self.node(ino)?.attributes.uid {
            return Err(VfsError::NotPermitted);
        }
        Ok(())
    }

    pub fn remove(&mut self, who: &Credentials, dir: Ino, name: &[u8], directory: bool) -> Result<DirChange> {
        check_name(name)?;
        self.dir(dir)?.need(who, 1)?;
        let ino = self.find(dir, name).ok_or(VfsError::NotFound)?;
        self.may_remove(who, dir, ino)?;
        let node = self.node(ino)?;
        match (node.attributes.kind == FileKind::Directory, directory) {
            (true, false) => return Err(VfsError::IsDirectory),
            (false, true) => return Err(VfsError::NotDirectory),
            (true, true) if !node.names.is_empty() => return Err(VfsError::NotEmpty),
            _ => {}
        }
        let before = self.change(dir);
        self.take(dir, name);
        self.drop_name(dir, ino)?;
        Ok(DirChange { before, after: self.change(dir) })
    }

    /// A file lost a name.
    fn drop_name(&mut self, dir: Ino, ino: Ino) -> Result<()> {
        let node = self.node_mut(ino)?;
        let directory = node.attributes.kind == FileKind::Directory;
        node.attributes.links = if directory { 0 } else { node.attributes.links - 1 };
        node.touch(false);
        if node.attributes.links == 0 && node.holds == 0 {
            self.nodes.remove(&ino);
        }
        if directory {
            self.node_mut(dir)?.attributes.links -= 1;
        }
        Ok(())
    }

    pub fn rename(
        &mut self,
        who: &Credentials,
        (from, old): (Ino, &[u8]),
        (to, new): (Ino, &[u8]),
        how: Rename,
    ) -> Result<(DirChange, DirChange)> {
        check_name(old)?;
        check_name(new)?;
        self.dir(from)?.need(who, 1)?;
        self.dir(to)?.need(who, 1)?;
        let ino = self.find(from, old).ok_or(VfsError::NotFound)?;
        self.may_remove(who, from, ino)?;
        self.dir(to)?.need(who, 3)?;
        let is_dir = self.node(ino)?.attributes.kind == FileKind::Directory;
        // Not into itself.
        let mut above = to;
        while is_dir && above != ROOT {
            if above == ino {
                return Err(VfsError::Invalid);
            }
            above = self.node(above)?.parent;
        }
        let (before_from, before_to) = (self.change(from), self.change(to));
        let target = self.find(to, new);
        let done = |tree: &Tree| {
            Ok((
                DirChange { before: before_from, after: tree.change(from) },
                DirChange { before: before_to, after: tree.change(to) },
            ))
        };
        if let Some(target) = target {
            if how == Rename::NoReplace {
                return Err(VfsError::Exists);
            }
            if target == ino {
                return done(self);
            }
            self.may_remove(who, to, target)?;
            let node = self.node(target)?;
            if how == Rename::Replace {
                match (is_dir, node.attributes.kind == FileKind::Directory) {
                    (true, false) => return Err(VfsError::NotDirectory),
                    (false, true) => return Err(VfsError::IsDirectory),
                    (true, true) if !node.names.is_empty() => return Err(VfsError::NotEmpty),
                    _ => {}
                }
            }
        } else if how == Rename::Exchange {
            return Err(VfsError::NotFound);
        }
        self.take(from, old);
        if let Some(target) = target {
            self.take(to, new);
            if how == Rename::Exchange {
                self.put(from, old, target);
                self.moved(target, to, from)?;
            } else {
                self.drop_name(to, target)?;
            }
        }
        self.put(to, new, ino);
        self.moved(ino, from, to)?;
        self.node_mut(ino)?.touch(false);
        done(self)
    }

    fn moved(&mut self, ino: Ino, from: Ino, to: Ino) -> Result<()> {
        if self.node(ino)?.attributes.kind == FileKind::Directory {
            self.node_mut(ino)?.parent = to;
            self.node_mut(from)?.attributes.links -= 1;
            self.node_mut(to)?.attributes.links += 1;
        }
        Ok(())
    }

    pub fn readdir(&self, who: &Credentials, dir: Ino, cookie: u64, max: usize) -> Result<DirPage> {
        let node = self.dir(dir)?;
        node.need(who, 4)?;
        let mut after = node.entries.range(cookie.saturating_add(1)..);
        let entries: Vec<DirEntry> = after
            .by_ref()
            .take(max)
            .filter_map(|(cookie, (name, ino))| {
                let kind = self.nodes.get(ino)?.attributes.kind;
                Some(DirEntry { name: name.clone(), ino: *ino, kind, cookie: *cookie })
            })
            .collect();
        Ok(DirPage { entries, end: after.next().is_none() })
    }

    pub fn parent(&self, dir: Ino) -> Result<Ino> {
        Ok(self.dir(dir)?.parent)
    }

    pub fn getattr(&self, ino: Ino) -> Result<Attributes> {
        Ok(self.node(ino)?.attributes.clone())
    }

    pub fn setattr(&mut self, who: &Credentials, ino: Ino, set: &SetAttributes, opened: bool) -> Result<Attributes> {
        let node = self.node_mut(ino)?;
        let owner = who.uid == 0 || who.uid == node.attributes.uid;
        if set.mode.is_some() && !owner {
            return Err(VfsError::NotPermitted);
        }
        if set.uid.is_some_and(|uid| who.uid != 0 && (uid != node.attributes.uid || !owner)) {
            return Err(VfsError::NotPermitted);
        }
        if set.gid.is_some_and(|gid| who.uid != 0 && (!owner || gid != node.attributes.gid && !who.in_group(gid))) {
            return Err(VfsError::NotPermitted);
        }
        for time in [set.accessed, set.modified].into_iter().flatten() {
            match time {
                SetTime::Now if owner || node.permits(who, 2) => {}
                SetTime::Now => return Err(VfsError::Access),
                SetTime::At(_) if owner => {}
                SetTime::At(_) => return Err(VfsError::NotPermitted),
            }
        }
        if let Some(size) = set.size {
            node.regular()?;
            if !opened {
                node.need(who, 2)?;
            }
            if size > FILE_SIZE_MAX {
                return Err(VfsError::TooLarge);
            }
        }
        let is_file = node.attributes.kind != FileKind::Directory;
        if let Some(size) = set.size {
            node.contents.set_size(size);
            node.sync_size();
            node.attributes.modified = Time::now();
            node.drop_set_id(who);
        }
        if set.uid.is_some() || set.gid.is_some() {
            node.attributes.uid = set.uid.unwrap_or(node.attributes.uid);
            node.attributes.gid = set.gid.unwrap_or(node.attributes.gid);
            if is_file {
                let group = if node.attributes.mode & 0o010 != 0 { 0o2000 } else { 0 };
                node.attributes.mode &= !(0o4000 | group);
            }
        }
        if let Some(mode) = set.mode {
            let gid = node.attributes.gid;
            let keep = who.uid == 0 || who.in_group(gid) || !is_file;
            node.attributes.mode = mode & if keep { 0o7777 } else { 0o5777 };
        }
        let at = |time: SetTime| match time {
            SetTime::Now => Time::now(),
            SetTime::At(time) => time,
        };
        node.attributes.accessed = set.accessed.map_or(node.attributes.accessed, at);
        node.attributes.modified = set.modified.map_or(node.attributes.modified, at);
        node.touch(false);
        Ok(node.attributes.clone())
    }

    pub fn access(&self, who: &Credentials, ino: Ino, asked: Access) -> Result<Access> {
        let node = self.node(ino)?;
        Ok(Access {
            read: asked.read && node.permits(who, 4),
            write: asked.write && node.permits(who, 2),
            execute: asked.execute && node.permits(who, 1),
        })
    }

    pub fn readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        let node = self.node(ino)?;
        if node.attributes.kind == FileKind::Symlink { Ok(node.target.clone()) } else { Err(VfsError::Invalid) }
    }

    pub fn getxattr(&self, who: &Credentials, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        let node = self.node(ino)?;
        node.need(who, 4)?;
        node.xattrs.get(name).cloned().ok_or(VfsError::NoData)
    }

    pub fn listxattr(&self, ino: Ino) -> Result<Vec<Vec<u8>>> {
        Ok(self.node(ino)?.xattrs.keys().cloned().collect())
    }

    pub fn setxattr(&mut self, who: &Credentials, ino: Ino, name: &[u8], value: &[u8], how: SetXattr) -> Result<()> {
        let node = self.node_mut(ino)?;
        node.need(who, 2)?;
        match (how, node.xattrs.contains_key(name)) {
            (SetXattr::Create, true) => return Err(VfsError::Exists),
            (SetXattr::Replace, false) => return Err(VfsError::NoData),
            _ => {}
        }
        if value.len() > XATTR_MAX {
            return Err(VfsError::AttributeTooLarge);
        }
        node.xattrs.insert(name.to_vec(), value.to_vec());
        node.touch(false);
        Ok(())
    }

    pub fn removexattr(&mut self, who: &Credentials, ino: Ino, name: &[u8]) -> Result<()> {
        let node = self.node_mut(ino)?;
        node.need(who, 2)?;
        node.xattrs.remove(name).ok_or(VfsError::NoData)?;
        node.touch(false);
        Ok(())
    }

    pub fn hold(&mut self, ino: Ino) -> Result<()> {
        self.node_mut(ino)?.holds += 1;
        Ok(())
    }

    pub fn release(&mut self, ino: Ino) {
        if let Some(node) = self.nodes.get_mut(&ino) {
            assert!(node.holds > 0, "file {} is released more often than it is held", ino.0);
            node.holds -= 1;
            if node.holds == 0 && node.attributes.links == 0 {
                self.nodes.remove(&ino);
            }
        }
    }

    pub fn read(&mut self, ino: Ino, offset: u64, len: u32) -> Result<ReadData> {
        let node = self.node_mut(ino)?;
        node.regular()?;
        let data = node.contents.read(offset, u64::from(len));
        let end = offset.saturating_add(data.len() as u64) >= node.contents.size;
        Ok(ReadData { data: Bytes::from(data), end })
    }

    pub fn write(&mut self, who: &Credentials, ino: Ino, at: WriteAt, data: &[u8]) -> Result<Written> {
        let node = self.node_mut(ino)?;
        node.regular()?;
        let offset = match at {
            WriteAt::Offset(offset) => offset,
            WriteAt::End => node.contents.size,
        };
        if offset.checked_add(data.len() as u64).is_none_or(|end| end > FILE_SIZE_MAX) {
            return Err(VfsError::TooLarge);
        }
        node.contents.write(offset, data);
        node.sync_size();
        node.drop_set_id(who);
        node.touch(true);
        Ok(Written { offset, attributes: node.attributes.clone() })
    }

    pub fn fallocate(
        &mut self,
        who: &Credentials,
        ino: Ino,
        how: Fallocate,
        offset: u64,
        len: u64,
    ) -> Result<Attributes> {
        let node = self.node_mut(ino)?;
        node.regular()?;
        let end = offset.checked_add(len).filter(|end| *end <= FILE_SIZE_MAX).ok_or(VfsError::TooLarge)?;
        if len == 0 {
            return Err(VfsError::Invalid);
        }
        // What really takes memory here.
        if how != Fallocate::PunchHole && len > 1 << 30 {
            return Err(VfsError::NoSpace);
        }
        match how {
            Fallocate::PunchHole => node.contents.zero(offset, len, true),
            Fallocate::ZeroRange | Fallocate::ZeroRangeKeepSize => node.contents.zero(offset, len, false),
            _ => {}
        }
        if how != Fallocate::PunchHole {
            node.contents.allocate(offset, len);
        }
        if matches!(how, Fallocate::Allocate | Fallocate::ZeroRange) {
            node.contents.size = node.contents.size.max(end);
        }
        node.sync_size();
        node.drop_set_id(who);
        node.touch(true);
        Ok(node.attributes.clone())
    }

    pub fn seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64> {
        let node = self.node(ino)?;
        node.regular()?;
        node.contents.seek(offset, what == Seek::Data).ok_or(VfsError::NoSuchAddress)
    }

    pub fn clone_range(&mut self, who: &Credentials, from: (Ino, u64), to: (Ino, u64), len: u64) -> Result<u64> {
        let source = self.node(from.0)?;
        source.regular()?;
        let size = source.contents.size;
        let len = if len == 0 { size.saturating_sub(from.1) } else { len };
        let end = from.1.checked_add(len).filter(|end| *end <= size).ok_or(VfsError::Invalid)?;
        let behind = self.node(to.0)?.contents.size > to.1.saturating_add(len);
        if !from.1.is_multiple_of(4096) || !to.1.is_multiple_of(4096) || (len % 4096 != 0 && (end != size || behind)) {
            return Err(VfsError::Invalid);
        }
        if from.0 == to.0 && from.1 < to.1.saturating_add(len) && to.1 < from.1.saturating_add(len) {
            return Err(VfsError::Invalid);
        }
        let mut at = 0;
        while at < len {
            let contents = &self.node(from.0)?.contents;
            let data_at = contents.seek(from.1 + at, true).unwrap_or(u64::MAX);
            let hole = data_at > from.1 + at;
            let until = if hole { data_at } else { contents.seek(from.1 + at, false).unwrap_or(size) };
            let part = (len - at).min(until - (from.1 + at)).min(1 << 20);
            if hole {
                let target = self.node_mut(to.0)?;
                target.regular()?;
                target.contents.zero(to.1 + at, part, true);
                target.contents.size = target.contents.size.max(to.1 + at + part);
            } else {
                let data = self.node(from.0)?.contents.read(from.1 + at, part);
                let target = self.node_mut(to.0)?;
                target.regular()?;
                target.contents.write(to.1 + at, &data);
            }
            at += part;
        }
        let target = self.node_mut(to.0)?;
        target.sync_size();
        target.drop_set_id(who);
        target.touch(true);
        Ok(len)
    }
}
