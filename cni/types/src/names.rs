use crate::Attachment;

/// FNV-1a: stable across builds, and spread well enough for names on one node. Callers keep parts apart by a byte that
/// none of them has.
pub fn stable_hash(seed: u64, parts: &[&[u8]]) -> u64 {
    let mut h = 0xcbf2_9ce4_8422_2325_u64 ^ seed;
    for byte in parts.iter().copied().flatten() {
        h = (h ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    // FNV's upper bits mix late; fold them.
    h ^ (h >> 29)
}

/// The beginning of the name of every host-side interface that `orlop-cni` makes.
pub const HOST_INTERFACE_PREFIX: &str = "orlp";

fn hash(seed: u64, attachment: &Attachment) -> u64 {
    stable_hash(seed, &[attachment.container_id.as_bytes(), b"\0", attachment.ifname.as_bytes()])
}

impl Attachment {
    /// Name of the host side of the attachment's veth pair: 15 bytes, the kernel's limit.
    pub fn host_interface(&self) -> String {
        format!("{HOST_INTERFACE_PREFIX}{:011x}", hash(0, self) & 0xfff_ffff_ffff)
    }

    /// Locally administered hardware addresses of the host's side and of the pod's side.
    pub fn macs(&self) -> ([u8; 6], [u8; 6]) {
        let mac = |seed| {
            let h = hash(seed, self).to_be_bytes();
            [0x02 | (h[1] & 0xfc), h[2], h[3], h[4], h[5], h[6]]
        };
        (mac(0x5bd1_e995), mac(0x9747_b28c))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_stable_short_and_differ() {
        let a = Attachment { container_id: "a".repeat(64), ifname: "eth0".into() };
        let b = Attachment { ifname: "eth1".into(), ..a.clone() };
        assert_eq!(a.host_interface(), a.clone().host_interface());
        assert_eq!(a.host_interface().len(), 15);
        assert_ne!(a.host_interface(), b.host_interface());
        let (host, pod) = a.macs();
        assert_ne!(host, pod);
        for mac in [host, pod] {
            assert_eq!(mac[0] & 3, 2, "locally administered, unicast");
        }
    }
}
