//! Reading a volume without owning it: a state of it, without lease, epoch or log.
//!
//! A [`Sight`] is a translation table and what reads by it, made of a checkpoint ([`Sight::open`]). A [`View`] is the
//! device over it that a reactor drives; it refuses changes. A snapshot is a view that stands still. A [`Follower`]
//! moves with the owner: it applies chunks to the table of the sight it has, or shows the view a newer one ([`View::show`]).
//!
//! What must hold: all chunks of the state shown stay in the bucket as long as it is shown. Those of a snapshot do until
//! it is deleted; a follower is at a newer checkpoint before the chunks that it proves dead are deleted.

mod device;
mod follower;
mod sight;

pub use device::View;
pub use follower::{FollowOptions, Follower, Reached, Refreshed};
pub use sight::{Sight, SightOptions};
