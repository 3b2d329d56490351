//! Links in what a proxied server answers. A page that is seen through `…/proxy/` names paths of its own server; they are sent
//! through the proxy as well, as upstream's does: the Location header and the URLs of HTML attributes.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame};
use hyper::body::Incoming;

/// A tag that is longer than this is passed on as it is.
const LONGEST_TAG: usize = 64 * 1024;

/// Which attributes hold URLs.
const ATTRIBUTES: &[(&str, &[&str])] = &[
    ("a", &["href"]),
    ("applet", &["codebase"]),
    ("area", &["href"]),
    ("audio", &["src"]),
    ("base", &["href"]),
    ("blockquote", &["cite"]),
    ("body", &["background"]),
    ("button", &["formaction"]),
    ("command", &["icon"]),
    ("del", &["cite"]),
    ("embed", &["src"]),
    ("form", &["action"]),
    ("frame", &["longdesc", "src"]),
    ("head", &["profile"]),
    ("html", &["manifest"]),
    ("iframe", &["longdesc", "src"]),
    ("img", &["longdesc", "src", "usemap"]),
    ("input", &["src", "usemap", "formaction"]),
    ("ins", &["cite"]),
    ("link", &["href"]),
    ("object", &["classid", "codebase", "data", "usemap"]),
    ("q", &["cite"]),
    ("script", &["src"]),
    ("source", &["src"]),
    ("video", &["poster", "src"]),
];

/// Elements whose text is not HTML, with the mark that ends it.
const RAW: &[(&str, &str)] =
    &[("script", "</script"), ("style", "</style"), ("textarea", "</textarea"), ("title", "</title")];

/// Which URLs belong to the proxied server, and what they become.
#[derive(Clone, Debug)]
pub struct Links {
    /// The path of the request up to and including `/proxy`.
    pub prefix: String,
    /// Host header that the proxied server got.
    pub backend: String,
    /// Host header that the client sent.
    pub requested: String,
}

impl Links {
    /// The URL through the proxy; `None` when it stays as it is: relative, elsewhere, or through the proxy already.
    pub fn rewrite(&self, url: &str) -> Option<String> {
        let after_scheme = ["http://", "https://", "//"]
            .iter()
            .find(|s| url.get(..s.len()).is_some_and(|u| u.eq_ignore_ascii_case(s)));
        let (base, host, path) = match after_scheme {
            None => ("", "", url),
            Some(scheme) => {
                let rest = &url[scheme.len()..];
                let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
                (&url[..scheme.len() + end], &rest[..end], &rest[end..])
            }
        };
        if !path.starts_with('/') || !(host.is_empty() || host == self.backend || host == self.requested) {
            return None;
        }
        let base = if host == self.requested { base } else { "" };
        if path.starts_with(&self.prefix) {
            return (host == self.backend && host != self.requested).then(|| path.to_owned());
        }
        Some(format!("{base}{}{path}", self.prefix))
    }
}

/// Rewrites HTML as it comes. What is not complete yet is kept for the next piece.
struct Rewriter {
    links: Links,
    carry: Vec<u8>,
    /// Inside of what is not HTML: the mark that ends it.
    raw: Option<&'static str>,
}

fn find(haystack: &[u8], needle: &str) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w.eq_ignore_ascii_case(needle.as_bytes()))
}

/// The length of the tag that begins here, with its `>`; quotes may hold one as well.
fn tag_end(tag: &[u8]) -> Option<usize> {
    let mut quote = None;
    for (i, b) in tag.iter().enumerate() {
        match (quote, *b) {
            (Some(q), b) if b == q => quote = None,
            (Some(_), _) => {}
            // Only a value has quotes; an apostrophe elsewhere is a letter.
            (None, b'"' | b'\'') if tag[..i].trim_ascii_end().ends_with(b"=") => quote = Some(*b),
            (None, b'>') => return Some(i + 1),
            (None, _) => {}
        }
    }
    None
}

impl Rewriter {
    fn feed(&mut self, piece: &[u8], last: bool) -> Vec<u8> {
        let mut input = std::mem::take(&mut self.carry);
        input.extend_from_slice(piece);
        let mut out = Vec::with_capacity(input.len() + 256);
        let mut rest = input.as_slice();
        while !rest.is_empty() {
            if let Some(end) = self.raw {
                let Some(at) = find(rest, end) else {
                    let keep = if last { 0 } else { rest.len().min(end.len() - 1) };
                    out.extend_from_slice(&rest[..rest.len() - keep]);
                    rest = &rest[rest.len() - keep..];
                    break;
                };
                out.extend_from_slice(&rest[..at + end.len()]);
                rest = &rest[at + end.len()..];
                self.raw = None;
                continue;
            }
            let open = rest.iter().position(|b| *b == b'<').unwrap_or(rest.len());
            out.extend_from_slice(&rest[..open]);
            rest = &rest[open..];
            if rest.starts_with(b"<!--") {
                out.extend_from_slice(b"<!--");
                rest = &rest[4..];
                self.raw = Some("-->");
            } else if !last && b"<!--".starts_with(rest) {
                break;
            } else if rest.get(1).is_some_and(u8::is_ascii_alphabetic) {
                match tag_end(rest) {
                    Some(end) => {
                        self.tag(&rest[..end], &mut out);
                        rest = &rest[end..];
                    }
                    None if !last && rest.len() < LONGEST_TAG => break,
                    None => {
                        out.extend_from_slice(rest);
                        rest = &[];
                    }
                }
            } else if let Some((first, others)) = rest.split_first() {
                out.push(*first);
                rest = others;
            }
        }
        self.carry = rest.to_vec();
        out
    }

    fn tag(&mut self, tag: &[u8], out: &mut Vec<u8>) {
        let name_end = tag.iter().position(|b| b.is_ascii_whitespace() || matches!(b, b'>' | b'/'));
        let name =
            String::from_utf8_lossy(&tag[1..name_end.unwrap_or(tag.len()).max(1)]).to_ascii_lowercase();
        self.raw = RAW.iter().find(|(n, _)| *n == name).map(|(_, end)| *end);
        let wanted = ATTRIBUTES.iter().find(|(n, _)| *n == name).map(|(_, a)| *a);
        let (Some(wanted), Ok(text)) = (wanted, std::str::from_utf8(tag)) else {
            out.extend_from_slice(tag);
            return;
        };
        let mut done = 0;
        for (attribute, value) in values(text, 1 + name.len()) {
            if wanted.contains(&attribute.to_ascii_lowercase().as_str())
                && let Some(new) = self.links.rewrite(&text[value.clone()])
            {
                out.extend_from_slice(&tag[done..value.start]);
                out.extend_from_slice(new.as_bytes());
                done = value.end;
            }
        }
        out.extend_from_slice(&tag[done..]);
    }
}

/// The attributes of a tag that have a value, each with the place of the value without its quotes.
fn values(tag: &str, mut at: usize) -> Vec<(&str, std::ops::Range<usize>)> {
    let bytes = tag.as_bytes();
    let skip = |mut i: usize, while_: &dyn Fn(u8) -> bool| {
        while bytes.get(i).is_some_and(|b| while_(*b)) {
            i += 1;
        }
        i
    };
    let space = |b: u8| b.is_ascii_whitespace();
    let mut all = Vec::new();
    loop {
        at = skip(at, &|b| space(b) || b == b'/');
        let start = at;
        at = skip(at, &|b| !space(b) && !matches!(b, b'=' | b'>' | b'/'));
        let name = &tag[start..at];
        let equals = skip(at, &space);
        if bytes.get(equals) != Some(&b'=') {
            if start == at {
                return all;
            }
            continue;
        }
        at = skip(equals + 1, &space);
        let quote = bytes.get(at).copied().filter(|b| matches!(b, b'"' | b'\''));
        let from = if quote.is_some() { at + 1 } else { at };
        let to = match quote {
            Some(q) => skip(from, &|b| b != q),
            None => skip(from, &|b| !space(b) && b != b'>'),
        };
        all.push((name, from..to));
        at = if quote.is_some() { to + 1 } else { to };
        if at >= bytes.len() {
            return all;
        }
    }
}

/// A proxied body of HTML with its links rewritten.
pub struct Rewritten {
    body: Incoming,
    rewriter: Rewriter,
    /// What came after the data.
    trailers: Option<Frame<Bytes>>,
    ended: bool,
}

impl Rewritten {
    pub fn new(body: Incoming, links: Links) -> Rewritten {
        let rewriter = Rewriter { links, carry: Vec::new(), raw: None };
        Rewritten { body, rewriter, trailers: None, ended: false }
    }
}

impl Body for Rewritten {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        loop {
            if this.ended {
                return Poll::Ready(this.trailers.take().map(Ok));
            }
            let out = match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Err(e)) => return Poll::Ready(Some(Err(e))),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => this.rewriter.feed(&data, false),
                    Err(trailers) => {
                        this.ended = true;
                        this.trailers = Some(trailers);
                        this.rewriter.feed(&[], true)
                    }
                },
                None => {
                    this.ended = true;
                    this.rewriter.feed(&[], true)
                }
            };
            if !out.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(out.into()))));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn links() -> Links {
        Links {
            prefix: "/api/v1/namespaces/n/pods/p:80/proxy".into(),
            backend: "10.0.0.1:80".into(),
            requested: "localhost:8001".into(),
        }
    }

    #[test]
    fn urls_of_the_proxied_server_go_through_the_proxy() {
        let p = "/api/v1/namespaces/n/pods/p:80/proxy";
        for (url, wanted) in [
            ("/x/?a=b#c", Some(format!("{p}/x/?a=b#c"))),
            ("x", None),
            ("?x", None),
            ("#x", None),
            ("mailto:a@b", None),
            ("http://elsewhere/x", None),
            ("//elsewhere/x", None),
            ("http://10.0.0.1:80/x", Some(format!("{p}/x"))),
            ("//10.0.0.1:80/x", Some(format!("{p}/x"))),
            ("http://10.0.0.1:80", None),
            ("https://localhost:8001/x", Some(format!("https://localhost:8001{p}/x"))),
            (&format!("{p}/x"), None),
            (&format!("http://10.0.0.1:80{p}/x"), Some(format!("{p}/x"))),
            ("ä://", None),
        ] {
            assert_eq!(links().rewrite(url), wanted, "{url}");
        }
    }

    #[test]
    fn html_is_rewritten_whatever_pieces_it_comes_in() {
        let page = "<!doctype html><!-- <a href='/no'> --><A title=\"a>b\" HREF = '/x'>1 < 2 don't</a>\
            <script src=/s.js>if (a<b) '<a href=\"/no\">'</script><img alt=x src=\"/i\"/><p href=\"/no\">ü</p><a href=\"rel\" data-x>";
        let p = "/api/v1/namespaces/n/pods/p:80/proxy";
        let wanted = page
            .replace("'/x'", &format!("'{p}/x'"))
            .replace("=/s.js", &format!("={p}/s.js"))
            .replace("\"/i\"", &format!("\"{p}/i\""));
        for size in 1..page.len() {
            let mut r = Rewriter { links: links(), carry: Vec::new(), raw: None };
            let mut out: Vec<u8> = page.as_bytes().chunks(size).flat_map(|c| r.feed(c, false)).collect();
            out.extend(r.feed(&[], true));
            assert_eq!(String::from_utf8(out).unwrap(), wanted, "pieces of {size}");
        }
    }

    #[test]
    fn what_is_cut_off_comes_out_as_it_is() {
        for page in ["<a href=\"/x", "<", "<!-", "<script>x</scr", "<a href=", "a<b", "<a =\"/x\">", "<a/"] {
            let mut r = Rewriter { links: links(), carry: Vec::new(), raw: None };
            let mut out = r.feed(page.as_bytes(), false);
            out.extend(r.feed(&[], true));
            assert_eq!(String::from_utf8(out).unwrap(), page);
        }
    }
}
