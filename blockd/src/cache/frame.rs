//! Keys and values of the cache, and how they are written to its disk.

use std::io::{Read, Write};

use bytes::Bytes;
use foyer::{Code, Error, ErrorKind, Result};

use crate::chunk::{ChunkName, FRAME_STORED_BYTES};
use crate::types::VolumeId;

/// Names a frame of a chunk. Chunks are written once, so what a key stands for never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrameKey {
    /// The chunk.
    pub chunk: ChunkName,
    /// The frame's number in it.
    pub frame: u32,
}

/// A frame as stored in its chunk.
#[derive(Clone, Debug)]
pub(super) struct StoredFrame(pub(super) Bytes);

const KEY_LEN: usize = 36;

impl Code for FrameKey {
    fn encode(&self, writer: &mut impl Write) -> Result<()> {
        let mut bytes = [0; KEY_LEN];
        bytes[..16].copy_from_slice(&self.chunk.volume.0);
        bytes[16..24].copy_from_slice(&self.chunk.epoch.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.chunk.seq.to_le_bytes());
        bytes[32..].copy_from_slice(&self.frame.to_le_bytes());
        writer.write_all(&bytes).map_err(Error::io_error)
    }

    fn decode(reader: &mut impl Read) -> Result<Self> {
        fn take<const N: usize>(reader: &mut impl Read) -> Result<[u8; N]> {
            let mut bytes = [0; N];
            reader.read_exact(&mut bytes).map_err(Error::io_error)?;
            Ok(bytes)
        }
        Ok(Self {
            chunk: ChunkName {
                volume: VolumeId(take(reader)?),
                epoch: u64::from_le_bytes(take(reader)?),
                seq: u64::from_le_bytes(take(reader)?),
            },
            frame: u32::from_le_bytes(take(reader)?),
        })
    }

    fn estimated_size(&self) -> usize {
        KEY_LEN
    }
}

impl Code for StoredFrame {
    fn encode(&self, writer: &mut impl Write) -> Result<()> {
        let len = (self.0.len() as u32).to_le_bytes();
        writer.write_all(&len).map_err(Error::io_error)?;
        writer.write_all(&self.0).map_err(Error::io_error)
    }

    fn decode(reader: &mut impl Read) -> Result<Self> {
        let mut len = [0; 4];
        reader.read_exact(&mut len).map_err(Error::io_error)?;
        let len = u32::from_le_bytes(len) as usize;
        if len > FRAME_STORED_BYTES {
            return Err(Error::new(ErrorKind::Parse, "a cached frame is too long"));
        }
        let mut bytes = vec![0; len];
        reader.read_exact(&mut bytes).map_err(Error::io_error)?;
        Ok(Self(bytes.into()))
    }

    fn estimated_size(&self) -> usize {
        4 + self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let key = FrameKey { chunk: ChunkName { volume: VolumeId([9; 16]), epoch: 2, seq: 3 }, frame: 4 };
        let mut bytes = Vec::new();
        key.encode(&mut bytes).unwrap();
        assert_eq!(bytes.len(), key.estimated_size());
        assert_eq!(FrameKey::decode(&mut &bytes[..]).unwrap(), key);
        let frame = StoredFrame(Bytes::from_static(b"abc"));
        let mut bytes = Vec::new();
        frame.encode(&mut bytes).unwrap();
        assert_eq!(bytes.len(), frame.estimated_size());
        assert_eq!(StoredFrame::decode(&mut &bytes[..]).unwrap().0, frame.0);
        assert!(StoredFrame::decode(&mut &[0xff; 100][..]).is_err());
        assert!(StoredFrame::decode(&mut &bytes[..6]).is_err());
    }
}
