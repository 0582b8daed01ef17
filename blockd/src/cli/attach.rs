//! `blockd attach` and `blockd detach`: volumes as block devices of this machine.

mod ublk;

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use serde::Serialize;

use super::volume::parse_name;
use super::{ClientArgs, block_on};
use crate::attach::device::Device;
use crate::attach::keeper::{End, Keeper};
use crate::attach::kernel::{Kernel, Setup};
use crate::attach::place::{self, Backend, Lock, LockError};
use crate::attach::server::{self, Found, Server};
use crate::attach::ublk::device::Device as UblkDevice;
use crate::config::Interval;
use crate::export::nbd::proto::transmission;
use crate::program::text::bytes;
use crate::program::{print, print_json};

/// How long a device may take to appear or to go.
const DEVICE_PATIENCE: Duration = Duration::from_secs(10);
/// How long requests wait for the server when nobody says: so long that nobody will see the end of it.
const FOREVER_SECONDS: u64 = 10 * 365 * 86400;
/// From linux/prctl.h.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  blockd attach disk                                   any free device, from the daemon on this machine\n  blockd attach disk /dev/nbd0 --server 10.0.0.5:10809 from another machine\n  blockd attach image --block-size 512                 a disk image with a partition table\n  blockd attach disk --ublk                            /dev/ublkbN, from the daemon on this machine\n\nA keeper process stays behind the device. If the daemon goes away, I/O waits until it is back; the device and what is\nmounted from it stay. If the keeper itself was killed, attach again: the device is adopted.\nWith --ublk the keeper serves the device itself, and the device ends with it."
)]
pub(super) struct AttachArgs {
    /// The volume
    #[arg(value_parser = parse_name)]
    volume: String,

    /// The device [default: one that is free]
    #[arg(value_parser = parse_device)]
    device: Option<Named>,

    /// Make it /dev/ublkbN instead of /dev/nbdN: what was under way when the daemon went away goes on as soon as it is back;
    /// only from the daemon on this machine, over its Unix socket
    #[arg(long)]
    ublk: bool,

    /// The NBD server: HOST:PORT or unix:/PATH [default: the daemon's own]
    #[arg(long, value_name = "ADDRESS", help_heading = "Connections")]
    server: Option<Server>,

    /// Connections to the server
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=16), help_heading = "Connections")]
    connections: u8,

    /// A request that gets no answer for so long is sent again on another connection. Bounds how long I/O that was under
    /// way when the daemon went away waits after it is back
    #[arg(long, value_name = "TIME", default_value = "10s", conflicts_with = "ublk", help_heading = "Connections")]
    timeout: Interval,

    /// I/O fails when there was no connection for so long [default: never]
    #[arg(long, value_name = "TIME", conflicts_with = "ublk", help_heading = "Connections")]
    dead_timeout: Option<Interval>,

    /// Logical block size: 4096 is what volumes are made of; 512 is for images with partitions or filesystems made for it
    #[arg(long, value_name = "BYTES", default_value_t = 4096, value_parser = parse_block_size)]
    block_size: u32,

    /// Stay in the foreground and say when the device is ready (also to systemd)
    #[arg(long)]
    foreground: bool,

    /// Be the keeper of a `blockd attach` that waits for the device
    #[arg(long, hide = true)]
    keeper: bool,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args, Debug)]
pub(super) struct DetachArgs {
    /// The volume or the device
    volume_or_device: String,

    /// Even though it is mounted or otherwise in use, and without waiting for what is not written yet: that is lost
    #[arg(long)]
    force: bool,
}

/// What `blockd attach --json` prints.
#[derive(Serialize)]
struct Attached {
    device: String,
    volume: String,
    server: String,
    size: u64,
    /// The process that looks after it.
    keeper: u32,
}

/// A device as it is named on the command line.
#[derive(Clone, Copy, Debug)]
enum Named {
    Nbd(Device),
    Ublk(UblkDevice),
}

fn parse_device(text: &str) -> Result<Named, String> {
    let nbd = Device::parse(text).map(Named::Nbd);
    nbd.or_else(|| UblkDevice::parse(text).map(Named::Ublk))
        .ok_or_else(|| "expected a device like /dev/nbd0, or with --ublk like /dev/ublkb0".into())
}

impl AttachArgs {
    fn nbd_device(&self) -> Option<Device> {
        match self.device {
            Some(Named::Nbd(device)) => Some(device),
            _ => None,
        }
    }
}

fn parse_block_size(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(size @ (512 | 1024 | 2048 | 4096)) => Ok(size),
        _ => Err("expected 512, 1024, 2048 or 4096".into()),
    }
}

pub(super) fn attach(args: AttachArgs) -> anyhow::Result<()> {
    if args.ublk {
        return ublk::attach(&args);
    }
    if let Some(Named::Ublk(device)) = args.device {
        bail!("{device} is a ublk device; give --ublk to attach as one");
    }
    let mut kernel = kernel()?;
    let server = server_of(&args)?;
    if !args.foreground && !args.keeper {
        return in_background(&args, &server);
    }
    let signals = signals(&[])?;
    let mut sockets = Vec::new();
    let (first, found) = server.connect(&args.volume).map_err(|error| no_volume(&args, &server, error))?;
    sockets.push(first);
    check_size(&found, args.block_size)?;
    let several = found.flags & transmission::CAN_MULTI_CONN != 0;
    let wanted = if several { usize::from(args.connections) } else { 1 };
    while sockets.len() < wanted {
        let (socket, again) = server.connect(&args.volume).map_err(|error| no_volume(&args, &server, error))?;
        if again != found {
            bail!("volume {} changed while it was being attached; try again", args.volume);
        }
        sockets.push(socket);
    }
    let place = match attached_already(&mut kernel, &args, &server)? {
        Some((device, backend, lock)) => adopt(&mut kernel, device, backend, lock, sockets)?,
        None => set_up(&mut kernel, &args, &server, &found, sockets)?,
    };
    let Place { device, backend, held, unknown, size, lock } = place;
    announce(&args, &device.path(), &place::log_path(&device.name()), &server, size)?;
    stay_alive();
    let id = found.id;
    let say = Box::new(|text: &str| drop(writeln!(io::stderr(), "blockd: {text}")));
    let mut keeper = Keeper::new(kernel, device, backend.clone(), server, id, size, held, unknown, say);
    loop {
        match keeper.run(&signals)? {
            End::Gone => break,
            End::Signalled => {
                forget_signals(&signals);
                match end_device(device, &backend, false) {
                    Ok(()) => break,
                    // Without its keeper the device would not outlive the daemon.
                    Err(error) => {
                        let _ = writeln!(io::stderr(), "blockd: {}", crate::program::explain(&error));
                    }
                }
            }
        }
    }
    drop(lock);
    Ok(())
}

pub(super) fn detach(args: &DetachArgs) -> anyhow::Result<()> {
    need_root()?;
    if let Some(device) = ublk::named(&args.volume_or_device)? {
        return ublk::detach(device, args.force);
    }
    let (device, backend) = match Device::parse(&args.volume_or_device) {
        Some(device) => match Backend::of(device) {
            Some(backend) => (device, backend),
            None if device.is_connected() => {
                bail!("{device} was not attached by blockd; detach it with what attached it (nbd-client -d {device})")
            }
            None => bail!("{device} is not attached"),
        },
        None => match &Backend::devices_of(&args.volume_or_device)[..] {
            [(device, backend)] => (*device, backend.clone()),
            [] => bail!("volume {} is not attached to this machine", args.volume_or_device),
            several => {
                let names: Vec<String> = several.iter().map(|(device, _)| device.to_string()).collect();
                bail!(
                    "volume {} is attached several times; name the device: {}",
                    args.volume_or_device,
                    names.join(", ")
                )
            }
        },
    };
    end_device(device, &backend, args.force)
}

/// A device that is set up, and the connections it has.
struct Place {
    device: Device,
    backend: Backend,
    held: Vec<OwnedFd>,
    unknown: usize,
    size: u64,
    lock: Lock,
}

/// The kernel's NBD client, loading its module if need be.
fn kernel() -> anyhow::Result<Kernel> {
    need_root()?;
    if let Some(kernel) = Kernel::open().context("cannot talk to the kernel over netlink")? {
        return Ok(kernel);
    }
    let loaded = Command::new("modprobe").arg("nbd").stdin(Stdio::null()).output();
    if let Some(kernel) = Kernel::open().context("cannot talk to the kernel over netlink")? {
        return Ok(kernel);
    }
    let why = match loaded {
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim_end().to_owned(),
        Err(error) => format!("modprobe does not run: {error}"),
    };
    bail!(
        "this kernel has no NBD client: its module nbd cannot be loaded{}{why}. Use a kernel that has it (Debian's and Ubuntu's \
         do; in a container, load it on the host)",
        if why.is_empty() { "" } else { ": " }
    )
}

fn need_root() -> anyhow::Result<()> {
    // SAFETY: plain system call.
    if unsafe { libc::geteuid() } != 0 {
        bail!("attaching and detaching devices needs root; run it with sudo");
    }
    Ok(())
}

fn server_of(args: &AttachArgs) -> anyhow::Result<Server> {
    if let Some(server) = &args.server {
        return Ok(server.clone());
    }
    let client = args.client.client();
    let (info, volume) = block_on(async { Ok((client.info().await?, client.volume(&args.volume).await?)) })
        .context("no --server is given, so the daemon was asked")?;
    if volume.uris.is_empty() {
        let why = volume.info.error.map(|error| format!(": {error}")).unwrap_or_default();
        bail!("volume {} is not open here{why}; `blockd volume show {}` says more", args.volume, args.volume);
    }
    let unix = info.nbd_unix.map(|path| std::path::absolute(info.data.join(path))).transpose()?.map(Server::Unix);
    let tcp = info.nbd_tcp.first().map(|address| Server::Tcp(address.to_string()));
    unix.or(tcp)
        .ok_or_else(|| anyhow!("the daemon does not listen for NBD clients; start it with --nbd-unix or --nbd-tcp"))
}

fn no_volume(args: &AttachArgs, server: &Server, error: io::Error) -> anyhow::Error {
    match (error.kind(), server) {
        (io::ErrorKind::NotFound, Server::Unix(path)) if !path.exists() => {
            anyhow!("no NBD server is at {server}; start the daemon, or give its address with --server")
        }
        (io::ErrorKind::NotFound, _) => anyhow!(
            "the server {server} exports no volume {}; `blockd volume list` says which there are, and which are not open",
            args.volume
        ),
        (io::ErrorKind::ConnectionRefused, _) => {
            anyhow!("no NBD server answers at {server}; start the daemon, or give its address with --server")
        }
        _ => anyhow!(error).context(format!("cannot connect to volume {} at {server}", args.volume)),
    }
}

fn check_size(found: &Found, block_size: u32) -> anyhow::Result<()> {
    if found.size == 0 || !found.size.is_multiple_of(block_size.into()) {
        bail!(
            "its size of {} bytes is not a multiple of the block size of {block_size}; choose another --block-size",
            found.size
        );
    }
    Ok(())
}

/// The device that has the volume from this server already. It may be adopted if its keeper is dead.
fn attached_already(
    kernel: &mut Kernel,
    args: &AttachArgs,
    server: &Server,
) -> anyhow::Result<Option<(Device, Backend, Lock)>> {
    let server = server.to_string();
    let devices = Backend::devices_of(&args.volume).into_iter().filter(|(_, backend)| backend.server == server);
    for (device, backend) in devices {
        match kernel.set_timeouts(device.0, &backend.text, timeout_seconds(args), dead_seconds(args)) {
            // Detached already, and only still open somewhere.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => continue,
            other => other.with_context(|| format!("cannot adopt {device}"))?,
        }
        let lock = Lock::take(&device.name()).map_err(|error| match error {
            LockError::Held(pid) => {
                anyhow!("volume {} is attached as {device} already; process {pid} looks after it", args.volume)
            }
            other => anyhow!(other),
        })?;
        if let Some(asked) = args.nbd_device().filter(|asked| *asked != device) {
            bail!(
                "volume {} is attached as {device} already; detach it there before attaching it as {asked}",
                args.volume
            );
        }
        return Ok(Some((device, backend, lock)));
    }
    Ok(None)
}

fn adopt(
    kernel: &mut Kernel,
    device: Device,
    backend: Backend,
    lock: Lock,
    sockets: Vec<OwnedFd>,
) -> anyhow::Result<Place> {
    let size = device.size().with_context(|| format!("{device} has no size"))?;
    let wanted = sockets.len();
    let mut held = Vec::new();
    for socket in sockets {
        kernel.offer(device.0, &backend.text, socket.as_fd()).with_context(|| format!("cannot adopt {device}"))?;
        if !server::is_taken(&socket)? {
            break;
        }
        held.push(socket);
    }
    let unknown = wanted - held.len();
    Ok(Place { device, backend, held, unknown, size, lock })
}

fn set_up(
    kernel: &mut Kernel,
    args: &AttachArgs,
    server: &Server,
    found: &Found,
    sockets: Vec<OwnedFd>,
) -> anyhow::Result<Place> {
    let backend = Backend::new(&args.volume, server);
    let borrowed: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
    let setup = Setup {
        index: args.nbd_device().map(|device| device.0),
        size: found.size,
        block_size: args.block_size,
        flags: found.flags,
        timeout_seconds: timeout_seconds(args),
        dead_seconds: dead_seconds(args),
        backend: &backend.text,
        sockets: &borrowed,
    };
    let index = kernel.connect(&setup).map_err(|error| refused_device(args, error))?;
    let device = Device(index);
    let finish = || {
        let lock = Lock::take_in_time(&device.name(), DEVICE_PATIENCE)
            .with_context(|| format!("cannot look after {device}"))?;
        // Since 5.14 the kernel keeps the text by which a keeper knows its device.
        if device.backend().as_deref() != Some(&backend.text) {
            bail!("this kernel is too old for attached devices that survive restarts; it must be Linux 5.14 or newer");
        }
        device.wait_ready(found.size, DEVICE_PATIENCE).with_context(|| format!("{device} does not get ready"))?;
        anyhow::Ok(lock)
    };
    match finish() {
        Ok(lock) => Ok(Place { device, backend, held: sockets, unknown: 0, size: found.size, lock }),
        Err(error) => {
            // Nobody has used it yet; the first error is what matters.
            let _ = kernel.disconnect(index);
            Err(error)
        }
    }
}

fn refused_device(args: &AttachArgs, error: io::Error) -> anyhow::Error {
    match (error.raw_os_error(), args.nbd_device()) {
        (Some(libc::EBUSY), Some(device)) => {
            let of = match Backend::of(device) {
                Some(backend) => format!("volume {} is attached there", backend.volume),
                None => "another NBD client has it".into(),
            };
            anyhow!("{device} is in use: {of}; choose another device, or name none to get one that is free")
        }
        (Some(libc::EPERM), _) => anyhow!("the kernel does not allow it; attaching devices needs CAP_SYS_ADMIN"),
        _ => anyhow!(error).context(format!("the kernel does not attach volume {}", args.volume)),
    }
}

fn timeout_seconds(args: &AttachArgs) -> u64 {
    // 0 would mean that requests of a lost connection are never sent again.
    (args.timeout.0.as_millis().div_ceil(1000) as u64).clamp(1, 7 * 86400)
}

fn dead_seconds(args: &AttachArgs) -> u64 {
    args.dead_timeout.map_or(FOREVER_SECONDS, |time| time.0.as_secs().clamp(1, FOREVER_SECONDS))
}

/// Starts ourselves as a keeper and waits until it says that the device is ready.
fn in_background(args: &AttachArgs, server: &Server) -> anyhow::Result<()> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("blockd").args(["attach", &args.volume]);
    command.args(args.device.map(|device| match device {
        Named::Nbd(device) => device.to_string(),
        Named::Ublk(device) => device.to_string(),
    }));
    command.arg("--server").arg(server.to_string());
    command.arg("--connections").arg(args.connections.to_string());
    if args.ublk {
        command.arg("--ublk");
    } else {
        command.arg("--timeout").arg(args.timeout.to_string());
    }
    if let Some(time) = args.dead_timeout {
        command.arg("--dead-timeout").arg(time.to_string());
    }
    command.arg("--block-size").arg(args.block_size.to_string()).arg("--keeper");
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut keeper = command.spawn().context("cannot start the keeper")?;
    let mut line = String::new();
    BufReader::new(keeper.stdout.take().expect("it is piped")).read_line(&mut line)?;
    let Some((device, size)) = line.trim_end().split_once(' ') else {
        // It has said why.
        let status = keeper.wait()?;
        std::process::exit(status.code().unwrap_or(1));
    };
    if args.client.json {
        return print_json(&Attached {
            device: device.to_owned(),
            volume: args.volume.clone(),
            server: server.to_string(),
            size: size.parse()?,
            keeper: keeper.id(),
        });
    }
    print(&format!("{device}\n"))
}

/// Says that the device is ready, to whoever waits for that.
fn announce(args: &AttachArgs, device: &Path, log: &Path, server: &Server, size: u64) -> anyhow::Result<()> {
    let device = device.display();
    if !args.keeper {
        if args.client.json {
            print_json(&Attached {
                device: device.to_string(),
                volume: args.volume.clone(),
                server: server.to_string(),
                size,
                keeper: std::process::id(),
            })?;
        } else {
            print(&format!("{device}\n"))?;
        }
        let _ = writeln!(io::stderr(), "blockd: volume {} ({}) is {device}", args.volume, bytes(size));
        crate::program::notify("READY=1");
        return Ok(());
    }
    // Nobody's session is ours from here on.
    // SAFETY: plain system call; it fails if we lead one already, which is as good.
    unsafe { libc::setsid() };
    let log = OpenOptions::new().create(true).append(true).open(log)?;
    let null = OpenOptions::new().write(true).open("/dev/null")?;
    become_fd(&log, libc::STDERR_FILENO)?;
    print(&format!("{device} {size}\n"))?;
    become_fd(&null, libc::STDOUT_FILENO)?;
    Ok(())
}

/// Puts an open file in the place of a standard stream.
fn become_fd(file: &File, stream: libc::c_int) -> io::Result<()> {
    // SAFETY: both are open descriptors; what stood at `stream` is closed.
    if unsafe { libc::dup2(file.as_raw_fd(), stream) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The keeper must work when the machine waits for its own device: it must not be paged out, reclaim memory by I/O, be
/// chosen when memory runs out, or keep a mount busy. Each is refused on some machines, which only costs that safety.
fn stay_alive() {
    let _ = std::env::set_current_dir("/");
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    // SAFETY: plain system calls.
    unsafe {
        libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT);
        libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
    }
}

/// A descriptor that can be read when we are asked to end, or one of `more` comes. From now on these signals do nothing else.
fn signals(more: &[libc::c_int]) -> anyhow::Result<OwnedFd> {
    // SAFETY: the set is written by the first call before it is read; the rest are plain system calls on it.
    let fd = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        libc::sigaddset(&raw mut set, libc::SIGHUP);
        for signal in more {
            libc::sigaddset(&raw mut set, *signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error()).context("cannot listen for signals");
    }
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn forget_signals(signals: &OwnedFd) {
    let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
    // SAFETY: `info` is alive and may be written over the call, which does not wait.
    while unsafe { libc::read(signals.as_raw_fd(), info.as_mut_ptr().cast(), info.len()) } > 0 {}
}

/// Ends a device: with `force` whatever becomes of what is not written.
fn end_device(device: Device, backend: &Backend, force: bool) -> anyhow::Result<()> {
    let mut kernel = kernel()?;
    if force {
        wake_waiting(&mut kernel, device, backend)?;
        kernel.disconnect(device.0).with_context(|| format!("the kernel does not detach {device}"))?;
    } else {
        match device.claim() {
            // Nobody else can mount it before it is disconnected, and it is not gone before it is closed.
            Ok(claimed) => {
                claimed.sync_all().with_context(|| format!("cannot write out {device}"))?;
                kernel.disconnect(device.0).with_context(|| format!("the kernel does not detach {device}"))?;
            }
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                return Err(in_use(&device.to_string(), &device.mounts()));
            }
            Err(error) => return Err(anyhow!(error).context(format!("cannot open {device}"))),
        }
    }
    if !device.wait_gone(Some(&backend.text), DEVICE_PATIENCE) {
        let _ = writeln!(
            io::stderr(),
            "blockd: {device} is disconnected; it can be used again when nobody has it open any more"
        );
    }
    Ok(())
}

fn in_use(device: &str, mounts: &[String]) -> anyhow::Error {
    let by = if mounts.is_empty() { String::new() } else { format!(": it is mounted on {}", mounts.join(", ")) };
    anyhow!("{device} is in use{by}; unmount it first, or use --force and lose what is not written yet")
}

/// Requests that wait for a connection only look up when one comes. This one leads nowhere.
fn wake_waiting(kernel: &mut Kernel, device: Device, backend: &Backend) -> anyhow::Result<()> {
    let (ours, _theirs) = UnixStream::pair()?;
    kernel.offer(device.0, &backend.text, ours.as_fd()).with_context(|| format!("cannot detach {device}"))
}
