//! Why a call failed, in POSIX's words.

/// What most calls return.
pub type Result<T> = std::result::Result<T, VfsError>;

/// Why a call failed. Each is one errno and one NFS status.
#[derive(Debug, thiserror::Error)]
pub enum VfsError {
    /// EPERM
    #[error("operation not permitted")]
    NotPermitted,
    /// ENOENT
    #[error("no such file or directory")]
    NotFound,
    /// EIO: the disk failed, or a block is not what it must be. The text says which and what to do; it was logged.
    #[error("input/output error: {0}")]
    Io(String),
    /// ENXIO
    #[error("no such address")]
    NoSuchAddress,
    /// EACCES
    #[error("permission denied")]
    Access,
    /// EEXIST
    #[error("file exists")]
    Exists,
    /// EXDEV
    #[error("not the same filesystem")]
    CrossDevice,
    /// ENOTDIR
    #[error("not a directory")]
    NotDirectory,
    /// EISDIR
    #[error("is a directory")]
    IsDirectory,
    /// EINVAL
    #[error("invalid argument")]
    Invalid,
    /// ETXTBSY
    #[error("busy")]
    Busy,
    /// EFBIG
    #[error("file too large")]
    TooLarge,
    /// ENOSPC
    #[error("no space left")]
    NoSpace,
    /// EDQUOT
    #[error("quota exceeded")]
    Quota,
    /// EROFS
    #[error("read-only filesystem")]
    ReadOnly,
    /// EMLINK
    #[error("too many links")]
    TooManyLinks,
    /// ENAMETOOLONG
    #[error("name too long")]
    NameTooLong,
    /// ENOTEMPTY
    #[error("directory not empty")]
    NotEmpty,
    /// ELOOP, and a symbolic link where something else is needed
    #[error("is a symbolic link")]
    Symlink,
    /// ENODATA
    #[error("no such attribute")]
    NoData,
    /// ERANGE, or E2BIG: an extended attribute is too large
    #[error("too large an attribute")]
    AttributeTooLarge,
    /// EOPNOTSUPP
    #[error("not supported")]
    NotSupported,
    /// ESTALE: the file does not exist any more, or never did
    #[error("stale file handle")]
    Stale,
}

impl VfsError {
    /// The error number of Linux.
    pub fn errno(&self) -> i32 {
        match self {
            VfsError::NotPermitted => libc::EPERM,
            VfsError::NotFound => libc::ENOENT,
            VfsError::Io(_) => libc::EIO,
            VfsError::NoSuchAddress => libc::ENXIO,
            VfsError::Access => libc::EACCES,
            VfsError::Exists => libc::EEXIST,
            VfsError::CrossDevice => libc::EXDEV,
            VfsError::NotDirectory => libc::ENOTDIR,
            VfsError::IsDirectory => libc::EISDIR,
            VfsError::Invalid => libc::EINVAL,
            VfsError::Busy => libc::ETXTBSY,
            VfsError::TooLarge => libc::EFBIG,
            VfsError::NoSpace => libc::ENOSPC,
            VfsError::Quota => libc::EDQUOT,
            VfsError::ReadOnly => libc::EROFS,
            VfsError::TooManyLinks => libc::EMLINK,
            VfsError::NameTooLong => libc::ENAMETOOLONG,
            VfsError::NotEmpty => libc::ENOTEMPTY,
            VfsError::Symlink => libc::ELOOP,
            VfsError::NoData => libc::ENODATA,
            VfsError::AttributeTooLarge => libc::ERANGE,
            VfsError::NotSupported => libc::EOPNOTSUPP,
            VfsError::Stale => libc::ESTALE,
        }
    }
}
