//! Making and taking away the mount.
//!
//! Root mounts with mount(2) itself, so that set-id programs and devices work if wanted; others go through
//! `fusermount3`, which forbids both.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use fuser::{Config, MountOption, Session, SessionACL};

use super::FuseOptions;
use super::ops::FuseTree;

/// Why a directory could not be mounted on.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The directory is not there.
    #[error("cannot mount on {directory}: {source}; make the directory first")]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// There is no FUSE.
    #[error("cannot open /dev/fuse: {0}; load the kernel's module fuse, and in a container pass the device in")]
    Device(io::Error),
    /// The kernel or `fusermount3` refused.
    #[error(
        "cannot mount on {directory}: {source}; mounting needs root (CAP_SYS_ADMIN) or the package fuse3, and for other users \
         user_allow_other in /etc/fuse.conf"
    )]
    Refused {
        /// The directory.
        directory: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// No thread.
    #[error("cannot start a thread for FUSE: {0}")]
    Thread(io::Error),
}

/// A mounted tree. Dropping it leaves the mount to its threads.
pub struct Mounted {
    directory: PathBuf,
    session: JoinHandle<io::Result<()>>,
}

/// Takes a mount away, from any thread.
#[derive(Clone, Debug)]
pub struct Stopper {
    directory: PathBuf,
}

impl Mounted {
    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What can take it away while somebody waits in [`Mounted::wait`].
    pub fn stopper(&self) -> Stopper {
        Stopper { directory: self.directory.clone() }
    }

    /// Waits until it is unmounted, by [`Stopper`] or by `umount`, and every request is answered.
    pub fn wait(self) -> io::Result<()> {
        self.session.join().unwrap_or_else(|_| Err(io::Error::other("a thread that serves FUSE panicked")))
    }
}

impl Stopper {
    /// Unmounts. Where files are still open, the tree leaves the directory at once and ends when the last of them
    /// is closed; that is told as `false`.
    pub fn unmount(&self) -> io::Result<bool> {
        match umount(&self.directory, 0) {
            Ok(()) => Ok(true),
            // Somebody else was faster.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                umount(&self.directory, libc::MNT_DETACH).map(|()| false)
            }
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => fusermount(&self.directory),
            Err(error) => Err(error),
        }
    }
}

/// Takes away what an fsd that was killed left mounted there. Whether there was something.
pub fn clear_dead(directory: &Path) -> io::Result<bool> {
    match std::fs::metadata(directory) {
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {
            match umount(directory, libc::MNT_DETACH) {
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => fusermount(directory)?,
                other => other.map(|()| true)?,
            };
            Ok(true)
        }
        _ => Ok(false),
    }
}

pub(super) fn start(tree: FuseTree, directory: PathBuf, options: &FuseOptions) -> Result<Mounted, MountError> {
    let refused = |source| MountError::Refused { directory: directory.clone(), source };
    let turns = tree.turns();
    let mut config = Config::default();
    config.n_threads = Some(options.threads.max(1));
    config.clone_fd = true;
    config.acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
    // SAFETY: no arguments, cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    let session = if root {
        let device = mount_as_root(&directory, options)?;
        Session::from_fd(tree, device, SessionACL::All, config).inspect_err(|_| {
            let _ = umount(&directory, libc::MNT_DETACH);
        })
    } else {
        config.mount_options = vec![
            MountOption::FSName(options.source.clone()),
            MountOption::Subtype("fsd".to_owned()),
            MountOption::DefaultPermissions,
            if options.read_only { MountOption::RO } else { MountOption::RW },
        ];
        Session::new(tree, &directory, &config)
    };
    let session = session.map_err(refused)?;
    turns.set_device(session.as_fd()).map_err(MountError::Device)?;
    let session =
        std::thread::Builder::new().name("fuse".to_owned()).spawn(move || session.run()).map_err(MountError::Thread)?;
    set_read_ahead(&directory, options.read_ahead);
    Ok(Mounted { directory, session })
}

fn mount_as_root(directory: &Path, options: &FuseOptions) -> Result<OwnedFd, MountError> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").map_err(MountError::Device)?;
    let refused = |source| MountError::Refused { directory: directory.to_owned(), source };
    let mode = std::fs::metadata(directory).map_err(refused)?.mode() & libc::S_IFMT;
    let text = format!(
        "fd={},rootmode={mode:o},user_id=0,group_id=0,default_permissions{}",
        device.as_raw_fd(),
        if options.allow_other { ",allow_other" } else { "" }
    );
    let mut flags = 0;
    for (forbidden, flag) in
        [(!options.suid, libc::MS_NOSUID), (!options.dev, libc::MS_NODEV), (options.read_only, libc::MS_RDONLY)]
    {
        flags |= if forbidden { flag } else { 0 };
    }
    let no_nul = |_| refused(io::Error::new(io::ErrorKind::InvalidInput, "a NUL in a name"));
    let source = CString::new(options.source.as_str()).map_err(no_nul)?;
    let target = CString::new(directory.as_os_str().as_bytes()).map_err(no_nul)?;
    let text = CString::new(text).map_err(no_nul)?;
    // SAFETY: all five point to strings that outlive the call.
    let result =
        unsafe { libc::mount(source.as_ptr(), target.as_ptr(), c"fuse.fsd".as_ptr(), flags, text.as_ptr().cast()) };
    if result == 0 { Ok(device.into()) } else { Err(refused(io::Error::last_os_error())) }
}

fn umount(directory: &Path, flags: libc::c_int) -> io::Result<()> {
    let target = CString::new(directory.as_os_str().as_bytes())?;
    // SAFETY: the string outlives the call.
    if unsafe { libc::umount2(target.as_ptr(), flags | libc::UMOUNT_NOFOLLOW) } == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

fn fusermount(directory: &Path) -> io::Result<bool> {
    let status = std::process::Command::new("fusermount3").args(["-u", "-z", "--"]).arg(directory).status()?;
    if status.success() { Ok(true) } else { Err(io::Error::other("fusermount3 could not unmount")) }
}

/// The kernel reads no more than 128 KiB ahead unless told to, and only root can tell it.
fn set_read_ahead(directory: &Path, bytes: u64) {
    let result = std::fs::metadata(directory).and_then(|mounted| {
        let (major, minor) = (libc::major(mounted.dev()), libc::minor(mounted.dev()));
        std::fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), format!("{}", bytes >> 10))
    });
    if let Err(error) = result {
        tracing::debug!(%error, "the kernel's read-ahead stays as it is");
    }
}
