//! What a volume must hold, kept beside it while it is written.

use std::time::{Duration, Instant};

use blockd::export::nbd::client::NbdClient;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

const BLOCK: usize = 4096;

/// The expected contents of a volume that only this writes to.
pub struct Shadow {
    bytes: Vec<u8>,
    rng: SmallRng,
    /// The longest that any write, zero, trim or flush took.
    pub slowest: Duration,
}

impl Shadow {
    /// Of a new volume of `size` bytes.
    pub fn new(size: usize, seed: u64) -> Self {
        Self { bytes: vec![0; size], rng: SmallRng::seed_from_u64(seed), slowest: Duration::ZERO }
    }

    /// Writes fresh bytes that no compression makes smaller.
    pub fn write(&mut self, client: &mut NbdClient, offset: usize, len: usize) {
        self.expect(offset, len);
        let begun = Instant::now();
        client.write(offset as u64, &self.bytes[offset..offset + len]).unwrap();
        self.slowest = self.slowest.max(begun.elapsed());
    }

    /// What [`Shadow::write`] would write next.
    pub fn expect(&mut self, offset: usize, len: usize) -> &[u8] {
        let data = &mut self.bytes[offset..offset + len];
        self.rng.fill_bytes(data);
        data
    }

    /// Makes what was written durable.
    pub fn flush(&mut self, client: &mut NbdClient) {
        let begun = Instant::now();
        client.flush().unwrap();
        self.slowest = self.slowest.max(begun.elapsed());
    }

    /// Makes `count` requests of many kinds and sizes anywhere in the volume, about `count` times 40 KiB.
    pub fn scribble(&mut self, client: &mut NbdClient, count: usize) {
        for _ in 0..count {
            let kind = self.rng.random_range(0..20);
            let mut len = match kind {
                0..8 => BLOCK,
                8..14 => self.rng.random_range(1..=16) * BLOCK,
                14..16 => self.rng.random_range(1..=64) * BLOCK,
                _ => self.rng.random_range(1..=8 * BLOCK),
            };
            let mut offset = self.rng.random_range(0..self.bytes.len() - len);
            if kind < 19 {
                offset -= offset % BLOCK;
            }
            if kind == 17 {
                // Partial blocks at the edges of a trim are left alone.
                len -= len % BLOCK;
            }
            let begun = Instant::now();
            match kind {
                16 | 17 => {
                    self.bytes[offset..offset + len].fill(0);
                    let (offset, len) = (offset as u64, len as u32);
                    if kind == 16 { client.zero(offset, len) } else { client.trim(offset, len) }.unwrap();
                }
                _ => self.write(client, offset, len),
            }
            self.slowest = self.slowest.max(begun.elapsed());
        }
    }

    /// Reads a few places and compares.
    pub fn probe(&mut self, client: &mut NbdClient, count: usize) {
        for _ in 0..count {
            let len = self.rng.random_range(1..=32 * BLOCK);
            let offset = self.rng.random_range(0..self.bytes.len() - len);
            self.check(client, offset, len);
        }
    }

    /// Compares a range.
    pub fn check(&self, client: &mut NbdClient, offset: usize, len: usize) {
        let mut found = vec![0; len];
        for (n, piece) in found.chunks_mut(1 << 20).enumerate() {
            client.read((offset + (n << 20)) as u64, piece).unwrap_or_else(|e| panic!("read at {offset}+{n} MiB: {e}"));
        }
        let expected = &self.bytes[offset..offset + len];
        // Block by block, because assert_eq would print megabytes.
        let wrong: Vec<usize> = (0..len)
            .step_by(BLOCK)
            .filter(|&at| {
                let end = len.min(at + BLOCK);
                found[at..end] != expected[at..end]
            })
            .map(|at| offset + at)
            .collect();
        assert!(wrong.is_empty(), "{} blocks are wrong, at {:?}", wrong.len(), &wrong[..wrong.len().min(10)]);
    }

    /// Compares everything.
    pub fn check_all(&self, client: &mut NbdClient) {
        assert_eq!(client.size(), self.bytes.len() as u64);
        self.check(client, 0, self.bytes.len());
    }

    /// The expected bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}
