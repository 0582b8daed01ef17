//! Why an operation failed, in the words of NFS (RFC 8881 section 15, RFC 7862 section 11, RFC 8276 section 8.3).

use crate::vfs::VfsError;

/// What most functions of the server return.
pub type Status<T> = Result<T, Nfs4Error>;

macro_rules! errors {
    ($($(#[$doc:meta])* $name:ident = $code:literal,)*) => {
        /// A status other than NFS4_OK. Their meaning is that of the RFC's NFS4ERR of the same name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
        #[error("{self:?}")]
        #[allow(missing_docs)]
        pub enum Nfs4Error { $($(#[$doc])* $name = $code,)* }

        impl Nfs4Error {
            /// The error of a number.
            pub fn from_code(code: u32) -> Option<Nfs4Error> {
                match code { $($code => Some(Nfs4Error::$name),)* _ => None }
            }
        }
    };
}

errors! {
    Perm = 1, NoEnt = 2, Io = 5, Nxio = 6, Access = 13, Exist = 17, Xdev = 18, NotDir = 20, IsDir = 21, Inval = 22,
    Fbig = 27, NoSpc = 28, Rofs = 30, Mlink = 31, NameTooLong = 63, NotEmpty = 66, Dquot = 69, Stale = 70,
    BadHandle = 10001, BadCookie = 10003, NotSupp = 10004, TooSmall = 10005, ServerFault = 10006, BadType = 10007,
    Delay = 10008, Same = 10009, Denied = 10010, Expired = 10011, Locked = 10012, Grace = 10013, FhExpired = 10014,
    ShareDenied = 10015, WrongSec = 10016, ClidInUse = 10017, Resource = 10018, NoFileHandle = 10020,
    MinorVersMismatch = 10021, StaleClientId = 10022, StaleStateId = 10023, OldStateId = 10024, BadStateId = 10025,
    BadSeqId = 10026, NotSame = 10027, LockRange = 10028, Symlink = 10029, AttrNotSupp = 10032, NoGrace = 10033,
    ReclaimBad = 10034, ReclaimConflict = 10035, BadXdr = 10036, LocksHeld = 10037, OpenMode = 10038, BadOwner = 10039,
    BadChar = 10040, BadName = 10041, BadRange = 10042, OpIllegal = 10044, Deadlock = 10045, FileOpen = 10046,
    BadSession = 10052, BadSlot = 10053, CompleteAlready = 10054, ConnNotBoundToSession = 10055,
    BackChanBusy = 10057, SeqMisordered = 10063, SequencePos = 10064, ReqTooBig = 10065, RepTooBig = 10066,
    RepTooBigToCache = 10067, RetryUncachedRep = 10068, TooManyOps = 10070, OpNotInSession = 10071,
    ClientIdBusy = 10074, BadHighSlot = 10077, SeqFalseRetry = 10076, EncrAlgUnsupp = 10079, NotOnlyOp = 10081, WrongCred = 10082,
    WrongType = 10083, UnionNotSupp = 10090, OffloadDenied = 10091, OffloadNoReqs = 10094, NoXattr = 10095,
    Xattr2Big = 10096,
}

impl Nfs4Error {
    /// The number on the wire.
    pub fn code(self) -> u32 {
        self as u32
    }
}

impl From<VfsError> for Nfs4Error {
    fn from(e: VfsError) -> Nfs4Error {
        match e {
            VfsError::NotPermitted => Nfs4Error::Perm,
            VfsError::NotFound => Nfs4Error::NoEnt,
            VfsError::Io(_) => Nfs4Error::Io,
            VfsError::NoSuchAddress => Nfs4Error::Nxio,
            VfsError::Access => Nfs4Error::Access,
            VfsError::Exists => Nfs4Error::Exist,
            VfsError::CrossDevice => Nfs4Error::Xdev,
            VfsError::NotDirectory => Nfs4Error::NotDir,
            VfsError::IsDirectory => Nfs4Error::IsDir,
            VfsError::Invalid => Nfs4Error::Inval,
            // Not NFS4ERR_DELAY: the client would ask for ever.
            VfsError::Busy => Nfs4Error::FileOpen,
            VfsError::TooLarge => Nfs4Error::Fbig,
            VfsError::NoSpace => Nfs4Error::NoSpc,
            VfsError::Quota => Nfs4Error::Dquot,
            VfsError::ReadOnly => Nfs4Error::Rofs,
            VfsError::TooManyLinks => Nfs4Error::Mlink,
            VfsError::NameTooLong => Nfs4Error::NameTooLong,
            VfsError::NotEmpty => Nfs4Error::NotEmpty,
            VfsError::Symlink => Nfs4Error::Symlink,
            VfsError::NoData => Nfs4Error::NoXattr,
            VfsError::AttributeTooLarge => Nfs4Error::Xattr2Big,
            VfsError::NotSupported => Nfs4Error::NotSupp,
            VfsError::Stale => Nfs4Error::Stale,
        }
    }
}
