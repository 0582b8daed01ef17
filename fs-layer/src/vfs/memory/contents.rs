//! What is in a file: blocks, and holes where there are none.

use std::collections::BTreeMap;

const BLOCK: u64 = 4096;

/// The contents of a file. Bytes behind `size` in its last block are zero.
#[derive(Clone, Default)]
pub struct Contents {
    pub size: u64,
    blocks: BTreeMap<u64, Box<[u8; BLOCK as usize]>>,
}

impl Contents {
    pub fn stored_bytes(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK
    }

    pub fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let end = self.size.min(offset.saturating_add(len));
        let mut out = vec![0; end.saturating_sub(offset) as usize];
        self.each(offset, out.len() as u64, |block, within, at, len| {
            if let Some(block) = self.blocks.get(&block) {
                out[at..at + len].copy_from_slice(&block[within..within + len]);
            }
        });
        out
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let mut blocks = std::mem::take(&mut self.blocks);
        self.each(offset, data.len() as u64, |block, within, at, len| {
            let block = blocks.entry(block).or_insert_with(|| Box::new([0; BLOCK as usize]));
            block[within..within + len].copy_from_slice(&data[at..at + len]);
        });
        self.blocks = blocks;
        self.size = self.size.max(offset + data.len() as u64);
    }

    /// Calls `f` with the number of a block, where in it, where in the range, and how many bytes.
    fn each(&self, offset: u64, len: u64, mut f: impl FnMut(u64, usize, usize, usize)) {
        let mut at = 0;
        while at < len {
            let within = (offset + at) % BLOCK;
            let part = (BLOCK - within).min(len - at);
            f((offset + at) / BLOCK, within as usize, at as usize, part as usize);
            at += part;
        }
    }

    pub fn set_size(&mut self, size: u64) {
        if size < self.size {
            self.zero(size, self.size - size, true);
        }
        self.size = size;
    }

    /// Zeros within the size; whole blocks become holes if wanted.
    pub fn zero(&mut self, offset: u64, len: u64, punch: bool) {
        let end = offset.saturating_add(len).min(self.size.next_multiple_of(BLOCK));
        let inside: Vec<u64> = self.blocks.range(offset / BLOCK..=end / BLOCK).map(|(block, _)| *block).collect();
        for number in inside {
            let (from, to) = (offset.max(number * BLOCK), end.min((number + 1) * BLOCK));
            if from >= to {
                continue;
            }
            // A range up to the end of the file takes its last block with it.
            if punch && from == number * BLOCK && (to == (number + 1) * BLOCK || to >= self.size) {
                self.blocks.remove(&number);
            } else if let Some(block) = self.blocks.get_mut(&number) {
                block[(from - number * BLOCK) as usize..(to - number * BLOCK) as usize].fill(0);
            }
        }
    }

    /// Gives every block of a range a place.
    pub fn allocate(&mut self, offset: u64, len: u64) {
        for block in offset / BLOCK..(offset + len).div_ceil(BLOCK) {
            self.blocks.entry(block).or_insert_with(|| Box::new([0; BLOCK as usize]));
        }
    }

    /// The next data or hole from `offset` on; `None` at and past the end.
    pub fn seek(&self, offset: u64, data: bool) -> Option<u64> {
        if offset >= self.size {
            return None;
        }
        let mut block = offset / BLOCK;
        if data {
            let next = *self.blocks.range(block..).next()?.0;
            return Some(offset.max(next * BLOCK)).filter(|at| *at < self.size);
        }
        while self.blocks.contains_key(&block) {
            block += 1;
        }
        Some(offset.max(block * BLOCK).min(self.size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_found() {
        let mut contents = Contents::default();
        contents.write(8192, b"x");
        assert_eq!(
            (contents.seek(0, true), contents.seek(0, false), contents.seek(8192, false)),
            (Some(8192), Some(0), Some(8193))
        );
        contents.zero(8192, 1, true);
        assert_eq!((contents.stored_bytes(), contents.seek(0, true)), (0, None));
        contents.write(0, &[7; 5000]);
        contents.set_size(10);
        contents.set_size(20);
        assert_eq!(contents.read(0, 100), [[7; 10], [0; 10]].concat());
    }
}
