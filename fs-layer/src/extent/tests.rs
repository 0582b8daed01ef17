use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::tree::testing::{MemoryBlocks, PlainBlocks, damage, golden, time};

fn empty(bytes: usize) -> Vec<u8> {
    let mut area = vec![0; bytes];
    init(&mut area);
    area
}

#[derive(Default)]
struct Seen {
    blocks: BTreeSet<BlockAddress>,
    extents: Vec<Extent>,
    damage: Vec<(Option<BlockAddress>, String)>,
}

impl Visit for Seen {
    fn block(&mut self, at: BlockAddress) -> bool {
        self.blocks.insert(at)
    }
    fn extent(&mut self, extent: Extent) {
        self.extents.push(extent);
    }
    fn damage(&mut self, at: Option<BlockAddress>, what: String) {
        self.damage.push((at, what));
    }
}

/// The map is sound and as short as it can be, and each block belongs to it.
fn verify(blocks: &MemoryBlocks, area: &[u8]) -> Vec<Extent> {
    let mut seen = Seen::default();
    walk(blocks, area, &mut seen);
    assert_eq!(seen.damage, []);
    for pair in seen.extents.windows(2) {
        assert_eq!(map::join(&pair[0], &pair[1]), None, "they are not joined");
    }
    let mut listed = Vec::new();
    list(blocks, area, 0, |e| {
        listed.push(e);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(seen.extents, listed);
    assert_eq!(seen.blocks, blocks.addresses().into_iter().collect());
    listed
}

/// Addresses, counted up.
struct Disk {
    next: BlockAddress,
    asked: Vec<u64>,
}

impl Disk {
    fn new() -> Disk {
        Disk { next: 1 << 40, asked: Vec::new() }
    }

    fn ask(&mut self, count: u64) -> Result<BlockAddress> {
        // A gap, so that nothing is joined by luck.
        let at = self.next;
        self.next += count + 1;
        self.asked.push(count);
        Ok(at)
    }
}

#[derive(Clone, Debug)]
enum Change {
    Allocate(u64, u32, bool),
    Insert(u64, u32, bool),
    Remove(u64, u64, usize),
    MarkWritten(u64, u64),
    MarkUnwritten(u64, u64),
    Refit(usize),
}

fn change(blocks: u64) -> impl Strategy<Value = Change> {
    let length = || prop_oneof![4 => 1..4u64, 1 => 1..blocks / 4];
    prop_oneof![
        20 => (0..blocks, length(), any::<bool>()).prop_map(|(b, n, u)| Change::Allocate(b, n as u32, u)),
        4 => (0..blocks, length(), any::<bool>()).prop_map(|(b, n, u)| Change::Insert(b, n as u32, u)),
        8 => (0..blocks, length(), 1..9usize).prop_map(|(b, n, m)| Change::Remove(b, b + n, m)),
        4 => (0..blocks, length()).prop_map(|(b, n)| Change::MarkWritten(b, b + n)),
        2 => (0..blocks, length()).prop_map(|(b, n)| Change::MarkUnwritten(b, b + n)),
        1 => (AREA_MIN..4000).prop_map(Change::Refit),
    ]
}

/// Block by block: address, unwritten.
type Model = BTreeMap<u64, (BlockAddress, bool)>;

proptest! {
    #[test]
    fn does_what_a_map_does(
        changes in prop::collection::vec(change(3000), 1..700),
        bytes in AREA_MIN..4000,
        size_blocks in prop_oneof![Just(1u64), Just(3000), Just(1 << 30)],
    ) {
        let mut blocks = MemoryBlocks::new();
        let mut area = empty(bytes);
        let mut disk = Disk::new();
        let mut model = Model::new();
        let mut used = BTreeSet::new();
        for change in changes {
            match change {
                Change::Allocate(block, wanted, unwritten) => {
                    let done = allocate(&mut blocks, &mut area, block, wanted, unwritten, size_blocks, |_, n| disk.ask(n));
                    if model.contains_key(&block) {
                        prop_assert!(matches!(done, Err(VfsError::Invalid)));
                        continue;
                    }
                    let done = done.unwrap();
                    prop_assert!(done.start == block && (1..=wanted).contains(&done.count));
                    for b in block..done.end() {
                        let address = done.address_of(b);
                        prop_assert!(used.insert(address), "address {} is used again", address);
                        prop_assert!(model.insert(b, (address, unwritten)).is_none());
                    }
                }
                Change::Insert(start, count, unwritten) => {
                    let address = disk.ask(count.into()).unwrap();
                    let new = Extent { start, address, count, unwritten, before: 0, after: 0 };
                    let freed = insert(&mut blocks, &mut area, new).unwrap();
                    let mut gone = Vec::new();
                    for b in start..new.end() {
                        used.insert(new.address_of(b));
                        gone.extend(model.insert(b, (new.address_of(b), unwritten)).map(|old| old.0));
                    }
                    prop_assert_eq!(expand(&freed), gone);
                }
                Change::Remove(from, to, max) => {
                    let mut cursor = from;
                    loop {
                        let done = remove(&mut blocks, &mut area, cursor, to, max).unwrap();
                        let end = done.more.unwrap_or(to);
                        let gone: Vec<_> = model.range(cursor..end).map(|(b, old)| (*b, old.0)).collect();
                        prop_assert_eq!(expand(&done.freed), gone.iter().map(|g| g.1).collect::<Vec<_>>());
                        for (block, _) in gone {
                            model.remove(&block);
                        }
                        let Some(more) = done.more else { break };
                        prop_assert!(more > cursor && more < to);
                        cursor = more;
                    }
                }
                Change::MarkWritten(from, to) => {
                    mark_written(&mut blocks, &mut area, from, to).unwrap();
                    model.range_mut(from..to).for_each(|(_, m)| m.1 = false);
                }
                Change::MarkUnwritten(from, to) => {
                    mark_unwritten(&mut blocks, &mut area, from, to).unwrap();
                    model.range_mut(from..to).for_each(|(_, m)| m.1 = true);
                }
                Change::Refit(bytes) => {
                    let mut to = vec![0xa5; bytes];
                    refit(&mut blocks, &area, &mut to).unwrap();
                    area = to;
                }
            }
        }
        let extents = verify(&blocks, &area);
        let mapped: Model = extents
            .iter()
            .flat_map(|e| (e.start..e.end()).map(|b| (b, (e.address_of(b), e.unwritten))))
            .collect();
        prop_assert_eq!(&mapped, &model);
        let counts = counts(&area).unwrap();
        prop_assert_eq!(counts.mapped, model.len() as u64);
        prop_assert_eq!(counts.unwritten, model.values().filter(|m| m.1).count() as u64);
        for b in (0..3300).step_by(13) {
            match get(&blocks, &area, b).unwrap() {
                Mapping::Extent(e) => prop_assert_eq!(model.get(&b), Some(&(e.address_of(b), e.unwritten))),
                Mapping::Hole { end } => {
                    let next = model.range(b..).next().map_or(FILE_BLOCKS_MAX, |(b, _)| *b);
                    prop_assert_eq!(end, next);
                }
            }
            let data = model.range(b..).find(|(_, m)| !m.1).map(|(b, _)| *b);
            prop_assert_eq!(seek(&blocks, &area, b, Seek::Data).unwrap(), data);
            let hole = (b..).find(|b| model.get(b).is_none_or(|m| m.1));
            prop_assert_eq!(seek(&blocks, &area, b, Seek::Hole).unwrap(), hole);
            let mut first = None;
            list(&blocks, &area, b, |e| {
                first = Some(e);
                ControlFlow::Break(())
            })
            .unwrap();
            prop_assert_eq!(first, extents.iter().find(|e| e.end() > b).copied());
        }
        // No two blocks, mapped or in reserve, have the same address.
        let mut claims: Vec<_> = extents
            .iter()
            .map(|e| (e.address - u64::from(e.before), e.address + u64::from(e.count) + u64::from(e.after)))
            .collect();
        claims.sort_unstable();
        prop_assert!(claims.windows(2).all(|pair| pair[0].1 <= pair[1].0));
        remove(&mut blocks, &mut area, 0, u64::MAX, usize::MAX).unwrap();
        prop_assert_eq!(blocks.len(), 0);
        prop_assert_eq!(super::counts(&area).unwrap(), Counts::default());
    }

    #[test]
    fn damage_is_an_error(
        extents in 1..700u64,
        damage in damage(),
    ) {
        let mut blocks = MemoryBlocks::new();
        let mut area = empty(600);
        scatter(&mut blocks, &mut area, extents);
        damage.strike(&mut blocks, &mut area);
        survive(&mut blocks, &mut area, extents);
    }

    #[test]
    fn random_bytes_are_an_error(
        mut area in prop::collection::vec(any::<u8>(), 0..700),
        leaf in any::<bool>(),
        header in any::<bool>(),
    ) {
        // As far as possible like an area, so that more is looked at.
        if header && area.len() >= 44 {
            area[..8].copy_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
            area[40] = 1;
            area[41] = u8::from(!leaf);
            area[43] = 0;
        }
        survive(&mut MemoryBlocks::new(), &mut area, 10);
    }
}

fn expand(ranges: &[DiskRange]) -> Vec<BlockAddress> {
    ranges.iter().flat_map(|r| r.address..r.address + r.count).collect()
}

/// Extents of one block in every third one.
fn scatter(blocks: &mut MemoryBlocks, area: &mut [u8], extents: u64) {
    for n in 0..extents {
        let new = Extent {
            start: n * 7919 % extents * 3,
            address: 1_000_000 + n * 2,
            count: 1,
            unwritten: n % 2 == 0,
            before: 1,
            after: 0,
        };
        insert(blocks, area, Extent { before: u32::from(new.start > 0), ..new }).unwrap();
    }
}

/// Nothing panics, and errors are of damage.
fn survive(blocks: &mut MemoryBlocks, area: &mut [u8], extents: u64) {
    let sound = |result: Result<()>| match result {
        Ok(()) | Err(VfsError::Invalid | VfsError::NoSpace) => (),
        Err(VfsError::Io(what)) => assert!(what.contains("block") || what.contains("inode"), "{what}"),
        Err(other) => panic!("{other:?}"),
    };
    walk(blocks, area, &mut Seen::default());
    sound(list(blocks, area, 0, |_| ControlFlow::Continue(())).map(drop));
    sound(refit(blocks, area, &mut vec![0; AREA_MIN]));
    sound(counts(area).map(drop));
    let mut disk = Disk::new();
    for b in (0..extents * 3).step_by(17).chain([FILE_BLOCKS_MAX - 1, u64::MAX]) {
        sound(get(blocks, area, b).map(drop));
        sound(seek(blocks, area, b, Seek::Data).map(drop));
        sound(seek(blocks, area, b, Seek::Hole).map(drop));
        sound(mark_written(blocks, area, b, b.saturating_add(5)));
        sound(mark_unwritten(blocks, area, b.saturating_add(1), b.saturating_add(3)));
        if b < FILE_BLOCKS_MAX {
            sound(allocate(blocks, area, b, 9, true, 1, |_, n| disk.ask(n)).map(drop));
        }
        sound(remove(blocks, area, b, b.saturating_add(2), 3).map(drop));
    }
    sound(remove(blocks, area, 0, u64::MAX, 1000).map(drop));
}

#[test]
fn golden_maps_are_written_the_same() {
    for (file, extents) in [("extents-v1-inline.bin", 10), ("extents-v1-tree.bin", 200)] {
        let (mut blocks, mut area) = (MemoryBlocks::new(), empty(AREA_MIN));
        scatter(&mut blocks, &mut area, extents);
        allocate(&mut blocks, &mut area, 10_000, 3, false, 0, |_, _| Ok(1 << 40)).unwrap();
        golden(file, &area, &blocks);
    }
}

#[test]
fn extents_made_in_order_fill_their_blocks() {
    let (mut blocks, mut area) = (MemoryBlocks::new(), empty(3600));
    for n in 0..100_000 {
        let new = Extent { start: n * 2, address: 1 + n * 3, count: 1, unwritten: false, before: 0, after: 0 };
        insert(&mut blocks, &mut area, new).unwrap();
    }
    let full = 100_000 / 125;
    assert!(blocks.len() < full * 6 / 5, "{} blocks, {full} full ones would do", blocks.len());
    verify(&blocks, &area);
}

#[test]
fn unknown_versions_are_refused() {
    for (at, byte) in [(0, 2), (1, 1), (40, 2)] {
        let mut area = empty(3600);
        area[at] = byte;
        let error = get(&MemoryBlocks::new(), &area, 0).unwrap_err().to_string();
        assert!(error.contains("is not known") && error.contains("inode"), "{error}");
    }
}

#[test]
fn a_file_has_a_largest_block() {
    let mut blocks = MemoryBlocks::new();
    let mut area = empty(3600);
    let mut disk = Disk::new();
    let last = FILE_BLOCKS_MAX - 1;
    let done = allocate(&mut blocks, &mut area, last, 10, false, 1, |_, n| disk.ask(n)).unwrap();
    assert_eq!((done.start, done.count), (last, 1));
    let beyond = allocate(&mut blocks, &mut area, last + 1, 1, false, 1, |_, n| disk.ask(n));
    assert!(matches!(beyond, Err(VfsError::TooLarge)));
    verify(&blocks, &area);
}

/// Writes `wanted` blocks at a time from the beginning to the end.
fn write_all(area: &mut [u8], disk: &mut Disk, size: u64, wanted: u64) -> Vec<Extent> {
    let mut blocks = MemoryBlocks::new();
    let mut at = 0;
    while at < size {
        let count = wanted.min(size - at) as u32;
        at = allocate(&mut blocks, area, at, count, false, at, |_, n| disk.ask(n)).unwrap().end();
    }
    verify(&blocks, area)
}

#[test]
fn the_largest_file_has_a_handful_of_extents() {
    // 16 TiB, in steps of 16 MiB and in steps of 1 GiB.
    for wanted in [1 << 12, 1 << 18] {
        let mut disk = Disk::new();
        let extents = write_all(&mut empty(3600), &mut disk, FILE_BLOCKS_MAX, wanted);
        println!("{} extents", extents.len());
        assert!(extents.len() <= 15, "{} extents", extents.len());
        // What it does not need in the end was not asked for.
        assert_eq!(disk.asked.iter().sum::<u64>(), FILE_BLOCKS_MAX);
    }
}

#[test]
fn a_growing_file_reserves_at_most_three_times_what_it_has() {
    for size in [1, 3, 20, 300, 5000, 70_000] {
        let mut disk = Disk::new();
        let extents = write_all(&mut empty(3600), &mut disk, size, 1);
        assert!(extents.len() <= 9);
        assert!(disk.asked.iter().sum::<u64>() <= (4 * size).max(window::WINDOW_MIN));
    }
}

#[test]
fn a_file_filled_at_random_ends_with_few_extents() {
    for bits in [6, 12, 16, 20] {
        // With the size known before, and with one that grows with the furthest block written.
        for known in [true, false] {
            let size = 1u64 << bits;
            let (mut blocks, mut area, mut disk) = (MemoryBlocks::new(), empty(3600), Disk::new());
            let (mut most, mut end) = (0, 0);
            for n in 0..size {
                // An odd multiplier visits each block once.
                let block = (n * 0x9e37_79b1) % size;
                let block = block ^ (block >> (bits / 2));
                end = end.max(block + 1);
                let hint = if known { size } else { end };
                let done = allocate(&mut blocks, &mut area, block, 1, false, hint, |_, n| disk.ask(n));
                done.unwrap();
                most = most.max(counts(&area).unwrap().extents);
            }
            let extents = verify(&blocks, &area).len();
            println!("{size} blocks at random: {extents} extents, {most} on the way, {} asked", disk.asked.len());
            assert_eq!(extents, disk.asked.len());
            assert!(extents <= 110, "{extents} extents for {size} blocks");
            assert_eq!(counts(&area).unwrap().mapped, size);
        }
    }
}

#[test]
fn blocks_far_apart_reserve_little() {
    let (mut blocks, mut area, mut disk) = (MemoryBlocks::new(), empty(3600), Disk::new());
    let mut far = Vec::new();
    for n in 0..1000u64 {
        let block = n * n * 4000;
        allocate(&mut blocks, &mut area, block, 1, false, block + 1, |_, n| disk.ask(n)).unwrap();
        far.push(disk.asked.iter().sum::<u64>() / (n + 1));
    }
    println!("{:?} blocks in reserve for each written", &far[995..]);
    assert!(far.iter().all(|each| *each <= 1024 * 1024));
    verify(&blocks, &area);
}

#[test]
fn a_huge_map_is_removed_in_steps() {
    let (mut blocks, mut area) = (MemoryBlocks::new(), empty(3600));
    scatter(&mut blocks, &mut area, 20_011);
    assert_eq!(verify(&blocks, &area).len(), 20_011);
    let (mut from, mut freed, mut steps) = (0, 0, 0);
    loop {
        blocks.touched();
        let done = remove(&mut blocks, &mut area, from, u64::MAX, 100).unwrap();
        let (touched, _) = blocks.touched();
        assert!(touched < 20, "{touched} blocks touched");
        freed += done.freed.iter().map(|r| r.count).sum::<u64>();
        steps += 1;
        match done.more {
            Some(more) => from = more,
            None => break,
        }
    }
    assert_eq!((freed, steps), (20_011, 201));
    assert_eq!(blocks.len(), 0);
}

#[test]
fn writing_into_a_kept_range_leaves_one_extent() {
    let (mut blocks, mut area, mut disk) = (MemoryBlocks::new(), empty(3600), Disk::new());
    let kept = allocate(&mut blocks, &mut area, 0, 1000, true, 1000, |_, n| disk.ask(n)).unwrap();
    assert_eq!(kept.count, 1000);
    for n in 0..1000 {
        let block = n * 7 % 1000;
        mark_written(&mut blocks, &mut area, block, block + 1).unwrap();
    }
    let extents = verify(&blocks, &area);
    assert_eq!(extents.len(), 1);
    assert!(!extents[0].unwritten);
    assert_eq!(counts(&area).unwrap().unwritten, 0);
}

/// Nanoseconds per operation, without a cache or journal below.
#[test]
#[ignore = "measures; run it alone, with --nocapture"]
fn speed() {
    for size in [10, 100, 10_000, 40_000u64] {
        let (mut blocks, mut area, mut disk) = (PlainBlocks::default(), empty(3600), Disk::new());
        println!("-- {size} extents");
        let place = |n: u64| n * 7919 % size * 100_000;
        let new = |n: u64| Extent {
            start: place(n) % FILE_BLOCKS_MAX,
            address: 1 + n * 9,
            count: 4,
            unwritten: true,
            before: 0,
            after: 0,
        };
        time("fill", size, |n| drop(insert(&mut blocks, &mut area, new(n)).unwrap()));
        println!("{} blocks", blocks.len());
        time("get", size, |n| {
            assert!(matches!(get(&blocks, &area, place(n) % FILE_BLOCKS_MAX + 2), Ok(Mapping::Extent(_))))
        });
        time("mark written", size, |n| {
            mark_written(&mut blocks, &mut area, new(n).start + 1, new(n).start + 2).unwrap()
        });
        time("remove", size, |n| drop(remove(&mut blocks, &mut area, new(n).start, new(n).end(), 8).unwrap()));
        assert_eq!(blocks.len(), 0);
        time("append a block", 1_000_000, |n| {
            allocate(&mut blocks, &mut area, n, 1, false, n + 1, |_, count| disk.ask(count)).unwrap();
        });
    }
}
