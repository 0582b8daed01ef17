//! `blockd attach --ublk`, and `blockd detach` of such a device.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};

use super::{
    AttachArgs, DEVICE_PATIENCE, Named, announce, check_size, in_background, in_use, need_root, no_volume, server_of,
    signals, stay_alive,
};
use crate::attach::device::{claim, mounts_of, wait_ready};
use crate::attach::place::{self, Lock};
use crate::attach::server::Server;
use crate::attach::ublk::device::Device;
use crate::attach::ublk::queue::Target;
use crate::attach::ublk::{self, Served, Setup};
use crate::export::nbd::proto::transmission;

/// How often the keeper looks whether somebody else has taken the device away.
const ROUND: Duration = Duration::from_secs(1);
/// By these `blockd detach` ends a keeper whose device is written out and not in use, or whatever its state.
const END: libc::c_int = libc::SIGUSR1;
const END_BY_FORCE: libc::c_int = libc::SIGUSR2;

pub(super) fn attach(args: &AttachArgs) -> anyhow::Result<()> {
    let wanted = match args.device {
        None => None,
        Some(Named::Ublk(device)) => Some(device),
        Some(Named::Nbd(device)) => bail!("{device} is an NBD device; with --ublk, name one like /dev/ublkb0, or none"),
    };
    driver()?;
    let server = server_of(args)?;
    if !matches!(server, Server::Unix(_)) {
        bail!(
            "--ublk attaches volumes of a daemon on this machine, over its Unix socket, and {server} is not one; give it with \
             --server unix:/PATH, or attach without --ublk"
        );
    }
    if !args.foreground && !args.keeper {
        return in_background(args, &server);
    }
    let signals = signals(&[END, END_BY_FORCE])?;
    let (first, found) = server.client(&args.volume).map_err(|error| no_volume(args, &server, error))?;
    check_size(&found, args.block_size)?;
    refuse_twice(&args.volume, &server)?;
    let several = found.flags & transmission::CAN_MULTI_CONN != 0;
    let queues = if several { args.connections.into() } else { 1 };
    let added = ublk::add(&Setup { device: wanted, queues }).map_err(|error| refused_device(args, wanted, error))?;
    let device = added.device();
    let mut clients = vec![first];
    while clients.len() < added.queues() {
        let (client, again) = server.client(&args.volume).map_err(|error| no_volume(args, &server, error))?;
        if again != found {
            bail!("volume {} changed while it was being attached; try again", args.volume);
        }
        clients.push(client);
    }
    // A daemon that takes long is waited for.
    clients.iter_mut().for_each(|client| client.set_timeout(None));
    let mut lock =
        Lock::take_in_time(&device.name(), DEVICE_PATIENCE).with_context(|| format!("cannot look after {device}"))?;
    Device::note(&mut lock, &args.volume, &server.to_string())?;
    let target = Arc::new(Target {
        server: server.clone(),
        volume: args.volume.clone(),
        id: found.id,
        size: found.size,
        device: device.to_string(),
    });
    let served = added
        .serve(&target, args.block_size, clients)
        .with_context(|| format!("the kernel does not attach volume {}", args.volume))?;
    let ready = wait_ready(&device.path(), found.size, DEVICE_PATIENCE)
        .with_context(|| format!("{device} does not get ready"))
        .and_then(|()| announce(args, &device.path(), &place::log_path(&device.name()), &server, found.size));
    if let Err(error) = ready {
        // Nobody has used it yet; the first error is what matters.
        let _ = served.end();
        return Err(error);
    }
    stay_alive();
    keep(device, served, &signals)?;
    drop(lock);
    Ok(())
}

/// The kernel's driver, loading its module if need be.
fn driver() -> anyhow::Result<()> {
    need_root()?;
    if ublk::is_loaded() {
        return Ok(());
    }
    let loaded = Command::new("modprobe").arg("ublk_drv").stdin(Stdio::null()).output();
    if ublk::is_loaded() {
        return Ok(());
    }
    let why = match loaded {
        Ok(output) if output.status.success() => format!("there is no {}", ublk::CONTROL),
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim_end().to_owned(),
        Err(error) => format!("modprobe does not run: {error}"),
    };
    bail!(
        "this kernel has no ublk: its module ublk_drv cannot be loaded: {why}. Use a kernel that has it (`modprobe ublk_drv`; Linux \
         6.0 or newer; in a container, load it on the host), or attach without --ublk"
    )
}

fn refuse_twice(volume: &str, server: &Server) -> anyhow::Result<()> {
    let server = server.to_string();
    for (device, attachment) in Device::attached() {
        if attachment.volume == volume && attachment.server == server {
            bail!("volume {volume} is attached as {device} already; process {} looks after it", attachment.pid);
        }
    }
    Ok(())
}

fn refused_device(args: &AttachArgs, wanted: Option<Device>, error: io::Error) -> anyhow::Error {
    match (error.raw_os_error(), wanted) {
        (Some(libc::EEXIST), Some(device)) => {
            let of = match device.attachment() {
                Some(attachment) => format!("volume {} is attached there", attachment.volume),
                None => "another ublk server has it".into(),
            };
            anyhow!("{device} is in use: {of}; choose another device, or name none to get one that is free")
        }
        (Some(libc::EPERM | libc::EACCES), _) => {
            anyhow!("the kernel does not allow it; attaching devices needs CAP_SYS_ADMIN")
        }
        _ => anyhow!(error).context(format!("the kernel does not attach volume {}", args.volume)),
    }
}

/// Waits for the device's end.
fn keep(device: Device, served: Served, signals: &OwnedFd) -> anyhow::Result<()> {
    let failed = || format!("the kernel does not detach {device}");
    loop {
        if served.is_over() {
            return served.end().with_context(failed);
        }
        match next_signal(signals)? {
            None => {}
            Some(END) => return served.end().with_context(failed),
            Some(END_BY_FORCE) => return served.end_by_force().with_context(failed),
            Some(_) => match write_out(device) {
                // Nobody else can mount it before it is gone.
                Ok(_claimed) => return served.end().with_context(failed),
                Err(error) => drop(writeln!(io::stderr(), "blockd: {}", crate::program::explain(&error))),
            },
        }
    }
}

/// Waits for a signal, but not long.
fn next_signal(signals: &OwnedFd) -> io::Result<Option<libc::c_int>> {
    let mut poll = libc::pollfd { fd: signals.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: `poll` is one valid pollfd, alive over the call.
    unsafe { libc::poll(&raw mut poll, 1, ROUND.as_millis() as libc::c_int) };
    // SAFETY: the structure consists of numbers, for which all zeroes is a value.
    let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is alive and as long as said; the descriptor does not wait.
    let read = unsafe { libc::read(signals.as_raw_fd(), (&raw mut info).cast(), size_of_val(&info)) };
    if read == size_of_val(&info) as isize {
        return Ok(Some(info.ssi_signo as libc::c_int));
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
        _ => Err(error),
    }
}

/// Writes out what the page cache holds of a device that nobody uses, and keeps others from using it.
fn write_out(device: Device) -> anyhow::Result<File> {
    match claim(&device.path()) {
        Ok(claimed) => {
            claimed.sync_all().with_context(|| format!("cannot write out {device}"))?;
            Ok(claimed)
        }
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let name = device.to_string();
            Err(in_use(&name, &mounts_of(&name)))
        }
        Err(error) => Err(anyhow!(error).context(format!("cannot open {device}"))),
    }
}

/// The ublk device that is meant by the name of a device or volume; `None`: it may be an NBD device.
pub(super) fn named(text: &str) -> anyhow::Result<Option<Device>> {
    if let Some(device) = Device::parse(text) {
        return match (device.attachment(), device.exists()) {
            (Some(_), _) => Ok(Some(device)),
            (None, true) => bail!("{device} was not attached by blockd; detach it with what attached it"),
            (None, false) => bail!("{device} is not attached"),
        };
    }
    let all = Device::attached();
    let mut names: Vec<Device> = all.iter().filter(|(_, of)| of.volume == text).map(|(device, _)| *device).collect();
    let others = place::Backend::devices_of(text);
    match (names.len(), others.len()) {
        (0, _) => Ok(None),
        (1, 0) => Ok(names.pop()),
        _ => {
            let mut names: Vec<String> = names.iter().map(Device::to_string).collect();
            names.extend(others.iter().map(|(device, _)| device.to_string()));
            bail!("volume {text} is attached several times; name the device: {}", names.join(", "))
        }
    }
}

/// Ends a device: with `force` whatever becomes of what is not written.
pub(super) fn detach(device: Device, force: bool) -> anyhow::Result<()> {
    let claimed = if force { None } else { Some(write_out(device)?) };
    let keeper = device.attachment().with_context(|| format!("{device} is not attached any more"))?.pid;
    let signal = if force { END_BY_FORCE } else { END };
    // SAFETY: plain system call.
    if unsafe { libc::kill(keeper, signal) } < 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("cannot end the keeper, process {keeper}"));
    }
    let gone = device.wait_gone(DEVICE_PATIENCE);
    // Its keeper waits until nobody has it open.
    drop(claimed);
    if !gone || !device.wait_let_go(DEVICE_PATIENCE) {
        let _ =
            writeln!(io::stderr(), "blockd: {device} is being detached; it is gone when nobody has it open any more");
    }
    Ok(())
}
