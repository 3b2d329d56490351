//! The managed /etc/hosts of a pod.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::HostAlias;

fn aliases(out: &mut String, list: &[HostAlias]) {
    if list.is_empty() {
        return;
    }
    out.push_str("\n# Entries added by HostAliases.\n");
    for a in list {
        out.push_str(&format!(
            "{}\t{}\n",
            a.ip,
            a.hostnames.iter().flatten().cloned().collect::<Vec<_>>().join("\t")
        ));
    }
}

/// For a pod with its own network.
pub fn managed(ips: &[IpAddr], hostname: &str, domain: &str, host_aliases: &[HostAlias]) -> String {
    let mut out = String::from(
        "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    for ip in ips {
        if domain.is_empty() {
            out.push_str(&format!("{ip}\t{hostname}\n"));
        } else {
            out.push_str(&format!("{ip}\t{hostname}.{domain}\t{hostname}\n"));
        }
    }
    aliases(&mut out, host_aliases);
    out
}

/// For a pod in the node's network: the node's own file and the aliases.
pub fn from_node(node_file: &str, host_aliases: &[HostAlias]) -> String {
    let mut out = String::from("# Kubernetes-managed hosts file (host network).\n");
    out.push_str(node_file);
    aliases(&mut out, host_aliases);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_aliases() {
        let alias = HostAlias { ip: "1.2.3.4".into(), hostnames: Some(vec!["a".into(), "b".into()]) };
        let text = managed(&["10.0.0.5".parse().unwrap()], "p", "s.n.svc.x", &[alias]);
        assert!(text.contains("10.0.0.5\tp.s.n.svc.x\tp\n"));
        assert!(text.ends_with("\n# Entries added by HostAliases.\n1.2.3.4\ta\tb\n"));
        assert!(managed(&["10.0.0.5".parse().unwrap()], "p", "", &[]).ends_with("10.0.0.5\tp\n"));
    }
}
