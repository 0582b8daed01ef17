//! qcow2 through qemu-img, which knows it best.

use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::config::ByteSize;

/// Requests qemu-img keeps in flight.
const DEPTH: &str = "16";

/// Size of the disk inside the qcow2 image at `path`, in bytes.
pub(super) fn virtual_size(path: &Path) -> anyhow::Result<ByteSize> {
    #[derive(Deserialize)]
    struct Info {
        #[serde(rename = "virtual-size")]
        virtual_size: u64,
    }
    let mut command = Command::new("qemu-img");
    command.args(["info", "--output=json", "-f", "qcow2"]).arg(path);
    let output = command.stdin(Stdio::null()).output().map_err(missing)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("qemu-img cannot read {}: {}", path.display(), said.trim());
    }
    let info: Info = serde_json::from_slice(&output.stdout).context("qemu-img info said something unexpected")?;
    Ok(ByteSize(info.virtual_size))
}

/// Copies the qcow2 image at `path` to the NBD export `uri`, which reads as zeroes.
pub(super) fn import(path: &Path, uri: &str, quiet: bool) -> anyhow::Result<()> {
    let mut command = convert(quiet);
    command.args(["-n", "--target-is-zero", "-W", "-f", "qcow2", "-O", "raw"]);
    run(command.arg(path).arg(uri))
}

/// Copies the NBD export `uri` to a new qcow2 image at `path`.
pub(super) fn export(uri: &str, path: &Path, quiet: bool) -> anyhow::Result<()> {
    run(convert(quiet).args(["-f", "raw", "-O", "qcow2"]).arg(uri).arg(path))
}

fn convert(quiet: bool) -> Command {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-m", DEPTH]).stdin(Stdio::null());
    if !quiet && io::stdout().is_terminal() {
        command.arg("-p");
    } else {
        command.stdout(Stdio::null());
    }
    command
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().map_err(missing)?;
    if !status.success() {
        bail!("qemu-img convert failed ({status}); what it said stands above");
    }
    Ok(())
}

fn missing(error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::NotFound => {
            anyhow::anyhow!("qcow2 needs qemu-img, which is not installed (on Debian: apt install qemu-utils)")
        }
        _ => anyhow::Error::from(error).context("cannot run qemu-img"),
    }
}
