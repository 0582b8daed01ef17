//! Waiting for several sockets at once.

use std::io;

use super::connection::Connection;

/// Connections a run may have.
pub const CONNECTIONS_MAX: usize = 64;

/// Waits until at least one busy connection can go on, and tells each whether it can.
pub fn wait(connections: &mut [Connection<'_>]) -> io::Result<()> {
    let mut polls = [libc::pollfd { fd: -1, events: 0, revents: 0 }; CONNECTIONS_MAX];
    for (poll, connection) in polls.iter_mut().zip(connections.iter()) {
        if connection.busy() {
            poll.fd = connection.fd();
            poll.events = libc::POLLIN | if connection.unsent() { libc::POLLOUT } else { 0 };
        }
    }
    loop {
        // SAFETY: `polls` holds at least that many valid entries, alive over the call.
        let ready = unsafe { libc::poll(polls.as_mut_ptr(), connections.len() as libc::nfds_t, 30_000) };
        match ready {
            0 => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the server has not answered for 30 s"));
            }
            1.. => break,
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    for (poll, connection) in polls.iter().zip(connections) {
        connection.set_ready(poll.revents != 0);
    }
    Ok(())
}
