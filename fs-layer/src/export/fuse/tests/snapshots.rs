//! Snapshots in a mount: what the kernel keeps, and what it must not.

use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};

use super::*;
use crate::snapshots::testing::Copies;
use crate::snapshots::{ShelfOptions, SnapshotTree};

fn names(dir: PathBuf) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

#[test]
fn snapshots_come_show_what_was_and_go() {
    for sharing in [Sharing::Alone, Sharing::Shared] {
        come_and_go(sharing);
    }
}

fn come_and_go(sharing: Sharing) {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(MemoryDisk::new(1 << 24));
    mkfs(&*disk, &MkfsOptions { journal_blocks: 4096, ..MkfsOptions::default() }).unwrap();
    let live = Filesystem::open(disk.clone(), &TreeOptions::default()).unwrap();
    let tree = SnapshotTree::new(live.clone(), Copies::of(disk), ShelfOptions::default()).unwrap();
    let tree = Arc::new(tree);
    let mounted = match mount(tree.clone(), dir.path(), &FuseOptions { sharing, ..FuseOptions::default() }) {
        Ok(mounted) => mounted,
        Err(error) => return eprintln!("not tested: {error}"),
    };
    // Unmounts also when something below fails.
    struct Ends(Stopper);
    impl Drop for Ends {
        fn drop(&mut self) {
            let _ = self.0.unmount();
        }
    }
    let ends = Ends(mounted.stopper());
    let at = |path: &str| dir.path().join(path);

    fs::write(at("f"), b"before").unwrap();
    fs::DirBuilder::new().mode(0o751).create(at("d")).unwrap();
    fs::write(at("d/big"), vec![7; 3 << 20]).unwrap();
    // The kernel must not remember that it is not there.
    assert_eq!(errno(fs::metadata(at(".snapshots/one"))), Some(libc::ENOENT));
    tree.create("one").unwrap();
    fs::write(at("f"), b"after that").unwrap();
    fs::remove_file(at("d/big")).unwrap();
    assert_eq!(fs::read(at(".snapshots/one/f")).unwrap(), b"before");
    assert_eq!(fs::read(at(".snapshots/one/d/big")).unwrap(), vec![7; 3 << 20]);
    assert_eq!(fs::metadata(at(".snapshots/one/d")).unwrap().mode() & 0o7777, 0o751);
    assert_eq!(fs::read(at("f")).unwrap(), b"after that");
    tree.create("two").unwrap();
    assert_eq!(names(at("")), ["d", "f"]);
    assert_eq!(names(at(".snapshots")), ["one", "two"]);
    assert_eq!(names(at(".snapshots/one/d")), ["big"]);
    assert_eq!(names(at(".snapshots/two/d")), Vec::<String>::new());
    assert_eq!(fs::canonicalize(at(".snapshots/one/d/../..")).unwrap(), fs::canonicalize(at(".snapshots")).unwrap());
    assert_eq!(fs::metadata(at(".snapshots/one/../..")).unwrap().ino(), fs::metadata(at("")).unwrap().ino());

    let file = at(".snapshots/one/f");
    for result in [
        errno(OpenOptions::new().write(true).open(&file)),
        errno(OpenOptions::new().append(true).open(&file)),
        errno(fs::write(at(".snapshots/one/new"), b"x")),
        errno(fs::create_dir(at(".snapshots/new"))),
        errno(fs::remove_file(&file)),
        errno(fs::rename(&file, at(".snapshots/one/g"))),
        errno(fs::set_permissions(&file, fs::Permissions::from_mode(0o0))),
        errno(fs::remove_dir(at(".snapshots"))),
    ] {
        assert_eq!(result, Some(libc::EROFS));
    }
    for (from, to) in [(".snapshots/one/f", "g"), ("f", ".snapshots/one/g"), (".snapshots/one/f", ".snapshots/two/g")] {
        assert_eq!(errno(fs::rename(at(from), at(to))), Some(libc::EXDEV));
        assert_eq!(errno(fs::hard_link(at(from), at(to))), Some(libc::EXDEV));
    }
    assert_eq!(errno(fs::create_dir(at(".snapshots"))), Some(libc::EEXIST));
    // What was is brought back by copying it, whole blocks too.
    assert_eq!(fs::copy(at(".snapshots/one/d/big"), at("d/big")).unwrap(), 3 << 20);
    assert_eq!(fs::read(at("d/big")).unwrap(), vec![7; 3 << 20]);

    let (held, closed) = (File::open(&file).unwrap(), fs::metadata(&file).unwrap().ino());
    tree.delete("one").unwrap();
    assert_eq!(errno(fs::metadata(&file)), Some(libc::ENOENT));
    assert_eq!(names(at(".snapshots")), ["two"]);
    assert_eq!(errno(held.read_at(&mut [0; 9], 1 << 20)), None, "behind the end, as the kernel knows");
    drop(held);
    tree.create("one").unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"after that");
    assert_ne!(fs::metadata(&file).unwrap().ino(), closed);

    drop(ends);
    mounted.wait().unwrap();
    assert_eq!(live.status().held_files, 0);
    live.close().unwrap();
}
