//! Which hosts serve a registry, from containerd's `certs.d/<host>/hosts.toml`.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use url::Url;

use crate::{Error, Result};

const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// One endpoint that may serve a registry's images.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    /// Everything before `/<repository>/manifests`, without a trailing slash, such as `https://host/v2`.
    pub base: String,
    /// Host and port, for credentials and error texts.
    pub authority: String,
    pub resolve: bool,
    pub pull: bool,
    pub ca: Vec<PathBuf>,
    /// Certificate and key, which may be one file.
    pub client: Option<(PathBuf, PathBuf)>,
    pub skip_verify: bool,
    /// How long a connection may take to come about.
    pub dial_timeout: Duration,
    pub headers: HeaderMap,
    /// The registry that the reference names, not a mirror: it may see the credentials of the pull.
    pub upstream: bool,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct File {
    server: Option<String>,
    host: toml::Table,
    #[serde(flatten)]
    own: Settings,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Settings {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMany>,
    client: Option<Client>,
    skip_verify: Option<bool>,
    header: toml::Table,
    override_path: bool,
    dial_timeout: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Client {
    One(String),
    Files(Vec<String>),
    Pairs(Vec<Vec<String>>),
}

/// The hosts to try for `registry`, in order; the registry itself comes last.
pub(crate) fn hosts_for(certs_dir: Option<&Path>, registry: &str) -> Result<Vec<Host>> {
    let Some(dir) = certs_dir else { return Ok(vec![default_host(registry)]) };
    // containerd also takes `host_port_`, for file systems that do not allow a colon.
    let with_underscore = registry.replace(':', "_") + "_";
    let folders = [registry, if registry.contains(':') { &with_underscore } else { registry }, "_default"];
    for folder in folders {
        // A registry is a checked host name, so the path stays inside.
        let path = dir.join(folder).join("hosts.toml");
        match std::fs::read_to_string(&path) {
            Ok(text) => {
                return parse(&text, registry, &dir.join(folder), folder == "_default")
                    .map_err(|why| Error::Config { path, why });
            }
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                if let Some(host) = with_certificates(&dir.join(folder), registry)? {
                    return Ok(vec![host]);
                }
            }
            Err(e) => return Err(Error::io("read", &path)(e)),
        }
    }
    Ok(vec![default_host(registry)])
}

/// The registry with the certificates of a folder in docker's style: `*.crt` are authorities, `name.cert` and `name.key` are
/// the client's. `None` when there are none.
fn with_certificates(dir: &Path, registry: &str) -> Result<Option<Host>> {
    let listing = match std::fs::read_dir(dir) {
        Ok(l) => l,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        Err(e) => return Err(Error::io("list", dir)(e)),
    };
    let mut files = listing
        .map(|item| item.map(|i| i.path()).map_err(Error::io("list", dir)))
        .collect::<Result<Vec<_>>>()?;
    files.sort();
    let ends = |path: &PathBuf, with: &str| path.extension().is_some_and(|e| e == with);
    let mut host = default_host(registry);
    host.ca = files.iter().filter(|f| ends(f, "crt")).cloned().collect();
    if let Some(cert) = files.iter().find(|f| ends(f, "cert")) {
        let key = cert.with_extension("key");
        if !files.contains(&key) {
            return Err(Error::Config { path: cert.clone(), why: format!("{} is missing", key.display()) });
        }
        host.client = Some((cert.clone(), key));
    }
    if host.ca.is_empty() && host.client.is_none() {
        return Ok(None);
    }
    // Certificates mean TLS, also on this machine.
    host.base = host.base.replacen("http://", "https://", 1);
    Ok(Some(host))
}

/// Whether `authority` (host and port) is this machine: plain HTTP is the habit there.
fn is_local(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn scheme(authority: &str) -> &'static str {
    if is_local(authority) && !authority.ends_with(":443") { "http" } else { "https" }
}

/// Host and port where a registry itself answers.
pub(crate) fn own_authority(registry: &str) -> &str {
    if registry == "docker.io" { "registry-1.docker.io" } else { registry }
}

fn default_host(registry: &str) -> Host {
    let authority = own_authority(registry);
    Host {
        base: format!("{}://{authority}/v2", scheme(authority)),
        authority: authority.to_owned(),
        resolve: true,
        pull: true,
        ca: Vec::new(),
        client: None,
        skip_verify: false,
        dial_timeout: DIAL_TIMEOUT,
        headers: HeaderMap::new(),
        upstream: true,
    }
}

pub(crate) fn parse(text: &str, registry: &str, dir: &Path, default: bool) -> Result<Vec<Host>, String> {
    let file: File = toml::from_str(text).map_err(|e| e.to_string().trim().replace('\n', " "))?;
    let mut hosts = Vec::new();
    for (name, value) in file.host {
        let settings: Settings =
            value.try_into().map_err(|e| format!("host {name:?}: {}", e.to_string().trim()))?;
        let mut host = make(&name, settings, dir)?;
        host.upstream = host.authority == own_authority(registry);
        hosts.push(host);
    }
    // The `_default` folder's server is a last mirror for every registry, as in containerd.
    let upstream = match file.server {
        Some(server) if !server.is_empty() => {
            let mut host = make(&server, file.own, dir)?;
            host.upstream = !default;
            host
        }
        _ => {
            let plain = default_host(registry);
            let mut host = make(plain.base.strip_suffix("/v2").unwrap_or(&plain.base), file.own, dir)?;
            host.upstream = true;
            host
        }
    };
    hosts.push(upstream);
    Ok(hosts)
}

fn make(name: &str, s: Settings, dir: &Path) -> Result<Host, String> {
    let full = if name.contains("://") {
        name.to_owned()
    } else {
        format!("{}://{name}", scheme(name.split('/').next().unwrap_or_default()))
    };
    let url = Url::parse(&full).map_err(|e| format!("host {name:?} is not a URL: {e}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("host {name:?} is neither http nor https"));
    }
    let host = url.host_str().ok_or_else(|| format!("host {name:?} names no host"))?;
    let authority = match url.port() {
        Some(p) => format!("{host}:{p}"),
        None => host.to_owned(),
    };
    let mut path = url.path().trim_end_matches('/').to_owned();
    if !s.override_path && !path.ends_with("/v2") {
        path.push_str("/v2");
    }
    let capabilities = s.capabilities.unwrap_or_else(|| vec!["pull".into(), "resolve".into(), "push".into()]);
    if let Some(c) =
        capabilities.iter().find(|c| !matches!(c.as_str(), "pull" | "resolve" | "push" | "referrers"))
    {
        return Err(format!("host {name:?} has the unknown capability {c:?}; use pull, resolve, push"));
    }
    let mut headers = HeaderMap::new();
    for (key, value) in s.header {
        let values = match value {
            toml::Value::String(v) => vec![v],
            toml::Value::Array(a) => a.into_iter().filter_map(|v| v.as_str().map(str::to_owned)).collect(),
            _ => return Err(format!("header {key:?} is neither a string nor a list of strings")),
        };
        let key: HeaderName = key.parse().map_err(|_| format!("{key:?} is not a header name"))?;
        for v in values {
            let v = HeaderValue::from_str(&v).map_err(|_| format!("header {key} has an invalid value"))?;
            headers.append(key.clone(), v);
        }
    }
    let dial_timeout = match &s.dial_timeout {
        None => DIAL_TIMEOUT,
        Some(text) => duration(text).ok_or_else(|| {
            format!("host {name:?} has the dial_timeout {text:?}; write it as \"2s\" or \"500ms\"")
        })?,
    };
    let file = |f: &String| dir.join(f);
    // A certificate whose key is not named has it in the same file.
    let pair = |cert: &String, key: Option<&String>| {
        let key = key.filter(|k| !k.is_empty()).unwrap_or(cert);
        (file(cert), file(key))
    };
    Ok(Host {
        base: format!("{}://{authority}{path}", url.scheme()),
        authority,
        resolve: capabilities.iter().any(|c| c == "resolve"),
        pull: capabilities.iter().any(|c| c == "pull"),
        ca: match &s.ca {
            Some(OneOrMany::One(f)) => vec![file(f)],
            Some(OneOrMany::Many(f)) => f.iter().map(file).collect(),
            None => Vec::new(),
        },
        client: match &s.client {
            Some(Client::One(f)) => Some(pair(f, None)),
            Some(Client::Files(f)) => f.first().map(|c| pair(c, None)),
            Some(Client::Pairs(p)) => p.first().and_then(|p| p.first().map(|c| pair(c, p.get(1)))),
            None => None,
        },
        skip_verify: s.skip_verify.unwrap_or(false),
        dial_timeout,
        headers,
        upstream: false,
    })
}

/// A duration as Go writes it: numbers with units, such as `1m30s`.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let (number, after) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit() && c != '.')?);
        let (unit, after) = after.split_at(after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len()));
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        total =
            total.checked_add(Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()?)?;
        rest = after;
    }
    (!total.is_zero()).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bases(hosts: &[Host]) -> Vec<&str> {
        hosts.iter().map(|h| h.base.as_str()).collect()
    }

    #[test]
    fn a_registry_may_be_called_v2() {
        let dir = Path::new("/certs");
        for registry in ["v2.example", "v2.example:5000"] {
            let hosts = parse("[host.\"https://mirror.example\"]\n", registry, dir, false).unwrap();
            assert_eq!(hosts[1].base, format!("https://{registry}/v2"));
        }
    }

    #[test]
    fn without_a_file_the_registry_itself_is_asked() {
        for (registry, base) in [
            ("docker.io", "https://registry-1.docker.io/v2"),
            ("quay.io", "https://quay.io/v2"),
            ("localhost:5000", "http://localhost:5000/v2"),
            ("127.0.0.1:5000", "http://127.0.0.1:5000/v2"),
            ("[::1]:5000", "http://[::1]:5000/v2"),
            ("localhost:443", "https://localhost:443/v2"),
            ("10.0.0.1:5000", "https://10.0.0.1:5000/v2"),
        ] {
            let hosts = hosts_for(None, registry).unwrap();
            assert_eq!(bases(&hosts), [base]);
            assert!(hosts[0].upstream);
        }
    }

    #[test]
    fn mirrors_come_in_the_files_order_and_the_server_last() {
        let text = r#"
            server = "https://registry-1.docker.io"
            [host."https://z.example:8443/prefix"]
              capabilities = ["pull"]
              ca = "z.pem"
              client = [["c.pem", "k.pem"]]
              [host."https://z.example:8443/prefix".header]
                x-token = ["one", "two"]
            [host."http://a.example"]
              skip_verify = true
            [host."https://b.example/v2/proxy"]
              override_path = true
              ca = ["b1.pem", "/abs/b2.pem"]
        "#;
        let hosts = parse(text, "docker.io", Path::new("/c"), false).unwrap();
        assert_eq!(
            bases(&hosts),
            [
                "https://z.example:8443/prefix/v2",
                "http://a.example/v2",
                "https://b.example/v2/proxy",
                "https://registry-1.docker.io/v2"
            ]
        );
        let z = &hosts[0];
        assert!(z.pull && !z.resolve && !z.upstream && hosts[3].upstream);
        assert_eq!(z.ca, [PathBuf::from("/c/z.pem")]);
        assert_eq!(z.client, Some(("/c/c.pem".into(), "/c/k.pem".into())));
        assert_eq!(z.headers.get_all("x-token").iter().count(), 2);
        assert!(hosts[1].skip_verify && hosts[1].resolve);
        assert_eq!(hosts[2].ca, [PathBuf::from("/c/b1.pem"), PathBuf::from("/abs/b2.pem")]);
    }

    #[test]
    fn every_way_to_name_a_client_certificate() {
        let dir = Path::new("/c");
        for (text, cert, key) in [
            ("\"a.pem\"", "/c/a.pem", "/c/a.pem"),
            // Files that hold both; the first counts.
            ("[\"a.pem\", \"b.pem\"]", "/c/a.pem", "/c/a.pem"),
            ("[[\"a.cert\", \"/k/a.key\"], [\"b.cert\", \"b.key\"]]", "/c/a.cert", "/k/a.key"),
            ("[[\"a.pem\", \"\"]]", "/c/a.pem", "/c/a.pem"),
            ("[[\"a.pem\"]]", "/c/a.pem", "/c/a.pem"),
        ] {
            let hosts = parse(&format!("client = {text}"), "quay.io", dir, false).unwrap();
            assert_eq!(hosts[0].client, Some((cert.into(), key.into())), "{text}");
        }
    }

    #[test]
    fn how_long_a_connection_may_take() {
        let seconds = |text: &str| duration(text).map(|d| d.as_secs_f64());
        for (text, want) in [
            ("2s", Some(2.0)),
            ("500ms", Some(0.5)),
            ("1m30s", Some(90.0)),
            ("1.5h", Some(5400.0)),
            ("", None),
            ("0s", None),
            ("5", None),
            ("s", None),
            ("-1s", None),
            ("1d", None),
            ("1e300h", None),
        ] {
            assert_eq!(seconds(text), want, "{text:?}");
        }
        let dir = Path::new("/c");
        let text =
            "dial_timeout = \"7s\"\n[host.\"https://a\"]\ndial_timeout = \"250ms\"\n[host.\"https://b\"]";
        let hosts = parse(text, "quay.io", dir, false).unwrap();
        let times: Vec<u128> = hosts.iter().map(|h| h.dial_timeout.as_millis()).collect();
        assert_eq!(times, [250, 10_000, 7000]);
        let e = parse("dial_timeout = \"soon\"", "quay.io", dir, false).unwrap_err();
        assert!(e.contains("\"soon\"") && e.contains("500ms"), "{e}");
    }

    #[test]
    fn faulty_files_say_what_is_wrong() {
        for (text, why) in [
            ("server = 3", "string"),
            ("[host.\"ftp://x\"]", "neither http nor https"),
            ("[host.\"https://x\"]\ncapabilities = [\"fly\"]", "unknown capability"),
            ("[host.\"https://x\"]\nskip_verify = \"yes\"", "https://x"),
            ("[host", ""),
        ] {
            let e = parse(text, "quay.io", Path::new("/c"), false).unwrap_err();
            assert!(e.contains(why), "{text:?}: {e}");
        }
    }

    #[test]
    fn folders_are_looked_up_as_containerd_does() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("hosts.toml"), text).unwrap();
        };
        write("_default", "[host.\"https://mirror.example\"]");
        write("localhost_5000_", "server = \"https://other.example\"");
        let hosts = hosts_for(Some(dir.path()), "quay.io").unwrap();
        assert_eq!(bases(&hosts), ["https://mirror.example/v2", "https://quay.io/v2"]);
        let hosts = hosts_for(Some(dir.path()), "localhost:5000").unwrap();
        assert_eq!(bases(&hosts), ["https://other.example/v2"]);

        // Docker's style: certificates without hosts.toml.
        let folder = dir.path().join("127.0.0.1:5001");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("notes"), "").unwrap();
        assert_eq!(
            bases(&hosts_for(Some(dir.path()), "127.0.0.1:5001").unwrap())[0],
            "https://mirror.example/v2"
        );
        for name in ["b.crt", "a.crt", "c.cert"] {
            std::fs::write(folder.join(name), "").unwrap();
        }
        let e = hosts_for(Some(dir.path()), "127.0.0.1:5001").unwrap_err();
        assert!(e.to_string().contains("c.key is missing"), "{e}");
        std::fs::write(folder.join("c.key"), "").unwrap();
        let hosts = hosts_for(Some(dir.path()), "127.0.0.1:5001").unwrap();
        assert_eq!(bases(&hosts), ["https://127.0.0.1:5001/v2"]);
        assert_eq!(hosts[0].ca, [folder.join("a.crt"), folder.join("b.crt")]);
        assert_eq!(hosts[0].client, Some((folder.join("c.cert"), folder.join("c.key"))));
    }
}
