//! What the values of flags must be like beyond their types. Pure; an error says what to write instead.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};

/// The longest path of a unix socket, in bytes.
const SOCKET_PATH: usize = 107;
/// The longest name of a link, in bytes.
const LINK_NAME: usize = 15;
/// A smaller Service network has no room for the cluster's own Services beside the user's.
const SMALLEST_SERVICE_CIDR: u8 = 28;
/// The part of the cluster's network that each node gets, per family.
pub const NODE_PREFIX: (u8, u8) = (24, 64);

/// `unix:///path`, `unix:/path` or a plain path, as a path.
pub fn socket_path(endpoint: &str) -> &str {
    endpoint.strip_prefix("unix://").or_else(|| endpoint.strip_prefix("unix:")).unwrap_or(endpoint)
}

pub fn endpoint(text: &str) -> Result<String, String> {
    let path = socket_path(text);
    if path.is_empty() || path.contains("://") {
        return Err("only unix sockets are spoken to; write unix:///PATH".into());
    }
    if path.len() > SOCKET_PATH {
        return Err(format!("a unix socket's path has at most {SOCKET_PATH} bytes"));
    }
    Ok(text.to_owned())
}

pub fn link_name(text: &str) -> Result<String, String> {
    let usable = |b: u8| b.is_ascii_graphic() && b != b'/' && b != b':' && b != b'%';
    if text.is_empty() || text.len() > LINK_NAME || !text.bytes().all(usable) || [".", ".."].contains(&text) {
        return Err(format!("a link's name has 1 to {LINK_NAME} letters, digits, '-', '_' or '.'"));
    }
    Ok(text.to_owned())
}

pub fn dns_address(text: &str) -> Result<IpAddr, String> {
    let address: IpAddr = text.parse().map_err(|_| "write an IP address")?;
    if address.is_loopback() || address.is_unspecified() || address.is_multicast() {
        return Err(
            "pods must be able to ask it: write a link-local or private address that nobody has".into()
        );
    }
    Ok(address)
}

pub fn cgroup(text: &str) -> Result<String, String> {
    if !text.starts_with('/') || text.split('/').any(|part| part == "..") {
        return Err("write a path from the root of the hierarchy, as in /pods, without ..".into());
    }
    Ok(text.to_owned())
}

pub fn service_cidr(text: &str) -> Result<Ipv4Net, String> {
    let net: Ipv4Net = text.parse().map_err(|_| "write an IPv4 network, as in 10.96.0.0/12")?;
    if net.prefix_len() > SMALLEST_SERVICE_CIDR {
        return Err(format!("too small for Services: at least a /{SMALLEST_SERVICE_CIDR}"));
    }
    Ok(net.trunc())
}

pub fn cluster_cidr(text: &str) -> Result<IpNet, String> {
    let net: IpNet = text.parse().map_err(|_| "write a network, as in 10.244.0.0/16")?;
    let each = if net.addr().is_ipv4() { NODE_PREFIX.0 } else { NODE_PREFIX.1 };
    if net.prefix_len() > each {
        return Err(format!("too small: each node gets a /{each} of it"));
    }
    Ok(net.trunc())
}

/// Services and pods must not share addresses.
pub fn apart(services: Ipv4Net, pods: IpNet) -> Result<(), String> {
    let services = IpNet::from(services);
    if services.contains(&pods) || pods.contains(&services) {
        return Err(format!(
            "--service-cidr {services} and --cluster-cidr {pods} overlap; Services and pods need networks of their own"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        for good in ["unix:///run/a.sock", "unix:/run/a.sock", "/run/a.sock", "a.sock"] {
            assert_eq!(endpoint(good).as_deref(), Ok(good));
        }
        for bad in ["", "unix://", "tcp://1.2.3.4:5", "npipe:////./pipe/x", &format!("/{}", "a".repeat(107))]
        {
            assert!(endpoint(bad).is_err(), "{bad}");
        }
        assert_eq!(socket_path("unix:///run/a.sock"), "/run/a.sock");
    }

    #[test]
    fn links() {
        for good in ["orlop-dns", "a", "fifteen-letters"] {
            assert!(link_name(good).is_ok(), "{good}");
        }
        for bad in ["", "sixteen--letters", "a b", "a/b", "..", "a:b", "%d", "ö"] {
            assert!(link_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn dns_addresses() {
        for good in ["169.254.20.10", "fd00::10", "10.0.0.10"] {
            assert!(dns_address(good).is_ok(), "{good}");
        }
        for bad in ["x", "127.0.0.1", "0.0.0.0", "224.0.0.1", "::1", "::"] {
            assert!(dns_address(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn cgroups() {
        for good in ["/", "/pods", "/a/b"] {
            assert!(cgroup(good).is_ok(), "{good}");
        }
        for bad in ["", "pods", "/a/../../b", "/.."] {
            assert!(cgroup(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn networks() {
        assert_eq!(service_cidr("10.96.3.4/12").map(|n| n.to_string()).as_deref(), Ok("10.96.0.0/12"));
        assert_eq!(cluster_cidr("10.244.1.2/16").map(|n| n.to_string()).as_deref(), Ok("10.244.0.0/16"));
        assert!(cluster_cidr("fd00::/64").is_ok() && cluster_cidr("10.0.0.0/24").is_ok());
        for bad in ["x", "10.0.0.0/31", "10.0.0.0/40", "fd00::/64"] {
            assert!(service_cidr(bad).is_err(), "{bad}");
        }
        for bad in ["x", "10.0.0.0/25", "fd00::/65"] {
            assert!(cluster_cidr(bad).is_err(), "{bad}");
        }
        for (services, pods, good) in [
            ("10.96.0.0/12", "10.244.0.0/16", true),
            ("10.96.0.0/12", "fd00::/48", true),
            ("10.96.0.0/12", "10.97.0.0/16", false),
            ("10.97.0.0/16", "10.96.0.0/12", false),
        ] {
            let (services, pods) = (services.parse().unwrap(), pods.parse().unwrap());
            assert_eq!(apart(services, pods).is_ok(), good, "{services} {pods}");
        }
    }
}
