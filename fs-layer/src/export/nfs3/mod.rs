//! NFS version 3 and its mount protocol (RFC 1813), for macOS, Windows and whoever has no version 4.
//!
//! It is served on the port of version 4, with the same handles, credentials and records: [`attributes`] is how files are
//! described, [`files`] and [`names`] are the procedures, [`mount`] hands out the root, [`replies`] keeps what was answered to requests that must
//! not run twice. There are no locks: clients mount with `nolock`, as the lock manager's protocols (NLM, NSM) are not here.
//!
//! What must hold is what must hold for version 4: what was answered with success is durable, but for data that was answered UNSTABLE; foreign
//! bytes do no harm; a request that comes twice runs once, as long as its reply is kept, and if it makes, removes or moves a name also when the server was
//! killed in between.

mod attributes;
mod files;
pub mod mount;
mod names;
pub mod replies;

use std::net::IpAddr;

use super::nfs4::Shared;
use super::nfs4::rpc::Call;
use super::nfs4::status::{Nfs4Error, Status};
use super::nfs4::xdr::{Reader, Writer};
use crate::vfs::{self, Access, Attributes, Credentials, FileKind, Ino};
use replies::Found;

/// Most bytes of a file handle.
const HANDLE_BYTES_MAX: usize = 64;

/// Numbers of procedures.
mod procedure {
    pub const NULL: u32 = 0;
    pub const GETATTR: u32 = 1;
    pub const SETATTR: u32 = 2;
    pub const LOOKUP: u32 = 3;
    pub const ACCESS: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const READ: u32 = 6;
    pub const WRITE: u32 = 7;
    pub const CREATE: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const SYMLINK: u32 = 10;
    pub const MKNOD: u32 = 11;
    pub const REMOVE: u32 = 12;
    pub const RMDIR: u32 = 13;
    pub const RENAME: u32 = 14;
    pub const LINK: u32 = 15;
    pub const READDIR: u32 = 16;
    pub const READDIRPLUS: u32 = 17;
    pub const FSSTAT: u32 = 18;
    pub const FSINFO: u32 = 19;
    pub const PATHCONF: u32 = 20;
    pub const COMMIT: u32 = 21;
}

/// What became of a call.
pub enum Outcome {
    /// These are its results.
    Results(Writer),
    /// There is no such procedure.
    NoProcedure,
    /// Its arguments cannot be decoded.
    Garbage,
    /// It runs already; nothing is answered, the client asks again.
    Silence,
}

/// A call that runs.
struct Request<'a> {
    shared: &'a Shared,
    who: Credentials,
    /// Its name among all requests of all clients, if it must not run twice.
    name: u64,
    /// The server before this one ran it, and was gone before its answer left: it is only answered.
    again: bool,
}

/// How a procedure failed.
enum Fail {
    /// Its arguments cannot be decoded.
    Garbage,
    /// With this status, and a body of this form.
    Status(Nfs4Error, Body),
}

/// What follows a status that is an error, per procedure.
enum Body {
    Nothing,
    /// post_op_attr of a file, if it is there.
    File(Option<Ino>),
    /// wcc_data of a file or directory.
    Changed(Option<Ino>),
    /// wcc_data of two directories.
    Renamed(Option<Ino>, Option<Ino>),
    /// post_op_attr of a file, then wcc_data of a directory.
    Linked(Option<Ino>, Option<Ino>),
}

/// A decoding error is the whole call's.
fn garbage(_: Nfs4Error) -> Fail {
    Fail::Garbage
}

type Done = Result<(), Fail>;

/// Runs a procedure of NFSv3.
pub fn run(shared: &Shared, peer: IpAddr, call: &Call<'_>) -> Outcome {
    if call.procedure > procedure::COMMIT {
        return Outcome::NoProcedure;
    }
    if call.procedure == procedure::NULL {
        return Outcome::Results(Writer::default());
    }
    // What can be run again with the same end is not kept.
    let once = matches!(call.procedure, procedure::SETATTR | procedure::CREATE..=procedure::LINK);
    if !once {
        return run_now(shared, call, 0);
    }
    let key = replies::Key::new(peer, call);
    match shared.replies.begin(key) {
        Found::New => {}
        Found::Running => return Outcome::Silence,
        Found::Done(results) => {
            let mut w = Writer::default();
            w.raw(&results);
            return Outcome::Results(w);
        }
    }
    let running = shared.replies.running(key);
    let outcome = run_now(shared, call, key.hash());
    if let Outcome::Results(results) = &outcome {
        running.done(results.parts().concat());
    }
    outcome
}

fn run_now(shared: &Shared, call: &Call<'_>, name: u64) -> Outcome {
    let who = shared.options.export.credentials(&call.caller);
    let again = shared.noted.contains(&name);
    if again {
        tracing::info!("an NFS request is answered that ran before the server was killed");
    }
    let request = Request { shared, who, name, again };
    let mut r = Reader::new(call.arguments);
    let mut w = Writer::default();
    w.u32(0);
    let (r, q) = (&mut r, &request);
    let done = match call.procedure {
        procedure::GETATTR => files::getattr(q, r, &mut w),
        procedure::SETATTR => files::setattr(q, r, &mut w),
        procedure::LOOKUP => names::lookup(q, r, &mut w),
        procedure::ACCESS => files::access(q, r, &mut w),
        procedure::READLINK => files::readlink(q, r, &mut w),
        procedure::READ => files::read(q, r, &mut w),
        procedure::WRITE => files::write(q, r, &mut w),
        procedure::CREATE => names::create(q, r, &mut w),
        procedure::MKDIR => names::mkdir(q, r, &mut w),
        procedure::SYMLINK => names::symlink(q, r, &mut w),
        procedure::MKNOD => names::mknod(q, r, &mut w),
        procedure::REMOVE => names::remove(q, r, &mut w, false),
        procedure::RMDIR => names::remove(q, r, &mut w, true),
        procedure::RENAME => names::rename(q, r, &mut w),
        procedure::LINK => names::link(q, r, &mut w),
        procedure::READDIR => names::readdir(q, r, &mut w, false),
        procedure::READDIRPLUS => names::readdir(q, r, &mut w, true),
        procedure::FSSTAT => files::fsstat(q, r, &mut w),
        procedure::FSINFO => files::fsinfo(q, r, &mut w),
        procedure::PATHCONF => files::pathconf(q, r, &mut w),
        _ => files::commit(q, r, &mut w),
    };
    match done {
        Ok(()) => Outcome::Results(w),
        Err(Fail::Garbage) => Outcome::Garbage,
        Err(Fail::Status(e, body)) => {
            w.truncate(0);
            w.u32(code(e));
            match body {
                Body::Nothing => {}
                Body::File(ino) => request.write_file(&mut w, ino),
                Body::Changed(ino) => request.write_changed(&mut w, ino),
                Body::Renamed(from, to) => {
                    request.write_changed(&mut w, from);
                    request.write_changed(&mut w, to);
                }
                Body::Linked(file, dir) => {
                    request.write_file(&mut w, file);
                    request.write_changed(&mut w, dir);
                }
            }
            Outcome::Results(w)
        }
    }
}

/// The nfsstat3 of an error: those of version 4 that it does not have become its nearest.
fn code(error: Nfs4Error) -> u32 {
    match error {
        Nfs4Error::Symlink | Nfs4Error::WrongType | Nfs4Error::BadName | Nfs4Error::BadChar => Nfs4Error::Inval.code(),
        Nfs4Error::FileOpen => Nfs4Error::Access.code(),
        Nfs4Error::BadXdr => Nfs4Error::Inval.code(),
        Nfs4Error::BadCookie | Nfs4Error::BadHandle | Nfs4Error::BadType | Nfs4Error::NotSupp | Nfs4Error::TooSmall => {
            error.code()
        }
        other if other.code() < 100 => other.code(),
        _ => Nfs4Error::ServerFault.code(),
    }
}

impl Request<'_> {
    /// Reads a file handle: `Garbage` if there is none, else the file or why it is none.
    fn handle(&self, r: &mut Reader<'_>) -> Result<Status<Ino>, Fail> {
        let bytes = r.opaque(HANDLE_BYTES_MAX).map_err(garbage)?;
        Ok(self.shared.handles.open(bytes))
    }

    fn write_file(&self, w: &mut Writer, ino: Option<Ino>) {
        let file = ino.and_then(|ino| self.shared.vfs.getattr(ino).ok());
        attributes::write_optional(w, file.as_ref(), self.shared.handles.fs());
    }

    /// Without the attributes before: they could not be had in one step with the change.
    fn write_changed(&self, w: &mut Writer, ino: Option<Ino>) {
        w.bool(false);
        self.write_file(w, ino);
    }

    /// Runs a change of names, noted as done: after a crash the next server knows it by that.
    fn noting<T>(&self, change: impl FnOnce() -> T) -> T {
        vfs::noting(&*self.shared.vfs, self.name, change)
    }

    fn writable(&self) -> Status<()> {
        if self.shared.options.export.read_only { Err(Nfs4Error::Rofs) } else { Ok(()) }
    }

    /// Everything changed before is durable on return.
    fn commit(&self) -> Status<()> {
        self.shared.vfs.commit().map_err(|e| {
            tracing::error!("changes made over NFS are not durable: {e}");
            Nfs4Error::from(e)
        })
    }

    /// A regular file that the caller may read or write. There is no open in this protocol, so its owner always may:
    /// it could have opened the file before the mode was changed.
    fn contents(&self, ino: Ino, wanted: Access) -> Status<Attributes> {
        let file = self.shared.vfs.getattr(ino)?;
        match file.kind {
            FileKind::File => {}
            FileKind::Directory => return Err(Nfs4Error::IsDir),
            _ => return Err(Nfs4Error::Inval),
        }
        if file.uid == self.who.uid {
            return Ok(file);
        }
        let asked = Access { execute: wanted.read, ..wanted };
        let has = self.shared.vfs.access(&self.who, ino, asked)?;
        let allowed = (!wanted.read || has.read || has.execute) && (!wanted.write || has.write);
        if allowed { Ok(file) } else { Err(Nfs4Error::Access) }
    }
}
