//! Benchmarks and the crash tester of blockd.
//!
//! [`mod@open`] measures opening a volume on a new host and what its checkpoints cost, [`cost`] what a volume asks of the
//! [`bucket`], [`fsync`] flushes to it. [`mod@fs`] measures mounted filesystems, [`nfs`] NFS servers without a mount. [`nvme`] compares blockd over NVMe/TCP with blockd over NBD.
//! [`load`] is the load generator and [`drive`] the command for it alone, [`server`] starts blockd and its peers, [`nbd`] is the benchmark made of
//! both, [`report`] turns its cases into tables, JSON and Markdown. [`crash`] kills a server under load and checks
//! what is left against a model. [`record`] keeps what a kernel writes and looks at what power cuts would leave.

// The futures of the AWS SDK are deep.
#![recursion_limit = "256"]

pub mod bucket;
pub mod client;
pub mod cost;
pub mod crash;
pub mod drive;
pub mod fio;
pub mod fs;
pub mod fsync;
pub mod load;
pub mod nbd;
pub mod nfs;
pub mod nvme;
pub mod open;
pub mod record;
pub mod report;
pub mod server;
