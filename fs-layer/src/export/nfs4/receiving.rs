//! Records out of a stream of bytes (RFC 5531 section 11): what has come of the next one.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Instant;

use super::rpc::LAST_FRAGMENT;

/// Bytes received at a time, but for the data of large records.
const BUFFER: usize = 16 << 10;
/// So much of a fragment that is not there yet is received where it belongs.
const IN_PLACE: usize = 4 << 10;
/// Most fragments of a record.
const FRAGMENTS_MAX: usize = 64;
const MARK: usize = 4;

/// What there is.
#[derive(Debug)]
pub(super) enum Progress {
    /// A record.
    Record(Vec<u8>),
    /// Not all of one.
    NotYet,
    /// The peer sends no more.
    Ended,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Receiving {
    /// Most bytes of a record.
    max: usize,
    buffer: Box<[u8]>,
    /// What of the buffer was not looked at.
    start: usize,
    end: usize,
    /// The record's fragments so far.
    record: Vec<u8>,
    /// Bytes of the fragment that are still to come, and whether it is the last one; `None` before its mark.
    fragment: Option<(usize, bool)>,
    fragments: usize,
    begun: Option<Instant>,
}

impl Receiving {
    pub(super) fn new(max: usize) -> Receiving {
        Receiving {
            max,
            buffer: Box::new([0; BUFFER]),
            start: 0,
            end: 0,
            record: Vec::new(),
            fragment: None,
            fragments: 0,
            begun: None,
        }
    }

    /// Since when a record has been there in part.
    pub(super) fn begun(&self) -> Option<Instant> {
        self.begun
    }

    /// Whether a record may be had from what was received. A fragment that is not the last may say so in vain.
    pub(super) fn has_whole_record(&self) -> bool {
        let there = self.end - self.start;
        match (self.fragment, self.buffer[self.start..self.end].first_chunk()) {
            (Some((left, _)), _) => there >= left,
            (None, Some(mark)) => there - MARK >= split(u32::from_be_bytes(*mark)).0,
            (None, None) => false,
        }
    }

    /// The next record. Does not wait.
    ///
    /// # Errors
    /// The peer sends what is no record, or the connection is broken.
    pub(super) fn next(&mut self, socket: BorrowedFd<'_>) -> io::Result<Progress> {
        loop {
            if let Some(record) = self.take()? {
                self.begun = None;
                return Ok(Progress::Record(record));
            }
            let got = match self.fragment {
                Some((left, _)) if left >= IN_PLACE => self.receive_in_place(socket, left),
                _ => self.fill(socket),
            };
            match got {
                Ok(0) => return Ok(Progress::Ended),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let partial = self.fragment.is_some() || self.fragments > 0 || self.start < self.end;
                    if !partial {
                        self.begun = None;
                    } else if self.begun.is_none() {
                        self.begun = Some(Instant::now());
                    }
                    return Ok(Progress::NotYet);
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// A record out of the buffer, or as much of it as is there.
    fn take(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            let there = &self.buffer[self.start..self.end];
            let Some((left, last)) = self.fragment else {
                let Some(mark) = there.first_chunk() else { return Ok(None) };
                let (len, last) = split(u32::from_be_bytes(*mark));
                if self.record.len() + len > self.max {
                    return Err(io::Error::other(format!("a record of more than {} bytes", self.max)));
                }
                if self.fragments == FRAGMENTS_MAX {
                    return Err(io::Error::other(format!("a record of more than {FRAGMENTS_MAX} fragments")));
                }
                self.start += MARK;
                self.fragments += 1;
                self.fragment = Some((len, last));
                // Memory that nothing arrives in is not touched.
                self.record.reserve_exact(len);
                continue;
            };
            let taken = left.min(there.len());
            self.record.extend_from_slice(&there[..taken]);
            self.start += taken;
            if taken < left {
                self.fragment = Some((left - taken, last));
                return Ok(None);
            }
            self.fragment = None;
            if last {
                self.fragments = 0;
                return Ok(Some(std::mem::take(&mut self.record)));
            }
        }
    }

    fn fill(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let free = &mut self.buffer[self.end..];
        // SAFETY: the bytes to be written are borrowed for that.
        let got = unsafe { receive(socket, free.as_mut_ptr(), free.len()) }?;
        self.end += got;
        Ok(got)
    }

    /// Behind what there is of the record; the buffer is empty then.
    fn receive_in_place(&mut self, socket: BorrowedFd<'_>, left: usize) -> io::Result<usize> {
        let (_, last) = self.fragment.expect("within a fragment");
        let free = &mut self.record.spare_capacity_mut()[..left];
        // SAFETY: the bytes to be written are borrowed for that.
        let got = unsafe { receive(socket, free.as_mut_ptr().cast(), left) }?;
        // SAFETY: so many bytes were written.
        unsafe { self.record.set_len(self.record.len() + got) };
        self.fragment = Some((left - got, last));
        Ok(got)
    }
}

/// The length of a fragment, and whether it is the last one.
fn split(mark: u32) -> (usize, bool) {
    ((mark & !LAST_FRAGMENT) as usize, mark & LAST_FRAGMENT != 0)
}

/// # Safety
/// `len` bytes from `at` on can be written, initialised or not.
unsafe fn receive(socket: BorrowedFd<'_>, at: *mut u8, len: usize) -> io::Result<usize> {
    // SAFETY: the caller says so.
    let got = unsafe { libc::recv(socket.as_raw_fd(), at.cast(), len, libc::MSG_DONTWAIT) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::Shutdown;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn fragment(data: &[u8], last: bool) -> Vec<u8> {
        let mark = data.len() as u32 | if last { LAST_FRAGMENT } else { 0 };
        [&mark.to_be_bytes()[..], data].concat()
    }

    #[test]
    fn records_come_out_as_they_went_in_however_they_are_cut() {
        let long: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        let records: Vec<Vec<u8>> = vec![vec![1, 2, 3], vec![], long.clone(), vec![9; 5000], long[..17_000].to_vec()];
        for (piece, cut) in [(1, 1), (3, 7), (1000, 4096), (1 << 20, 1 << 20), (1 << 20, 20_000)] {
            let mut bytes = Vec::new();
            for record in &records {
                // Few enough fragments.
                let cut = cut.max(record.len() / 60 + 1);
                let mut parts: Vec<&[u8]> = record.chunks(cut).collect();
                let last = parts.pop().unwrap_or_default();
                parts.iter().for_each(|part| bytes.extend(fragment(part, false)));
                bytes.extend(fragment(last, true));
            }
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            let mut receiving = Receiving::new(1 << 17);
            let mut found = Vec::new();
            for part in bytes.chunks(piece.min(64 << 10)) {
                ours.write_all(part).unwrap();
                loop {
                    match receiving.next(theirs.as_fd()).unwrap() {
                        Progress::Record(record) => found.push(record),
                        Progress::NotYet => break,
                        Progress::Ended => panic!("it goes on"),
                    }
                    assert!(receiving.begun().is_none());
                }
                assert!(!receiving.has_whole_record() || piece == 1, "all that was there was taken");
            }
            assert_eq!(found, records);
            assert!(receiving.begun().is_none());
            ours.shutdown(Shutdown::Both).unwrap();
            assert!(matches!(receiving.next(theirs.as_fd()).unwrap(), Progress::Ended));
        }
    }

    #[test]
    fn what_is_too_long_is_refused() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut receiving = Receiving::new(1000);
        ours.write_all(&fragment(&[1; 600], false)).unwrap();
        assert!(matches!(receiving.next(theirs.as_fd()).unwrap(), Progress::NotYet));
        assert!(receiving.begun().is_some());
        ours.write_all(&fragment(&[1; 600], true)).unwrap();
        receiving.next(theirs.as_fd()).unwrap_err();

        let mut receiving = Receiving::new(1000);
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        (0..=FRAGMENTS_MAX).for_each(|_| ours.write_all(&fragment(&[], false)).unwrap());
        receiving.next(theirs.as_fd()).unwrap_err();
    }
}
