//! Blocks as version 1 of the format has them: kept files that must still be read, and be written the same.
//!
//! `FS_WRITE_GOLDEN=1` writes files that are missing.

use std::path::Path;

use fs_layer::blocks::{BODY_BYTES, BlockKind, Body};
use fs_layer::disk::{BLOCK_BYTES, Disk, MemoryDisk};
use fs_layer::layout::{Geometry, InodeBody, Opened, load_superblock, open, seal};
use fs_layer::vfs::{FileKind, Ino, Time};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

fn compare(name: &str, block: &[u8]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if !path.exists() && std::env::var_os("FS_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, block).expect("the golden file can be written");
    }
    let golden = std::fs::read(&path).expect("the golden file is there");
    assert!(golden == block, "{name} is not written as it was");
}

fn geometry() -> Geometry {
    Geometry::plan(*b"0123456789abcdef", 1 << 40, 16384).expect("it fits")
}

#[test]
fn the_superblock_stays_as_it_is() {
    let body = geometry().body("a label", 1_700_000_000);
    let mut block = [0; BLOCK_BYTES];
    let body: &Body = body.as_bytes().try_into().expect("a body");
    seal(geometry().fragment(), 0, BlockKind::Super, 1, body, &mut block);
    compare("superblock-v1.bin", &block);
    let disk = MemoryDisk::new(1 << 40);
    disk.write(0, &block).expect("write");
    assert_eq!(load_superblock(&disk).expect("it is read"), geometry());
    // A newer one is refused.
    let mut newer = *body;
    newer[8] = 2;
    seal(geometry().fragment(), 0, BlockKind::Super, 1, &newer, &mut block);
    disk.write(0, &block).expect("write");
    disk.discard(1, 1).expect("discard");
    assert!(load_superblock(&disk).is_err());
}

#[test]
fn an_inode_stays_as_it_is() {
    let mut body: Body = [0; BODY_BYTES];
    let inode = InodeBody::of_mut(&mut body);
    inode.begin(Ino(777), FileKind::File, Time::from_parts(1_700_000_000, 5));
    inode.mode = U32::new(0o640);
    inode.links = U32::new(2);
    inode.uid = U32::new(1000);
    inode.gid = U32::new(1001);
    inode.size = U64::new(5);
    inode.content[..5].copy_from_slice(b"hello");
    inode.content_len = U16::new(5);
    let at = geometry().inode(Ino(777)).expect("its place");
    let mut block = [0; BLOCK_BYTES];
    seal(geometry().fragment(), at, BlockKind::Inode, 3, &body, &mut block);
    compare("inode-v1.bin", &block);
    let Opened::Sound { version: 3, body } = open(Some(geometry().fragment()), at, BlockKind::Inode, &block) else {
        panic!("it can't be read");
    };
    let inode = InodeBody::of(body);
    assert!(inode.problem(Ino(777)).is_none());
    assert_eq!(inode.inline(), b"hello");
    assert_eq!(inode.attributes().modified, Time::from_parts(1_700_000_000, 5));
}
