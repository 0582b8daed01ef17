use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use proptest::prelude::*;

use super::*;
use crate::tree::testing::{MemoryBlocks, PlainBlocks, damage, golden, time};

const AREA: usize = 3600;

fn target(n: u64) -> Target {
    Target { ino: Ino(n), kind: (n % 7) as u8 + 1 }
}

fn name(n: u64) -> Vec<u8> {
    format!("file-{n:07}.data").into_bytes()
}

fn empty(bytes: usize, weak: bool) -> Vec<u8> {
    let mut area = vec![0; bytes];
    init(&mut area, 42);
    if weak {
        open_mut(&mut area).unwrap().0.hash = area::HASH_WEAK;
    }
    area
}

#[derive(Default)]
struct Seen {
    blocks: BTreeSet<BlockAddress>,
    entries: Vec<(u64, Vec<u8>, Target)>,
    damage: Vec<(Option<BlockAddress>, String)>,
}

impl Visit for Seen {
    fn block(&mut self, at: BlockAddress) -> bool {
        self.blocks.insert(at)
    }
    fn entry(&mut self, entry: super::Entry<'_>) {
        self.entries.push((entry.key, entry.name.to_vec(), entry.target));
    }
    fn damage(&mut self, at: Option<BlockAddress>, what: String) {
        self.damage.push((at, what));
    }
}

fn all(blocks: &MemoryBlocks, area: &[u8]) -> Vec<(u64, Vec<u8>, Target)> {
    let mut entries = Vec::new();
    let end = list(blocks, area, 0, |e| {
        entries.push((e.key, e.name.to_vec(), e.target));
        ControlFlow::Continue(())
    });
    assert!(end.unwrap());
    entries
}

/// The directory is sound, and each block belongs to it.
fn verify(blocks: &MemoryBlocks, area: &[u8]) -> Seen {
    let mut seen = Seen::default();
    walk(blocks, area, &mut seen);
    assert_eq!(seen.damage, []);
    assert_eq!(seen.entries, all(blocks, area));
    assert_eq!(seen.entries.len() as u64, count(area).unwrap());
    assert_eq!(seen.blocks, blocks.addresses().into_iter().collect());
    assert_eq!(seen.blocks.len() as u64, block_count(area).unwrap());
    seen
}

#[derive(Clone, Debug)]
enum Change {
    Insert(u16),
    Remove(u16),
    Replace(u16),
    Refit(usize),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        12 => (0..400u16).prop_map(Change::Insert),
        8 => (0..400u16).prop_map(Change::Remove),
        2 => (0..400u16).prop_map(Change::Replace),
        1 => (AREA_MIN..4000).prop_map(Change::Refit),
    ]
}

/// A name that differs for each `n`, with a length that only depends on it.
fn padded(n: u16) -> Vec<u8> {
    let mut name = format!("{n}").into_bytes();
    name.resize(name.len() + usize::from(n) * 131 % 250, b'-');
    name
}

proptest! {
    #[test]
    fn does_what_a_map_does(
        changes in prop::collection::vec(change(), 1..800),
        weak in any::<bool>(),
        bytes in AREA_MIN..4000,
    ) {
        let mut blocks = MemoryBlocks::new();
        let mut area = empty(bytes, weak);
        let mut model: BTreeMap<Vec<u8>, Target> = BTreeMap::new();
        let mut keys: HashMap<Vec<u8>, u64> = HashMap::new();
        for (i, change) in changes.into_iter().enumerate() {
            let new = target(i as u64);
            match change {
                Change::Insert(n) => {
                    let name = padded(n);
                    let done = insert(&mut blocks, &mut area, &name, new);
                    match model.entry(name) {
                        Entry::Occupied(_) => prop_assert!(matches!(done, Err(VfsError::Exists))),
                        Entry::Vacant(entry) => {
                            keys.insert(entry.key().clone(), done.unwrap());
                            entry.insert(new);
                        }
                    }
                }
                Change::Remove(n) => {
                    let done = remove(&mut blocks, &mut area, &padded(n));
                    match model.remove(&padded(n)) {
                        Some(old) => prop_assert_eq!(done.unwrap(), old),
                        None => prop_assert!(matches!(done, Err(VfsError::NotFound))),
                    }
                }
                Change::Replace(n) => {
                    let done = replace(&mut blocks, &mut area, &padded(n), new);
                    match model.get_mut(&padded(n)) {
                        Some(old) => prop_assert_eq!(done.unwrap(), std::mem::replace(old, new)),
                        None => prop_assert!(matches!(done, Err(VfsError::NotFound))),
                    }
                }
                Change::Refit(bytes) => {
                    let mut to = vec![0xa5; bytes];
                    refit(&mut blocks, &area, &mut to).unwrap();
                    area = to;
                }
            }
        }
        let seen = verify(&blocks, &area);
        prop_assert_eq!(seen.entries.len(), model.len());
        for (key, name, target) in seen.entries {
            prop_assert_eq!(model.get(&name), Some(&target));
            prop_assert_eq!(keys[&name], key);
            prop_assert!((3..1 << 63).contains(&key));
        }
        for n in 0..400 {
            prop_assert_eq!(lookup(&blocks, &area, &padded(n)).unwrap(), model.get(&padded(n)).copied());
        }
        for name in model.keys() {
            remove(&mut blocks, &mut area, name).unwrap();
        }
        prop_assert_eq!(blocks.len(), 0);
        prop_assert!(is_empty(&area).unwrap());
    }

    #[test]
    fn damage_is_an_error(
        entries in 0..600u64,
        damage in damage(),
    ) {
        let mut blocks = MemoryBlocks::new();
        let mut area = empty(600, false);
        for n in 0..entries {
            insert(&mut blocks, &mut area, &name(n), target(n)).unwrap();
        }
        damage.strike(&mut blocks, &mut area);
        survive(&mut blocks, &mut area, entries);
    }

    #[test]
    fn random_bytes_are_an_error(
        mut area in prop::collection::vec(any::<u8>(), 0..700),
        leaf in any::<bool>(),
        header in any::<bool>(),
    ) {
        // As far as possible like an area, so that more is looked at.
        if header && area.len() >= 40 {
            area[..4].copy_from_slice(&[1, 1, 0, 0]);
            area[32] = 1;
            area[33] = u8::from(!leaf);
            area[35] = 0;
            area[37] &= 1;
            area[39] = 0;
        }
        survive(&mut MemoryBlocks::new(), &mut area, 20);
    }
}

/// Nothing panics, and errors are of damage.
fn survive(blocks: &mut MemoryBlocks, area: &mut [u8], entries: u64) {
    let sound = |result: Result<()>| match result {
        Ok(()) | Err(VfsError::Exists | VfsError::NotFound | VfsError::NoSpace) => (),
        Err(VfsError::Io(what)) => assert!(what.contains("block") || what.contains("inode"), "{what}"),
        Err(other) => panic!("{other:?}"),
    };
    walk(blocks, area, &mut Seen::default());
    sound(list(blocks, area, 0, |_| ControlFlow::Continue(())).map(drop));
    sound(refit(blocks, area, &mut vec![0; AREA_MIN]));
    for n in (0..entries).step_by(7) {
        sound(lookup(blocks, area, &name(n)).map(drop));
        sound(replace(blocks, area, &name(n), target(n)).map(drop));
        sound(insert(blocks, area, &name(n + 1_000_000), target(n)).map(drop));
        sound(remove(blocks, area, &name(n)).map(drop));
    }
    sound(count(area).map(drop));
    sound(block_count(area).map(drop));
}

#[test]
fn golden_directories_are_written_the_same() {
    for (file, entries) in [("directory-v1-inline.bin", 12), ("directory-v1-tree.bin", 150)] {
        let (mut blocks, mut area) = (MemoryBlocks::new(), empty(AREA_MIN, false));
        for n in 0..entries {
            insert(&mut blocks, &mut area, &name(n), target(n)).unwrap();
        }
        for n in (0..entries).step_by(5) {
            remove(&mut blocks, &mut area, &name(n)).unwrap();
        }
        golden(file, &area, &blocks);
    }
}

#[test]
fn names_have_a_length() {
    let mut blocks = MemoryBlocks::new();
    let mut area = empty(AREA, false);
    assert!(matches!(insert(&mut blocks, &mut area, b"", target(1)), Err(VfsError::Invalid)));
    assert!(matches!(insert(&mut blocks, &mut area, &[b'a'; 256], target(1)), Err(VfsError::NameTooLong)));
    insert(&mut blocks, &mut area, &[b'a'; 255], target(1)).unwrap();
    assert_eq!(lookup(&blocks, &area, &[b'a'; 255]).unwrap(), Some(target(1)));
}

#[test]
fn unknown_versions_are_refused() {
    let blocks = MemoryBlocks::new();
    for (at, byte) in [(0, 2), (1, 2), (2, 1), (32, 2)] {
        let mut area = empty(AREA, false);
        area[at] = byte;
        let error = lookup(&blocks, &area, b"a").unwrap_err().to_string();
        assert!(error.contains("is not known") && error.contains("inode"), "{error}");
    }
}

#[test]
fn the_damaged_block_is_named() {
    let mut blocks = MemoryBlocks::new();
    let mut area = empty(AREA, false);
    for n in 0..1000 {
        insert(&mut blocks, &mut area, &name(n), target(n)).unwrap();
    }
    let at = blocks.addresses()[3];
    blocks.overwrite(at, |body| body[4..6].copy_from_slice(&5u16.to_le_bytes()));
    let mut seen = Seen::default();
    walk(&blocks, &area, &mut seen);
    assert_eq!(seen.damage.len(), 1);
    assert_eq!(seen.damage[0].0, Some(at));
    assert!(seen.entries.len() > 800);
    let errors: Vec<_> = (0..1000).filter_map(|n| lookup(&blocks, &area, &name(n)).err()).collect();
    assert_eq!(errors.len(), 1000 - seen.entries.len());
    assert!(errors[0].to_string().contains(&format!("block {at}, a node of a directory, is damaged")));
}

#[test]
fn cookies_hold_while_the_directory_changes() {
    for weak in [false, true] {
        let mut blocks = MemoryBlocks::new();
        let mut area = empty(AREA, weak);
        let stay = if weak { 200 } else { 2000 };
        for n in 0..stay {
            insert(&mut blocks, &mut area, &name(n), target(n)).unwrap();
        }
        let mut seen = HashMap::new();
        let (mut after, mut other) = (0, 10_000);
        loop {
            let mut page = 0;
            let end = list(&blocks, &area, after, |entry| {
                if entry.target.ino.0 < stay {
                    assert!(seen.insert(entry.target.ino.0, entry.key).is_none(), "seen twice");
                }
                assert!(entry.key > after);
                after = entry.key;
                page += 1;
                if page == 7 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            if end.unwrap() {
                break;
            }
            // Others come and go meanwhile: first more of them, then fewer.
            for _ in 0..5 {
                insert(&mut blocks, &mut area, &name(other), target(other)).unwrap();
                other += 1;
                if other % 3 == 0 {
                    remove(&mut blocks, &mut area, &name(other - 1)).unwrap();
                }
            }
        }
        assert_eq!(seen.len() as u64, stay);
        verify(&blocks, &area);
    }
}

#[test]
fn an_emptied_directory_is_small_again() {
    let mut blocks = MemoryBlocks::new();
    let mut area = empty(AREA, false);
    let new = area.clone();
    for n in 0..50_000 {
        insert(&mut blocks, &mut area, &name(n), target(n)).unwrap();
    }
    let full = blocks.len();
    for n in 0..49_000 {
        remove(&mut blocks, &mut area, &name(n)).unwrap();
    }
    // An entry takes 37 bytes: thirds of blocks at worst.
    assert!(blocks.len() < 30, "{} blocks of {full} for 1000 entries", blocks.len());
    verify(&blocks, &area);
    for n in 49_000..49_960 {
        remove(&mut blocks, &mut area, &name(n)).unwrap();
    }
    assert_eq!(blocks.len(), 0, "40 entries fit into the inode");
    for n in 49_960..50_000 {
        remove(&mut blocks, &mut area, &name(n)).unwrap();
    }
    assert_eq!(blocks.len(), 0);
    // Where the records begin may differ.
    assert_eq!(area[..36], new[..36]);
}

/// What an operation costs in blocks, on average: those it touches, the inode's too, and those it changes.
fn cost(blocks: &mut MemoryBlocks, times: u64, mut operation: impl FnMut(&mut MemoryBlocks, u64)) -> (f64, f64) {
    let (mut touched, mut changed) = (0, 0);
    for n in 0..times {
        blocks.touched();
        operation(blocks, n);
        let (t, c) = blocks.touched();
        touched += t + 1;
        changed += c + 1;
    }
    (touched as f64 / times as f64, changed as f64 / times as f64)
}

/// What an insertion, a lookup and a removal cost in a directory with as many entries, and in a larger one.
fn growth(blocks: &mut MemoryBlocks, small: u64, large: u64, name: impl Fn(u64) -> Vec<u8>) {
    let mut area = empty(AREA, false);
    let mut costs = Vec::new();
    for size in [small, large] {
        for n in count(&area).unwrap()..size {
            insert(blocks, &mut area, &name(n), target(n)).unwrap();
        }
        let bytes = size as usize * (20 + name(0).len());
        println!("{size}: {} blocks, filled to {}%", blocks.len(), bytes * 100 / blocks.len() / 4096);
        let inserted = cost(blocks, 1000, |blocks, n| {
            insert(blocks, &mut area, &name(size + n), target(n)).unwrap();
        });
        let found = cost(blocks, 1000, |blocks, n| {
            assert!(lookup(blocks, &area, &name(size + n)).unwrap().is_some());
        });
        let removed = cost(blocks, 1000, |blocks, n| {
            remove(blocks, &mut area, &name(size + n)).unwrap();
        });
        costs.push([inserted, found, removed]);
    }
    println!("{costs:?}");
    for (small, large) in costs[0].iter().zip(&costs[1]) {
        assert!(large.0 <= 2.0 * small.0 && large.1 <= 2.0 * small.1, "{costs:?}");
    }
    verify(blocks, &area);
}

#[test]
fn a_million_entries_cost_at_most_twice_of_a_thousand() {
    growth(&mut MemoryBlocks::new(), 1_000, 1_000_000, name);
}

#[test]
fn the_longest_names_cost_no_more_levels() {
    growth(&mut MemoryBlocks::new(), 1_000, 100_000, |n| format!("{n:0255}").into_bytes());
}

/// Nanoseconds per operation, without a cache or journal below.
#[test]
#[ignore = "measures; run it alone, with --nocapture"]
fn speed() {
    let names: Vec<_> = (0..1_001_000).map(name).collect();
    for size in [50, 1000, 100_000, 1_000_000] {
        let mut blocks = PlainBlocks::default();
        let mut area = empty(AREA, false);
        println!("-- {size} entries");
        time("fill", size, |n| {
            insert(&mut blocks, &mut area, &names[n as usize], target(n)).unwrap();
        });
        println!("{} blocks", blocks.len());
        let pick = |n: u64| &names[(n * 7919 % size) as usize];
        time("lookup", 1_000_000, |n| assert!(lookup(&blocks, &area, pick(n)).unwrap().is_some()));
        let miss = |n: u64| &names[(size + n % 1000) as usize];
        time("lookup of nothing", 1_000_000, |n| assert!(lookup(&blocks, &area, miss(n)).unwrap().is_none()));
        time("insert and remove", 200_000, |n| {
            insert(&mut blocks, &mut area, miss(n), target(n)).unwrap();
            remove(&mut blocks, &mut area, miss(n)).unwrap();
        });
        let mut seen = 0u64;
        time("list, an entry", size, |n| {
            if n == 0 {
                list(&blocks, &area, 0, |entry| {
                    seen += entry.target.ino.0;
                    ControlFlow::Continue(())
                })
                .unwrap();
            }
        });
        time("empty", size, |n| {
            remove(&mut blocks, &mut area, &names[n as usize]).unwrap();
        });
        assert_eq!(blocks.len(), 0);
    }
}
