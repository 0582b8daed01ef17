//! Compression of one frame.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::str::FromStr;

use super::frames::FrameEncoding;

/// How the frames of new chunks are compressed. Every frame records what was done to it, so the setting may change
/// at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// Stored as they are.
    None,
    /// LZ4 block format: cheap enough for every write.
    Lz4,
    /// Zstandard at this level (1 to 19, or -7 to -1 for faster and weaker).
    Zstd(i8),
}

impl Codec {
    /// Default Zstandard level.
    const ZSTD_LEVEL: i8 = 3;

    fn is_zstd_level(level: i8) -> bool {
        (1..=19).contains(&level) || (-7..=-1).contains(&level)
    }

    /// The code of a manifest: (codec, level).
    pub(crate) fn to_code(self) -> (u8, i8) {
        match self {
            Codec::None => (0, 0),
            Codec::Lz4 => (1, 0),
            Codec::Zstd(level) => (2, level),
        }
    }

    /// The setting behind a manifest's code.
    pub(crate) fn from_code(code: u8, level: i8) -> Option<Self> {
        match (code, level) {
            (0, 0) => Some(Codec::None),
            (1, 0) => Some(Codec::Lz4),
            (2, level) if Self::is_zstd_level(level) => Some(Codec::Zstd(level)),
            _ => None,
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Codec::None => f.write_str("none"),
            Codec::Lz4 => f.write_str("lz4"),
            Codec::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

/// A codec setting that means nothing.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("unknown codec {0:?}: use none, lz4, zstd, or zstd:LEVEL with a level of 1 to 19 or -7 to -1")]
pub struct UnknownCodec(String);

impl FromStr for Codec {
    type Err = UnknownCodec;
    fn from_str(s: &str) -> Result<Self, UnknownCodec> {
        match s {
            "none" => return Ok(Codec::None),
            "lz4" => return Ok(Codec::Lz4),
            "zstd" => return Ok(Codec::Zstd(Self::ZSTD_LEVEL)),
            _ => {}
        }
        s.strip_prefix("zstd:")
            .and_then(|level| level.parse().ok())
            .filter(|level| Self::is_zstd_level(*level))
            .map(Codec::Zstd)
            .ok_or_else(|| UnknownCodec(s.to_owned()))
    }
}

/// Compresses frame after frame, keeping its working memory.
pub(super) struct Compressor {
    state: State,
    out: Vec<u8>,
    /// Frames in a row that did not shrink, and frames since the last one tried.
    stubborn: u32,
    untried: u32,
}

/// After this many frames in a row that did not shrink, only one of [`TRY_ONE_OF`] is tried until one does: data that
/// is compressed or encrypted already comes in long stretches, and trying costs more than anything else done to it.
const STUBBORN: u32 = 4;
const TRY_ONE_OF: u32 = 8;

enum State {
    None,
    Lz4,
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Compressor {
    pub(super) fn new(codec: Codec) -> io::Result<Self> {
        Ok(Self {
            state: match codec {
                Codec::None => State::None,
                Codec::Lz4 => State::Lz4,
                Codec::Zstd(level) => State::Zstd(zstd::bulk::Compressor::new(level.into())?),
            },
            out: Vec::new(),
            stubborn: 0,
            untried: 0,
        })
    }

    /// What to store for `raw`: its compressed form, or itself when that would save less than a sixteenth, because
    /// then decompressing on every read costs more than the bytes.
    pub(super) fn compress<'a>(&'a mut self, raw: &'a [u8]) -> io::Result<(FrameEncoding, &'a [u8])> {
        if self.stubborn >= STUBBORN && self.untried + 1 < TRY_ONE_OF {
            self.untried += 1;
            return Ok((FrameEncoding::Raw, raw));
        }
        self.untried = 0;
        let (encoding, len) = match &mut self.state {
            State::None => return Ok((FrameEncoding::Raw, raw)),
            State::Lz4 => {
                let room = lz4_flex::block::get_maximum_output_size(raw.len());
                if self.out.len() < room {
                    self.out.resize(room, 0);
                }
                let len = lz4_flex::block::compress_into(raw, &mut self.out).map_err(io::Error::other)?;
                (FrameEncoding::Lz4, len)
            }
            State::Zstd(context) => {
                let room = zstd::zstd_safe::compress_bound(raw.len());
                if self.out.len() < room {
                    self.out.resize(room, 0);
                }
                let len = context.compress_to_buffer(raw, &mut self.out[..])?;
                (FrameEncoding::Zstd, len)
            }
        };
        if len > raw.len() - raw.len() / 16 {
            self.stubborn += 1;
            return Ok((FrameEncoding::Raw, raw));
        }
        self.stubborn = 0;
        Ok((encoding, &self.out[..len]))
    }
}

thread_local! {
    /// A decoder's working memory (about 150 KiB) costs more to make than a frame to decode.
    static ZSTD: RefCell<zstd::bulk::Decompressor<'static>> = RefCell::new(
        // Fails only for want of memory, as any allocation here would.
        zstd::bulk::Decompressor::new().expect("memory for a zstd decoder"),
    );
}

/// Undoes `encoding` into all of `out`. False when `stored` does not come to exactly that many bytes; `out` then
/// holds rubbish.
pub(super) fn decompress(encoding: FrameEncoding, stored: &[u8], out: &mut [u8]) -> bool {
    match encoding {
        FrameEncoding::Raw => {
            let fits = stored.len() == out.len();
            if fits {
                out.copy_from_slice(stored);
            }
            fits
        }
        FrameEncoding::Lz4 => {
            matches!(lz4_flex::block::decompress_into(stored, out), Ok(n) if n == out.len())
        }
        FrameEncoding::Zstd => {
            ZSTD.with_borrow_mut(|context| matches!(context.decompress_to_buffer(stored, out), Ok(n) if n == out.len()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_print_and_parse() {
        for codec in [Codec::None, Codec::Lz4, Codec::Zstd(1), Codec::Zstd(19), Codec::Zstd(-5)] {
            assert_eq!(codec.to_string().parse(), Ok(codec));
            let (code, level) = codec.to_code();
            assert_eq!(Codec::from_code(code, level), Some(codec));
        }
        assert_eq!("zstd".parse(), Ok(Codec::Zstd(3)));
        for bad in ["", "LZ4", "zstd:0", "zstd:20", "zstd:", "gzip", "lz4:1"] {
            assert!(bad.parse::<Codec>().is_err(), "{bad}");
        }
    }

    #[test]
    fn stretches_that_do_not_shrink_are_mostly_let_through() {
        use rand::{RngCore, SeedableRng};
        let mut noise = vec![0u8; 65536];
        rand::rngs::SmallRng::seed_from_u64(1).fill_bytes(&mut noise);
        let zeroes = vec![0u8; 65536];
        let mut compressor = Compressor::new(Codec::Lz4).unwrap();
        for _ in 0..100 {
            assert_eq!(compressor.compress(&noise).unwrap().0, FrameEncoding::Raw);
        }
        let mut raw = 0;
        while compressor.compress(&zeroes).unwrap().0 == FrameEncoding::Raw {
            raw += 1;
        }
        assert!(raw < TRY_ONE_OF, "{raw} frames that would have shrunk did not");
        // And from then on every one.
        assert_eq!(compressor.compress(&zeroes).unwrap().0, FrameEncoding::Lz4);
    }

    #[test]
    fn a_wrong_length_is_noticed() {
        let raw = vec![7u8; 8192];
        for codec in [Codec::None, Codec::Lz4, Codec::Zstd(1)] {
            let mut compressor = Compressor::new(codec).unwrap();
            let (encoding, stored) = compressor.compress(&raw).unwrap();
            let mut out = vec![0; 8192];
            assert!(decompress(encoding, stored, &mut out));
            assert_eq!(out, raw);
            assert!(!decompress(encoding, stored, &mut out[..4096]));
            assert!(!decompress(encoding, stored, &mut [0; 12288]));
            assert!(!decompress(encoding, &stored[..stored.len() - 1], &mut out));
        }
    }
}
