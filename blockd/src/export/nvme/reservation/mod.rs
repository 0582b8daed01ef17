//! Reservations: which hosts may use a namespace (NVM Express Base Specification, "Reservations").
//!
//! [`Reservations`] is the state and its rules, without I/O; [`file`] keeps it on disk. Hosts are known by the 128-bit
//! identifier of their Connect command, so that a host's connections, its restarts and ours make no difference.

pub mod file;
#[cfg(test)]
mod tests;

use super::command::Status;
use super::data::HostId;

/// Hosts that may be registered at once.
pub const REGISTRANTS_MAX: usize = 1024;

/// Who may do what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Only the holder writes.
    WriteExclusive = 1,
    /// Only the holder reads and writes.
    ExclusiveAccess = 2,
    /// Only registrants write; one of them holds it.
    WriteExclusiveRegistrants = 3,
    /// Only registrants read and write; one of them holds it.
    ExclusiveAccessRegistrants = 4,
    /// Only registrants write; all of them hold it.
    WriteExclusiveAll = 5,
    /// Only registrants read and write; all of them hold it.
    ExclusiveAccessAll = 6,
}

impl Kind {
    /// Of its number.
    pub fn of(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::WriteExclusive,
            2 => Self::ExclusiveAccess,
            3 => Self::WriteExclusiveRegistrants,
            4 => Self::ExclusiveAccessRegistrants,
            5 => Self::WriteExclusiveAll,
            6 => Self::ExclusiveAccessAll,
            _ => return None,
        })
    }

    fn held_by_all(self) -> bool {
        matches!(self, Self::WriteExclusiveAll | Self::ExclusiveAccessAll)
    }

    fn admits_registrants(self) -> bool {
        !matches!(self, Self::WriteExclusive | Self::ExclusiveAccess)
    }

    fn admits_readers(self) -> bool {
        matches!(self, Self::WriteExclusive | Self::WriteExclusiveRegistrants | Self::WriteExclusiveAll)
    }
}

/// What a command does to data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read, Compare, Verify.
    Read,
    /// Everything that changes something, and Flush.
    Write,
}

/// A host that registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registrant {
    /// Who.
    pub host: HostId,
    /// Its key.
    pub key: u64,
}

/// What a host is told about a reservation it had to do with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Notice {
    /// Its registration was taken from it.
    RegistrationPreempted = 1,
    /// The reservation is nobody's any more.
    ReservationReleased = 2,
    /// The reservation was taken from it.
    ReservationPreempted = 3,
}

/// Something a host asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Registers a key.
    Register { key: u64 },
    /// Takes its registration back.
    Unregister { current: u64, ignore_current: bool },
    /// Changes its key.
    Replace { current: u64, key: u64, ignore_current: bool },
    /// Takes the reservation if it is free.
    Acquire { current: u64, kind: Kind },
    /// Takes it, or only their registrations, from the hosts with a key.
    Preempt { current: u64, victim: u64, kind: Kind },
    /// Gives it up.
    Release { current: u64, kind: Kind },
    /// Removes it and all registrations.
    Clear { current: u64 },
}

/// The state. See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reservations {
    /// Hosts in the order they registered.
    pub registrants: Vec<Registrant>,
    /// The reservation and, unless all registrants hold it, its holder.
    pub held: Option<(Kind, HostId)>,
    /// Changes with the registrants.
    pub generation: u32,
    /// Whether it outlives a loss of power.
    pub persists: bool,
}

impl Reservations {
    fn key_of(&self, host: &HostId) -> Option<u64> {
        self.registrants.iter().find(|registrant| registrant.host == *host).map(|registrant| registrant.key)
    }

    /// Whether a host holds the reservation.
    pub fn is_holder(&self, host: &HostId) -> bool {
        self.held.is_some_and(
            |(kind, holder)| {
                if kind.held_by_all() { self.key_of(host).is_some() } else { holder == *host }
            },
        )
    }

    /// Whether a host may do that now.
    ///
    /// # Errors
    /// The status to answer with.
    pub fn check(&self, host: &HostId, access: Access) -> Result<(), Status> {
        let Some((kind, _)) = self.held else { return Ok(()) };
        let allowed = (access == Access::Read && kind.admits_readers())
            || self.is_holder(host)
            || (kind.admits_registrants() && self.key_of(host).is_some());
        if allowed { Ok(()) } else { Err(Status::RESERVATION_CONFLICT) }
    }

    /// Carries out a request of `host`. Returns who else is to be told what.
    ///
    /// # Errors
    /// The status to answer with; nothing changed then.
    pub fn apply(&mut self, host: HostId, request: Request) -> Result<Vec<(HostId, Notice)>, Status> {
        match request {
            Request::Register { key } => self.register(host, key),
            Request::Unregister { current, ignore_current } => {
                self.expect_key(&host, (!ignore_current).then_some(current))?;
                Ok(self.unregister(host))
            }
            Request::Replace { current, key, ignore_current } => {
                self.expect_key(&host, (!ignore_current).then_some(current))?;
                for registrant in self.registrants.iter_mut().filter(|registrant| registrant.host == host) {
                    registrant.key = key;
                }
                self.changed();
                Ok(Vec::new())
            }
            Request::Acquire { current, kind } => {
                self.expect_key(&host, Some(current))?;
                match self.held {
                    None => {
                        self.held = Some((kind, host));
                        Ok(Vec::new())
                    }
                    Some((held, _)) if held == kind && self.is_holder(&host) => Ok(Vec::new()),
                    Some(_) => Err(Status::RESERVATION_CONFLICT),
                }
            }
            Request::Preempt { current, victim, kind } => {
                self.expect_key(&host, Some(current))?;
                self.preempt(host, victim, kind)
            }
            Request::Release { current, kind } => {
                self.expect_key(&host, Some(current))?;
                match self.held {
                    Some((held, _)) if self.is_holder(&host) => {
                        if held != kind {
                            return Err(Status::INVALID_FIELD);
                        }
                        Ok(self.release(&host))
                    }
                    _ => Ok(Vec::new()),
                }
            }
            Request::Clear { current } => {
                self.expect_key(&host, Some(current))?;
                let notices = self.others(&host, Notice::RegistrationPreempted);
                self.held = None;
                self.registrants.clear();
                self.changed();
                Ok(notices)
            }
        }
    }

    fn changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// That `host` is registered, with this key if one is given.
    fn expect_key(&self, host: &HostId, key: Option<u64>) -> Result<(), Status> {
        match self.key_of(host) {
            Some(found) if key.is_none_or(|key| key == found) => Ok(()),
            _ => Err(Status::RESERVATION_CONFLICT),
        }
    }

    fn others(&self, host: &HostId, notice: Notice) -> Vec<(HostId, Notice)> {
        self.registrants.iter().filter(|other| other.host != *host).map(|other| (other.host, notice)).collect()
    }

    fn register(&mut self, host: HostId, key: u64) -> Result<Vec<(HostId, Notice)>, Status> {
        match self.key_of(&host) {
            Some(found) if found == key => return Ok(Vec::new()),
            Some(_) => return Err(Status::RESERVATION_CONFLICT),
            None if self.registrants.len() >= REGISTRANTS_MAX => return Err(Status::INTERNAL),
            None => self.registrants.push(Registrant { host, key }),
        }
        self.changed();
        Ok(Vec::new())
    }

    fn unregister(&mut self, host: HostId) -> Vec<(HostId, Notice)> {
        let was_holder = self.is_holder(&host);
        self.registrants.retain(|registrant| registrant.host != host);
        self.changed();
        match self.held {
            // All hold it, until the last one is gone.
            Some((kind, _)) if was_holder && (!kind.held_by_all() || self.registrants.is_empty()) => {
                self.release(&host)
            }
            _ => Vec::new(),
        }
    }

    fn release(&mut self, host: &HostId) -> Vec<(HostId, Notice)> {
        match self.held.take() {
            // Who could write anyway notices nothing of a release; the others may want it now.
            Some((kind, _)) if kind.admits_registrants() => self.others(host, Notice::ReservationReleased),
            _ => Vec::new(),
        }
    }

    fn preempt(&mut self, host: HostId, victim: u64, kind: Kind) -> Result<Vec<(HostId, Notice)>, Status> {
        let all = self.held.is_some_and(|(held, _)| held.held_by_all());
        // With the key 0 all others lose their registration, if all hold the reservation.
        let everybody = all && victim == 0;
        if victim == 0 && !everybody && self.held.is_some() {
            return Err(Status::INVALID_FIELD);
        }
        let holders_key = match self.held {
            Some((_, holder)) if !all => self.key_of(&holder),
            _ => None,
        };
        let is_victim = |registrant: &Registrant| everybody || registrant.key == victim;
        let takes_over = everybody || holders_key == Some(victim);
        if !everybody && !self.registrants.iter().any(is_victim) {
            return Err(Status::RESERVATION_CONFLICT);
        }
        let before = self.clone();
        // Who preempts its own key as the holder only changes the kind; else it may lose its own registration.
        let keeps_own = takes_over;
        self.registrants.retain(|registrant| (keeps_own && registrant.host == host) || !is_victim(registrant));
        if self.registrants.len() != before.registrants.len() {
            self.changed();
        }
        let mut notices: Vec<(HostId, Notice)> = before
            .registrants
            .iter()
            .filter(|registrant| registrant.host != host && self.key_of(&registrant.host).is_none())
            .map(|registrant| (registrant.host, Notice::RegistrationPreempted))
            .collect();
        if takes_over {
            self.held = Some((kind, host));
            if before.held.is_some_and(|(old, _)| old != kind) {
                // Who stays registered learns that the terms are other ones.
                notices.extend(self.others(&host, Notice::ReservationReleased));
            }
        } else if self.registrants.is_empty() && all {
            self.held = None;
        }
        Ok(notices)
    }
}
