//! OPEN, OPEN_DOWNGRADE and CLOSE.

use super::names::{made_before, new_attributes, unchanged};
use crate::export::nfs4::attributes::{Settings, number};
use crate::export::nfs4::bitmap::Bitmap;
use crate::export::nfs4::compound::{Compound, read_name, write_change};
use crate::export::nfs4::state::open::{BOTH, READ, WRITE};
use crate::export::nfs4::state::stateid::{ANONYMOUS, INVALID, Other, Stateid};
use crate::export::nfs4::status::{Nfs4Error, Status};
use crate::export::nfs4::xdr::{Reader, Writer};
use crate::vfs::{Access, Attributes, DirChange, FileKind, Ino, Make, Part, SetAttributes, VfsError};

const OWNER_MAX: usize = 1024;
const RESULT_LOCKTYPE_POSIX: u32 = 0x4;
const RESULT_PRESERVE_UNLINKED: u32 = 0x8;
const RESULT_MAY_NOTIFY_LOCK: u32 = 0x20;
/// Permission bits of a new file of which the client says nothing.
const DEFAULT_MODE: u32 = 0o600;

/// createhow4.
enum How {
    Unchecked(Settings),
    Guarded(Settings),
    /// The verifier tells a repeated request from another's file.
    Exclusive([u8; 8], Settings),
}

/// What an OPEN found or made.
struct Opened {
    file: Attributes,
    made: bool,
    dir: DirChange,
    set: Bitmap,
    /// An existing file is to be emptied.
    truncate: bool,
}

impl Opened {
    fn existing(file: Attributes, dir: DirChange) -> Opened {
        Opened { file, made: false, dir, set: Bitmap::default(), truncate: false }
    }
}

pub fn open(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let _seqid = r.u32()?;
    let access = r.u32()?;
    let deny = r.u32()?;
    // The client is the session's, whatever stands here (RFC 8881 section 18.16.3).
    let _client = r.u64()?;
    let owner = r.opaque(OWNER_MAX)?;
    let how = match r.u32()? {
        0 => None,
        1 => Some(read_how(r, c.minor)?),
        _ => return Err(Nfs4Error::BadXdr),
    };
    // Above are wishes for delegations, which nobody gets.
    let access = access & 0xff;
    if !(READ..=BOTH).contains(&access) || deny > BOTH {
        return Err(Nfs4Error::Inval);
    }
    if c.again {
        return opened_before(c, how, r, w);
    }
    let client = c.client()?;
    let claim = r.u32()?;
    c.shared.table().check_grace(client, claim == 1)?;
    if access & WRITE != 0 || how.is_some() {
        c.writable()?;
    }
    let opened = match claim {
        0 => {
            let name = read_name(r)?;
            let dir = c.current()?;
            match how {
                Some(how) => make(c, dir, name, how)?,
                None => {
                    let file = c.shared.vfs.lookup(&c.who, dir, name).map_err(|e| c.dir_error(dir, e.into()))?;
                    Opened::existing(file, unchanged(c, dir)?)
                }
            }
        }
        // By handle: of what was open before a restart (with a type of delegation), or is known already.
        1 | 4 => {
            if claim == 1 {
                r.u32()?;
            }
            if how.is_some() {
                return Err(Nfs4Error::Inval);
            }
            Opened::existing(c.shared.vfs.getattr(c.current()?)?, DirChange { before: 0, after: 0 })
        }
        // Under delegations, of which there are none.
        2 | 3 | 5 | 6 => return Err(Nfs4Error::BadStateId),
        _ => return Err(Nfs4Error::BadXdr),
    };
    c.changed |= opened.made;
    Compound::check_regular(&opened.file)?;
    let ino = opened.file.ino;
    if access & WRITE != 0 && c.shared.vfs.part(ino) != Part::Live {
        return Err(Nfs4Error::Rofs);
    }
    // Who made it may use it whatever its mode; who opened it before a restart was checked then.
    if !opened.made && claim != 1 {
        c.check_access(ino, Access { read: access & READ != 0, write: access & WRITE != 0, execute: false })?;
    }
    if opened.truncate {
        let denied = c.shared.table().check_io(ANONYMOUS, client, ino, WRITE).is_err();
        if denied {
            return Err(Nfs4Error::ShareDenied);
        }
        let set = SetAttributes { size: Some(0), ..SetAttributes::default() };
        c.shared.vfs.setattr(&c.who, ino, &set, false)?;
        c.changed = true;
    }
    let stateid = share(c, client, owner, ino, access, deny)?;
    c.set_current(Some(ino));
    c.current_stateid = Some(stateid);

    stateid.write(w);
    write_change(w, opened.dir);
    let preserve = if c.shared.options.preserve_unlinked { RESULT_PRESERVE_UNLINKED } else { 0 };
    w.u32(RESULT_LOCKTYPE_POSIX | RESULT_MAY_NOTIFY_LOCK | preserve);
    opened.set.write(w);
    // OPEN_DELEGATE_NONE.
    w.u32(0);
    Ok(())
}

/// The answer to an exclusive create that the server before this one ran. Its state ended with that server: the client takes it back as it does
/// with all it had open.
fn opened_before(c: &mut Compound<'_>, how: Option<How>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let claim = r.u32()?;
    let (Some(how), 0, true) = (how, claim, c.is_done()?) else { return Err(Nfs4Error::Delay) };
    let name = read_name(r)?;
    let dir = c.current()?;
    let file = made_before(c, dir, name)?;
    Compound::check_regular(&file)?;
    let (How::Unchecked(settings) | How::Guarded(settings) | How::Exclusive(_, settings)) = how;
    c.set_current(Some(file.ino));
    // Starts are numbered from 1, so that this names nothing.
    Stateid { seqid: 1, other: Other::new(0, file.ino.0) }.write(w);
    write_change(w, unchanged(c, dir)?);
    w.u32(RESULT_LOCKTYPE_POSIX | RESULT_MAY_NOTIFY_LOCK);
    settings.named.write(w);
    // OPEN_DELEGATE_NONE.
    w.u32(0);
    Ok(())
}

/// Holds the file and notes the open.
fn share(c: &Compound<'_>, client: u64, owner: &[u8], ino: Ino, access: u32, deny: u32) -> Status<Stateid> {
    let vfs = &c.shared.vfs;
    vfs.hold(ino)?;
    let opened = c.shared.table().open(client, owner, ino, access, deny);
    match opened {
        Ok((stateid, gone)) => {
            gone.go(&**vfs);
            Ok(stateid)
        }
        Err(e) => {
            vfs.release(ino);
            Err(e)
        }
    }
}

fn read_how(r: &mut Reader<'_>, minor: u32) -> Status<How> {
    Ok(match r.u32()? {
        0 => How::Unchecked(Settings::read(r, minor)?),
        1 => How::Guarded(Settings::read(r, minor)?),
        2 => How::Exclusive(r.fixed()?, Settings::default()),
        3 => {
            let verifier = r.fixed()?;
            let settings = Settings::read(r, minor)?;
            settings.check_exclusive()?;
            How::Exclusive(verifier, settings)
        }
        _ => return Err(Nfs4Error::BadXdr),
    })
}

/// The open with creation (RFC 8881 section 18.16.3).
fn make(c: &Compound<'_>, dir: Ino, name: &[u8], how: How) -> Status<Opened> {
    let vfs = &c.shared.vfs;
    let (settings, exclusive, verifier) = match how {
        How::Unchecked(settings) => (settings, false, None),
        How::Guarded(settings) => (settings, true, None),
        How::Exclusive(verifier, settings) => (settings, true, Some(verifier)),
    };
    let with = new_attributes(&settings, DEFAULT_MODE);
    let set = settings.named;
    let make = || vfs.make(&c.who, dir, name, &Make::File { exclusive }, &with);
    let made = match verifier {
        Some(verifier) => c.noting(|| c.shared.exclusives.make(&**vfs, dir, name, verifier, make)),
        None if exclusive => c.noting(make),
        // To make a file again that may exist does no harm.
        None => make(),
    };
    let error = match made {
        Ok(made) if made.made => {
            return Ok(Opened { file: made.attributes, made: true, dir: made.dir, set, truncate: false });
        }
        Ok(made) => return Ok(existing(&settings, made.attributes, made.dir)),
        Err(e) => e,
    };
    if !matches!(error, VfsError::Exists) {
        return Err(c.dir_error(dir, error.into()));
    }
    let file = vfs.lookup(&c.who, dir, name)?;
    let change = unchanged(c, dir)?;
    match verifier {
        Some(verifier) if c.shared.exclusives.is_repeated(&c.shared.noted, dir, name, verifier, file.ino) => {
            Compound::check_regular(&file)?;
            // Made by this very request, whose reply was lost.
            Ok(Opened { file, made: true, dir: change, set, truncate: false })
        }
        // Without O_EXCL, what exists is opened, or refused for what it is.
        None if !exclusive => Ok(existing(&settings, file, change)),
        _ => Err(Nfs4Error::Exist),
    }
}

/// An existing file that was to be created without O_EXCL: of the attributes only a size of 0 counts.
fn existing(settings: &Settings, file: Attributes, dir: DirChange) -> Opened {
    let truncate = settings.values.size == Some(0);
    let set = if truncate { Bitmap::of(&[number::SIZE]) } else { Bitmap::default() };
    Opened { truncate: truncate && file.kind == FileKind::File, set, ..Opened::existing(file, dir) }
}

pub fn downgrade(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let stateid = c.read_stateid(r)?;
    let _seqid = r.u32()?;
    let (access, deny) = (r.u32()? & 0xff, r.u32()?);
    let (client, ino) = (c.client()?, c.current()?);
    let stateid = c.shared.table().downgrade(stateid, client, ino, access, deny)?;
    c.current_stateid = Some(stateid);
    stateid.write(w);
    Ok(())
}

pub fn close(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let _seqid = r.u32()?;
    let stateid = c.read_stateid(r)?;
    let (client, ino) = (c.client()?, c.current()?);
    let gone = c.shared.table().close(stateid, client, ino)?;
    gone.go(&*c.shared.vfs);
    c.current_stateid = None;
    INVALID.write(w);
    Ok(())
}
