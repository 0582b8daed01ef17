//! Recovery of the log, driven from outside: logs as `LogWriter` leaves them, damaged in every way that a medium, a
//! power cut or a person can, and what `scan` makes of them. Also the golden files of log format 1.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::path::Path;

use blockd::buf::AlignedBuf;
use blockd::types::{BLOCK, Lba, Lsn, VolumeId};
use blockd::volume::{LogIo, LogOp};
use blockd::wal::device::{FileLog, LogDevice};
use blockd::wal::format::{ChainLink, FrameHeader, Record, RecordKind, SegmentHeader, block_sum};
use blockd::wal::scan::{Recovered, ScanError, scan};
use blockd::wal::writer::{LogOptions, LogWriter};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// The smallest a log may have: 64 blocks, so that a frame has at most 16.
const SEGMENT: usize = 256 << 10;
const SECTOR: usize = 512;
const VOLUME: VolumeId = VolumeId([0xb1; 16]);

/// Segments in memory.
#[derive(Clone, Debug, Default)]
struct Disk(BTreeMap<u32, Vec<u8>>);

impl LogDevice for Disk {
    fn segment_bytes(&self) -> u64 {
        self.0.values().next().map_or(SEGMENT, Vec::len) as u64
    }
    fn segments(&self) -> Vec<u32> {
        self.0.keys().copied().collect()
    }
    fn create(&self, _: u32) -> io::Result<()> {
        unreachable!("a scan changes nothing")
    }
    fn read(&self, segment: u32, offset: u64, buf: &mut AlignedBuf) -> io::Result<()> {
        let len = buf.len();
        buf.copy_from_slice(&self.0[&segment][offset as usize..][..len]);
        Ok(())
    }
    fn write(&self, _: u32, _: u64, _: &AlignedBuf) -> io::Result<()> {
        unreachable!("a scan changes nothing")
    }
    fn sync(&self, _: u32) -> io::Result<()> {
        unreachable!("a scan changes nothing")
    }
    fn fd(&self, _: u32) -> Option<RawFd> {
        None
    }
    fn describe(&self, segment: u32) -> String {
        name(segment)
    }
}

fn name(segment: u32) -> String {
    format!("/wal/{segment:08}.seg")
}

impl Disk {
    fn segment(&mut self, number: u32) -> &mut Vec<u8> {
        self.0.get_mut(&number).unwrap()
    }

    /// What `scan` says while one bit is flipped.
    fn scan_flipped(&mut self, segment: u32, byte: usize, bit: u8, destaged: Lsn) -> Result<Recovered, ScanError> {
        self.segment(segment)[byte] ^= 1 << bit;
        let found = scan(self, VOLUME, destaged);
        self.segment(segment)[byte] ^= 1 << bit;
        found
    }

    /// The headers that count, by generation.
    fn headers(&self) -> BTreeMap<u64, SegmentHeader> {
        let all = self.0.values().filter_map(|bytes| SegmentHeader::decode(&bytes[..BLOCK]).ok());
        all.map(|header| (header.generation, header)).collect()
    }
}

/// What one LSN did.
#[derive(Clone, Debug, PartialEq)]
struct Write {
    lba: Lba,
    blocks: u64,
    /// Zeroes: whether they count as allocated.
    zero: Option<bool>,
    data: Vec<u8>,
}

/// A write of blocks that differ from all others.
fn data(lba: Lba, blocks: u64) -> Write {
    let mut data = vec![0; blocks as usize * BLOCK];
    for (i, block) in data.chunks_mut(BLOCK).enumerate() {
        // Text that repeats within a block, to compress well in the repository.
        let text = format!("block {} written at {lba} with {blocks}. ", lba + i as u64);
        block.iter_mut().zip(text.bytes().cycle()).for_each(|(to, from)| *to = from);
    }
    Write { lba, blocks, zero: None, data }
}

fn zero(lba: Lba, blocks: u64, allocated: bool) -> Write {
    Write { lba, blocks, zero: Some(allocated), data: Vec::new() }
}

/// Where a frame stands and what it says.
#[derive(Clone, Debug)]
struct Mark {
    segment: u32,
    generation: u64,
    at: usize,
    header_len: usize,
    len: usize,
    first_lsn: Lsn,
    records: u64,
    durable_lsn: Lsn,
}

impl Mark {
    fn last_lsn(&self) -> Lsn {
        self.first_lsn + self.records - 1
    }
    fn range(&self) -> Range<usize> {
        self.at..self.at + self.len
    }
}

/// A log, its writer, and what should be in it.
struct Log {
    disk: Disk,
    writer: LogWriter,
    epoch: u64,
    destaged: Lsn,
    /// What each LSN wrote last; an LSN comes a second time after a torn tail was dropped.
    writes: BTreeMap<Lsn, Write>,
    /// All that any LSN ever wrote.
    ever: Vec<(Lsn, Write)>,
    /// Frames that count, oldest first.
    frames: Vec<Mark>,
}

fn open(disk: &mut Disk, epoch: u64, destaged: Lsn) -> (LogWriter, Recovered) {
    let mut recovered = scan(disk, VOLUME, destaged).unwrap();
    let again = scan(disk, VOLUME, destaged).unwrap();
    let mut segments = disk.0.keys().last().map_or(0, |n| n + 1);
    if recovered.free.is_empty() {
        disk.0.insert(segments, vec![0; SEGMENT]);
        recovered.free.push(segments);
        segments += 1;
    }
    let options = LogOptions { volume: VOLUME, epoch, segment_bytes: SEGMENT as u64, segments_max: 32 };
    let (writer, anchor) = LogWriter::open(options, recovered, segments);
    disk.segment(writer.current_segment())[..BLOCK].copy_from_slice(&anchor);
    (writer, again)
}

impl Log {
    fn new() -> Self {
        let mut disk = Disk::default();
        let (writer, _) = open(&mut disk, 1, 0);
        Self { disk, writer, epoch: 1, destaged: 0, writes: BTreeMap::new(), ever: Vec::new(), frames: Vec::new() }
    }

    /// A frame that is written, but not flushed.
    fn put(&mut self, writes: &[Write]) {
        for write in writes {
            let placed = match write.zero {
                None => self.writer.append_copy(write.lba, &write.data),
                Some(allocated) => self.writer.append_zero(write.lba, write.blocks, allocated),
            };
            self.writes.insert(placed.lsn, write.clone());
            self.ever.push((placed.lsn, write.clone()));
        }
        self.seal(false);
    }

    fn seal(&mut self, dsync: bool) {
        if !self.writer.can_seal() {
            let segment = self.writer.wants_segment().expect("the log is not full");
            self.disk.0.insert(segment, vec![0; SEGMENT]);
            self.writer.segment_created(segment);
        }
        let mut ios = Vec::new();
        self.writer.seal(0, 1_700_000_000_000, dsync, &mut ios);
        self.carry_out(ios);
    }

    fn sync(&mut self) {
        let mut ios = Vec::new();
        self.writer.sync(&mut ios);
        self.carry_out(ios);
    }

    /// As an orderly end leaves it: everything durable, and a frame that says so.
    fn close(&mut self) {
        self.sync();
        self.seal(true);
    }

    fn carry_out(&mut self, ios: Vec<LogIo>) {
        for LogIo { id, op } in ios {
            if let LogOp::Write { segment, offset, bufs, .. } = op {
                let bytes: Vec<u8> = bufs.iter().flat_map(|b| b.iter().copied()).collect();
                let at = offset as usize;
                if at == 0 {
                    self.frames.retain(|frame| frame.segment != segment);
                }
                self.disk.segment(segment)[at..at + bytes.len()].copy_from_slice(&bytes);
                if at > 0 {
                    let generation = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
                    let header_len = usize::from(u16::from_le_bytes([bytes[6], bytes[7]])) * BLOCK;
                    let header = FrameHeader::decode(&bytes[..header_len], generation, offset).unwrap();
                    self.frames.push(Mark {
                        segment,
                        generation,
                        at,
                        header_len,
                        len: bytes.len(),
                        first_lsn: header.first_lsn,
                        records: header.records.len() as u64,
                        durable_lsn: header.durable_lsn,
                    });
                }
            }
            self.writer.done(id, Ok(()));
        }
    }

    /// The bucket has everything up to `lsn`.
    fn destage(&mut self, lsn: Lsn) {
        self.destaged = self.destaged.max(lsn);
        self.writer.release(self.destaged);
    }

    /// The process begins anew.
    fn reopen(&mut self) {
        self.epoch += 1;
        let (writer, recovered) = open(&mut self.disk, self.epoch, self.destaged);
        self.writer = writer;
        self.writes.split_off(&(recovered.last_lsn + 1));
        let counts =
            |mark: &Mark| recovered.needed.iter().any(|n| n.generation == mark.generation && (mark.at as u64) < n.end);
        self.frames.retain(counts);
    }

    fn scan(&self) -> Result<Recovered, ScanError> {
        scan(&self.disk, VOLUME, self.destaged)
    }

    /// Fails unless damage at a place is refused there, or costs everything behind `expected` and nothing else.
    fn assert_judged(
        &self,
        found: Result<Recovered, ScanError>,
        expected: Option<Lsn>,
        (segment, at): (u32, usize),
        about: &str,
    ) {
        match expected {
            None => assert_rot(found, segment, at, about),
            Some(last) => {
                let found = found.unwrap_or_else(|e| panic!("{about}: {e}"));
                self.assert_found(&found, last, about);
            }
        }
    }

    /// Fails unless exactly the writes up to `last` come back, with their content.
    fn assert_found(&self, found: &Recovered, last: Lsn, about: &str) {
        assert_eq!(found.last_lsn, last, "{about}: last LSN");
        let content = content(&self.disk, found, self.destaged);
        for lsn in self.destaged + 1..=last {
            assert!(content.contains_key(&lsn), "{about}: LSN {lsn} is missing");
        }
        for (lsn, write) in &content {
            assert!(*lsn <= last && self.writes[lsn] == *write, "{about}: LSN {lsn} has another content");
        }
    }

    /// Generations of the segments that recovery looks at, and the highest proof their headers give, without `broken`.
    fn chain(&self, broken: Option<u64>) -> (Vec<u64>, Lsn) {
        let headers = self.disk.headers();
        let anchor = headers.values().map(|h| h.anchor).max().unwrap();
        let listed = headers.get(&anchor).map(|h| h.chain.clone()).unwrap_or_default();
        let listed = listed.iter().map(|l| l.generation.get()).filter(|g| headers.contains_key(g));
        let own = headers.values().filter(|h| h.anchor == anchor).map(|h| h.generation);
        let all: Vec<u64> = listed.chain(own).collect();
        let start = all.iter().rposition(|g| headers[g].first_lsn <= self.destaged + 1).unwrap_or(0);
        let chain = all[start..].to_vec();
        let proof = chain.iter().filter(|g| Some(**g) != broken).map(|g| headers[g].durable_lsn).max().unwrap_or(0);
        (chain, proof)
    }

    /// What must come of damage to one frame: the last LSN, or none if it must be refused.
    fn without_frame(&self, broken: &Mark) -> Option<Lsn> {
        let all = self.writer.accepted_lsn();
        let (chain, mut proof) = self.chain(None);
        let behind: Vec<&Mark> =
            self.frames.iter().filter(|f| (f.generation, f.at) > (broken.generation, broken.at)).collect();
        let last_in_segment = behind.iter().all(|f| f.generation != broken.generation || f.records == 0);
        if !chain.contains(&broken.generation)
            || broken.records == 0 && last_in_segment && chain.last() != Some(&broken.generation)
        {
            return Some(all);
        }
        let last = (broken.first_lsn - 1).max(self.destaged);
        proof = behind.iter().map(|f| f.durable_lsn).fold(proof, Lsn::max);
        (proof <= last).then_some(last)
    }

    /// The same for damage to the header of a segment.
    fn without_header(&self, header: &SegmentHeader) -> Option<Lsn> {
        let (chain, mut proof) = self.chain(Some(header.generation));
        let empty = self.frames.iter().all(|f| f.generation != header.generation || f.records == 0);
        // The newest anchor lists segments of earlier lives, so that one without records is not missed.
        let newest = self.disk.headers().values().map(|h| h.anchor).max().unwrap();
        if !chain.contains(&header.generation) || empty && header.generation < newest {
            return Some(self.writer.accepted_lsn());
        }
        // Without the anchor of a later segment nobody knows which of the older ones count.
        let lost = header.generation == newest && chain.last() != Some(&newest);
        let last = if lost { self.destaged } else { (header.first_lsn - 1).max(self.destaged) };
        proof = self.frames.iter().map(|f| f.durable_lsn).fold(proof, Lsn::max);
        (proof <= last).then_some(last)
    }
}

/// What recovery found, by LSN, after a check that it is an unbroken history.
fn content(disk: &Disk, found: &Recovered, destaged: Lsn) -> BTreeMap<Lsn, Write> {
    let mut content = BTreeMap::new();
    let mut next = None;
    for frame in &found.frames {
        let header = &frame.header;
        assert!(next.is_none_or(|lsn| lsn == header.first_lsn), "frames follow each other");
        assert!(header.last_lsn() > destaged && header.last_lsn() <= found.last_lsn);
        assert!(next.is_some() || header.first_lsn <= destaged + 1, "nothing is missing between bucket and log");
        assert!(found.needed.iter().any(|n| n.segment == frame.segment && n.generation == header.generation));
        next = Some(header.last_lsn() + 1);
        for (lsn, record) in (header.first_lsn..).zip(&header.records) {
            let (zero, bytes) = match record.kind {
                RecordKind::Zero { allocated } => (Some(allocated), Vec::new()),
                RecordKind::Refer { .. } => panic!("nobody wrote a reference"),
                RecordKind::Data { at } => {
                    let from = frame.payload_offset as usize + at as usize * BLOCK;
                    (None, disk.0[&frame.segment][from..][..record.blocks as usize * BLOCK].to_vec())
                }
            };
            content.insert(lsn, Write { lba: record.lba, blocks: record.blocks, zero, data: bytes });
        }
    }
    let mut all: Vec<u32> = found.needed.iter().map(|n| n.segment).chain(found.free.iter().copied()).collect();
    all.sort_unstable();
    assert_eq!(all, disk.segments(), "each segment is needed or free");
    content
}

/// What became of damaged histories.
#[derive(Default)]
struct Tally {
    refused: u32,
    dropped: u32,
    whole: u32,
}

impl Tally {
    fn count(&mut self, expected: Option<Lsn>, all: Lsn) {
        match expected {
            None => self.refused += 1,
            Some(last) if last < all => self.dropped += 1,
            Some(_) => self.whole += 1,
        }
    }
}

fn assert_rot(found: Result<Recovered, ScanError>, segment: u32, at: usize, about: &str) {
    match found {
        Err(ScanError::Rot { segment: named, offset, .. }) if (&named, offset) == (&name(segment), at as u64) => {}
        Err(error) => panic!("{about}: the error names another place than {} byte {at}: {error}", name(segment)),
        Ok(found) => panic!("{about}: silently cut to LSN {}", found.last_lsn),
    }
}

/// Frames of every shape: data only, several records, no data, more records than a header block takes.
fn shapes(lba: Lba) -> Vec<Vec<Write>> {
    vec![
        vec![data(lba, 1)],
        vec![data(lba + 5, 3), zero(lba, 1 << 30, false), data(lba + 90, 2), zero(lba + 7, 9, true)],
        vec![zero(lba, 4, true)],
        (0..200).map(|i| zero(lba + 2 * i, 1, i % 2 == 0)).collect(),
        vec![data(lba + 300, 12)],
    ]
}

/// A log of three segments in two lives, with `sync` after every other frame. The first life ended without a closing
/// frame.
fn two_lives() -> Log {
    let mut log = Log::new();
    for i in 0..4 {
        for (n, shape) in shapes(1000 * i).iter().enumerate() {
            log.put(shape);
            if n % 2 == 0 {
                log.sync();
            }
        }
    }
    log.reopen();
    for shape in shapes(100_000) {
        log.put(&shape);
        log.sync();
        if shape.len() > 100 {
            // The horizon of a log that rests.
            log.seal(false);
        }
    }
    assert!(log.disk.0.len() >= 3, "the first life fills more than one segment");
    log
}

// Golden files.

/// Three segments: one that is full, the next one, and the anchor of a second life that ended in order.
fn golden_log() -> Log {
    let mut log = Log::new();
    log.put(&[data(10, 2), zero(40, 8, true), data(11, 1), zero(1 << 40, 1 << 20, false)]);
    log.sync();
    for i in 0..3 {
        log.put(&[data(1000 + 100 * i, 14)]);
    }
    log.put(&[zero(0, 1 << 30, false)]);
    log.sync();
    log.put(&(0..180).map(|i| zero(3 * i, 1 + i, i % 3 == 0)).collect::<Vec<_>>());
    log.put(&[data(5000, 14)]);
    log.reopen();
    log.put(&[data(12, 1)]);
    log.sync();
    log.put(&[zero(13, 1, true), data(7, 1)]);
    log.close();
    log
}

fn golden_file(segment: u32) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/log-v1-{segment}.bin"))
}

/// The golden files as segments; what is missing at their ends is zero.
fn golden_disk() -> Disk {
    let read = |segment| {
        let path = golden_file(segment);
        let mut bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        bytes.resize(SEGMENT, 0);
        (segment, bytes)
    };
    Disk((0..3).map(read).collect())
}

/// A file that is missing is made with `BLOCKD_BLESS=1` in the environment; one that exists is never changed, because
/// logs like it exist.
#[test]
fn golden_logs_read_and_are_written_the_same() {
    let log = golden_log();
    let end = |segment: u32| log.frames.iter().filter(|f| f.segment == segment).map(|f| f.range().end).max().unwrap();
    for (&segment, bytes) in &log.disk.0 {
        let path = golden_file(segment);
        if !path.exists() && std::env::var_os("BLOCKD_BLESS").is_some() {
            std::fs::write(&path, &bytes[..end(segment)]).unwrap();
        }
    }
    let kept = golden_disk();
    let found = scan(&kept, VOLUME, 0).unwrap();
    // Not the writer's word for it, but numbers to be kept for ever.
    assert_eq!((found.last_lsn, found.generation, found.epoch, found.torn), (192, 3, 2, None));
    let needed: Vec<_> = found.needed.iter().map(|n| (n.segment, n.generation, n.end)).collect();
    assert_eq!(needed, [(0, 1, 217_088), (1, 2, 65_536), (2, 3, 24_576)]);
    log.assert_found(&found, 192, "golden");
    let anchor = SegmentHeader::decode(&kept.0[&2][..BLOCK]).unwrap();
    let link = |generation: u64, end: u64| ChainLink { generation: generation.into(), end: end.into() };
    assert_eq!(anchor.chain, [link(1, 217_088), link(2, 65_536)]);
    assert_eq!((anchor.anchor, anchor.first_lsn, anchor.durable_lsn, anchor.prev_end), (3, 190, 189, 0));
    let second = SegmentHeader::decode(&kept.0[&1][..BLOCK]).unwrap();
    assert_eq!((second.generation, second.anchor, second.prev_end, second.chain.len()), (2, 1, 217_088, 0));
    for (segment, bytes) in &kept.0 {
        assert!(log.disk.0[segment] == *bytes, "log-v1-{segment}.bin: the bytes written have changed");
    }
}

/// The golden files as a directory, read with O_DIRECT.
#[test]
fn golden_logs_read_from_files_and_one_of_another_length_is_named() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = |segment: u32| dir.path().join(format!("{segment:08}.seg"));
    for (segment, bytes) in golden_disk().0 {
        std::fs::write(path(segment), bytes).unwrap();
    }
    let device = FileLog::open(dir.path(), SEGMENT as u64).unwrap();
    assert_eq!(scan(&device, VOLUME, 0).unwrap().last_lsn, 192);
    std::fs::File::options().write(true).open(path(1)).unwrap().set_len(SEGMENT as u64 - 4096).unwrap();
    let error = FileLog::open(dir.path(), SEGMENT as u64).unwrap_err().to_string();
    assert!(error.contains(&path(1).display().to_string()) && error.contains("258048 bytes"), "{error}");
    assert!(error.contains("was truncated, or the segment size was changed"), "{error}");
}

/// Gives a segment header or a frame header, all of `block`, the checksum it should have.
fn resum(block: &mut [u8], seed: Option<u64>) {
    let at = if seed.is_some() { 64 } else { 88 };
    block[at..at + 8].fill(0);
    let sum = seed.map_or_else(|| xxh3_64(block), |seed| xxh3_64_with_seed(block, seed));
    block[at..at + 8].copy_from_slice(&sum.to_le_bytes());
}

#[test]
fn a_newer_version_is_refused_and_says_so() {
    let mut disk = golden_disk();
    let block = &mut disk.segment(1)[..BLOCK];
    block[8] = 2;
    resum(block, None);
    let newer = |version| {
        format!(
            "log segment /wal/00000001.seg: log format version {version} is newer than this blockd understands; start a \
             newer blockd"
        )
    };
    assert_eq!(scan(&disk, VOLUME, 0).unwrap_err().to_string(), newer(2));
    let mut disk = golden_disk();
    let frame = &mut disk.segment(1)[BLOCK..2 * BLOCK];
    // 2 is that of frames with references.
    frame[4] = 3;
    resum(frame, Some(2));
    assert_eq!(scan(&disk, VOLUME, 0).unwrap_err().to_string(), newer(3));
}

#[test]
fn a_segment_of_another_volume_is_refused_by_name() {
    for segment in 0..3 {
        let mut disk = golden_disk();
        let block = &mut disk.segment(segment)[..BLOCK];
        block[16..32].fill(0xee);
        resum(block, None);
        // Also when the bucket has everything: it does not belong there.
        for destaged in [0, 192] {
            let error = scan(&disk, VOLUME, destaged).unwrap_err();
            assert!(matches!(error, ScanError::Foreign { .. }));
            let error = error.to_string();
            assert!(error.contains(&name(segment)) && error.contains(&"ee".repeat(16)), "{error}");
            assert!(error.contains(&"b1".repeat(16)) && error.contains("move it"), "{error}");
        }
    }
}

#[test]
fn two_segments_of_one_generation_are_refused() {
    let mut disk = golden_disk();
    // A plain copy says that it is another file: it counts as unused, and holds nothing that is not there anyway.
    let copy = disk.0[&1].clone();
    disk.0.insert(3, copy);
    let found = scan(&disk, VOLUME, 0).unwrap();
    assert_eq!((found.last_lsn, found.free), (192, vec![3]));
    let block = &mut disk.segment(3)[..BLOCK];
    block[12] = 3;
    resum(block, None);
    let error = scan(&disk, VOLUME, 0).unwrap_err();
    assert!(matches!(error, ScanError::Twice { generation: 2, .. }), "{error}");
    let error = error.to_string();
    assert!(error.contains(&name(1)) && error.contains(&name(3)) && error.contains("move the one"), "{error}");
}

#[test]
fn a_header_with_another_number_or_size_does_not_count() {
    // It is no part of the log, which is a loss exactly when its frames were needed and flushed.
    for at in [12, 80] {
        for segment in 0..3 {
            let mut disk = golden_disk();
            let block = &mut disk.segment(segment)[..BLOCK];
            block[at] ^= 16;
            resum(block, None);
            assert_rot(scan(&disk, VOLUME, 0), segment, 0, "needed");
            let found = scan(&disk, VOLUME, 192).unwrap();
            assert_eq!((found.last_lsn, found.frames.len(), found.free[0]), (192, 0, segment));
        }
    }
    let mut renamed = golden_disk();
    let bytes = renamed.0.remove(&2).unwrap();
    renamed.0.insert(7, bytes);
    assert_rot(scan(&renamed, VOLUME, 0), 7, 0, "renamed");
    // A log in segments of another size altogether, as when the setting was changed and the files were cut to match.
    let mut cut = golden_disk();
    cut.0.values_mut().for_each(|bytes| bytes.resize(2 * SEGMENT, 0));
    assert!(scan(&cut, VOLUME, 0).is_err());
}

// Torn tails.

/// Everything that may stand where only part of `frame` was written: a prefix, one sector missing, any part.
fn tears(before: &[u8], after: &[u8], rng: &mut SmallRng) -> Vec<Vec<u8>> {
    let sectors = after.len() / SECTOR;
    let mut all = Vec::new();
    let mut tear = |keep: &mut dyn FnMut(usize) -> bool| {
        let mut bytes = before.to_vec();
        for i in (0..sectors).filter(|&i| keep(i)) {
            bytes[i * SECTOR..][..SECTOR].copy_from_slice(&after[i * SECTOR..][..SECTOR]);
        }
        all.push(bytes);
    };
    for cut in 0..=sectors {
        tear(&mut |i| i < cut);
        tear(&mut |i| i != cut);
        tear(&mut |i| i >= cut);
    }
    for _ in 0..20 {
        tear(&mut |_| rng.random());
    }
    for _ in 0..40 {
        let mut bytes = after.to_vec();
        let bit = rng.random_range(0..bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        all.push(bytes);
    }
    all
}

fn assert_torn_frames_are_dropped(mut log: Log, shape: &[Write], rng: &mut SmallRng, about: &str) {
    let before = log.disk.clone();
    let last = log.writer.accepted_lsn();
    log.put(shape);
    let all = log.writer.accepted_lsn();
    let frame = log.frames.last().unwrap().clone();
    let old = before.0[&frame.segment][frame.range()].to_vec();
    let new = log.disk.0[&frame.segment][frame.range()].to_vec();
    for (i, torn) in tears(&old, &new, rng).into_iter().enumerate() {
        log.disk.segment(frame.segment)[frame.range()].copy_from_slice(&torn);
        let about = format!("{about}, tear {i} of a frame of {} blocks", frame.len / BLOCK);
        let found = log.scan().unwrap_or_else(|e| panic!("{about}: {e}"));
        log.assert_found(&found, if torn == new { all } else { last }, &about);
        // Magic, generation and offset tell that a frame was begun. Without them there is nothing to report.
        let begun = torn != new && torn[..4] == new[..4] && torn[6..24] == new[6..24];
        assert_eq!(found.torn, begun.then_some((frame.segment, frame.at as u64)), "{about}");
    }
}

#[test]
fn a_torn_last_frame_is_dropped_wherever_it_was_cut() {
    let mut rng = SmallRng::seed_from_u64(1);
    for shape in shapes(7000) {
        assert_torn_frames_are_dropped(Log::new(), &shape, &mut rng, "first frame");

        let mut log = Log::new();
        log.put(&[data(1, 2)]);
        log.sync();
        log.put(&[zero(9, 1, true)]);
        assert_torn_frames_are_dropped(log, &shape, &mut rng, "after an unflushed frame");

        // Older frames of the same sizes stand where the new one goes.
        let mut log = Log::new();
        for _ in 0..30 {
            log.put(&shape);
        }
        log.sync();
        log.destage(log.writer.accepted_lsn());
        log.reopen();
        log.put(&shape);
        assert_torn_frames_are_dropped(log, &shape, &mut rng, "in a recycled segment");
    }
}

#[test]
fn of_several_unflushed_frames_those_behind_the_torn_one_are_dropped_too() {
    let mut log = two_lives();
    log.sync();
    log.put(&[data(1, 1)]);
    let torn = log.frames.last().unwrap().clone();
    log.put(&[data(2, 1)]);
    for bit in (0..1000).chain((1000..torn.len * 8).step_by(101)) {
        let found = log.disk.scan_flipped(torn.segment, torn.at + bit / 8, (bit % 8) as u8, 0);
        let found = found.unwrap_or_else(|e| panic!("bit {bit}: {e}"));
        // The frame behind shows that there was one, whichever bit it is.
        assert_eq!((found.last_lsn, found.torn), (torn.first_lsn - 1, Some((torn.segment, torn.at as u64))));
        log.assert_found(&found, torn.first_lsn - 1, "dropped");
    }
}

/// The header of a segment and its first frame are written at once; the frame does not count before the header does.
#[test]
fn a_torn_segment_header_drops_the_segment() {
    let mut rng = SmallRng::seed_from_u64(2);
    for recycled in [false, true] {
        let mut log = Log::new();
        if recycled {
            for i in 0..20 {
                log.put(&[data(20 * i, 14)]);
            }
            log.sync();
            log.destage(log.writer.accepted_lsn());
        }
        let segment = log.writer.current_segment();
        let mut before = log.disk.clone();
        let mut last = 0;
        while log.writer.current_segment() == segment {
            before = log.disk.clone();
            last = log.writer.accepted_lsn();
            log.put(&[data(last, 10)]);
            if log.writer.current_segment() == segment && last % 2 == 0 {
                log.sync();
            }
        }
        let torn = log.writer.current_segment();
        let old = before.0.get(&torn).map_or_else(|| vec![0; BLOCK], |bytes| bytes[..BLOCK].to_vec());
        let new = log.disk.0[&torn][..BLOCK].to_vec();
        let generation = log.frames.last().unwrap().generation;
        for bytes in tears(&old, &new, &mut rng) {
            log.disk.segment(torn)[..BLOCK].copy_from_slice(&bytes);
            let found = log.scan().unwrap_or_else(|e| panic!("recycled {recycled}: {e}"));
            let whole = bytes == new;
            log.assert_found(&found, if whole { last + 1 } else { last }, "torn header");
            // The generation is used again, in this very segment perhaps; its frames are of an older epoch then.
            assert_eq!(found.generation, if whole { generation } else { generation - 1 });
            let mut again = log.disk.clone();
            let (writer, _) = open(&mut again, 2, log.destaged);
            let found = scan(&again, VOLUME, log.destaged).unwrap();
            assert_eq!(found.last_lsn, writer.accepted_lsn(), "nothing of the torn segment came back");
        }
    }
}

// Rot.

#[test]
fn every_damaged_sector_of_a_durable_frame_is_refused_by_place() {
    let mut rng = SmallRng::seed_from_u64(3);
    let mut log = two_lives();
    log.close();
    let closing = log.frames.pop().unwrap();
    for frame in log.frames.clone() {
        for sector in frame.range().step_by(SECTOR) {
            let byte = sector + rng.random_range(0..SECTOR);
            let about = format!("segment {} byte {byte}, frame at {}", frame.segment, frame.at);
            let found = log.disk.scan_flipped(frame.segment, byte, rng.random_range(0..8), 0);
            assert_rot(found, frame.segment, frame.at, &about);
        }
    }
    // The closing frame itself has nothing to lose.
    for byte in closing.range().step_by(37) {
        let found = log.disk.scan_flipped(closing.segment, byte, rng.random_range(0..8), 0).unwrap();
        assert_eq!(found.last_lsn, log.writer.accepted_lsn());
    }
}

#[test]
fn every_byte_of_a_durable_frames_header_matters() {
    let mut log = Log::new();
    log.put(&[data(5, 1)]);
    log.put(&[data(5, 2), zero(1, 2, false), zero(9, 9, true)]);
    log.sync();
    log.close();
    for frame in log.frames[..2].iter().cloned() {
        // Fixed part, records, sums and some of the padding; then the first and last bytes of payload blocks.
        let header = frame.at..frame.at + 72 + 24 * frame.records as usize + 8 * 2 + 20;
        let blocks = (frame.at + frame.header_len..frame.range().end).step_by(BLOCK);
        for byte in header.chain(blocks.flat_map(|at| [at, at + 1, at + BLOCK - 1])) {
            for bit in 0..8 {
                let found = log.disk.scan_flipped(frame.segment, byte, bit, 0);
                assert_rot(found, frame.segment, frame.at, &format!("byte {byte} bit {bit}"));
            }
        }
    }
}

#[test]
fn the_next_segments_header_alone_proves_that_a_frame_was_durable() {
    let mut log = Log::new();
    let first = log.writer.current_segment();
    while log.writer.current_segment() == first {
        log.put(&[data(3, 7)]);
        if log.writer.current_segment() == first {
            log.sync();
        }
    }
    let frame = log.frames.pop().unwrap();
    log.disk.segment(frame.segment)[BLOCK..].fill(0);
    let found = log.scan().unwrap();
    assert_eq!((found.last_lsn, found.torn), (frame.first_lsn - 1, None));
    for frame in log.frames.clone() {
        for byte in frame.range().step_by(511) {
            assert_rot(log.disk.scan_flipped(first, byte, 3, 0), first, frame.at, &format!("byte {byte}"));
        }
    }
}

/// A history of writes, flushes, crashes and chunks stored, by `seed`.
fn history(seed: u64) -> Log {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut log = Log::new();
    for _ in 0..rng.random_range(5..60) {
        match rng.random_range(0..100) {
            0..55 => {
                let records = (0..rng.random_range(1..5)).map(|_| {
                    let lba = rng.random_range(0..1 << 20);
                    if rng.random_bool(0.7) {
                        data(lba, rng.random_range(1..4))
                    } else {
                        zero(lba, rng.random_range(1..1 << 30), rng.random())
                    }
                });
                let records: Vec<Write> = records.collect();
                log.put(&records);
            }
            55..80 => log.sync(),
            80..85 => log.seal(rng.random()),
            85..90 => {
                // Chunks end where frames end.
                let stored = rng.random_range(log.destaged..=log.writer.accepted_lsn());
                let frame = log.frames.iter().find(|f| f.last_lsn() >= stored && f.records > 0);
                log.destage(frame.map_or(log.destaged, Mark::last_lsn));
            }
            90..95 => log.reopen(),
            95..97 => {
                log.close();
                log.reopen();
            }
            _ => {
                // Power is cut while a frame is written.
                log.put(&[data(77, 3)]);
                let frame = log.frames.last().unwrap().clone();
                log.disk.segment(frame.segment)[frame.at + rng.random_range(0..frame.len)] ^= 4;
                log.reopen();
            }
        }
    }
    if rng.random_bool(0.5) {
        log.close();
    }
    log
}

#[test]
fn damage_to_any_frame_of_any_history_is_refused_if_it_was_proven_durable() {
    let mut tally = Tally::default();
    for seed in 0..150 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut log = history(seed);
        let all = log.writer.accepted_lsn();
        log.assert_found(&log.scan().unwrap(), all, &format!("seed {seed}"));
        for frame in log.frames.clone() {
            let expected = log.without_frame(&frame);
            for part in [frame.at..frame.at + 72, frame.at..frame.at + frame.header_len, frame.range()] {
                let byte = rng.random_range(part);
                let about = format!("seed {seed}, {frame:?}, byte {byte}");
                let found = log.disk.scan_flipped(frame.segment, byte, rng.random_range(0..8), log.destaged);
                log.assert_judged(found, expected, (frame.segment, frame.at), &about);
            }
            tally.count(expected, all);
        }
    }
    let Tally { refused, dropped, whole } = tally;
    assert!(refused > 100 && dropped > 30 && whole > 10, "{refused} {dropped} {whole}: histories of all kinds");
}

#[test]
fn damage_to_any_segment_header_of_any_history_is_refused_if_it_hides_what_was_durable() {
    let mut tally = Tally::default();
    for seed in 0..300 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut log = history(seed);
        let all = log.writer.accepted_lsn();
        for header in log.disk.headers().into_values() {
            let expected = log.without_header(&header);
            let byte = rng.random_range(0..BLOCK);
            let about = format!("seed {seed}, generation {}, byte {byte}", header.generation);
            let found = log.disk.scan_flipped(header.segment, byte, rng.random_range(0..8), log.destaged);
            log.assert_judged(found, expected, (header.segment, 0), &about);
            tally.count(expected, all);
        }
    }
    let Tally { refused, dropped, whole } = tally;
    assert!(refused > 100 && dropped > 5 && whole > 100, "{refused} {dropped} {whole}: histories of all kinds");
}

#[test]
fn every_sector_of_a_segment_header_matters() {
    let mut rng = SmallRng::seed_from_u64(4);
    let mut log = two_lives();
    log.close();
    for segment in log.disk.segments() {
        for sector in 0..BLOCK / SECTOR {
            for byte in [sector * SECTOR, sector * SECTOR + rng.random_range(0..SECTOR)] {
                let found = log.disk.scan_flipped(segment, byte, rng.random_range(0..8), 0);
                assert_rot(found, segment, 0, &format!("segment {segment} byte {byte}"));
            }
        }
    }
    // The only segment: without its header nothing but its frames tells that there was a log.
    let mut log = Log::new();
    log.put(&[data(1, 1)]);
    log.close();
    assert_rot(log.disk.scan_flipped(0, 100, 0, 0), 0, 0, "only segment");
    assert_eq!(log.disk.scan_flipped(0, 100, 0, 1).unwrap().last_lsn, 1, "the bucket has it");
}

#[test]
fn rot_in_what_the_bucket_has_does_not_block_recovery() {
    let mut rng = SmallRng::seed_from_u64(5);
    let mut log = two_lives();
    log.close();
    let headers = log.disk.headers();
    let all = log.writer.accepted_lsn();
    for (before, header) in headers.values().zip(headers.values().skip(1)) {
        log.destaged = header.first_lsn - 1;
        let intact = log.disk.0[&before.segment].clone();
        for _ in 0..50 {
            let byte = rng.random_range(0..SEGMENT);
            let found = log.disk.scan_flipped(before.segment, byte, rng.random_range(0..8), log.destaged).unwrap();
            log.assert_found(&found, all, &format!("byte {byte}"));
        }
        log.disk.segment(before.segment).fill(0);
        log.assert_found(&log.scan().unwrap(), all, "zeroed");
        log.disk.0.remove(&before.segment);
        log.assert_found(&log.scan().unwrap(), all, "deleted");
        rng.fill(&mut log.disk.0.entry(before.segment).or_insert_with(|| vec![0; SEGMENT])[..]);
        log.assert_found(&log.scan().unwrap(), all, "noise");
        *log.disk.segment(before.segment) = intact;
    }
    // With all of it in the bucket nothing in the log matters.
    log.destaged = all;
    for _ in 0..50 {
        let segment = rng.random_range(0..log.disk.0.len() as u32);
        rng.fill(&mut log.disk.segment(segment)[..]);
        let found = log.scan().unwrap();
        assert_eq!((found.last_lsn, found.frames.len()), (all, 0));
    }
}

// Missing segments.

#[test]
fn a_missing_segment_is_refused() {
    let mut log = Log::new();
    // So that every number has an older generation to be put back.
    for _ in 0..2 {
        for i in 0..25 {
            log.put(&[data(i, 8)]);
        }
        log.sync();
        log.destage(log.writer.accepted_lsn());
    }
    let older = log.disk.clone();
    for i in 0..32 {
        log.put(&[data(50 + i, 8)]);
        log.sync();
        if i == 15 {
            log.reopen();
        }
    }
    log.close();
    let headers: Vec<SegmentHeader> = log.disk.headers().into_values().filter(|h| h.first_lsn > log.destaged).collect();
    assert!(headers.len() >= 5, "{}", headers.len());
    // The newest one is left out: without it nobody can tell that there was one.
    for header in &headers[..headers.len() - 1] {
        let intact = log.disk.0.remove(&header.segment).unwrap();
        let behind = headers.iter().find(|h| h.generation > header.generation).unwrap();
        let about = format!("generation {}", header.generation);
        let refused = |log: &Log, how: &str| {
            let error = log.scan().err().unwrap_or_else(|| panic!("{about} {how}: silently cut"));
            let text = error.to_string();
            assert!(matches!(error, ScanError::Gap { .. }), "{about} {how}: {text}");
            assert!(text.contains(&name(behind.segment)), "{about} {how}: names what follows: {text}");
            // Without the anchor nobody knows which of the older segments count.
            let before = if header.anchor == header.generation { log.destaged } else { header.first_lsn - 1 };
            assert!(text.contains(&format!("ends at write {before}:")), "{about} {how}: {text}");
        };
        refused(&log, "deleted");
        log.disk.0.insert(header.segment, vec![0; SEGMENT]);
        refused(&log, "zeroed");
        if let Some(bytes) = older.0.get(&header.segment) {
            *log.disk.segment(header.segment) = bytes.clone();
            let error = log.scan().unwrap_err().to_string();
            assert!(error.contains("Nothing was changed"), "{error}");
        }
        // Unless the bucket has it.
        let all = log.writer.accepted_lsn();
        let found = scan(&log.disk, VOLUME, behind.first_lsn - 1).unwrap();
        assert_eq!((found.last_lsn, found.frames[0].header.first_lsn), (all, behind.first_lsn));
        *log.disk.0.entry(header.segment).or_default() = intact;
        log.assert_found(&log.scan().unwrap(), all, "put back");
    }
}

#[test]
fn a_missing_segment_that_was_never_flushed_ends_the_log() {
    let mut log = Log::new();
    log.put(&[data(1, 1)]);
    log.sync();
    while log.disk.0.len() < 4 {
        log.put(&[data(50, 9)]);
    }
    let second = log.frames.iter().find(|f| f.segment == 1).unwrap().first_lsn;
    log.disk.segment(1).fill(0);
    let found = log.scan().unwrap();
    log.assert_found(&found, second - 1, "zeroed");
    assert_eq!(found.free.len(), 3);
}

// Recycled bytes.

#[test]
fn frames_of_an_earlier_use_of_a_segment_never_parse() {
    // Every frame of both uses is of the same size, so old ones stand exactly where the next one would.
    let mut log = Log::new();
    for i in 0..40 {
        log.put(&[data(i, 3)]);
    }
    log.sync();
    log.destage(log.writer.accepted_lsn());
    for i in 0..60 {
        log.put(&[data(1000 + i, 3)]);
        if i % 3 == 0 {
            log.sync();
        }
        let found = log.scan().unwrap();
        log.assert_found(&found, log.writer.accepted_lsn(), "recycled");
        assert_eq!(found.torn, None, "an old frame is no torn one");
    }
}

/// Segment 0 with a header of `generation`, and frames of one block: (generation, epoch, first LSN, durable LSN).
fn crafted(generation: u64, frames: &[(u64, u64, Lsn, Lsn)]) -> Disk {
    let mut bytes = vec![0; SEGMENT];
    let header = SegmentHeader {
        segment: 0,
        volume: VOLUME,
        generation,
        anchor: generation,
        epoch: 4,
        first_lsn: 1,
        durable_lsn: 0,
        prev_end: 0,
        segment_bytes: SEGMENT as u64,
        chain: Vec::new(),
    };
    header.encode(&mut bytes[..BLOCK]);
    for (&(generation, epoch, first_lsn, durable_lsn), i) in frames.iter().zip(0..) {
        let at = BLOCK + 2 * BLOCK * i;
        let payload = data(first_lsn, 1).data;
        let header = FrameHeader {
            generation,
            offset: at as u64,
            epoch,
            first_lsn,
            durable_lsn,
            time_ms: 0,
            records: vec![Record { lba: first_lsn, blocks: 1, kind: RecordKind::Data { at: 0 } }],
            sums: vec![block_sum(&payload)],
        };
        header.encode(&mut bytes[at..at + BLOCK]);
        bytes[at + BLOCK..at + 2 * BLOCK].copy_from_slice(&payload);
    }
    Disk(BTreeMap::from([(0, bytes)]))
}

#[test]
fn only_generation_epoch_and_place_make_a_frame_part_of_a_segment() {
    let last = |disk: &Disk| scan(disk, VOLUME, 0).unwrap().last_lsn;
    assert_eq!(last(&crafted(9, &[(9, 4, 1, 0), (9, 4, 2, 1), (9, 4, 3, 1)])), 3);
    // What an earlier life left continues the numbers perfectly, and still does not count.
    assert_eq!(last(&crafted(9, &[(9, 4, 1, 0), (8, 4, 2, 1), (9, 4, 3, 1)])), 1);
    assert_eq!(last(&crafted(9, &[(9, 4, 1, 0), (10, 4, 2, 1)])), 1);
    assert_eq!(last(&crafted(9, &[(9, 4, 1, 0), (9, 3, 2, 1)])), 1);
    assert_eq!(last(&crafted(9, &[(9, 4, 1, 0), (9, 4, 3, 1)])), 1);
    // An intact frame that was copied to another place.
    let mut moved = crafted(9, &[(9, 4, 1, 0), (9, 4, 2, 1), (9, 4, 3, 1)]);
    moved.segment(0).copy_within(3 * BLOCK..5 * BLOCK, 5 * BLOCK);
    assert_eq!(last(&moved), 2);
}

/// A guest chooses what payload blocks hold, also blocks that look like frames of this very log.
#[test]
fn payload_that_looks_like_a_frame_proves_nothing() {
    let mut log = Log::new();
    log.put(&[data(1, 1)]);
    log.sync();
    let at = log.frames[0].range().end;
    let forged = |index: usize, generation: u64| {
        let header = FrameHeader {
            generation,
            offset: (at + index * BLOCK) as u64,
            epoch: 1,
            first_lsn: 3,
            durable_lsn: 1 << 40,
            time_ms: 0,
            records: Vec::new(),
            sums: Vec::new(),
        };
        let mut block = vec![0; BLOCK];
        header.encode(&mut block);
        block
    };
    // Its first record makes LSN 2, the forged ones would be in the payload at blocks 1, 2 and on.
    let payload = (1..8).flat_map(|i| forged(i, if i < 4 { 1 } else { 9 })).collect();
    log.put(&[Write { lba: 5, blocks: 7, zero: None, data: payload }]);
    log.put(&[data(6, 1)]);
    let (trusted, behind) = (log.frames[1].clone(), log.frames[2].clone());
    let found = log.scan().unwrap();
    log.assert_found(&found, 3, "intact");
    // Behind the end of the log, and in a segment without a header, frames are searched: not inside intact ones.
    let found = log.disk.scan_flipped(0, log.frames[0].at, 0, 1).unwrap();
    assert_eq!(found.last_lsn, 1);
    let found = log.disk.scan_flipped(0, 5, 0, 1).unwrap();
    assert_eq!((found.last_lsn, found.generation), (1, 0));
    let found = log.disk.scan_flipped(behind.segment, behind.at, 0, 0).unwrap();
    assert_eq!(found.last_lsn, trusted.last_lsn());
}

// Anything.

#[test]
fn no_damage_makes_up_content_or_panics() {
    let (mut refused, mut found_some) = (0, 0);
    for seed in 0..100 {
        let mut rng = SmallRng::seed_from_u64(1000 + seed);
        let log = history(seed);
        let numbers = log.disk.segments();
        for _ in 0..40 {
            let mut disk = log.disk.clone();
            for _ in 0..rng.random_range(1..6) {
                let number = numbers[rng.random_range(0..numbers.len())];
                let other = disk.0.values().nth(rng.random_range(0..disk.0.len())).unwrap().clone();
                let Some(segment) = disk.0.get_mut(&number) else { continue };
                let block = rng.random_range(0..SEGMENT / BLOCK);
                let sector = rng.random_range(0..SEGMENT / SECTOR);
                match rng.random_range(0..8) {
                    0 => segment[block * BLOCK + rng.random_range(0..BLOCK)] ^= 1 << rng.random_range(0..8),
                    // Where the headers are.
                    1 => segment[block * BLOCK + rng.random_range(0..200)] = rng.random(),
                    2 => segment[rng.random_range(0..96)] ^= 1 << rng.random_range(0..8),
                    3 => segment[sector * SECTOR..][..SECTOR].fill(0),
                    4 => segment[block * BLOCK..].fill(0),
                    5 => segment[block * BLOCK..][..BLOCK].copy_from_slice(&other[block * BLOCK..][..BLOCK]),
                    6 => {
                        // A block in a wrong place, but with true checksums where they can be made.
                        let to = rng.random_range(0..SEGMENT / BLOCK);
                        let generation = u64::from_le_bytes(segment[block * BLOCK + 8..][..8].try_into().unwrap());
                        segment.copy_within(block * BLOCK..(block + 1) * BLOCK, to * BLOCK);
                        let moved = &mut segment[to * BLOCK..][..BLOCK];
                        if moved[..4] == *b"BLKF" {
                            moved[16..24].copy_from_slice(&((to * BLOCK) as u64).to_le_bytes());
                            resum(moved, Some(generation));
                        }
                    }
                    _ if disk.0.len() > 1 => drop(disk.0.remove(&number)),
                    _ => {}
                }
            }
            match scan(&disk, VOLUME, log.destaged) {
                Err(_) => refused += 1,
                Ok(found) => {
                    for (lsn, write) in content(&disk, &found, log.destaged) {
                        assert!(log.ever.iter().any(|(l, w)| *l == lsn && *w == write), "seed {seed}: LSN {lsn}");
                        found_some += 1;
                    }
                }
            }
        }
    }
    assert!(refused > 100 && found_some > 1000, "{refused} {found_some}: damage of all kinds");
}

#[test]
fn every_error_names_file_cause_and_remedy() {
    let mut log = two_lives();
    log.close();
    let frame = log.frames[3].clone();
    let proof = log.disk.headers().values().map(|h| h.durable_lsn).max().unwrap();
    let rot = log.disk.scan_flipped(frame.segment, frame.at + 9, 1, 2).unwrap_err().to_string();
    assert_eq!(
        rot,
        format!(
            "log segment {} is damaged at byte {}: writes up to number {proof} were durable, but only those up to {} \
             can be read. Nothing was changed. Restore the file, or move the volume's log directory away to fall back to \
             the bucket's state (write 2)",
            name(frame.segment),
            frame.at,
            frame.first_lsn - 1
        )
    );
    let first = log.disk.headers().into_values().next().unwrap();
    let second = log.disk.headers().into_values().nth(1).unwrap();
    log.disk.0.remove(&first.segment);
    assert_eq!(
        log.scan().unwrap_err().to_string(),
        format!(
            "log segment {} begins with write {}, but what comes before it ends at write 0: a log segment is missing \
             or its header is unreadable, or the bucket was set back. Nothing was changed. Restore what is missing, or \
             move the volume's log directory away to fall back to the bucket's state (write 0)",
            name(second.segment),
            second.first_lsn
        )
    );
}
