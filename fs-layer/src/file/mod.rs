//! What is in files: the page cache.
//!
//! Pages that were written and are not on the disk yet are *dirty*; they have no addresses yet if the file grew there. `vfs::fs`
//! writes them back. Callers hold the lock of the file: shared to read, exclusive to change pages.

mod memory;
mod pages;

pub use memory::{PAGE_BYTES, Page};
pub use pages::{PageCache, Writing};
