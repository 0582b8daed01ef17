//! Features: settings of a controller, as far as it has any.

use super::command::{Command, Status};

/// Feature identifiers.
pub mod id {
    pub const ARBITRATION: u8 = 0x01;
    pub const POWER: u8 = 0x02;
    pub const TEMPERATURE: u8 = 0x04;
    pub const ERROR_RECOVERY: u8 = 0x05;
    pub const WRITE_CACHE: u8 = 0x06;
    pub const QUEUES: u8 = 0x07;
    pub const ATOMICITY: u8 = 0x0A;
    pub const EVENTS: u8 = 0x0B;
    pub const KEEP_ALIVE: u8 = 0x0F;
    pub const HOST_ID: u8 = 0x81;
    pub const RESERVATION_NOTICES: u8 = 0x82;
    pub const RESERVATION_PERSISTENCE: u8 = 0x83;
}

/// Of which events a host wants to hear.
#[derive(Clone, Copy, Debug, Default)]
pub struct Features {
    /// Bit 8: namespaces; bit 31: discovery.
    pub events: u32,
    /// Bits 3:1: reservation notices that are *not* wanted.
    pub unwanted_notices: u32,
    /// Error recovery, which changes nothing here.
    pub error_recovery: u32,
    /// Milliseconds after which a silent host is given up; 0 for never.
    pub keep_alive_ms: u32,
}

/// What Get Features without data answers, in the form that was asked for.
pub fn get(features: &Features, command: &Command, queues: u32, persists: bool) -> Result<u32, Status> {
    const SUPPORTED_CAPABILITIES: u32 = 3;
    let (feature, select) = (command.dword(10) as u8, (command.dword(10) >> 8) & 7);
    let value = match feature {
        id::ARBITRATION | id::POWER | id::TEMPERATURE | id::ATOMICITY => 0,
        id::ERROR_RECOVERY => features.error_recovery,
        id::WRITE_CACHE => 1,
        id::QUEUES => queues,
        id::EVENTS => features.events,
        id::KEEP_ALIVE => features.keep_alive_ms,
        id::RESERVATION_NOTICES => features.unwanted_notices,
        id::RESERVATION_PERSISTENCE => u32::from(persists),
        _ => return Err(Status::INVALID_FIELD),
    };
    if select == SUPPORTED_CAPABILITIES {
        const CHANGEABLE: u32 = 1 << 2;
        let fixed = [id::WRITE_CACHE, id::ARBITRATION, id::POWER, id::TEMPERATURE, id::ATOMICITY];
        return Ok(if fixed.contains(&feature) { 0 } else { CHANGEABLE });
    }
    Ok(value)
}
