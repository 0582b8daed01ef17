//! The volume as the reactor sees it.

use std::any::Any;
use std::io;
use std::os::fd::RawFd;

use super::{Effect, JobDone, ReadNow, Token, Volume, WriteData};
use crate::outgoing::Outgoing;
use crate::reactor::Device;

impl Device for Volume {
    fn size(&self) -> u64 {
        self.size()
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read(&mut self, token: Token, offset: u64, len: u32, out: &mut Outgoing) -> ReadNow {
        self.read(token, offset, len, out)
    }
    fn write(&mut self, token: Token, offset: u64, data: WriteData<'_>, fua: bool) {
        self.write(token, offset, data, fua);
    }
    fn compare_write(&mut self, token: Token, offset: u64, expected: Vec<u8>, data: Vec<u8>, fua: bool) {
        self.compare_write(token, offset, expected, data, fua);
    }
    fn zero(&mut self, token: Token, offset: u64, len: u64, fua: bool, no_hole: bool) {
        self.zero(token, offset, len, fua, no_hole);
    }
    fn copy(&mut self, token: Token, from: u64, to: u64, len: u64, fua: bool) {
        self.copy(token, from, to, len, fua);
    }
    fn trim(&mut self, token: Token, offset: u64, len: u64, fua: bool) {
        self.trim(token, offset, len, fua);
    }
    fn flush(&mut self, token: Token) {
        self.flush(token);
    }
    fn extents(&mut self, token: Token, offset: u64, len: u64, max: usize) {
        self.extents(token, offset, len, max);
    }
    fn prefetch(&mut self, token: Token, offset: u64, len: u64) {
        self.prefetch(token, offset, len);
    }
    fn tick(&mut self, now_us: u64, wall_ms: u64) {
        self.tick(crate::lease::Instants { steady_ms: now_us / 1000, wall_ms });
    }
    fn advance(&mut self, now_us: u64) {
        self.advance(now_us);
    }
    fn next_effect(&mut self) -> Option<Effect> {
        self.next_effect()
    }
    fn log_handed(&mut self, id: u64) {
        self.log_handed(id);
    }
    fn log_done(&mut self, id: u64, result: io::Result<()>) {
        self.log_done(id, result);
    }
    fn job_done(&mut self, done: JobDone) {
        self.job_done(done);
    }
    fn deadline_us(&self) -> Option<u64> {
        self.deadline_us()
    }
    fn close(&mut self) {
        self.close();
    }
    fn closed(&self) -> bool {
        self.closed()
    }
    fn log_fd(&self, segment: u32) -> RawFd {
        self.log_fd(segment)
    }
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}
