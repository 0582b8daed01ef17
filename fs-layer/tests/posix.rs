//! What POSIX says, call by call, over a disk in memory.

use std::sync::Arc;

use fs_layer::disk::{Disk, MemoryDisk};
use fs_layer::vfs::*;
use fs_layer::{Filesystem, MkfsOptions, OpenOptions, mkfs};

fn disk() -> Arc<dyn Disk> {
    let disk = Arc::new(MemoryDisk::new(1 << 40));
    mkfs(&*disk, &MkfsOptions { journal_blocks: 512, ..MkfsOptions::default() }).expect("mkfs");
    disk
}

fn open(disk: &Arc<dyn Disk>) -> Arc<Filesystem> {
    let options = OpenOptions { commit_every: None, ..OpenOptions::default() };
    Filesystem::open(disk.clone(), &options).expect("open")
}

fn root() -> Credentials {
    Credentials::system()
}

fn user(uid: u32) -> Credentials {
    Credentials { uid, gid: uid, groups: vec![500] }
}

fn mode(mode: u32) -> NewAttributes {
    NewAttributes { mode, ..NewAttributes::default() }
}

fn file(fs: &Filesystem, dir: Ino, name: &str) -> Ino {
    let made = fs.make(&root(), dir, name.as_bytes(), &Make::File { exclusive: true }, &mode(0o644)).expect("make");
    made.attributes.ino
}

fn directory(fs: &Filesystem, dir: Ino, name: &str) -> Ino {
    fs.make(&root(), dir, name.as_bytes(), &Make::Directory, &mode(0o755)).expect("mkdir").attributes.ino
}

fn errno<T: std::fmt::Debug>(result: Result<T>) -> i32 {
    result.expect_err("must fail").errno()
}

#[test]
fn files_of_all_sizes_come_back_after_closing() {
    let disk = disk();
    let fs = open(&disk);
    let sizes = [0usize, 1, 3584, 3585, 4096, 4097, 100_000, 3 << 20];
    for size in sizes {
        let ino = file(&fs, ROOT, &format!("f{size}"));
        let data: Vec<u8> = (0..size).map(|at| (at * 7 + size) as u8).collect();
        for (index, chunk) in data.chunks(1000).enumerate() {
            fs.write(&root(), ino, WriteAt::Offset(index as u64 * 1000), chunk).expect("write");
        }
        assert_eq!(fs.read(ino, 0, 8 << 20).expect("read").data, data, "{size}");
    }
    fs.close().expect("close");
    let fs = open(&disk);
    assert_eq!(fs.status().replayed.expect("replayed").records, 0);
    for size in sizes {
        let found = fs.lookup(&root(), ROOT, format!("f{size}").as_bytes()).expect("lookup");
        assert_eq!(found.size, size as u64);
        let data: Vec<u8> = (0..size).map(|at| (at * 7 + size) as u8).collect();
        assert_eq!(fs.read(found.ino, 0, 8 << 20).expect("read").data, data, "{size}");
        fs.unlink(&root(), ROOT, format!("f{size}").as_bytes()).expect("unlink");
        assert_eq!(errno(fs.getattr(found.ino)), libc::ESTALE);
    }
    fs.close().expect("close");
}

#[test]
fn sparse_files_truncation_and_holes() {
    let disk = disk();
    let fs = open(&disk);
    let ino = file(&fs, ROOT, "sparse");
    fs.write(&root(), ino, WriteAt::Offset(1 << 40), b"far").expect("write");
    fs.write(&root(), ino, WriteAt::Offset(10), b"near").expect("write");
    assert_eq!(fs.getattr(ino).expect("stat").size, (1 << 40) + 3);
    assert_eq!(fs.seek(ino, 0, Seek::Data).expect("data"), 0);
    assert_eq!(fs.seek(ino, 0, Seek::Hole).expect("hole"), 4096);
    assert_eq!(fs.seek(ino, 4096, Seek::Data).expect("data"), 1 << 40);
    fs.fsync(ino, false).expect("fsync");
    assert_eq!(fs.seek(ino, 0, Seek::Hole).expect("hole"), 4096);
    assert_eq!(fs.seek(ino, 4096, Seek::Data).expect("data"), 1 << 40);
    assert_eq!(&fs.read(ino, 0, 20).expect("read").data[..], b"\0\0\0\0\0\0\0\0\0\0near\0\0\0\0\0\0");
    let set = |size| SetAttributes { size: Some(size), ..SetAttributes::default() };
    fs.setattr(&root(), ino, &set(12), false).expect("truncate");
    fs.setattr(&root(), ino, &set(5000), false).expect("truncate");
    let data = fs.read(ino, 0, 9000).expect("read").data;
    assert_eq!(data.len(), 5000);
    assert_eq!(&data[10..14], b"ne\0\0");
    assert!(data[14..].iter().all(|byte| *byte == 0));
    fs.write(&root(), ino, WriteAt::Offset(0), &[1; 20000]).expect("write");
    fs.fsync(ino, false).expect("fsync");
    fs.fallocate(&root(), ino, Fallocate::PunchHole, 5000, 10000).expect("punch");
    let data = fs.read(ino, 0, 20000).expect("read").data;
    assert!(data.iter().enumerate().all(|(at, byte)| *byte == u8::from(!(5000..15000).contains(&at))));
    fs.fallocate(&root(), ino, Fallocate::Allocate, 0, 100_000).expect("allocate");
    assert_eq!(fs.getattr(ino).expect("stat").size, 100_000);
    assert!(fs.getattr(ino).expect("stat").stored_bytes >= 100_000);
    assert_eq!(fs.read(ino, 0, 20000).expect("read").data, data);
    fs.fallocate(&root(), ino, Fallocate::ZeroRange, 0, 20000).expect("zero");
    assert!(fs.read(ino, 0, 200_000).expect("read").data.iter().all(|byte| *byte == 0));
    fs.close().expect("close");
}

#[test]
fn names_links_and_renames() {
    let disk = disk();
    let fs = open(&disk);
    let (a, b) = (directory(&fs, ROOT, "a"), directory(&fs, ROOT, "b"));
    assert_eq!(fs.getattr(ROOT).expect("stat").links, 4);
    let x = file(&fs, a, "x");
    fs.link(&root(), x, b, b"y").expect("link");
    assert_eq!(fs.getattr(x).expect("stat").links, 2);
    // Two names of one file: nothing happens.
    fs.rename(&root(), (a, b"x"), (b, b"y"), Rename::Replace).expect("rename");
    assert_eq!(fs.lookup(&root(), a, b"x").expect("still there").ino, x);
    assert_eq!(errno(fs.rename(&root(), (a, b"x"), (b, b"y"), Rename::NoReplace)), libc::EEXIST);
    let c = directory(&fs, a, "c");
    assert_eq!(errno(fs.rename(&root(), (ROOT, b"a"), (c, b"a"), Rename::Replace)), libc::EINVAL);
    assert_eq!(errno(fs.rename(&root(), (a, b"c"), (ROOT, b"a"), Rename::Replace)), libc::ENOTEMPTY);
    fs.rename(&root(), (a, b"c"), (b, b"y"), Rename::Exchange).expect("exchange");
    assert_eq!(fs.lookup(&root(), b, b"y").expect("the directory").ino, c);
    assert_eq!(fs.parent(c).expect("parent"), b);
    assert_eq!(fs.lookup(&root(), c, b"..").expect("up").ino, b);
    assert_eq!((fs.getattr(a).expect("stat").links, fs.getattr(b).expect("stat").links), (2, 3));
    assert_eq!(errno(fs.rmdir(&root(), ROOT, b"b")), libc::ENOTEMPTY);
    assert_eq!(errno(fs.unlink(&root(), ROOT, b"b")), libc::EISDIR);
    fs.rmdir(&root(), b, b"y").expect("rmdir");
    fs.rename(&root(), (ROOT, b"a"), (ROOT, b"b"), Rename::Replace).expect("over an empty directory");
    assert_eq!(fs.getattr(ROOT).expect("stat").links, 3);
    let page = fs.readdir(&root(), a, 0, 100).expect("readdir");
    assert_eq!(page.entries.len(), 2);
    assert!(page.end);
    assert_eq!(errno(fs.make(&root(), a, &[b'n'; 256], &Make::Directory, &mode(0o755))), libc::ENAMETOOLONG);
    for length in [1, 100, 3584, 4095] {
        let target = vec![b't'; length];
        let name = format!("l{length}");
        let made = fs.make(&root(), a, name.as_bytes(), &Make::Symlink(target.clone()), &mode(0o777)).expect("symlink");
        assert_eq!(fs.readlink(made.attributes.ino).expect("readlink"), target);
        fs.unlink(&root(), a, name.as_bytes()).expect("unlink");
    }
    fs.close().expect("close");
}

/// A file that is open and has no name any more.
fn held_without_a_name(fs: &Filesystem, name: &str) -> Ino {
    let ino = file(fs, ROOT, name);
    fs.write(&root(), ino, WriteAt::Offset(0), &[5; 50_000]).expect("write");
    fs.hold(ino).expect("hold");
    fs.unlink(&root(), ROOT, name.as_bytes()).expect("unlink");
    ino
}

#[test]
fn held_files_live_on_without_names_and_orphans_go_at_the_next_opening() {
    let disk = disk();
    let fs = open(&disk);
    let [x, y] = ["x", "y"].map(|name| held_without_a_name(&fs, name));
    assert_eq!(fs.getattr(x).expect("held").links, 0);
    assert_eq!(fs.read(x, 0, 10).expect("held").data, vec![5; 10]);
    fs.sync().expect("sync");
    fs.release(x);
    assert_eq!(errno(fs.getattr(x)), libc::ESTALE);
    fs.close().expect("close");
    let fs = open(&disk);
    assert_eq!(errno(fs.getattr(y)), libc::ESTALE);
    assert_eq!(fs.status().counts.files, 1);
    assert_eq!(fs.status().counts.blocks, 0);
    fs.close().expect("close");
}

#[test]
fn held_files_without_names_can_be_held_again_until_recovery_ends() {
    let disk = disk();
    let fs = open(&disk);
    let [x, y] = ["x", "y"].map(|name| held_without_a_name(&fs, name));
    fs.sync().expect("sync");
    fs.close().expect("close");
    let options = OpenOptions { recovers_holds: true, commit_every: None, ..OpenOptions::default() };
    let fs = Filesystem::open(disk.clone(), &options).expect("open");
    fs.hold(x).expect("it may be asked for");
    fs.end_recovery();
    fs.end_recovery();
    assert_eq!(fs.read(x, 0, 10).expect("held").data, vec![5; 10]);
    assert_eq!(errno(fs.getattr(y)), libc::ESTALE);
    assert_eq!(errno(fs.hold(y)), libc::ESTALE);
    fs.release(x);
    assert_eq!(errno(fs.getattr(x)), libc::ESTALE);
    assert_eq!(fs.status().counts.blocks, 0);
    fs.close().expect("close");
}

#[test]
fn a_clone_has_the_holes_of_its_source_and_none_of_its_own_data() {
    let disk = disk();
    let fs = open(&disk);
    let (from, to) = (file(&fs, ROOT, "from"), file(&fs, ROOT, "to"));
    let size = 64 << 20;
    fs.write(&root(), from, WriteAt::Offset(32 << 20), &[7; 5000]).expect("write");
    fs.setattr(&root(), from, &SetAttributes { size: Some(size), ..SetAttributes::default() }, true).expect("grow");
    fs.write(&root(), to, WriteAt::Offset(0), &[9; 200_000]).expect("write");
    assert_eq!(fs.clone_range(&root(), (from, 0), (to, 0), 0).expect("clone"), size);
    fs.sync().expect("sync");
    let cloned = fs.getattr(to).expect("stat");
    assert_eq!(cloned.size, size);
    assert!(cloned.stored_bytes <= 16384, "{} bytes are stored", cloned.stored_bytes);
    for at in (0..size).step_by(1 << 20) {
        let (wanted, found) = (fs.read(from, at, 1 << 20).expect("read"), fs.read(to, at, 1 << 20).expect("read"));
        assert!(wanted.data == found.data, "the MiB at {at} differs");
    }
    fs.close().expect("close");
}

#[test]
fn a_clone_and_its_source_go_separate_ways() {
    let disk = disk();
    let fs = open(&disk);
    let (from, to) = (file(&fs, ROOT, "from"), file(&fs, ROOT, "to"));
    let read = |ino, at, len| fs.read(ino, at, len).expect("read").data.to_vec();
    fs.write(&root(), from, WriteAt::Offset(0), &[1; 100_000]).expect("write");
    // Cut, so that the disk has something behind the end.
    fs.fsync(from, false).expect("fsync");
    let cut = SetAttributes { size: Some(99_000), ..SetAttributes::default() };
    fs.setattr(&root(), from, &cut, true).expect("cut");
    assert_eq!(fs.clone_range(&root(), (from, 0), (to, 4096), 0).expect("clone"), 99_000);
    let grown = SetAttributes { size: Some(200_000), ..SetAttributes::default() };
    fs.setattr(&root(), to, &grown, true).expect("grow");
    assert_eq!(read(to, 0, 4096), vec![0; 4096]);
    assert_eq!(read(to, 4096, 99_000), vec![1; 99_000]);
    assert_eq!(read(to, 4096 + 99_000, 200_000), vec![0; 200_000 - 99_000 - 4096]);
    fs.write(&root(), from, WriteAt::Offset(8192), &[2; 4096]).expect("write");
    fs.write(&root(), to, WriteAt::Offset(4096), &[3; 10]).expect("write");
    fs.sync().expect("sync");
    assert_eq!((read(from, 0, 10), read(to, 4096 + 8192, 10)), (vec![1; 10], vec![1; 10]));
    // Within one file, over what is there and what is not written yet.
    fs.write(&root(), to, WriteAt::Offset(12_288), &[4; 8192]).expect("write");
    fs.clone_range(&root(), (to, 4096), (to, 16_384), 12_288).expect("clone");
    assert_eq!(read(to, 16_384, 20_480), [vec![3; 10], vec![1; 8182], vec![4; 4096], vec![1; 8192]].concat()[..20_480]);
    for (at, target, len) in
        [(1, 0, 4096), (0, 1, 4096), (0, 0, 4096), (4096, 0, 100), (0, 4096, 8192), (0, 8192, 1 << 30)]
    {
        assert_eq!(errno(fs.clone_range(&root(), (to, at), (to, target), len)), libc::EINVAL, "{at} {target} {len}");
    }
    fs.unlink(&root(), ROOT, b"from").expect("unlink");
    fs.sync().expect("sync");
    assert_eq!(read(to, 8192 + 4096 * 5, 4096), vec![1; 4096]);
    assert_eq!(errno(fs.clone_range(&root(), (ROOT, 0), (to, 0), 4096)), libc::EISDIR);
    fs.close().expect("close");
    let found = fs_layer::check::check(&*disk, Default::default(), &mut |_| ()).expect("check");
    assert!(found.is_clean(), "{:#?}", found.problems);
}

#[test]
fn permissions_hold() {
    let disk = disk();
    let fs = open(&disk);
    let (alice, bob) = (user(1000), user(1001));
    assert_eq!(errno(fs.make(&alice, ROOT, b"f", &Make::Directory, &mode(0o755))), libc::EACCES);
    let tmp = fs.make(&root(), ROOT, b"tmp", &Make::Directory, &mode(0o1777)).expect("mkdir").attributes.ino;
    let f = fs.make(&alice, tmp, b"f", &Make::File { exclusive: true }, &mode(0o640)).expect("make").attributes;
    assert_eq!((f.uid, f.gid, f.mode), (1000, 1000, 0o640));
    assert_eq!(errno(fs.unlink(&bob, tmp, b"f")), libc::EPERM);
    assert_eq!(errno(fs.rename(&bob, (tmp, b"f"), (tmp, b"g"), Rename::Replace)), libc::EPERM);
    let read = Access { read: true, write: true, execute: false };
    assert_eq!(fs.access(&bob, f.ino, read).expect("access"), Access::default());
    let set = SetAttributes { gid: Some(500), mode: Some(0o6755), ..SetAttributes::default() };
    assert_eq!(errno(fs.setattr(&bob, f.ino, &set, false)), libc::EPERM);
    let after = fs.setattr(&alice, f.ino, &set, false).expect("setattr");
    assert_eq!((after.gid, after.mode), (500, 0o6755));
    let written = fs.write(&alice, f.ino, WriteAt::End, b"x").expect("write");
    assert_eq!(written.attributes.mode, 0o755);
    let own = SetAttributes { uid: Some(1001), ..SetAttributes::default() };
    assert_eq!(errno(fs.setattr(&alice, f.ino, &own, false)), libc::EPERM);
    fs.setxattr(&alice, f.ino, b"user.a", &[1; 60_000], SetXattr::Any).expect("set");
    fs.setxattr(&alice, f.ino, b"user.b", b"two", SetXattr::Create).expect("set");
    assert_eq!(errno(fs.setxattr(&alice, f.ino, b"user.b", b"two", SetXattr::Create)), libc::EEXIST);
    assert_eq!(fs.getxattr(&alice, f.ino, b"user.a").expect("get"), vec![1; 60_000]);
    assert_eq!(errno(fs.setxattr(&bob, f.ino, b"user.b", b"two", SetXattr::Any)), libc::EACCES);
    fs.removexattr(&alice, f.ino, b"user.a").expect("remove");
    assert_eq!(fs.listxattr(&alice, f.ino).expect("list"), vec![b"user.b".to_vec()]);
    fs.unlink(&alice, tmp, b"f").expect("unlink");
    fs.close().expect("close");
}

#[test]
fn many_names_in_one_directory() {
    let disk = disk();
    let fs = open(&disk);
    for index in 0..20_000 {
        file(&fs, ROOT, &format!("file-{index}"));
    }
    let (mut cookie, mut seen) = (0, 0);
    loop {
        let page = fs.readdir(&root(), ROOT, cookie, 700).expect("readdir");
        seen += page.entries.len();
        if page.end {
            break;
        }
        cookie = page.entries.last().expect("not the end").cookie;
    }
    assert_eq!(seen, 20_000);
    for index in 0..20_000 {
        fs.unlink(&root(), ROOT, format!("file-{index}").as_bytes()).expect("unlink");
    }
    assert_eq!(fs.status().counts, fs_layer::journal::Counts { blocks: 0, files: 1 });
    fs.close().expect("close");
}

#[test]
fn capabilities_go_when_the_program_changes() {
    let disk = disk();
    let fs = open(&disk);
    let ino = file(&fs, ROOT, "program");
    let names = || fs.listxattr(&root(), ino).expect("list");
    // One attribute that fits the inode, and so many that they need blocks of their own.
    for kept in [10, 20_000] {
        fs.setxattr(&root(), ino, b"user.kept", &vec![7; kept], SetXattr::Any).expect("set");
        let changes: [(&str, &dyn Fn()); 4] = [
            ("write", &|| {
                fs.write(&root(), ino, WriteAt::Offset(0), b"x").expect("write");
            }),
            ("truncate", &|| {
                let size = SetAttributes { size: Some(1), ..SetAttributes::default() };
                fs.setattr(&root(), ino, &size, false).expect("truncate");
            }),
            ("fallocate", &|| {
                fs.fallocate(&root(), ino, Fallocate::ZeroRange, 0, 10).expect("fallocate");
            }),
            ("chown", &|| {
                let owner = SetAttributes { uid: Some(7), ..SetAttributes::default() };
                fs.setattr(&root(), ino, &owner, false).expect("chown");
            }),
        ];
        for (what, change) in changes {
            fs.setxattr(&root(), ino, b"security.capability", b"all", SetXattr::Create).expect("set");
            let mode = SetAttributes { mode: Some(0o755), ..SetAttributes::default() };
            fs.setattr(&root(), ino, &mode, false).expect("chmod");
            assert_eq!(names().len(), 2, "chmod keeps them");
            change();
            assert_eq!(names(), [b"user.kept".to_vec()], "{what}");
            assert_eq!(fs.getxattr(&root(), ino, b"user.kept").expect("get").len(), kept);
        }
    }
    fs.close().expect("close");
}
