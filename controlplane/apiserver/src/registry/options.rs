//! Query parameters and option bodies.

use std::{collections::HashMap, time::Duration};

use http::Uri;
use orlop_store::Revision;
use serde_json::Value;

use crate::{status::Status, value};

/// The query parameters of a request; of repeated ones the first counts.
#[derive(Clone, Debug, Default)]
pub struct Query(HashMap<String, String>);

impl Query {
    /// Parses a URI's query.
    pub fn of(uri: &Uri) -> Query {
        let mut map = HashMap::new();
        for (k, v) in url::form_urlencoded::parse(uri.query().unwrap_or("").as_bytes()) {
            map.entry(k.into_owned()).or_insert_with(|| v.into_owned());
        }
        Query(map)
    }

    /// A parameter, empty when absent.
    pub fn text(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    /// A flag: present and neither `false` nor `0`.
    pub fn flag(&self, name: &str) -> bool {
        matches!(self.text(name), "true" | "1" | "True" | "TRUE" | "t" | "T")
    }

    /// A number.
    ///
    /// # Errors
    /// 400 when it is none.
    pub fn number(&self, name: &str) -> Result<Option<i64>, Status> {
        match self.text(name) {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|_| {
                Status::bad_request(format!(
                    "unable to decode parameter {name:?}: {text:?} is not an integer"
                ))
            }),
        }
    }

    /// A resource version.
    ///
    /// # Errors
    /// 400 when it is none.
    pub fn revision(&self) -> Result<Option<Revision>, Status> {
        match self.text("resourceVersion") {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|_| {
                Status::bad_request(format!("invalid resource version {text:?}: must be a number"))
            }),
        }
    }
}

/// What to do about fields that the schema does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldValidation {
    /// Drop them silently.
    Ignore,
    /// Drop them and warn.
    Warn,
    /// Refuse the request.
    Strict,
}

/// Options of create, update and patch.
#[derive(Clone, Debug)]
pub struct WriteOptions {
    /// Do all but storing.
    pub dry_run: bool,
    /// Who the fields belong to.
    pub manager: String,
    /// Unknown and duplicate fields.
    pub validation: FieldValidation,
    /// Apply takes fields from other managers.
    pub force: bool,
    /// The write comes from an apply, which keeps field ownership itself.
    pub applying: bool,
}

impl WriteOptions {
    /// From the query; `user_agent` gives the manager when none is named.
    ///
    /// # Errors
    /// 400 for values that are not supported.
    pub fn parse(query: &Query, user_agent: &str) -> Result<WriteOptions, Status> {
        let validation = match query.text("fieldValidation") {
            "" | "Warn" => FieldValidation::Warn,
            "Ignore" => FieldValidation::Ignore,
            "Strict" => FieldValidation::Strict,
            other => {
                return Err(Status::bad_request(format!(
                    "invalid fieldValidation {other:?}: must be Ignore, Warn or Strict"
                )));
            }
        };
        let manager = match query.text("fieldManager") {
            "" => user_agent.split('/').next().unwrap_or("").chars().take(128).collect(),
            named if named.len() > 128 => {
                return Err(Status::bad_request("fieldManager may not be longer than 128 characters"));
            }
            named => named.to_owned(),
        };
        Ok(WriteOptions {
            dry_run: dry_run(query.text("dryRun"))?,
            manager,
            validation,
            force: query.flag("force"),
            applying: false,
        })
    }
}

fn dry_run(text: &str) -> Result<bool, Status> {
    match text {
        "" => Ok(false),
        "All" => Ok(true),
        other => Err(Status::bad_request(format!("invalid dryRun {other:?}: only All is supported"))),
    }
}

/// What happens to dependents of a deleted object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    /// They stay.
    Orphan,
    /// They go later.
    Background,
    /// They go first.
    Foreground,
}

/// `metav1.DeleteOptions`.
#[derive(Clone, Debug, Default)]
pub struct DeleteOptions {
    /// Seconds to stop in.
    pub grace: Option<i64>,
    /// Only this very object.
    pub uid: Option<String>,
    /// Only this version.
    pub resource_version: Option<String>,
    /// Dependents.
    pub propagation: Option<Propagation>,
    /// Do all but deleting.
    pub dry_run: bool,
}

impl DeleteOptions {
    /// From the body when there is one, else from the query.
    ///
    /// # Errors
    /// 400 for values that are not supported.
    pub fn parse(query: &Query, body: &Value) -> Result<DeleteOptions, Status> {
        let mut options = DeleteOptions {
            grace: query.number("gracePeriodSeconds")?,
            propagation: propagation(query.text("propagationPolicy"))?,
            dry_run: dry_run(query.text("dryRun"))?,
            ..DeleteOptions::default()
        };
        match query.text("orphanDependents") {
            "true" => options.propagation = Some(Propagation::Orphan),
            "false" => options.propagation = Some(Propagation::Background),
            _ => {}
        }
        if body.is_null() {
            return Ok(options);
        }
        options.grace = value::int(body, "gracePeriodSeconds").or(options.grace);
        options.propagation = propagation(value::text(body, "propagationPolicy"))?.or(options.propagation);
        if let Some(orphan) = value::at(body, "orphanDependents").and_then(Value::as_bool) {
            options.propagation = Some(if orphan { Propagation::Orphan } else { Propagation::Background });
        }
        let own = |path| Some(value::text(body, path)).filter(|t| !t.is_empty()).map(str::to_owned);
        options.uid = own("preconditions.uid");
        options.resource_version = own("preconditions.resourceVersion");
        for item in value::list(body, "dryRun") {
            options.dry_run |= dry_run(item.as_str().unwrap_or("?"))?;
        }
        if options.grace.is_some_and(|g| g < 0) {
            options.grace = Some(1);
        }
        Ok(options)
    }
}

fn propagation(text: &str) -> Result<Option<Propagation>, Status> {
    match text {
        "" => Ok(None),
        "Orphan" => Ok(Some(Propagation::Orphan)),
        "Background" => Ok(Some(Propagation::Background)),
        "Foreground" => Ok(Some(Propagation::Foreground)),
        other => Err(Status::bad_request(format!(
            "invalid propagationPolicy {other:?}: supported values: \"Foreground\", \"Background\", \"Orphan\""
        ))),
    }
}

/// How a list is to be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadAt {
    /// The newest state.
    Newest,
    /// Any state.
    Any,
    /// A state that is at least this new.
    NotOlderThan(Revision),
    /// Exactly this state.
    Exact(Revision),
}

/// Options of list and watch.
#[derive(Clone, Debug)]
pub struct ListOptions {
    /// Which state to show.
    pub at: ReadAt,
    /// Most objects in one answer; 0 = all.
    pub limit: usize,
    /// Where the previous answer ended.
    pub after: Option<String>,
    /// How long a watch lasts.
    pub timeout: Option<Duration>,
    /// Whether the watcher wants bookmarks.
    pub bookmarks: bool,
    /// Whether a watch begins with the present state, ended by a bookmark.
    pub initial_events: Option<bool>,
    /// The resource version as given.
    pub revision: Option<Revision>,
}

impl ListOptions {
    /// From the query.
    ///
    /// # Errors
    /// 400 for combinations that make no sense.
    pub fn parse(query: &Query, watch: bool) -> Result<ListOptions, Status> {
        let limit = usize::try_from(query.number("limit")?.unwrap_or(0)).unwrap_or(0);
        let revision = query.revision()?;
        let matching = query.text("resourceVersionMatch");
        let initial_events = match query.text("sendInitialEvents") {
            "" => None,
            _ => Some(query.flag("sendInitialEvents")),
        };
        if initial_events.is_some() && !watch {
            return Err(Status::bad_request("sendInitialEvents is forbidden for list"));
        }
        if initial_events == Some(true) && matching != "NotOlderThan" {
            return Err(Status::bad_request(
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            ));
        }
        if watch && !matching.is_empty() && initial_events.is_none() {
            return Err(Status::bad_request(
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            ));
        }
        let mut at = match (revision, matching) {
            (None, "") => ReadAt::Newest,
            (None, _) if watch => ReadAt::Newest,
            (None, _) => {
                return Err(Status::bad_request(
                    "resourceVersionMatch is forbidden unless resourceVersion is provided",
                ));
            }
            (Some(0), "Exact") => {
                return Err(Status::bad_request(
                    "resourceVersionMatch \"Exact\" is forbidden for resourceVersion \"0\"",
                ));
            }
            (Some(0), _) => ReadAt::Any,
            (Some(r), "Exact") => ReadAt::Exact(r),
            (Some(r), "") if limit > 0 && !watch => ReadAt::Exact(r),
            (Some(r), "" | "NotOlderThan") => ReadAt::NotOlderThan(r),
            (_, other) => {
                return Err(Status::bad_request(format!(
                    "invalid resourceVersionMatch {other:?}: supported values: \"Exact\", \"NotOlderThan\""
                )));
            }
        };
        let mut after = None;
        if !query.text("continue").is_empty() {
            if revision.is_some_and(|r| r > 0) {
                return Err(Status::bad_request(
                    "specifying resource version is not allowed when using continue",
                ));
            }
            let (r, key) = decode_continue(query.text("continue"))?;
            at = ReadAt::Exact(r);
            after = Some(key);
        }
        let timeout = query.number("timeoutSeconds")?.and_then(|s| u64::try_from(s).ok()).filter(|s| *s > 0);
        Ok(ListOptions {
            at,
            limit,
            after,
            timeout: timeout.map(Duration::from_secs),
            bookmarks: query.flag("allowWatchBookmarks"),
            initial_events,
            revision,
        })
    }
}

/// The token that continues a list after `key` at `revision`.
pub fn encode_continue(revision: Revision, key: &str) -> String {
    use base64::Engine;
    let token = serde_json::json!({"v": "meta.k8s.io/v1", "rv": revision, "start": key});
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(token.to_string())
}

fn decode_continue(token: &str) -> Result<(Revision, String), Status> {
    use base64::Engine;
    let bad = || Status::bad_request("continue key is not valid");
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD
        .decode(token.trim_end_matches('='))
        .map_err(|_| bad())?;
    let token: Value = serde_json::from_slice(&bytes).map_err(|_| bad())?;
    let revision = token["rv"].as_u64().filter(|r| *r > 0).ok_or_else(bad)?;
    let key = token["start"].as_str().filter(|k| k.starts_with(crate::watch_cache::ROOT)).ok_or_else(bad)?;
    Ok((revision, key.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(query: &str) -> Result<ReadAt, u16> {
        let uri: Uri = format!("/x?{query}").parse().expect("uri");
        ListOptions::parse(&Query::of(&uri), false).map(|o| o.at).map_err(|s| s.code)
    }

    #[test]
    fn resource_version_semantics() {
        assert_eq!(list(""), Ok(ReadAt::Newest));
        assert_eq!(list("resourceVersion=0"), Ok(ReadAt::Any));
        assert_eq!(list("resourceVersion=7"), Ok(ReadAt::NotOlderThan(7)));
        assert_eq!(list("resourceVersion=7&limit=2"), Ok(ReadAt::Exact(7)));
        assert_eq!(list("resourceVersion=7&resourceVersionMatch=Exact"), Ok(ReadAt::Exact(7)));
        assert_eq!(list("resourceVersion=0&resourceVersionMatch=Exact"), Err(400));
        assert_eq!(list("resourceVersionMatch=Exact"), Err(400));
        assert_eq!(list("resourceVersion=x"), Err(400));
        assert_eq!(list("continue=zzz"), Err(400));
        let token = encode_continue(9, "/registry/core/pods/a/b");
        assert_eq!(list(&format!("continue={token}")), Ok(ReadAt::Exact(9)));
    }

    #[test]
    fn delete_options_come_from_body_or_query() {
        let uri: Uri = "/x?propagationPolicy=Foreground&gracePeriodSeconds=5".parse().expect("uri");
        let o = DeleteOptions::parse(&Query::of(&uri), &Value::Null).expect("options");
        assert_eq!((o.grace, o.propagation), (Some(5), Some(Propagation::Foreground)));
        let body =
            serde_json::json!({"gracePeriodSeconds": 0, "preconditions": {"uid": "u"}, "dryRun": ["All"]});
        let o = DeleteOptions::parse(&Query::of(&uri), &body).expect("options");
        assert_eq!((o.grace, o.uid.as_deref(), o.dry_run), (Some(0), Some("u"), true));
    }
}
