//! Inode numbers and addresses, handed out by counting up and never twice.
//!
//! The allocator's block says what nobody has leased yet. A host leases a range by moving that on, and the lease is durable before
//! anything of it is used: even what a crash takes back was never there before. What is left of a lease when the host ends is lost; numbers
//! and addresses are plenty.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use zerocopy::{FromBytes, IntoBytes};

use crate::blocks::BlockKind;
use crate::disk::{BLOCK_BYTES, BlockAddress, Disk};
use crate::layout::{ALLOCATOR_BLOCKS, AllocatorBody, Geometry, Opened, open, seal};
use crate::vfs::{Ino, Result, VfsError};

/// Inode numbers leased at a time.
const INO_LEASE: u64 = 4096;
/// The most addresses leased at a time, unless more are asked for at once.
const ADDRESS_LEASE_MAX: u64 = 1 << 20;

struct State {
    inos: Range<u64>,
    addresses: Range<u64>,
    /// As the allocator's block has it.
    next_ino: u64,
    next_address: u64,
    version: u64,
    dead: bool,
}

/// See the module.
pub struct Allocator {
    disk: Arc<dyn Disk>,
    geometry: Geometry,
    state: Mutex<State>,
}

/// What nobody has leased yet: the first inode number, the first address, and the block's version.
///
/// # Errors
/// If the disk fails or both copies are damaged.
pub fn load(disk: &dyn Disk, geometry: &Geometry) -> Result<(u64, BlockAddress, u64)> {
    let mut newest: Option<(u64, u64, u64)> = None;
    let mut why = String::new();
    for at in ALLOCATOR_BLOCKS {
        let mut block = [0; BLOCK_BYTES];
        disk.read(at, &mut block).map_err(|e| VfsError::Io(format!("the allocator (block {at}): {e}")))?;
        match open(Some(geometry.fragment()), at, BlockKind::Allocator, &block) {
            Opened::Sound { version, body } => {
                let body = AllocatorBody::ref_from_bytes(body).expect("the allocator has the size of a body");
                if newest.is_none_or(|(.., newest)| newest < version) {
                    newest = Some((body.next_ino.get(), body.next_address.get(), version));
                }
            }
            Opened::Empty => why = format!("block {at} is empty"),
            Opened::Damaged(damage) => why = format!("block {at}: {damage}"),
        }
    }
    newest.ok_or_else(|| VfsError::Io(format!("no copy of the allocator is sound: {why}; run `fsd check`")))
}

impl Allocator {
    /// Leases nothing yet.
    pub fn open(disk: Arc<dyn Disk>, geometry: Geometry) -> Result<Allocator> {
        let (next_ino, next_address, version) = load(&*disk, &geometry)?;
        let state = State { inos: 0..0, addresses: 0..0, next_ino, next_address, version, dead: false };
        Ok(Allocator { disk, geometry, state: Mutex::new(state) })
    }

    /// A new inode number.
    ///
    /// # Errors
    /// [`VfsError::NoSpace`] if there are no more; [`VfsError::Io`] if the disk fails.
    pub fn ino(&self) -> Result<Ino> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.inos.is_empty() {
            let start = state.next_ino;
            let end = (start + INO_LEASE).min(self.geometry.inode_count);
            if start >= end {
                return Err(VfsError::NoSpace);
            }
            let address = state.next_address;
            self.lease(&mut state, end, address)?;
            state.inos = start..end;
        }
        Ok(Ino(state.inos.next().expect("leased above")))
    }

    /// The first of so many contiguous addresses that were never used.
    ///
    /// # Errors
    /// As for [`Allocator::ino`].
    pub fn addresses(&self, count: u64) -> Result<BlockAddress> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.addresses.end - state.addresses.start < count {
            let usual = ((self.geometry.disk_blocks - self.geometry.data_start) / 4096).clamp(64, ADDRESS_LEASE_MAX);
            let start = state.next_address;
            let end = start.checked_add(count.max(usual)).filter(|end| *end <= self.geometry.disk_blocks);
            let end = end.or_else(|| start.checked_add(count).filter(|end| *end <= self.geometry.disk_blocks));
            let Some(end) = end else { return Err(VfsError::NoSpace) };
            let ino = state.next_ino;
            self.lease(&mut state, ino, end)?;
            // What follows the last lease directly continues it.
            let from = if state.addresses.end == start { state.addresses.start } else { start };
            state.addresses = from..end;
        }
        let at = state.addresses.start;
        state.addresses.start += count;
        Ok(at)
    }

    /// Blocks of data that nobody has leased yet.
    pub fn free_blocks(&self) -> u64 {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.geometry.disk_blocks - state.next_address + (state.addresses.end - state.addresses.start)
    }

    /// Writes the allocator's other copy, and flushes, before anything of the lease is used.
    fn lease(&self, state: &mut State, next_ino: u64, next_address: u64) -> Result<()> {
        if state.dead {
            return Err(VfsError::Io("no range can be leased since the disk failed; mount again".into()));
        }
        let version = state.version + 1;
        let at = ALLOCATOR_BLOCKS[(version % 2) as usize];
        let body = AllocatorBody::new(next_ino, next_address);
        let mut block = [0; BLOCK_BYTES];
        let body = body.as_bytes().try_into().expect("the allocator has the size of a body");
        seal(self.geometry.fragment(), at, BlockKind::Allocator, version, body, &mut block);
        let done = self.disk.write(at, &block).and_then(|()| self.disk.flush());
        done.map_err(|e| {
            state.dead = true;
            VfsError::Io(format!("a range could not be leased: {e}"))
        })?;
        (state.next_ino, state.next_address, state.version) = (next_ino, next_address, version);
        Ok(())
    }
}
