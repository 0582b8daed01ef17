//! Whole objects under a name: whatever belongs to an encrypted volume and is neither chunk nor manifest.

use aws_lc_rs::aead::{Aad, LessSafeKey, Nonce};
use aws_lc_rs::hmac;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::keys::{Keys, TAG};

/// First bytes of every sealed object.
const MAGIC: [u8; 8] = *b"BLKDSEAL";
/// The version this code writes and reads.
const VERSION: u16 = 1;
/// The code of AES-256-GCM.
const AES_256_GCM: u8 = 1;
/// Bytes of plaintext under one tag.
const SEGMENT: usize = 64 << 10;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U16,
    cipher: u8,
    reserved: u8,
    segment: U32,
    len: U64,
    salt: [u8; 16],
}

const HEADER: usize = 40;
const _: () = assert!(size_of::<Header>() == HEADER);

/// Why bytes are not the object they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    /// Not encrypted, or something else altogether.
    #[error("it does not begin like an encrypted object")]
    Magic,
    /// Written by a newer program.
    #[error("its format (version {0}, cipher {1}) is unknown to this program; use a newer one")]
    Version(u16, u8),
    /// Not as long as it says.
    #[error("it is {have} bytes long where {need} are needed")]
    Length {
        /// Bytes needed.
        need: u64,
        /// Bytes there.
        have: u64,
    },
    /// Somebody changed it, put it in the place of another, or encrypted it with another key.
    #[error("it is not authentic: it was changed, belongs elsewhere, or was written with another key")]
    Forged,
}

impl Keys {
    /// Encrypts the object that will be stored as `name`. The same plaintext under the same name gives the same bytes,
    /// so that an upload can be repeated.
    pub fn seal_object(&self, name: &str, plaintext: &[u8]) -> Vec<u8> {
        let header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            cipher: AES_256_GCM,
            reserved: 0,
            segment: (SEGMENT as u32).into(),
            len: (plaintext.len() as u64).into(),
            salt: self.object_salt(name, plaintext),
        };
        let key = self.object_key(name, &header);
        let mut out = Vec::with_capacity(HEADER + plaintext.len() + plaintext.len().div_ceil(SEGMENT).max(1) * TAG);
        out.extend_from_slice(header.as_bytes());
        for (number, segment) in segments(plaintext, SEGMENT).enumerate() {
            let start = out.len();
            out.extend_from_slice(segment);
            let tag = key
                .seal_in_place_separate_tag(nonce(number), Aad::from(header.as_bytes()), &mut out[start..])
                .expect("a segment is far below the cipher's limit");
            out.extend_from_slice(tag.as_ref());
        }
        out
    }

    /// Decrypts the object that is stored as `name`. Nothing of it is handed out unless all of it is authentic.
    pub fn open_object(&self, name: &str, stored: &[u8]) -> Result<Vec<u8>, ObjectError> {
        let short = ObjectError::Length { need: HEADER as u64, have: stored.len() as u64 };
        let (header, body) = Header::ref_from_prefix(stored).map_err(|_| short)?;
        if header.magic != MAGIC {
            return Err(ObjectError::Magic);
        }
        if header.version.get() != VERSION || header.cipher != AES_256_GCM || header.segment.get() != SEGMENT as u32 {
            return Err(ObjectError::Version(header.version.get(), header.cipher));
        }
        let tags = header.len.get().div_ceil(SEGMENT as u64).max(1).saturating_mul(TAG as u64);
        let need = header.len.get().saturating_add(tags).saturating_add(HEADER as u64);
        if need != stored.len() as u64 {
            return Err(ObjectError::Length { need, have: stored.len() as u64 });
        }
        let key = self.object_key(name, header);
        let mut out = vec![0; header.len.get() as usize];
        let mut at = 0;
        for (number, segment) in segments(body, SEGMENT + TAG).enumerate() {
            let (text, tag) = segment.split_at(segment.len() - TAG);
            let place = &mut out[at..at + text.len()];
            key.open_separate_gather(nonce(number), Aad::from(header.as_bytes()), text, tag, place)
                .map_err(|_| ObjectError::Forged)?;
            at += text.len();
        }
        Ok(out)
    }

    /// Two plaintexts under one name get different keys, so that no nonce meets both.
    fn object_salt(&self, name: &str, plaintext: &[u8]) -> [u8; 16] {
        let mut hash = hmac::Context::with_key(&self.signer("object salt v1", &[]));
        hash.update(&(name.len() as u64).to_le_bytes());
        hash.update(name.as_bytes());
        hash.update(plaintext);
        let mut salt = [0; 16];
        salt.copy_from_slice(&hash.sign().as_ref()[..16]);
        salt
    }

    fn object_key(&self, name: &str, header: &Header) -> LessSafeKey {
        self.cipher("object v1", &[&header.salt, name.as_bytes()].concat())
    }
}

/// Pieces of `bytes`, of which there is always one.
fn segments(bytes: &[u8], len: usize) -> impl Iterator<Item = &[u8]> {
    let empty = bytes.is_empty().then_some(bytes);
    empty.into_iter().chain(bytes.chunks(len))
}

/// Each segment of an object has its own, and no two objects share a key.
fn nonce(number: usize) -> Nonce {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&(number as u64).to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> Keys {
        Keys::new(&[5; 32])
    }

    #[test]
    fn objects_open_under_their_name_and_key_only() {
        let keys = keys();
        for len in [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT + 77] {
            let plain: Vec<u8> = (0..len).map(|i| i as u8).collect();
            let stored = keys.seal_object("a/b", &plain);
            assert_eq!(stored, keys.seal_object("a/b", &plain), "a repeated upload is the same object");
            assert_eq!(keys.open_object("a/b", &stored).unwrap(), plain);
            assert_eq!(keys.open_object("a/c", &stored), Err(ObjectError::Forged));
            assert_eq!(Keys::new(&[6; 32]).open_object("a/b", &stored), Err(ObjectError::Forged));
            assert!(matches!(keys.open_object("a/b", &stored[..stored.len() - 1]), Err(ObjectError::Length { .. })));
        }
        assert_eq!(keys.open_object("a", &[7; 100]), Err(ObjectError::Magic));
        assert!(keys.open_object("a", b"").is_err());
    }

    #[test]
    fn every_flipped_bit_and_every_swapped_segment_is_noticed() {
        let keys = keys();
        let plain = [7; 2 * SEGMENT + 3];
        let stored = keys.seal_object("x", &plain);
        let tail = stored.len() - 30;
        for bit in (0..80 * 8).chain(tail * 8..stored.len() * 8) {
            let mut bad = stored.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(keys.open_object("x", &bad).is_err(), "bit {bit}");
        }
        let (one, two) = (HEADER, HEADER + SEGMENT + TAG);
        let mut swapped = stored.clone();
        swapped[one..two].copy_from_slice(&stored[two..two + SEGMENT + TAG]);
        swapped[two..two + SEGMENT + TAG].copy_from_slice(&stored[one..two]);
        assert_eq!(keys.open_object("x", &swapped), Err(ObjectError::Forged));
    }

    #[test]
    fn the_golden_object_opens_and_is_written_the_same() {
        let plain: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
        crate::chunk::testing::golden("object-v1.bin", &keys().seal_object("golden", &plain), true, |kept| {
            assert_eq!(keys().open_object("golden", kept).unwrap(), plain);
        });
    }
}
