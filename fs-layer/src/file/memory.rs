//! Memory for the contents of files: aligned, so that disks can move it without a copy, and used again.
//!
//! Memory that the system has just given out costs more than filling it: each page is a fault. So what is let go of is kept for the next who needs
//! it. [`Page`]s come from regions that are never given back, as many as the page cache ever had; of [`Buffer`]s a few are kept.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use crate::disk::BLOCK_BYTES;

/// Bytes of a page: a block.
pub const PAGE_BYTES: usize = BLOCK_BYTES;

type Bytes = [u8; PAGE_BYTES];

/// Bytes that are asked of the system at a time.
const REGION_BYTES: usize = 2 << 20;

/// Pages that nobody has; all of them are initialized memory that lives for ever.
static FREE: Mutex<Vec<Free>> = Mutex::new(Vec::new());

struct Free(NonNull<Bytes>);

// SAFETY: a free page belongs to nobody but the list it is in; any thread may take it from there.
unsafe impl Send for Free {}

/// Sole owner of the memory it points to.
struct Frame(NonNull<Bytes>);

// SAFETY: a frame is the only owner of its memory, as a box would be.
unsafe impl Send for Frame {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Frame {}

impl Frame {
    /// Some memory, whatever is in it.
    fn take() -> Frame {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        if free.is_empty() {
            more(&mut free);
        }
        Frame(free.pop().expect("there are more now").0)
    }

    fn bytes_mut(&mut self) -> &mut Bytes {
        // SAFETY: initialized memory that only this frame owns.
        unsafe { self.0.as_mut() }
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push(Free(self.0));
    }
}

fn more(free: &mut Vec<Free>) {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping of zeros, which touches no memory there is.
    let region = unsafe { libc::mmap(std::ptr::null_mut(), REGION_BYTES, protection, flags, -1, 0) };
    let region = if region == libc::MAP_FAILED { None } else { NonNull::new(region.cast::<Bytes>()) };
    let Some(region) = region else {
        handle_alloc_error(Layout::from_size_align(REGION_BYTES, PAGE_BYTES).expect("powers of two"))
    };
    // The first is taken first, so that pages taken in a row follow each other.
    free.extend((0..REGION_BYTES / PAGE_BYTES).rev().map(|index| {
        // SAFETY: within the region.
        Free(unsafe { region.add(index) })
    }));
}

/// The contents of a block of a file. Cloning shares it.
#[derive(Clone)]
pub struct Page(Arc<Frame>);

impl Page {
    /// One with these contents.
    pub fn of(bytes: &Bytes) -> Page {
        let mut frame = Frame::take();
        frame.bytes_mut().copy_from_slice(bytes);
        Page(Arc::new(frame))
    }

    /// One of zeros.
    pub fn zeroed() -> Page {
        let mut frame = Frame::take();
        frame.bytes_mut().fill(0);
        Page(Arc::new(frame))
    }

    /// To be changed; a copy if it is shared.
    pub fn make_mut(&mut self) -> &mut Bytes {
        if Arc::get_mut(&mut self.0).is_none() {
            *self = Page::of(self);
        }
        Arc::get_mut(&mut self.0).expect("a copy is not shared").bytes_mut()
    }

    /// Gives it other contents, without copying those it has if it is shared.
    pub fn set(&mut self, bytes: &Bytes) {
        match Arc::get_mut(&mut self.0) {
            Some(frame) => frame.bytes_mut().copy_from_slice(bytes),
            None => *self = Page::of(bytes),
        }
    }

    /// Whether both are the same memory.
    pub fn is_same(&self, other: &Page) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Deref for Page {
    type Target = Bytes;

    fn deref(&self) -> &Bytes {
        // SAFETY: initialized memory that the frame owns; nobody changes it while it is shared.
        unsafe { self.0.0.as_ref() }
    }
}

/// Buffers up to this size are kept for the next.
const KEPT_BYTES: usize = 1 << 20;
/// So many of them.
const KEPT_MAX: usize = 16;

static KEPT: Mutex<Vec<Memory>> = Mutex::new(Vec::new());

/// Sole owner of initialized memory, aligned to pages.
struct Memory {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it is the only owner of its memory, as a box would be.
unsafe impl Send for Memory {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(bytes: usize) -> Memory {
        let layout =
            Layout::from_size_align(bytes.max(1), PAGE_BYTES).expect("a buffer is shorter than the address space");
        // SAFETY: the layout has a size.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Memory { start, layout }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and nobody else has it.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// Aligned bytes for one request. What they are at first is not said.
pub struct Buffer {
    memory: Option<Memory>,
    len: usize,
}

impl Buffer {
    /// One of so many bytes.
    pub fn new(len: usize) -> Buffer {
        let kept = (len <= KEPT_BYTES).then(|| KEPT.lock().unwrap_or_else(PoisonError::into_inner).pop()).flatten();
        let memory = kept.unwrap_or_else(|| Memory::new(if len <= KEPT_BYTES { KEPT_BYTES } else { len }));
        Buffer { memory: Some(memory), len }
    }

    fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("it is there until the drop")
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let memory = self.memory.take();
        if self.len <= KEPT_BYTES {
            let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
            if kept.len() < KEPT_MAX {
                kept.extend(memory);
            }
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: so many initialized bytes at least, which this buffer owns.
        unsafe { std::slice::from_raw_parts(self.memory().start.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.memory().start.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_pages_are_copied_before_they_change() {
        let mut page = Page::of(&[1; PAGE_BYTES]);
        let same = page.clone();
        assert!(page.is_same(&same));
        page.make_mut()[5] = 2;
        assert!(!page.is_same(&same));
        assert_eq!((same[5], page[5], page[6]), (1, 2, 1));
        let memory = page.as_ptr();
        page.make_mut()[6] = 3;
        assert_eq!(page.as_ptr(), memory);
        assert!(page.as_ptr().addr().is_multiple_of(PAGE_BYTES));
        assert!(Page::zeroed().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn pages_and_buffers_go_from_thread_to_thread() {
        let pages: Vec<Page> = (0..2000_u32).map(|n| Page::of(&[n as u8; PAGE_BYTES])).collect();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let pages = pages.clone();
                scope.spawn(move || {
                    for (n, mut page) in pages.into_iter().enumerate() {
                        page.make_mut()[0] ^= 1;
                        assert_eq!((page[0], page[1]), (n as u8 ^ 1, n as u8));
                        let mut buffer = Buffer::new(n * 1000);
                        buffer.fill(n as u8);
                        assert!(buffer.as_ptr().addr().is_multiple_of(PAGE_BYTES));
                    }
                });
            }
        });
        assert!(pages.iter().enumerate().all(|(n, page)| page.iter().all(|byte| *byte == n as u8)));
    }
}
