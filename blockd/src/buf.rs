//! Page-aligned memory for O_DIRECT I/O.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Mutex;

use bytes::Bytes;

use crate::types::BLOCK;

/// Buffers of these sizes, in bytes, are kept for [`AlignedBuf::for_overwrite`] when they are dropped: large enough
/// that mapping, faulting and zeroing them costs more than filling them. They have mappings of their own.
const RECYCLED: std::ops::RangeInclusive<usize> = (64 << 10)..=(20 << 20);
/// Bytes kept at most.
const POOL_BYTES: usize = 80 << 20;

static POOL: Mutex<Pool> = Mutex::new(Pool { kept: Vec::new(), bytes: 0 });

/// Memory that was used and may be again, the least recently used first.
struct Pool {
    kept: Vec<Memory>,
    bytes: usize,
}

impl Pool {
    fn take(&mut self, size: usize) -> Option<Memory> {
        let index = self.kept.iter().rposition(|memory| memory.size == size)?;
        self.bytes -= size;
        Some(self.kept.remove(index))
    }

    fn keep(&mut self, memory: Memory) {
        self.bytes += memory.size;
        self.kept.push(memory);
        while self.bytes > POOL_BYTES {
            let oldest = self.kept.remove(0);
            self.bytes -= oldest.size;
            oldest.free();
        }
    }
}

/// Initialised memory aligned to blocks, which whoever has this owns. Not given back by itself.
struct Memory {
    ptr: NonNull<u8>,
    size: usize,
    /// Has a mapping of its own; else it is the allocator's.
    mapped: bool,
}

// SAFETY: it owns its memory exclusively, as a `Box<[u8]>` does.
unsafe impl Send for Memory {}
// SAFETY: shared access is read-only, as for a `Box<[u8]>`.
unsafe impl Sync for Memory {}

impl Memory {
    /// How much is taken for a buffer of `len` bytes: of large ones there are few sizes, so that one can serve for another.
    fn size_for(len: usize) -> usize {
        let len = len.max(1).next_multiple_of(BLOCK);
        if len < *RECYCLED.start() { len } else { len.next_multiple_of((len.next_power_of_two() / 8).max(BLOCK)) }
    }

    /// All zeroes. `flags` go with a mapping.
    fn fresh(size: usize, flags: libc::c_int) -> Self {
        if RECYCLED.contains(&size)
            && let Some(ptr) = Self::map(size, flags)
        {
            return Self { ptr, size, mapped: true };
        }
        // SAFETY: the layout has a non-zero size.
        let ptr = NonNull::new(unsafe { alloc_zeroed(Self::layout(size)) });
        let Some(ptr) = ptr else { handle_alloc_error(Self::layout(size)) };
        Self { ptr, size, mapped: false }
    }

    /// Fresh pages of the kernel, which are zero and, unless `flags` say otherwise, cost nothing before they are used. There is a limit to the number of
    /// mappings. Huge pages are not asked for: where a hypervisor takes free ones back, clearing a new one takes longer than
    /// fetching what it is for.
    fn map(size: usize, flags: libc::c_int) -> Option<NonNull<u8>> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED { None } else { NonNull::new(start.cast::<u8>()) }
    }

    fn free(self) {
        // SAFETY: allocated in `fresh` in the same way, and nobody has it any more.
        unsafe {
            if self.mapped {
                libc::munmap(self.ptr.as_ptr().cast(), self.size);
            } else {
                dealloc(self.ptr.as_ptr(), Self::layout(self.size));
            }
        }
    }

    fn layout(size: usize) -> Layout {
        // The size comes from a Rust allocation request, somewhat rounded; it cannot overflow isize here.
        Layout::from_size_align(size, BLOCK).expect("buffer length fits the address space")
    }
}

/// A heap buffer aligned to, and sized in multiples of, 4 KiB.
///
/// Memory is always initialised: zeroed, or what an earlier owner left.
pub struct AlignedBuf {
    memory: std::mem::ManuallyDrop<Memory>,
    len: usize,
}

impl AlignedBuf {
    /// A zeroed buffer of `len` bytes rounded up to whole blocks (at least one block).
    pub fn zeroed(len: usize) -> Self {
        Self::of(Memory::fresh(Memory::size_for(len), 0), len)
    }

    /// A buffer as of [`AlignedBuf::zeroed`] whose contents are arbitrary, for data about to be received.
    pub fn for_overwrite(len: usize) -> Self {
        let size = Memory::size_for(len);
        let used = || POOL.lock().ok()?.take(size);
        let used = if RECYCLED.contains(&size) { used() } else { None };
        Self::of(used.unwrap_or_else(|| Memory::fresh(size, libc::MAP_POPULATE)), len)
    }

    fn of(memory: Memory, len: usize) -> Self {
        Self { memory: std::mem::ManuallyDrop::new(memory), len: len.max(1).next_multiple_of(BLOCK) }
    }

    /// A copy of `data`, zero-padded to whole blocks.
    pub fn copy_of(data: &[u8]) -> Self {
        let mut buf = Self::zeroed(data.len());
        buf[..data.len()].copy_from_slice(data);
        buf
    }

    /// The first `len` bytes, shared; the memory is given back with the last of them.
    pub fn into_bytes(self, len: usize) -> Bytes {
        Bytes::from_owner(self).slice(..len)
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: nothing of `self` is used after this.
        let memory = unsafe { std::mem::ManuallyDrop::take(&mut self.memory) };
        match POOL.lock() {
            Ok(mut pool) if RECYCLED.contains(&memory.size) => pool.keep(memory),
            _ => memory.free(),
        }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the memory is valid for len initialised bytes for the life of self.
        unsafe { std::slice::from_raw_parts(self.memory.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.memory.ptr.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

/// An append-only aligned buffer that is read while it is still being filled.
///
/// One owner appends (it holds the unique [`ArenaWriter`]); any number of [`Slice`]s read what was appended before
/// they were made. Appended bytes never change.
struct Arena {
    /// Only its address and length are used while there is an arena: the bytes are reached as said above.
    buf: std::mem::ManuallyDrop<AlignedBuf>,
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: bytes below the writer's fill mark are immutable and only those are reachable through a `Slice`; bytes at
// or above it are touched only by the unique `ArenaWriter`.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: nobody has a slice any more, and nothing of `self` is used after this.
        unsafe { std::mem::ManuallyDrop::drop(&mut self.buf) };
    }
}

/// The unique right to append to an arena.
pub struct ArenaWriter {
    arena: std::sync::Arc<Arena>,
    filled: usize,
}

impl ArenaWriter {
    /// An empty arena of `capacity` bytes, rounded up to whole blocks.
    pub fn with_capacity(capacity: usize) -> Self {
        Self::from_buf(AlignedBuf::for_overwrite(capacity), 0)
    }

    fn from_buf(buf: AlignedBuf, filled: usize) -> Self {
        let (ptr, len) = (buf.memory.ptr, buf.len);
        Self { arena: std::sync::Arc::new(Arena { buf: std::mem::ManuallyDrop::new(buf), ptr, len }), filled }
    }

    /// Bytes that still fit.
    pub fn room(&self) -> usize {
        self.arena.len - self.filled
    }

    /// Appends `len` bytes, all of which `fill` must write: it is given memory of arbitrary content.
    ///
    /// # Panics
    /// When they do not fit.
    pub fn append_with(&mut self, len: usize, fill: impl FnOnce(&mut [u8])) -> Slice {
        assert!(len <= self.room(), "arena overflow");
        // SAFETY: the range lies inside the allocation, above the fill mark, so no `Slice` covers it, and `&mut self`
        // makes this the only writer.
        let tail = unsafe { std::slice::from_raw_parts_mut(self.arena.ptr.as_ptr().add(self.filled), len) };
        fill(tail);
        let slice = Slice { arena: self.arena.clone(), start: self.filled, len };
        self.filled += len;
        slice
    }
}

impl std::fmt::Debug for ArenaWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ArenaWriter({} of {} bytes)", self.filled, self.arena.len)
    }
}

/// An immutable, cheaply cloned view of aligned memory.
#[derive(Clone)]
pub struct Slice {
    arena: std::sync::Arc<Arena>,
    start: usize,
    len: usize,
}

impl Slice {
    /// A narrower view.
    ///
    /// # Panics
    /// When the range leaves the view.
    pub fn slice(&self, range: std::ops::Range<usize>) -> Slice {
        assert!(range.start <= range.end && range.end <= self.len, "slice out of bounds");
        Slice { arena: self.arena.clone(), start: self.start + range.start, len: range.end - range.start }
    }

    /// This view and `next` as one, if `next` continues it in the same memory.
    pub fn joined(&self, next: &Slice) -> Option<Slice> {
        (std::sync::Arc::ptr_eq(&self.arena, &next.arena) && self.start + self.len == next.start).then(|| Slice {
            arena: self.arena.clone(),
            start: self.start,
            len: self.len + next.len,
        })
    }
}

impl AsRef<[u8]> for Slice {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<AlignedBuf> for Slice {
    fn from(buf: AlignedBuf) -> Self {
        let len = buf.len;
        Slice { arena: ArenaWriter::from_buf(buf, len).arena, start: 0, len }
    }
}

impl Deref for Slice {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: a slice covers only bytes below the fill mark at its creation, which never change again.
        unsafe { std::slice::from_raw_parts(self.arena.ptr.as_ptr().add(self.start), self.len) }
    }
}

impl std::fmt::Debug for Slice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Slice({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroed_memory_is_zero_even_after_use() {
        for _ in 0..3 {
            let mut buf = AlignedBuf::zeroed(100 << 10);
            assert!(buf.iter().all(|byte| *byte == 0));
            buf.fill(7);
        }
    }

    #[test]
    fn large_buffers_come_back_and_small_ones_do_not() {
        // A size no other test uses, since the pool is shared.
        let len = (64 << 10) + 3 * BLOCK;
        let mut buf = AlignedBuf::for_overwrite(len);
        buf.fill(9);
        drop(Slice::from(buf));
        assert_eq!(AlignedBuf::for_overwrite(len)[len - 1], 9);
        assert_eq!(AlignedBuf::for_overwrite(1).len(), BLOCK);
    }
}
