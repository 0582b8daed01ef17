//! fio on a plain file of the same disk: what the disk itself gives.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// A way to use the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// 4 KiB random writes through the page cache, fdatasync after each, depth 1.
    BufferedWriteSync,
    /// 4 KiB random O_DIRECT writes, fdatasync after each, depth 1.
    DirectWriteSync,
    /// 1 MiB sequential O_DIRECT writes, depth 8.
    SequentialWrite,
    /// 1 MiB sequential O_DIRECT reads, depth 8.
    SequentialRead,
}

impl Job {
    /// What tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Job::BufferedWriteSync => "fio write+fdatasync",
            Job::DirectWriteSync => "fio O_DIRECT write+fdatasync",
            Job::SequentialWrite => "fio O_DIRECT write 1 MiB",
            Job::SequentialRead => "fio O_DIRECT read 1 MiB",
        }
    }

    fn args(self) -> &'static [&'static str] {
        match self {
            Job::BufferedWriteSync => &["--rw=randwrite", "--bs=4k", "--fdatasync=1", "--ioengine=psync"],
            Job::DirectWriteSync => &["--rw=randwrite", "--bs=4k", "--fdatasync=1", "--ioengine=psync", "--direct=1"],
            Job::SequentialWrite => &["--rw=write", "--bs=1M", "--ioengine=io_uring", "--iodepth=8", "--direct=1"],
            Job::SequentialRead => &["--rw=read", "--bs=1M", "--ioengine=io_uring", "--iodepth=8", "--direct=1"],
        }
    }
}

/// A file for fio to work on, fully written.
pub struct Fio {
    file: tempfile::TempPath,
    size_bytes: u64,
}

impl Fio {
    /// Writes a file of `size_bytes` in `dir`.
    pub fn prepare(dir: &Path, size_bytes: u64) -> Result<Self> {
        let file = tempfile::Builder::new().prefix("fio-").tempfile_in(dir)?.into_temp_path();
        let fio = Self { file, size_bytes };
        fio.fio(&["--rw=write", "--bs=1M", "--direct=1", "--end_fsync=1", "--ioengine=psync"])?;
        Ok(fio)
    }

    /// Runs a job; operations per second.
    pub fn run(&self, job: Job, time: Duration) -> Result<f64> {
        let runtime = format!("--runtime={}ms", time.as_millis());
        let mut args = vec!["--time_based", "--ramp_time=200ms", &runtime];
        args.extend(job.args());
        let result = self.fio(&args)?;
        let side = if job == Job::SequentialRead { "read" } else { "write" };
        result["jobs"][0][side]["iops"].as_f64().context("no iops in what fio printed")
    }

    fn fio(&self, args: &[&str]) -> Result<Value> {
        let mut command = Command::new("fio");
        command.args(["--name=bench", "--output-format=json", "--randrepeat=0", "--norandommap"]);
        command.arg(format!("--filename={}", self.file.display()));
        command.arg(format!("--size={}", self.size_bytes)).args(args);
        let output = command.output().context("cannot run fio; scripts/setup installs it")?;
        if !output.status.success() {
            bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr));
        }
        // fio may print notes before the JSON.
        let text = String::from_utf8_lossy(&output.stdout);
        let json = text.find('{').map(|at| &text[at..]).unwrap_or_default();
        serde_json::from_str(json).with_context(|| format!("{command:?} did not print JSON"))
    }
}
