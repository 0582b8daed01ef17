//! What the snapshots of a filesystem on a disk in memory show.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use super::numbers::LIST;
use super::testing::Copies;
use super::*;
use crate::disk::MemoryDisk;
use crate::journal::is_settled;
use crate::layout::{MkfsOptions, load_superblock, mkfs};
use crate::vfs::*;

struct World {
    live: Arc<Filesystem>,
    source: Arc<Copies>,
    tree: SnapshotTree<Filesystem>,
}

fn who() -> Credentials {
    Credentials::system()
}

impl World {
    fn new() -> World {
        World::with(ShelfOptions::default(), |_| ())
    }

    fn with(options: ShelfOptions, before: impl FnOnce(&Filesystem)) -> World {
        let disk = Arc::new(MemoryDisk::new(1 << 24));
        mkfs(&*disk, &MkfsOptions { journal_blocks: 4096, ..MkfsOptions::default() }).unwrap();
        let live =
            Filesystem::open(disk.clone(), &OpenOptions { commit_every: None, ..OpenOptions::default() }).unwrap();
        before(&live);
        let source = Copies::of(disk);
        let tree = SnapshotTree::new(live.clone(), source.clone(), options).unwrap();
        World { live, source, tree }
    }

    /// The same after a restart.
    fn again(&self) -> SnapshotTree<Filesystem> {
        SnapshotTree::new(self.live.clone(), self.source.clone(), ShelfOptions::default()).unwrap()
    }

    fn write(&self, path: &str, data: &[u8]) -> Ino {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        let dir = find(&self.tree, dir).unwrap().ino;
        let with = NewAttributes { mode: 0o644, ..NewAttributes::default() };
        let made = self.tree.make(&who(), dir, name.as_bytes(), &Make::File { exclusive: false }, &with).unwrap();
        let ino = made.attributes.ino;
        let cut = SetAttributes { size: Some(0), ..SetAttributes::default() };
        self.tree.setattr(&who(), ino, &cut, true).unwrap();
        self.tree.write(&who(), ino, WriteAt::Offset(0), data).unwrap();
        ino
    }

    fn mkdir(&self, name: &str) -> Ino {
        let with = NewAttributes { mode: 0o755, ..NewAttributes::default() };
        self.tree.make(&who(), ROOT, name.as_bytes(), &Make::Directory, &with).unwrap().attributes.ino
    }
}

fn find(tree: &dyn Vfs, path: &str) -> Result<Attributes> {
    let mut found = tree.getattr(ROOT)?;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        found = tree.lookup(&who(), found.ino, name.as_bytes())?;
        assert_eq!(tree.getattr(found.ino)?, found, "{path}");
    }
    Ok(found)
}

fn read(tree: &dyn Vfs, path: &str) -> Vec<u8> {
    let file = find(tree, path).unwrap();
    tree.read(file.ino, 0, file.size as u32).unwrap().data.to_vec()
}

fn names(tree: &dyn Vfs, path: &str) -> Vec<String> {
    let dir = find(tree, path).unwrap().ino;
    let (mut names, mut cookie) = (Vec::new(), 0);
    loop {
        // Few at a time, so that reading goes on in between.
        let page = tree.readdir(&who(), dir, cookie, 2).unwrap();
        for entry in &page.entries {
            assert!(entry.cookie > cookie.max(2));
            cookie = entry.cookie;
            let found = tree.lookup(&who(), dir, &entry.name).unwrap();
            assert_eq!((found.ino, found.kind), (entry.ino, entry.kind));
            names.push(String::from_utf8(entry.name.clone()).unwrap());
        }
        if page.end {
            names.sort();
            return names;
        }
    }
}

#[test]
fn what_a_snapshot_shows_does_not_change() {
    let world = World::new();
    let big: Vec<u8> = (0..3_000_000_u32).flat_map(|n| n.to_le_bytes()).collect();
    world.mkdir("d");
    world.write("d/big", &big);
    world.write("small", b"before");
    world.write("gone", b"soon");
    for n in 0..500 {
        world.write(&format!("d/{n}"), format!("{n}").as_bytes());
    }
    world.tree.create("one").unwrap();
    let source = world.source.made.lock().unwrap()[0].1.clone();
    let geometry = load_superblock(&*source).unwrap();
    assert!(!is_settled(&*source, &geometry, 0).unwrap(), "the test is to replay a journal");

    world.write("small", b"after, and longer");
    world.write("d/big", b"cut");
    world.tree.unlink(&who(), ROOT, b"gone").unwrap();
    world.write("new", b"new");
    world.tree.create("two").unwrap();
    for n in 0..500 {
        world.tree.unlink(&who(), find(&world.tree, "d").unwrap().ino, format!("{n}").as_bytes()).unwrap();
    }
    for tree in [&world.tree, &world.again()] {
        assert_eq!(names(tree, ""), ["d", "new", "small"]);
        assert_eq!(names(tree, ".snapshots"), ["one", "two"]);
        assert_eq!(names(tree, ".snapshots/one"), ["d", "gone", "small"]);
        assert_eq!(names(tree, ".snapshots/two"), ["d", "new", "small"]);
        assert_eq!(names(tree, ".snapshots/two/d").len(), 501);
        assert_eq!(read(tree, ".snapshots/one/small"), b"before");
        assert_eq!(read(tree, ".snapshots/two/small"), b"after, and longer");
        assert_eq!(read(tree, ".snapshots/one/gone"), b"soon");
        assert!(read(tree, ".snapshots/one/d/big") == big);
        assert_eq!(read(tree, ".snapshots/two/d/big"), b"cut");
        assert_eq!(read(tree, ".snapshots/one/d/77"), b"77");
        // Nothing in a snapshot is the live file, nor that of another snapshot.
        let inos = ["small", ".snapshots/one/small", ".snapshots/two/small"].map(|path| find(tree, path).unwrap().ino);
        assert!(inos[0] != inos[1] && inos[0] != inos[2] && inos[1] != inos[2]);
    }
    assert!(matches!(find(&world.tree, ".snapshots/one/.snapshots"), Err(VfsError::NotFound)));
    assert!(matches!(find(&world.tree, ".snapshots/three"), Err(VfsError::NotFound)));
}

#[test]
fn directories_lead_back_up() {
    let world = World::new();
    world.mkdir("d");
    world.tree.create("one").unwrap();
    let tree = &world.tree;
    let (list, root) = (find(tree, ".snapshots").unwrap(), find(tree, ".snapshots/one").unwrap());
    assert_eq!((list.ino, list.kind, list.links), (LIST, FileKind::Directory, 3));
    let dir = find(tree, ".snapshots/one/d").unwrap();
    for (from, to) in [(dir.ino, root.ino), (root.ino, list.ino), (list.ino, ROOT)] {
        assert_eq!(tree.lookup(&who(), from, b"..").unwrap().ino, to);
        assert_eq!(tree.lookup(&who(), from, b".").unwrap().ino, from);
        assert_eq!(tree.parent(from).unwrap(), to);
    }
    assert_eq!([ROOT, LIST, dir.ino].map(|ino| tree.part(ino)), [Part::Live, Part::SnapshotList, Part::Snapshot]);
    // As strict as the live tree.
    let (other, long) = (Credentials { uid: 7, gid: 7, groups: Vec::new() }, vec![b'x'; 256]);
    assert!(matches!(tree.lookup(&who(), LIST, &long), Err(VfsError::NameTooLong)));
    let set = SetAttributes { mode: Some(0o700), ..SetAttributes::default() };
    tree.setattr(&who(), find(tree, "d").unwrap().ino, &set, false).unwrap();
    tree.create("two").unwrap();
    let closed = find(tree, ".snapshots/two/d").unwrap().ino;
    assert!(matches!(tree.lookup(&other, closed, b"x"), Err(VfsError::Access)));
    assert!(matches!(tree.readdir(&other, closed, 0, 9), Err(VfsError::Access)));
    assert!(matches!(tree.lookup(&other, dir.ino, b"x"), Err(VfsError::NotFound)));
}

#[test]
fn nothing_can_be_changed_in_them_and_nothing_moves_between_them() {
    let world = World::new();
    let live = world.write("f", b"text");
    world.tree.create("one").unwrap();
    world.tree.create("two").unwrap();
    let (tree, me) = (&world.tree, &who());
    let file = find(tree, ".snapshots/one/f").unwrap().ino;
    let [one, two] = ["one", "two"].map(|name| find(tree, &format!(".snapshots/{name}")).unwrap().ino);
    let new = NewAttributes::default();
    let read_only = |what: &str, result: Option<VfsError>| {
        assert!(matches!(result, Some(VfsError::ReadOnly)), "{what}: {result:?}")
    };
    for dir in [one, LIST] {
        for what in [
            Make::Directory,
            Make::File { exclusive: true },
            Make::File { exclusive: false },
            Make::Symlink(b"x".to_vec()),
        ] {
            read_only("make", tree.make(me, dir, b"new", &what, &new).err());
        }
        read_only("unlink", tree.unlink(me, dir, b"f").err());
        read_only("rmdir", tree.rmdir(me, dir, b"one").err());
        read_only(
            "setattr",
            tree.setattr(me, dir, &SetAttributes { mode: Some(0), ..SetAttributes::default() }, false).err(),
        );
        read_only("rename", tree.rename(me, (dir, b"one"), (dir, b"x"), Rename::Replace).err());
    }
    read_only("write", tree.write(me, file, WriteAt::End, b"x").err());
    read_only(
        "truncate",
        tree.setattr(me, file, &SetAttributes { size: Some(0), ..SetAttributes::default() }, true).err(),
    );
    read_only("xattr", tree.setxattr(me, file, b"user.a", b"b", SetXattr::Any).err());
    read_only("xattr", tree.removexattr(me, file, b"user.a").err());
    read_only("fallocate", tree.fallocate(me, file, Fallocate::Allocate, 0, 9).err());
    read_only("link", tree.link(me, file, one, b"g").err());
    read_only("clone", tree.clone_range(me, (live, 0), (file, 0), 0).err());
    // What is there may be opened as if to make it, where that makes nothing.
    let opened = tree.make(me, one, b"f", &Make::File { exclusive: false }, &new).unwrap();
    assert!(!opened.made && opened.attributes.ino == file);
    assert!(matches!(tree.make(me, one, b"f", &Make::File { exclusive: true }, &new), Err(VfsError::Exists)));
    assert!(matches!(tree.make(me, LIST, b"one", &Make::Directory, &new), Err(VfsError::Exists)));

    let cross = |result: Option<VfsError>| assert!(matches!(result, Some(VfsError::CrossDevice)), "{result:?}");
    for (from, to) in [(ROOT, one), (one, ROOT), (one, two), (one, LIST), (LIST, ROOT)] {
        cross(tree.rename(me, (from, b"f"), (to, b"g"), Rename::Replace).err());
    }
    for (ino, dir) in [(live, one), (file, ROOT), (file, two), (live, LIST)] {
        cross(tree.link(me, ino, dir, b"g").err());
    }
    cross(tree.clone_range(me, (file, 0), (live, 0), 0).err());

    // Reading does what it does.
    tree.fsync(file, false).unwrap();
    tree.sync().unwrap();
    assert_eq!(tree.seek(file, 0, Seek::Hole).unwrap(), 4);
    assert!(tree.listxattr(me, file).unwrap().is_empty() && tree.listxattr(me, LIST).unwrap().is_empty());
    assert!(matches!(tree.read(LIST, 0, 1), Err(VfsError::IsDirectory)));
    assert!(tree.access(me, file, Access { read: true, ..Access::default() }).unwrap().read);
    assert_eq!(read(tree, "f"), b"text");
}

#[test]
fn the_name_of_their_directory_is_taken() {
    let world = World::new();
    world.write("f", b"");
    let (tree, me) = (&world.tree, &who());
    let new = NewAttributes::default();
    let name = DIRECTORY.as_bytes();
    for what in [Make::Directory, Make::File { exclusive: false }] {
        assert!(matches!(tree.make(me, ROOT, name, &what, &new), Err(VfsError::Exists)));
    }
    let file = find(tree, "f").unwrap().ino;
    assert!(matches!(tree.link(me, file, ROOT, name), Err(VfsError::Exists)));
    assert!(matches!(tree.rename(me, (ROOT, b"f"), (ROOT, name), Rename::Replace), Err(VfsError::Exists)));
    assert!(matches!(tree.rename(me, (ROOT, name), (ROOT, b"x"), Rename::Replace), Err(VfsError::ReadOnly)));
    assert!(matches!(tree.rmdir(me, ROOT, name), Err(VfsError::ReadOnly)));
    assert!(matches!(tree.unlink(me, ROOT, name), Err(VfsError::ReadOnly)));
    assert_eq!(names(tree, ""), ["f"]);
    // Anywhere else it is a name like any other.
    world.mkdir("d");
    world.write("d/.snapshots", b"mine");
    assert_eq!(read(tree, "d/.snapshots"), b"mine");
}

#[test]
fn one_of_the_users_own_from_before_stays_until_it_is_renamed() {
    let world = World::with(ShelfOptions::default(), |live| {
        live.make(&who(), ROOT, DIRECTORY.as_bytes(), &Make::Directory, &NewAttributes::default()).unwrap();
    });
    let (tree, me, name) = (&world.tree, &who(), DIRECTORY.as_bytes());
    tree.create("one").unwrap();
    assert!(!tree.is_shown());
    world.write(".snapshots/mine", b"mine");
    assert_eq!(names(tree, ""), [DIRECTORY]);
    assert_eq!(names(tree, DIRECTORY), ["mine"]);
    assert!(matches!(tree.rmdir(me, ROOT, name), Err(VfsError::NotEmpty)));
    assert!(!tree.is_shown());
    tree.rename(me, (ROOT, name), (ROOT, b"old"), Rename::Replace).unwrap();
    assert!(tree.is_shown());
    assert_eq!(names(tree, ""), ["old"]);
    assert_eq!(names(tree, DIRECTORY), ["one"]);
    assert_eq!(read(tree, "old/mine"), b"mine");
    assert!(matches!(tree.rename(me, (ROOT, b"old"), (ROOT, name), Rename::NoReplace), Err(VfsError::Exists)));
    assert!(world.again().is_shown());
}

#[test]
fn numbers_stay_over_restarts_and_others_coming_and_going() {
    let world = World::new();
    world.write("f", b"x");
    for name in ["a", "b", "c", "d"] {
        world.tree.create(name).unwrap();
    }
    let handles: Vec<Ino> =
        ["b", "d"].map(|name| find(&world.tree, &format!(".snapshots/{name}/f")).unwrap().ino).to_vec();
    world.tree.delete("a").unwrap();
    world.tree.create("e").unwrap();
    for tree in [&world.tree, &world.again()] {
        // Without looking anything up, as a client of NFS after a restart.
        for ino in &handles {
            assert_eq!(tree.read(*ino, 0, 9).unwrap().data[..], b"x"[..]);
        }
        assert_eq!(find(tree, ".snapshots/d/f").unwrap().ino, handles[1]);
    }
    for never in [Ino(handles[0].0 + 5000), Ino(u64::MAX), Ino(LIST.0 + 1), Ino(7 << 48)] {
        assert!(matches!(world.tree.getattr(never), Err(VfsError::Stale)), "{never:?}");
        assert!(matches!(world.tree.hold(never), Err(VfsError::Stale)), "{never:?}");
    }
}

#[test]
fn a_snapshot_that_goes_while_it_is_used_is_stale() {
    let world = World::new();
    world.write("f", b"x");
    let tree = &world.tree;
    tree.create("one").unwrap();
    tree.create("two").unwrap();
    let before = find(tree, ".snapshots").unwrap();
    let [file, other] = ["one", "two"].map(|name| find(tree, &format!(".snapshots/{name}/f")).unwrap().ino);
    tree.hold(file).unwrap();
    tree.hold(other).unwrap();
    assert_eq!(tree.shelf().open_count(), 2);
    tree.delete("one").unwrap();
    assert_eq!(tree.shelf().open_count(), 1);
    for result in [tree.read(file, 0, 1).err(), tree.getattr(file).err(), tree.hold(file).err()] {
        assert!(matches!(result, Some(VfsError::Stale)), "{result:?}");
    }
    tree.release(file);
    assert!(find(tree, ".snapshots").unwrap().change > before.change);
    assert!(matches!(find(tree, ".snapshots/one"), Err(VfsError::NotFound)));
    assert!(matches!(tree.delete("one"), Err(SnapshotError::Unknown(_))));
    // Its name may be given to another one, whose files have other numbers.
    tree.create("one").unwrap();
    assert_ne!(find(tree, ".snapshots/one/f").unwrap().ino, file);
    assert!(matches!(tree.getattr(file), Err(VfsError::Stale)));
    assert_eq!(tree.read(other, 0, 9).unwrap().data[..], b"x"[..]);
    // By somebody else, and it is open.
    world.source.delete("two").unwrap();
    std::thread::sleep(Duration::from_millis(2100));
    assert!(matches!(find(tree, ".snapshots/two"), Err(VfsError::NotFound)));
    assert!(matches!(tree.read(other, 0, 1), Err(VfsError::Stale)));
    tree.release(other);
}

#[test]
fn few_are_open_and_none_for_long() {
    let options = ShelfOptions { open_max: 2, idle: Duration::ZERO, ..ShelfOptions::default() };
    let world = World::with(options, |_| ());
    world.write("f", b"x");
    let tree = &world.tree;
    for name in ["a", "b", "c", "d"] {
        tree.create(name).unwrap();
    }
    let files = ["a", "b", "c", "d"].map(|name| find(tree, &format!(".snapshots/{name}/f")).unwrap().ino);
    assert!(tree.shelf().open_count() <= 2);
    let owner = LockOwner { client: 1, owner: 1 };
    let lock = FileLock { owner, pid: 1, space: LockSpace::Range, exclusive: false, start: 0, last: 9 };
    tree.hold(files[0]).unwrap();
    assert_eq!(tree.lock(files[0], &lock).unwrap(), None);
    // Held, so not idle; locked and held, so nothing is lost when others need its place.
    assert!(tree.shelf().close_idle());
    assert_eq!(tree.shelf().open_count(), 1);
    for file in &files[1..] {
        assert_eq!(tree.read(*file, 0, 9).unwrap().data[..], b"x"[..]);
    }
    let theirs = FileLock { owner: LockOwner { client: 2, owner: 1 }, exclusive: true, ..lock };
    assert_eq!(tree.lock(files[0], &theirs).unwrap(), Some(lock));
    tree.unlock_all(files[0], owner).unwrap();
    assert_eq!(tree.lock(files[0], &theirs).unwrap(), None);
    tree.release(files[0]);
    assert!(!tree.shelf().close_idle());
    assert_eq!(tree.shelf().open_count(), 0);
    assert_eq!(tree.read(files[0], 0, 9).unwrap().data[..], b"x"[..]);
    tree.shelf().close();
    assert_eq!(tree.shelf().open_count(), 0);
    assert!(tree.read(files[0], 0, 9).is_err());
}

#[test]
fn the_live_tree_asks_nobody_and_stays_when_the_source_is_away() {
    let world = World::new();
    let tree = &world.tree;
    tree.create("one").unwrap();
    let before = world.source.calls.load(SeqCst);
    world.mkdir("d");
    let file = world.write("d/f", b"x");
    tree.rename(&who(), (find(tree, "d").unwrap().ino, b"f"), (ROOT, b"g"), Rename::Replace).unwrap();
    tree.hold(file).unwrap();
    tree.unlink(&who(), ROOT, b"g").unwrap();
    tree.release(file);
    tree.sync().unwrap();
    tree.statfs().unwrap();
    assert_eq!(names(tree, ""), ["d"]);
    assert_eq!(world.source.calls.load(SeqCst), before);

    world.source.away.store(true, SeqCst);
    std::thread::sleep(Duration::from_millis(2100));
    // What was known stays known.
    assert_eq!(tree.readdir(&who(), LIST, 0, 9).unwrap().entries.len(), 1);
    assert!(matches!(find(tree, ".snapshots/other"), Err(VfsError::Io(_))));
    let again = world.again();
    assert!(matches!(find(&again, ".snapshots/one"), Err(VfsError::Io(_))));
    assert_eq!(names(&again, ""), ["d"]);
    world.source.away.store(false, SeqCst);
    std::thread::sleep(Duration::from_millis(250));
    assert_eq!(names(&again, ".snapshots/one"), Vec::<String>::new());
}

#[test]
fn many_threads_may_use_one_while_it_goes() {
    let world = World::new();
    world.write("f", b"x");
    let tree = &world.tree;
    for round in 0..20 {
        tree.create("one").unwrap();
        let file = find(tree, ".snapshots/one/f").unwrap().ino;
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    loop {
                        match tree.read(file, 0, 9) {
                            Ok(read) => assert_eq!(read.data[..], b"x"[..]),
                            Err(VfsError::Stale) => return,
                            Err(error) => panic!("round {round}: {error}"),
                        }
                    }
                });
            }
            tree.delete("one").unwrap();
        });
    }
    assert_eq!(tree.shelf().open_count(), 0);
}
