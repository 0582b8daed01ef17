//! The oracle: which writes each sector may hold the result of.
//!
//! A logical clock orders events. A write is *submitted* before its bytes are sent and *acknowledged* after its reply was
//! read; a crash ends every write still in flight, applied or not. Of two writes of one sector, the later submitted
//! one surely wins if the other had ended before; otherwise either may. So each sector has a list of candidates: adding a
//! write when it is submitted, and when a write is acknowledged, dropping those that had ended before it began.
//!
//! Zeroes do not say who wrote them; where the model would need to know, it assumes what excuses the server.

use super::content::{BLOCK_SECTORS, Found, WriteId};

/// What a modelled operation leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Content of [`super::content::fill`].
    Data,
    /// Zeroes.
    Zeroes,
    /// Zeroes in the whole blocks inside the range; at its ragged edges zeroes or what was there.
    Trim,
}

/// Time by the model's clock.
pub type Time = u64;

const NEVER: Time = Time::MAX;

#[derive(Clone, Copy, Debug)]
struct Write {
    start: u32,
    count: u32,
    kind: Kind,
    submitted: Time,
    /// Acknowledged, or cut off by a crash.
    ended: Time,
    acknowledged: bool,
}

impl Write {
    fn covers(&self, sector: u32) -> bool {
        sector >= self.start && sector - self.start < self.count
    }

    /// Whether the server must have applied it to this sector once it is acknowledged.
    fn binds(&self, sector: u32) -> bool {
        let block = sector - sector % BLOCK_SECTORS;
        self.kind != Kind::Trim || (self.covers(block) && self.covers(block + BLOCK_SECTORS - 1))
    }

    fn matches(&self, found: Found, id: WriteId) -> bool {
        match found {
            Found::Zeroes => self.kind != Kind::Data,
            Found::Written(writer) => writer == id && self.kind == Kind::Data,
            Found::Garbage => false,
        }
    }
}

/// A sector or block that cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The first sector concerned.
    pub sector: u32,
    /// What is wrong, with the history that makes it wrong.
    pub what: String,
}

/// What a read in flight may still bring.
pub struct ReadWindow {
    start: u32,
    began: Time,
    candidates: Vec<Vec<WriteId>>,
}

impl ReadWindow {
    /// The first sector read.
    pub fn start(&self) -> u32 {
        self.start
    }
}

/// See the module.
pub struct Model {
    writes: Vec<Write>,
    sectors: Vec<Vec<WriteId>>,
    /// Zeroing operations, in order of submission.
    zeroings: Vec<WriteId>,
    clock: Time,
    /// Writes before this one have ended.
    since_crash: usize,
    /// Whether a trim may as well do nothing.
    trim_is_advisory: bool,
}

impl Model {
    /// A volume of zeroes.
    pub fn new(sectors: u32, trim_is_advisory: bool) -> Self {
        let beginning =
            Write { start: 0, count: sectors, kind: Kind::Zeroes, submitted: 0, ended: 0, acknowledged: true };
        Self {
            writes: vec![beginning],
            sectors: vec![vec![0]; sectors as usize],
            zeroings: vec![0],
            clock: 1,
            since_crash: 0,
            trim_is_advisory,
        }
    }

    /// Size of the volume.
    pub fn sector_count(&self) -> u32 {
        self.sectors.len() as u32
    }

    fn tick(&mut self) -> Time {
        self.clock += 1;
        self.clock
    }

    /// To be called before the request is sent; the write's name.
    pub fn submit(&mut self, kind: Kind, start: u32, count: u32) -> WriteId {
        let submitted = self.tick();
        let id = self.writes.len() as WriteId;
        self.writes.push(Write { start, count, kind, submitted, ended: NEVER, acknowledged: false });
        for sector in start..start + count {
            self.sectors[sector as usize].push(id);
        }
        if kind != Kind::Data {
            self.zeroings.push(id);
        }
        id
    }

    /// To be called after the reply was read.
    pub fn acknowledge(&mut self, id: WriteId) {
        let ended = self.tick();
        let write = &mut self.writes[id as usize];
        write.ended = ended;
        write.acknowledged = true;
        let write = *write;
        if write.kind == Kind::Trim && self.trim_is_advisory {
            return;
        }
        for sector in write.start..write.start + write.count {
            if write.binds(sector) {
                let writes = &self.writes;
                self.sectors[sector as usize].retain(|other| writes[*other as usize].ended > write.submitted);
            }
        }
    }

    /// The server is gone: everything in flight was applied or never will be.
    pub fn crash(&mut self) -> usize {
        let now = self.tick();
        let mut cut_off = 0;
        for write in &mut self.writes[self.since_crash..] {
            if write.ended == NEVER {
                write.ended = now;
                cut_off += 1;
            }
        }
        self.since_crash = self.writes.len();
        cut_off
    }

    /// To be called before a read is sent.
    pub fn begin_read(&mut self, start: u32, count: u32) -> ReadWindow {
        let range = start as usize..(start + count) as usize;
        ReadWindow { start, began: self.tick(), candidates: self.sectors[range].to_vec() }
    }

    /// Checks what a read brought while others wrote. `found` is one per sector.
    pub fn check_read(&self, window: &ReadWindow, found: &[Found]) -> Result<(), Violation> {
        for (index, found) in found.iter().enumerate() {
            let sector = window.start + index as u32;
            let known = window.candidates[index].iter().any(|id| self.writes[*id as usize].matches(*found, *id));
            let since = |id: WriteId| {
                let write = self.writes.get(id as usize);
                write.is_some_and(|write| {
                    write.submitted > window.began && write.covers(sector) && write.matches(*found, id)
                })
            };
            let new = match found {
                Found::Written(id) => since(*id),
                Found::Zeroes => {
                    let later = self.zeroings.iter().rev();
                    later.take_while(|id| self.writes[**id as usize].submitted > window.began).any(|id| since(*id))
                }
                Found::Garbage => false,
            };
            if !known && !new {
                let candidates = self.describe_all(&window.candidates[index]);
                let what = format!(
                    "a read returned {}; possible was {candidates} or a later write",
                    self.describe_found(*found)
                );
                return Err(Violation { sector, what });
            }
        }
        Ok(())
    }

    /// Checks a block of the stopped server and settles it: from now on it may only be what was found. Returns how
    /// many of its sectors were open before.
    pub fn settle_block(&mut self, start: u32, found: &[Found]) -> Result<usize, Violation> {
        let mut possible: Vec<Vec<WriteId>> = Vec::with_capacity(found.len());
        for (index, found) in found.iter().enumerate() {
            let sector = start + index as u32;
            let candidates = &self.sectors[sector as usize];
            let matching: Vec<WriteId> =
                candidates.iter().copied().filter(|id| self.writes[*id as usize].matches(*found, *id)).collect();
            if matching.is_empty() {
                let what =
                    format!("it holds {}; possible is {}", self.describe_found(*found), self.describe_all(candidates));
                return Err(Violation { sector, what });
            }
            possible.push(matching);
        }
        self.check_torn(start, &possible)?;
        let mut open = 0;
        for (index, matching) in possible.into_iter().enumerate() {
            let list = &mut self.sectors[start as usize + index];
            open += usize::from(list.len() > 1);
            *list = matching;
        }
        Ok(open)
    }

    /// A write found in one sector of a block must be in, or overwritten in, every other sector it covers there.
    fn check_torn(&self, start: u32, possible: &[Vec<WriteId>]) -> Result<(), Violation> {
        for (a, writers_a) in possible.iter().enumerate() {
            for (b, writers_b) in possible.iter().enumerate().skip(a + 1) {
                if writers_a == writers_b {
                    continue;
                }
                let (sector_a, sector_b) = (start + a as u32, start + b as u32);
                let fits = writers_a
                    .iter()
                    .any(|x| writers_b.iter().any(|y| x == y || self.side_by_side(*x, sector_a, *y, sector_b)));
                if !fits {
                    let what = format!(
                        "the block is torn: sector {sector_a} holds {}, sector {sector_b} holds {}",
                        self.describe_all(writers_a),
                        self.describe_all(writers_b)
                    );
                    return Err(Violation { sector: sector_a, what });
                }
            }
        }
        Ok(())
    }

    /// Whether one block can hold `x` in one sector and `y` in another.
    fn side_by_side(&self, x: WriteId, sector_x: u32, y: WriteId, sector_y: u32) -> bool {
        let (wx, wy) = (&self.writes[x as usize], &self.writes[y as usize]);
        let x_over_y = wx.covers(sector_y) && self.surely_applied(wx, sector_y);
        let y_over_x = wy.covers(sector_x) && self.surely_applied(wy, sector_x);
        // If x was applied to y's sector as well, y came later; and the other way round.
        let y_later = wy.ended > wx.submitted;
        let x_later = wx.ended > wy.submitted;
        match (x_over_y, y_over_x) {
            (true, true) => false,
            (true, false) => y_later,
            (false, true) => x_later,
            (false, false) => true,
        }
    }

    /// Whether a write that was applied to some sector of a block was applied to this one too.
    fn surely_applied(&self, write: &Write, sector: u32) -> bool {
        write.kind != Kind::Trim || (write.binds(sector) && !self.trim_is_advisory)
    }

    /// Everything found in a block, for people who look for the cause.
    pub fn describe_block(&self, start: u32, found: &[Found]) -> String {
        let mut text = String::new();
        for (sector, found) in (start..).zip(found) {
            text.push_str(&format!("\n  sector {sector}: {}", self.describe_found(*found)));
        }
        text
    }

    fn describe_found(&self, found: Found) -> String {
        match found {
            Found::Zeroes => "zeroes".to_owned(),
            Found::Garbage => "bytes nobody wrote there".to_owned(),
            Found::Written(id) if (id as usize) < self.writes.len() => self.describe(id),
            Found::Written(id) => format!("write {id}, which was never made"),
        }
    }

    fn describe(&self, id: WriteId) -> String {
        let write = &self.writes[id as usize];
        if id == 0 {
            return "zeroes from the beginning".to_owned();
        }
        let state = match (write.acknowledged, write.ended) {
            (true, ended) => format!("acknowledged at {ended}"),
            (false, NEVER) => "in flight".to_owned(),
            (false, ended) => format!("cut off by the crash at {ended}"),
        };
        format!(
            "{:?} {id} of sectors {}+{} (submitted at {}, {state})",
            write.kind, write.start, write.count, write.submitted
        )
    }

    fn describe_all(&self, ids: &[WriteId]) -> String {
        let all: Vec<String> = ids.iter().map(|id| self.describe(*id)).collect();
        all.join(" or ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Found::{Garbage, Written, Zeroes};

    fn block(found: Found) -> [Found; 8] {
        [found; 8]
    }

    #[test]
    fn an_acknowledged_write_must_be_there() {
        let mut model = Model::new(16, false);
        let a = model.submit(Kind::Data, 0, 8);
        assert!(model.settle_block(0, &block(Garbage)).is_err());
        model.acknowledge(a);
        model.crash();
        assert!(model.settle_block(0, &block(Zeroes)).is_err());
        assert_eq!(model.settle_block(0, &block(Written(a))), Ok(0));
        assert_eq!(model.settle_block(8, &block(Zeroes)), Ok(0));
    }

    #[test]
    fn a_write_in_flight_may_be_there_and_then_stays_what_it_is() {
        for survivor in [Zeroes, Written(1)] {
            let mut model = Model::new(8, false);
            assert_eq!(model.submit(Kind::Data, 0, 8), 1);
            assert_eq!(model.crash(), 1);
            assert_eq!(model.settle_block(0, &block(survivor)), Ok(8));
            let other = if survivor == Zeroes { Written(1) } else { Zeroes };
            assert!(model.settle_block(0, &block(other)).is_err());
        }
    }

    #[test]
    fn order_is_known_only_between_writes_that_do_not_overlap_in_time() {
        let mut model = Model::new(8, false);
        let a = model.submit(Kind::Data, 0, 8);
        let b = model.submit(Kind::Data, 0, 8);
        model.acknowledge(b);
        model.acknowledge(a);
        // Concurrent: either.
        let window = model.begin_read(0, 8);
        assert!(model.check_read(&window, &block(Written(a))).is_ok());
        assert!(model.check_read(&window, &block(Written(b))).is_ok());
        assert!(model.check_read(&window, &block(Zeroes)).is_err());
        // One after both: only that one.
        let c = model.submit(Kind::Zeroes, 0, 8);
        model.acknowledge(c);
        assert!(model.settle_block(0, &block(Written(a))).is_err());
        // A read that began before may still bring the old, or the new, never anything else.
        assert!(model.check_read(&window, &block(Written(b))).is_ok());
        assert!(model.check_read(&window, &block(Zeroes)).is_ok());
        assert!(model.settle_block(0, &block(Zeroes)).is_ok());
    }

    #[test]
    fn torn_blocks_are_seen() {
        let mut model = Model::new(8, false);
        let a = model.submit(Kind::Data, 0, 8);
        model.acknowledge(a);
        let b = model.submit(Kind::Data, 0, 8);
        let c = model.submit(Kind::Data, 4, 2);
        model.crash();
        let mut found = block(Written(a));
        found[3] = Written(b);
        let error = model.settle_block(0, &found).unwrap_err();
        assert!(error.what.contains("torn"), "{error:?}");
        // A smaller write on top of either is not a tear.
        let mut found = block(Written(b));
        found[4] = Written(c);
        found[5] = Written(c);
        assert!(model.settle_block(0, &found).is_ok());
        // Half of the smaller one is.
        let mut model = Model::new(8, false);
        let c = model.submit(Kind::Data, 4, 2);
        model.crash();
        let mut found = block(Zeroes);
        found[5] = Written(c);
        assert!(model.settle_block(0, &found).is_err());
    }

    #[test]
    fn a_trim_binds_whole_blocks() {
        let mut model = Model::new(24, false);
        let a = model.submit(Kind::Data, 0, 24);
        model.acknowledge(a);
        let trim = model.submit(Kind::Trim, 4, 16);
        model.acknowledge(trim);
        model.crash();
        let mut edge = block(Written(a));
        assert!(model.settle_block(0, &edge).is_ok());
        edge[..4].fill(Zeroes);
        assert!(model.settle_block(16, &edge).is_ok());
        assert!(model.settle_block(8, &block(Written(a))).is_err());
        assert!(model.settle_block(8, &block(Zeroes)).is_ok());
    }

    #[test]
    fn an_advisory_trim_binds_nothing() {
        let mut model = Model::new(8, true);
        let a = model.submit(Kind::Data, 0, 8);
        model.acknowledge(a);
        let trim = model.submit(Kind::Trim, 0, 8);
        model.acknowledge(trim);
        assert!(model.settle_block(0, &block(Written(a))).is_ok());
    }
}
