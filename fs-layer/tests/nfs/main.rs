//! The server of NFSv4.1, 4.2 and 3, held to its specifications by a client that says what a test wants said.

mod attributes;
mod client;
mod hostile;
mod killed;
mod names;
mod over_tcp;
mod sessions;
mod snapshots;
mod state;
mod version_3;
