//! One request of nf_tables (linux/netfilter/nf_tables.h): criu closes a pod's network by a table of its own, and one that is
//! killed leaves it closed.

use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

const NFPROTO_INET: u8 = 1;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFT_MSG_DELTABLE: u16 = NFNL_SUBSYS_NFTABLES << 8 | 2;
const NFTA_TABLE_NAME: u16 = 1;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;

/// Pure: one message with its nfgenmsg and at most one attribute, padded to four bytes.
fn message(kind: u16, flags: u16, sequence: u32, family: u8, resource: u16, name: Option<&str>) -> Vec<u8> {
    let mut body = vec![family, 0];
    body.extend(resource.to_be_bytes());
    if let Some(name) = name {
        // A name of ours is short and without NUL.
        let length = 4 + name.len() + 1;
        body.extend((length as u16).to_ne_bytes());
        body.extend(NFTA_TABLE_NAME.to_ne_bytes());
        body.extend(name.as_bytes());
        body.push(0);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let mut out = Vec::new();
    out.extend((16 + body.len() as u32).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    out.extend(sequence.to_ne_bytes());
    out.extend(0u32.to_ne_bytes());
    out.extend(body);
    out
}

fn deletion(table: &str) -> Vec<u8> {
    let mut batch = message(NFNL_MSG_BATCH_BEGIN, 0, 1, 0, NFNL_SUBSYS_NFTABLES, None);
    batch.extend(message(NFT_MSG_DELTABLE, NLM_F_ACK, 2, NFPROTO_INET, 0, Some(table)));
    batch.extend(message(NFNL_MSG_BATCH_END, 0, 3, 0, NFNL_SUBSYS_NFTABLES, None));
    batch
}

/// Deletes a table of the family inet in the caller's network namespace; `false`: there is none.
pub(super) fn delete_table(table: &str) -> io::Result<bool> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket =
        match socket(AddressFamily::Netlink, SockType::Raw, flags, Some(SockProtocol::NetlinkNetFilter)) {
            // A kernel without nf_tables.
            Err(nix::Error::EPROTONOSUPPORT) => return Ok(false),
            other => other?,
        };
    sendto(socket.as_raw_fd(), &deletion(table), &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = [0u8; 1024];
    let n = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let answer = &answer[..n];
    let kind = answer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes);
    let code = answer.get(16..20).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(true),
        (Some(NLMSG_ERROR), Some(e)) if matches!(-e, libc::ENOENT | libc::EOPNOTSUPP) => Ok(false),
        (Some(NLMSG_ERROR), Some(e)) => Err(io::Error::from_raw_os_error(-e)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel answered something else")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_three_padded_messages() {
        let batch = deletion("CRIU-7");
        assert_eq!(batch.len(), 20 + (20 + 12) + 20);
        assert_eq!(&batch[20 + 20 + 4..20 + 20 + 11], b"CRIU-7\0");
        assert_eq!(batch[20 + 20], 11, "the attribute's length is without padding");
    }
}
