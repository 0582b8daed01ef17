//! Settings of more than one command. How settings are written, and which source wins: [`blockd::config`].

mod place;

pub use place::{Place, PlaceError, Where};
