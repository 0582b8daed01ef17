//! The lease: which host is to serve a volume, until when, and what it has not sent to the bucket yet.
//!
//! `volumes/<name>/lease` is changed only by conditional writes, and its owner renews it about five times per
//! duration. It only nominates: what protects the data is the epoch ([`crate::volume`]), and what protects readers from
//! stale answers is that an owner stops serving by its own clocks before anybody may take its lease for expired.
//!
//! - [`format`](Lease): the object. [`stored`](load): its conditional requests.
//! - [`Judge`]: may this host take it? [`acquire`]: take it.
//! - [`Keeper`]: the owner's side, when to renew and until when to serve. [`Held`]: how it renews.
//!
//! `Judge` and `Keeper` are pure: they are told the time and what the store answered.

#[cfg(feature = "engine")]
mod acquire;
mod format;
#[cfg(feature = "engine")]
mod held;
mod judge;
mod keeper;
#[cfg(feature = "engine")]
mod stored;
#[cfg(test)]
mod tests;

#[cfg(feature = "engine")]
pub use acquire::{AcquireError, Acquired, acquire};
pub use format::{Lease, LeaseFormatError, LeaseState};
#[cfg(feature = "engine")]
pub use held::{Held, Lost, Unsent};
pub use judge::{Judge, Sighting, Verdict};
pub use keeper::{Grant, Instants, Keeper, Order, Terms};
#[cfg(feature = "engine")]
pub use stored::{LeaseError, Renewal, key, load, put_over, remove, renew};
