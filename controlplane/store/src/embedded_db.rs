//! The tables of the embedded engine, and reads on them. No tasks, no clocks.
//!
//! | table | key | value |
//! |---|---|---|
//! | `versions` | (key, revision) | tag byte (0 deleted, 1 live), created revision, bytes |
//! | `log` | revision | key |
//! | `expiry` | (deadline in unix seconds, key) | revision the deadline belongs to |
//! | `meta` | name | number |
//!
//! Every version of a key lies in `versions` until compaction removes it, so a list at a revision is one range scan.

use std::sync::Arc;

use bytes::Bytes;
use redb::{ReadTransaction, ReadableTable, TableDefinition, WriteTransaction};

use crate::{Error, Event, Page, Range, Record, Revision};

pub(crate) const VERSIONS: TableDefinition<(&str, u64), &[u8]> = TableDefinition::new("versions");
pub(crate) const LOG: TableDefinition<u64, &str> = TableDefinition::new("log");
pub(crate) const EXPIRY: TableDefinition<(u64, &str), u64> = TableDefinition::new("expiry");
pub(crate) const META: TableDefinition<&str, u64> = TableDefinition::new("meta");

pub(crate) const META_REVISION: &str = "revision";
pub(crate) const META_COMPACTED: &str = "compacted";

const HEADER: usize = 9;

pub(crate) fn storage<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |e| Error::Storage { what, why: e.to_string() }
}

/// A stored version, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    Deleted,
    Live { created: Revision, value: Bytes },
}

impl Version {
    pub(crate) fn encode(&self) -> Vec<u8> {
        match self {
            Version::Deleted => vec![0; 1],
            Version::Live { created, value } => {
                let mut out = Vec::with_capacity(HEADER + value.len());
                out.push(1);
                out.extend_from_slice(&created.to_be_bytes());
                out.extend_from_slice(value);
                out
            }
        }
    }

    pub(crate) fn decode(raw: &[u8]) -> Result<Version, Error> {
        match raw.split_first() {
            Some((0, _)) => Ok(Version::Deleted),
            Some((1, rest)) if rest.len() >= 8 => {
                let mut created = [0u8; 8];
                created.copy_from_slice(&rest[..8]);
                Ok(Version::Live {
                    created: u64::from_be_bytes(created),
                    value: Bytes::copy_from_slice(&rest[8..]),
                })
            }
            _ => Err(Error::Storage { what: "read a stored version", why: "its header is damaged".into() }),
        }
    }
}

/// The key that follows every key with this prefix; `None` when there is no such key.
pub(crate) fn prefix_end(prefix: &str) -> Option<String> {
    // Keys are UTF-8, and so must be the bound: raise the last character that has a successor.
    let mut chars: Vec<char> = prefix.chars().collect();
    while let Some(last) = chars.pop() {
        let mut next = last as u32 + 1;
        if next == 0xD800 {
            next = 0xE000;
        }
        if let Some(c) = char::from_u32(next) {
            chars.push(c);
            return Some(chars.into_iter().collect());
        }
    }
    None
}

/// The newest version of `key` at or below `at`, with its revision.
pub(crate) fn newest(
    versions: &impl ReadableTable<(&'static str, u64), &'static [u8]>,
    key: &str,
    at: Revision,
) -> Result<Option<(Revision, Version)>, Error> {
    let mut range = versions.range((key, 0)..=(key, at)).map_err(storage("search a key"))?;
    let Some(entry) = range.next_back() else { return Ok(None) };
    let (k, v) = entry.map_err(storage("read a key"))?;
    Ok(Some((k.value().1, Version::decode(v.value())?)))
}

/// Numbers kept beside the data.
pub(crate) fn meta(
    meta: &impl ReadableTable<&'static str, u64>,
    name: &'static str,
) -> Result<Option<u64>, Error> {
    Ok(meta.get(name).map_err(storage("read the revision"))?.map(|v| v.value()))
}

/// A record from a read transaction.
pub(crate) fn get(read: &ReadTransaction, key: &str) -> Result<Option<Record>, Error> {
    let versions = read.open_table(VERSIONS).map_err(storage("open the versions"))?;
    record(&versions, key)
}

/// The present record of a key.
pub(crate) fn record(
    versions: &impl ReadableTable<(&'static str, u64), &'static [u8]>,
    key: &str,
) -> Result<Option<Record>, Error> {
    Ok(match newest(versions, key, Revision::MAX)? {
        Some((revision, Version::Live { created, value })) => {
            Some(Record { key: key.into(), value, revision, created })
        }
        _ => None,
    })
}

/// The versions of the keys of a range, in (key, revision) order.
fn scan<'a>(
    versions: &'a impl ReadableTable<(&'static str, u64), &'static [u8]>,
    range: &Range,
) -> Result<redb::Range<'a, (&'static str, u64), &'static [u8]>, Error> {
    let start: String = match &range.after {
        // A NUL cannot be part of a key, so this is the smallest key after it.
        Some(after) if after.as_str() >= range.prefix.as_str() => format!("{after}\0"),
        _ => range.prefix.clone(),
    };
    let end = prefix_end(&range.prefix);
    match &end {
        Some(end) => versions.range((start.as_str(), 0)..(end.as_str(), 0)),
        None => versions.range((start.as_str(), 0)..),
    }
    .map_err(storage("search a range"))
}

/// Lists `range` as of revision `at`.
pub(crate) fn list(read: &ReadTransaction, range: &Range, at: Revision) -> Result<Page, Error> {
    let versions = read.open_table(VERSIONS).map_err(storage("open the versions"))?;
    let mut page = Page { revision: at, ..Page::default() };
    let mut collect = Collect { page: &mut page, limit: range.limit, pending: None };
    for entry in scan(&versions, range)? {
        let (k, v) = entry.map_err(storage("read a range"))?;
        let (key, revision) = k.value();
        if revision > at {
            continue;
        }
        collect.version(key, revision, v.value())?;
        if collect.page.more {
            return Ok(page);
        }
    }
    collect.finish()?;
    Ok(page)
}

/// How many records `range` has as of revision `at`, without copying them.
pub(crate) fn count(read: &ReadTransaction, range: &Range, at: Revision) -> Result<u64, Error> {
    let versions = read.open_table(VERSIONS).map_err(storage("open the versions"))?;
    let (mut count, mut last, mut live) = (0, String::new(), false);
    for entry in scan(&versions, range)? {
        let (k, v) = entry.map_err(storage("read a range"))?;
        let (key, revision) = k.value();
        if revision > at {
            continue;
        }
        if key != last {
            count += u64::from(live);
            last.replace_range(.., key);
        }
        live = v.value().first() == Some(&1);
    }
    Ok(count + u64::from(live))
}

/// Keeps the newest version of each key of a scan in (key, revision) order.
struct Collect<'a> {
    page: &'a mut Page,
    limit: usize,
    pending: Option<(Arc<str>, Revision, Vec<u8>)>,
}

impl Collect<'_> {
    fn version(&mut self, key: &str, revision: Revision, raw: &[u8]) -> Result<(), Error> {
        match &mut self.pending {
            Some((k, r, v)) if &**k == key => {
                *r = revision;
                v.clear();
                v.extend_from_slice(raw);
            }
            _ => {
                self.finish()?;
                self.pending = Some((key.into(), revision, raw.to_vec()));
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Error> {
        let Some((key, revision, raw)) = self.pending.take() else { return Ok(()) };
        if self.limit > 0 && self.page.records.len() >= self.limit {
            self.page.more |= raw.first() == Some(&1);
            return Ok(());
        }
        if let Version::Live { created, value } = Version::decode(&raw)? {
            self.page.records.push(Record { key, value, revision, created });
        }
        Ok(())
    }
}

/// Up to `limit` changes under `prefix` after `after`, and the revision up to which the log has been read.
pub(crate) fn events(
    read: &ReadTransaction,
    prefix: &str,
    after: Revision,
    limit: usize,
) -> Result<(Vec<Event>, Revision), Error> {
    let log = read.open_table(LOG).map_err(storage("open the log"))?;
    let versions = read.open_table(VERSIONS).map_err(storage("open the versions"))?;
    let mut events = Vec::new();
    let mut last = after;
    for entry in log.range(after + 1..).map_err(storage("search the log"))? {
        let (r, k) = entry.map_err(storage("read the log"))?;
        let (revision, key) = (r.value(), k.value());
        last = revision;
        if !key.starts_with(prefix) {
            continue;
        }
        let raw = versions.get((key, revision)).map_err(storage("read a version"))?;
        let Some(raw) = raw else {
            return Err(Error::Storage {
                what: "replay the log",
                why: format!("revision {revision} of {key} is missing"),
            });
        };
        events.push(match Version::decode(raw.value())? {
            Version::Live { created, value } => {
                Event { key: key.into(), value: Some(value), revision, created }
            }
            Version::Deleted => Event { key: key.into(), value: None, revision, created: 0 },
        });
        if events.len() >= limit {
            break;
        }
    }
    Ok((events, last))
}

/// Removes what only revisions below `to` need, at most `limit` log entries at a time. Returns whether it is done.
pub(crate) fn compact(write: &WriteTransaction, to: Revision, limit: usize) -> Result<bool, Error> {
    let mut log = write.open_table(LOG).map_err(storage("open the log"))?;
    let mut versions = write.open_table(VERSIONS).map_err(storage("open the versions"))?;
    let mut meta_table = write.open_table(META).map_err(storage("open the meta table"))?;
    let batch: Vec<(Revision, String)> = log
        .range(..=to)
        .map_err(storage("search the log"))?
        .take(limit)
        .map(|e| e.map(|(r, k)| (r.value(), k.value().to_owned())))
        .collect::<Result<_, _>>()
        .map_err(storage("read the log"))?;
    let done = batch.len() < limit;
    let reached = if done { to } else { batch.last().map_or(to, |(r, _)| *r) };
    for (revision, key) in batch {
        log.remove(revision).map_err(storage("shorten the log"))?;
        drop_superseded(&mut versions, &key, revision)?;
    }
    let known = meta(&meta_table, META_COMPACTED)?.unwrap_or(0);
    meta_table.insert(META_COMPACTED, known.max(reached)).map_err(storage("note the compaction"))?;
    Ok(done)
}

/// Removes versions of `key` older than `revision`, and the one at `revision` when it is a deletion.
fn drop_superseded(
    versions: &mut redb::Table<'_, (&'static str, u64), &'static [u8]>,
    key: &str,
    revision: Revision,
) -> Result<(), Error> {
    let old: Vec<Revision> = versions
        .range((key, 0)..(key, revision))
        .map_err(storage("search old versions"))?
        .map(|e| e.map(|(k, _)| k.value().1))
        .collect::<Result<_, _>>()
        .map_err(storage("read old versions"))?;
    for r in old {
        versions.remove((key, r)).map_err(storage("remove an old version"))?;
    }
    let deleted = match versions.get((key, revision)).map_err(storage("read a version"))? {
        Some(v) => v.value().first() == Some(&0),
        None => false,
    };
    if deleted {
        versions.remove((key, revision)).map_err(storage("remove a deletion mark"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_ends_after_its_last_key() {
        assert_eq!(prefix_end("/a/").as_deref(), Some("/a0"));
        assert_eq!(prefix_end(""), None);
        assert_eq!(prefix_end("a\u{D7FF}").as_deref(), Some("a\u{E000}"));
        assert_eq!(prefix_end("\u{10FFFF}"), None);
    }

    #[test]
    fn versions_survive_encoding() {
        for v in [Version::Deleted, Version::Live { created: 7, value: Bytes::from_static(b"x") }] {
            assert_eq!(Version::decode(&v.encode()).expect("decode"), v);
        }
        assert!(Version::decode(&[]).is_err());
        assert!(Version::decode(&[1, 2]).is_err());
    }
}
