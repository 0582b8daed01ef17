//! What the offline check finds, and what it mends.

use std::sync::Arc;

use fs_layer::blocks::BlockKind;
use fs_layer::check::{CheckOptions, Report, check};
use fs_layer::disk::{BLOCK_BYTES, Disk, MemoryDisk};
use fs_layer::layout::{InodeBody, Opened, load_superblock, open, seal};
use fs_layer::vfs::*;
use fs_layer::{Filesystem, MkfsOptions, OpenOptions, mkfs};

fn who() -> Credentials {
    Credentials::system()
}

fn make(fs: &Filesystem, dir: Ino, name: &str, what: Make) -> Ino {
    let with = NewAttributes { mode: 0o755, ..NewAttributes::default() };
    fs.make(&who(), dir, name.as_bytes(), &what, &with).expect("make").attributes.ino
}

fn looked_at(disk: &dyn Disk, repair: bool) -> Report {
    check(disk, CheckOptions { repair }, &mut |_| ()).expect("check")
}

/// Changes an inode on the disk so that its block is sound and says something wrong.
fn spoil(disk: &dyn Disk, ino: Ino, change: impl FnOnce(&mut InodeBody)) {
    let geometry = load_superblock(disk).expect("superblock");
    let at = geometry.inode(ino).expect("its place");
    let mut block = [0; BLOCK_BYTES];
    disk.read(at, &mut block).expect("read");
    let (version, mut body) = match open(Some(geometry.fragment()), at, BlockKind::Inode, &block) {
        Opened::Sound { version, body } => (version, *body),
        other => panic!("{other:?}"),
    };
    change(InodeBody::of_mut(&mut body));
    seal(geometry.fragment(), at, BlockKind::Inode, version, &body, &mut block);
    disk.write(at, &block).expect("write");
}

fn filled() -> (Arc<dyn Disk>, Ino, Ino, Ino) {
    let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new(1 << 40));
    mkfs(&*disk, &MkfsOptions { journal_blocks: 128, ..MkfsOptions::default() }).expect("mkfs");
    let options = OpenOptions { commit_every: None, ..OpenOptions::default() };
    let fs = Filesystem::open(disk.clone(), &options).expect("open");
    let dir = make(&fs, ROOT, "dir", Make::Directory);
    let (a, b) =
        (make(&fs, dir, "a", Make::File { exclusive: true }), make(&fs, dir, "b", Make::File { exclusive: true }));
    for ino in [a, b] {
        fs.write(&who(), ino, WriteAt::Offset(0), &[1; 50_000]).expect("write");
    }
    fs.close().expect("close");
    (disk, dir, a, b)
}

#[test]
fn a_sound_filesystem_is_counted() {
    let (disk, ..) = filled();
    let report = looked_at(&*disk, false);
    assert!(report.is_clean(), "{:#?}", report.problems);
    assert_eq!((report.files, report.directories, report.orphans), (4, 2, 0));
    assert_eq!(report.blocks, 3 + 2 * 13);
}

#[test]
fn links_parents_and_counts_are_mended() {
    let (disk, dir, a, _) = filled();
    spoil(&*disk, a, |inode| inode.links = 7.into());
    spoil(&*disk, dir, |inode| inode.parent = 99.into());
    spoil(&*disk, ROOT, |inode| inode.stored_blocks = 5.into());
    let report = looked_at(&*disk, false);
    assert!(!report.is_clean());
    assert_eq!(report.problems.len(), 3, "{:#?}", report.problems);
    // Nothing was changed by looking.
    assert_eq!(looked_at(&*disk, true).problems.len(), 3);
    let report = looked_at(&*disk, false);
    assert!(report.problems.is_empty(), "{:#?}", report.problems);
    let fs = Filesystem::open(disk, &OpenOptions::default()).expect("open");
    assert_eq!(fs.getattr(a).expect("stat").links, 1);
    assert_eq!(fs.parent(dir).expect("parent"), ROOT);
}

#[test]
fn blocks_of_two_files_and_lost_names_are_found() {
    let (disk, dir, a, b) = filled();
    let mut stolen = None;
    spoil(&*disk, a, |inode| stolen = Some(inode.content));
    spoil(&*disk, b, |inode| inode.content = stolen.expect("taken above"));
    let report = looked_at(&*disk, false);
    assert!(report.problems.iter().any(|problem| problem.what.contains("too")), "{:#?}", report.problems);

    let at = load_superblock(&*disk).expect("superblock").inode(a).expect("its place");
    disk.discard(at, 1).expect("discard");
    let report = looked_at(&*disk, false);
    assert!(
        report.problems.iter().any(|problem| problem.ino == Some(dir) && problem.what.contains("not there")),
        "{:#?}",
        report.problems
    );
}
