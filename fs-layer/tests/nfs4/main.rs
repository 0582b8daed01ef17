//! The server of NFSv4.1 and 4.2, held to its specifications by a client that says what a test wants said.

mod attributes;
mod client;
mod hostile;
mod names;
mod over_tcp;
mod sessions;
mod state;
