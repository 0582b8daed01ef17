//! How long bringing a chunk of scattered 4 KiB writes into the translation table takes: the part of destaging that is not
//! compression or upload.
//!
//! `cargo run --release --offline --workspace --example apply_speed [GIB] [CHUNKS]`: a volume of GIB (default 16) written
//! once in order, then CHUNKS (default 200) chunks of 4096 random blocks each.

use std::time::{Duration, Instant};

use blockd::buf::{AlignedBuf, Slice};
use blockd::chunk::{ChunkDraft, ChunkIndex, ChunkName, Codec, Piece};
use blockd::table::Table;
use blockd::types::{BLOCK, VolumeId};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const CHUNK_BLOCKS: u64 = 4096;

fn chunk(seq: u64, pieces: Vec<Piece>) -> ChunkIndex {
    let name = ChunkName { volume: VolumeId([1; 16]), epoch: 1, seq };
    let draft = ChunkDraft { name, first_lsn: seq, last_lsn: seq, codec: Codec::None, created_ms: 0, pieces };
    draft.encode(None).expect("a sound draft").index
}

fn main() {
    let number = |n: usize, default: u64| std::env::args().nth(n).map_or(default, |arg| arg.parse().expect("a number"));
    let (gib, chunks) = (number(1, 16), number(2, 200));
    let blocks = gib << 18;
    let dir = std::env::temp_dir().join(format!("apply-speed-{}", std::process::id()));
    let table = Table::open(&dir, 64 << 20, VolumeId([1; 16])).expect("a new table");
    let mut rng = SmallRng::seed_from_u64(1);
    let block = Slice::from(AlignedBuf::zeroed(BLOCK));
    let whole = Slice::from(AlignedBuf::zeroed(CHUNK_BLOCKS as usize * BLOCK));
    let mut seq = 0;

    let mut sequential = Duration::ZERO;
    for lba in (0..blocks).step_by(CHUNK_BLOCKS as usize) {
        seq += 1;
        let index = chunk(seq, vec![Piece::Data { lba, data: whole.clone() }]);
        let started = Instant::now();
        table.apply(&index).expect("applied");
        sequential += started.elapsed();
    }
    println!("in order: {:.2} ms a chunk", sequential.as_secs_f64() * 1e3 / seq as f64);

    let mut times = Vec::new();
    for _ in 0..chunks {
        seq += 1;
        let mut lbas: Vec<u64> = (0..CHUNK_BLOCKS).map(|_| rng.random_range(0..blocks)).collect();
        lbas.sort_unstable();
        lbas.dedup();
        let index = chunk(seq, lbas.iter().map(|lba| Piece::Data { lba: *lba, data: block.clone() }).collect());
        let started = Instant::now();
        table.apply(&index).expect("applied");
        times.push(started.elapsed());
    }
    times.sort_unstable();
    let mean = times.iter().sum::<Duration>().as_secs_f64() * 1e3 / chunks as f64;
    let at = |part: usize| times[(times.len() - 1) * part / 100].as_secs_f64() * 1e3;
    println!("at random: mean {mean:.1} ms a chunk, median {:.1}, 95th {:.1}", at(50), at(95));
    let _ = std::fs::remove_dir_all(&dir);
}
