//! What a device's backend text says, and the lock of the keeper that looks after it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::device::Device;
use super::server::Server;

/// Where the keepers' locks and messages are.
pub const RUN_DIR: &str = "/run/blockd";
/// How often a lock that is held is tried again.
const PAUSE: Duration = Duration::from_millis(50);

/// What a device is attached to: the text `blockd:VOLUME@SERVER#NONCE` that the kernel keeps with it. The nonce tells two
/// attachments of the same volume apart, so that the keeper of one cannot take the other for its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// The volume's name.
    pub volume: String,
    /// Where it is served.
    pub server: String,
    /// The whole text.
    pub text: String,
}

impl Backend {
    /// The text of a new attachment.
    pub fn new(volume: &str, server: &Server) -> Self {
        let nonce = uuid::Uuid::new_v4().simple().to_string();
        let text = format!("blockd:{volume}@{server}#{}", &nonce[..12]);
        Self { volume: volume.to_owned(), server: server.to_string(), text }
    }

    /// Reads the text of a device; `None` if blockd did not attach it.
    pub fn parse(text: &str) -> Option<Self> {
        let (volume, rest) = text.strip_prefix("blockd:")?.split_once('@')?;
        let (server, _) = rest.rsplit_once('#')?;
        Some(Self { volume: volume.to_owned(), server: server.to_owned(), text: text.to_owned() })
    }

    /// That of a device.
    pub fn of(device: Device) -> Option<Self> {
        device.backend().and_then(|text| Self::parse(&text))
    }

    /// The devices that `volume` is attached as.
    pub fn devices_of(volume: &str) -> Vec<(Device, Self)> {
        let all = Device::all().into_iter().filter_map(|device| Some((device, Self::of(device)?)));
        all.filter(|(_, backend)| backend.volume == volume).collect()
    }
}

/// Held by the keeper of a device as long as it lives.
pub struct Lock(File);

/// Somebody else keeps the device.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// A living keeper does.
    #[error("process {0} looks after it")]
    Held(String),
    /// The lock cannot be had.
    #[error("cannot lock {0}: {1}")]
    Io(PathBuf, io::Error),
}

impl Lock {
    /// [`Self::take`], waiting for a keeper that is about to end.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn take_in_time(device: &str, patience: Duration) -> Result<Self, LockError> {
        let begun = Instant::now();
        loop {
            match Self::take(device) {
                Err(LockError::Held(_)) if begun.elapsed() < patience => std::thread::sleep(PAUSE),
                other => return other,
            }
        }
    }

    /// Takes the lock of a device, given its name (`nbd0`).
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn take(device: &str) -> Result<Self, LockError> {
        let path = lock_path(device);
        let failed = |error| LockError::Io(path.clone(), error);
        fs::create_dir_all(RUN_DIR).map_err(failed)?;
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        // SAFETY: plain system call on a descriptor we own.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::WouldBlock {
                return Err(failed(error));
            }
            let mut pid = String::new();
            file.read_to_string(&mut pid).map_err(failed)?;
            return Err(LockError::Held(pid.trim_end().to_owned()));
        }
        file.set_len(0).and_then(|()| file.rewind()).map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self(file))
    }

    /// Adds a line to what [`held_lines`] returns.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn note(&mut self, line: &str) -> io::Result<()> {
        writeln!(self.0, "{line}")
    }
}

/// What the keeper of a device has written into its lock, the first line being its process; `None` without a living keeper.
pub fn held_lines(device: &str) -> Option<Vec<String>> {
    let mut file = File::open(lock_path(device)).ok()?;
    // SAFETY: plain system call on a descriptor we own; closing it lets go of the lock, should we get it.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_SH | libc::LOCK_NB) } == 0 {
        return None;
    }
    let mut text = String::new();
    file.read_to_string(&mut text).ok()?;
    Some(text.lines().map(str::to_owned).collect())
}

fn lock_path(device: &str) -> PathBuf {
    Path::new(RUN_DIR).join(format!("{device}.pid"))
}

/// Where the keeper of a device, given its name, writes its messages once nobody looks.
pub fn log_path(device: &str) -> PathBuf {
    Path::new(RUN_DIR).join(format!("{device}.log"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_reads_as_it_was_written() {
        let backend = Backend::new("disk.1", &"unix:/run/a#b@c".parse().unwrap());
        assert_eq!(Backend::parse(&backend.text), Some(backend.clone()));
        assert_eq!(backend.server, "unix:/run/a#b@c");
        assert_ne!(Backend::new("disk.1", &"unix:/run/a#b@c".parse().unwrap()), backend);
        for foreign in ["", "blockd:", "blockd:a", "other", "blockd:a@b"] {
            assert_eq!(Backend::parse(foreign), None, "{foreign}");
        }
    }
}
