//! What Identify says of controllers and namespaces.

use zerocopy::{FromZeros, IntoBytes};

use super::data::{IdentifyController, IdentifyNamespace, padded};
use super::server::Subsystem;
use super::session::{COPY_BLOCKS_MAX, COPY_RANGES_MAX};
use super::{
    ATOMIC_BYTES, COMPARE_WRITE_MAX, DISCOVERY_NQN, IN_CAPSULE_MAX, LBA_BYTES, NAMESPACES_MAX, NSID, QUEUE_ENTRIES_MAX,
    TRANSFER_MAX, VERSION,
};

/// The page size that sizes are powers of two of.
const PAGE: u32 = 4096;
/// Queue entries of 64 and of 16 bytes, as powers of two, least and most.
const SQES: u8 = 0x66;
const CQES: u8 = 0x44;

/// Number of blocks in 0's based form.
fn blocks_0(bytes: u32) -> u16 {
    (bytes / LBA_BYTES as u32 - 1) as u16
}

fn common(cntlid: u16, serial: &str, nqn: &str) -> IdentifyController {
    let mut id = IdentifyController::new_zeroed();
    id.sn = padded(serial, b' ');
    id.mn = padded("blockd", b' ');
    id.fr = padded(env!("CARGO_PKG_VERSION"), b' ');
    id.cmic = 1 << 1;
    id.mdts = (TRANSFER_MAX / PAGE).ilog2() as u8;
    id.cntlid = cntlid.into();
    id.ver = VERSION.into();
    id.ctratt = 1.into();
    id.acl = 3;
    id.aerl = (super::admin::EVENTS_MAX - 1) as u8;
    id.kas = 10.into();
    id.maxcmd = QUEUE_ENTRIES_MAX.into();
    // Any alignment, and data in the capsule by its offset.
    id.sgls = (1 | 1 << 20).into();
    id.subnqn = padded(nqn, 0);
    // Support of extended offsets in log pages.
    id.lpa = 1 << 2;
    id
}

/// A controller of a volume or a snapshot.
pub fn controller(subsystem: &Subsystem, cntlid: u16) -> IdentifyController {
    const NAMESPACE_NOTICES: u32 = 1 << 8;
    const COMPARE: u16 = 1;
    const DEALLOCATE: u16 = 1 << 2;
    const WRITE_ZEROES: u16 = 1 << 3;
    const SELECT: u16 = 1 << 4;
    const RESERVATIONS: u16 = 1 << 5;
    const VERIFY: u16 = 1 << 7;
    const COPY: u16 = 1 << 8;
    let mut id = common(cntlid, &subsystem.id.to_string(), &subsystem.nqn);
    id.cntrltype = 1;
    id.oaes = NAMESPACE_NOTICES.into();
    // And the page of commands and their effects.
    id.lpa |= 1 << 1;
    id.sqes = SQES;
    id.cqes = CQES;
    id.nn = NAMESPACES_MAX.into();
    id.mnan = NAMESPACES_MAX.into();
    let reading = COMPARE | SELECT | VERIFY;
    let writing = DEALLOCATE | WRITE_ZEROES | RESERVATIONS | COPY;
    id.oncs = if subsystem.read_only { reading } else { reading | writing }.into();
    // A pair ends with a write.
    id.fuses = u16::from(!subsystem.read_only).into();
    // A cache to be flushed, by the namespace's number or all at once.
    id.vwc = 0b110 | u8::from(!subsystem.read_only);
    id.awun = blocks_0(ATOMIC_BYTES).into();
    id.awupf = blocks_0(ATOMIC_BYTES).into();
    id.acwu = blocks_0(COMPARE_WRITE_MAX).into();
    id.ocfs = u16::from(!subsystem.read_only).into();
    id.ioccsz = ((64 + IN_CAPSULE_MAX) / 16).into();
    id.iorcsz = 1.into();
    id.msdbd = 1;
    id
}

/// A controller of the discovery subsystem.
pub fn discovery(cntlid: u16) -> IdentifyController {
    let mut id = common(cntlid, "discovery", DISCOVERY_NQN);
    id.cntrltype = 2;
    id.oaes = (1 << 31).into();
    id.ioccsz = 4.into();
    id.iorcsz = 1.into();
    id
}

/// The namespace of a volume or a snapshot.
pub fn namespace(subsystem: &Subsystem) -> IdentifyNamespace {
    const THIN: u8 = 1;
    const ATOMICITY: u8 = 1 << 1;
    const BEST_SIZES: u8 = 1 << 4;
    let mut id = IdentifyNamespace::new_zeroed();
    let blocks = subsystem.size / LBA_BYTES;
    id.nsze = blocks.into();
    id.ncap = blocks.into();
    id.nuse = blocks.into();
    id.nsfeat = THIN | ATOMICITY | BEST_SIZES;
    id.nmic = 1;
    // All six kinds, kept over a loss of power, and keys may be ignored.
    id.rescap = if subsystem.read_only { 0 } else { 0xff };
    id.dlfeat = 0x09;
    let unit = blocks_0(crate::types::BLOCK_SIZE as u32).into();
    id.nawun = blocks_0(ATOMIC_BYTES).into();
    id.nawupf = blocks_0(ATOMIC_BYTES).into();
    id.nacwu = blocks_0(COMPARE_WRITE_MAX).into();
    id.npwg = unit;
    id.npwa = unit;
    id.npdg = unit;
    id.npda = unit;
    id.nvmcap[..8].copy_from_slice(&subsystem.size.to_le_bytes());
    // A copy has at most as many blocks as a range can say.
    id.mssrl = (COPY_BLOCKS_MAX as u16).into();
    id.mcl = COPY_BLOCKS_MAX.into();
    id.msrc = (COPY_RANGES_MAX - 1) as u8;
    id.nsattr = u8::from(subsystem.read_only);
    id.nguid = subsystem.id.0;
    id.lbaf[0] = [0, 0, LBA_BYTES.ilog2() as u8, 0];
    id
}

const _: () = assert!(COPY_BLOCKS_MAX <= u16::MAX as u32);

/// Namespace identification descriptors: NGUID, UUID, command set.
pub fn descriptors(subsystem: &Subsystem) -> Vec<u8> {
    const NGUID: u8 = 2;
    const UUID: u8 = 3;
    const COMMAND_SET: u8 = 4;
    let mut page = Vec::with_capacity(4096);
    for (kind, value) in [(NGUID, &subsystem.id.0[..]), (UUID, &subsystem.id.0[..]), (COMMAND_SET, &[0][..])] {
        page.extend_from_slice(&[kind, value.len() as u8, 0, 0]);
        page.extend_from_slice(value);
    }
    page.resize(4096, 0);
    page
}

/// The list of active namespaces with identifiers beyond `after`.
pub fn active_namespaces(after: u32, there: bool) -> Vec<u8> {
    let mut page = vec![0; 4096];
    if there && after < NSID {
        page[..4].copy_from_slice(&NSID.to_le_bytes());
    }
    page
}

/// What the NVM command set says of a controller: limits of Verify, and of deallocation.
pub fn command_set_controller() -> Vec<u8> {
    let mut page = vec![0; 4096];
    page[0] = (TRANSFER_MAX / PAGE).ilog2() as u8;
    page
}

/// The list of controllers from an identifier on.
pub fn controllers(mut ids: Vec<u16>, from: u16) -> Vec<u8> {
    ids.retain(|id| *id >= from);
    ids.sort_unstable();
    ids.truncate(2047);
    let mut page = Vec::with_capacity(4096);
    page.extend_from_slice(&(ids.len() as u16).to_le_bytes());
    for id in ids {
        page.extend_from_slice(id.as_bytes());
    }
    page.resize(4096, 0);
    page
}
