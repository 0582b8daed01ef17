//! Network protocols. Code here knows bytes and commands; it does not know chunks.

pub mod nbd;
pub mod nvme;
