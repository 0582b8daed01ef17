//! Chunks: immutable objects that hold a volume's data in the bucket.
//!
//! [`format`] knows the bytes (pure, total on foreign input), [`codec`] the compression of one frame, [`draft`]
//! makes a chunk out of dirty pieces, [`index`] fetches a header back, [`reader`] reads blocks through the
//! translation table, the frame cache and the store ([`plan`], [`flight`] and [`fetch`] are its parts), [`sealed`]
//! encrypts headers and frames of encrypted volumes.
//!
//! What must hold: a chunk is written once under a name never used again; nothing in a header is trusted before its
//! checksum and its identity (volume, epoch, sequence) are; no byte of payload reaches a reader whose checksum,
//! seeded with the chunk's identity and the frame's number, does not fit; in an encrypted volume nothing is believed that
//! was not written with its key. Byte tables: `docs/format.md`.

mod codec;
#[cfg(feature = "engine")]
mod draft;
#[cfg(feature = "engine")]
mod error;
#[cfg(feature = "engine")]
mod fetch;
#[cfg(feature = "engine")]
mod flight;
pub mod format;
mod frames;
#[cfg(feature = "engine")]
mod index;
mod name;
#[cfg(feature = "engine")]
mod plan;
#[cfg(feature = "engine")]
mod reader;
#[cfg(feature = "engine")]
mod sealed;

pub use codec::Codec;
#[cfg(feature = "engine")]
pub use draft::{Chunk, ChunkDraft, ChunkError, Piece, encode_seal};
#[cfg(feature = "engine")]
pub use error::ReadError;
pub use format::{ChunkExtent, ChunkIndex, ChunkKind, ExtentKind, FormatError, MAX_EXTENTS, MAX_PAYLOAD_BLOCKS};
pub use frames::{FRAME_BLOCKS, FRAME_BYTES, FRAME_STORED_BYTES, Frame, FrameCipher, FrameDirectory, FrameEncoding};
#[cfg(feature = "engine")]
pub use index::read_index;
pub use name::{ChunkName, RELOCATED, relocated_base};
#[cfg(feature = "engine")]
pub use reader::BlockReader;

#[cfg(all(test, feature = "engine"))]
mod sealed_tests;
#[cfg(all(test, feature = "engine"))]
pub(crate) mod testing;
#[cfg(all(test, feature = "engine"))]
mod tests;
