//! Increments: what changed in a volume from one snapshot to another, as a file (docs/format.md).
//!
//! A file is written and read in one go. Before anything of it is applied it is read to its end, and the volume is compared,
//! at a few of the places that changed, with what the older snapshot held there: an increment on top of anything else would
//! be neither the one nor the other.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, bail};
use indicatif::ProgressBar;
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::admin::api::ChangedRange;
use crate::config::ByteSize;
use crate::export::nbd::client::NbdClient;
use crate::types::{BLOCK, BLOCK_SIZE};

/// First bytes of an increment.
pub(super) const MAGIC: [u8; 8] = *b"BLKDINCR";
const VERSION: u16 = 1;
/// Most bytes of one record's content.
const PIECE: u64 = 1 << 20;
/// Most places at which the older content is recorded.
const PROBES_MAX: usize = 64;
/// Most of one zeroing request.
const ZERO_MAX: u64 = 1 << 30;

const DATA: u8 = 1;
const ZERO: u8 = 2;
const PROBE: u8 = 3;
const END: u8 = 4;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U16,
    reserved: U16,
    block: U32,
    /// Size of the volume in the newer snapshot.
    size: U64,
    volume: [u8; 16],
    from: [u8; 16],
    to: [u8; 16],
    /// Of all before it.
    sum: U64,
}

const _: () = assert!(size_of::<Header>() == 80);

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Record {
    kind: u8,
    reserved: [u8; 7],
    /// First byte of the volume; of [`END`] the number of records before it.
    offset: U64,
    /// Bytes of the volume; of [`END`] the content bytes of all records.
    len: U64,
    /// Of the content of [`DATA`]; of [`PROBE`] of what stood there in the older snapshot; of [`END`] of all records.
    sum: U64,
    /// Of [`PROBE`]: of what stands there in the newer one.
    new_sum: U64,
}

const _: () = assert!(size_of::<Record>() == 40);

/// Whose changes an increment holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// Size of the volume in the newer snapshot, in bytes.
    pub size: u64,
    /// The volume.
    pub volume: [u8; 16],
    /// The older snapshot.
    pub from: [u8; 16],
    /// The newer one.
    pub to: [u8; 16],
}

/// What an increment came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Applied {
    /// Bytes with content.
    pub data: u64,
    /// Bytes that read as zeroes.
    pub zeroes: u64,
}

/// Writes records and sums them up.
struct Writer<W> {
    out: W,
    sum: Xxh3Default,
    records: u64,
    content: u64,
}

impl<W: Write> Writer<W> {
    fn record(&mut self, record: Record, content: &[u8]) -> io::Result<()> {
        self.sum.update(record.as_bytes());
        self.records += 1;
        self.content += content.len() as u64;
        self.out.write_all(record.as_bytes())?;
        self.out.write_all(content)
    }

    fn end(mut self) -> io::Result<W> {
        let end = Record {
            kind: END,
            reserved: [0; 7],
            offset: self.records.into(),
            len: self.content.into(),
            sum: self.sum.digest().into(),
            new_sum: 0.into(),
        };
        self.out.write_all(end.as_bytes())?;
        self.out.flush()?;
        Ok(self.out)
    }
}

fn record(kind: u8, offset: u64, len: u64, sum: u64, new_sum: u64) -> Record {
    Record { kind, reserved: [0; 7], offset: offset.into(), len: len.into(), sum: sum.into(), new_sum: new_sum.into() }
}

/// Writes what changed, `ranges`, with the content that `new` has there; `old` is the older snapshot.
pub(super) fn write(
    file: File,
    identity: &Identity,
    ranges: &[ChangedRange],
    old: &mut NbdClient,
    new: &mut NbdClient,
    bar: &ProgressBar,
) -> io::Result<Applied> {
    let mut header = Header {
        magic: MAGIC,
        version: VERSION.into(),
        reserved: 0.into(),
        block: (BLOCK as u32).into(),
        size: identity.size.into(),
        volume: identity.volume,
        from: identity.from,
        to: identity.to,
        sum: 0.into(),
    };
    header.sum = header_sum(&header).into();
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(header.as_bytes())?;
    let mut out = Writer { out, sum: Xxh3Default::new(), records: 0, content: 0 };
    let (old_size, mut block, mut other) = (old.size(), [0; BLOCK], [0; BLOCK]);
    // Spread over all that changed.
    let inside: Vec<_> = ranges.iter().filter(|range| range.offset + BLOCK_SIZE <= old_size).collect();
    for i in 0..inside.len().min(PROBES_MAX) {
        let at = inside[i * inside.len() / inside.len().min(PROBES_MAX)].offset;
        old.read(at, &mut block)?;
        new.read(at, &mut other)?;
        out.record(record(PROBE, at, BLOCK_SIZE, xxh3_64(&block), xxh3_64(&other)), &[])?;
    }
    let mut applied = Applied::default();
    let mut content = vec![0; PIECE as usize];
    for range in ranges {
        let end = range.offset + range.len;
        if range.zero {
            out.record(record(ZERO, range.offset, range.len, 0, 0), &[])?;
            applied.zeroes += range.len;
        } else {
            for at in (range.offset..end).step_by(PIECE as usize) {
                let content = &mut content[..PIECE.min(end - at) as usize];
                new.read(at, content)?;
                out.record(record(DATA, at, content.len() as u64, xxh3_64(content), 0), content)?;
                applied.data += content.len() as u64;
            }
        }
        bar.inc(range.len);
    }
    out.end()?;
    Ok(applied)
}

fn header_sum(header: &Header) -> u64 {
    xxh3_64(&header.as_bytes()[..size_of::<Header>() - 8])
}

/// An increment that was read to its end.
pub(super) struct Increment {
    file: BufReader<File>,
    /// Whose it is.
    pub identity: Identity,
    probes: Vec<Record>,
    /// What it will change.
    pub changes: Applied,
}

impl Increment {
    /// Reads it to its end.
    pub fn open(path: &Path, bar: &ProgressBar) -> anyhow::Result<Self> {
        let what = || format!("cannot read {}", path.display());
        let mut file = BufReader::with_capacity(1 << 20, File::open(path).with_context(what)?);
        let mut bytes = [0; size_of::<Header>()];
        file.read_exact(&mut bytes).with_context(what)?;
        let header = Header::read_from_bytes(&bytes).expect("it has the size of one");
        if header.magic != MAGIC {
            bail!("{} is not an increment", path.display());
        }
        if header.version.get() != VERSION {
            bail!(
                "{} is an increment of format version {}, this blockd knows version {VERSION}; use a newer one",
                path.display(),
                header.version
            );
        }
        if header.sum.get() != header_sum(&header) || header.block.get() as usize != BLOCK {
            bail!("{} is damaged: its header does not match its checksum", path.display());
        }
        let identity = Identity { size: header.size.get(), volume: header.volume, from: header.from, to: header.to };
        let mut increment = Self { file, identity, probes: Vec::new(), changes: Applied::default() };
        let (mut probes, mut changes) = (Vec::new(), Applied::default());
        bar.set_length(increment.file.get_ref().metadata().with_context(what)?.len());
        increment
            .each(|record, content| {
                match record.kind {
                    PROBE => probes.push(record),
                    ZERO => changes.zeroes += record.len.get(),
                    _ => changes.data += record.len.get(),
                }
                bar.inc((size_of::<Record>() + content.len()) as u64);
                Ok(())
            })
            .with_context(|| format!("{} cannot be used, and nothing was changed", path.display()))?;
        (increment.probes, increment.changes) = (probes, changes);
        Ok(increment)
    }

    /// Whether the volume holds what the older snapshot held, as far as that was recorded; or already what the newer did.
    pub fn fits(&self, volume: &mut NbdClient) -> io::Result<bool> {
        let mut block = [0; BLOCK];
        for probe in &self.probes {
            volume.read(probe.offset.get(), &mut block)?;
            let sum = xxh3_64(&block);
            if sum != probe.sum.get() && sum != probe.new_sum.get() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Makes the changes, and makes them durable.
    pub fn apply(&mut self, volume: &mut NbdClient, bar: &ProgressBar) -> anyhow::Result<()> {
        let total = self.changes.data + self.changes.zeroes;
        bar.set_length(total);
        bar.set_position(0);
        self.each(|record, content| {
            let (offset, len) = (record.offset.get(), record.len.get());
            match record.kind {
                DATA => volume.write(offset, content)?,
                ZERO => {
                    for at in (offset..offset + len).step_by(ZERO_MAX as usize) {
                        volume.zero(at, ZERO_MAX.min(offset + len - at) as u32)?;
                    }
                }
                _ => return Ok(()),
            }
            bar.inc(len);
            Ok(())
        })?;
        Ok(volume.flush()?)
    }

    /// Shows every record with its content, all of them verified.
    fn each(&mut self, mut visit: impl FnMut(Record, &[u8]) -> io::Result<()>) -> anyhow::Result<()> {
        self.file.seek(SeekFrom::Start(size_of::<Header>() as u64))?;
        let (mut sum, mut records, mut total) = (Xxh3Default::new(), 0u64, 0u64);
        let mut content = vec![0; PIECE as usize];
        loop {
            let mut bytes = [0; size_of::<Record>()];
            self.file.read_exact(&mut bytes).map_err(cut_short)?;
            let record = Record::read_from_bytes(&bytes).expect("it has the size of one");
            let (offset, len) = (record.offset.get(), record.len.get());
            if record.kind == END {
                let expected = (records, total, sum.digest());
                if (offset, len, record.sum.get()) != expected || self.file.read(&mut [0])? != 0 {
                    bail!("it is damaged at its end");
                }
                return Ok(());
            }
            let fits =
                offset.checked_add(len).is_some_and(|end| end <= self.identity.size.next_multiple_of(BLOCK_SIZE));
            let sound = match record.kind {
                DATA => (1..=PIECE).contains(&len),
                ZERO => len > 0,
                PROBE => len == BLOCK_SIZE && self.probes.len() <= PROBES_MAX,
                _ => false,
            };
            if !fits || !sound || !offset.is_multiple_of(BLOCK_SIZE) {
                bail!("it is damaged: record {} makes no sense", records + 1);
            }
            sum.update(&bytes);
            records += 1;
            let content = &mut content[..if record.kind == DATA { len as usize } else { 0 }];
            self.file.read_exact(content).map_err(cut_short)?;
            if record.kind == DATA && xxh3_64(content) != record.sum.get() {
                bail!("it is damaged: the content of record {records} does not match its checksum");
            }
            total += content.len() as u64;
            visit(record, content)?;
        }
    }
}

fn cut_short(error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => anyhow::anyhow!("it is cut short"),
        _ => error.into(),
    }
}

/// Refuses a volume that is too small.
pub(super) fn check_size(name: &str, identity: &Identity, size: u64) -> anyhow::Result<()> {
    if size < identity.size {
        let wanted = ByteSize(identity.size);
        bail!(
            "the increment is of a volume of {wanted} and volume {name:?} has {}; `blockd volume resize {name} {wanted}` first",
            ByteSize(size)
        );
    }
    Ok(())
}
