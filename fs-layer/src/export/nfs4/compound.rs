//! Compounds: a list of operations that run one after the other until one fails (RFC 8881 section 16.2).
//!
//! Order of durability: all changes of names and attributes that a compound made are durable, by one
//! [`Vfs::commit`](crate::vfs::Vfs::commit) that is shared with other compounds, before its reply leaves; then the reply is kept in the session's slot, then
//! sent. So a client that saw success keeps it over a crash, and one that saw nothing asks again and learns of it.
//!
//! After a crash too: what makes, removes or moves a name is noted with the change ([`Vfs::noting`](crate::vfs::Vfs::noting)), by a hash of the
//! whole compound, which names its session, slot and number. When a client sends a compound again whose session ended with the server that ran
//! it, what was noted is answered with success and not run again ([`Compound::again`]); then the client learns that the session is gone.

use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::attributes;
use super::bitmap::Bitmap;
use super::connection::Connection;
use super::handle::HANDLE_BYTES_MAX;
use super::ops::{self, op};
use super::rpc::{self, Answer, Call, Caller};
use super::server::Shared;
use super::state::session::{Begun, Channel, Fingerprint, SMALL_REPLY_BYTES, Session};
use super::state::stateid::{self, Stateid};
use super::status::{Nfs4Error, Status};
use super::xdr::{Reader, Writer};
use crate::vfs::{self, Access, Attributes, Credentials, DirChange, FileKind, Ino, NAME_MAX};

/// Most operations of a compound, in any session.
pub const OPERATIONS_MAX: u32 = 128;
/// Most bytes of a tag.
const TAG_MAX: usize = 1024;
/// Bytes before the results of a compound in a reply.
pub const REPLY_HEADER: usize = 24;
/// Room that an operation must find in the reply before it may change anything.
const RESERVE: usize = 256;
/// The same for LOCK and LOCKT, which may name another's owner.
const RESERVE_LOCK: usize = 1152;
/// Room that is left behind every result, so that the next operation can at least say that it found none.
const ERROR_ROOM: usize = 16;
/// Longest compound that is looked for among those that were run before: names are short.
const NOTED_BYTES_MAX: usize = 64 << 10;
/// Bytes of the operation SEQUENCE: its number, session (16 bytes), sequence, slot, highest slot, whether to keep the reply.
const SEQUENCE_BYTES: usize = 36;
/// Limits for what comes outside of a session.
const NO_SESSION: Channel = Channel {
    header_pad: 0,
    request_max: 64 << 10,
    response_max: 64 << 10,
    cached_max: 0,
    operations_max: OPERATIONS_MAX,
    requests_max: 1,
};

/// A slot that a compound runs in.
pub struct InSession {
    /// Of which session.
    pub session: Arc<Session>,
    /// Which slot.
    pub slot: u32,
    /// Whether the client wants the reply to be kept.
    pub keep: bool,
    /// Whether the slot was given back with a reply.
    done: bool,
}

impl InSession {
    /// A slot that was taken.
    pub fn new(session: Arc<Session>, slot: u32, keep: bool) -> InSession {
        InSession { session, slot, keep, done: false }
    }

    fn finish(mut self, reply: &mut Writer) {
        self.done = true;
        let kept = (self.keep || reply.len() - REPLY_HEADER <= SMALL_REPLY_BYTES).then(|| {
            reply.join();
            reply.as_bytes()[REPLY_HEADER..].to_vec()
        });
        self.session.finish(self.slot, kept);
    }
}

impl Drop for InSession {
    fn drop(&mut self) {
        if !self.done {
            self.session.abandon(self.slot);
        }
    }
}

/// A compound that runs.
pub struct Compound<'a> {
    /// The server.
    pub shared: &'a Arc<Shared>,
    /// Where it came from.
    pub connection: &'a Arc<Connection>,
    /// By whom.
    pub caller: Caller,
    /// The same, as the filesystem sees it.
    pub who: Credentials,
    /// 1 or 2.
    pub minor: u32,
    /// Operations in it.
    pub operations: u32,
    /// Which of them runs, from 0.
    pub index: u32,
    /// Where it runs; `None` before SEQUENCE.
    pub place: Option<InSession>,
    /// The current file.
    pub current: Option<Ino>,
    /// The saved file.
    pub saved: Option<Ino>,
    /// The state that goes with the current file.
    pub current_stateid: Option<Stateid>,
    /// The state that goes with the saved file.
    pub saved_stateid: Option<Stateid>,
    /// Set by an operation that changed names or attributes.
    pub changed: bool,
    /// Set by an operation that fails with more than a status.
    pub error_body: bool,
    /// What SEQUENCE found was answered before.
    pub replay: Option<Begun>,
    /// The server before this one ran it, at least in part, and was gone before its answer left. Nothing runs that changes anything.
    pub again: bool,
    /// Its operations as they came.
    bytes: &'a [u8],
}

/// Runs a compound, and returns the reply; `None` if it is no compound.
pub fn run(shared: &Arc<Shared>, connection: &Arc<Connection>, call: &Call<'_>) -> Option<Writer> {
    let mut r = Reader::new(call.arguments);
    let tag = r.opaque(TAG_MAX).ok()?;
    let minor = r.u32().ok()?;
    let operations = r.u32().ok()?;
    let mut w = rpc::reply(call.xid, Answer::Success);
    debug_assert_eq!(w.len(), REPLY_HEADER);
    w.u32(0);
    w.opaque(tag);
    let count_at = w.len();
    w.u32(0);
    let refused = if minor == 0 || minor > 2 {
        Some(Nfs4Error::MinorVersMismatch)
    } else if operations > OPERATIONS_MAX {
        Some(Nfs4Error::TooManyOps)
    } else {
        None
    };
    if let Some(e) = refused {
        w.patch(REPLY_HEADER, e.code());
        return Some(w);
    }
    let mut compound = Compound {
        shared,
        connection,
        who: shared.options.export.credentials(&call.caller),
        caller: call.caller.clone(),
        minor,
        operations,
        index: 0,
        place: None,
        current: None,
        saved: None,
        current_stateid: None,
        saved_stateid: None,
        changed: false,
        error_body: false,
        replay: None,
        again: false,
        bytes: r.rest(),
    };
    let (status, results, first_change) = compound.run_all(&mut r, &mut w, REPLY_HEADER + call.arguments.len());
    match compound.replay.take() {
        Some(Begun::Replay(results)) => {
            w.truncate(REPLY_HEADER);
            w.raw(&results);
            return Some(w);
        }
        Some(_) => {
            // The reply was not kept: SEQUENCE succeeds, and what follows says so (section 18.46.3).
            w.patch(REPLY_HEADER, Nfs4Error::RetryUncachedRep.code());
            w.u32(r.u32().unwrap_or(op::ILLEGAL));
            w.u32(Nfs4Error::RetryUncachedRep.code());
            w.patch(count_at, 2);
            return Some(w);
        }
        None => {}
    }
    w.patch(REPLY_HEADER, status);
    w.patch(count_at, results);
    if let Some(change) = first_change
        && let Err(e) = shared.vfs.commit()
    {
        tracing::error!("changes made over NFS are not durable: {e}");
        w.truncate(change.at);
        w.u32(change.operation);
        w.u32(Nfs4Error::Io.code());
        if change.operation == op::SETATTR {
            Bitmap::default().write(&mut w);
        }
        w.patch(REPLY_HEADER, Nfs4Error::Io.code());
        w.patch(count_at, change.index + 1);
    }
    if let Some(place) = compound.place.take() {
        place.finish(&mut w);
    }
    Some(w)
}

/// The first operation that changed something.
struct Change {
    at: usize,
    operation: u32,
    index: u32,
}

impl Compound<'_> {
    /// Runs the operations; the status of the last one, how many ran, and which changed something first.
    fn run_all(&mut self, r: &mut Reader<'_>, w: &mut Writer, request_bytes: usize) -> (u32, u32, Option<Change>) {
        let mut first_change = None;
        for index in 0..self.operations {
            self.index = index;
            let at = w.len();
            let Ok(operation) = r.u32() else {
                w.u32(op::ILLEGAL);
                w.u32(Nfs4Error::BadXdr.code());
                return (Nfs4Error::BadXdr.code(), index + 1, first_change);
            };
            let known = op::is_known(operation, self.minor);
            w.u32(if known { operation } else { op::ILLEGAL });
            w.u32(0);
            let body_at = w.len();
            self.changed = false;
            self.error_body = false;
            let done = if known {
                self.check_place(operation, w.len(), request_bytes).and_then(|()| ops::run(self, operation, r, w))
            } else {
                Err(Nfs4Error::OpIllegal)
            };
            let done = done.and_then(|()| if self.changed { Ok(()) } else { self.check_room(w.len(), 0) });
            if self.changed && first_change.is_none() {
                first_change = Some(Change { at, operation, index });
            }
            if self.replay.is_some() {
                return (0, index + 1, first_change);
            }
            if let Err(e) = done {
                if !self.error_body {
                    w.truncate(body_at);
                }
                // What a failed SETATTR has set: nothing (section 18.30.2).
                if operation == op::SETATTR {
                    Bitmap::default().write(w);
                }
                w.patch(at + 4, e.code());
                return (e.code(), index + 1, first_change);
            }
        }
        (0, self.operations, first_change)
    }

    /// Which operations may stand where (sections 2.10.6.2 and 16.2.3), and whether their results find room.
    fn check_place(&self, operation: u32, len: usize, request_bytes: usize) -> Status<()> {
        if self.index == 0 && operation != op::SEQUENCE {
            if !op::is_sessionless(operation) {
                return Err(Nfs4Error::OpNotInSession);
            }
            return if self.operations == 1 { Ok(()) } else { Err(Nfs4Error::NotOnlyOp) };
        }
        if self.index > 0 && operation == op::SEQUENCE {
            return Err(Nfs4Error::SequencePos);
        }
        if self.index == 1 {
            let fore = self.channel();
            if self.operations > fore.operations_max {
                return Err(Nfs4Error::TooManyOps);
            }
            if request_bytes > fore.request_max as usize {
                return Err(Nfs4Error::ReqTooBig);
            }
        }
        let reserve = match operation {
            op::LOCK | op::LOCKT => RESERVE_LOCK,
            _ if op::may_change(operation) => RESERVE,
            _ => 0,
        };
        self.check_room(len, reserve)
    }

    fn check_room(&self, len: usize, more: usize) -> Status<()> {
        let all = len + more + ERROR_ROOM;
        if all > self.channel().response_max as usize {
            return Err(Nfs4Error::RepTooBig);
        }
        match &self.place {
            Some(place) if place.keep && all > place.session.fore.cached_max as usize => {
                Err(Nfs4Error::RepTooBigToCache)
            }
            _ => Ok(()),
        }
    }

    /// Bytes that still find room in the reply.
    pub fn room(&self, w: &Writer) -> usize {
        let max = match &self.place {
            Some(place) if place.keep => place.session.fore.cached_max.min(place.session.fore.response_max),
            _ => self.channel().response_max,
        };
        (max as usize).saturating_sub(w.len() + ERROR_ROOM)
    }

    fn channel(&self) -> Channel {
        self.place.as_ref().map_or(NO_SESSION, |place| place.session.fore)
    }

    /// What tells a retry from another request.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint { caller: self.caller.clone(), operations: self.operations }
    }

    /// The name of an operation of this compound among all of all clients; never 0. The first operation is SEQUENCE: of that, session, sequence and
    /// slot count. The rest is what the client thinks of its slots, which is not the same when it sends the compound again.
    fn request(&self, index: u32) -> u64 {
        let seed = match &self.caller {
            Caller::Unix { uid, .. } => u64::from(*uid),
            _ => u64::MAX,
        };
        let (place, rest) = match self.bytes {
            bytes if bytes.len() >= SEQUENCE_BYTES => (&bytes[4..28], &bytes[SEQUENCE_BYTES..]),
            bytes => (bytes, &[][..]),
        };
        let all = xxh3_64_with_seed(rest, xxh3_64_with_seed(place, seed));
        (all ^ u64::from(index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)).max(1)
    }

    /// Runs a change of names by this operation, noted as done.
    pub fn noting<T>(&self, change: impl FnOnce() -> T) -> T {
        vfs::noting(&*self.shared.vfs, self.request(self.index), change)
    }

    /// Whether the server before this one ran one of the operations.
    pub fn was_run_before(&self) -> bool {
        !self.shared.noted.is_empty()
            && self.bytes.len() <= NOTED_BYTES_MAX
            && (0..self.operations).any(|index| self.shared.noted.contains(&self.request(index)))
    }

    /// Whether this operation is only to be answered, as it was run by the server before this one.
    ///
    /// # Errors
    /// `Delay` if it was not, in a compound that was: the client is to send the rest once more.
    pub fn is_done(&self) -> Status<bool> {
        match self.again {
            false => Ok(false),
            true if self.shared.noted.contains(&self.request(self.index)) => Ok(true),
            true => Err(Nfs4Error::Delay),
        }
    }

    /// The client whose session this is.
    pub fn client(&self) -> Status<u64> {
        Ok(self.place.as_ref().ok_or(Nfs4Error::OpNotInSession)?.session.client)
    }

    /// The current file.
    pub fn current(&self) -> Status<Ino> {
        self.current.ok_or(Nfs4Error::NoFileHandle)
    }

    /// The saved file.
    pub fn saved(&self) -> Status<Ino> {
        self.saved.ok_or(Nfs4Error::NoFileHandle)
    }

    /// Another file becomes the current one.
    pub fn set_current(&mut self, ino: Option<Ino>) {
        self.current = ino;
        self.current_stateid = None;
    }

    /// Refuses to change anything through a read-only export.
    pub fn writable(&self) -> Status<()> {
        if self.shared.options.export.read_only { Err(Nfs4Error::Rofs) } else { Ok(()) }
    }

    /// Reads a file handle.
    pub fn read_handle(&self, r: &mut Reader<'_>) -> Status<Ino> {
        self.shared.handles.open(r.opaque(HANDLE_BYTES_MAX)?)
    }

    /// Reads a state identifier, and puts the real one in place of "the current one".
    pub fn read_stateid(&self, r: &mut Reader<'_>) -> Status<Stateid> {
        self.resolve(Stateid::read(r)?, self.current_stateid)
    }

    /// The same, for one that goes with the saved file.
    pub fn read_saved_stateid(&self, r: &mut Reader<'_>) -> Status<Stateid> {
        self.resolve(Stateid::read(r)?, self.saved_stateid)
    }

    fn resolve(&self, read: Stateid, current: Option<Stateid>) -> Status<Stateid> {
        match read {
            stateid::CURRENT => current.ok_or(Nfs4Error::BadStateId),
            stateid::ANONYMOUS | stateid::BYPASS => Ok(read),
            other if other.is_special() => Err(Nfs4Error::BadStateId),
            other => Ok(other),
        }
    }

    /// A directory's error, where the file is no directory: symbolic links are named (section 18.13.3).
    pub fn dir_error(&self, dir: Ino, error: Nfs4Error) -> Nfs4Error {
        let is_link = || self.shared.vfs.getattr(dir).is_ok_and(|file| file.kind == FileKind::Symlink);
        if error == Nfs4Error::NotDir && is_link() { Nfs4Error::Symlink } else { error }
    }

    /// Refuses what is not a regular file.
    pub fn check_regular(file: &Attributes) -> Status<()> {
        match file.kind {
            FileKind::File => Ok(()),
            FileKind::Directory => Err(Nfs4Error::IsDir),
            FileKind::Symlink => Err(Nfs4Error::Symlink),
            _ => Err(Nfs4Error::WrongType),
        }
    }

    /// Whether the caller has all these permissions. Who may run a file may read it: its pages must come from somewhere.
    pub fn check_access(&self, ino: Ino, wanted: Access) -> Status<()> {
        let asked = Access { execute: wanted.execute || wanted.read, ..wanted };
        let has = self.shared.vfs.access(&self.who, ino, asked)?;
        let read = !wanted.read || has.read || has.execute;
        if read && (!wanted.write || has.write) && (!wanted.execute || has.execute) {
            Ok(())
        } else {
            Err(Nfs4Error::Access)
        }
    }

    /// Writes attributes of a file.
    pub fn write_attributes(&self, w: &mut Writer, asked: Bitmap, file: &Attributes) -> Status<()> {
        let context = self.attribute_context(asked)?;
        attributes::write(w, asked, file, &context);
        Ok(())
    }

    /// What attributes are written with.
    pub fn attribute_context(&self, asked: Bitmap) -> Status<attributes::Context<'_>> {
        let statfs = if attributes::needs_statfs(asked) { Some(self.shared.vfs.statfs()?) } else { None };
        Ok(attributes::Context {
            minor: self.minor,
            handles: &self.shared.handles,
            lease_s: u32::try_from(self.shared.options.lease.as_secs()).unwrap_or(u32::MAX).max(1),
            transfer_max: self.shared.options.transfer_max,
            clone_block: 4096,
            statfs,
        })
    }
}

/// Reads a name within a directory.
///
/// # Errors
/// `Inval`, `NameTooLong`, `BadChar`, `BadName` (section 14.5).
pub fn read_name<'a>(r: &mut Reader<'a>) -> Status<&'a [u8]> {
    let name = r.opaque(64 << 10)?;
    match name {
        b"" => Err(Nfs4Error::Inval),
        b"." | b".." => Err(Nfs4Error::BadName),
        _ if name.len() > NAME_MAX => Err(Nfs4Error::NameTooLong),
        _ if name.contains(&b'/') || name.contains(&0) => Err(Nfs4Error::BadChar),
        _ => Ok(name),
    }
}

/// Writes a change_info4: the counters were taken in one step with the change.
pub fn write_change(w: &mut Writer, change: DirChange) {
    w.bool(true);
    w.u64(change.before);
    w.u64(change.after);
}
