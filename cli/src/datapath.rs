//! What the service proxy does with packets: the same flags wherever it runs.

use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};
use orlop_proxy::NodePortAddress;

/// Flags of `orlop proxy`.
#[derive(Clone, Debug, Args)]
pub struct DatapathArgs {
    /// Addresses of this node where node ports answer: CIDRs, or primary for those of the Node object [default: all] (repeatable)
    #[arg(long = "nodeport-address", value_name = "CIDR|primary")]
    pub nodeport_addresses: Vec<NodePortAddress>,

    /// Interfaces that clients outside of the node come in by [default: found by their addresses] (repeatable)
    #[arg(long = "uplink", value_name = "NAME")]
    pub uplinks: Vec<String>,

    /// Uplinks whose driver sends packets of known connections on by itself, if it can (repeatable)
    #[arg(long, value_name = "NAME")]
    pub xdp: Vec<String>,

    /// Let the backend's node answer TCP clients of node ports and load balancers itself; all nodes must have it
    #[arg(long)]
    pub direct_return: bool,

    /// Send established connections of clients outside of the node past the kernel's forwarding, packet filters and connection tracking
    #[arg(long)]
    pub host_routing: bool,

    /// Leave packets of pods alone that no socket has translated, as of virtual machines; packets of pods cost less without
    #[arg(long, conflicts_with = "host_routing")]
    pub no_pod_packets: bool,

    /// How backends are chosen for clients outside of the node, where a Service does not say: maglev or random
    #[arg(long, value_name = "HOW", default_value = "maglev", value_parser = selection)]
    pub selection: orlop_proxy::Selection,

    /// Room in a table of the kernel's: frontends, slots, backends, connections, sockets, addresses or interfaces (repeatable)
    #[arg(long = "map-size", value_name = "NAME=ENTRIES", value_parser = map_size)]
    pub map_sizes: Vec<(String, u32)>,
}

impl DatapathArgs {
    /// Puts the flags into the proxy's configuration.
    pub fn apply(&self, config: &mut orlop_proxy::Config) {
        if !self.nodeport_addresses.is_empty() {
            config.node_port_addresses = self.nodeport_addresses.clone();
        }
        config.uplinks = self.uplinks.clone();
        config.datapath.xdp = self.xdp.clone();
        config.direct_return = self.direct_return;
        config.host_routing = self.host_routing;
        config.pod_packets = !self.no_pod_packets;
        config.selection = self.selection;
        for (name, entries) in &self.map_sizes {
            if let Some(size) = config.datapath.sizes.named(name) {
                *size = *entries;
            }
        }
    }
}

/// The same flags of a command that starts more than the proxy: each begins with `--proxy-`.
#[derive(Clone, Debug)]
pub struct PrefixedDatapathArgs(pub DatapathArgs);

fn prefixed(arg: &Arg) -> Arg {
    match arg.get_long() {
        // Flags' names live as long as the program; these are made once or twice.
        Some(long) => arg.clone().long(&*Box::leak(format!("proxy-{long}").into_boxed_str())),
        None => arg.clone(),
    }
}

impl Args for PrefixedDatapathArgs {
    fn augment_args(command: Command) -> Command {
        command.args(DatapathArgs::augment_args(Command::new("proxy")).get_arguments().map(prefixed))
    }

    fn augment_args_for_update(command: Command) -> Command {
        PrefixedDatapathArgs::augment_args(command)
    }
}

impl FromArgMatches for PrefixedDatapathArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        DatapathArgs::from_arg_matches(matches).map(PrefixedDatapathArgs)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.update_from_arg_matches(matches)
    }
}

fn selection(name: &str) -> Result<orlop_proxy::Selection, &'static str> {
    orlop_proxy::Selection::named(name).ok_or("write maglev or random")
}

fn map_size(text: &str) -> Result<(String, u32), &'static str> {
    let (name, entries) = text.split_once('=').ok_or("write NAME=ENTRIES")?;
    if orlop_proxy::Sizes::default().named(name).is_none() {
        return Err(
            "the names are frontends, slots, backends, connections, sockets, addresses and interfaces",
        );
    }
    let entries = entries.parse().ok().filter(|n| (1..=1 << 26).contains(n));
    Ok((name.to_owned(), entries.ok_or("write a number of entries from 1 to 67108864")?))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;
    use orlop_proxy::{Config, Selection};

    use crate::args::{Cli, Command};
    use crate::node::Node;

    /// Those that exclude each other are not among them.
    const FLAGS: [&str; 8] = [
        "nodeport-address=10.0.0.0/8",
        "uplink=eth0",
        "uplink=eth1",
        "xdp=eth0",
        "direct-return",
        "selection=random",
        "map-size=connections=4096",
        "map-size=slots=8192",
    ];

    /// The proxy's configuration, by its own command or by one that starts it among others.
    fn config(words: &[&str], prefix: &str, flags: &[&str]) -> Result<Config, clap::Error> {
        let flags = flags.iter().map(|f| format!("--{prefix}{f}"));
        let words = ["orlop"].iter().chain(words).map(|w| (*w).to_owned());
        let node = |args| Node::new(args, Path::new("/d"), "", &[]).unwrap().proxy_config(Path::new("k"));
        Ok(match Cli::try_parse_from(words.chain(flags))?.command {
            Command::Up(a) => node(&a.node),
            Command::Agent(a) => node(&a.node),
            Command::Proxy(a) => {
                let mut c = Config::new("k".into(), "n".into());
                a.datapath.apply(&mut c);
                c
            }
            other => panic!("{other:?}"),
        })
    }

    const COMMANDS: [(&[&str], &str); 3] = [
        (&["up", "--node-name", "n"], "proxy-"),
        (&["agent", "--kubeconfig", "k", "--node-name", "n"], "proxy-"),
        (&["proxy", "--kubeconfig", "k"], ""),
    ];

    #[test]
    fn the_same_flags_say_the_same_wherever_the_proxy_runs() {
        for (words, prefix) in COMMANDS {
            let c = config(words, prefix, &FLAGS).unwrap();
            assert_eq!(c.node_port_addresses, ["10.0.0.0/8".parse().unwrap()]);
            assert_eq!(
                (c.uplinks.clone(), c.datapath.xdp.clone()),
                (vec!["eth0".into(), "eth1".into()], vec!["eth0".into()])
            );
            assert!(c.direct_return && !c.host_routing && c.pod_packets && c.selection == Selection::Random);
            assert_eq!((c.datapath.sizes.connections, c.datapath.sizes.slots), (4096, 8192));
            let c = config(words, prefix, &["host-routing"]).unwrap();
            assert!(c.host_routing && !c.direct_return);
            assert!(!config(words, prefix, &["no-pod-packets"]).unwrap().pod_packets);
            // Without any: what the proxy does by itself.
            let (c, own) = (config(words, prefix, &[]).unwrap(), Config::new("k".into(), "n".into()));
            assert_eq!(format!("{c:?}"), format!("{own:?}"));
        }
    }

    #[test]
    fn a_mistake_is_told_by_the_name_that_the_flag_has_there() {
        for (words, prefix) in COMMANDS {
            for (flags, parts) in [
                (&["map-size=x=1"][..], &["map-size", "the names are frontends"][..]),
                (&["map-size=slots=0"], &["map-size", "from 1 to"]),
                (&["selection=best"], &["selection", "write maglev or random"]),
                (
                    &["host-routing", "no-pod-packets"],
                    &["host-routing", "no-pod-packets", "cannot be used with"],
                ),
            ] {
                let text = config(words, prefix, flags).unwrap_err().to_string();
                assert!(parts.iter().all(|p| text.contains(p)), "{text}");
                assert!(text.contains(&format!("--{prefix}{}", parts[0])), "{text}");
            }
            // By the other name it is none.
            let other = if prefix.is_empty() { "proxy-" } else { "" };
            assert!(config(words, other, &["direct-return"]).is_err());
        }
    }
}
