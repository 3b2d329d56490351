//! Fuzz targets: what a plugin prints and what an operator writes. Known good inputs are mutated; proptest shrinks what fails. The
//! gate runs a fixed number of cases; for longer: `PROPTEST_CASES=1000000 cargo test --release -p orlop-cni-types fuzz`.

use proptest::prelude::*;
use serde_json::Value;

use crate::{CniResult, ErrorResult, NetworkConfig, PluginConfig, SpecVersion, VersionResult};

/// Pieces that mean something to one of the formats.
const WORDS: &[&str] = &[
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "18446744073709551616",
    "\"\"",
    "[]",
    "{}",
    ",",
    ":",
    "\"",
    "{",
    "}",
    "[",
    "]",
    "1.1.0",
    "0.1.0",
    "10.0.0.0/33",
    "::/129",
    "fe80::1%eth0/64",
    "..",
    "/",
    "\\u0000",
    "\u{feff}",
];

const RESULTS: &[&str] = &[
    r#"{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","mac":"00:11:22:33:44:55","mtu":1500,"sandbox":"/run/netns/a"},{"name":"veth1"}],"ips":[{"address":"10.1.2.3/24","gateway":"10.1.2.1","interface":0},{"address":"fd00::2/64","interface":0}],"routes":[{"dst":"0.0.0.0/0","gw":"10.1.2.1","mtu":1400,"priority":5,"table":3,"scope":0}],"dns":{"nameservers":["10.0.0.1"],"domain":"a","search":["b"],"options":["c"]}}"#,
    r#"{"cniVersion":"0.4.0","interfaces":null,"ips":[{"version":"4","address":"10.1.2.3/24"}],"routes":null,"dns":{}}"#,
];

const NETWORKS: &[&str] = &[
    r#"{"cniVersion":"1.1.0","cniVersions":["1.0.0","1.1.0"],"name":"net","disableCheck":true,"disableGC":false,"loadOnlyInlinedPlugins":true,"plugins":[{"type":"bridge","capabilities":{"ips":true},"ipam":{"type":"host-local","subnet":"10.0.0.0/8"},"dns":{"nameservers":["1.1.1.1"]}},{"type":"portmap"}]}"#,
    r#"{"cniVersion":"0.3.1","name":"cbr0","type":"flannel","delegate":{"hairpinMode":true}}"#,
];

fn mutated(seeds: &[&str]) -> impl Strategy<Value = Vec<u8>> {
    orlop_fuzz::mutated(seeds.iter().map(|s| s.as_bytes().to_vec()).collect(), WORDS)
}

proptest! {
    #![proptest_config(orlop_fuzz::cases(4096))]

    #[test]
    fn fuzz_result(bytes in mutated(RESULTS)) {
        let Ok(value) = serde_json::from_slice::<Value>(&bytes) else { return Ok(()) };
        let Ok(result) = CniResult::from_value(&value, SpecVersion::V1_0_0) else { return Ok(()) };
        // What is handed on to the next plugin can be read by it, and says the same.
        prop_assert!(result.pod_ips("eth0").len() <= result.ips.len());
        let again = CniResult::from_value(&result.to_value(SpecVersion::V1_1_0), SpecVersion::V1_1_0).unwrap();
        prop_assert_eq!(&again, &result);
        for version in [SpecVersion::V0_4_0, SpecVersion::V1_0_0] {
            CniResult::from_value(&result.to_value(version), version).unwrap();
        }
    }

    #[test]
    fn fuzz_network(bytes in mutated(NETWORKS)) {
        for parsed in [NetworkConfig::parse_list(&bytes), NetworkConfig::parse_single(&bytes)].into_iter().flatten() {
            // Its name becomes part of paths.
            prop_assert!(!parsed.name.is_empty() && !parsed.name.contains('/') && parsed.name != ".." && parsed.name != ".");
            if parsed.check_plugins().is_ok() {
                for p in &parsed.plugins {
                    // Each names a program in a folder.
                    prop_assert!(!p.plugin_type.is_empty() && !p.plugin_type.contains('/'), "{:?}", p.plugin_type);
                }
                let again = NetworkConfig::parse_list(parsed.to_value().to_string().as_bytes());
                prop_assert!(again.is_ok(), "{:?}", again.err());
            }
        }
        let _ = PluginConfig::parse(&bytes);
    }

    #[test]
    fn fuzz_errors_and_versions(bytes in mutated(&[
        r#"{"cniVersion":"1.0.0","code":11,"msg":"busy","details":"try again"}"#,
        r#"{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}"#,
    ])) {
        if let Ok(e) = serde_json::from_slice::<ErrorResult>(&bytes) {
            let _ = e.to_string();
        }
        let _ = serde_json::from_slice::<VersionResult>(&bytes);
        let _ = SpecVersion::parse(&String::from_utf8_lossy(&bytes));
    }
}
