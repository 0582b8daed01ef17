//! The PDUs of NVMe/TCP (TCP Transport Specification, "Transport Specific Content"): little-endian, without padding.
//!
//! Nothing here does I/O or knows what a command means. [`Framing`] tells where a PDU's parts begin once the digests
//! are settled, and refuses headers that make no sense with the error the specification names.

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::command::{Command, Completion};
use crate::outgoing::Outgoing;

/// PDU types.
pub mod kind {
    /// Initialize connection request, host to controller.
    pub const IC_REQ: u8 = 0x00;
    /// Initialize connection response.
    pub const IC_RESP: u8 = 0x01;
    /// The host ends the connection because of an error.
    pub const H2C_TERM_REQ: u8 = 0x02;
    /// The controller does.
    pub const C2H_TERM_REQ: u8 = 0x03;
    /// A command, perhaps with data.
    pub const CAPSULE_CMD: u8 = 0x04;
    /// The completion of a command.
    pub const CAPSULE_RESP: u8 = 0x05;
    /// Data for the controller.
    pub const H2C_DATA: u8 = 0x06;
    /// Data for the host.
    pub const C2H_DATA: u8 = 0x07;
    /// The controller is ready for data.
    pub const R2T: u8 = 0x09;
}

/// Flags of the common header.
pub mod flag {
    /// A header digest follows the header.
    pub const HDGST: u8 = 1 << 0;
    /// A data digest follows the data.
    pub const DDGST: u8 = 1 << 1;
    /// The last data PDU of its transfer.
    pub const LAST: u8 = 1 << 2;
    /// The command succeeded; no response follows.
    pub const SUCCESS: u8 = 1 << 3;
}

/// Fatal error status of a terminate request.
pub mod fes {
    /// A field of a PDU header makes no sense.
    pub const INVALID_HEADER: u16 = 0x01;
    /// This PDU may not come now.
    pub const SEQUENCE: u16 = 0x02;
    /// The header digest does not match.
    pub const HEADER_DIGEST: u16 = 0x03;
    /// Data outside of what was asked for.
    pub const OUT_OF_RANGE: u16 = 0x04;
    /// More data than was asked for.
    pub const LIMIT_EXCEEDED: u16 = 0x05;
    /// A parameter that is not supported.
    pub const UNSUPPORTED: u16 = 0x06;
}

/// Bytes of a digest.
pub const DIGEST: usize = 4;
/// Bytes of a PDU header that a terminate request quotes at most.
const QUOTE_MAX: usize = 128;

/// What every PDU begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// See [`kind`].
    pub kind: u8,
    /// See [`flag`].
    pub flags: u8,
    /// Bytes of the header, without digest.
    pub hlen: u8,
    /// Where the data begins, 0 without data.
    pub pdo: u8,
    /// Bytes of the whole PDU.
    pub plen: U32,
}

/// ICReq and ICResp.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Initialize {
    /// Common header.
    pub header: Header,
    /// PDU format version: 0.
    pub pfv: U16,
    /// Data alignment that the sender wants to receive, in units of 4 bytes, 0's based.
    pub alignment: u8,
    /// Bit 0: header digest; bit 1: data digest.
    pub digests: u8,
    /// From the host: R2Ts it can have outstanding per command, 0's based. From the controller: most data in an H2CData
    /// PDU, in bytes.
    pub limit: U32,
    /// Zero.
    pub reserved: [u8; 112],
}

/// A command capsule without its data.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CommandCapsule {
    /// Common header.
    pub header: Header,
    /// The command.
    pub command: Command,
}

/// A response capsule.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ResponseCapsule {
    /// Common header.
    pub header: Header,
    /// The completion.
    pub completion: Completion,
}

/// H2CData, C2HData and R2T: a part of a command's data.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Transfer {
    /// Common header.
    pub header: Header,
    /// Command identifier.
    pub cid: U16,
    /// Transfer tag: chosen by the controller in R2T, repeated in H2CData, 0 in C2HData.
    pub tag: U16,
    /// Where the part begins, in bytes.
    pub offset: U32,
    /// Its length in bytes.
    pub len: U32,
    /// Zero.
    pub reserved: [u8; 4],
}

/// The head of H2CTermReq and C2HTermReq; the header of the PDU at fault follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Terminate {
    /// Common header.
    pub header: Header,
    /// See [`fes`].
    pub status: U16,
    /// Offset of the field at fault.
    pub field: U32,
    /// Zero.
    pub reserved: [u8; 10],
}

const _: () = {
    assert!(size_of::<Header>() == 8);
    assert!(size_of::<Initialize>() == 128);
    assert!(size_of::<CommandCapsule>() == 72);
    assert!(size_of::<ResponseCapsule>() == 24);
    assert!(size_of::<Transfer>() == 24);
    assert!(size_of::<Terminate>() == 24);
};

/// Why a connection must end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PduError {
    /// Answered with a terminate request.
    #[error("{what} (fatal error status {status}, field at byte {field})")]
    Fatal {
        /// See [`fes`].
        status: u16,
        /// Offset of the field at fault in the PDU's header.
        field: u32,
        /// For messages.
        what: &'static str,
    },
    /// The other side ended it so.
    #[error("the other side ended the connection with fatal error status {0}")]
    Terminated(u16),
}

/// An error of a header's field.
pub fn fatal(status: u16, field: u32, what: &'static str) -> PduError {
    PduError::Fatal { status, field, what }
}

/// Reads a struct from the start of `bytes`; `None` if there is not enough.
pub fn take<T: FromBytes + KnownLayout + Immutable + Unaligned>(bytes: &[u8]) -> Option<(T, &[u8])> {
    T::read_from_prefix(bytes).ok()
}

impl Header {
    /// Its size in bytes.
    pub const SIZE: usize = size_of::<Self>();
}

impl Initialize {
    /// Its size in bytes.
    pub const SIZE: usize = size_of::<Self>();

    /// A request or a response.
    pub fn new(kind: u8, alignment: u8, digests: u8, limit: u32) -> Self {
        Self {
            header: Header { kind, flags: 0, hlen: 128, pdo: 0, plen: 128.into() },
            pfv: 0.into(),
            alignment,
            digests,
            limit: limit.into(),
            reserved: [0; 112],
        }
    }

    /// Checks a request.
    ///
    /// # Errors
    /// What a controller must end the connection for.
    pub fn check_request(&self) -> Result<(), PduError> {
        if self.header.kind != kind::IC_REQ {
            return Err(fatal(fes::SEQUENCE, 0, "the first PDU is no ICReq"));
        }
        if self.header.hlen != 128 {
            return Err(fatal(fes::INVALID_HEADER, 2, "an ICReq with a wrong header length"));
        }
        if self.header.plen.get() != 128 {
            return Err(fatal(fes::INVALID_HEADER, 4, "an ICReq with a wrong length"));
        }
        if self.pfv.get() != 0 {
            return Err(fatal(fes::UNSUPPORTED, 8, "an unknown PDU format version"));
        }
        if self.alignment > 31 {
            return Err(fatal(fes::INVALID_HEADER, 10, "an impossible data alignment"));
        }
        Ok(())
    }
}

/// What the initialisation settled: where the parts of PDUs are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Framing {
    /// A digest follows each header.
    pub header_digest: bool,
    /// A digest follows each piece of data.
    pub data_digest: bool,
    /// Alignment of data sent to the other side, in units of 4 bytes, 0's based.
    pub alignment: u8,
}

impl Framing {
    /// As a host asked for.
    pub fn of(request: &Initialize) -> Self {
        Self {
            header_digest: request.digests & 1 != 0,
            data_digest: request.digests & 2 != 0,
            alignment: request.alignment,
        }
    }

    /// The digest bits of an ICReq or ICResp.
    pub fn digests(self) -> u8 {
        u8::from(self.header_digest) | u8::from(self.data_digest) << 1
    }

    /// Bytes of a header of `hlen` bytes with its digest.
    pub fn header_len(self, hlen: usize) -> usize {
        hlen + if self.header_digest { DIGEST } else { 0 }
    }

    /// Bytes of the digest after data.
    pub fn data_digest_len(self) -> usize {
        if self.data_digest { DIGEST } else { 0 }
    }

    /// Checks the common header of a PDU that came from a host after the initialisation, and returns how many bytes of
    /// it lie before its data: header, digest and padding.
    ///
    /// # Errors
    /// What the connection must be ended for.
    pub fn check(self, header: &Header) -> Result<usize, PduError> {
        let (hlen, may_carry) = match header.kind {
            kind::CAPSULE_CMD => (size_of::<CommandCapsule>(), true),
            kind::H2C_DATA => (size_of::<Transfer>(), true),
            kind::H2C_TERM_REQ => {
                let plen = header.plen.get() as usize;
                if header.hlen != 24 || !(24..=24 + QUOTE_MAX).contains(&plen) {
                    return Err(fatal(fes::INVALID_HEADER, 2, "a terminate request of a wrong length"));
                }
                return Ok(plen);
            }
            kind::IC_REQ => return Err(fatal(fes::SEQUENCE, 0, "a second ICReq")),
            _ => return Err(fatal(fes::INVALID_HEADER, 0, "an unknown type of PDU")),
        };
        self.check_as(header, hlen, may_carry)
    }

    /// As [`Framing::check`] for a header of known length.
    ///
    /// # Errors
    /// As there.
    pub fn check_as(self, header: &Header, hlen: usize, may_carry: bool) -> Result<usize, PduError> {
        if usize::from(header.hlen) != hlen {
            return Err(fatal(fes::INVALID_HEADER, 2, "a wrong header length"));
        }
        if (header.flags & flag::HDGST != 0) != self.header_digest {
            return Err(fatal(fes::INVALID_HEADER, 1, "a header digest flag other than settled"));
        }
        let start = self.header_len(hlen);
        let plen = header.plen.get() as usize;
        if plen == start {
            return Ok(start);
        }
        let pdo = usize::from(header.pdo);
        if plen < start || !may_carry {
            return Err(fatal(fes::INVALID_HEADER, 4, "a PDU of a wrong length"));
        }
        if pdo < start || pdo % 4 != 0 {
            return Err(fatal(fes::INVALID_HEADER, 3, "a data offset inside the header"));
        }
        if (header.flags & flag::DDGST != 0) != self.data_digest {
            return Err(fatal(fes::INVALID_HEADER, 1, "a data digest flag other than settled"));
        }
        if plen < pdo + self.data_digest_len() {
            return Err(fatal(fes::INVALID_HEADER, 4, "a PDU shorter than its data offset"));
        }
        Ok(pdo)
    }

    /// Bytes of data in a PDU whose data begins at `pdo`, as [`Framing::check`] returned it.
    pub fn data_len(self, header: &Header, pdo: usize) -> usize {
        (header.plen.get() as usize).saturating_sub(pdo + self.data_digest_len())
    }

    /// Checks the digest behind a header.
    ///
    /// # Errors
    /// It does not match.
    pub fn check_header_digest(self, pdu: &[u8], hlen: usize) -> Result<(), PduError> {
        if self.header_digest {
            let expected = crc32c::crc32c(&pdu[..hlen]);
            if take::<U32>(&pdu[hlen..]).is_none_or(|(found, _)| found.get() != expected) {
                return Err(fatal(fes::HEADER_DIGEST, 0, "a header digest does not match"));
            }
        }
        Ok(())
    }

    /// Whether `digest` is that of `data`.
    pub fn data_digest_matches(data: &[u8], digest: [u8; DIGEST]) -> bool {
        crc32c::crc32c(data) == u32::from_le_bytes(digest)
    }

    /// Appends a PDU without data, from its struct; length and digest are filled in.
    pub fn put(self, out: &mut Outgoing, pdu: &[u8]) {
        self.put_header(out, pdu, 0);
    }

    /// Appends the header of a PDU that `data` bytes are to follow, with digest and padding. The data's digest, if there
    /// is one, is appended by [`Framing::put_data_digest`].
    pub fn put_header(self, out: &mut Outgoing, pdu: &[u8], data: usize) {
        // At most 76 bytes of header, aligned to at most 128.
        let mut head = [0; 128];
        head[..pdu.len()].copy_from_slice(pdu);
        let header = self.header_len(pdu.len());
        let (pdo, plen) = if data == 0 {
            (0, header)
        } else {
            let unit = (usize::from(self.alignment) + 1) * 4;
            let pdo = header.next_multiple_of(unit);
            (pdo, pdo + data + self.data_digest_len())
        };
        if self.header_digest {
            head[1] |= flag::HDGST;
        }
        if data > 0 && self.data_digest {
            head[1] |= flag::DDGST;
        }
        head[3] = pdo as u8;
        head[4..8].copy_from_slice(&(plen as u32).to_le_bytes());
        if self.header_digest {
            let digest = crc32c::crc32c(&head[..pdu.len()]);
            head[pdu.len()..header].copy_from_slice(&digest.to_le_bytes());
        }
        out.extend_from_slice(&head[..header.max(pdo)]);
    }

    /// Appends the digest of the data from byte `from` of `out` on.
    pub fn put_data_digest(self, out: &mut Outgoing, from: usize) {
        if self.data_digest {
            let digest = out.pieces(from).fold(0, crc32c::crc32c_append);
            out.extend_from_slice(&digest.to_le_bytes());
        }
    }

    /// Appends the completion of a command.
    pub fn put_completion(self, out: &mut Outgoing, completion: Completion) {
        let header = Header { kind: kind::CAPSULE_RESP, flags: 0, hlen: 24, pdo: 0, plen: 24.into() };
        self.put(out, ResponseCapsule { header, completion }.as_bytes());
    }

    /// Appends an R2T for `len` bytes from `offset`.
    pub fn put_r2t(self, out: &mut Outgoing, cid: u16, tag: u16, offset: u32, len: u32) {
        self.put(out, Transfer::new(kind::R2T, 0, cid, tag, offset, len).as_bytes());
    }

    /// Appends the data of a command as one PDU; with `success` it is also its completion.
    pub fn put_data(self, out: &mut Outgoing, cid: u16, data: Outgoing, success: bool) {
        self.put_data_header(out, cid, data.len() as u32, success);
        let from = out.len();
        out.append(data);
        self.put_data_digest(out, from);
    }

    /// The part of [`Framing::put_data`] before the data.
    pub fn put_data_header(self, out: &mut Outgoing, cid: u16, len: u32, success: bool) {
        let flags = flag::LAST | if success { flag::SUCCESS } else { 0 };
        let header = Transfer::new(kind::C2H_DATA, flags, cid, 0, 0, len);
        self.put_header(out, header.as_bytes(), len as usize);
    }

    /// Appends a terminate request for an error in the PDU that begins with `pdu`.
    pub fn put_terminate(out: &mut Outgoing, error: &PduError, pdu: &[u8]) {
        let PduError::Fatal { status, field, .. } = error else { return };
        // Only as much as is a header may be quoted.
        let hlen = pdu.get(2).map_or(0, |hlen| usize::from(*hlen)).min(QUOTE_MAX);
        let quote = &pdu[..pdu.len().min(hlen)];
        let head = Terminate {
            header: Header {
                kind: kind::C2H_TERM_REQ,
                flags: 0,
                hlen: 24,
                pdo: 0,
                plen: (24 + quote.len() as u32).into(),
            },
            status: (*status).into(),
            field: (*field).into(),
            reserved: [0; 10],
        };
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(quote);
    }
}

impl Transfer {
    /// Without data's length in the header; [`Framing::put_header`] fills it in.
    pub fn new(kind: u8, flags: u8, cid: u16, tag: u16, offset: u32, len: u32) -> Self {
        Self {
            header: Header { kind, flags, hlen: 24, pdo: 0, plen: 24.into() },
            cid: cid.into(),
            tag: tag.into(),
            offset: offset.into(),
            len: len.into(),
            reserved: [0; 4],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_passes_the_check() {
        for (header_digest, data_digest, alignment) in
            [(false, false, 0), (true, false, 0), (false, true, 3), (true, true, 0), (true, true, 31)]
        {
            let framing = Framing { header_digest, data_digest, alignment };
            let mut out = Outgoing::from(vec![9]);
            let head = Transfer::new(kind::H2C_DATA, flag::LAST, 1, 2, 3, 5);
            framing.put_header(&mut out, head.as_bytes(), 5);
            let from = out.len();
            out.extend_from_slice(b"12345");
            framing.put_data_digest(&mut out, from);
            let mut out = out.to_vec();
            let (header, _) = take::<Header>(&out[1..]).unwrap();
            assert_eq!(header.plen.get() as usize, out.len() - 1);
            let pdo = framing.check(&header).unwrap();
            framing.check_header_digest(&out[1..], 24).unwrap();
            assert_eq!(framing.data_len(&header, pdo), 5);
            assert_eq!(&out[1 + pdo..][..5], b"12345");
            if header_digest {
                out[9] ^= 1;
                assert!(framing.check_header_digest(&out[1..], 24).is_err());
            }
        }
    }

    #[test]
    fn digests_are_crc32c() {
        // The check value of the Castagnoli polynomial.
        assert!(Framing::data_digest_matches(b"123456789", 0xE306_9283u32.to_le_bytes()));
    }

    #[test]
    fn headers_that_make_no_sense_are_refused() {
        let framing = Framing::default();
        let header = |kind, flags, hlen, pdo, plen: u32| Header { kind, flags, hlen, pdo, plen: plen.into() };
        let refused = |h: Header| match framing.check(&h) {
            Err(PduError::Fatal { status, field, .. }) => (status, field),
            other => panic!("{h:?}: {other:?}"),
        };
        assert_eq!(refused(header(0x77, 0, 8, 0, 8)), (fes::INVALID_HEADER, 0));
        assert_eq!(refused(header(kind::IC_REQ, 0, 128, 0, 128)), (fes::SEQUENCE, 0));
        assert_eq!(refused(header(kind::CAPSULE_CMD, 0, 24, 0, 72)), (fes::INVALID_HEADER, 2));
        assert_eq!(refused(header(kind::CAPSULE_CMD, flag::HDGST, 72, 0, 72)), (fes::INVALID_HEADER, 1));
        assert_eq!(refused(header(kind::CAPSULE_CMD, 0, 72, 0, 10)), (fes::INVALID_HEADER, 4));
        assert_eq!(refused(header(kind::CAPSULE_CMD, 0, 72, 8, 80)), (fes::INVALID_HEADER, 3));
        assert_eq!(refused(header(kind::CAPSULE_CMD, 0, 72, 100, 80)), (fes::INVALID_HEADER, 4));
    }
}
