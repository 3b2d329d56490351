//! Rules for names, labels and ports. Each function returns what is wrong, nothing when all is well.

fn alnum(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit()
}

fn label_shape(s: &str) -> bool {
    !s.is_empty() && s.starts_with(alnum) && s.ends_with(alnum) && s.chars().all(|c| alnum(c) || c == '-')
}

/// RFC 1123 label: at most 63 of `[a-z0-9-]`.
pub fn dns_label(s: &str) -> Vec<String> {
    let mut problems = Vec::new();
    if s.len() > 63 {
        problems.push("must be no more than 63 characters".into());
    }
    if !label_shape(s) {
        problems.push(
            "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an \
             alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
                .into(),
        );
    }
    problems
}

/// RFC 1123 subdomain: labels joined by dots, at most 253 characters.
pub fn dns_subdomain(s: &str) -> Vec<String> {
    let mut problems = Vec::new();
    if s.len() > 253 {
        problems.push("must be no more than 253 characters".into());
    }
    if !s.split('.').all(label_shape) {
        problems.push(
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with \
             an alphanumeric character (e.g. 'example.com', regex used for validation is \
             '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
                .into(),
        );
    }
    problems
}

/// RFC 1035 label: as [`dns_label`], but it starts with a letter.
pub fn dns1035_label(s: &str) -> Vec<String> {
    let mut problems = Vec::new();
    if s.len() > 63 {
        problems.push("must be no more than 63 characters".into());
    }
    if !label_shape(s) || !s.starts_with(|c: char| c.is_ascii_lowercase()) {
        problems.push(
            "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with \
             an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')"
                .into(),
        );
    }
    problems
}

/// Names that only have to fit into a URL path (RBAC).
pub fn path_segment(s: &str) -> Vec<String> {
    if s == "." || s == ".." {
        return vec![format!("may not be '{s}'")];
    }
    ["/", "%"].iter().filter(|c| s.contains(**c)).map(|c| format!("may not contain '{c}'")).collect()
}

/// Names of kernel parameters, with dots or slashes between the parts.
pub fn sysctl(s: &str) -> Vec<String> {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let part = |p: &str| {
        p.starts_with(inner) && p.ends_with(inner) && p.chars().all(|c| inner(c) || matches!(c, '-' | '_'))
    };
    if s.len() <= 253 && s.split(['.', '/']).all(part) {
        return Vec::new();
    }
    vec![
        "must have at most 253 characters and match regex ^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?$"
            .into(),
    ]
}

/// An IP address in its canonical form, the name of an IPAddress object.
pub fn ip_address(s: &str) -> Vec<String> {
    match s.parse::<std::net::IpAddr>() {
        Ok(ip) if ip.to_string() == s => Vec::new(),
        Ok(ip) => vec![format!("must be in canonical form ({ip})")],
        Err(_) => vec!["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)".into()],
    }
}

fn name_part(s: &str) -> bool {
    !s.is_empty()
        && s.len() <= 63
        && s.starts_with(|c: char| c.is_ascii_alphanumeric())
        && s.ends_with(|c: char| c.is_ascii_alphanumeric())
        && s.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

/// Keys of labels, finalizers and taints: an optional DNS prefix and a name of at most 63 characters.
pub fn qualified_name(s: &str) -> Vec<String> {
    let (prefix, name) = match s.split_once('/') {
        Some((p, n)) => (Some(p), n),
        None => (None, s),
    };
    let mut problems = Vec::new();
    match prefix {
        Some("") => problems.push("prefix part must be non-empty".into()),
        Some(p) => problems.extend(dns_subdomain(p).into_iter().map(|m| format!("prefix part {m}"))),
        None => {}
    }
    if name.is_empty() {
        problems.push("name part must be non-empty".into());
    } else if name.len() > 63 {
        problems.push("name part must be no more than 63 characters".into());
    }
    if !name_part(name) {
        problems.push(
            "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character \
             (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
                .into(),
        );
    }
    problems
}

/// Values of labels: empty or at most 63 characters.
pub fn label_value(s: &str) -> Vec<String> {
    let mut problems = Vec::new();
    if s.len() > 63 {
        problems.push("must be no more than 63 characters".into());
    }
    if !s.is_empty() && s.len() <= 63 && !name_part(s) {
        problems.push(
            "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an \
             alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is \
             '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
                .into(),
        );
    }
    problems
}

/// IANA service names: at most 15 of `[a-z0-9-]` with at least one letter.
pub fn port_name(s: &str) -> Vec<String> {
    let mut problems = Vec::new();
    if s.len() > 15 {
        problems.push("must be no more than 15 characters".into());
    }
    if s.is_empty() || !s.chars().all(|c| alnum(c) || c == '-') {
        problems.push("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)".into());
    }
    if !s.chars().any(|c| c.is_ascii_lowercase()) {
        problems.push("must contain at least one letter (a-z)".into());
    }
    if s.contains("--") {
        problems.push("must not contain consecutive hyphens".into());
    }
    if s.starts_with('-') || s.ends_with('-') {
        problems.push("must not begin or end with a hyphen".into());
    }
    problems
}

/// Keys of ConfigMaps and Secrets: file names.
pub fn config_key(s: &str) -> Vec<String> {
    let mut problems = Vec::new();
    if s.len() > 253 {
        problems.push("must be no more than 253 characters".into());
    }
    if s.is_empty() || !s.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')) {
        problems.push(
            "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', \
             regex used for validation is '[-._a-zA-Z0-9]+')"
                .into(),
        );
    }
    if s == "." || s == ".." || s.starts_with("..") {
        problems.push(format!("must not be '{s}'"));
    }
    problems
}

/// Environment variables: any printable ASCII but `=` (relaxed names).
pub fn env_name(s: &str) -> Vec<String> {
    if s.is_empty() {
        return vec!["environment variable name must not be empty".into()];
    }
    if s.chars().any(|c| c == '=' || !(' '..='~').contains(&c)) {
        return vec!["a valid environment variable name must consist only of printable ASCII characters other than '='".into()];
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_rules() {
        for ok in ["a", "web-1", "1a"] {
            assert!(dns_label(ok).is_empty(), "{ok}");
        }
        for bad in ["", "A", "-a", "a-", "a.b", "a_b"] {
            assert!(!dns_label(bad).is_empty(), "{bad}");
        }
        assert!(dns_subdomain("a.b-c.d").is_empty());
        assert!(!dns_subdomain("a..b").is_empty());
        assert!(!dns1035_label("1a").is_empty());
        assert!(qualified_name("app.kubernetes.io/name").is_empty());
        assert!(!qualified_name("/x").is_empty());
        assert!(!qualified_name("a b").is_empty());
        assert!(label_value("").is_empty());
        assert!(!label_value("a/b").is_empty());
        assert!(port_name("http-2").is_empty());
        assert!(!port_name("80").is_empty());
        assert!(config_key("a_B.c-d").is_empty());
        assert!(!config_key("a/b").is_empty());
        assert!(path_segment("system:node").is_empty());
        assert!(!path_segment("a/b").is_empty());
        assert!(
            ["kernel.shmmax", "net/ipv4/ip_forward", "safe-and-unsafe"].iter().all(|s| sysctl(s).is_empty())
        );
        assert!(["foo-", "bar..", "A.b", ""].iter().all(|s| !sysctl(s).is_empty()));
        assert!(ip_address("fe80::42:1dff:fe84:f9e2").is_empty() && ip_address("255.255.255.255").is_empty());
        assert!(!ip_address("fe80:0::1").is_empty() && !ip_address("010.0.0.1").is_empty());
    }
}
