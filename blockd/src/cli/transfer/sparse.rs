//! Holes in files and zeroes in memory: what need not be moved.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// Zeroes count as a gap only in whole blocks of this many bytes, so that a gap is worth a request of its own.
const GRAIN: usize = 64 << 10;

/// The next range of `file` at or after `from` that may hold data, none when only hole is left. File systems that know
/// no holes call everything data.
pub(super) fn next_data(file: &File, from: u64, size: u64) -> io::Result<Option<Range<u64>>> {
    if from >= size {
        return Ok(None);
    }
    let start = match seek(file, from, libc::SEEK_DATA) {
        Ok(start) => start,
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
        // Not a file system that can tell.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(Some(from..size)),
        Err(error) => return Err(error),
    };
    if start >= size {
        return Ok(None);
    }
    let end = seek(file, start, libc::SEEK_HOLE)?;
    Ok(Some(start..end.min(size)))
}

fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<u64> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: lseek takes no pointers, and the descriptor is open.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    u64::try_from(found).map_err(|_| io::Error::last_os_error())
}

/// The parts of `data` that are not zero, in order. `data` begins at a multiple of [`GRAIN`].
pub(super) fn nonzero(data: &[u8]) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for (index, grain) in data.chunks(GRAIN).enumerate() {
        if is_zero(grain) {
            continue;
        }
        let start = index * GRAIN;
        let end = start + grain.len();
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}

fn is_zero(data: &[u8]) -> bool {
    // Comparing with itself, one byte on, is a memcmp.
    data.first().is_none_or(|first| *first == 0) && data.get(1..).is_none_or(|rest| rest == &data[..rest.len()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn zeroes_are_found_in_whole_grains() {
        let mut data = vec![0; 4 * GRAIN + 100];
        assert!(nonzero(&data).is_empty());
        assert!(nonzero(&[]).is_empty());
        data[0] = 1;
        data[GRAIN + 5] = 1;
        data[4 * GRAIN + 99] = 1;
        assert_eq!(nonzero(&data), [0..2 * GRAIN, 4 * GRAIN..4 * GRAIN + 100]);
    }

    #[test]
    fn one_byte_anywhere_is_not_zero() {
        for at in [0, 1, 77, GRAIN - 1] {
            let mut data = vec![0; GRAIN];
            data[at] = 0x80;
            assert!(!is_zero(&data), "{at}");
        }
        assert!(!is_zero(&[7; 32]) && is_zero(&[0]) && is_zero(&[]));
    }

    #[test]
    fn holes_are_skipped() {
        let file = tempfile::tempfile().unwrap();
        let size = 8 << 20;
        file.set_len(size).unwrap();
        assert_eq!(next_data(&file, size, size).unwrap(), None);
        file.write_all_at(&[1; 4096], 4 << 20).unwrap();
        let mut covered = 0;
        let mut at = 0;
        while let Some(range) = next_data(&file, at, size).unwrap() {
            assert!(range.start >= at && range.end > range.start && range.end <= size);
            covered += u64::from(range.contains(&(4 << 20)));
            at = range.end;
        }
        assert_eq!(covered, 1);
    }
}
