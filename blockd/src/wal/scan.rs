//! Recovery: finds the valid prefix of a log.

use std::collections::BTreeMap;
use std::io;
use std::ops::RangeInclusive;

use super::device::LogDevice;
use super::format::{FormatError, FrameHeader, SegmentHeader, block_sum};
use crate::buf::AlignedBuf;
use crate::types::{BLOCK, BLOCK_SIZE, Lsn, VolumeId};

/// Why a log cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// The device failed.
    #[error("cannot read log segment {segment}: {source}")]
    Io {
        /// Which file.
        segment: String,
        /// The cause.
        source: io::Error,
    },
    /// Acknowledged data is damaged or gone.
    #[error(
        "log segment {segment} is damaged at byte {offset}: writes up to number {durable_lsn} were durable, but only \
         those up to {last_lsn} can be read. Nothing was changed. Restore the file, or move the volume's log directory \
         away to fall back to the bucket's state (write {destaged_lsn})"
    )]
    Rot {
        /// Which file.
        segment: String,
        /// Where the valid part ends; 0 if the header is the trouble.
        offset: u64,
        /// Proven durable.
        durable_lsn: Lsn,
        /// Readable.
        last_lsn: Lsn,
        /// In the bucket.
        destaged_lsn: Lsn,
    },
    /// A segment does not continue what is before it, in the log or in the bucket.
    #[error(
        "log segment {segment} begins with write {first_lsn}, but what comes before it ends at write {last_lsn}: a log \
         segment is missing or its header is unreadable, or the bucket was set back. Nothing was changed. Restore what \
         is missing, or move the volume's log directory away to fall back to the bucket's state (write {destaged_lsn})"
    )]
    Gap {
        /// The first file behind the gap.
        segment: String,
        /// Its first LSN.
        first_lsn: Lsn,
        /// Readable.
        last_lsn: Lsn,
        /// In the bucket.
        destaged_lsn: Lsn,
    },
    /// Two segments are said to be the same one.
    #[error(
        "log segments {segment} and {other} both have generation {generation}, of which there can be only one; move the \
         one that does not belong there away"
    )]
    Twice {
        /// One file.
        segment: String,
        /// The other.
        other: String,
        /// Of both.
        generation: u64,
    },
    /// A segment of another volume.
    #[error(
        "log segment {segment} belongs to volume {found}, not {expected}; move it out of this volume's log directory"
    )]
    Foreign {
        /// Which file.
        segment: String,
        /// Whose it is.
        found: VolumeId,
        /// Whose it should be.
        expected: VolumeId,
    },
    /// Written by a newer version.
    #[error("log segment {segment}: {source}")]
    Newer {
        /// Which file.
        segment: String,
        /// The version.
        source: FormatError,
    },
}

/// A frame that has to be replayed.
#[derive(Debug)]
pub struct RecoveredFrame {
    /// Segment it stands in.
    pub segment: u32,
    /// Byte offset of its payload in the segment.
    pub payload_offset: u64,
    /// Records and checksums.
    pub header: FrameHeader,
}

/// A segment that is still needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeededSegment {
    /// Its file.
    pub segment: u32,
    /// Its generation.
    pub generation: u64,
    /// Where its valid part ends, in bytes.
    pub end: u64,
}

/// What a log holds beyond the bucket.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Frames with at least one LSN above the destaged one, in order.
    pub frames: Vec<RecoveredFrame>,
    /// The segments those frames stand in, oldest first.
    pub needed: Vec<NeededSegment>,
    /// All other segments, those with the oldest generation first.
    pub free: Vec<u32>,
    /// Last LSN of the state: the log's, or the bucket's if that is newer.
    pub last_lsn: Lsn,
    /// Highest generation of any segment.
    pub generation: u64,
    /// Epoch of the newest valid frame or segment; 0 for an empty log.
    pub epoch: u64,
    /// Where frames were dropped that never became durable (a torn tail).
    pub torn: Option<(u32, u64)>,
}

impl Recovered {
    /// The same log with nothing in it that counts, whose next write comes after `last_lsn`.
    pub fn emptied(mut self, last_lsn: Lsn) -> Self {
        self.frames.clear();
        self.free.extend(self.needed.drain(..).map(|needed| needed.segment));
        Self { last_lsn, ..self }
    }
}

struct Segment {
    number: u32,
    header: SegmentHeader,
    /// Known end of the valid part and whether everything before it is proven durable.
    end: Option<u64>,
    settled: bool,
}

/// A segment without a header that counts. It is unused as far as anybody can tell, unless its frames say otherwise.
struct Headless {
    number: u32,
    /// Highest generation of its frames, 0 without any, and the LSNs of that generation.
    generation: u64,
    lsns: RangeInclusive<Lsn>,
    /// Highest durable horizon of its frames.
    durable_lsn: Lsn,
}

/// Where the valid prefix ends.
struct End {
    segment: String,
    offset: u64,
    last_lsn: Lsn,
    destaged_lsn: Lsn,
    /// The segment that should continue it but begins later, and its first LSN.
    behind: Option<(String, Lsn)>,
}

impl End {
    /// Refuses to drop what comes behind, if it was durable.
    fn check(&self, durable_lsn: Lsn) -> Result<(), ScanError> {
        let &Self { offset, last_lsn, destaged_lsn, .. } = self;
        if durable_lsn <= last_lsn.max(destaged_lsn) {
            return Ok(());
        }
        if let Some((segment, first_lsn)) = self.behind.clone() {
            return Err(ScanError::Gap { segment, first_lsn, last_lsn, destaged_lsn });
        }
        Err(ScanError::Rot { segment: self.segment.clone(), offset, durable_lsn, last_lsn, destaged_lsn })
    }
}

/// Epoch of the newest segment of the log of `volume`; 0 for an empty log.
pub fn newest_epoch(device: &dyn LogDevice, volume: VolumeId) -> Result<u64, ScanError> {
    let mut newest = (0, 0);
    for number in device.segments() {
        if let Some(header) = read_header(device, volume, number)? {
            newest = newest.max((header.generation, header.epoch));
        }
    }
    Ok(newest.1)
}

/// Reads the log of `volume` and returns what must be replayed over a bucket state that ends at `destaged`.
pub fn scan(device: &dyn LogDevice, volume: VolumeId, destaged: Lsn) -> Result<Recovered, ScanError> {
    let mut by_generation = BTreeMap::new();
    let mut headless = Vec::new();
    for number in device.segments() {
        match read_header(device, volume, number)? {
            Some(header) => {
                let generation = header.generation;
                if let Some((other, _)) = by_generation.insert(generation, (number, header)) {
                    let (segment, other) = (device.describe(number), device.describe(other));
                    return Err(ScanError::Twice { segment, other, generation });
                }
            }
            None => headless.push(read_headless(device, number)?),
        }
    }
    // A segment whose header is damaged is as good as missing. The error should name it, not what is around it.
    let lost = |lsn: Lsn, last_lsn: Lsn, durable_lsn: Lsn| {
        let found = headless.iter().find(|h| h.lsns.contains(&lsn))?;
        let segment = device.describe(found.number);
        Some(ScanError::Rot { segment, offset: 0, durable_lsn, last_lsn, destaged_lsn: destaged })
    };
    let mut out = scan_chain(device, by_generation, destaged).map_err(|error| {
        let better = match error {
            ScanError::Rot { last_lsn, durable_lsn, .. } => lost(last_lsn.max(destaged) + 1, last_lsn, durable_lsn),
            ScanError::Gap { last_lsn, first_lsn, .. } => {
                let before = first_lsn - 1;
                lost(last_lsn + 1, last_lsn, before).or_else(|| lost(before, last_lsn, before))
            }
            _ => None,
        };
        better.unwrap_or(error)
    })?;
    if let Some(Headless { number, durable_lsn, .. }) = headless.iter().max_by_key(|h| h.durable_lsn)
        && *durable_lsn > out.last_lsn
    {
        let (segment, durable_lsn, last_lsn) = (device.describe(*number), *durable_lsn, out.last_lsn);
        let error = ScanError::Rot { segment, offset: 0, durable_lsn, last_lsn, destaged_lsn: destaged };
        return Err(lost(last_lsn + 1, last_lsn, durable_lsn).unwrap_or(error));
    }
    out.free.splice(0..0, headless.iter().map(|h| h.number));
    Ok(out)
}

fn scan_chain(
    device: &dyn LogDevice,
    mut by_generation: BTreeMap<u64, (u32, SegmentHeader)>,
    destaged: Lsn,
) -> Result<Recovered, ScanError> {
    let mut free = Vec::new();
    let generation = by_generation.last_key_value().map_or(0, |(generation, _)| *generation);
    let mut chain = chain(&mut by_generation, destaged);
    let mut out = Recovered { last_lsn: destaged, generation, ..Recovered::default() };
    if let Some(first) = chain.first()
        && first.header.first_lsn > destaged + 1
    {
        // The segment in between is gone. That is nothing if it never became durable.
        let end = End {
            segment: String::new(),
            offset: 0,
            last_lsn: destaged,
            destaged_lsn: destaged,
            behind: Some((device.describe(first.number), first.header.first_lsn)),
        };
        let all = chain.iter().map(|s| (s.number, &s.header)).chain(by_generation.values().map(|(n, h)| (*n, h)));
        for (number, header) in all {
            if header.anchor >= first.header.anchor {
                end.check(proof_in(device, number, header, BLOCK_SIZE)?.durable_lsn)?;
            }
        }
        by_generation.extend(chain.drain(..).map(|s| (s.header.generation, (s.number, s.header))));
    }
    // Segments outside the chain hold nothing that was acknowledged, unless one proves otherwise below.
    let strays: Vec<_> = by_generation.into_values().collect();

    let mut reached: Option<Lsn> = None;
    let mut stopped: Option<End> = None;
    for (i, segment) in chain.iter().enumerate() {
        if let Some(end) = &stopped {
            // Past the end of the valid prefix: only look for proof that something is missing.
            end.check(proof_in(device, segment.number, &segment.header, BLOCK_SIZE)?.durable_lsn)?;
            free.push((segment.header.generation, segment.number));
            continue;
        }
        let expected = reached.map_or(segment.header.first_lsn, |lsn| lsn + 1);
        let parsed = parse(device, segment, expected, destaged)?;
        let last = parsed.last_lsn;
        tracing::debug!(
            segment = segment.number,
            generation = segment.header.generation,
            first_lsn = segment.header.first_lsn,
            last_lsn = last,
            end = parsed.end,
            known_end = segment.end,
            "log segment read"
        );
        // Without its last frames a segment is still complete when they had no records, which the next one shows.
        let complete = segment.end.is_some_and(|end| end == parsed.end)
            || segment.end.is_some() && chain.get(i + 1).is_some_and(|next| next.header.first_lsn == last + 1);
        if !complete {
            let end = End {
                segment: device.describe(segment.number),
                offset: parsed.end,
                last_lsn: last,
                destaged_lsn: destaged,
                behind: (segment.header.first_lsn > expected)
                    .then(|| (device.describe(segment.number), segment.header.first_lsn)),
            };
            if segment.settled {
                end.check(chain.iter().map(|s| s.header.durable_lsn).max().unwrap_or(0).max(last + 1))?;
            }
            let proof = proof_in(device, segment.number, &segment.header, parsed.end)?;
            end.check(proof.durable_lsn)?;
            // Something was begun here if it looks so, if frames stand behind, or if the next segment says so.
            let torn = parsed.torn || proof.frames > 0 || segment.end.is_some();
            out.torn = torn.then_some((segment.number, parsed.end));
            stopped = Some(end);
        }
        reached = Some(last);
        if segment.header.epoch > out.epoch {
            out.epoch = segment.header.epoch;
        }
        if parsed.frames.is_empty() {
            free.push((segment.header.generation, segment.number));
        } else {
            out.needed.push(NeededSegment {
                segment: segment.number,
                generation: segment.header.generation,
                end: parsed.end,
            });
            out.frames.extend(parsed.frames);
        }
    }
    let newest = chain.iter().map(|s| s.header.anchor).max().unwrap_or(0);
    for (number, header) in strays {
        if let Some(end) = &mut stopped
            && header.anchor == newest
            && header.generation > newest
        {
            // Unless a frame was begun where the prefix ends, what is missing is a whole segment.
            if out.torn.is_none() && end.behind.is_none() && header.first_lsn > end.last_lsn + 1 {
                end.behind = Some((device.describe(number), header.first_lsn));
            }
            end.check(proof_in(device, number, &header, BLOCK_SIZE)?.durable_lsn)?;
        }
        free.push((header.generation, number));
    }
    out.last_lsn = out.last_lsn.max(reached.unwrap_or(0));
    free.sort_unstable();
    out.free = free.into_iter().map(|(_, number)| number).collect();
    Ok(out)
}

fn io_error(device: &dyn LogDevice, segment: u32) -> impl Fn(io::Error) -> ScanError {
    move |source| ScanError::Io { segment: device.describe(segment), source }
}

fn read_header(device: &dyn LogDevice, volume: VolumeId, number: u32) -> Result<Option<SegmentHeader>, ScanError> {
    let mut block = AlignedBuf::zeroed(BLOCK);
    device.read(number, 0, &mut block).map_err(io_error(device, number))?;
    let header = match SegmentHeader::decode(&block) {
        Ok(header) => header,
        Err(FormatError::Absent) => return Ok(None),
        Err(source @ FormatError::Newer(_)) => {
            return Err(ScanError::Newer { segment: device.describe(number), source });
        }
    };
    if header.volume != volume {
        return Err(ScanError::Foreign { segment: device.describe(number), found: header.volume, expected: volume });
    }
    Ok((header.segment == number && header.segment_bytes == device.segment_bytes()).then_some(header))
}

/// Takes the live chain out of `all`, oldest first.
///
/// The newest anchor any header speaks of was durable before that header was written. Candidates are what the anchor
/// lists, the anchor, and the generations after it. The chain starts with the last candidate that begins inside the
/// bucket's state, for everything before it is obsolete: it may have been recycled, in part and in any order. From there
/// it goes on as long as generations follow each other.
fn chain(all: &mut BTreeMap<u64, (u32, SegmentHeader)>, destaged: Lsn) -> Vec<Segment> {
    let Some(anchor) = all.values().map(|(_, h)| h.anchor).max() else { return Vec::new() };
    let listed = all.get(&anchor).map(|(_, h)| h.chain.clone()).unwrap_or_default();
    // A listed segment that is gone was recycled; the LSN check of the caller notices if it should not be.
    let listed = listed.iter().map(|l| (l.generation.get(), Some(l.end.get()))).filter(|(g, _)| all.contains_key(g));
    let own = all.values().filter(|(_, h)| h.anchor == anchor).map(|(_, h)| (h.generation, None));
    let candidates: Vec<(u64, Option<u64>)> = listed.chain(own).collect();
    let first_lsn = |generation: &u64| all[generation].1.first_lsn;
    let start = candidates.iter().rposition(|(g, _)| first_lsn(g) <= destaged + 1).unwrap_or(0);
    let mut chain: Vec<Segment> = Vec::new();
    for &(generation, end) in &candidates[start..] {
        let follows = chain.last().is_none_or(|before| {
            end.is_some() || generation == before.header.generation + 1 || (before.settled && generation == anchor)
        });
        if !follows {
            break;
        }
        let Some((number, header)) = all.remove(&generation) else { break };
        if let Some(before) = chain.last_mut()
            && !before.settled
        {
            before.end = Some(header.prev_end);
        }
        chain.push(Segment { number, header, end, settled: end.is_some() });
    }
    chain
}

struct Parsed {
    frames: Vec<RecoveredFrame>,
    /// Where the valid part ends.
    end: u64,
    /// Last LSN of the valid part.
    last_lsn: Lsn,
    /// A frame was begun at `end`, but is not whole.
    torn: bool,
}

fn parse(device: &dyn LogDevice, segment: &Segment, expected: Lsn, destaged: Lsn) -> Result<Parsed, ScanError> {
    let bytes = read_segment(device, segment.number)?;
    let mut at = BLOCK;
    let mut next_lsn = expected;
    let mut frames = Vec::new();
    if segment.header.first_lsn != expected {
        return Ok(Parsed { frames, end: BLOCK_SIZE, last_lsn: expected - 1, torn: true });
    }
    let limit = segment.end.map_or(bytes.len(), |end| (end as usize).min(bytes.len()));
    while at < limit {
        let Some(header) = decode_at(device, segment.number, &bytes, segment.header.generation, at)? else { break };
        if header.first_lsn != next_lsn || header.epoch != segment.header.epoch {
            break;
        }
        let Some(end) = intact_end(&bytes, at, &header) else { break };
        let payload = at + header.header_blocks() * BLOCK;
        next_lsn = header.last_lsn() + 1;
        at = end;
        if header.last_lsn() > destaged {
            frames.push(RecoveredFrame { segment: segment.number, payload_offset: payload as u64, header });
        }
    }
    // Frames of an earlier use of the segment are nothing that was begun.
    let begun = |block| FrameHeader::claimed_blocks(block, segment.header.generation, at as u64).is_ok();
    let torn = bytes.get(at..at + BLOCK).is_some_and(begun);
    Ok(Parsed { frames, end: at as u64, last_lsn: next_lsn - 1, torn })
}

fn read_segment(device: &dyn LogDevice, number: u32) -> Result<AlignedBuf, ScanError> {
    let mut bytes = AlignedBuf::zeroed(device.segment_bytes() as usize);
    device.read(number, 0, &mut bytes).map_err(io_error(device, number))?;
    Ok(bytes)
}

fn decode_at(
    device: &dyn LogDevice,
    number: u32,
    bytes: &[u8],
    generation: u64,
    at: usize,
) -> Result<Option<FrameHeader>, ScanError> {
    let Ok(blocks) = FrameHeader::claimed_blocks(&bytes[at..], generation, at as u64) else { return Ok(None) };
    let Some(header) = bytes.get(at..at + blocks * BLOCK) else { return Ok(None) };
    match FrameHeader::decode(header, generation, at as u64) {
        Ok(header) => Ok(Some(header)),
        Err(FormatError::Absent) => Ok(None),
        Err(source) => Err(ScanError::Newer { segment: device.describe(number), source }),
    }
}

/// What the frames behind the end of a valid prefix say.
struct Proof {
    /// The highest durable horizon that the segment's header or any of the frames speaks of.
    durable_lsn: Lsn,
    frames: usize,
}

/// Looks at the header of a segment and all its frames at or after `from`.
fn proof_in(device: &dyn LogDevice, number: u32, header: &SegmentHeader, from: u64) -> Result<Proof, ScanError> {
    let mut proof = Proof { durable_lsn: header.durable_lsn, frames: 0 };
    for_each_frame(device, number, from as usize, Some(header.generation), |frame| {
        if frame.epoch == header.epoch {
            proof.durable_lsn = proof.durable_lsn.max(frame.durable_lsn);
            proof.frames += 1;
        }
    })?;
    Ok(proof)
}

fn read_headless(device: &dyn LogDevice, number: u32) -> Result<Headless, ScanError> {
    #[expect(clippy::reversed_empty_ranges, reason = "contains nothing")]
    let mut found = Headless { number, generation: 0, lsns: 1..=0, durable_lsn: 0 };
    for_each_frame(device, number, BLOCK, None, |frame| {
        found.durable_lsn = found.durable_lsn.max(frame.durable_lsn);
        if frame.generation > found.generation {
            found.generation = frame.generation;
            found.lsns = frame.first_lsn..=frame.last_lsn();
        } else if frame.generation == found.generation {
            found.lsns = *found.lsns.start()..=frame.last_lsn();
        }
    })?;
    Ok(found)
}

/// Visits every frame header of `generation`, or of any, in a segment from the block at `from` on. The payload of an
/// intact frame is passed over: a guest may have written blocks there that look like headers.
fn for_each_frame(
    device: &dyn LogDevice,
    number: u32,
    from: usize,
    generation: Option<u64>,
    mut visit: impl FnMut(&FrameHeader),
) -> Result<(), ScanError> {
    let bytes = read_segment(device, number)?;
    let mut at = from;
    while let Some(block) = bytes.get(at..at + BLOCK) {
        at += BLOCK;
        let Some(generation) = generation.or_else(|| FrameHeader::claimed_generation(block)) else { continue };
        let Some(frame) = decode_at(device, number, &bytes, generation, at - BLOCK)? else { continue };
        visit(&frame);
        if let Some(end) = intact_end(&bytes, at - BLOCK, &frame) {
            at = end;
        }
    }
    Ok(())
}

/// Where a frame that starts at `at` ends, if all its payload is there.
fn intact_end(bytes: &[u8], at: usize, header: &FrameHeader) -> Option<usize> {
    let start = at + header.header_blocks() * BLOCK;
    let end = start + header.sums.len() * BLOCK;
    let payload = bytes.get(start..end)?;
    payload.chunks_exact(BLOCK).zip(&header.sums).all(|(block, &sum)| block_sum(block) == sum).then_some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emptied_log_has_only_free_segments_and_goes_on_behind_the_bucket() {
        let needed = |segment| NeededSegment { segment, generation: u64::from(segment), end: 4096 };
        let log = Recovered {
            needed: vec![needed(3), needed(4)],
            free: vec![1, 2],
            last_lsn: 90,
            generation: 4,
            epoch: 7,
            ..Recovered::default()
        };
        let log = log.emptied(60);
        assert!(log.frames.is_empty() && log.needed.is_empty());
        // Those that are needed least come first.
        assert_eq!(log.free, [1, 2, 3, 4]);
        assert_eq!((log.last_lsn, log.generation, log.epoch), (60, 4, 7));
    }
}
