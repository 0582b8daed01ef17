//! Requests of the kernel, answered by the tree. See the parent for who checks what.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLock,
    ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::awake::Awake;
use super::convert::{attributes, errno, kind_of_mode, nothing, set_time, unpack_device};
use super::locks::{Locks, Waiter};
use super::readdir::{self, Plus};
use super::turns::{Turns, Work};
use super::{FuseOptions, Sharing};
use crate::disk::BLOCK_BYTES;
use crate::vfs::{
    Access, Attributes, Credentials, Fallocate, FileKind, FileLock, Ino, LockSpace, Made, Make, NAME_MAX,
    NewAttributes, Part, Rename, Result, SHARE_BYTES_MIN, Seek, SetAttributes, SetXattr, Vfs, VfsError, WriteAt,
};

/// Bytes of one read or write request.
const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Bytes that one copy request moves, or shares, before the kernel is asked to go on.
const COPY_BYTES_MAX: u64 = 16 << 20;
const CLONE_BYTES_MAX: u64 = 1 << 30;
/// Read-ahead and asynchronous direct requests that may be under way.
const BACKGROUND_MAX: u16 = 64;
/// The kernel's last byte of a lock that has no end.
const LOCK_END: u64 = i64::MAX as u64;
/// No number is ever used for another file.
const GENERATION: Generation = Generation(0);
/// Any user without rights: what a write is made as whose set-id bits must go.
const UNPRIVILEGED: u32 = 65_534;

/// A tree as `fuser` wants it.
pub(super) struct FuseTree {
    tree: Arc<dyn Vfs>,
    locks: Locks,
    sharing: Sharing,
    read_ahead: u32,
    /// Whether the tree has access control lists.
    lists: bool,
    /// How often what is held: the kernel's last releases do not arrive any more once it is unmounted.
    held: Mutex<HashMap<Ino, u64>>,
    turns: Arc<Turns>,
}

impl FuseTree {
    pub(super) fn new(tree: Arc<dyn Vfs>, locks: Locks, options: &FuseOptions) -> FuseTree {
        FuseTree {
            tree,
            locks,
            sharing: options.sharing,
            read_ahead: u32::try_from(options.read_ahead).unwrap_or(u32::MAX),
            lists: false,
            held: Mutex::default(),
            turns: Turns::new(if options.keep_awake { Awake::new() } else { Awake::never() }),
        }
    }

    /// Who reads requests when.
    pub(super) fn turns(&self) -> Arc<Turns> {
        self.turns.clone()
    }

    fn hold(&self, ino: Ino) -> Result<()> {
        self.tree.hold(ino)?;
        *self.held.lock().unwrap_or_else(PoisonError::into_inner).entry(ino).or_default() += 1;
        Ok(())
    }

    fn let_go(&self, ino: Ino) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let Entry::Occupied(mut count) = held.entry(ino) else { return };
        *count.get_mut() -= 1;
        if *count.get() == 0 {
            count.remove();
        }
        drop(held);
        self.tree.release(ino);
    }

    fn keep(&self) -> Duration {
        self.sharing.keep()
    }

    /// How long what is known of a file may be kept.
    fn keep_of(&self, ino: Ino) -> Duration {
        if self.tree.part(ino) == Part::SnapshotList { Duration::ZERO } else { self.keep() }
    }

    /// The same for what a name means.
    fn keep_name(&self, dir: Ino, found: &Result<Attributes>) -> Duration {
        match found {
            Ok(found) => self.keep_of(dir).min(self.keep_of(found.ino)),
            Err(_) => self.keep_of(dir),
        }
    }

    fn open_flags(&self) -> FopenFlags {
        match self.sharing {
            Sharing::Alone => FopenFlags::FOPEN_KEEP_CACHE,
            Sharing::Shared => FopenFlags::empty(),
        }
    }

    fn look_up(&self, dir: Ino, name: &OsStr) -> Result<Attributes> {
        // Of files too, when a handle is opened that the kernel has forgotten.
        match name.as_bytes() {
            b"." => self.tree.getattr(dir),
            b".." => self.tree.getattr(self.tree.parent(dir)?),
            name => self.tree.lookup(&Credentials::system(), dir, name),
        }
    }

    /// Makes something that belongs to the caller. `umask` counts unless the directory has a default list.
    fn make(&self, by: &Request, dir: INodeNo, name: &OsStr, what: &Make, mode: u32, umask: u32) -> Result<Made> {
        let dir = Ino(dir.0);
        let inherits_group = self.tree.getattr(dir)?.mode & libc::S_ISGID != 0;
        let system = Credentials::system();
        let has_default = self.lists && self.tree.getxattr(&system, dir, b"system.posix_acl_default").is_ok();
        let mode = mode & 0o7777 & if has_default { !0 } else { !umask };
        let with = NewAttributes {
            mode,
            uid: Some(by.uid()),
            gid: (!inherits_group).then(|| by.gid()),
            ..NewAttributes::default()
        };
        self.tree.make(&system, dir, name.as_bytes(), what, &with)
    }

    fn create(
        &self,
        by: &Request,
        dir: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
    ) -> Result<Attributes> {
        let what = Make::File { exclusive: flags & libc::O_EXCL != 0 };
        let made = self.make(by, dir, name, &what, mode, umask)?;
        let ino = made.attributes.ino;
        if !made.made {
            // Somebody else made it since the kernel looked, which so has checked nothing.
            let who = Credentials { uid: by.uid(), gid: by.gid(), groups: Vec::new() };
            let (read, write) = wanted(flags);
            let has = self.tree.access(&who, ino, Access { read, write, execute: false })?;
            if (read && !has.read) || (write && !has.write) {
                return Err(VfsError::Access);
            }
        }
        self.hold(ino)?;
        Ok(made.attributes)
    }

    fn change(&self, by: &Request, ino: Ino, mut set: SetAttributes) -> Result<Attributes> {
        let new_owner = set.uid.is_some() || set.gid.is_some();
        let truncated = set.size.is_some() && by.uid() != 0;
        if set.mode.is_none() && (new_owner || truncated) {
            let now = self.tree.getattr(ino)?;
            let kept = without_set_id(now.mode);
            if now.kind == FileKind::File && kept != now.mode {
                set.mode = Some(kept);
            }
        }
        self.tree.setattr(&Credentials::system(), ino, &set, true)
    }

    fn copy(&self, from: (Ino, u64), to: (Ino, u64), len: u64) -> Result<u64> {
        let system = Credentials::system();
        let aligned = |n: u64| n.is_multiple_of(BLOCK_BYTES as u64);
        let size = self.tree.getattr(from.0)?.size;
        let there = size.saturating_sub(from.1);
        let len = len.min(there);
        if len == 0 {
            return Ok(0);
        }
        if aligned(from.1) && aligned(to.1) {
            // Whole blocks, or up to the end of the source where that is not in the middle of the target.
            let to_end = len == there && to.1 + len >= self.tree.getattr(to.0)?.size;
            let shared = len.min(CLONE_BYTES_MAX);
            let shared = if to_end && shared == len { shared } else { shared & !(BLOCK_BYTES as u64 - 1) };
            let overlap = from.0 == to.0 && from.1.abs_diff(to.1) < shared;
            if shared >= SHARE_BYTES_MIN && !overlap {
                match self.tree.clone_range(&system, from, to, shared) {
                    Err(VfsError::NotSupported | VfsError::Invalid | VfsError::CrossDevice) => {}
                    other => return other,
                }
            }
        }
        let mut done = 0;
        while done < len.min(COPY_BYTES_MAX) {
            let step = (len - done).min(u64::from(REQUEST_BYTES_MAX)) as u32;
            let part = self.tree.read(from.0, from.1 + done, step)?;
            if part.data.is_empty() {
                break;
            }
            self.tree.write(&system, to.0, WriteAt::Offset(to.1 + done), &part.data)?;
            done += part.data.len() as u64;
        }
        Ok(done)
    }

    fn lock_of(owner: LockOwner, pid: u32, start: u64, end: u64, kind: i32) -> FileLock {
        FileLock {
            owner: Locks::owner(owner.0),
            pid,
            space: LockSpace::Range,
            exclusive: kind == libc::F_WRLCK,
            start,
            last: if end >= LOCK_END { u64::MAX } else { end },
        }
    }
}

/// Whether files opened with these flags are read and written.
fn wanted(flags: i32) -> (bool, bool) {
    match flags & libc::O_ACCMODE {
        libc::O_RDONLY => (true, false),
        libc::O_WRONLY => (false, true),
        _ => (true, true),
    }
}

/// What is left of a file's mode when its contents or owner change: no set-user-ID, and no set-group-ID where that is
/// not a sign of mandatory locks.
fn without_set_id(mode: u32) -> u32 {
    let group_runs = mode & libc::S_IXGRP != 0;
    mode & !libc::S_ISUID & if group_runs { !libc::S_ISGID } else { !0 }
}

fn answer_entry(reply: ReplyEntry, keep: Duration, result: Result<Attributes>) {
    match result {
        Ok(known) => reply.entry(&keep, &attributes(&known), GENERATION),
        Err(error) => reply.error(errno(&error)),
    }
}

fn answer_attr(reply: ReplyAttr, keep: Duration, result: Result<Attributes>) {
    match result {
        Ok(known) => reply.attr(&keep, &attributes(&known)),
        Err(error) => reply.error(errno(&error)),
    }
}

fn answer<T>(reply: ReplyEmpty, result: Result<T>) {
    match result {
        Ok(_) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

fn answer_write(reply: ReplyWrite, result: Result<u64>) {
    match result {
        Ok(bytes) => reply.written(u32::try_from(bytes).unwrap_or(u32::MAX)),
        Err(error) => reply.error(errno(&error)),
    }
}

/// Answers with bytes, or how many they are where the caller asked with room for none.
fn answer_xattr(reply: ReplyXattr, room: u32, result: Result<Vec<u8>>) {
    match result {
        Ok(value) if room == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > room as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(error) => reply.error(errno(&error)),
    }
}

impl Filesystem for FuseTree {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        self.lists = !matches!(
            self.tree.getxattr(&Credentials::system(), crate::vfs::ROOT, b"system.posix_acl_access"),
            Err(VfsError::NotSupported)
        );
        let mut wanted = InitFlags::FUSE_EXPORT_SUPPORT
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2;
        wanted |= match self.sharing {
            Sharing::Alone => InitFlags::FUSE_EXPLICIT_INVAL_DATA | InitFlags::FUSE_CACHE_SYMLINKS,
            Sharing::Shared => InitFlags::FUSE_AUTO_INVAL_DATA | InitFlags::FUSE_POSIX_LOCKS,
        };
        if self.lists {
            wanted |= InitFlags::FUSE_POSIX_ACL | InitFlags::FUSE_DONT_MASK;
        }
        if let Err(missing) = config.add_capabilities(wanted) {
            tracing::debug!(?missing, "an old kernel");
            // Only what it lacks was refused, and the rest with it.
            let _ = config.add_capabilities(wanted & !missing);
        }
        let _ = config.set_max_write(REQUEST_BYTES_MAX);
        if let Err(most) = config.set_max_readahead(self.read_ahead) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_background(BACKGROUND_MAX);
        let _ = config.set_congestion_threshold(BACKGROUND_MAX * 3 / 4);
        Ok(())
    }

    fn destroy(&mut self) {
        for (ino, count) in std::mem::take(&mut *self.held.lock().unwrap_or_else(PoisonError::into_inner)) {
            (0..count).for_each(|_| self.tree.release(ino));
        }
        if let Err(error) = self.tree.sync() {
            tracing::error!("what was written may not be durable: {error}");
        }
    }

    fn lookup(&self, _: &Request, dir: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _turn = self.turns.begin(Work::Quick);
        let result = self.look_up(Ino(dir.0), name);
        let keep = self.keep_name(Ino(dir.0), &result);
        if matches!(result, Err(VfsError::NotFound)) && self.sharing == Sharing::Alone {
            // Number 0 says that there is nothing, and may be kept like anything else.
            return reply.entry(&keep, &nothing(), GENERATION);
        }
        answer_entry(reply, keep, result);
    }

    fn forget(&self, _: &Request, _: INodeNo, _: u64) {
        // What the kernel merely knows needs no account; but who read this looks for the next request before it sleeps, as after any.
        let _turn = self.turns.begin(Work::Quick);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let _turn = self.turns.begin(Work::Quick);
        answer_attr(reply, self.keep_of(Ino(ino.0)), self.tree.getattr(Ino(ino.0)));
    }

    fn setattr(
        &self,
        by: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        accessed: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let _turn = self.turns.begin(Work::Quick);
        let set = SetAttributes {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            size,
            accessed: accessed.map(set_time),
            modified: modified.map(set_time),
        };
        answer_attr(reply, self.keep(), self.change(by, Ino(ino.0), set));
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        let _turn = self.turns.begin(Work::Quick);
        match self.tree.readlink(Ino(ino.0)) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn mknod(&self, by: &Request, dir: INodeNo, name: &OsStr, mode: u32, umask: u32, device: u32, reply: ReplyEntry) {
        let _turn = self.turns.begin(Work::Quick);
        let what = match kind_of_mode(mode) {
            Some(FileKind::File) => Make::File { exclusive: true },
            Some(kind) => Make::Special { kind, device: unpack_device(device) },
            None => return reply.error(Errno::EINVAL),
        };
        answer_entry(reply, self.keep(), self.make(by, dir, name, &what, mode, umask).map(|made| made.attributes));
    }

    fn mkdir(&self, by: &Request, dir: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let _turn = self.turns.begin(Work::Quick);
        let made = self.make(by, dir, name, &Make::Directory, mode, umask);
        answer_entry(reply, self.keep(), made.map(|made| made.attributes));
    }

    fn unlink(&self, _: &Request, dir: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.turns.begin(Work::Quick);
        answer(reply, self.tree.unlink(&Credentials::system(), Ino(dir.0), name.as_bytes()));
    }

    fn rmdir(&self, _: &Request, dir: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.turns.begin(Work::Quick);
        answer(reply, self.tree.rmdir(&Credentials::system(), Ino(dir.0), name.as_bytes()));
    }

    fn symlink(&self, by: &Request, dir: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let _turn = self.turns.begin(Work::Quick);
        let what = Make::Symlink(target.as_os_str().as_bytes().to_vec());
        answer_entry(reply, self.keep(), self.make(by, dir, name, &what, 0o777, 0).map(|made| made.attributes));
    }

    fn rename(
        &self,
        _: &Request,
        dir: INodeNo,
        name: &OsStr,
        to_dir: INodeNo,
        to_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let _turn = self.turns.begin(Work::Quick);
        let how = match flags {
            flags if flags.is_empty() => Rename::Replace,
            RenameFlags::RENAME_NOREPLACE => Rename::NoReplace,
            RenameFlags::RENAME_EXCHANGE => Rename::Exchange,
            _ => return reply.error(Errno::EINVAL),
        };
        let (from, to) = ((Ino(dir.0), name.as_bytes()), (Ino(to_dir.0), to_name.as_bytes()));
        answer(reply, self.tree.rename(&Credentials::system(), from, to, how));
    }

    fn link(&self, _: &Request, ino: INodeNo, dir: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _turn = self.turns.begin(Work::Quick);
        let linked = self.tree.link(&Credentials::system(), Ino(ino.0), Ino(dir.0), name.as_bytes());
        answer_entry(reply, self.keep(), linked.map(|linked| linked.attributes));
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let _turn = self.turns.begin(Work::Quick);
        if wanted(flags.0).1 && self.tree.part(Ino(ino.0)) != Part::Live {
            return reply.error(Errno::EROFS);
        }
        match self.hold(Ino(ino.0)) {
            Ok(()) => reply.opened(FileHandle(0), self.open_flags()),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn create(&self, by: &Request, dir: INodeNo, name: &OsStr, mode: u32, umask: u32, flags: i32, reply: ReplyCreate) {
        let _turn = self.turns.begin(Work::Quick);
        match FuseTree::create(self, by, dir, name, mode, umask, flags) {
            Ok(known) => {
                reply.created(&self.keep(), &attributes(&known), GENERATION, FileHandle(0), self.open_flags());
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let _turn = self.turns.begin(Work::Copy);
        match self.tree.read(Ino(ino.0), offset, size) {
            Ok(read) => reply.data(&read.data),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn write(
        &self,
        by: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let _turn = self.turns.begin(Work::Copy);
        // The kernel knows who may keep set-id bits; uid 0 without the capability may not, others with it may.
        let who = if write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID) {
            let uid = if by.uid() == 0 { UNPRIVILEGED } else { by.uid() };
            Credentials { uid, gid: by.gid(), groups: Vec::new() }
        } else {
            Credentials::system()
        };
        // What comes from the page cache was appended when it was written there.
        let appended = flags.0 & libc::O_APPEND != 0 && !write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let at = if appended { WriteAt::End } else { WriteAt::Offset(offset) };
        let mut reply = Some(reply);
        let written = self.tree.write_accepting(&who, Ino(ino.0), at, data, &mut || {
            if let Some(reply) = reply.take() {
                reply.written(data.len() as u32);
            }
        });
        match (reply, written) {
            (Some(reply), written) => answer_write(reply, written.map(|_| data.len() as u64)),
            (None, Ok(_)) => {}
            // The next fsync fails as well.
            (None, Err(error)) => tracing::error!(ino = ino.0, "what was written is lost: {error}"),
        }
    }

    fn flush(&self, _: &Request, ino: INodeNo, _: FileHandle, owner: LockOwner, reply: ReplyEmpty) {
        let _turn = self.turns.begin(Work::Quick);
        if self.sharing == Sharing::Alone {
            // Nothing is held back, and the locks are the kernel's: it need not ask again.
            return reply.error(Errno::ENOSYS);
        }
        answer(reply, self.locks.closed(Ino(ino.0), owner.0));
    }

    fn release(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let _turn = self.turns.begin(Work::Quick);
        // Nobody waits for this but the kernel, which keeps the file's number busy until it is answered.
        reply.ok();
        self.let_go(Ino(ino.0));
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, data_only: bool, reply: ReplyEmpty) {
        let _turn = self.turns.begin(Work::Long);
        answer(reply, self.tree.fsync(Ino(ino.0), data_only));
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let _turn = self.turns.begin(Work::Quick);
        match self.hold(Ino(ino.0)) {
            Ok(()) => reply.opened(FileHandle(0), FopenFlags::empty()),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let _turn = self.turns.begin(Work::Copy);
        match readdir::fill(&*self.tree, Ino(ino.0), offset, &mut reply) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn readdirplus(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, reply: ReplyDirectoryPlus) {
        let _turn = self.turns.begin(Work::Copy);
        let mut plus = Plus { reply, keep: self.keep() };
        match readdir::fill(&*self.tree, Ino(ino.0), offset, &mut plus) {
            Ok(()) => plus.reply.ok(),
            Err(error) => plus.reply.error(errno(&error)),
        }
    }

    fn releasedir(&self, _: &Request, ino: INodeNo, _: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        let _turn = self.turns.begin(Work::Quick);
        // Nobody waits for this but the kernel, which keeps the file's number busy until it is answered.
        reply.ok();
        self.let_go(Ino(ino.0));
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let _turn = self.turns.begin(Work::Long);
        answer(reply, self.tree.commit());
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let _turn = self.turns.begin(Work::Quick);
        match self.tree.statfs() {
            Ok(stat) => {
                let block = BLOCK_BYTES as u64;
                let (total, free) = (stat.bytes_total / block, stat.bytes_free / block);
                let (files, files_free) = (stat.files_total, stat.files_free);
                reply.statfs(
                    total,
                    free,
                    free,
                    files,
                    files_free,
                    BLOCK_BYTES as u32,
                    NAME_MAX as u32,
                    BLOCK_BYTES as u32,
                );
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn setxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, value: &[u8], flags: i32, _: u32, reply: ReplyEmpty) {
        let _turn = self.turns.begin(Work::Quick);
        let how = match flags {
            0 => SetXattr::Any,
            libc::XATTR_CREATE => SetXattr::Create,
            libc::XATTR_REPLACE => SetXattr::Replace,
            _ => return reply.error(Errno::EINVAL),
        };
        match self.tree.setxattr(&Credentials::system(), Ino(ino.0), name.as_bytes(), value, how) {
            // setxattr(2) has another word for it than getxattr(2).
            Err(VfsError::AttributeTooLarge) => reply.error(Errno::E2BIG),
            result => answer(reply, result),
        }
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let _turn = self.turns.begin(Work::Quick);
        answer_xattr(reply, size, self.tree.getxattr(&Credentials::system(), Ino(ino.0), name.as_bytes()));
    }

    fn listxattr(&self, by: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let _turn = self.turns.begin(Work::Quick);
        // Not everybody may see all names, and the kernel does not hide any.
        let who = Credentials { uid: by.uid(), gid: by.gid(), groups: Vec::new() };
        let names = self.tree.listxattr(&who, Ino(ino.0));
        let joined = names.map(|names| names.into_iter().flat_map(|name| name.into_iter().chain([0])).collect());
        answer_xattr(reply, size, joined);
    }

    fn removexattr(&self, _: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.turns.begin(Work::Quick);
        answer(reply, self.tree.removexattr(&Credentials::system(), Ino(ino.0), name.as_bytes()));
    }

    fn getlk(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        let _turn = self.turns.begin(Work::Quick);
        match self.tree.test_lock(Ino(ino.0), &FuseTree::lock_of(owner, pid, start, end, kind)) {
            Ok(None) => reply.locked(start, end, libc::F_UNLCK, 0),
            Ok(Some(lock)) => {
                let kind = if lock.exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
                reply.locked(lock.start, lock.last.min(LOCK_END), kind, lock.pid);
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn setlk(
        &self,
        by: &Request,
        ino: INodeNo,
        _: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let _turn = self.turns.begin(Work::Quick);
        let (ino, lock) = (Ino(ino.0), FuseTree::lock_of(owner, pid, start, end, kind));
        if kind == libc::F_UNLCK {
            return answer(reply, self.tree.unlock(ino, &lock));
        }
        self.locks.note(ino, owner.0);
        match self.tree.lock(ino, &lock) {
            Ok(None) => reply.ok(),
            Ok(Some(_)) if sleep => self.locks.wait(Waiter { ino, lock, thread: by.pid(), reply }),
            Ok(Some(_)) => reply.error(Errno::EAGAIN),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn fallocate(
        &self,
        by: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let _turn = self.turns.begin(Work::Long);
        const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;
        const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
        const ZERO_KEEP: i32 = ZERO | KEEP;
        let how = match mode {
            0 => Fallocate::Allocate,
            KEEP => Fallocate::KeepSize,
            PUNCH => Fallocate::PunchHole,
            ZERO => Fallocate::ZeroRange,
            ZERO_KEEP => Fallocate::ZeroRangeKeepSize,
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        let who = Credentials { uid: by.uid(), gid: by.gid(), groups: Vec::new() };
        answer(reply, self.tree.fallocate(&who, Ino(ino.0), how, offset, length));
    }

    fn lseek(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let _turn = self.turns.begin(Work::Quick);
        let what = match whence {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        match self.tree.seek(Ino(ino.0), offset, what) {
            Ok(at) => reply.offset(at as i64),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        let _turn = self.turns.begin(Work::Quick);
        // Many programs ask whether a file is a terminal.
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: PollNotifier,
        _: PollEvents,
        _: PollFlags,
        reply: ReplyPoll,
    ) {
        let _turn = self.turns.begin(Work::Quick);
        // The kernel knows by itself that files are always ready.
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        _: &Request,
        from: INodeNo,
        _: FileHandle,
        from_offset: u64,
        to: INodeNo,
        _: FileHandle,
        to_offset: u64,
        len: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let _turn = self.turns.begin(Work::Long);
        answer_write(reply, self.copy((Ino(from.0), from_offset), (Ino(to.0), to_offset), len));
    }
}
