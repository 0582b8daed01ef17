//! Volumes as block devices of this machine's kernel: `/dev/nbdN`, or `/dev/ublkbN` (see [`ublk`]).
//!
//! The kernel's NBD client does the I/O, over connections that are made here and handed to it by [`kernel`] (netlink).
//! A [`keeper`] stays behind each device: when connections break it makes new ones, so that a daemon that restarts is a
//! pause in the I/O and nothing else; and when the volume grows it tells the kernel.
//!
//! What must hold: a device is only ever given connections to the volume it was made for, and a request that
//! the kernel sends again on a new connection never comes to the server before what is left of it on the old one.

pub mod device;
pub mod keeper;
pub mod kernel;
pub mod netlink;
pub mod place;
pub mod server;
pub mod ublk;
