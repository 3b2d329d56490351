//! Deleting a link without waiting for the kernel to tidy up after it. `unsafe` for fork.
//!
//! When a link is deleted it disappears at once, with its routes and neighbours, but the kernel answers only after an RCU grace
//! period (20 to 100 ms), when the link's memory can be freed too. Nobody who deletes a pod has to wait for that: somebody else
//! sends the request, and we go on as soon as the kernel announces that the link is gone. A thread cannot be that in a process
//! that ends at once (its end waits for all of them), and a child not in one that has other threads.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};

use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::link::LinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rustix::event::{PollFd, PollFlags, poll};

use crate::Host;
use crate::netlink::Netlink;

/// RTMGRP_LINK: the kernel tells of links that come and go.
const LINKS: u32 = 1;

/// Deletes the link, and with it its other side. By its number, which no other link ever gets: one that outlives its killed parent
/// cannot hit a link that was made since under the same name.
///
/// The link must be in the network namespace where this thread is, which is where `nl` was opened as long as no other was entered.
pub fn delete(nl: &mut Netlink, index: u32, host: Host) -> io::Result<()> {
    let mut request = LinkMessage::default();
    request.header.index = index;
    let request = Message::DelLink(request);
    let begun = announcements().and_then(|socket| Ok((socket, begin(request.clone(), host)?)));
    match begun {
        Ok((announcements, answer)) => wait(index, &announcements, answer),
        // Without help it takes longer.
        Err(_) => nl.change(request, 0),
    }
}

fn announcements() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind(&SocketAddr::new(0, LINKS))?;
    Ok(socket)
}

/// Has `request` sent; gives where the kernel's answer is written to, an errno or 0.
fn begin(request: Message, host: Host) -> io::Result<File> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let kept = write.as_raw_fd();
    let carry_out = move || {
        let answer = match Netlink::open().and_then(|mut own| own.change(request, 0)) {
            Ok(()) => 0,
            Err(e) => e.raw_os_error().unwrap_or(libc::EIO),
        };
        let _ = File::from(write).write_all(&answer.to_ne_bytes());
    };
    if host == Host::GoesOn {
        std::thread::Builder::new().name("unlink".into()).stack_size(128 << 10).spawn(carry_out)?;
        return Ok(File::from(read));
    }
    // SAFETY: this process has one thread, so no lock is held by a thread that the child lacks.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            close_all_but(kept);
            carry_out();
            // SAFETY: _exit is always sound; the parent's state must not be dropped here.
            unsafe { libc::_exit(0) }
        }
        _ => Ok(File::from(read)),
    }
}

fn close_all_but(keep: RawFd) {
    // Whoever runs the plugin waits for the end of its output, and whoever wants the record of addresses for its lock.
    let keep = keep.unsigned_abs();
    for (first, last) in [(0, keep.saturating_sub(1)), (keep + 1, libc::c_uint::MAX)] {
        // SAFETY: this child uses no descriptor that it has not opened itself, but the pipe.
        unsafe { libc::close_range(first, last, 0) };
    }
}

/// Until the link is gone or the kernel has refused.
fn wait(index: u32, announcements: &Socket, mut answer: File) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(64 << 10);
    let mut hears = true;
    loop {
        let listen = if hears { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = [PollFd::new(announcements, listen), PollFd::new(&answer, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        let answered = !fds[1].revents().is_empty();
        if hears && fds[0].revents().contains(PollFlags::IN) {
            buffer.clear();
            match announcements.recv(&mut buffer, 0) {
                Ok(n) if tells_of(index, buffer.get(..n).unwrap_or_default()) => return Ok(()),
                Ok(_) => {}
                // More news than its buffer holds: the answer decides.
                Err(_) => hears = false,
            }
        }
        if answered {
            let mut errno = [0; 4];
            answer.read_exact(&mut errno)?;
            return match i32::from_ne_bytes(errno) {
                0 => Ok(()),
                n => Err(io::Error::from_raw_os_error(n)),
            };
        }
    }
}

/// Whether one of these messages says that the link is gone. A bridge that loses a port says so in a family of its own.
fn tells_of(index: u32, mut datagram: &[u8]) -> bool {
    const RTM_DELLINK: u16 = 17;
    const HEADER: usize = 16;
    let number = |at: usize, bytes: &[u8]| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    while let Some(len) = number(0, datagram).map(|n| n as usize).filter(|n| *n >= HEADER) {
        let kind = datagram.get(4..6).and_then(|k| k.try_into().ok()).map(u16::from_ne_bytes);
        let of_all_families = datagram.get(HEADER) == Some(&0);
        if kind == Some(RTM_DELLINK) && of_all_families && number(HEADER + 4, datagram) == Some(index) {
            return true;
        }
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, family: u8, index: u32) -> Vec<u8> {
        let mut m = 32u32.to_ne_bytes().to_vec();
        m.extend(kind.to_ne_bytes());
        m.extend([0; 10]);
        m.extend([family, 0, 0, 0]);
        m.extend(index.to_ne_bytes());
        m.extend([0; 8]);
        m
    }

    #[test]
    fn announcements_that_count() {
        assert!(tells_of(7, &message(17, 0, 7)));
        assert!(tells_of(7, &[message(16, 0, 7), message(17, 0, 3), message(17, 0, 7)].concat()));
        for other in
            [message(16, 0, 7), message(17, 7, 7), message(17, 0, 8), message(17, 0, 7)[..20].to_vec()]
        {
            assert!(!tells_of(7, &other), "{other:?}");
        }
        assert!(!tells_of(7, &[0; 40]));
    }
}
