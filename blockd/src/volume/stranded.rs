//! Stranded writes: acknowledged by this host, never in the bucket, and now without a place in the history, because
//! another owner went on from before them. They are found, shown and exported; nothing here changes a log.

use std::io;

use crate::manifest::{EpochStart, Manifest};
use crate::types::{BLOCK_SIZE, Lsn, VolumeId};
use crate::wal::device::LogDevice;
use crate::wal::format::RecordKind;
use crate::wal::scan::{RecoveredFrame, ScanError, newest_epoch, scan};
use crate::wal::writer::LoggedPayload;

/// What a log holds that the volume's history went on without.
#[derive(Debug)]
pub struct Stranded {
    /// Epoch in which it was written.
    pub epoch: u64,
    /// Epoch of the owner that went on without it.
    pub taken_epoch: u64,
    /// Last LSN of this host's that the bucket has.
    pub bucket_lsn: Lsn,
    frames: Vec<RecoveredFrame>,
}

/// Where the history went on without what a log holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parting {
    /// Newest epoch of the log.
    pub epoch: u64,
    /// Epoch that went on.
    pub taken_epoch: u64,
    /// Last LSN that both have.
    pub bucket_lsn: Lsn,
}

impl Parting {
    /// Looks whether somebody went on without the log of `host` on `device`. Nothing in it that the bucket does not have belongs to
    /// the history then, not even what seems to follow on it: its numbers were given out a second time.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn find(device: &dyn LogDevice, manifest: &Manifest, host: [u8; 16]) -> Result<Option<Self>, ScanError> {
        let epoch = newest_epoch(device, manifest.id)?;
        if epoch == 0 {
            return Ok(None);
        }
        Ok(Self::of(&manifest.epochs, epoch, host))
    }

    /// The parting of the log of `host` whose newest epoch is `epoch`, from what the manifest tells of owners.
    fn of(epochs: &[EpochStart], epoch: u64, host: [u8; 16]) -> Option<Self> {
        let settled: Vec<_> = epochs.iter().filter(|e| e.first_seq > 0).collect();
        // An own later epoch that left no trace in this log wrote nothing, or it is not of this log: of a copy of the
        // directory, or of a log that was moved away.
        let went_on = settled.iter().enumerate().find(|(i, e)| {
            let wrote = settled.get(i + 1).is_some_and(|next| next.first_lsn > e.first_lsn);
            e.epoch > epoch && (e.owner != host || wrote)
        });
        went_on.map(|(_, taken)| Self {
            epoch,
            taken_epoch: taken.epoch,
            bucket_lsn: taken.first_lsn.saturating_sub(1),
        })
    }
}

/// One stranded write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StrandedWrite {
    /// Its number.
    pub lsn: Lsn,
    /// When its frame was written, Unix milliseconds.
    pub time_ms: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// What it did.
    pub kind: StrandedKind,
}

/// What a stranded write did to its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StrandedKind {
    /// It was written; the log has the content.
    Data,
    /// It reads as zeroes since.
    Zeroes,
    /// It is a copy by reference: its content is that of the payload of the chunk `seq` of the volume, from block `index` on.
    /// The chunk may be gone by now, since whoever has the volume knows nothing of this.
    Copy {
        /// The chunk's sequence number.
        seq: u64,
        /// Payload index of the first block.
        index: u16,
    },
}

impl Stranded {
    /// Looks for stranded writes of `host` in the log on `device`. The settled epochs of `manifest` say who went on
    /// where.
    ///
    /// # Errors
    /// The log cannot be read, or is damaged.
    pub fn find(device: &dyn LogDevice, manifest: &Manifest, host: [u8; 16]) -> Result<Option<Self>, ScanError> {
        match Parting::find(device, manifest, host)? {
            Some(parting) => {
                Self::beyond(device, manifest.id, (parting.epoch, parting.taken_epoch), parting.bucket_lsn)
            }
            None => Ok(None),
        }
    }

    /// The writes after `bucket_lsn`, where epoch `epochs.0` ended and another owner went on as `epochs.1`.
    ///
    /// # Errors
    /// As [`Stranded::find`].
    pub fn beyond(
        device: &dyn LogDevice,
        volume: VolumeId,
        epochs: (u64, u64),
        bucket_lsn: Lsn,
    ) -> Result<Option<Self>, ScanError> {
        let frames = scan(device, volume, bucket_lsn)?.frames;
        let holds = frames.iter().any(|frame| !frame.header.records.is_empty());
        Ok(holds.then_some(Self { epoch: epochs.0, taken_epoch: epochs.1, bucket_lsn, frames }))
    }

    /// First and last LSN.
    pub fn lsns(&self) -> (Lsn, Lsn) {
        let first = self.frames.first().map_or(0, |frame| frame.header.first_lsn);
        (first.max(self.bucket_lsn + 1), self.frames.last().map_or(0, |frame| frame.header.last_lsn()))
    }

    /// Everything stranded, oldest first.
    pub fn writes(&self) -> impl Iterator<Item = StrandedWrite> {
        self.records().map(|(write, _)| write)
    }

    fn records(&self) -> impl Iterator<Item = (StrandedWrite, Option<LoggedPayload>)> {
        let of_frame = |frame: &RecoveredFrame| {
            let (segment, offset, time_ms) = (frame.segment, frame.payload_offset, frame.header.time_ms);
            let sums: std::sync::Arc<[u64]> = frame.header.sums.as_slice().into();
            let records: Vec<_> = (frame.header.first_lsn..).zip(&frame.header.records).collect();
            let row = move |(lsn, record): (Lsn, &crate::wal::format::Record)| {
                let payload = match record.kind {
                    RecordKind::Data { at } => {
                        Some(LoggedPayload::new(segment, offset, sums.clone(), at as usize, record.blocks as usize))
                    }
                    RecordKind::Zero { .. } | RecordKind::Refer { .. } => None,
                };
                let kind = match record.kind {
                    RecordKind::Data { .. } => StrandedKind::Data,
                    RecordKind::Zero { .. } => StrandedKind::Zeroes,
                    RecordKind::Refer { seq, index } => StrandedKind::Copy { seq, index },
                };
                let write = StrandedWrite {
                    lsn,
                    time_ms,
                    offset: record.lba * BLOCK_SIZE,
                    len: record.blocks * BLOCK_SIZE,
                    kind,
                };
                (write, payload)
            };
            records.into_iter().map(row).collect::<Vec<_>>()
        };
        self.frames.iter().flat_map(of_frame).filter(|(write, _)| write.lsn > self.bucket_lsn)
    }

    /// Hands out every write in order, with its content where the log has that.
    ///
    /// # Errors
    /// The log cannot be read or does not hold what it held; or whatever `take` says.
    pub fn replay(
        &self,
        device: &dyn LogDevice,
        mut take: impl FnMut(&StrandedWrite, Option<&[u8]>) -> io::Result<()>,
    ) -> io::Result<()> {
        for (write, payload) in self.records() {
            let bytes = payload.map(|payload| payload.read(device)).transpose()?;
            take(&write, bytes.as_ref().map(|bytes| &bytes[..]))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: [u8; 16] = [1; 16];
    const OTHER: [u8; 16] = [2; 16];

    fn epoch(epoch: u64, first_seq: u64, first_lsn: Lsn, owner: [u8; 16]) -> EpochStart {
        EpochStart { epoch, first_seq, first_lsn, owner, opened_ms: 0 }
    }

    #[test]
    fn a_log_parts_from_the_history_where_somebody_else_went_on() {
        let parting = |epochs: &[EpochStart], newest| {
            Parting::of(epochs, newest, ME).map(|parting| (parting.taken_epoch, parting.bucket_lsn))
        };
        let mine = epoch(1, 1, 1, ME);
        assert_eq!(parting(&[mine], 1), None);
        assert_eq!(parting(&[mine, epoch(2, 5, 40, OTHER)], 1), Some((2, 39)));
        // Claimed, but where it goes on is not settled yet.
        assert_eq!(parting(&[mine, epoch(2, 0, 0, OTHER)], 1), None);
        // What others did before this log's newest epoch is in it.
        assert_eq!(parting(&[epoch(1, 1, 1, OTHER), epoch(2, 5, 40, ME)], 2), None);
        // The first of several is where it parted.
        let back_and_forth = [mine, epoch(2, 5, 40, OTHER), epoch(3, 9, 70, ME)];
        assert_eq!(parting(&back_and_forth, 1), Some((2, 39)));
        assert_eq!(parting(&back_and_forth, 3), None);
        // An own epoch without a trace here wrote nothing, or elsewhere.
        assert_eq!(parting(&[mine, epoch(2, 5, 40, ME)], 1), None);
        assert_eq!(parting(&[mine, epoch(2, 5, 40, ME), epoch(3, 6, 41, OTHER)], 1), Some((2, 39)));
    }
}
