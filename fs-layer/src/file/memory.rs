//! Memory for the contents of files: aligned, so that disks can move it without a copy, and used again.
//!
//! Memory that the system has just given out costs more than filling it: each page is a fault. So what is let go of is kept for the next who needs
//! it. [`Page`]s come from regions that are never given back, as many as the page cache ever had. Longer reads use [`AlignedBuf`].

use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use blockd::buf::AlignedBuf;

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
    let region = AlignedBuf::zeroed(REGION_BYTES);
    // Never given back: its pages belong to the list from now on.
    let region = Box::leak(Box::new(region));
    // The first is taken first, so that pages taken in a row follow each other.
    free.extend(region.as_chunks_mut::<PAGE_BYTES>().0.iter_mut().rev().map(|page| Free(NonNull::from(page))));
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
    fn pages_go_from_thread_to_thread() {
        let pages: Vec<Page> = (0..2000_u32).map(|n| Page::of(&[n as u8; PAGE_BYTES])).collect();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let pages = pages.clone();
                scope.spawn(move || {
                    for (n, mut page) in pages.into_iter().enumerate() {
                        page.make_mut()[0] ^= 1;
                        assert_eq!((page[0], page[1]), (n as u8 ^ 1, n as u8));
                    }
                });
            }
        });
        assert!(pages.iter().enumerate().all(|(n, page)| page.iter().all(|byte| *byte == n as u8)));
    }
}
