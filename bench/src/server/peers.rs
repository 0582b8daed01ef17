//! Command lines of the peers.

use std::process::Command;

use super::{Kind, Server};
use crate::load::Endpoint;

impl Server {
    pub(super) fn peer_command(&self) -> Command {
        match &self.kind {
            Kind::QemuNbd { cache, aio } => {
                let mut command = Command::new("qemu-nbd");
                command.args(["--format=raw", "--persistent", "--shared=0", "--discard=unmap"]);
                command.arg(format!("--cache={cache}")).arg(format!("--aio={aio}"));
                match &self.endpoint {
                    Endpoint::Unix(path) => command.arg("--socket").arg(path),
                    Endpoint::Tcp(addr) => command.args(["--bind", "127.0.0.1", "--port", &addr.port().to_string()]),
                    Endpoint::Nvme(_) => panic!("this server speaks only NBD"),
                };
                command.arg(self.raw_file());
                command
            }
            _ => {
                let mut command = Command::new("nbdkit");
                command.args(["--foreground", "--exit-with-parent"]);
                match &self.endpoint {
                    Endpoint::Unix(path) => command.arg("--unix").arg(path),
                    Endpoint::Tcp(addr) => command.args(["--ipaddr", "127.0.0.1", "--port", &addr.port().to_string()]),
                    Endpoint::Nvme(_) => panic!("this server speaks only NBD"),
                };
                if matches!(self.kind, Kind::NbdkitMemory) {
                    command.arg("memory").arg(self.size_bytes.to_string());
                } else {
                    command.arg("file").arg(self.raw_file());
                }
                command
            }
        }
    }
}
