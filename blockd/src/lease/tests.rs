//! The lease's bytes, its owner's clockwork, and what others conclude from it.

use proptest::prelude::*;

use super::*;
use crate::types::VolumeId;

const TERMS: Terms = Terms { duration_ms: 10_000 };
const START: Instants = Instants { steady_ms: 50_000, wall_ms: 1_700_000_000_000 };

fn lease() -> Lease {
    Lease {
        volume: VolumeId(*b"0123456789abcdef"),
        state: LeaseState::Held,
        host: [0xaa; 16],
        claim: [0xbb; 16],
        host_name: "north".into(),
        epoch: 7,
        counter: 42,
        duration_ms: TERMS.duration_ms,
        since_ms: 1_699_999_000_000,
        renewed_ms: START.wall_ms,
        bucket_lsn: 1000,
        last_lsn: 1234,
        dirty_bytes: 5 << 20,
    }
}

#[test]
fn the_golden_lease_reads_and_is_written_the_same() {
    crate::chunk::testing::golden("lease-v1.bin", &lease().encode(), true, |bytes| {
        assert_eq!(Lease::decode(bytes), Ok(lease()));
    });
}

#[test]
fn every_flipped_bit_and_every_cut_is_noticed() {
    let bytes = lease().encode();
    for bit in 0..bytes.len() * 8 {
        let mut bad = bytes.to_vec();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(Lease::decode(&bad).is_err(), "bit {bit}");
    }
    for len in 0..bytes.len() {
        assert!(Lease::decode(&bytes[..len]).is_err(), "{len} bytes");
    }
    let mut newer = bytes.to_vec();
    newer[8] = 2;
    assert_eq!(Lease::decode(&newer), Err(LeaseFormatError::Version(2)));
    let long = Lease { host_name: "ä".repeat(200), ..lease() };
    assert_eq!(Lease::decode(&long.encode()).unwrap().host_name, "ä".repeat(127));
}

proptest! {
    #[test]
    fn decoding_is_total(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Lease::decode(&bytes).is_err());
        let mut with_magic = lease().encode()[..16].to_vec();
        with_magic.extend_from_slice(&bytes);
        prop_assert!(Lease::decode(&with_magic).is_err());
    }

    /// Whatever the store answers and whatever becomes of the wall clock: no owner serves when another host could have
    /// taken its lease, as long as that one's clocks run on.
    #[test]
    fn nobody_serves_a_lease_that_others_may_take(steps in prop::collection::vec(
        (1u64..4000, prop_oneof![8 => Just(0i64), 1 => -20_000i64..20_000], 0u8..5), 1..60)
    ) {
        let mut now = START;
        let mut keeper = Keeper::new(TERMS, now);
        // As it stands in the store, and since when on the steady clock.
        let (mut stored, mut stored_at) = (lease(), now.steady_ms);
        let mut flying: Option<(u64, Instants)> = None;
        for (ms, jump, answer) in steps {
            now = now.after(ms);
            now.wall_ms = now.wall_ms.saturating_add_signed(jump);
            if let Order::Renew(number) = keeper.tick(now) {
                prop_assert!(flying.is_none(), "one at a time");
                flying = Some((number, now));
            }
            if let Some((number, sent)) = flying {
                let land = |stored: &mut Lease, at: &mut u64| {
                    (stored.counter, stored.renewed_ms, *at) = (stored.counter + 1, sent.wall_ms, now.steady_ms);
                };
                match answer {
                    0 => { land(&mut stored, &mut stored_at); keeper.renewed(number, now); keeper.renewed(number, now); flying = None; }
                    1 => { land(&mut stored, &mut stored_at); keeper.failed(number, now); flying = None; }
                    2 => { keeper.failed(number, now); keeper.renewed(number, now); flying = None; }
                    _ => {}
                }
            }
            // Another host with a right clock of its own, watching all the time.
            let seen = Sighting::update(None, &stored, Instants { steady_ms: stored_at, wall_ms: 0 });
            let judge = Judge { host: [1; 16], volume: stored.volume };
            let theirs = Instants { steady_ms: now.steady_ms, wall_ms: 0 };
            if judge.judge(&stored, seen, theirs) == Verdict::Expired {
                prop_assert!(!keeper.serves(now), "both would serve");
            }
        }
    }
}

fn renew(keeper: &mut Keeper, now: Instants) -> u64 {
    match keeper.tick(now) {
        Order::Renew(number) => number,
        Order::Wait => panic!("no renewal at {now:?}"),
    }
}

#[test]
fn it_renews_at_a_fifth_and_serves_nine_tenths() {
    let mut keeper = Keeper::new(TERMS, START);
    assert_eq!(keeper.tick(START.after(1999)), Order::Wait);
    assert!(keeper.serves(START.after(8999)) && !keeper.serves(START.after(9000)));
    let number = renew(&mut keeper, START.after(2000));
    assert_eq!(keeper.tick(START.after(2001)), Order::Wait, "one is on its way");
    keeper.renewed(number, START.after(2500));
    assert!(keeper.serves(START.after(10_999)), "counted from the sending");
    assert!(!keeper.serves(START.after(11_000)));
}

#[test]
fn a_bucket_that_is_away_suspends_and_a_late_renewal_resumes() {
    let mut keeper = Keeper::new(TERMS, START);
    let mut at = 2000;
    while at < 12_000 {
        let number = renew(&mut keeper, START.after(at));
        keeper.failed(number, START.after(at + 100));
        assert_eq!(keeper.tick(START.after(at + 200)), Order::Wait, "not at once again");
        at += 100 + TERMS.retry_ms();
    }
    assert!(!keeper.serves(START.after(at)));
    let number = renew(&mut keeper, START.after(at));
    assert!(keeper.lapsed(), "the manifest must be asked");
    keeper.renewed(number, START.after(at + 50));
    assert!(keeper.serves(START.after(at + 50)) && !keeper.lapsed());
}

#[test]
fn an_answer_that_comes_too_late_resumes_nothing() {
    let mut keeper = Keeper::new(TERMS, START);
    let number = renew(&mut keeper, START.after(2000));
    keeper.renewed(number, START.after(20_000));
    assert!(!keeper.serves(START.after(20_000)) && keeper.lapsed());
    // Answers to what was given up or answered before.
    let next = renew(&mut keeper, START.after(20_001));
    keeper.failed(next, START.after(20_002));
    keeper.renewed(next, START.after(20_003));
    keeper.renewed(number, START.after(20_003));
    assert!(!keeper.serves(START.after(20_003)));
}

#[test]
fn either_clock_ends_the_serving() {
    let mut keeper = Keeper::new(TERMS, START);
    let suspended = Instants { wall_ms: START.wall_ms + 60_000, ..START.after(1) };
    assert!(!keeper.serves(suspended), "the machine was suspended, or the clock set forward");
    let number = renew(&mut keeper, suspended);
    keeper.renewed(number, suspended.after(5));
    assert!(keeper.serves(suspended.after(5)));
    // Set back: the other clock still counts.
    let back = Instants { wall_ms: START.wall_ms - 3_600_000, ..suspended.after(8000) };
    assert!(keeper.serves(back));
    assert!(!keeper.serves(Instants { wall_ms: back.wall_ms, ..suspended.after(9000) }));
    renew(&mut keeper, back);
}

#[test]
fn what_is_lost_stays_lost() {
    let mut keeper = Keeper::new(TERMS, START);
    let number = renew(&mut keeper, START.after(2000));
    keeper.lose();
    keeper.renewed(number, START.after(2001));
    assert!(keeper.grant().is_none() && keeper.is_lost() && !keeper.serves(START.after(2001)));
    assert_eq!(keeper.tick(START.after(9000)), Order::Wait);
}

fn judged(lease: &Lease, seen_ms: u64, wall: i64) -> Verdict {
    let judge = Judge { host: [1; 16], volume: VolumeId(*b"0123456789abcdef") };
    let seen = Sighting::update(None, lease, START);
    let wall_ms = START.wall_ms.saturating_add_signed(wall);
    judge.judge(lease, seen, Instants { steady_ms: START.steady_ms + seen_ms, wall_ms })
}

#[test]
fn a_lease_is_judged_by_more_than_its_stamp() {
    let lease = lease();
    assert_eq!(judged(&lease, 0, 0), Verdict::Held(12_000));
    assert_eq!(judged(&lease, 0, 11_999), Verdict::Held(1));
    // It looks expired: it has to stand still for longer than between two renewals.
    assert_eq!(judged(&lease, 0, 12_000), Verdict::Watch(2500));
    assert_eq!(judged(&lease, 2000, 3_600_000), Verdict::Watch(500));
    assert_eq!(judged(&lease, 2500, 3_600_000), Verdict::Expired);
    // A stamp from the future holds no longer than the lease lasts.
    assert_eq!(judged(&lease, 5000, -3_600_000), Verdict::Held(7000));
    assert_eq!(judged(&lease, 12_000, -3_600_000), Verdict::Expired);
    assert_eq!(judged(&Lease { state: LeaseState::Released, ..lease.clone() }, 0, 0), Verdict::Free);
    assert_eq!(judged(&Lease { volume: VolumeId([3; 16]), ..lease.clone() }, 0, 0), Verdict::Free);
    assert_eq!(judged(&Lease { host: [1; 16], ..lease.clone() }, 0, 0), Verdict::Own);
    // Seen anew with every renewal.
    let seen = Sighting::update(None, &lease, START);
    assert_eq!(Sighting::update(Some(seen), &lease, START.after(5)), seen);
    let renewed = Lease { counter: 43, ..lease };
    assert_eq!(Sighting::update(Some(seen), &renewed, START.after(5)).unchanged_ms(START.after(6)), 1);
}

#[cfg(feature = "engine")]
mod stored {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::chunk::testing::TestStore;
    use crate::store::{Fault, FaultPlan, FaultyStore, MemoryStore, Op};

    #[tokio::test]
    async fn a_renewal_is_seen_to_be_another_than_the_one_given_up_before_it() {
        let plan = FaultPlan::new(1);
        let store = FaultyStore::new(Arc::new(MemoryStore::new()), plan.clone());
        let acquired = acquire(&store, "v", lease(), None, false, &|| START).await.unwrap();
        let mut held = Held::new("v", acquired);
        plan.inject(Op::Put, Fault::FailAfter);
        assert!(held.renew(&store, None, START.wall_ms).await.is_err());
        let (given_up, _) = load(&store, "v").await.unwrap().unwrap();
        let seen = Sighting::update(None, &given_up, START);
        let later = START.after(TERMS.duration_ms * 2);
        assert_eq!(held.renew(&store, None, later.wall_ms).await.unwrap(), None);
        let (stands, _) = load(&store, "v").await.unwrap().unwrap();
        assert!(stands.counter > given_up.counter);
        assert_eq!(Sighting::update(Some(seen), &stands, later).unchanged_ms(later), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_taken_renewed_lost_and_released() {
        let store = TestStore::default();
        let now = Mutex::new(START);
        let clock = || {
            let mut now = now.lock().unwrap();
            *now = now.after(1);
            *now
        };
        let mine = Lease { host: [1; 16], claim: [1; 16], ..lease() };
        let theirs = Lease { host: [2; 16], claim: [2; 16], ..lease() };
        let first = acquire(&store, "v", mine.clone(), None, false, &clock).await.unwrap();
        assert_eq!((first.verdict, first.lease.counter, first.before), (Verdict::Free, 1, None));

        let Err(AcquireError::Held { lease: found, seen, .. }) =
            acquire(&store, "v", theirs.clone(), None, false, &clock).await
        else {
            panic!("a held lease was given away");
        };
        assert_eq!(*found, first.lease);
        // The answer to a renewal was lost, and the next one finds it in its way.
        let lost = Lease { counter: 2, ..first.lease.clone() };
        put_over(&store, "v", &lost, Some(first.version.clone())).await.unwrap().unwrap();
        let next = Lease { counter: 3, ..first.lease.clone() };
        let Renewal::Kept(version) = crate::lease::renew(&store, "v", &next, &first.version).await.unwrap() else {
            panic!("an own renewal is no other owner");
        };
        // It is watched, although it was seen before, because it changed since.
        *now.lock().unwrap() = START.after(3_600_000);
        let before = tokio::time::Instant::now();
        let watching = async {
            let clock = || {
                let waited = before.elapsed().as_millis() as u64;
                START.after(3_600_000 + waited)
            };
            acquire(&store, "v", theirs.clone(), Some(seen), false, &clock).await.unwrap()
        };
        let second = watching.await;
        assert!(before.elapsed().as_millis() >= 2500);
        assert_eq!((second.verdict, second.lease.counter), (Verdict::Expired, 4));
        assert_eq!(second.before, Some(next.clone()));
        let after = crate::lease::renew(&store, "v", &Lease { counter: 4, ..next }, &version).await.unwrap();
        assert!(matches!(after, Renewal::Lost(found) if found.claim == [2; 16]));

        let forced = acquire(&store, "v", mine, None, true, &clock).await.unwrap();
        assert_eq!(forced.before.unwrap().claim, [2; 16]);
        let released = Lease { state: LeaseState::Released, ..forced.lease };
        assert!(matches!(crate::lease::renew(&store, "v", &released, &forced.version).await, Ok(Renewal::Kept(_))));
        let third = acquire(&store, "v", theirs, None, false, &clock).await.unwrap();
        assert_eq!(third.verdict, Verdict::Free);
        remove(&store, "v").await.unwrap();
        assert!(matches!(crate::lease::renew(&store, "v", &third.lease, &third.version).await, Ok(Renewal::Gone)));
    }
}
