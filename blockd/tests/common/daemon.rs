//! The real program in a process of its own, as tests start it, torment it and end it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use blockd::export::nbd::client::{NbdClient, Options};
use serde_json::Value;

/// No request may take longer, whatever is wrong: a test then fails instead of hanging.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running daemon; killed by its own handle when dropped, and its messages checked then.
pub struct Daemon {
    child: Child,
    data: PathBuf,
    args: Vec<String>,
    /// Where its stderr goes. Not in the data directory: that may be full, or away.
    log: tempfile::NamedTempFile,
    ended: bool,
    /// The line that says that clients may come.
    pub ready: String,
}

impl Daemon {
    /// Starts one on `data` with small limits and `more` settings, and waits until it is ready.
    pub fn start(data: &Path, more: &[&str]) -> Self {
        match Self::try_start(data, more) {
            Ok(daemon) => daemon,
            Err((code, said)) => panic!("the daemon ended with {code:?}:\n{said}"),
        }
    }

    /// A start that must fail with exit code 1; returns what it said.
    pub fn refused_start(data: &Path, more: &[&str]) -> String {
        match Self::try_start(data, more) {
            Ok(daemon) => panic!("the daemon started: {}", daemon.ready),
            Err((code, said)) => {
                assert_eq!(code, Some(1), "{said}");
                assert!(!said.contains("panicked"), "{said}");
                said
            }
        }
    }

    fn try_start(data: &Path, more: &[&str]) -> Result<Self, (Option<i32>, String)> {
        let small = ["--log-size", "64MiB", "--log-segment", "4MiB", "--dirty-memory", "16MiB"];
        let few = ["--block-cache", "16MiB", "--reactors", "1", "--workers", "2"];
        // A flag given twice is an error, so what the test says takes the place of what is usual.
        let usual = [["--nbd-tcp", "none"].as_slice(), &small, &few].concat();
        let usual = usual.chunks(2).filter(|pair| !more.contains(&pair[0])).flatten();
        let args = usual.chain(more).map(|arg| (*arg).to_owned()).collect();
        Self::spawn(data.to_owned(), args, |_| {})
    }

    /// `meanwhile` gets the file with what it says, before it is waited for.
    fn spawn(data: PathBuf, args: Vec<String>, meanwhile: impl FnOnce(&Path)) -> Result<Self, (Option<i32>, String)> {
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut child = program()
            .args(["serve", "--data"])
            .arg(&data)
            .args(&args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.reopen().unwrap())
            .spawn()
            .unwrap();
        meanwhile(log.path());
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        if !ready.starts_with("blockd ready") {
            let code = child.wait().unwrap().code();
            return Err((code, ready + &fs::read_to_string(log.path()).unwrap()));
        }
        Ok(Self { child, data, args, log, ended: false, ready })
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its data directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// What it has said on stderr since it was started last.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log.path()).unwrap()
    }

    /// Runs a command of the program against it.
    pub fn run(&self, args: &[&str]) -> Output {
        program().args(args).arg("--data").arg(&self.data).output().unwrap()
    }

    /// Runs a command that must succeed and returns its JSON.
    pub fn json(&self, args: &[&str]) -> Value {
        let output = self.run(&[args, &["--json"]].concat());
        assert!(output.status.success(), "{args:?}: {}\n{}", String::from_utf8_lossy(&output.stderr), self.log());
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Runs a command that must fail and returns what it says.
    pub fn refused(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// `blockd status` as people see it.
    pub fn status_page(&self) -> String {
        String::from_utf8(self.run(&["status"]).stdout).unwrap()
    }

    /// What `blockd status --json` says of one volume.
    pub fn volume(&self, name: &str) -> Value {
        let status = self.json(&["status"]);
        let volumes = status["volumes"].as_array().unwrap();
        volumes.iter().find(|volume| volume["name"] == name).unwrap_or_else(|| panic!("no {name} in {status}")).clone()
    }

    /// The counters of an open volume.
    pub fn stats(&self, name: &str) -> Value {
        self.volume(name)["stats"].clone()
    }

    /// Waits until everything accepted is in the bucket.
    pub fn wait_drained(&self, name: &str) {
        let mut stats = Value::Null;
        let drained = wait(PATIENCE, || {
            stats = self.stats(name);
            stats["dirty_bytes"] == 0 && stats["destaged_lsn"] == stats["accepted_lsn"]
        });
        assert!(drained, "{name} does not drain: {stats}\n{}", self.log());
        assert_eq!(stats["store_trouble"], Value::Null);
    }

    /// A client of one volume.
    pub fn attach(&self, volume: &str) -> NbdClient {
        let options = Options { timeout: Some(PATIENCE), ..Options::default() };
        let client = NbdClient::connect_unix_with(self.data.join("nbd.sock"), volume, options);
        client.unwrap_or_else(|e| panic!("cannot attach {volume}: {e}\n{}", self.log()))
    }

    /// What a client hears that cannot have an export.
    pub fn cannot_attach(&self, export: &str) -> String {
        let attached = NbdClient::connect_unix(self.data.join("nbd.sock"), export);
        attached.map(drop).expect_err("it is not to be had").to_string()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        assert!(!self.ended, "its process id may be another's by now");
        // SAFETY: kill takes no pointers; the process is our own child and not reaped yet.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    /// Ends it as a crash would.
    pub fn kill(&mut self) {
        self.signal(libc::SIGKILL);
        self.child.wait().unwrap();
        self.ended = true;
        self.check_log();
    }

    /// Starts it again as it was started before; kills it first if it runs.
    pub fn restart(&mut self) {
        self.restart_with(|_| {});
    }

    /// The host and all it knew are gone: kills it, removes its data directory and starts anew, as another host, which
    /// takes the volume from the one that is gone.
    pub fn restart_as_new_host(&mut self, volume: &str) {
        if !self.ended {
            self.kill();
        }
        fs::remove_dir_all(&self.data).unwrap();
        self.restart();
        self.json(&["volume", "open", volume, "--force"]);
    }

    /// As [`Daemon::restart`], with other settings.
    pub fn restart_with(&mut self, change: impl FnOnce(&mut Vec<String>)) {
        let mut args = self.args.clone();
        change(&mut args);
        self.restart_as(args, |_| {});
    }

    /// As [`Daemon::restart`]; `meanwhile` gets the file with what it says, before it is waited for.
    pub fn restart_while(&mut self, meanwhile: impl FnOnce(&Path)) {
        self.restart_as(self.args.clone(), meanwhile);
    }

    fn restart_as(&mut self, args: Vec<String>, meanwhile: impl FnOnce(&Path)) {
        if !self.ended {
            self.kill();
        }
        match Self::spawn(self.data.clone(), args, meanwhile) {
            Ok(daemon) => *self = daemon,
            Err((code, said)) => panic!("the daemon ended with {code:?} at its restart:\n{said}"),
        }
    }

    /// Ends it in order and returns its exit code.
    pub fn stop(mut self) -> Option<i32> {
        self.stop_in_place()
    }

    /// As [`Daemon::stop`], leaving it to be restarted.
    pub fn stop_in_place(&mut self) -> Option<i32> {
        self.signal(libc::SIGTERM);
        let code = self.child.wait().unwrap().code();
        self.ended = true;
        self.check_log();
        code
    }

    fn check_log(&self) {
        let log = self.log();
        assert!(!log.contains("panicked") && !log.contains("must not happen"), "{log}");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            // What it said last is where one looks first.
            let log = fs::read_to_string(self.log.path()).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("the daemon's last messages:\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
        } else if !self.ended {
            self.check_log();
        }
    }
}

/// The program, free of what the environment of the test says.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blockd"));
    command.env_remove("BLOCKD_DATA").env_remove("BLOCKD_ADMIN").env_remove("NOTIFY_SOCKET");
    command
}

/// Waits until `holds`; whether it did so in time.
pub fn wait(limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if holds() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until `count` has stood still for `quiet` or `ended` holds; whether either came in time, and the last count.
pub fn wait_still(
    limit: Duration,
    quiet: Duration,
    count: impl Fn() -> usize,
    ended: impl Fn() -> bool,
) -> (bool, usize) {
    let (mut last, mut since) = (count(), Instant::now());
    let still = wait(limit, || {
        if count() != last {
            (last, since) = (count(), Instant::now());
        }
        since.elapsed() > quiet || ended()
    });
    (still, last)
}

/// A file system of its own on a loop device; unmounted when dropped. `None`, said loudly, where that is not allowed.
pub struct Disk {
    mount: PathBuf,
    _dir: tempfile::TempDir,
}

impl Disk {
    /// An ext4 of this size.
    pub fn new(bytes: u64) -> Option<Self> {
        // SAFETY: geteuid takes nothing and always succeeds.
        if unsafe { libc::geteuid() } != 0 {
            eprintln!("skipped: only root may mount a file system");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let (image, mount) = (dir.path().join("image"), dir.path().join("mount"));
        File::create(&image).unwrap().set_len(bytes).unwrap();
        fs::create_dir(&mount).unwrap();
        // Blocks of 4 KiB, because O_DIRECT wants the log's alignment; no reserve, because root would get it.
        let made = run("mkfs.ext4", &["-q", "-F", "-b", "4096", "-m", "0", "-O", "^has_journal"], &[&image]);
        if let Err(why) = made.and_then(|()| run("mount", &["-o", "loop"], &[&image, &mount])) {
            eprintln!("skipped: no file system of its own to be had: {why}");
            return None;
        }
        Some(Self { mount, _dir: dir })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mount
    }

    /// Makes it read-only.
    pub fn freeze_contents(&self) {
        run("mount", &["-o", "remount,ro"], &[&self.mount]).unwrap();
    }

    /// Takes all the room but about `left` bytes, by a file that is returned.
    pub fn fill_up(&self, left: u64) -> PathBuf {
        let path = self.mount.join("ballast");
        let file = File::options().create(true).append(true).open(&path).unwrap();
        // A daemon may use the disk meanwhile, and the file system needs some for itself.
        for spare in (0..).step_by(64 << 10) {
            let taken = self.free().saturating_sub(left + spare);
            let length = file.metadata().unwrap().len() + taken;
            // SAFETY: the descriptor is open, and no pointers are passed.
            if taken == 0 || unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, length as i64) } == 0 {
                break;
            }
            let error = std::io::Error::last_os_error();
            assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
        }
        path
    }

    /// Bytes that can still be written.
    pub fn free(&self) -> u64 {
        let path = std::ffi::CString::new(self.mount.to_str().unwrap()).unwrap();
        let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
        // SAFETY: the path ends with a zero byte, and `stat` is read only if the call filled it.
        let stat = unsafe {
            assert_eq!(libc::statvfs(path.as_ptr(), stat.as_mut_ptr()), 0);
            stat.assume_init()
        };
        stat.f_bavail * stat.f_frsize
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // A daemon that was just killed may hold it for a moment.
        if !wait(Duration::from_secs(5), || run("umount", &[], &[&self.mount]).is_ok()) {
            eprintln!("{} is still mounted", self.mount.display());
        }
    }
}

fn run(program: &str, args: &[&str], paths: &[&Path]) -> Result<(), String> {
    let output = Command::new(program).args(args).args(paths).output().map_err(|e| format!("{program}: {e}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}
