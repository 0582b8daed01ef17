//! Load, kill, restart, verify; and again.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use blockd::export::nbd::client::{ReplyData, Request};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::Target;
use super::content::{self, BLOCK_SECTORS, Found, SECTOR};
use super::model::Model;
use super::worker::{self, Load, Shared};

/// How long the server may leave a request unanswered.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of one verifying read, and how many are in flight.
const VERIFY_BYTES: usize = 1 << 20;
const VERIFY_DEPTH: usize = 4;

/// How to torture.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Kills.
    pub rounds: u32,
    /// Decides sizes, places and moments; not the interleaving.
    pub seed: u64,
    /// Load before each kill, at least and at most.
    pub load_min: Duration,
    pub load_max: Duration,
    /// Longest rest amid the load of a round.
    pub idle_max: Duration,
    /// Size of the export; a multiple of 4 KiB.
    pub volume_bytes: u64,
    /// Connections at once.
    pub connections: usize,
    /// Requests in flight on each.
    pub depth: usize,
    /// Whether a trim may do nothing.
    pub trim_is_advisory: bool,
    /// Rounds between lines of progress; 0 for silence.
    pub progress_every: u32,
}

/// What was done and seen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Statistics {
    /// Rounds that ended well.
    pub rounds: u32,
    /// Times the server was killed under load, was killed while it recovered, was stopped in order.
    pub kills: u32,
    pub kills_in_recovery: u32,
    pub stops: u32,
    /// The load.
    pub load: Load,
    /// Writes unanswered at the end of their round.
    pub cut_off: u64,
    /// Sectors that could hold one of several things, and were settled by looking.
    pub open_sectors: u64,
    /// Longest and total time from a start to the first answer.
    pub recovery_max: Duration,
    pub recovery_total: Duration,
}

impl std::fmt::Display for Statistics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} rounds ({} kills under load, {} in recovery, {} orderly stops): {} writes acknowledged ({} MiB), {} cut off, \
             {} flushes, {} reads checked, {} sectors settled, recovery {:.0} ms on average and {:.0} ms at most",
            self.rounds,
            self.kills,
            self.kills_in_recovery,
            self.stops,
            self.load.acknowledged,
            self.load.bytes >> 20,
            self.cut_off,
            self.load.flushes,
            self.load.reads,
            self.open_sectors,
            self.recovery_total.as_secs_f64() * 1e3 / f64::from(self.rounds.max(1)),
            self.recovery_max.as_secs_f64() * 1e3
        )
    }
}

/// Runs the plan on a target that serves zeroes and was started. On success it serves still.
pub fn run(target: &mut dyn Target, plan: &Plan) -> Result<Statistics> {
    let sectors = u32::try_from(plan.volume_bytes / SECTOR as u64).context("the volume is too large to model")?;
    let shared = Shared {
        model: Mutex::new(Model::new(sectors, plan.trim_is_advisory)),
        seed: plan.seed,
        ending: AtomicBool::new(false),
        failed: AtomicBool::new(false),
        resting: AtomicBool::new(false),
    };
    let mut rng = SmallRng::seed_from_u64(plan.seed);
    let mut statistics = Statistics::default();
    for round in 1..=plan.rounds {
        one_round(target, plan, &shared, &mut rng, &mut statistics)
            .with_context(|| format!("in round {round}; the server said:\n{}", target.log_tail()))?;
        statistics.rounds = round;
        if plan.progress_every > 0 && (round % plan.progress_every == 0 || round == plan.rounds) {
            println!("{statistics}");
        }
    }
    Ok(statistics)
}

fn one_round(
    target: &mut dyn Target,
    plan: &Plan,
    shared: &Shared,
    rng: &mut SmallRng,
    statistics: &mut Statistics,
) -> Result<()> {
    let load_time = rng.random_range(plan.load_min..=plan.load_max);
    let orderly = rng.random_ratio(1, 10);
    // Now and then everything comes to rest in between: what a server does when idle must not hurt what follows.
    let rest = rng.random_ratio(1, 4).then(|| rng.random_range(Duration::ZERO..plan.idle_max));
    statistics.load += load(target, plan, shared, rng, (load_time, rest), orderly)?;
    if orderly {
        statistics.stops += 1;
    } else {
        statistics.kills += 1;
    }
    statistics.cut_off += shared.model().crash() as u64;
    while rng.random_ratio(1, 5) {
        target.start_and_kill(Duration::from_millis(rng.random_range(0..300)))?;
        statistics.kills_in_recovery += 1;
    }
    let start = Instant::now();
    target.start().context("after the crash it does not come back")?;
    let recovery = start.elapsed();
    statistics.recovery_max = statistics.recovery_max.max(recovery);
    statistics.recovery_total += recovery;
    statistics.open_sectors += verify(target, shared).context("after the restart")?;
    Ok(())
}

fn load(
    target: &mut dyn Target,
    plan: &Plan,
    shared: &Shared,
    rng: &mut SmallRng,
    (time, rest): (Duration, Option<Duration>),
    orderly: bool,
) -> Result<Load> {
    shared.ending.store(false, Ordering::SeqCst);
    let mut clients = Vec::new();
    for _ in 0..plan.connections {
        let mut client = target.connect().context("cannot connect")?;
        client.set_timeout(Some(REPLY_TIMEOUT));
        clients.push((client, SmallRng::from_rng(rng)));
    }
    thread::scope(|scope| {
        let threads: Vec<_> = clients
            .into_iter()
            .map(|(client, rng)| scope.spawn(move || worker::work(client, shared, rng, plan.depth)))
            .collect();
        match rest {
            None => wait(time, shared),
            Some(rest) => {
                wait(time / 2, shared);
                shared.resting.store(true, Ordering::SeqCst);
                wait(rest, shared);
                shared.resting.store(false, Ordering::SeqCst);
                wait(time / 2, shared);
            }
        }
        let alive = target.alive();
        shared.ending.store(true, Ordering::SeqCst);
        let ended = if orderly { target.stop() } else { target.kill() };
        let mut load = Load::default();
        // The threads' own findings say more than a server that does not end.
        for thread in threads {
            load += thread.join().map_err(|_| anyhow!("a load thread panicked"))??;
        }
        ended?;
        if !alive {
            bail!("the server ended by itself under load");
        }
        Ok(load)
    })
}

/// Waits, but not when something has failed.
fn wait(time: Duration, shared: &Shared) {
    let end = Instant::now() + time;
    while Instant::now() < end && !shared.failed.load(Ordering::SeqCst) {
        thread::sleep((end - Instant::now().min(end)).min(Duration::from_millis(20)));
    }
}

/// Reads the whole volume and settles every block. Returns how many sectors were open.
fn verify(target: &mut dyn Target, shared: &Shared) -> Result<u64> {
    let mut client = target.connect().context("cannot connect")?;
    client.set_timeout(Some(REPLY_TIMEOUT));
    let size = u64::from(shared.model().sector_count()) * SECTOR as u64;
    let mut in_flight = std::collections::HashMap::new();
    let (mut next, mut open) = (0, 0);
    while next < size || !in_flight.is_empty() {
        while next < size && in_flight.len() < VERIFY_DEPTH {
            let len = (VERIFY_BYTES as u64).min(size - next) as u32;
            in_flight.insert(client.submit(Request::Read { offset: next, len })?, next);
            next += u64::from(len);
        }
        let (cookie, result) = client.next_reply()?;
        let at = in_flight.remove(&cookie).context("a reply to no request")?;
        let ReplyData::Data(bytes) = result.map_err(|errno| anyhow!("reading at byte {at}: {errno}"))? else {
            bail!("no data in answer to a read");
        };
        let mut model = shared.model();
        for (index, block) in bytes.chunks(BLOCK_SECTORS as usize * SECTOR).enumerate() {
            let start = (at / SECTOR as u64) as u32 + index as u32 * BLOCK_SECTORS;
            let found: Vec<Found> = block
                .chunks_exact(SECTOR)
                .zip(start..)
                .map(|(piece, sector)| content::identify(shared.seed, sector, piece))
                .collect();
            match model.settle_block(start, &found) {
                Ok(count) => open += count as u64,
                Err(violation) => bail!(
                    "sector {} (byte {}): {}\nits block holds:{}",
                    violation.sector,
                    u64::from(violation.sector) * SECTOR as u64,
                    violation.what,
                    model.describe_block(start, &found)
                ),
            }
        }
    }
    Ok(open)
}
