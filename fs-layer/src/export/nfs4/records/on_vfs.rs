//! Records on the filesystem that is served.

use std::io;
use std::sync::Arc;

use super::{
    CLIENT_MAGIC, ClientRecords, RECORD_MAX, SERVER_MAGIC, Start, client_name, fresh, parse_server, seal,
    server_content, unseal,
};
use crate::vfs::{
    self, Credentials, FileKind, Ino, Make, NewAttributes, Rename, SetAttributes, Vfs, VfsError, WriteAt,
};

/// Records in a directory of the filesystem that is served, in files as [`DirectoryRecords`] has them: they go where the disk goes, so that the
/// server may start on another host.
pub struct VfsRecords {
    vfs: Arc<dyn Vfs>,
    dir: Ino,
}

impl VfsRecords {
    /// Keeps records in `name` of the root, a directory that is made if it is not there, and that only root may enter.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn open(vfs: Arc<dyn Vfs>, name: &[u8]) -> vfs::Result<VfsRecords> {
        let with = NewAttributes { mode: 0o700, ..NewAttributes::default() };
        let dir = match vfs.make(&Credentials::system(), vfs::ROOT, name, &Make::Directory, &with) {
            Err(VfsError::Exists) => vfs.lookup(&Credentials::system(), vfs::ROOT, name)?,
            made => made?.attributes,
        };
        if dir.kind != FileKind::Directory {
            return Err(VfsError::NotDirectory);
        }
        vfs.commit()?;
        Ok(VfsRecords { vfs, dir: dir.ino })
    }

    /// Order: the new file's bytes, then its name; a crash leaves the old one or the new one.
    fn write(&self, name: &[u8], magic: &[u8; 8], content: &[u8]) -> vfs::Result<()> {
        let (who, vfs) = (Credentials::system(), &self.vfs);
        let new = [name, b".new"].concat();
        let with = NewAttributes { mode: 0o600, ..NewAttributes::default() };
        let file = vfs.make(&who, self.dir, &new, &Make::File { exclusive: false }, &with)?.attributes.ino;
        let empty = SetAttributes { size: Some(0), ..SetAttributes::default() };
        vfs.setattr(&who, file, &empty, true)?;
        vfs.write(&who, file, WriteAt::Offset(0), &seal(magic, content))?;
        vfs.fsync(file, false)?;
        vfs.rename(&who, (self.dir, &new), (self.dir, name), Rename::Replace)?;
        vfs.commit()
    }

    fn read(&self, name: &[u8], magic: &[u8; 8]) -> io::Result<Option<Vec<u8>>> {
        let file = match self.vfs.lookup(&Credentials::system(), self.dir, name) {
            Err(VfsError::NotFound) => return Ok(None),
            file => file.map_err(io_error)?,
        };
        let data = self.vfs.read(file.ino, 0, RECORD_MAX as u32).map_err(io_error)?.data;
        unseal(&String::from_utf8_lossy(name), magic, &data).map(Some)
    }

    fn names(&self) -> vfs::Result<Vec<Vec<u8>>> {
        let (mut names, mut cookie) = (Vec::new(), 0);
        loop {
            let page = self.vfs.readdir(&Credentials::system(), self.dir, cookie, 256)?;
            cookie = page.entries.last().map_or(cookie, |entry| entry.cookie);
            names.extend(page.entries.into_iter().map(|entry| entry.name));
            if page.end {
                return Ok(names);
            }
        }
    }
}

fn io_error(e: VfsError) -> io::Error {
    io::Error::other(format!("records of NFS clients on the filesystem: {e}"))
}

impl ClientRecords for VfsRecords {
    fn start(&self) -> io::Result<Start> {
        let mut start = match self.read(b"server", SERVER_MAGIC)? {
            Some(content) => parse_server("server", &content)?,
            None => fresh(),
        };
        start.boot = start.boot.wrapping_add(1).max(1);
        self.write(b"server", SERVER_MAGIC, &server_content(&start)).map_err(io_error)?;
        for name in self.names().map_err(io_error)? {
            if name.ends_with(b".new") || !name.starts_with(b"client-") {
                continue;
            }
            match self.read(&name, CLIENT_MAGIC) {
                Ok(owner) => start.clients.extend(owner),
                Err(e) => tracing::warn!("a client cannot reclaim its locks: {e}"),
            }
        }
        Ok(start)
    }

    fn add(&self, owner: &[u8]) -> io::Result<()> {
        self.write(client_name(owner).as_bytes(), CLIENT_MAGIC, owner).map_err(io_error)
    }

    fn remove(&self, owner: &[u8]) -> io::Result<()> {
        match self.vfs.unlink(&Credentials::system(), self.dir, client_name(owner).as_bytes()) {
            Ok(_) => self.vfs.commit().map_err(io_error),
            Err(VfsError::NotFound) => Ok(()),
            Err(e) => Err(io_error(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_filesystem_keeps_clients() {
        let vfs: Arc<dyn Vfs> = Arc::new(crate::vfs::memory::MemoryVfs::default());
        let records = VfsRecords::open(vfs.clone(), b".nfs").unwrap();
        let first = records.start().unwrap();
        assert!(first.clients.is_empty());
        for owner in [&b"one"[..], b"two", b"two"] {
            records.add(owner).unwrap();
        }
        records.remove(b"one").unwrap();
        records.remove(b"never").unwrap();
        let second = VfsRecords::open(vfs, b".nfs").unwrap().start().unwrap();
        assert_eq!(second.boot, first.boot + 1);
        assert_eq!((second.identity, second.handle_key), (first.identity, first.handle_key));
        assert_eq!(second.clients, BTreeSet::from([b"two".to_vec()]));
    }
}
