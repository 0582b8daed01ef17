//! Extended attributes: who may see and change which.

use super::permission::{READ, STICKY, WRITE, check, is_owner};
use super::{Filesystem, now};
use crate::inode::{Inode, Xattr, load_xattrs, save_xattrs};
use crate::journal::Tx;
use crate::vfs::{Credentials, FileKind, Ino, Result, SetXattr, VfsError, XATTR_MAX};

const NAME_BYTES_MAX: usize = 255;
/// What a program may do beyond its user's rights: worth nothing once somebody else could have changed the program.
const CAPABILITIES: &[u8] = b"security.capability";

/// Fails unless `who` may read, or change, the attribute.
fn may(who: &Credentials, inode: &Inode, name: &[u8], change: bool) -> Result<()> {
    if name.len() > NAME_BYTES_MAX {
        return Err(VfsError::AttributeTooLarge);
    }
    if name.starts_with(b"user.") && name.len() > 5 {
        return match inode.kind() {
            Some(FileKind::File | FileKind::Directory) => {
                let sticky = inode.kind() == Some(FileKind::Directory) && inode.mode.get() & STICKY != 0;
                if change && sticky && !is_owner(who, inode) {
                    return Err(VfsError::NotPermitted);
                }
                check(who, inode, if change { WRITE } else { READ })
            }
            _ if change => Err(VfsError::NotPermitted),
            _ => Err(VfsError::NoData),
        };
    }
    if name.starts_with(b"trusted.") && name.len() > 8 {
        return match who.uid {
            0 => Ok(()),
            _ if change => Err(VfsError::NotPermitted),
            _ => Err(VfsError::NoData),
        };
    }
    if name.starts_with(b"security.") && name.len() > 9 {
        return if change && who.uid != 0 { Err(VfsError::NotPermitted) } else { Ok(()) };
    }
    // Access control lists would have to be obeyed, not only stored.
    Err(VfsError::NotSupported)
}

impl Filesystem {
    pub(super) fn do_getxattr(&self, who: &Credentials, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        let _guard = self.shared(ino)?;
        let inode = self.load(ino)?;
        may(who, &inode, name, false)?;
        let all = load_xattrs(&self.journal, &inode)?;
        all.into_iter().find(|xattr| xattr.name == name).map(|xattr| xattr.value).ok_or(VfsError::NoData)
    }

    pub(super) fn do_listxattr(&self, who: &Credentials, ino: Ino) -> Result<Vec<Vec<u8>>> {
        let _guard = self.shared(ino)?;
        let inode = self.load(ino)?;
        let all = load_xattrs(&self.journal, &inode)?;
        let seen = all.into_iter().map(|xattr| xattr.name);
        Ok(seen.filter(|name| who.uid == 0 || !name.starts_with(b"trusted.")).collect())
    }

    pub(super) fn do_setxattr(
        &self,
        who: &Credentials,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        how: SetXattr,
    ) -> Result<()> {
        if value.len() > XATTR_MAX {
            return Err(VfsError::AttributeTooLarge);
        }
        self.change_xattrs(who, ino, name, |all| {
            match (all.iter_mut().find(|xattr| xattr.name == name), how) {
                (Some(_), SetXattr::Create) => return Err(VfsError::Exists),
                (None, SetXattr::Replace) => return Err(VfsError::NoData),
                (Some(xattr), _) => xattr.value = value.to_vec(),
                (None, _) => all.push(Xattr { name: name.to_vec(), value: value.to_vec() }),
            }
            Ok(())
        })
    }

    pub(super) fn do_removexattr(&self, who: &Credentials, ino: Ino, name: &[u8]) -> Result<()> {
        self.change_xattrs(who, ino, name, |all| {
            let index = all.iter().position(|xattr| xattr.name == name).ok_or(VfsError::NoData)?;
            all.remove(index);
            Ok(())
        })
    }

    /// Takes the capabilities from a file that is written, cut, or given to another owner. The lock is held; the caller saves the inode.
    pub(super) fn drop_capabilities(&self, tx: &mut Tx<'_>, inode: &mut Inode) -> Result<()> {
        if inode.xattr_len.get() == 0 && inode.xattr_block.get() == 0 {
            return Ok(());
        }
        let mut all = load_xattrs(&self.journal, inode)?;
        let before = all.len();
        all.retain(|xattr| xattr.name != CAPABILITIES);
        if all.len() < before { save_xattrs(tx, inode, &all) } else { Ok(()) }
    }

    fn change_xattrs(
        &self,
        who: &Credentials,
        ino: Ino,
        name: &[u8],
        change: impl FnOnce(&mut Vec<Xattr>) -> Result<()>,
    ) -> Result<()> {
        self.begin()?;
        let _guard = self.exclusive(ino)?;
        let mut inode = self.load(ino)?;
        may(who, &inode, name, true)?;
        let mut all = load_xattrs(&self.journal, &inode)?;
        change(&mut all)?;
        self.check_space(1, 0)?;
        let mut tx = self.tx();
        save_xattrs(&mut tx, &mut inode, &all)?;
        inode.edit().touch(now());
        inode.save(&mut tx)?;
        tx.publish()?;
        Ok(())
    }
}
