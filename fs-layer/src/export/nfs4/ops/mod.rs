//! The operations, each decoding its arguments, doing its work and encoding its results.
//!
//! [`session`] is who the client is and where its requests run, [`files`] the current file and its attributes, [`names`] what changes
//! directories, [`open`] share reservations, [`locks`] byte ranges, [`data`] contents, [`sparse`] what version 4.2 adds to them, [`xattr`] extended
//! attributes. What is not there is answered NFS4ERR_NOTSUPP.

mod data;
mod files;
mod locks;
mod names;
mod open;
mod session;
mod sparse;
mod xattr;

use super::compound::Compound;
use super::status::{Nfs4Error, Status};
use super::xdr::{Reader, Writer};

/// Numbers of operations (RFC 8881 section 16.2.1, RFC 7862 section 14, RFC 8276 section 8.4).
pub mod op {
    #![allow(missing_docs)]
    pub const ACCESS: u32 = 3;
    pub const CLOSE: u32 = 4;
    pub const COMMIT: u32 = 5;
    pub const CREATE: u32 = 6;
    pub const GETATTR: u32 = 9;
    pub const GETFH: u32 = 10;
    pub const LINK: u32 = 11;
    pub const LOCK: u32 = 12;
    pub const LOCKT: u32 = 13;
    pub const LOCKU: u32 = 14;
    pub const LOOKUP: u32 = 15;
    pub const LOOKUPP: u32 = 16;
    pub const NVERIFY: u32 = 17;
    pub const OPEN: u32 = 18;
    pub const OPEN_DOWNGRADE: u32 = 21;
    pub const PUTFH: u32 = 22;
    pub const PUTPUBFH: u32 = 23;
    pub const PUTROOTFH: u32 = 24;
    pub const READ: u32 = 25;
    pub const READDIR: u32 = 26;
    pub const READLINK: u32 = 27;
    pub const REMOVE: u32 = 28;
    pub const RENAME: u32 = 29;
    pub const RESTOREFH: u32 = 31;
    pub const SAVEFH: u32 = 32;
    pub const SECINFO: u32 = 33;
    pub const SETATTR: u32 = 34;
    pub const VERIFY: u32 = 37;
    pub const WRITE: u32 = 38;
    pub const BACKCHANNEL_CTL: u32 = 40;
    pub const BIND_CONN_TO_SESSION: u32 = 41;
    pub const EXCHANGE_ID: u32 = 42;
    pub const CREATE_SESSION: u32 = 43;
    pub const DESTROY_SESSION: u32 = 44;
    pub const FREE_STATEID: u32 = 45;
    pub const SECINFO_NO_NAME: u32 = 52;
    pub const SEQUENCE: u32 = 53;
    pub const TEST_STATEID: u32 = 55;
    pub const DESTROY_CLIENTID: u32 = 57;
    pub const RECLAIM_COMPLETE: u32 = 58;
    pub const ALLOCATE: u32 = 59;
    pub const COPY: u32 = 60;
    pub const DEALLOCATE: u32 = 62;
    pub const IO_ADVISE: u32 = 63;
    pub const READ_PLUS: u32 = 68;
    pub const SEEK: u32 = 69;
    pub const CLONE: u32 = 71;
    pub const GETXATTR: u32 = 72;
    pub const SETXATTR: u32 = 73;
    pub const LISTXATTRS: u32 = 74;
    pub const REMOVEXATTR: u32 = 75;
    pub const ILLEGAL: u32 = 10044;

    /// Whether the minor version has such an operation.
    pub fn is_known(operation: u32, minor: u32) -> bool {
        (ACCESS..=if minor >= 2 { REMOVEXATTR } else { RECLAIM_COMPLETE }).contains(&operation)
    }

    /// Whether it may stand alone, without SEQUENCE.
    pub fn is_sessionless(operation: u32) -> bool {
        matches!(operation, BIND_CONN_TO_SESSION | EXCHANGE_ID | CREATE_SESSION | DESTROY_SESSION | DESTROY_CLIENTID)
    }

    /// Whether it may change something.
    pub fn may_change(operation: u32) -> bool {
        !matches!(
            operation,
            ACCESS
                | GETATTR
                | GETFH
                | LOOKUP
                | LOOKUPP
                | NVERIFY
                | PUTFH
                | PUTPUBFH
                | PUTROOTFH
                | READ
                | READDIR
                | READLINK
                | RESTOREFH
                | SAVEFH
                | SECINFO
                | VERIFY
                | SECINFO_NO_NAME
                | SEQUENCE
                | TEST_STATEID
                | READ_PLUS
                | SEEK
                | GETXATTR
                | LISTXATTRS
        )
    }
}

/// Runs an operation.
///
/// # Errors
/// Its status. What it wrote then counts only if it set [`Compound::error_body`].
pub fn run(c: &mut Compound<'_>, operation: u32, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    // What is noted when it is done looks by itself.
    let noted = matches!(operation, op::CREATE | op::LINK | op::OPEN | op::REMOVE | op::RENAME);
    if c.again && op::may_change(operation) && !noted {
        return Err(Nfs4Error::Delay);
    }
    match operation {
        op::ACCESS => files::access(c, r, w),
        op::CLOSE => open::close(c, r, w),
        op::COMMIT => data::commit(c, r, w),
        op::CREATE => names::create(c, r, w),
        op::GETATTR => files::getattr(c, r, w),
        op::GETFH => files::getfh(c, w),
        op::LINK => names::link(c, r, w),
        op::LOCK => locks::lock(c, r, w),
        op::LOCKT => locks::lockt(c, r, w),
        op::LOCKU => locks::locku(c, r, w),
        op::LOOKUP => files::lookup(c, r),
        op::LOOKUPP => files::lookupp(c),
        op::NVERIFY => files::verify(c, r, false),
        op::OPEN => open::open(c, r, w),
        op::OPEN_DOWNGRADE => open::downgrade(c, r, w),
        op::PUTFH => files::putfh(c, r),
        op::PUTPUBFH | op::PUTROOTFH => files::putrootfh(c),
        op::READ => data::read(c, r, w),
        op::READDIR => names::readdir(c, r, w),
        op::READLINK => files::readlink(c, w),
        op::REMOVE => names::remove(c, r, w),
        op::RENAME => names::rename(c, r, w),
        op::RESTOREFH => files::restorefh(c),
        op::SAVEFH => files::savefh(c),
        op::SECINFO => files::secinfo(c, r, w),
        op::SECINFO_NO_NAME => files::secinfo_no_name(c, r, w),
        op::SETATTR => files::setattr(c, r, w),
        op::VERIFY => files::verify(c, r, true),
        op::WRITE => data::write(c, r, w),
        op::BACKCHANNEL_CTL => session::backchannel_ctl(c, r),
        op::BIND_CONN_TO_SESSION => session::bind_conn(c, r, w),
        op::EXCHANGE_ID => session::exchange_id(c, r, w),
        op::CREATE_SESSION => session::create_session(c, r, w),
        op::DESTROY_SESSION => session::destroy_session(c, r),
        op::FREE_STATEID => locks::free_stateid(c, r),
        op::SEQUENCE => session::sequence(c, r, w),
        op::TEST_STATEID => locks::test_stateid(c, r, w),
        op::DESTROY_CLIENTID => session::destroy_clientid(c, r),
        op::RECLAIM_COMPLETE => session::reclaim_complete(c, r),
        op::ALLOCATE => sparse::allocate(c, r, true),
        op::DEALLOCATE => sparse::allocate(c, r, false),
        op::COPY => sparse::copy(c, r, w),
        op::CLONE => sparse::clone(c, r),
        op::READ_PLUS => sparse::read_plus(c, r, w),
        op::SEEK => sparse::seek(c, r, w),
        op::GETXATTR => xattr::get(c, r, w),
        op::SETXATTR => xattr::set(c, r, w),
        op::LISTXATTRS => xattr::list(c, r, w),
        op::REMOVEXATTR => xattr::remove(c, r, w),
        _ => Err(Nfs4Error::NotSupp),
    }
}
