//! What each program of this project is to its surroundings: errors, figures and tables for people, stdout, the service manager.
//!
//! Settings are in [`crate::config`].

mod explain;
mod notify;
mod stdout;
pub mod text;

pub use explain::explain;
pub use notify::notify;
pub use stdout::{StdoutClosed, print, print_json};
