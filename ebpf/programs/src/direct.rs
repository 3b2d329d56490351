//! Direct server return: a backend's node answers a client of another node itself, under the Service's name. The first
//! packet of the connection tells it that name, in an option of its IP header.
//!
//! Only TCP: datagrams have no first one, and would all have to grow.

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_NET;
use aya_ebpf::helpers::{bpf_csum_diff, bpf_skb_adjust_room, bpf_skb_store_bytes};
use aya_ebpf::programs::TcContext;
use orlop_ebpf_common::direct::{LEN4, LEN6, OPTION4, OPTION6};
use orlop_ebpf_common::*;

use crate::maps::*;
use crate::parse::{half, load, word};

const DESTINATION_OPTIONS: u8 = 60;

/// Puts the address and port that the client asked for into the packet.
#[inline(always)]
pub fn tell(ctx: &TcContext, s: &mut Scratch) -> Option<()> {
    let (l3, v4) = (s.packet.l3, s.packet.v4);
    let length = if v4 { LEN4 } else { LEN6 };
    // SAFETY: the context is valid while the program runs.
    let r = unsafe { bpf_skb_adjust_room(ctx.skb.skb.cast(), length as i32, BPF_ADJ_ROOM_NET, 0) };
    if r != 0 {
        return None;
    }
    let port = s.packet.dport.to_be_bytes();
    if v4 {
        load::<20>(ctx, l3, &mut s.head)?;
        let old = word(&s.head, 0);
        if s.head[0] & 0x0f > 13 {
            return None;
        }
        let total = (half(&s.head, 2) + LEN4 as u16).to_be_bytes();
        s.head[0] += (LEN4 / 4) as u8;
        (s.head[2], s.head[3]) = (total[0], total[1]);
        let new = word(&s.head, 0);
        ctx.store(l3 as usize, &new, 0).ok()?;
        let first = u32::from_ne_bytes([OPTION4, LEN4 as u8, port[0], port[1]]);
        let words = [old, 0, 0, new, first, s.packet.dst[3]];
        // SAFETY: both halves are 12 bytes long and only read.
        let diff =
            unsafe { bpf_csum_diff(words.as_ptr().cast_mut(), 12, words.as_ptr().add(3).cast_mut(), 12, 0) };
        ctx.l3_csum_replace(l3 as usize + 10, 0, diff as u64, 0).ok()?;
        ctx.store(l3 as usize + 20, &[first, s.packet.dst[3]], 0).ok()
    } else {
        load::<8>(ctx, l3, &mut s.head)?;
        let total = (half(&s.head, 4) + LEN6 as u16).to_be_bytes();
        let next = s.head[6];
        ctx.store(l3 as usize + 4, &[total[0], total[1], DESTINATION_OPTIONS], 0).ok()?;
        let head = &mut s.head;
        (head[0], head[1]) = (next, (LEN6 / 8 - 1) as u8);
        (head[2], head[3]) = (OPTION6, (LEN6 - 4) as u8);
        (head[4], head[5]) = (port[0], port[1]);
        (head[6], head[7]) = (0, 0);
        for (i, w) in s.packet.dst.iter().enumerate() {
            let bytes = w.to_ne_bytes();
            for (j, b) in bytes.iter().enumerate() {
                head[8 + i * 4 + j] = *b;
            }
        }
        // SAFETY: the room holds that many bytes.
        let r = unsafe {
            bpf_skb_store_bytes(ctx.skb.skb.cast(), l3 + 40, s.head.as_ptr().cast(), LEN6 as u32, 0)
        };
        if r == 0 { Some(()) } else { None }
    }
}

/// Reads what another node told: the address and port that the client asked for, into the reply's entry.
#[inline(always)]
pub fn told(ctx: &TcContext, s: &mut Scratch) -> Option<()> {
    let (l3, v4) = (s.packet.l3, s.packet.v4);
    let taken = s.packet.l4 - l3;
    if v4 {
        if taken < 20 + LEN4 as u32 {
            return None;
        }
        load::<8>(ctx, l3 + 20, &mut s.head)?;
        if s.head[0] != OPTION4 || s.head[1] != LEN4 as u8 {
            return None;
        }
        (s.reply.src, s.reply.sport) = (addr4(word(&s.head, 4)), half(&s.head, 2));
    } else {
        if taken < 40 + LEN6 as u32 {
            return None;
        }
        load::<1>(ctx, l3 + 6, &mut s.head)?;
        if s.head[0] != DESTINATION_OPTIONS {
            return None;
        }
        load::<24>(ctx, l3 + 40, &mut s.head)?;
        if s.head[2] != OPTION6 || s.head[3] != (LEN6 - 4) as u8 {
            return None;
        }
        s.reply.src = [word(&s.head, 8), word(&s.head, 12), word(&s.head, 16), word(&s.head, 20)];
        s.reply.sport = half(&s.head, 4);
    }
    Some(())
}
