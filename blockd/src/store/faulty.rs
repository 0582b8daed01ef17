//! A store that fails on purpose, as a plan says.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::anyhow;
use async_trait::async_trait;
use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::sync::Notify;

use super::{ListEntry, ObjectMeta, ObjectStore, PutMode, Result, StoreError, StoreErrorKind, Version};

/// An operation of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Conditional writes.
    Put,
    /// Whole reads.
    Get,
    /// Ranged reads.
    GetRange,
    /// Size and version.
    Head,
    /// Listings.
    List,
    /// Deletions.
    Delete,
}

impl Op {
    fn name(self) -> &'static str {
        match self {
            Op::Put => "put",
            Op::Get => "get",
            Op::GetRange => "get_range",
            Op::Head => "head",
            Op::List => "list",
            Op::Delete => "delete",
        }
    }
}

/// What goes wrong with one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `Unavailable`; nothing happened.
    FailBefore,
    /// The call took effect, the answer is `Timeout`.
    FailAfter,
    /// The call of a PUT or DELETE is answered `Timeout` at once and takes effect this much later; others just fail.
    LandLate(Duration),
    /// The call takes this much longer and then goes on.
    Stall(Duration),
    /// `Throttled`; nothing happened.
    Throttle,
    /// A whole read returns a shorter object; a ranged read finds its range past the end. No effect on others.
    Truncate,
    /// One bit of the content read is wrong. No effect on others.
    FlipBit,
}

/// How likely each fault is for one call, 0 to 1; at most one strikes.
#[derive(Clone, Debug, Default)]
pub struct FaultRates {
    /// Of [`Fault::FailBefore`].
    pub fail_before: f64,
    /// Of [`Fault::FailAfter`].
    pub fail_after: f64,
    /// Of [`Fault::LandLate`], by a random part of `stall_max`.
    pub land_late: f64,
    /// Of [`Fault::Stall`], for a random part of `stall_max`.
    pub stall: f64,
    /// Of [`Fault::Throttle`].
    pub throttle: f64,
    /// Of [`Fault::Truncate`].
    pub truncate: f64,
    /// Of [`Fault::FlipBit`].
    pub flip_bit: f64,
    /// Longest stall and latest landing.
    pub stall_max: Duration,
    /// The operations that suffer; empty means all.
    pub ops: Vec<Op>,
}

/// Whether the whole store is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outage {
    /// It is there.
    None,
    /// Every call fails at once with `Unavailable`.
    Failing,
    /// Every call hangs, to end with `Timeout` after this long or as soon as the outage is over.
    Hanging(Duration),
}

/// What shall go wrong; shared with the test, which may change it at any time.
///
/// Decisions come from a seeded generator in the order of the calls, so a run on one thread with paused time repeats.
#[derive(Debug)]
pub struct FaultPlan {
    state: Mutex<State>,
    /// Calls that hang wait here and leave in the order they came, unlike those who wait for a watch.
    outage_changed: Notify,
}

#[derive(Debug)]
struct State {
    rng: SmallRng,
    rates: FaultRates,
    script: VecDeque<(Op, Fault)>,
    struck: u64,
    outage: Outage,
}

impl FaultPlan {
    /// A plan under which nothing goes wrong yet.
    pub fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                rng: SmallRng::seed_from_u64(seed),
                rates: FaultRates::default(),
                script: VecDeque::new(),
                struck: 0,
                outage: Outage::None,
            }),
            outage_changed: Notify::new(),
        })
    }

    /// Sets what may happen to any call from now on.
    pub fn set_rates(&self, rates: FaultRates) {
        self.lock().rates = rates;
    }

    /// Makes the next call of `op` suffer `fault`. Several for one operation strike in the order given, before any rates.
    pub fn inject(&self, op: Op, fault: Fault) {
        self.lock().script.push_back((op, fault));
    }

    /// Begins or ends an outage.
    pub fn set_outage(&self, outage: Outage) {
        self.lock().outage = outage;
        self.outage_changed.notify_waiters();
    }

    /// Faults that have struck so far, outages included.
    pub fn struck(&self) -> u64 {
        self.lock().struck
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics half way through a change of the state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn draw(&self, op: Op) -> Option<Fault> {
        let mut state = self.lock();
        let fault = state.draw(op);
        state.struck += u64::from(fault.is_some());
        fault
    }

    /// A number below `bound`, or 0.
    fn below(&self, bound: usize) -> usize {
        if bound == 0 { 0 } else { self.lock().rng.random_range(0..bound) }
    }

    async fn outage(&self, op: Op, key: &str) -> Result<()> {
        let outage = {
            let mut state = self.lock();
            state.struck += u64::from(state.outage != Outage::None);
            state.outage
        };
        match outage {
            Outage::None => Ok(()),
            Outage::Failing => Err(fault_error(StoreErrorKind::Unavailable, op, key)),
            Outage::Hanging(longest) => {
                let over = async {
                    loop {
                        let changed = self.outage_changed.notified();
                        if !matches!(self.lock().outage, Outage::Hanging(_)) {
                            return;
                        }
                        changed.await;
                    }
                };
                // Both ways out mean the same to the caller: no answer.
                let _ = tokio::time::timeout(longest, over).await;
                Err(fault_error(StoreErrorKind::Timeout, op, key))
            }
        }
    }
}

impl State {
    fn draw(&mut self, op: Op) -> Option<Fault> {
        if let Some(at) = self.script.iter().position(|(o, _)| *o == op) {
            return self.script.remove(at).map(|(_, fault)| fault);
        }
        if !self.rates.ops.is_empty() && !self.rates.ops.contains(&op) {
            return None;
        }
        let rates = &self.rates;
        let dice: f64 = self.rng.random();
        let delay = rates.stall_max.mul_f64(self.rng.random());
        let mut sum = 0.0;
        [
            (rates.fail_before, Fault::FailBefore),
            (rates.fail_after, Fault::FailAfter),
            (rates.land_late, Fault::LandLate(delay)),
            (rates.stall, Fault::Stall(delay)),
            (rates.throttle, Fault::Throttle),
            (rates.truncate, Fault::Truncate),
            (rates.flip_bit, Fault::FlipBit),
        ]
        .into_iter()
        .find_map(|(rate, fault)| {
            sum += rate;
            (dice < sum).then_some(fault)
        })
    }
}

fn fault_error(kind: StoreErrorKind, op: Op, key: &str) -> StoreError {
    StoreError::new(kind, op.name(), key, anyhow!("injected fault"))
}

/// A store whose calls suffer what a [`FaultPlan`] says.
#[derive(Debug)]
pub struct FaultyStore<S> {
    inner: Arc<S>,
    plan: Arc<FaultPlan>,
}

impl<S: ObjectStore + 'static> FaultyStore<S> {
    /// Wraps a store.
    pub fn new(inner: Arc<S>, plan: Arc<FaultPlan>) -> Self {
        Self { inner, plan }
    }

    /// The store without the faults.
    pub fn inner(&self) -> &Arc<S> {
        &self.inner
    }

    /// Runs `call` under what the plan has for it. Returns also the fault, if it is one that changes what was read.
    async fn under<T, F>(&self, op: Op, key: &str, call: F) -> Result<(T, Option<Fault>)>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        self.plan.outage(op, key).await?;
        let fault = self.plan.draw(op);
        match fault {
            Some(Fault::FailBefore) => {
                return Err(fault_error(StoreErrorKind::Unavailable, op, key));
            }
            Some(Fault::Throttle) => return Err(fault_error(StoreErrorKind::Throttled, op, key)),
            Some(Fault::FailAfter) => {
                // The answer is lost, whatever it was.
                let _ = call.await;
                return Err(fault_error(StoreErrorKind::Timeout, op, key));
            }
            Some(Fault::LandLate(delay)) => {
                if matches!(op, Op::Put | Op::Delete) {
                    tokio::spawn(async move {
                        tokio::time::sleep(delay).await;
                        // Nobody waits for this answer; that is the fault.
                        let _ = call.await;
                    });
                }
                return Err(fault_error(StoreErrorKind::Timeout, op, key));
            }
            Some(Fault::Stall(delay)) => tokio::time::sleep(delay).await,
            Some(Fault::Truncate | Fault::FlipBit) | None => {}
        }
        Ok((call.await?, fault))
    }

    fn flip_bit(&self, body: Bytes) -> Bytes {
        let mut body = body.to_vec();
        let at = self.plan.below(body.len() * 8);
        if let Some(byte) = body.get_mut(at / 8) {
            *byte ^= 1 << (at % 8);
        }
        body.into()
    }
}

#[async_trait]
impl<S: ObjectStore + 'static> ObjectStore for FaultyStore<S> {
    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> Result<Version> {
        let (inner, k) = (self.inner.clone(), key.to_owned());
        let call = async move { inner.put(&k, body, mode).await };
        Ok(self.under(Op::Put, key, call).await?.0)
    }

    async fn get(&self, key: &str) -> Result<(Bytes, Version)> {
        let (inner, k) = (self.inner.clone(), key.to_owned());
        let call = async move { inner.get(&k).await };
        let ((body, version), fault) = self.under(Op::Get, key, call).await?;
        let body = match fault {
            Some(Fault::Truncate) => body.slice(..self.plan.below(body.len())),
            Some(Fault::FlipBit) => self.flip_bit(body),
            _ => body,
        };
        Ok((body, version))
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let (inner, k) = (self.inner.clone(), key.to_owned());
        let call = async move { inner.get_range(&k, range).await };
        let (body, fault) = self.under(Op::GetRange, key, call).await?;
        match fault {
            Some(Fault::Truncate) => Err(fault_error(StoreErrorKind::Invalid, Op::GetRange, key)),
            Some(Fault::FlipBit) => Ok(self.flip_bit(body)),
            _ => Ok(body),
        }
    }

    async fn head(&self, key: &str) -> Result<ObjectMeta> {
        let (inner, k) = (self.inner.clone(), key.to_owned());
        let call = async move { inner.head(&k).await };
        Ok(self.under(Op::Head, key, call).await?.0)
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ListEntry>> {
        let (inner, p) = (self.inner.clone(), prefix.to_owned());
        let after = start_after.map(str::to_owned);
        let call = async move { inner.list(&p, after.as_deref()).await };
        Ok(self.under(Op::List, prefix, call).await?.0)
    }

    async fn delete(&self, keys: &[String]) -> Result<()> {
        let (inner, k) = (self.inner.clone(), keys.to_vec());
        let call = async move { inner.delete(&k).await };
        let first = keys.first().map_or("", String::as_str);
        self.under(Op::Delete, first, call).await?;
        Ok(())
    }

    async fn delete_version(&self, key: &str, version: &Version) -> Result<()> {
        let (inner, k, version) = (self.inner.clone(), key.to_owned(), version.clone());
        let call = async move { inner.delete_version(&k, &version).await };
        self.under(Op::Delete, key, call).await?;
        Ok(())
    }

    fn describe(&self) -> String {
        format!("faulty {}", self.inner.describe())
    }
}

#[cfg(test)]
mod tests {
    use super::super::MemoryStore;
    use super::*;

    fn faulty(seed: u64) -> FaultyStore<MemoryStore> {
        FaultyStore::new(Arc::new(MemoryStore::new()), FaultPlan::new(seed))
    }

    async fn create(store: &FaultyStore<MemoryStore>, key: &str) -> Result<Version> {
        store.put(key, Bytes::from_static(b"content"), PutMode::Create).await
    }

    #[tokio::test]
    async fn scripted_faults_do_what_they_say() {
        let store = faulty(1);
        store.plan.inject(Op::Put, Fault::FailBefore);
        store.plan.inject(Op::Put, Fault::FailAfter);
        store.plan.inject(Op::Put, Fault::LandLate(Duration::from_millis(30)));
        let kind = |r: Result<Version>| r.unwrap_err().kind;
        assert_eq!(kind(create(&store, "a").await), StoreErrorKind::Unavailable);
        assert_eq!(store.head("a").await.unwrap_err().kind, StoreErrorKind::NotFound);
        assert_eq!(kind(create(&store, "a").await), StoreErrorKind::Timeout);
        assert_eq!(store.head("a").await.unwrap().size, 7);
        assert_eq!(kind(create(&store, "late").await), StoreErrorKind::Timeout);
        assert_eq!(store.inner.keys(), ["a"]);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(store.inner.keys(), ["a", "late"]);

        store.plan.inject(Op::Get, Fault::FlipBit);
        store.plan.inject(Op::Get, Fault::Truncate);
        let flipped = store.get("a").await.unwrap().0;
        let differing: u32 = flipped.iter().zip(b"content").map(|(a, b)| (a ^ b).count_ones()).sum();
        assert_eq!((flipped.len(), differing), (7, 1));
        assert!(store.get("a").await.unwrap().0.len() < 7);
        assert_eq!(store.plan.struck(), 5);
    }

    #[tokio::test]
    async fn outages_fail_or_hang_until_they_end() {
        let store = Arc::new(faulty(1));
        store.plan.set_outage(Outage::Failing);
        assert_eq!(create(&store, "a").await.unwrap_err().kind, StoreErrorKind::Unavailable);
        store.plan.set_outage(Outage::Hanging(Duration::from_secs(3600)));
        let hung = tokio::spawn({
            let store = store.clone();
            async move { create(&store, "a").await }
        });
        tokio::time::sleep(Duration::from_millis(30)).await;
        assert!(!hung.is_finished());
        store.plan.set_outage(Outage::None);
        assert_eq!(hung.await.unwrap().unwrap_err().kind, StoreErrorKind::Timeout);
        create(&store, "a").await.unwrap();
    }

    async fn run_with_rates(seed: u64) -> Vec<String> {
        let store = faulty(seed);
        store.plan.set_rates(FaultRates {
            fail_before: 0.1,
            fail_after: 0.1,
            stall: 0.2,
            throttle: 0.1,
            stall_max: Duration::from_micros(10),
            ops: vec![Op::Put],
            ..FaultRates::default()
        });
        let mut seen = Vec::new();
        for n in 0..200 {
            let result = create(&store, &format!("key{n}")).await;
            seen.push(format!("{:?}", result.map_err(|e| e.kind)));
            store.list("", None).await.unwrap();
        }
        seen
    }

    #[tokio::test]
    async fn a_seed_repeats_and_another_differs() {
        let first = run_with_rates(7).await;
        assert_eq!(first, run_with_rates(7).await);
        assert_ne!(first, run_with_rates(8).await);
        let failed = first.iter().filter(|r| r.starts_with("Err")).count();
        assert!((30..=90).contains(&failed), "{failed} of 200 failed at a rate of 0.3");
    }
}
