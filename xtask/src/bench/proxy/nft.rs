//! A rule set of the shape that kube-proxy's nftables mode makes: a verdict map from address, protocol and port to a chain
//! for each Service, in it a choice among chains of endpoints. It stands for kube-proxy where that is not installed.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Stdio;

use super::super::{Result, text};
use super::load::{BULK, PING};
use super::world::{NODE, Net, POD};
use super::{ENDPOINTS, NODE_PORTS};

/// Rules for `services`, and for the node ports that are measured.
fn rules(services: usize) -> Result<String> {
    let (mut chains, mut addresses, mut ports) = (String::new(), Vec::new(), Vec::new());
    let mut add = |name: &str, vip: Ipv4Addr, port: u16, endpoints: &[(Ipv4Addr, u16)]| -> std::fmt::Result {
        let mut choice = Vec::new();
        for (i, (ip, number)) in endpoints.iter().enumerate() {
            writeln!(
                chains,
                "chain endpoint-{name}-{i} {{ ip saddr {ip} jump mark-for-masquerade; meta l4proto tcp dnat to {ip}:{number}; }}"
            )?;
            choice.push(format!("{i} : goto endpoint-{name}-{i}"));
        }
        writeln!(
            chains,
            "chain service-{name} {{ ip daddr {vip} tcp dport {port} ip saddr != 10.72.128.0/24 jump mark-for-masquerade; \
             numgen random mod {} vmap {{ {} }}; }}",
            choice.len(),
            choice.join(", ")
        )?;
        writeln!(chains, "chain external-{name} {{ jump mark-for-masquerade; goto service-{name}; }}")?;
        addresses.push(format!("{vip} . tcp . {port} : goto service-{name}"));
        Ok(())
    };
    for i in 0..services {
        let endpoints: Vec<_> = (0..ENDPOINTS).map(|e| (super::endpoint(i, e), 80)).collect();
        add(&format!("s{i}"), super::vip(i), 80, &endpoints).map_err(text)?;
    }
    for (node_port, number) in NODE_PORTS.into_iter().zip([PING, BULK]) {
        add(&format!("web{number}"), super::WEB, number, &[(POD, number)]).map_err(text)?;
        ports.push(format!("tcp . {node_port} : goto external-web{number}"));
    }
    Ok(format!(
        "table ip kube-proxy {{
         chain mark-for-masquerade {{ meta mark set meta mark or 0x4000; }}
         {chains}
         set nodeport-ips {{ type ipv4_addr; elements = {{ {NODE} }}; }}
         map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; elements = {{ {} }}; }}
         map service-nodeports {{ type inet_proto . inet_service : verdict; elements = {{ {} }}; }}
         map no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
         map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; }}
         chain services {{
           ip daddr . meta l4proto . th dport vmap @service-ips
           ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
         }}
         chain service-endpoints-check {{ ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }}
         chain nodeport-endpoints-check {{ ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }}
         chain nat-prerouting {{ type nat hook prerouting priority -100; jump services; }}
         chain nat-output {{ type nat hook output priority -100; jump services; }}
         chain nat-postrouting {{
           type nat hook postrouting priority 100;
           meta mark & 0x4000 == 0 return
           meta mark set meta mark xor 0x4000
           masquerade fully-random
         }}
         chain filter-input {{ type filter hook input priority -110; ct state new jump nodeport-endpoints-check; ct state new jump service-endpoints-check; }}
         chain filter-forward {{ type filter hook forward priority -110; ct state new jump service-endpoints-check; }}
         chain filter-output {{ type filter hook output priority -110; ct state new jump service-endpoints-check; }}
         }}\n",
        addresses.join(", "),
        ports.join(", ")
    ))
}

/// Replaces the rules of a namespace.
pub fn load(net: &Net, services: usize) -> Result {
    let rules = format!("table ip kube-proxy {{}}\ndelete table ip kube-proxy\n{}", rules(services)?);
    let mut child = net
        .command(Path::new("nft"))
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(text)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(rules.as_bytes()).map_err(text)?;
    }
    let out = child.wait_with_output().map_err(text)?;
    let said: String = String::from_utf8_lossy(&out.stderr).chars().take(500).collect();
    if out.status.success() { Ok(()) } else { Err(format!("nft: {said}")) }
}
