//! What is done with any server's process and what it said.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long a server may take until it accepts connections.
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a server may take to end when asked, before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// Ends it with SIGTERM and waits for it to finish in order.
///
/// # Errors
/// It does not in time; then it is killed.
pub(crate) fn stop(mut child: Child, name: &str) -> Result<ExitStatus> {
    // SAFETY: kill takes plain numbers; the child is ours and not yet waited for, so its id is not reused.
    unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) };
    let deadline = Instant::now() + STOP_TIMEOUT;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            bail!("{name} did not end within {STOP_TIMEOUT:?} of SIGTERM");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// The last lines of a log.
pub(crate) fn tail(log: &Path) -> String {
    let log = std::fs::read(log).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// A TCP port of the loopback interface that was free a moment ago.
pub(crate) fn free_port() -> io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}

/// A program that was built beside this one.
///
/// # Errors
/// It was not.
pub(crate) fn beside_us(name: &str) -> Result<PathBuf> {
    let mut program = std::env::current_exe()?;
    program.set_file_name(name);
    // Tests run from target/release/deps.
    if !program.exists()
        && let Some(parent) = program.parent().and_then(|dir| dir.parent())
    {
        program = parent.join(name);
    }
    if !program.exists() {
        bail!("there is no {}; build it with: cargo build --release --workspace", program.display());
    }
    Ok(program)
}
