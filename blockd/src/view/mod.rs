//! Reading a volume without owning it: a state of it, without lease, epoch or log.
//!
//! A [`Sight`] is a translation table and what reads by it, made of a checkpoint ([`Sight::open`]). A [`View`] is the
//! device over it that a reactor drives; it refuses changes. A snapshot is a view that stands still. Whatever follows an
//! owner shows the view a newer sight ([`View::show`]), or applies chunks to the table of the one it has.
//!
//! What must hold: all chunks of the state shown stay in the bucket as long as it is shown. Those of a snapshot do until
//! it is deleted.

mod device;
mod sight;

pub use device::View;
pub use sight::{Sight, SightOptions};
