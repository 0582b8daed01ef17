//! Raw images, with many requests in flight.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::mpsc;

use indicatif::ProgressBar;

use super::sparse;
use crate::export::nbd::client::{Errno, NbdClient, ReplyData, Request};
use crate::export::nbd::proto::allocation;

/// Bytes of one request: large enough to be cheap, small enough that several are always under way.
const PIECE: u64 = 1 << 20;
/// Requests in flight.
const DEPTH: usize = 16;
/// Pieces read ahead of the requests.
const READ_AHEAD: usize = 8;
/// Most that one trim or block status covers: what fits 32 bits, in whole MiB.
const SPAN: u64 = (4 << 30) - (1 << 20);
/// Allocation is asked for this much at a time before its data is read.
const WINDOW: u64 = 64 << 30;

/// Whether nothing was ever written to the volume, or all of it is trimmed. Without block status it is not known to be.
pub(super) fn is_empty(client: &mut NbdClient) -> io::Result<bool> {
    let size = client.size();
    Ok(client.has_block_status() && data_ranges(client, 0..size)?.is_empty())
}

/// Makes the whole volume read as zeroes.
pub(super) fn clear(client: &mut NbdClient) -> io::Result<()> {
    let size = client.size();
    let mut at = 0;
    while at < size {
        let len = (size - at).min(SPAN);
        client.zero(at, len as u32)?;
        at += len;
    }
    Ok(())
}

/// Copies the first `size` bytes of `file` to a volume that reads as zeroes, and makes them durable. Returns the
/// bytes that were not zero.
pub(super) fn import(client: &mut NbdClient, file: &File, size: u64, bar: &ProgressBar) -> io::Result<u64> {
    let mut written = 0;
    std::thread::scope(|scope| {
        let (pieces, arriving) = mpsc::sync_channel(READ_AHEAD);
        let reader = scope.spawn(move || read_pieces(file, size, &pieces));
        for (offset, data) in arriving {
            for range in sparse::nonzero(&data) {
                make_room(client)?;
                let at = offset + range.start as u64;
                written += range.len() as u64;
                client.submit(Request::Write { offset: at, data: &data[range], fua: false })?;
            }
            bar.set_position(offset + data.len() as u64);
        }
        drain(client)?;
        reader.join().map_err(|_| io::Error::other("the reader thread died"))?
    })?;
    client.flush()?;
    bar.set_position(size);
    Ok(written)
}

/// Sends what `file` holds in pieces, without its holes, until the end or until nobody wants it.
fn read_pieces(file: &File, size: u64, pieces: &mpsc::SyncSender<(u64, Vec<u8>)>) -> io::Result<()> {
    let mut at = 0;
    while let Some(range) = sparse::next_data(file, at, size)? {
        at = range.start;
        while at < range.end {
            // Pieces end at multiples of their size, so that all but the first and last of a range are whole.
            let end = range.end.min((at / PIECE + 1) * PIECE);
            let mut data = vec![0; (end - at) as usize];
            file.read_exact_at(&mut data, at).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => {
                    io::Error::new(error.kind(), "the image became shorter while it was read")
                }
                _ => error,
            })?;
            if pieces.send((at, data)).is_err() {
                return Ok(());
            }
            at = end;
        }
    }
    Ok(())
}

/// Waits until one more request may be made.
fn make_room(client: &mut NbdClient) -> io::Result<()> {
    while client.in_flight() >= DEPTH {
        done(client.next_reply()?)?;
    }
    Ok(())
}

fn drain(client: &mut NbdClient) -> io::Result<()> {
    while client.in_flight() > 0 {
        done(client.next_reply()?)?;
    }
    Ok(())
}

fn done((_, result): (u64, Result<ReplyData, Errno>)) -> io::Result<()> {
    result?;
    Ok(())
}

/// Copies a volume to an empty `file`, leaving holes where it reads as zeroes. Returns the bytes written. The file is
/// not durable yet.
pub(super) fn export(client: &mut NbdClient, file: &File, bar: &ProgressBar) -> io::Result<u64> {
    let size = client.size();
    file.set_len(size)?;
    let mut written = 0;
    let mut window = 0;
    while window < size {
        let end = size.min(window + WINDOW);
        for range in data_ranges(client, window..end)? {
            written += export_range(client, file, range, bar)?;
        }
        bar.set_position(end);
        window = end;
    }
    Ok(written)
}

fn export_range(client: &mut NbdClient, file: &File, range: Range<u64>, bar: &ProgressBar) -> io::Result<u64> {
    let mut asked = std::collections::HashMap::new();
    let mut written = 0;
    let mut at = range.start;
    while at < range.end || client.in_flight() > 0 {
        if at < range.end && client.in_flight() < DEPTH {
            let end = range.end.min((at / PIECE + 1) * PIECE);
            let cookie = client.submit(Request::Read { offset: at, len: (end - at) as u32 })?;
            asked.insert(cookie, at);
            at = end;
            continue;
        }
        let (cookie, result) = client.next_reply()?;
        let offset = asked.remove(&cookie).ok_or_else(|| io::Error::other("answer to nothing"))?;
        let ReplyData::Data(data) = result? else {
            return Err(io::Error::other("a read was answered without data"));
        };
        for part in sparse::nonzero(&data) {
            file.write_all_at(&data[part.clone()], offset + part.start as u64)?;
            written += part.len() as u64;
        }
        bar.set_position(offset);
    }
    Ok(written)
}

/// Where a volume may hold something else than zeroes within `range`; all of it when it cannot tell.
fn data_ranges(client: &mut NbdClient, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    if !client.has_block_status() {
        return Ok(vec![range]);
    }
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(SPAN) as u32;
        for extent in client.block_status(at, len)? {
            let end = range.end.min(at + u64::from(extent.len));
            if extent.flags & allocation::ZERO == 0 && end > at {
                match found.last_mut() {
                    Some(last) if last.end == at => last.end = end,
                    _ => found.push(at..end),
                }
            }
            at = end;
        }
    }
    Ok(found)
}
