//! The daemon's control interface: JSON over HTTP on a Unix socket that only its owner may open.
//!
//! [`api`] is what both sides say, [`server`] answers, [`metrics`] says the same in Prometheus' format. Nothing here
//! decides anything: requests go to [`crate::daemon`]. Operations that change something run to their end even when
//! the client that asked goes away.

pub mod api;
pub mod metrics;
pub mod server;
