//! What kube-proxy leaves on a node when it goes: nftables tables, iptables chains, IPVS servers. Removed on request, by
//! the tools that it used itself; what is not kube-proxy's stays, the kubelet's chains among it.

use std::collections::HashSet;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::Error;

/// Chains of kube-proxy by their whole names, in all its modes.
const CHAINS: [&str; 15] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-MARK-MASQ",
    "KUBE-FORWARD",
    "KUBE-PROXY-FIREWALL",
    "KUBE-PROXY-CANARY",
    "KUBE-LOAD-BALANCER",
    "KUBE-NODE-PORT",
    "KUBE-FIREWALL-ALLOW",
    "KUBE-SOURCE-RANGES-FIREWALL",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
    "KUBE-NODEPORT",
];
/// And of its Services, by how they begin.
const SERVICE_CHAINS: [&str; 6] =
    ["KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-"];
const IPVS_LINK: &str = "kube-ipvs0";

fn is_ours(chain: &str) -> bool {
    CHAINS.contains(&chain) || SERVICE_CHAINS.iter().any(|p| chain.starts_with(p))
}

/// From `iptables-save`'s text to what `iptables-restore --noflush` is to be given: rules of others that lead to
/// kube-proxy's chains go, then the chains. `None`: there is nothing of kube-proxy. Pure.
fn undo(saved: &str) -> Option<String> {
    let mut out = String::new();
    let mut table = Vec::new();
    let mut found = false;
    for line in saved.lines() {
        if line.starts_with('*') {
            table.clear();
            out.push_str(line);
            out.push('\n');
        } else if let Some(chain) = line.strip_prefix(':').and_then(|l| l.split(' ').next()) {
            if is_ours(chain) {
                // Declaring a chain empties it.
                out.push_str(&format!(":{chain} - [0:0]\n"));
                table.push(chain);
                found = true;
            }
        } else if let Some(rule) = line.strip_prefix("-A ") {
            let mut words = rule.split(' ');
            let chain = words.next().unwrap_or_default();
            let leads = words.clone().zip(words.skip(1)).any(|(a, b)| matches!(a, "-j" | "-g") && is_ours(b));
            if !is_ours(chain) && leads {
                out.push_str(&format!("-D {rule}\n"));
            }
        } else if line == "COMMIT" {
            for chain in &table {
                out.push_str(&format!("-X {chain}\n"));
            }
            out.push_str("COMMIT\n");
        }
    }
    found.then_some(out)
}

/// What [`remove`] did.
#[derive(Debug, Default)]
pub struct Report {
    pub removed: Vec<String>,
    /// What nobody looked for, and why: a kube-proxy in a container brings tools of its own, which the node need not have.
    pub unseen: Vec<String>,
}

/// Removes it all from this network namespace.
pub fn remove() -> Result<Report, Error> {
    let Report { mut removed, mut unseen } = Report::default();
    let mut need = |tool: &str, what: &str| {
        if !is_installed(tool) {
            unseen.push(format!("{what}: {tool} is not installed"));
        }
    };
    need("nft", "nftables tables");
    need("ip", "IPVS servers");
    for family in ["ip", "ip6"] {
        if run("nft", &["list", "table", family, "kube-proxy"], None)?.is_some() {
            done("nft", &["delete", "table", family, "kube-proxy"], None)?;
            removed.push(format!("nftables table {family} kube-proxy"));
        }
    }
    for family in ["iptables", "ip6tables"] {
        // Both kinds, as a node may have changed from one to the other.
        for kind in ["nft", "legacy"] {
            let tool = |what: &str| format!("{family}-{kind}-{what}");
            if kind == "nft" || has_legacy_tables(family) {
                need(&tool("save"), &format!("chains of {family} ({kind})"));
            }
            let Some(undo) = run(&tool("save"), &[], None)?.and_then(|s| undo(&s)) else { continue };
            done(&tool("restore"), &["--noflush"], Some(&undo))?;
            removed.push(format!("chains of {family} ({kind})"));
        }
    }
    if let Some(shown) = run("ip", &["-o", "addr", "show", "dev", IPVS_LINK], None)? {
        let own: Vec<&str> =
            shown.lines().filter_map(|l| l.split_whitespace().nth(3)?.split('/').next()).collect();
        // Without them nobody could tell any more which servers were kube-proxy's.
        let [servers, sets] = [("ipvsadm", "-Sn"), ("ipset", "save")].map(|(tool, what)| said(tool, &[what]));
        for (protocol, server) in own_servers(&servers?, &own, &sets?) {
            done("ipvsadm", &["-D", &protocol, &server], None)?;
        }
        done("ip", &["link", "del", IPVS_LINK], None)?;
        removed.push(format!("IPVS servers and the link {IPVS_LINK}"));
    }
    let sets = run("ipset", &["list", "-n"], None)?.unwrap_or_default();
    for set in sets.lines().filter(|s| s.starts_with("KUBE-")) {
        done("ipset", &["destroy", set], None)?;
        removed.push(format!("IP set {set}"));
    }
    Ok(Report { removed, unseen })
}

fn is_installed(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(tool).exists())
}

fn has_legacy_tables(family: &str) -> bool {
    let names = if family == "iptables" { "ip_tables_names" } else { "ip6_tables_names" };
    let names = std::fs::read_to_string(Path::new("/proc/thread-self/net").join(names));
    names.is_ok_and(|n| !n.is_empty())
}

/// Virtual servers of `ipvsadm -Sn`'s text whose addresses are on kube-proxy's link, or that stand in its sets (`ipset save`): those
/// of node ports have the node's addresses. Pure.
fn own_servers(saved: &str, link: &[&str], sets: &str) -> Vec<(String, String)> {
    let mut listed = HashSet::new();
    for line in sets.lines().filter_map(|l| l.strip_prefix("add KUBE-")) {
        match line.split_once(' ') {
            Some((_, entry)) if entry.contains(',') => listed.insert(entry.to_owned()),
            // A set of ports is of one protocol, which its name ends with.
            Some((set, port)) if set.contains("NODE-PORT-") => {
                let protocol = set.rsplit('-').next().unwrap_or_default().to_lowercase();
                listed.insert(format!("{protocol}:{port}"))
            }
            _ => false,
        };
    }
    let parse = |l: &str| {
        let mut words = l.strip_prefix("-A ")?.split(' ');
        let (flag, server) = (words.next()?, words.next()?);
        let (address, port) = server.rsplit_once(':')?;
        let address = address.trim_matches(['[', ']']);
        let protocol = match flag {
            "-t" => "tcp",
            "-u" => "udp",
            _ => "sctp",
        };
        let port = format!("{protocol}:{port}");
        let own = link.contains(&address)
            || listed.contains(&port)
            || listed.contains(&format!("{address},{port}"));
        own.then(|| (flag.to_owned(), server.to_owned()))
    };
    saved.lines().filter_map(parse).collect()
}

/// The tool's output; `None` when it is not there or does not know what it is asked for.
fn run(tool: &str, args: &[&str], input: Option<&str>) -> Result<Option<String>, Error> {
    let failed = |source| Error::Leftovers { tool: tool.to_owned(), source };
    let child = Command::new(tool)
        .args(args)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = match child {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        c => c.map_err(failed)?,
    };
    if let (Some(mut pipe), Some(text)) = (child.stdin.take(), input) {
        pipe.write_all(text.as_bytes()).map_err(failed)?;
    }
    let out = child.wait_with_output().map_err(failed)?;
    Ok(out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned()))
}

/// The output of a tool that is needed.
fn said(tool: &str, args: &[&str]) -> Result<String, Error> {
    run(tool, args, None)?.ok_or_else(|| refused(tool, args))
}

fn refused(tool: &str, args: &[&str]) -> Error {
    let source =
        std::io::Error::other(format!("{tool} {} failed, or {tool} is not installed", args.join(" ")));
    Error::Leftovers { tool: tool.to_owned(), source }
}

fn done(tool: &str, args: &[&str], input: Option<&str>) -> Result<(), Error> {
    run(tool, args, input)?.map(drop).ok_or_else(|| refused(tool, args))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_of_kube_proxy_go_and_others_stay() {
        let saved = "# by iptables-save\n*nat\n:PREROUTING ACCEPT [1:60]\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-ABC - [0:0]\n\
                     :KUBE-KUBELET-CANARY - [0:0]\n:MINE - [0:0]\n\
                     -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
                     -A PREROUTING -j MINE\n-A KUBE-SERVICES -d 10.96.0.1/32 -j KUBE-SVC-ABC\n-A MINE -j RETURN\nCOMMIT\n\
                     *filter\n:INPUT DROP [0:0]\n-A INPUT -j ACCEPT\nCOMMIT\n";
        assert_eq!(
            undo(saved).unwrap(),
            "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-ABC - [0:0]\n\
             -D PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
             -X KUBE-SERVICES\n-X KUBE-SVC-ABC\nCOMMIT\n*filter\nCOMMIT\n"
        );
        assert_eq!(undo("*nat\n:KUBE-KUBELET-CANARY - [0:0]\n:KUBE-FIREWALL - [0:0]\nCOMMIT\n"), None);
    }

    #[test]
    fn servers_of_its_link_and_of_its_sets_are_its_own() {
        let saved = "-A -t 10.96.0.1:443 -s rr\n-a -t 10.96.0.1:443 -r 10.0.0.1:6443 -m -w 1\n-A -u [fd00::a]:53 -s rr\n\
                     -A -t 192.0.2.1:80 -s wlc\n-A -t 192.0.2.1:30080 -s rr\n-A -u 192.0.2.1:30080 -s rr\n\
                     -A -t 192.0.2.1:8080 -s rr\n-A -t [2001:db8::1]:30081 -s rr\n-A --sctp-service 192.0.2.1:30082 -s rr\n\
                     -A -t 192.0.2.1:32080 -s rr\n-A -f 7 -s rr\n";
        let sets = "create KUBE-NODE-PORT-TCP bitmap:port range 0-65535\nadd KUBE-NODE-PORT-TCP 30080\n\
                    add KUBE-6-NODE-PORT-TCP 30081\nadd KUBE-NODE-PORT-SCTP-HASH 192.0.2.1,sctp:30082\n\
                    add KUBE-EXTERNAL-IP 192.0.2.1,tcp:8080\nadd KUBE-HEALTH-CHECK-NODE-PORT 32080\n\
                    add KUBE-LOOP-BACK 192.0.2.1,tcp:80,192.0.2.1\nadd MINE 192.0.2.1,tcp:80\n";
        let found = own_servers(saved, &["10.96.0.1", "fd00::a"], sets);
        let expected = [
            ("-t", "10.96.0.1:443"),
            ("-u", "[fd00::a]:53"),
            ("-t", "192.0.2.1:30080"),
            ("-t", "192.0.2.1:8080"),
            ("-t", "[2001:db8::1]:30081"),
            ("--sctp-service", "192.0.2.1:30082"),
        ];
        assert_eq!(found, expected.map(|(p, s)| (p.to_owned(), s.to_owned())));
    }
}
