//! Structures that commands carry as data, in both directions.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A host's identity, as reservations know it.
pub type HostId = [u8; 16];

/// Data of the Connect command.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ConnectData {
    /// Host identifier.
    pub host_id: HostId,
    /// Controller: FFFFh for a new one on the admin queue, else the one the queue belongs to.
    pub cntlid: U16,
    /// Zero.
    pub reserved: [u8; 238],
    /// Name of the subsystem, zero-padded.
    pub subsystem: [u8; 256],
    /// Name of the host, zero-padded.
    pub host: [u8; 256],
    /// Zero.
    pub reserved2: [u8; 256],
}

/// A range of a Dataset Management command.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DsmRange {
    /// Context attributes, which are advice.
    pub attributes: U32,
    /// Blocks.
    pub blocks: U32,
    /// First block.
    pub lba: U64,
}

/// A source range of a Copy command, format 0.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CopyRange {
    /// Zero.
    pub reserved: U64,
    /// First block.
    pub lba: U64,
    /// Blocks, 0's based.
    pub blocks: U16,
    /// Zero, and protection information, which no format here has.
    pub rest: [u8; 14],
}

/// Data of Reservation Register, and, read otherwise, of Acquire: two keys.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ReservationKeys {
    /// The key the host has.
    pub current: U64,
    /// The new key (register), or the one to be preempted (acquire).
    pub other: U64,
}

/// Head of the extended reservation status.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ReservationStatus {
    /// Grows with each change of registrants.
    pub generation: U32,
    /// Type of the reservation, 0 for none.
    pub kind: u8,
    /// Registrants.
    pub count: U16,
    /// Zero.
    pub reserved: [u8; 2],
    /// Whether it outlives a loss of power.
    pub persists: u8,
    /// Zero.
    pub reserved2: [u8; 54],
}

/// A registrant in the extended reservation status.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ReservationRegistrant {
    /// FFFFh: controllers come and go.
    pub cntlid: U16,
    /// Bit 0: it holds the reservation.
    pub status: u8,
    /// Zero.
    pub reserved: [u8; 5],
    /// Its key.
    pub key: U64,
    /// Who.
    pub host_id: HostId,
    /// Zero.
    pub reserved2: [u8; 32],
}

/// Head of the discovery log page.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DiscoveryHeader {
    /// Changes whenever the entries do.
    pub generation: U64,
    /// Entries.
    pub count: U64,
    /// Format: 0.
    pub format: U16,
    /// Zero.
    pub reserved: [u8; 1006],
}

/// An entry of the discovery log page.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DiscoveryEntry {
    /// 3: TCP.
    pub transport: u8,
    /// 1: IPv4, 2: IPv6.
    pub family: u8,
    /// 2: a subsystem with namespaces, 3: this discovery subsystem.
    pub kind: u8,
    /// Bits 1:0, 2: a secure channel is not required. Bit 2: the host may turn off flow control.
    pub requirements: u8,
    /// Names address and port.
    pub port: U16,
    /// FFFFh: controllers are made when asked for.
    pub cntlid: U16,
    /// Entries an admin queue may have.
    pub admin_entries: U16,
    /// Zero.
    pub flags: U16,
    /// Zero.
    pub reserved: [u8; 20],
    /// Port, as text padded with blanks.
    pub service: [u8; 32],
    /// Zero.
    pub reserved2: [u8; 192],
    /// Name of the subsystem, zero-padded.
    pub subsystem: [u8; 256],
    /// Address, as text padded with blanks.
    pub address: [u8; 256],
    /// Byte 0: security; 0 is none.
    pub security: [u8; 256],
}

/// The identification of a controller.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct IdentifyController {
    /// PCI vendor and subsystem vendor: none.
    pub vid: U16,
    pub ssvid: U16,
    /// Serial number, model and firmware, padded with blanks.
    pub sn: [u8; 20],
    pub mn: [u8; 40],
    pub fr: [u8; 8],
    /// Recommended arbitration burst.
    pub rab: u8,
    pub ieee: [u8; 3],
    /// Bit 1: the subsystem may have several controllers.
    pub cmic: u8,
    /// Largest transfer, as a power of two of 4 KiB.
    pub mdts: u8,
    pub cntlid: U16,
    pub ver: U32,
    pub rtd3r: U32,
    pub rtd3e: U32,
    /// Optional asynchronous events.
    pub oaes: U32,
    /// Bit 0: host identifiers of 128 bits.
    pub ctratt: U32,
    pub rrls: U16,
    pub reserved_102: [u8; 9],
    /// 1: I/O, 2: discovery.
    pub cntrltype: u8,
    pub fguid: [u8; 16],
    /// Delays before commands are repeated, in units of 100 ms.
    pub crdt: [U16; 3],
    pub reserved_134: [u8; 122],
    pub oacs: U16,
    /// Aborts and events at once, 0's based.
    pub acl: u8,
    pub aerl: u8,
    pub frmw: u8,
    /// Log page attributes.
    pub lpa: u8,
    pub elpe: u8,
    pub npss: u8,
    pub avscc: u8,
    pub apsta: u8,
    pub wctemp: U16,
    pub cctemp: U16,
    pub reserved_270: [u8; 50],
    /// Granularity of the keep-alive timer, in units of 100 ms.
    pub kas: U16,
    pub reserved_322: [u8; 190],
    /// Sizes of queue entries.
    pub sqes: u8,
    pub cqes: u8,
    /// Commands at once in a queue.
    pub maxcmd: U16,
    /// Largest namespace identifier.
    pub nn: U32,
    /// Optional commands.
    pub oncs: U16,
    pub fuses: U16,
    pub fna: u8,
    /// Bit 0: there is a volatile write cache; bits 2:1: flush may name all namespaces.
    pub vwc: u8,
    pub awun: U16,
    pub awupf: U16,
    pub icsvscc: u8,
    pub nwpc: u8,
    pub acwu: U16,
    /// Formats of Copy.
    pub ocfs: U16,
    pub sgls: U32,
    /// Namespaces at most.
    pub mnan: U32,
    pub reserved_544: [u8; 224],
    pub subnqn: [u8; 256],
    pub reserved_1024: [u8; 768],
    /// Capsule sizes of I/O queues, in units of 16 bytes.
    pub ioccsz: U32,
    pub iorcsz: U32,
    pub icdoff: U16,
    pub fcatt: u8,
    pub msdbd: u8,
    pub ofcs: U16,
    pub reserved_1806: [u8; 242],
    pub psd: [u8; 1024],
    pub vendor: [u8; 1024],
}

/// The identification of a namespace.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct IdentifyNamespace {
    /// Size, capacity and use, in blocks.
    pub nsze: U64,
    pub ncap: U64,
    pub nuse: U64,
    /// Bit 0: thin; bit 1: its own atomicity; bit 4: its own best sizes.
    pub nsfeat: u8,
    pub nlbaf: u8,
    pub flbas: u8,
    pub mc: u8,
    pub dpc: u8,
    pub dps: u8,
    /// Bit 0: may be seen by several controllers.
    pub nmic: u8,
    /// Kinds of reservations.
    pub rescap: u8,
    pub fpi: u8,
    /// Bits 2:0, 1: deallocated blocks read as zeroes; bit 3: Write Zeroes deallocates.
    pub dlfeat: u8,
    pub nawun: U16,
    pub nawupf: U16,
    pub nacwu: U16,
    pub nabsn: U16,
    pub nabo: U16,
    pub nabspf: U16,
    pub noiob: U16,
    pub nvmcap: [u8; 16],
    /// Best sizes and alignments for writes and deallocation, 0's based.
    pub npwg: U16,
    pub npwa: U16,
    pub npdg: U16,
    pub npda: U16,
    pub nows: U16,
    /// Copy: longest range, longest in all, number of ranges (0's based).
    pub mssrl: U16,
    pub mcl: U32,
    pub msrc: u8,
    pub reserved_81: [u8; 11],
    pub anagrpid: U32,
    pub reserved_96: [u8; 3],
    /// Bit 0: write-protected.
    pub nsattr: u8,
    pub nvmsetid: U16,
    pub endgid: U16,
    pub nguid: [u8; 16],
    pub eui64: [u8; 8],
    /// Formats; the first: no metadata, 512 bytes.
    pub lbaf: [[u8; 4]; 16],
    pub reserved_192: [u8; 192],
    pub vendor: [u8; 3712],
}

const _: () = {
    assert!(size_of::<ConnectData>() == 1024);
    assert!(size_of::<DsmRange>() == 16);
    assert!(size_of::<CopyRange>() == 32);
    assert!(size_of::<ReservationKeys>() == 16);
    assert!(size_of::<ReservationStatus>() == 64);
    assert!(size_of::<ReservationRegistrant>() == 64);
    assert!(size_of::<DiscoveryHeader>() == 1024);
    assert!(size_of::<DiscoveryEntry>() == 1024);
    assert!(size_of::<IdentifyController>() == 4096);
    assert!(std::mem::offset_of!(IdentifyController, cntrltype) == 111);
    assert!(std::mem::offset_of!(IdentifyController, oacs) == 256);
    assert!(std::mem::offset_of!(IdentifyController, kas) == 320);
    assert!(std::mem::offset_of!(IdentifyController, sqes) == 512);
    assert!(std::mem::offset_of!(IdentifyController, vwc) == 525);
    assert!(std::mem::offset_of!(IdentifyController, sgls) == 536);
    assert!(std::mem::offset_of!(IdentifyController, subnqn) == 768);
    assert!(std::mem::offset_of!(IdentifyController, ioccsz) == 1792);
    assert!(std::mem::offset_of!(IdentifyController, psd) == 2048);
    assert!(size_of::<IdentifyNamespace>() == 4096);
    assert!(std::mem::offset_of!(IdentifyNamespace, nmic) == 30);
    assert!(std::mem::offset_of!(IdentifyNamespace, npwg) == 64);
    assert!(std::mem::offset_of!(IdentifyNamespace, mcl) == 76);
    assert!(std::mem::offset_of!(IdentifyNamespace, nguid) == 104);
    assert!(std::mem::offset_of!(IdentifyNamespace, lbaf) == 128);
};

impl ConnectData {
    /// What a host says when it connects.
    pub fn new(host_id: HostId, host: &str, subsystem: &str, cntlid: u16) -> Self {
        Self {
            host_id,
            cntlid: cntlid.into(),
            reserved: [0; 238],
            subsystem: padded(subsystem, 0),
            host: padded(host, 0),
            reserved2: [0; 256],
        }
    }
}

/// Text in a field of fixed size; what does not fit is cut off.
pub fn padded<const N: usize>(text: &str, pad: u8) -> [u8; N] {
    let mut field = [pad; N];
    let len = text.len().min(N);
    field[..len].copy_from_slice(&text.as_bytes()[..len]);
    field
}

/// A zero-padded name; `None` if it is none.
pub fn name_in(field: &[u8; 256]) -> Option<&str> {
    let end = field.iter().position(|byte| *byte == 0)?;
    let name = str::from_utf8(&field[..end]).ok()?;
    (!name.is_empty() && name.len() <= super::NQN_BYTES_MAX).then_some(name)
}
