//! Submission and completion queue entries, their operation codes and status values (NVM Express Base and NVM Command
//! Set specifications).

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Commands of an I/O queue.
pub mod io {
    /// Makes what was answered durable.
    pub const FLUSH: u8 = 0x00;
    /// Writes.
    pub const WRITE: u8 = 0x01;
    /// Reads.
    pub const READ: u8 = 0x02;
    /// Compares data with what stands there.
    pub const COMPARE: u8 = 0x05;
    /// Makes a range read as zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Dataset management: deallocate.
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    /// Reads and checks without sending.
    pub const VERIFY: u8 = 0x0C;
    /// Registers, unregisters or replaces a reservation key.
    pub const RESERVATION_REGISTER: u8 = 0x0D;
    /// Tells registrants and holder.
    pub const RESERVATION_REPORT: u8 = 0x0E;
    /// Acquires or preempts a reservation.
    pub const RESERVATION_ACQUIRE: u8 = 0x11;
    /// Releases or clears a reservation.
    pub const RESERVATION_RELEASE: u8 = 0x15;
    /// Copies within the namespace.
    pub const COPY: u8 = 0x19;
}

/// Commands of the admin queue.
pub mod admin {
    /// Reads a log page.
    pub const GET_LOG_PAGE: u8 = 0x02;
    /// Describes controller and namespaces.
    pub const IDENTIFY: u8 = 0x06;
    /// Asks for a command to be ended.
    pub const ABORT: u8 = 0x08;
    /// Changes a feature.
    pub const SET_FEATURES: u8 = 0x09;
    /// Reads a feature.
    pub const GET_FEATURES: u8 = 0x0A;
    /// Is answered when something happens.
    pub const ASYNC_EVENT: u8 = 0x0C;
    /// Says that the host is there.
    pub const KEEP_ALIVE: u8 = 0x18;
}

/// The operation code of all fabrics commands.
pub const FABRICS: u8 = 0x7F;

/// Types of fabrics commands.
pub mod fabrics {
    /// Changes a property.
    pub const PROPERTY_SET: u8 = 0x00;
    /// Makes a queue of a controller.
    pub const CONNECT: u8 = 0x01;
    /// Reads a property.
    pub const PROPERTY_GET: u8 = 0x04;
    /// Ends an I/O queue.
    pub const DISCONNECT: u8 = 0x08;
}

/// Properties of a controller, by offset.
pub mod property {
    /// Controller capabilities, 8 bytes.
    pub const CAP: u32 = 0x00;
    /// Version.
    pub const VS: u32 = 0x08;
    /// Controller configuration.
    pub const CC: u32 = 0x14;
    /// Controller status.
    pub const CSTS: u32 = 0x1C;
}

/// Why a command failed: code type, code, and whether it may be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u16);

impl Status {
    /// Do not retry.
    pub const DNR: u16 = 1 << 14;

    /// It worked.
    pub const SUCCESS: Self = Self(0);
    /// An unknown operation code.
    pub const INVALID_OPCODE: Self = Self(0x01 | Self::DNR);
    /// A field makes no sense.
    pub const INVALID_FIELD: Self = Self(0x02 | Self::DNR);
    /// The identifier is in use.
    pub const ID_CONFLICT: Self = Self(0x03 | Self::DNR);
    /// The data could not be moved.
    pub const DATA_TRANSFER: Self = Self(0x04);
    /// Something failed here.
    pub const INTERNAL: Self = Self(0x06);
    /// The first of a fused pair failed.
    pub const FUSED_FAILED: Self = Self(0x09);
    /// The other of a fused pair did not come.
    pub const FUSED_MISSING: Self = Self(0x0A);
    /// No such namespace, or a wrong format.
    pub const INVALID_NAMESPACE: Self = Self(0x0B | Self::DNR);
    /// Not now.
    pub const SEQUENCE_ERROR: Self = Self(0x0C | Self::DNR);
    /// A data pointer of a wrong kind or length.
    pub const SGL_LENGTH: Self = Self(0x0F | Self::DNR);
    /// A data pointer of an unknown type.
    pub const SGL_TYPE: Self = Self(0x11 | Self::DNR);
    /// An offset outside the capsule.
    pub const SGL_OFFSET: Self = Self(0x16 | Self::DNR);
    /// Identifiers of hosts in two formats.
    pub const HOST_ID_FORMAT: Self = Self(0x18 | Self::DNR);
    /// Something passing kept it from being done.
    pub const INTERRUPTED: Self = Self(0x21);
    /// The namespace cannot be written.
    pub const WRITE_PROTECTED: Self = Self(0x20 | Self::DNR);
    /// The data did not arrive as it was sent.
    pub const TRANSPORT: Self = Self(0x22);
    /// Beyond the end.
    pub const LBA_OUT_OF_RANGE: Self = Self(0x80 | Self::DNR);
    /// Not ready yet.
    pub const NOT_READY: Self = Self(0x82);
    /// Another host's reservation.
    pub const RESERVATION_CONFLICT: Self = Self(0x83 | Self::DNR);

    /// No such log page.
    pub const INVALID_LOG_PAGE: Self = Self(0x109 | Self::DNR);
    /// More events are waited for than can be remembered.
    pub const ASYNC_LIMIT: Self = Self(0x105 | Self::DNR);
    /// The feature cannot be kept.
    pub const NOT_SAVEABLE: Self = Self(0x10D | Self::DNR);
    /// A command that moves more than it may (copy).
    pub const SIZE_LIMIT: Self = Self(0x183 | Self::DNR);
    /// A connect of an unknown format.
    pub const CONNECT_FORMAT: Self = Self(0x180 | Self::DNR);
    /// A connect that may be repeated.
    pub const CONNECT_BUSY: Self = Self(0x181);
    /// A connect that makes no sense.
    pub const CONNECT_INVALID: Self = Self(0x182 | Self::DNR);
    /// A connect to a controller that is not there any more.
    pub const CONNECT_GONE: Self = Self(0x182);
    /// A host that may not connect.
    pub const CONNECT_HOST: Self = Self(0x184 | Self::DNR);
    /// Data could not be read.
    pub const UNRECOVERED_READ: Self = Self(0x281);
    /// Data that was compared differs.
    pub const COMPARE_FAILURE: Self = Self(0x285 | Self::DNR);
    /// This path does not lead anywhere at the moment.
    pub const INTERNAL_PATH: Self = Self(0x300);

    /// Code type and code, without the flags.
    pub fn code(self) -> u16 {
        self.0 & 0x7ff
    }

    /// Whether it worked.
    pub fn is_success(self) -> bool {
        self.code() == 0
    }

    /// Whether a host may try again.
    pub fn may_retry(self) -> bool {
        self.0 & Self::DNR == 0
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dnr = if self.may_retry() { "" } else { ", do not retry" };
        write!(f, "status code type {:#x}, code {:#04x}{dnr}", self.code() >> 8, self.code() & 0xff)
    }
}

/// Where a command's data is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Sgl {
    /// Offset in the capsule, or 0.
    pub address: U64,
    /// Bytes.
    pub len: U32,
    /// Zero.
    pub reserved: [u8; 3],
    /// See [`sgl`].
    pub kind: u8,
}

/// Types of data pointers that the transport knows.
pub mod sgl {
    /// In the command capsule.
    pub const IN_CAPSULE: u8 = 0x01;
    /// Moved by data PDUs.
    pub const TRANSPORT: u8 = 0x5A;
}

/// A submission queue entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Command {
    /// Operation code.
    pub opcode: u8,
    /// Bits 1:0: fused operation; bits 7:6: kind of data pointer.
    pub flags: u8,
    /// Command identifier.
    pub cid: U16,
    /// Namespace; of a fabrics command byte 0 is its type.
    pub nsid: U32,
    /// Command dwords 2 and 3.
    pub cdw2: [U32; 2],
    /// Metadata pointer.
    pub metadata: U64,
    /// Data pointer.
    pub sgl: Sgl,
    /// Command dwords 10 to 15.
    pub cdw: [U32; 6],
}

/// Fused operations, in [`Command::flags`].
pub mod fuse {
    /// Which bits.
    pub const MASK: u8 = 3;
    /// The first of two.
    pub const FIRST: u8 = 1;
    /// The second of two.
    pub const SECOND: u8 = 2;
}

/// Bits of command dword 12 of reads and writes.
pub mod rw {
    /// Deallocate (Write Zeroes).
    pub const DEALLOCATE: u32 = 1 << 25;
    /// Protection information fields, which no format here has.
    pub const PROTECTION: u32 = 0xf << 26;
    /// Force unit access.
    pub const FUA: u32 = 1 << 30;
}

impl Command {
    /// A command without data.
    pub fn new(opcode: u8, cid: u16, nsid: u32) -> Self {
        Self {
            opcode,
            // Data pointers are scatter-gather lists on every fabric.
            flags: 1 << 6,
            cid: cid.into(),
            nsid: nsid.into(),
            cdw2: [U32::ZERO; 2],
            metadata: U64::ZERO,
            sgl: Sgl::default(),
            cdw: [U32::ZERO; 6],
        }
    }

    /// A fabrics command.
    pub fn fabrics(kind: u8, cid: u16) -> Self {
        Self::new(FABRICS, cid, u32::from(kind))
    }

    /// With `len` bytes of data in the capsule or moved by data PDUs.
    pub fn with_data(mut self, len: u32, in_capsule: bool) -> Self {
        let kind = if in_capsule { sgl::IN_CAPSULE } else { sgl::TRANSPORT };
        self.sgl = Sgl { address: U64::ZERO, len: len.into(), reserved: [0; 3], kind };
        self
    }

    /// With a command dword from 10 on.
    pub fn with_dword(mut self, number: usize, value: u32) -> Self {
        self.cdw[number - 10] = value.into();
        self
    }

    /// With a starting block and a number of blocks.
    pub fn with_blocks(self, lba: u64, count: u32) -> Self {
        self.with_dword(10, lba as u32).with_dword(11, (lba >> 32) as u32).with_dword(12, count - 1)
    }

    /// A command dword from 10 on.
    pub fn dword(&self, number: usize) -> u32 {
        self.cdw[number - 10].get()
    }

    /// The starting block of a read or write.
    pub fn lba(&self) -> u64 {
        u64::from(self.dword(11)) << 32 | u64::from(self.dword(10))
    }

    /// Number of blocks of a read or write.
    pub fn blocks(&self) -> u64 {
        u64::from(self.dword(12) & 0xffff) + 1
    }

    /// Type of a fabrics command.
    pub fn fabrics_type(&self) -> u8 {
        self.nsid.get() as u8
    }

    /// See [`fuse`].
    pub fn fused(&self) -> u8 {
        self.flags & fuse::MASK
    }

    /// Offset of a property command.
    pub fn property(&self) -> u32 {
        self.dword(11)
    }
}

/// A completion queue entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Completion {
    /// What the command brings back.
    pub result: U64,
    /// How far the controller has read the queue.
    pub sq_head: U16,
    /// The queue; 0 here.
    pub sq_id: U16,
    /// Which command.
    pub cid: U16,
    /// The status, shifted by the phase bit, which fabrics do not use.
    pub status: U16,
}

impl Completion {
    /// A completion.
    pub fn new(cid: u16, sq_head: u16, status: Status, result: u64) -> Self {
        Self {
            result: result.into(),
            sq_head: sq_head.into(),
            sq_id: U16::ZERO,
            cid: cid.into(),
            status: (status.0 << 1).into(),
        }
    }

    /// Its status.
    pub fn status(&self) -> Status {
        Status(self.status.get() >> 1)
    }
}

const _: () = {
    assert!(size_of::<Sgl>() == 16);
    assert!(size_of::<Command>() == 64);
    assert!(size_of::<Completion>() == 16);
};

/// Where the data of a command that takes some is to be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataIn {
    /// At this offset of the capsule's data, so many bytes.
    Capsule(usize, usize),
    /// So many bytes are to be asked for.
    Transport(u32),
}

impl Command {
    /// Where its data comes from, given how much data its capsule carries.
    ///
    /// # Errors
    /// The status to answer with.
    pub fn data_in(&self, carried: usize) -> Result<DataIn, Status> {
        let (address, len) = (self.sgl.address.get(), self.sgl.len.get());
        match self.sgl.kind {
            sgl::IN_CAPSULE => match address.checked_add(u64::from(len)) {
                Some(end) if end <= carried as u64 => Ok(DataIn::Capsule(address as usize, len as usize)),
                _ => Err(Status::SGL_OFFSET),
            },
            sgl::TRANSPORT if carried > 0 => Err(Status::SGL_TYPE),
            sgl::TRANSPORT => Ok(DataIn::Transport(len)),
            _ => Err(Status::SGL_TYPE),
        }
    }

    /// How much room the host has for the data of a command that brings some back.
    ///
    /// # Errors
    /// The status to answer with.
    pub fn data_out(&self) -> Result<u32, Status> {
        match self.sgl.kind {
            sgl::TRANSPORT => Ok(self.sgl.len.get()),
            _ => Err(Status::SGL_TYPE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let command = Command::new(io::READ, 0x1234, 7).with_data(512, false).with_blocks(0x1_0000_0002, 3);
        let bytes = command.as_bytes();
        assert_eq!(bytes[..8], [2, 0x40, 0x34, 0x12, 7, 0, 0, 0]);
        assert_eq!(bytes[24..40], [0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0x5a]);
        assert_eq!(bytes[40..52], [2, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!((command.lba(), command.blocks()), (0x1_0000_0002, 3));
        let completion = Completion::new(0x1234, 5, Status::COMPARE_FAILURE, 9);
        assert_eq!(completion.as_bytes(), [9, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0x34, 0x12, 0x0a, 0x85]);
        assert_eq!(completion.status(), Status::COMPARE_FAILURE);
    }

    #[test]
    fn data_pointers_are_checked() {
        let mut command = Command::new(io::WRITE, 1, 1).with_data(512, true);
        assert_eq!(command.data_in(512), Ok(DataIn::Capsule(0, 512)));
        assert_eq!(command.data_in(511), Err(Status::SGL_OFFSET));
        command.sgl.address = u64::MAX.into();
        assert_eq!(command.data_in(512), Err(Status::SGL_OFFSET));
        assert_eq!(command.with_data(512, false).data_in(0), Ok(DataIn::Transport(512)));
        assert_eq!(command.with_data(512, false).data_in(1), Err(Status::SGL_TYPE));
        command.sgl.kind = 0;
        assert_eq!(command.data_in(512), Err(Status::SGL_TYPE));
        assert_eq!(command.data_out(), Err(Status::SGL_TYPE));
    }
}
