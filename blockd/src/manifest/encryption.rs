//! The section of an encrypted volume: how its data key is wrapped. Pure; total on foreign bytes.

use std::fmt;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::format::ManifestFormatError;

/// Its kind among the sections.
pub(super) const KIND: u16 = 1;

/// The code of AES-256-GCM, for the volume's data and for the wrapping.
const AES_256_GCM: u8 = 1;
const ARGON2ID: u8 = 1;
const KEY_FILE: u8 = 2;

/// Most that a foreign manifest may ask of this host: 1 GiB, and seconds.
const MEMORY_KIB_MAX: u32 = 1 << 20;
const PASSES_MAX: u32 = 64;
const LANES_MAX: u32 = 16;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Body {
    cipher: u8,
    kdf: u8,
    reserved: [u8; 2],
    memory_kib: U32,
    passes: U32,
    lanes: U32,
    salt: [u8; 32],
    wrapped: [u8; 48],
}

const _: () = assert!(size_of::<Body>() == 96);
/// What of the section the wrapped key is bound to: everything before it.
const BOUND: usize = 48;

/// How a secret becomes the key that wraps the data key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kdf {
    /// A passphrase, stretched by Argon2id version 1.3.
    Argon2id {
        /// Memory it takes, in KiB.
        memory_kib: u32,
        /// Times it goes over it.
        passes: u32,
        /// Threads it could use.
        lanes: u32,
    },
    /// A key file, by HKDF with SHA-256.
    KeyFile,
}

impl Kdf {
    /// For new passphrases: 64 MiB, 3 passes (RFC 9106, second choice, with one lane).
    pub const PASSPHRASE: Self = Self::Argon2id { memory_kib: 64 << 10, passes: 3, lanes: 1 };
}

impl fmt::Display for Kdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Argon2id { .. } => f.write_str("passphrase"),
            Self::KeyFile => f.write_str("key file"),
        }
    }
}

/// A wrapped data key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encryption {
    /// How a secret unwraps it.
    pub kdf: Kdf,
    /// Fresh for each wrapping, so that no wrapping key is used twice.
    pub salt: [u8; 32],
    /// The data key, encrypted, and its tag.
    pub wrapped: [u8; 48],
}

impl Encryption {
    /// The section's bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        let (kdf, memory_kib, passes, lanes) = match self.kdf {
            Kdf::Argon2id { memory_kib, passes, lanes } => (ARGON2ID, memory_kib, passes, lanes),
            Kdf::KeyFile => (KEY_FILE, 0, 0, 0),
        };
        let body = Body {
            cipher: AES_256_GCM,
            kdf,
            reserved: [0; 2],
            memory_kib: memory_kib.into(),
            passes: passes.into(),
            lanes: lanes.into(),
            salt: self.salt,
            wrapped: self.wrapped,
        };
        body.as_bytes().to_vec()
    }

    /// What the wrapping is bound to, so that nobody can make it cheaper to guess at.
    pub(super) fn bound(&self) -> [u8; BOUND] {
        let mut bound = [0; BOUND];
        bound.copy_from_slice(&self.encode()[..BOUND]);
        bound
    }

    /// The reverse of [`Encryption::encode`].
    pub(super) fn decode(body: &[u8]) -> Result<Self, ManifestFormatError> {
        use ManifestFormatError::Invalid;
        let body = Body::ref_from_bytes(body).map_err(|_| Invalid("its encryption section has a wrong length"))?;
        if body.cipher != AES_256_GCM {
            return Err(Invalid("its cipher is unknown to this program; use a newer one"));
        }
        let (memory_kib, passes, lanes) = (body.memory_kib.get(), body.passes.get(), body.lanes.get());
        let kdf = match body.kdf {
            ARGON2ID => Kdf::Argon2id { memory_kib, passes, lanes },
            KEY_FILE => Kdf::KeyFile,
            _ => return Err(Invalid("the way its key is derived is unknown to this program; use a newer one")),
        };
        let fits = match kdf {
            Kdf::KeyFile => memory_kib == 0 && passes == 0 && lanes == 0,
            Kdf::Argon2id { .. } => {
                (1..=LANES_MAX).contains(&lanes)
                    && (8 * lanes..=MEMORY_KIB_MAX).contains(&memory_kib)
                    && (1..=PASSES_MAX).contains(&passes)
            }
        };
        if !fits || body.reserved != [0; 2] {
            return Err(Invalid("its key derivation asks for what this program does not do"));
        }
        Ok(Self { kdf, salt: body.salt, wrapped: body.wrapped })
    }
}
