//! The mount protocol, version 3 (RFC 1813 appendix I): hands out the handle of the root, or of a directory below it.

use super::Outcome;
use crate::export::nfs4::Shared;
use crate::export::nfs4::rpc::{AUTH_NONE, AUTH_SYS, Call};
use crate::export::nfs4::xdr::{Reader, Writer};
use crate::vfs::{self, Credentials, FileKind, VfsError};

/// Its program.
pub const PROGRAM: u32 = 100_005;
/// Longest path.
const PATH_MAX: usize = 1024;

/// Runs a procedure. `allowed`: the caller's host may mount.
pub fn run(shared: &Shared, allowed: bool, call: &Call<'_>) -> Outcome {
    let mut w = Writer::default();
    match call.procedure {
        // NULL, UMNT and UMNTALL: nobody counts who has mounted.
        0 | 3 | 4 => {}
        1 => {
            let Ok(path) = Reader::new(call.arguments).opaque(PATH_MAX) else { return Outcome::Garbage };
            match if allowed { find(shared, path) } else { Err(VfsError::Access) } {
                Ok(ino) => {
                    w.u32(0);
                    shared.handles.write(&mut w, ino);
                    w.u32(2);
                    w.u32(AUTH_SYS);
                    w.u32(AUTH_NONE);
                }
                Err(e) => w.u32(status(&e)),
            }
        }
        // DUMP: an empty list.
        2 => w.bool(false),
        // EXPORT: the root, to everybody or to those that the options say.
        5 => {
            w.bool(true);
            w.opaque(b"/");
            w.bool(false);
            w.bool(false);
        }
        _ => return Outcome::NoProcedure,
    }
    Outcome::Results(w)
}

fn find(shared: &Shared, path: &[u8]) -> vfs::Result<vfs::Ino> {
    let mut dir = vfs::ROOT;
    for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".") {
        if name == b".." {
            return Err(VfsError::Invalid);
        }
        let file = shared.vfs.lookup(&Credentials::system(), dir, name)?;
        if file.kind != FileKind::Directory {
            return Err(VfsError::NotDirectory);
        }
        dir = file.ino;
    }
    Ok(dir)
}

/// mountstat3.
fn status(error: &VfsError) -> u32 {
    match error {
        VfsError::NotPermitted => 1,
        VfsError::NotFound => 2,
        VfsError::Io(_) => 5,
        VfsError::Access => 13,
        VfsError::NotDirectory => 20,
        VfsError::Invalid => 22,
        VfsError::NameTooLong => 63,
        _ => 10_006,
    }
}
