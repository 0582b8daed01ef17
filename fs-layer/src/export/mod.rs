//! How the tree is reached: protocols in front of [`Vfs`](crate::vfs::Vfs). What is here knows requests and replies, not blocks.

pub mod fuse;
