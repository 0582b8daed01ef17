//! What a written sector holds: enough to know, from any sector, who wrote it.

/// The unit of the model, in bytes. Requests are multiples of it.
pub const SECTOR: usize = 512;
/// Sectors in a block; a write is never torn inside a block.
pub const BLOCK_SECTORS: u32 = 8;

/// Names a write in the model. 0 stands for "zeroes from the beginning".
pub type WriteId = u32;

const MAGIC: u64 = 0x5ec7_04c0_47e4_7a11;
const WORDS: usize = SECTOR / 8;

/// What a sector turned out to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// All zeroes.
    Zeroes,
    /// Exactly what this write puts there.
    Written(WriteId),
    /// Nothing that was ever written here by this run.
    Garbage,
}

/// Fills `buf` with what write `id` puts at `sector` and following.
pub fn fill(seed: u64, id: WriteId, sector: u32, buf: &mut [u8]) {
    for (index, piece) in buf.chunks_exact_mut(SECTOR).enumerate() {
        words(seed, id, sector + index as u32, |at, word| {
            piece[at * 8..at * 8 + 8].copy_from_slice(&word.to_le_bytes());
        });
    }
}

/// Tells what `piece`, read from `sector`, holds.
pub fn identify(seed: u64, sector: u32, piece: &[u8]) -> Found {
    if piece.iter().all(|byte| *byte == 0) {
        return Found::Zeroes;
    }
    let word = |at: usize| u64::from_le_bytes(piece[at * 8..at * 8 + 8].try_into().unwrap_or_default());
    let id = (word(1) >> 32) as WriteId;
    let mut same = true;
    words(seed, id, sector, |at, expected| same &= word(at) == expected);
    if same && id != 0 { Found::Written(id) } else { Found::Garbage }
}

/// Three words of identity, then filler: random for odd writes, repeated for even ones, so that compressors meet both.
fn words(seed: u64, id: WriteId, sector: u32, mut each: impl FnMut(usize, u64)) {
    each(0, MAGIC);
    each(1, u64::from(id) << 32 | u64::from(sector));
    each(2, seed);
    let mut state = seed ^ (u64::from(id) << 32 | u64::from(sector)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for at in 3..WORDS {
        if id % 2 == 1 || at == 3 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
        }
        each(at, state | 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_names_its_writer_and_place() {
        let mut buf = vec![0; 4 * SECTOR];
        fill(7, 42, 100, &mut buf);
        for (index, piece) in buf.chunks_exact(SECTOR).enumerate() {
            assert_eq!(identify(7, 100 + index as u32, piece), Found::Written(42));
            assert_eq!(identify(7, 99, piece), Found::Garbage);
            assert_eq!(identify(8, 100 + index as u32, piece), Found::Garbage);
        }
        buf[SECTOR - 1] ^= 1;
        assert_eq!(identify(7, 100, &buf[..SECTOR]), Found::Garbage);
        assert_eq!(identify(7, 100, &[0; SECTOR]), Found::Zeroes);
    }
}
