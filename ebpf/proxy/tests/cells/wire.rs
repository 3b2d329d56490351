//! Frames as they are: what no socket sends, and what comes out of an interface.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

/// An interface of the namespace that the calling thread is in.
pub struct Wire(File);

impl Wire {
    pub fn open(interface: &str) -> Wire {
        let index = nix::net::if_::if_nametoindex(interface).unwrap();
        let all = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: no pointers; the descriptor is ours alone when it is one.
        let socket = unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(all));
            assert!(fd >= 0, "run as root: {}", std::io::Error::last_os_error());
            File::from_raw_fd(fd)
        };
        // SAFETY: all zeros is a valid value of this plain C struct.
        let mut at: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        at.sll_family = libc::AF_PACKET as u16;
        at.sll_protocol = all;
        at.sll_ifindex = index as i32;
        // SAFETY: the address is valid and its size is given.
        let r = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const at).cast(),
                std::mem::size_of_val(&at) as libc::socklen_t,
            )
        };
        assert_eq!(r, 0, "{}", std::io::Error::last_os_error());
        let patience = TimeVal::new(0, Duration::from_millis(50).as_micros() as i64);
        setsockopt(&socket.as_fd(), sockopt::ReceiveTimeout, &patience).unwrap();
        Wire(socket)
    }

    /// Frames that no interface takes are not sent.
    pub fn send(&mut self, frame: &[u8]) {
        let _ = self.0.write(frame);
    }

    /// The next frame, in either direction; `None` after a moment of silence.
    pub fn receive(&mut self, room: &mut [u8]) -> Option<usize> {
        self.0.read(room).ok()
    }
}

#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

#[repr(C)]
struct Request {
    name: [u8; 16],
    value: *mut Value,
}

/// Checksums are computed here and not left to the other end, and received frames are polled for: what a card does.
pub fn like_a_card(interface: &str) {
    const SET_TX_CHECKSUMS: u32 = 0x17;
    const SET_GRO: u32 = 0x2c;
    ethtool(interface, SET_TX_CHECKSUMS, 0);
    ethtool(interface, SET_GRO, 1);
}

/// A VLAN's tag is within the frames of this interface, in both directions, and not beside them.
pub fn tags_in_frames(interface: &str) {
    const SET_FLAGS: u32 = 0x26;
    ethtool(interface, SET_FLAGS, 0);
}

fn ethtool(interface: &str, command: u32, data: u32) {
    const SIOCETHTOOL: u64 = 0x8946;
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    let mut value = Value { command, data };
    let mut request = Request { name: [0; 16], value: &raw mut value };
    request.name[..interface.len()].copy_from_slice(interface.as_bytes());
    // SAFETY: the request and what it points to live through the call.
    let r = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut request) };
    assert_eq!(r, 0, "{command:#x} {interface}: {}", std::io::Error::last_os_error());
}

/// Makes a socket's packets larger by headers that ask for nothing: IPv4 options, or destination options of IPv6 (their header
/// takes the first 8 bytes). A multiple of 8.
pub fn set_options(socket: std::os::fd::RawFd, v4: bool, bytes: usize) {
    if bytes == 0 {
        return;
    }
    // Of IPv4 each byte is an option; of IPv6 the header is followed by one that is padding.
    let options = if v4 {
        vec![1; bytes]
    } else {
        let mut o = vec![0; bytes];
        (o[1], o[2], o[3]) = ((bytes / 8 - 1) as u8, 1, (bytes - 4) as u8);
        o
    };
    let (level, name) =
        if v4 { (libc::IPPROTO_IP, libc::IP_OPTIONS) } else { (libc::IPPROTO_IPV6, libc::IPV6_DSTOPTS) };
    set(socket, level, name, &options);
}

/// Lets routers cut an IPv4 socket's packets into fragments.
pub fn may_be_cut(socket: std::os::fd::RawFd) {
    set(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, &libc::IP_PMTUDISC_DONT.to_ne_bytes());
}

fn set(socket: std::os::fd::RawFd, level: libc::c_int, name: libc::c_int, value: &[u8]) {
    // SAFETY: the value is valid and its size is given.
    let r = unsafe {
        libc::setsockopt(socket, level, name, value.as_ptr().cast(), value.len() as libc::socklen_t)
    };
    assert_eq!(r, 0, "{}", std::io::Error::last_os_error());
}

#[repr(C)]
struct TunRequest {
    name: [u8; 16],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// An interface without a link header in the namespace that the calling thread is in; its packets come out of the file, and go in.
/// It goes with the file.
pub fn tun(name: &str) -> File {
    const TUNSETIFF: u64 = 0x4004_54ca;
    const TUN_WITHOUT_HEADER: libc::c_short = 0x1001;
    let file = File::options().read(true).write(true).open("/dev/net/tun").expect("/dev/net/tun is missing");
    let mut request = TunRequest { name: [0; 16], flags: TUN_WITHOUT_HEADER, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the request is as long as struct ifreq and lives through the call.
    let r = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, &raw mut request) };
    assert_eq!(r, 0, "{name}: {}", std::io::Error::last_os_error());
    file
}
