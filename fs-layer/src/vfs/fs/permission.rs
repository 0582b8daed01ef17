//! Who may do what.

use crate::layout::InodeBody;
use crate::vfs::{Access, Credentials, FileKind, NAME_MAX, Result, VfsError};

/// To change the entries of a directory.
pub const CHANGE: Access = Access { read: false, write: true, execute: true };
/// To look up a name in a directory.
pub const SEARCH: Access = Access { read: false, write: false, execute: true };
/// To read.
pub const READ: Access = Access { read: true, write: false, execute: false };
/// To write.
pub const WRITE: Access = Access { read: false, write: true, execute: false };

pub const SET_UID: u32 = 0o4000;
pub const SET_GID: u32 = 0o2000;
pub const STICKY: u32 = 0o1000;

/// What `who` may do with a file.
pub fn allowed(who: &Credentials, inode: &InodeBody) -> Access {
    let mode = inode.mode.get();
    if who.uid == 0 {
        let execute = inode.kind() == Some(FileKind::Directory) || mode & 0o111 != 0;
        return Access { read: true, write: true, execute };
    }
    let bits = if who.uid == inode.uid.get() {
        mode >> 6
    } else if who.in_group(inode.gid.get()) {
        mode >> 3
    } else {
        mode
    };
    Access { read: bits & 4 != 0, write: bits & 2 != 0, execute: bits & 1 != 0 }
}

/// Fails unless `who` may do all that is asked.
pub fn check(who: &Credentials, inode: &InodeBody, asked: Access) -> Result<()> {
    let may = allowed(who, inode);
    let all = (may.read || !asked.read) && (may.write || !asked.write) && (may.execute || !asked.execute);
    if all { Ok(()) } else { Err(VfsError::Access) }
}

/// Whether `who` may do what only the owner may.
pub fn is_owner(who: &Credentials, inode: &InodeBody) -> bool {
    who.uid == 0 || who.uid == inode.uid.get()
}

/// Fails where the sticky bit of a directory keeps `who` from removing or renaming an entry.
pub fn check_sticky(who: &Credentials, dir: &InodeBody, entry: &InodeBody) -> Result<()> {
    if dir.mode.get() & STICKY == 0 || is_owner(who, dir) || is_owner(who, entry) {
        Ok(())
    } else {
        Err(VfsError::NotPermitted)
    }
}

/// Fails unless a name can be made.
pub fn check_name(name: &[u8]) -> Result<()> {
    if name.len() > NAME_MAX {
        return Err(VfsError::NameTooLong);
    }
    if name.is_empty() || name.iter().any(|byte| *byte == b'/' || *byte == 0) {
        return Err(VfsError::Invalid);
    }
    Ok(())
}

/// The mode after somebody wrote to the file, or gave it away.
pub fn without_set_ids(inode: &InodeBody) -> u32 {
    let mode = inode.mode.get();
    // The set-group-ID bit without execution for the group once meant mandatory locks: it stays.
    let group = if mode & 0o010 != 0 { SET_GID } else { 0 };
    mode & !(SET_UID | group)
}
