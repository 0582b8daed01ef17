//! The owner's side: when to renew, and until when to serve.
//!
//! An owner may serve until a fixed time after it *sent* the last renewal that succeeded: whoever judges the lease
//! counts from a time stamped then. The end is kept on two clocks, one that also counts while the machine is suspended
//! and the wall clock, and whichever comes first counts. A wall clock set back changes nothing, for the other still
//! runs; one set forward ends the serving until the next renewal, which is asked for at once.

/// One moment on both clocks, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Instants {
    /// A clock that never goes back and counts suspended time.
    pub steady_ms: u64,
    /// Unix time.
    pub wall_ms: u64,
}

impl Instants {
    /// Both, `ms` later.
    pub fn after(self, ms: u64) -> Self {
        Self { steady_ms: self.steady_ms.saturating_add(ms), wall_ms: self.wall_ms.saturating_add(ms) }
    }
}

/// Until when a volume may be served: not after either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant(pub Instants);

impl Grant {
    /// Whether it is still good.
    pub fn holds(&self, now: Instants) -> bool {
        now.steady_ms < self.0.steady_ms && now.wall_ms < self.0.wall_ms
    }
}

/// The times of a lease, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// How long others leave it alone after a renewal.
    pub duration_ms: u64,
}

impl Terms {
    /// Between renewals while all is well.
    pub fn interval_ms(&self) -> u64 {
        (self.duration_ms / 5).max(1)
    }

    /// Between attempts while renewals fail.
    pub fn retry_ms(&self) -> u64 {
        (self.duration_ms / 25).clamp(1, 5_000)
    }

    /// How long the owner serves after it sent a renewal. What is left of the duration is for clocks that run
    /// differently fast.
    pub fn serve_ms(&self) -> u64 {
        self.duration_ms - self.duration_ms / 10
    }

    /// How far the wall clocks of two hosts may be apart without a delay for anybody. Farther apart, it is the watching
    /// that keeps a live owner's lease from being taken.
    pub fn skew_ms(&self) -> u64 {
        self.duration_ms / 5
    }

    /// How long a lease that looks expired is watched: a live owner would have renewed it meanwhile.
    pub fn watch_ms(&self) -> u64 {
        self.interval_ms() + self.interval_ms() / 4
    }
}

/// What the owner has to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Nothing.
    Wait,
    /// Send a renewal, and report the answer under this number.
    Renew(u64),
}

#[derive(Clone, Copy, Debug)]
struct Attempt {
    number: u64,
    sent: Instants,
}

/// See the module.
#[derive(Debug)]
pub struct Keeper {
    terms: Terms,
    /// When the last request that succeeded was sent.
    confirmed: Instants,
    /// The number of the attempt that did.
    confirmed_number: u64,
    flying: Option<Attempt>,
    last_number: u64,
    /// Not before, on the steady clock: the last attempt failed.
    retry_at_ms: u64,
    /// It ran out at least once since the last renewal.
    lapsed: bool,
    lost: bool,
}

impl Keeper {
    /// For a lease taken by a request sent at `taken`.
    pub fn new(terms: Terms, taken: Instants) -> Self {
        Self {
            terms,
            confirmed: taken,
            confirmed_number: 0,
            flying: None,
            last_number: 0,
            retry_at_ms: 0,
            lapsed: false,
            lost: false,
        }
    }

    /// Until when the volume may be served; nothing when the lease is lost.
    pub fn grant(&self) -> Option<Grant> {
        (!self.lost).then(|| Grant(self.confirmed.after(self.terms.serve_ms())))
    }

    /// Whether the volume may be served.
    pub fn serves(&self, now: Instants) -> bool {
        self.grant().is_some_and(|grant| grant.holds(now))
    }

    /// Whether the lease ran out since it was last renewed. Others may have come and gone: a renewal is then to be
    /// believed only together with the manifest.
    pub fn lapsed(&self) -> bool {
        self.lapsed
    }

    /// What to do now. A renewal that was ordered must be answered by [`Keeper::renewed`], [`Keeper::failed`] or
    /// [`Keeper::lose`] before there is another.
    pub fn tick(&mut self, now: Instants) -> Order {
        self.lapsed |= !self.serves(now);
        if self.lost || self.flying.is_some() || now.steady_ms < self.retry_at_ms {
            return Order::Wait;
        }
        let due = self.confirmed.after(self.terms.interval_ms());
        // The wall clock too: set forward, it ends the serving, which only a renewal can repair.
        if now.steady_ms < due.steady_ms && now.wall_ms < due.wall_ms {
            return Order::Wait;
        }
        self.last_number += 1;
        self.flying = Some(Attempt { number: self.last_number, sent: now });
        Order::Renew(self.last_number)
    }

    /// The store has the renewal `number`. Answers that come twice, or after a newer one, change nothing.
    pub fn renewed(&mut self, number: u64, now: Instants) {
        let Some(attempt) = self.flying.take_if(|attempt| attempt.number == number) else { return };
        if self.lost || number <= self.confirmed_number {
            return;
        }
        // Counted from the sending, however late the answer comes.
        (self.confirmed, self.confirmed_number) = (attempt.sent, number);
        self.retry_at_ms = 0;
        self.lapsed = !self.serves(now);
    }

    /// Nobody knows what became of the renewal `number`.
    pub fn failed(&mut self, number: u64, now: Instants) {
        if self.flying.take_if(|attempt| attempt.number == number).is_some() {
            self.retry_at_ms = now.steady_ms + self.terms.retry_ms();
        }
    }

    /// Somebody else has the volume. There is no way back.
    pub fn lose(&mut self) {
        self.lost = true;
        self.flying = None;
    }

    /// Whether somebody else has the volume.
    pub fn is_lost(&self) -> bool {
        self.lost
    }
}
