//! Kills a server under load, again and again, and checks what is left.
//!
//! Every 512-byte sector written names its writer and place ([`content`]), and an oracle ([`model`]) knows which writers
//! each sector may show. [`worker`] puts the load on, [`rounds`] kills, restarts and verifies. [`lossy`] is a server that
//! loses on purpose, by which the tester itself is tested.

pub mod content;
pub mod lossy;
pub mod model;
pub mod rounds;
mod worker;

use std::io;
use std::time::Duration;

use anyhow::Result;

use crate::client::Client;
use crate::server::Server;

/// Something that can be killed and comes back with what it kept.
pub trait Target {
    /// Starts it and waits until it serves.
    fn start(&mut self) -> Result<()>;
    /// Starts it and kills it `after` a while, ready or not.
    fn start_and_kill(&mut self, after: Duration) -> Result<()>;
    /// A connection to it.
    fn connect(&self) -> io::Result<Box<dyn Client>>;
    /// Whether it has not ended by itself.
    fn alive(&mut self) -> bool;
    /// Ends it as a crash would.
    fn kill(&mut self) -> Result<()>;
    /// Ends it in order.
    fn stop(&mut self) -> Result<()>;
    /// The last it said.
    fn log_tail(&self) -> String;
}

impl Target for Server {
    fn start(&mut self) -> Result<()> {
        Server::start(self)
    }

    fn start_and_kill(&mut self, after: Duration) -> Result<()> {
        self.spawn()?;
        std::thread::sleep(after);
        Server::kill(self)
    }

    fn connect(&self) -> io::Result<Box<dyn Client>> {
        Server::connect(self)
    }

    fn alive(&mut self) -> bool {
        Server::alive(self)
    }

    fn kill(&mut self) -> Result<()> {
        Server::kill(self)
    }

    fn stop(&mut self) -> Result<()> {
        let status = Server::stop(self)?;
        anyhow::ensure!(status.success(), "{} ended with {status} when asked to stop", self.name());
        Ok(())
    }

    fn log_tail(&self) -> String {
        Server::log_tail(self)
    }
}
