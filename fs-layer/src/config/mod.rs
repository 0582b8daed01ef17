//! Settings: what they are called, how they are written, and which source wins.
//!
//! The settings of a command are declared once. Every field is a long flag and, under the same name, a key of the TOML file
//! given with `--config`; the command line wins over the environment, that over the file, that over the default shown by `--help`.
//! What is unknown is an error, because a misspelt setting that is silently ignored is a wrong setting.

mod file;
mod place;
mod size;

pub use file::{ConfigError, merge_file};
pub use place::{Place, PlaceError, Where};
pub use size::{BadSize, ByteSize};
