//! The stores that need no server: directory, memory, and the wrappers around them.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use blockd::store::{
    CountedStore, DirStore, FaultPlan, FaultyStore, MemoryStore, ObjectStore, Prices, PutMode, StoreErrorKind,
};
use bytes::Bytes;
use common::{conformance, pattern};

const BIG: usize = (17 << 20) + 123;

#[tokio::test(flavor = "multi_thread")]
async fn dir_store_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(DirStore::open(&dir.path().join("made/on/the/way")).unwrap());
    conformance::check_all(store, BIG).await;
    assert_eq!(fs::read_dir(dir.path().join("made/on/the/way/.tmp")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_store_conforms() {
    conformance::check_all(Arc::new(MemoryStore::new()), BIG).await;
}

#[tokio::test]
async fn faulty_and_counted_stores_without_faults_conform() {
    let faulty = FaultyStore::new(Arc::new(MemoryStore::new()), FaultPlan::new(1));
    let counted = CountedStore::new(Arc::new(faulty), Prices::FREE);
    conformance::check_all(Arc::new(counted), BIG).await;
}

#[tokio::test]
async fn two_dir_stores_share_a_directory_and_a_reopened_one_keeps_everything() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (DirStore::open(dir.path()).unwrap(), DirStore::open(dir.path()).unwrap());
    let version = a.put("m", Bytes::from_static(b"1"), PutMode::Create).await.unwrap();
    assert_eq!(b.head("m").await.unwrap().version, version);
    b.put("m", Bytes::from_static(b"2"), PutMode::Replace(version.clone())).await.unwrap();
    let stale = a.put("m", Bytes::from_static(b"3"), PutMode::Replace(version)).await;
    assert_eq!(stale.unwrap_err().kind, StoreErrorKind::Precondition);
    drop((a, b));
    let c = DirStore::open(dir.path()).unwrap();
    assert_eq!(c.get("m").await.unwrap().0, Bytes::from_static(b"2"));
}

#[tokio::test]
async fn dir_store_works_when_its_subdirectories_vanish() {
    let dir = tempfile::tempdir().unwrap();
    let store = DirStore::open(dir.path()).unwrap();
    store.put("a/b/c", Bytes::new(), PutMode::Create).await.unwrap();
    fs::remove_dir_all(dir.path().join("a")).unwrap();
    store.put("a/b/c", Bytes::new(), PutMode::Create).await.unwrap();
    assert_eq!(store.list("", None).await.unwrap().len(), 1);
}

#[tokio::test]
async fn dir_store_refuses_keys_that_leave_the_tree_or_clash() {
    let dir = tempfile::tempdir().unwrap();
    let store = DirStore::open(&dir.path().join("bucket")).unwrap();
    for key in ["", "/a", "a//b", "a/", "../a", "a/../b", "./a", ".lock", "a/.tmp", "a\0b", &"x".repeat(256)] {
        let put = store.put(key, Bytes::new(), PutMode::Create).await.unwrap_err();
        assert_eq!(put.kind, StoreErrorKind::Invalid, "{key:?}");
        assert_eq!(store.get(key).await.unwrap_err().kind, StoreErrorKind::Invalid, "{key:?}");
        assert_eq!(store.delete(&[key.to_owned()]).await.unwrap_err().kind, StoreErrorKind::Invalid, "{key:?}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    // A directory cannot hold an object and objects below it; the error must say so rather than ask for patience.
    store.put("a", Bytes::new(), PutMode::Create).await.unwrap();
    let below = store.put("a/b", Bytes::new(), PutMode::Create).await.unwrap_err();
    assert_eq!(below.kind, StoreErrorKind::Invalid, "{below}");
    assert_eq!(store.get("a/b").await.unwrap_err().kind, StoreErrorKind::NotFound);
    store.put("d/e", Bytes::new(), PutMode::Create).await.unwrap();
    assert_eq!(store.get("d").await.unwrap_err().kind, StoreErrorKind::NotFound);
    store.delete(&["d".to_owned(), "a/b".to_owned()]).await.unwrap();
}

fn refusal(path: &Path) -> String {
    format!("{:#}", DirStore::open(path).expect_err("this directory must be refused"))
}

#[test]
fn dir_store_refuses_foreign_and_newer_directories() {
    let dir = tempfile::tempdir().unwrap();
    let foreign = dir.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("thesis.txt"), "years of work").unwrap();
    assert!(refusal(&foreign).contains("thesis.txt"));
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 1, "a refused directory was written to");

    let newer = dir.path().join("newer");
    drop(DirStore::open(&newer).unwrap());
    let marker = newer.join(".blockd-bucket");
    let text = fs::read_to_string(&marker).unwrap();
    fs::write(&marker, text.replace('1', "2")).unwrap();
    assert!(refusal(&newer).contains("format 2"));
    fs::write(&marker, "something else").unwrap();
    assert!(refusal(&newer).contains("not the marker"));

    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(refusal(&file).contains("file"));

    let mounted = dir.path().join("mounted");
    fs::create_dir_all(mounted.join("lost+found")).unwrap();
    fs::write(mounted.join(".blockd-bucket.half"), "").unwrap();
    DirStore::open(&mounted).unwrap();
}

#[test]
fn dir_store_removes_only_old_temporary_files() {
    let dir = tempfile::tempdir().unwrap();
    drop(DirStore::open(dir.path()).unwrap());
    let (old, new) = (dir.path().join(".tmp/old"), dir.path().join(".tmp/new"));
    fs::write(&old, "").unwrap();
    fs::write(&new, "").unwrap();
    let yesterday = SystemTime::now() - Duration::from_secs(24 * 3600);
    fs::File::options().write(true).open(&old).unwrap().set_modified(yesterday).unwrap();
    drop(DirStore::open(dir.path()).unwrap());
    assert_eq!((old.exists(), new.exists()), (false, true));
}

/// A small tmpfs; unmounted at the end.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let done = Command::new("umount").arg("-l").arg(self.0).status();
        assert!(done.is_ok_and(|s| s.success()), "{} stays mounted", self.0.display());
    }
}

#[tokio::test]
async fn a_full_disk_is_no_space_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "none"]).arg(dir.path()).output();
    if !mount.is_ok_and(|o| o.status.success()) {
        eprintln!("skipped: mounting a small filesystem needs root");
        return;
    }
    let _mounted = Mounted(dir.path());
    let store = DirStore::open(dir.path()).unwrap();
    for n in 0..3 {
        let full = store.put(&format!("big{n}"), pattern(n, 8 << 20), PutMode::Create).await.unwrap_err();
        assert_eq!(full.kind, StoreErrorKind::NoSpace, "{full}");
        assert!(full.is_transient());
    }
    assert_eq!(store.list("", None).await.unwrap(), []);
    assert_eq!(fs::read_dir(dir.path().join(".tmp")).unwrap().count(), 0);
    // The failed ones gave their space back.
    store.put("fits", pattern(9, 3 << 20), PutMode::Create).await.unwrap();
}
