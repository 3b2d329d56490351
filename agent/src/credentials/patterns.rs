//! Which credentials serve which image. Pure.

/// The registry host and repository of an image reference.
fn split(image: &str) -> (&str, &str) {
    match image.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest),
        _ => ("docker.io", image),
    }
}

/// The image's full name without tag and digest: `docker.io/library/busybox` of `busybox:1`.
pub fn repository(image: &str) -> String {
    let (host, rest) = split(image);
    let rest = rest.split_once('@').map_or(rest, |(name, _)| name);
    // A tag has no slash.
    let rest = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => name,
        _ => rest,
    };
    let library = if host == "docker.io" && !rest.contains('/') { "library/" } else { "" };
    format!("{host}/{library}{rest}")
}

/// `*` stands for any number of characters, `?` for one.
fn part_fits(pattern: &str, text: &str) -> bool {
    match pattern.chars().next() {
        None => text.is_empty(),
        Some('*') => text
            .char_indices()
            .map(|(i, _)| i)
            .chain([text.len()])
            .any(|i| part_fits(&pattern[1..], &text[i..])),
        Some(c) => text.chars().next().is_some_and(|t| {
            (c == '?' || c == t) && part_fits(&pattern[c.len_utf8()..], &text[t.len_utf8()..])
        }),
    }
}

/// Part by part, so that `*` does not go beyond a dot; the port must be the same.
fn host_fits(pattern: &str, host: &str) -> bool {
    let port = |h: &'_ str| h.rsplit_once(':').map(|(_, port)| port.to_owned());
    let parts = |h: &'_ str| -> Vec<String> {
        h.rsplit_once(':').map_or(h, |(name, _)| name).split('.').map(str::to_owned).collect()
    };
    let (wanted, have) = (parts(pattern), parts(host));
    port(pattern) == port(host)
        && wanted.len() == have.len()
        && wanted.iter().zip(&have).all(|(p, t)| part_fits(p, t))
}

/// Whether credentials for `server` (a host, with or without scheme and path, with wildcards in its parts) serve this image; the longer the better.
pub fn fits(server: &str, image: &str) -> Option<usize> {
    let bare = server.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
    let bare = bare.trim_end_matches("/v1").trim_end_matches("/v2");
    let (host, path) = bare.split_once('/').unwrap_or((bare, ""));
    let host = if host == "index.docker.io" { "docker.io" } else { host };
    let (wanted, repository) = split(image);
    let below = path.is_empty()
        || repository.strip_prefix(path).is_some_and(|r| r.is_empty() || r.starts_with(['/', ':', '@']));
    (host_fits(host, wanted) && below).then_some(host.len() + path.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_without_tags() {
        for (image, wanted) in [
            ("busybox", "docker.io/library/busybox"),
            ("busybox:1", "docker.io/library/busybox"),
            ("team/app@sha256:00", "docker.io/team/app"),
            ("localhost/a:b", "localhost/a"),
            ("reg.test:5000/team/app:1@sha256:00", "reg.test:5000/team/app"),
            ("reg.test:5000/app", "reg.test:5000/app"),
        ] {
            assert_eq!(repository(image), wanted);
        }
    }

    #[test]
    fn patterns_of_registries() {
        for (pattern, image, wanted) in [
            ("reg.test", "reg.test/a", true),
            ("reg.test", "reg.test:5000/a", false),
            ("reg.test:5000", "reg.test:5000/a", true),
            ("*.test", "reg.test/a", true),
            ("*.test", "a.reg.test/a", false),
            ("*.*.test", "a.reg.test/a", true),
            ("app*.test", "app1.test/a", true),
            ("a?p.*", "app.test/a", true),
            ("a?p.*", "apt.test/a", false),
            ("*.ecr.*.aws.test", "1.ecr.x-1.aws.test/a", true),
            ("reg.test/team", "reg.test/team/a", true),
            ("reg.test/team", "reg.test/teams/a", false),
            ("*", "busybox", false),
            ("docker.io", "busybox", true),
            ("*.io", "docker.io/library/busybox", true),
            ("localhost", "localhost/a", true),
        ] {
            assert_eq!(fits(pattern, image).is_some(), wanted, "{pattern} {image}");
        }
    }
}
