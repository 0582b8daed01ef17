//! Small synced writes of a few hot blocks, among everything else that can be done with them: their contents go to the journal, and nothing that
//! comes to the same addresses otherwise may be undone by it.

use super::*;

/// Files and blocks that most of it is about.
const HOT_FILES: usize = 3;
const HOT_BLOCKS: usize = 12;
const BLOCK: usize = 4096;

impl Simulation {
    /// One operation; `false` if the power went.
    pub fn operate_small(&mut self) -> bool {
        let files = self.model.files(FileKind::File);
        let hot = &files[..files.len().min(HOT_FILES)];
        let Some(ino) = self.pick(hot) else { return self.operate() };
        match self.random.random_range(0..24) {
            0..13 => {
                let block = self.random.random_range(0..HOT_BLOCKS) * BLOCK;
                let (offset, len) = match self.random.random_range(0..4) {
                    0 => (block + self.random.random_range(0..BLOCK), self.random.random_range(1..BLOCK)),
                    1 => (block, self.random.random_range(1..=4 * BLOCK)),
                    _ => (block, BLOCK),
                };
                self.put(ino, offset, len) && (self.random.random_bool(0.1) || self.sync_file(ino, false))
            }
            13..15 => {
                // So much that it goes to its addresses, but for those that the journal holds.
                let offset = self.random.random_range(0..HOT_BLOCKS) * BLOCK;
                let len = self.random.random_range(5..25) * BLOCK;
                self.put(ino, offset, len)
                    && match self.random.random_range(0..3) {
                        0 => self.sync_file(ino, false),
                        1 => self.tick(),
                        _ => true,
                    }
            }
            15..17 => {
                let size = self.model.node(ino).expect("picked").data.len();
                let size = self.random.random_range(0..=size.min(HOT_BLOCKS * BLOCK));
                let set = SetAttributes { size: Some(size as u64), ..SetAttributes::default() };
                let result = self.fs().setattr(&who(), Ino(ino), &set, false);
                let mut after = self.model.clone();
                let model = after.truncate(ino, size);
                let judged = self.judge("truncate", &result, model);
                self.done(format!("truncate {ino} to {size}"), judged, after, &[ino])
                    && (self.random.random_bool(0.5) || self.sync_file(ino, false))
            }
            17..19 => {
                let offset = self.random.random_range(0..HOT_BLOCKS * BLOCK);
                let len = self.random.random_range(1..3 * BLOCK);
                let how = [Fallocate::PunchHole, Fallocate::ZeroRangeKeepSize][self.random.random_range(0..2)];
                let result = self.fs().fallocate(&who(), Ino(ino), how, offset as u64, len as u64);
                let mut after = self.model.clone();
                let bytes = Arc::make_mut(&mut after.edit(ino).expect("picked").data);
                let end = (offset + len).min(bytes.len());
                bytes[offset.min(end)..end].fill(0);
                let judged = self.judge("zero", &result, Some(()));
                self.done(format!("zero {how:?} {ino} {offset}+{len}"), judged, after, &[ino])
                    && (self.random.random_bool(0.5) || self.sync_file(ino, false))
            }
            19..21 => {
                let to = self.pick(&files[..files.len().min(HOT_FILES)]).expect("one was picked");
                let blocks = self.model.node(ino).expect("picked").data.len() / BLOCK;
                if blocks == 0 {
                    return true;
                }
                let at = self.random.random_range(0..blocks);
                let len = self.random.random_range(1..=(blocks - at).min(6)) * BLOCK;
                let (at, target) = (at * BLOCK, self.random.random_range(0..HOT_BLOCKS) * BLOCK);
                let result = self.fs().clone_range(&who(), (Ino(ino), at as u64), (Ino(to), target as u64), len as u64);
                let mut after = self.model.clone();
                let model = after.clone_range((ino, at), (to, target), len);
                let judged = self.judge("clone", &result, model);
                self.done(format!("clone {ino} {at}+{len} to {to} {target}"), judged, after, &[to])
                    && (self.random.random_bool(0.5) || self.sync_file(to, false))
            }
            21 => self.tick(),
            _ => self.operate(),
        }
    }

    pub fn tick(&mut self) -> bool {
        self.log.push("tick".into());
        self.fs().tick().is_ok()
    }

    fn put(&mut self, ino: u64, offset: usize, len: usize) -> bool {
        let byte = self.random.random_range(1..=255u8);
        let data: Vec<u8> = (0..len).map(|at| byte.wrapping_add((at / 100) as u8) | 1).collect();
        let result = self.fs().write(&who(), Ino(ino), WriteAt::Offset(offset as u64), &data);
        let mut after = self.model.clone();
        let model = after.write(ino, offset, &data);
        let judged = self.judge("write", &result, model);
        self.done(format!("write {ino} {offset}+{len}"), judged, after, &[ino])
    }
}
