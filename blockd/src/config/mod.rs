//! Settings: what they are called, how they are written, and which source wins.
//!
//! The settings of a command are declared once, the daemon's as `Config`. Every field is a long flag and, under the same name, a key of
//! the TOML file; the command line wins over the environment, that over the file, that over the default shown by
//! `--help`. What is unknown is an error, because a misspelt setting that is silently ignored is a wrong setting.

mod duration;
mod file;
#[cfg(feature = "engine")]
mod options;
#[cfg(all(test, feature = "engine"))]
mod options_tests;
mod size;

pub use duration::{BadDuration, Interval};
pub use file::{ConfigError, merge_file};
#[cfg(feature = "engine")]
pub use options::{Config, Listen, LogLevel, LogShape, VolumeFile, admin_path, check_chunk_size};
pub use size::{BadSize, ByteSize};
