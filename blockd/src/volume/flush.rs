//! Flushes: what must be durable before they are answered, and when the device is told to make it so.

use super::api::{Outcome, Token};
use super::engine::{State, Volume};
use crate::manifest::Durability;
use crate::types::Lsn;

/// Starts an fdatasync as soon as a write is on the device when the client has shown that it flushes after each
/// write, so that the device's flush overlaps with the client's round trip.
#[derive(Debug, Default)]
pub(super) struct Eager {
    /// Flushes in a row that had to wait with nothing else going on, minus syncs nobody asked for.
    confidence: u8,
    unasked: bool,
}

const CONFIDENT: u8 = 3;
const CONFIDENCE_MAX: u8 = 8;

impl Volume {
    /// Makes everything acknowledged so far durable, to the volume's durability. The answer is a completion.
    pub fn flush(&mut self, token: Token) {
        if self.gate.is_shut() {
            return self.gate.hold_flush(token);
        }
        self.stats.flushes += 1;
        if let Some(error) = self.write_error() {
            self.complete(token, Err(error));
            return;
        }
        if self.acks.is_empty() && !self.log.has_open_records() {
            self.eager.confidence = (self.eager.confidence + 1).min(CONFIDENCE_MAX);
        }
        self.eager.unasked = false;
        self.wait_durable(self.log.kept_lsn(), token);
    }

    /// Answers `token` when `lsn` is durable.
    pub(super) fn wait_durable(&mut self, lsn: Lsn, token: Token) {
        if lsn <= self.flushed_lsn() {
            self.complete(token, Ok(Outcome::Done));
        } else {
            // Waiting for a little more than asked keeps the queue in order.
            let lsn = self.flushes.back().map_or(lsn, |(last, _)| lsn.max(*last));
            self.flushes.push_back((lsn, token));
        }
    }

    /// The horizon that answers flushes.
    pub(super) fn flushed_lsn(&self) -> Lsn {
        match self.durability {
            Durability::Local => self.log.durable_lsn(),
            Durability::Object => self.destage.stored_lsn(),
        }
    }

    pub(super) fn answer_flushes(&mut self) {
        let horizon = self.flushed_lsn();
        while self.flushes.front().is_some_and(|(lsn, _)| *lsn <= horizon) {
            if let Some((_, token)) = self.flushes.pop_front() {
                self.complete(token, Ok(Outcome::Done));
            }
        }
    }

    pub(super) fn sync_for_flushes(&mut self) {
        if self.durability == Durability::Object || self.state == State::Closed {
            return;
        }
        self.answer_flushes();
        if let Some((lsn, _)) = self.flushes.front() {
            // A sync that began before the frame was written would not cover it.
            if *lsn <= self.log.written_lsn() {
                self.log.sync(&mut self.log_ios);
            }
        } else if self.eager.confidence >= CONFIDENT
            && self.log.in_flight() == 0
            && !self.log.has_open_records()
            && self.log.sync(&mut self.log_ios)
        {
            if self.eager.unasked {
                self.eager.confidence = self.eager.confidence.saturating_sub(2);
            }
            self.eager.unasked = true;
        }
    }
}
