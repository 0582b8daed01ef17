//! The questions, and what is expected of the answers.

use super::{HOT_BYTES, VOLUME_BYTES};
use crate::fio::Job;
use crate::load::{Pattern, Workload};

/// Whom a case compares with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Against {
    /// The best server that keeps what it is given.
    Durable,
    /// nbdkit memory, the protocol's ceiling.
    Ceiling,
    /// The disk itself, by fio.
    Disk,
}

impl Against {
    /// Whether the server or job of this name belongs to it.
    pub fn includes(self, name: &str) -> bool {
        match self {
            Against::Durable => name.starts_with("nbdkit file") || name.starts_with("qemu-nbd"),
            Against::Ceiling => name == "nbdkit memory",
            Against::Disk => name.starts_with("fio "),
        }
    }
}

/// A load and the ratios wanted of it.
pub struct Question {
    /// For instance "4 KiB random write, depth 32, 4 connections".
    pub name: String,
    /// What is done to each server.
    pub workload: Workload,
    /// Comparisons to make.
    pub targets: &'static [(Against, f64)],
    /// What fio does beside the servers.
    pub fio: &'static [Job],
}

impl Question {
    /// Unit of the values.
    pub fn unit(&self) -> &'static str {
        if self.workload.block_bytes == 1 << 20 { "MiB/s" } else { "op/s" }
    }
}

/// All questions about serving.
pub fn all() -> Vec<Question> {
    let mut questions = Vec::new();
    for connections in [1, 4] {
        let mut ask = |what: &str, pattern, depth, targets, fio| {
            let sequential = matches!(pattern, Pattern::SequentialRead | Pattern::SequentialWrite);
            let plural = if connections == 1 { "" } else { "s" };
            questions.push(Question {
                name: format!("{what}, depth {depth}, {connections} connection{plural}"),
                workload: Workload {
                    pattern,
                    block_bytes: if sequential { 1 << 20 } else { 4096 },
                    depth,
                    connections,
                    span_bytes: if pattern == Pattern::RandomRead { HOT_BYTES } else { VOLUME_BYTES },
                },
                targets,
                fio: if connections == 1 { fio } else { &[] },
            });
        };
        const SYNC: &[(Against, f64)] = &[(Against::Durable, 1.0)];
        const SYNC_AND_DISK: &[(Against, f64)] = &[(Against::Durable, 1.0), (Against::Disk, 0.8)];
        let sync = if connections == 1 { SYNC_AND_DISK } else { SYNC };
        let disk_sync: &[Job] = &[Job::BufferedWriteSync, Job::DirectWriteSync];
        ask("4 KiB random write + flush", Pattern::RandomWriteFlush, 1, sync, disk_sync);
        ask("4 KiB random write + flush", Pattern::RandomWriteFlush, 32, SYNC, &[]);
        ask("4 KiB random write", Pattern::RandomWrite, 32, &[(Against::Ceiling, 0.8)], &[]);
        ask("4 KiB random read, hot", Pattern::RandomRead, 1, &[(Against::Ceiling, 0.8)], &[]);
        ask("4 KiB random read, hot", Pattern::RandomRead, 32, &[(Against::Ceiling, 0.8)], &[]);
        const SEQUENTIAL: &[(Against, f64)] = &[(Against::Ceiling, 0.7)];
        ask("1 MiB sequential write", Pattern::SequentialWrite, 4, SEQUENTIAL, &[Job::SequentialWrite]);
        ask("1 MiB sequential read", Pattern::SequentialRead, 4, SEQUENTIAL, &[Job::SequentialRead]);
    }
    questions
}
