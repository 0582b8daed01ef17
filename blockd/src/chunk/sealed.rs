//! Chunks of encrypted volumes: the header inside an envelope, and each frame by itself.
//!
//! The keys follow from the volume's data key and the chunk's name alone, one for the header and one for the frames, so
//! that who knows where a block stands can read it without asking for anything else first. A frame's nonce is its number:
//! a chunk's payload is encrypted once, because an epoch belongs to one process and that never gives a seq to two chunks.
//! A header's nonce is a keyed hash of the header, because a seal may be made, by two owners, for the name of a chunk that
//! was made but did not arrive: those are three headers under one name.

use aws_lc_rs::aead::{Aad, LessSafeKey, Nonce};
use aws_lc_rs::hmac;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::format::{ChunkIndex, FormatError, MAGIC as CLEAR_MAGIC, MAX_HEADER, PREAMBLE};
use super::frames::{FrameCipher, FrameEncoding};
use super::name::ChunkName;
use crate::crypt::{Keys, TAG};

/// First bytes of every encrypted chunk.
const MAGIC: [u8; 8] = *b"BLKDCRPT";
/// The version this code writes and reads.
const VERSION: u16 = 1;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Envelope {
    magic: [u8; 8],
    version: U16,
    cipher: u8,
    reserved: u8,
    /// Of envelope, encrypted header and tag: where the frames begin.
    len: U32,
    nonce: [u8; 12],
    reserved2: U32,
}

const ENVELOPE: usize = 32;
const _: () = assert!(size_of::<Envelope>() == ENVELOPE);
const _: () = assert!(FrameCipher::Aes256Gcm.overhead() == TAG);

/// Bytes that a header of `len` takes in the object.
pub(super) fn stored_len(len: usize, keys: Option<&Keys>) -> usize {
    if keys.is_some() { ENVELOPE + len + TAG } else { len }
}

/// A chunk's header as stored.
pub(super) fn encode(index: &ChunkIndex, keys: Option<&Keys>) -> Vec<u8> {
    let header = index.encode();
    let Some(keys) = keys else { return header };
    let id = index.name.id();
    let mut nonce = [0; 12];
    let hash = hmac::sign(&keys.signer("chunk header nonce v1", &id), &header);
    nonce.copy_from_slice(&hash.as_ref()[..12]);
    let envelope = Envelope {
        magic: MAGIC,
        version: VERSION.into(),
        cipher: FrameCipher::Aes256Gcm as u8,
        reserved: 0,
        len: ((ENVELOPE + header.len() + TAG) as u32).into(),
        nonce,
        reserved2: 0.into(),
    };
    let mut out = vec![0; ENVELOPE + header.len() + TAG];
    let (start, rest) = out.split_at_mut(ENVELOPE);
    let (text, tag) = rest.split_at_mut(header.len());
    start.copy_from_slice(envelope.as_bytes());
    header_key(keys, &id)
        .seal_out_of_place_scatter(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(envelope.as_bytes()),
            &header,
            text,
            &[],
            tag,
        )
        .expect("a header is far below the cipher's limit");
    out
}

fn header_key(keys: &Keys, id: &[u8; 32]) -> LessSafeKey {
    keys.cipher("chunk header v1", id)
}

fn envelope(start: &[u8]) -> Result<&Envelope, FormatError> {
    let short = FormatError::Truncated { need: ENVELOPE, have: start.len() };
    let (envelope, _) = Envelope::ref_from_prefix(start).map_err(|_| short)?;
    if envelope.magic == CLEAR_MAGIC {
        return Err(FormatError::Clear);
    }
    if envelope.magic != MAGIC {
        return Err(FormatError::Magic);
    }
    if envelope.version.get() != VERSION {
        return Err(FormatError::Version(envelope.version.get()));
    }
    if envelope.cipher != FrameCipher::Aes256Gcm as u8 {
        return Err(FormatError::UnknownCipher(envelope.cipher));
    }
    if !(ENVELOPE + PREAMBLE + TAG..=ENVELOPE + MAX_HEADER + TAG).contains(&(envelope.len.get() as usize)) {
        return Err(FormatError::Invalid("the header's length is out of range"));
    }
    Ok(envelope)
}

/// Length in the object of the header that `start`, its first bytes, begins. Not yet verified, but bounded.
pub(super) fn peek_len(start: &[u8], keys: Option<&Keys>) -> Result<usize, FormatError> {
    match keys {
        Some(_) => Ok(envelope(start)?.len.get() as usize),
        None if start.starts_with(&MAGIC) => Err(FormatError::Encrypted),
        None => ChunkIndex::peek_len(start),
    }
}

/// Decrypts, parses and verifies the header of `name`. `bytes` begins with it; what follows it is ignored. With keys
/// nothing is accepted that was not encrypted with them.
pub(super) fn decode(bytes: &[u8], name: &ChunkName, keys: Option<&Keys>) -> Result<ChunkIndex, FormatError> {
    let len = peek_len(bytes, keys)?;
    let Some(keys) = keys else { return ChunkIndex::decode(bytes, name) };
    let stored = bytes.get(..len).ok_or(FormatError::Truncated { need: len, have: bytes.len() })?;
    let envelope = envelope(stored)?;
    let (text, tag) = stored[ENVELOPE..].split_at(len - ENVELOPE - TAG);
    let mut header = vec![0; text.len()];
    header_key(keys, &name.id())
        .open_separate_gather(
            Nonce::assume_unique_for_key(envelope.nonce),
            Aad::from(envelope.as_bytes()),
            text,
            tag,
            &mut header,
        )
        .map_err(|_| FormatError::Forged)?;
    ChunkIndex::decode_clear(&header, name, Some(len as u32))
}

/// The key of one chunk's frames.
pub(super) struct FrameKey(LessSafeKey);

impl FrameKey {
    pub(super) fn new(keys: &Keys, name: &ChunkName) -> Self {
        Self(keys.cipher("chunk frames v1", &name.id()))
    }

    /// Encrypts a frame into `out`, which is longer by the tag.
    pub(super) fn seal(&self, number: u32, blocks: u8, encoding: FrameEncoding, encoded: &[u8], out: &mut [u8]) {
        let (text, tag) = out.split_at_mut(encoded.len());
        self.0
            .seal_out_of_place_scatter(nonce(number), place(blocks, encoding), encoded, text, &[], tag)
            .expect("a frame is far below the cipher's limit");
    }

    /// Decrypts a frame into `out`, which is shorter by the tag. False when it is not the frame; `out` then holds rubbish.
    pub(super) fn open(&self, number: u32, blocks: u8, encoding: FrameEncoding, stored: &[u8], out: &mut [u8]) -> bool {
        let Some((text, tag)) = stored.split_at_checked(out.len()) else { return false };
        self.0.open_separate_gather(nonce(number), place(blocks, encoding), text, tag, out).is_ok()
    }
}

fn nonce(number: u32) -> Nonce {
    let mut nonce = [0; 12];
    nonce[..4].copy_from_slice(&number.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

/// What a frame is bound to beside chunk and number, which key and nonce stand for.
fn place(blocks: u8, encoding: FrameEncoding) -> Aad<[u8; 2]> {
    Aad::from([blocks, encoding as u8])
}
