//! What a power cut would leave: everything written over NBD is recorded, and images are made of it as of each flush.
//!
//! [`proxy`] stands between an NBD client and the server and notes, in the order of their answers, writes, zeroes, trims and
//! flushes, and *marks*: lines that somebody else sends when he knows something to be durable. [`replay`] applies the notes
//! to an image, stops at flushes, and has a command look at the image: everything marked before must be there.

pub mod log;
pub mod proxy;
pub mod replay;
