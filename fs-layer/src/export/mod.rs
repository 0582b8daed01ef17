//! Ways in: each shows one [`Vfs`](crate::vfs::Vfs) to others by a protocol of its own.
//!
//! No rule of POSIX is decided here; an export translates, checks what its protocol lets the filesystem not check (permission at open),
//! and keeps what its clients hold.

pub mod fuse;
pub mod nfs3;
pub mod nfs4;
