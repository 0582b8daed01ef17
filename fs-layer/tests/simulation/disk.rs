//! A disk that loses power: what no flush covered survives, is lost, or is torn at 512 bytes, each block for itself.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use fs_layer::disk::{BLOCK_BYTES, BlockAddress, Disk, MemoryDisk};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

type Block = Arc<[u8; BLOCK_BYTES]>;

#[derive(Default)]
struct State {
    durable: BTreeMap<BlockAddress, Block>,
    /// What was written since the last flush, in order; `None`: discarded.
    pending: BTreeMap<BlockAddress, Vec<Option<Block>>>,
    /// So many more operations until the power goes.
    left: Option<u64>,
    /// One operation in so many fails.
    fails: Option<u32>,
    down: bool,
}

pub struct CrashDisk {
    state: Mutex<State>,
    random: Mutex<SmallRng>,
}

impl CrashDisk {
    pub fn new(seed: u64) -> CrashDisk {
        CrashDisk { state: Mutex::default(), random: Mutex::new(SmallRng::seed_from_u64(seed)) }
    }

    /// The power goes after so many more operations.
    pub fn crash_after(&self, operations: Option<u64>) {
        self.lock().left = operations;
    }

    /// One operation in so many fails from now on.
    pub fn fail_one_in(&self, fails: Option<u32>) {
        self.lock().fails = fails;
    }

    pub fn is_down(&self) -> bool {
        self.lock().down
    }

    /// A disk that holds what this one shows now.
    pub fn copy(&self) -> MemoryDisk {
        let state = self.lock();
        let copy = MemoryDisk::new(self.blocks());
        for (at, block) in &state.durable {
            copy.write(*at, &block[..]).expect("it is in memory");
        }
        for (at, versions) in &state.pending {
            match versions.last() {
                Some(Some(block)) => copy.write(*at, &block[..]).expect("it is in memory"),
                _ => copy.discard(*at, 1).expect("it is in memory"),
            }
        }
        copy
    }

    /// The power comes back: what is found then is what survived.
    pub fn restart(&self) {
        let mut random = self.random.lock().expect("random");
        let mut state = self.lock();
        let (lost, torn) = match random.random_range(0..4) {
            0 => (1.0, 0.0),
            1 => (0.0, 0.0),
            2 => (0.5, 0.0),
            _ => (0.4, 0.5),
        };
        let pending = std::mem::take(&mut state.pending);
        for (at, versions) in pending {
            for version in versions {
                if random.random_bool(lost) {
                    continue;
                }
                match version {
                    None => {
                        state.durable.remove(&at);
                    }
                    Some(new) => {
                        let mut block = state.durable.get(&at).map_or([0; BLOCK_BYTES], |old| **old);
                        let tear = random.random_bool(torn);
                        for (old, new) in block.chunks_mut(512).zip(new.chunks(512)) {
                            if !tear || random.random_bool(0.5) {
                                old.copy_from_slice(new);
                            }
                        }
                        state.durable.insert(at, Arc::new(block));
                    }
                }
            }
        }
        state.down = false;
        state.left = None;
        state.fails = None;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the disk's state")
    }

    /// Counts an operation; fails if the power is gone or it is its turn to fail.
    fn operation(&self, state: &mut State) -> io::Result<()> {
        if state.down {
            return Err(io::Error::other("the power is gone"));
        }
        if let Some(left) = &mut state.left {
            if *left == 0 {
                state.down = true;
                return Err(io::Error::other("the power is gone"));
            }
            *left -= 1;
        }
        if let Some(fails) = state.fails
            && self.random.lock().expect("random").random_range(0..fails) == 0
        {
            return Err(io::Error::other("simulated failure"));
        }
        Ok(())
    }
}

impl Disk for CrashDisk {
    fn blocks(&self) -> u64 {
        1 << 40
    }

    fn read(&self, at: BlockAddress, buffer: &mut [u8]) -> io::Result<()> {
        let mut state = self.lock();
        // Reads do not count as points to crash at: nothing differs between two of them.
        if state.down {
            return Err(io::Error::other("the power is gone"));
        }
        if state.fails.is_some() {
            self.operation(&mut state)?;
        }
        for (index, chunk) in buffer.chunks_mut(BLOCK_BYTES).enumerate() {
            let at = at + index as u64;
            let found = match state.pending.get(&at).and_then(|versions| versions.last()) {
                Some(version) => version.as_ref(),
                None => state.durable.get(&at),
            };
            match found {
                Some(block) => chunk.copy_from_slice(&block[..]),
                None => chunk.fill(0),
            }
        }
        Ok(())
    }

    fn write(&self, at: BlockAddress, data: &[u8]) -> io::Result<()> {
        for (index, chunk) in data.chunks(BLOCK_BYTES).enumerate() {
            let mut state = self.lock();
            self.operation(&mut state)?;
            let block = Arc::new(chunk.try_into().expect("whole blocks"));
            state.pending.entry(at + index as u64).or_default().push(Some(block));
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let mut state = self.lock();
        self.operation(&mut state)?;
        let pending = std::mem::take(&mut state.pending);
        for (at, mut versions) in pending {
            match versions.pop().flatten() {
                Some(block) => state.durable.insert(at, block),
                None => state.durable.remove(&at),
            };
        }
        Ok(())
    }

    fn discard(&self, at: BlockAddress, count: u64) -> io::Result<()> {
        let mut state = self.lock();
        self.operation(&mut state)?;
        let there: Vec<_> = state
            .durable
            .range(at..at + count)
            .map(|(at, _)| *at)
            .chain(state.pending.range(at..at + count).map(|(at, _)| *at))
            .collect();
        for at in there {
            state.pending.entry(at).or_default().push(None);
        }
        Ok(())
    }

    fn can_remap(&self) -> bool {
        true
    }

    /// Like writes of what is read now, so that a crash leaves parts of it.
    fn remap(&self, from: BlockAddress, to: BlockAddress, count: u64) -> io::Result<()> {
        for index in 0..count {
            let mut block = [0; BLOCK_BYTES];
            self.read(from + index, &mut block)?;
            self.write(to + index, &block)?;
        }
        Ok(())
    }
}
