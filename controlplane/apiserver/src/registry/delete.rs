//! delete and deletecollection: preconditions, finalizers, graceful deletion.

use http::{Response, StatusCode};
use jiff::{Timestamp, ToSpan};
use orlop_store::{Expect, Outcome, Record, Write};
use serde_json::{Value, json};

use super::{
    Body, Operation, Registry,
    context::Context,
    metadata,
    object::{EventType, Object, to_stored},
    options::{DeleteOptions, ListOptions, Propagation},
    respond,
};
use crate::{
    codec,
    resources::Resource,
    status::Status,
    value,
    watch_cache::{key_of, store_status},
};

const ATTEMPTS: usize = 16;
const ORPHAN: &str = "orphan";
const FOREGROUND: &str = "foregroundDeletion";

/// What a deletion did.
pub(super) enum Deleted {
    /// The object is gone; its last state.
    Gone(Object),
    /// It is marked and goes later.
    Pending(Object),
}

/// What to do with an object that is to be deleted.
#[derive(Debug, PartialEq)]
enum Plan {
    Remove,
    Mark(Value),
    Nothing,
}

/// Namespaces are held by `spec.finalizers` too.
pub(super) fn has_spec_finalizers(resource: &Resource, object: &Value) -> bool {
    &*resource.storage == "core/namespaces" && !value::list(object, "spec.finalizers").is_empty()
}

/// Decides without side effects. `now` is the time of the request.
fn plan(resource: &Resource, object: &Value, options: &DeleteOptions, now: Timestamp) -> Plan {
    let mut new = object.clone();
    set_finalizers(resource, &mut new, options.propagation);
    let grace = resource.strategy.grace_period(object, options.grace).filter(|g| *g > 0);
    let deleting = value::text(object, "metadata.deletionTimestamp").parse::<Timestamp>().ok();
    let held = !value::list(&new, "metadata.finalizers").is_empty() || has_spec_finalizers(resource, object);
    if grace.is_none() && !held {
        return Plan::Remove;
    }
    let grace = grace.unwrap_or(0);
    match deleting {
        None => {
            value::set(
                &mut new,
                "metadata.deletionTimestamp",
                metadata::stamp(now.saturating_add(grace.seconds()).unwrap_or(now)),
            );
            value::set(&mut new, "metadata.deletionGracePeriodSeconds", grace);
            if resource.generation {
                value::set(
                    &mut new,
                    "metadata.generation",
                    value::int(object, "metadata.generation").unwrap_or(0) + 1,
                );
            }
            if &*resource.storage == "core/namespaces" {
                value::set(&mut new, "status.phase", "Terminating");
            }
        }
        Some(at) => {
            // A second request may only make it shorter.
            let before = value::int(object, "metadata.deletionGracePeriodSeconds").unwrap_or(0);
            let asked = options.grace.is_some() || grace == 0;
            if asked && grace < before {
                let begun = at.saturating_sub(before.seconds()).unwrap_or(at);
                value::set(
                    &mut new,
                    "metadata.deletionTimestamp",
                    metadata::stamp(begun.saturating_add(grace.seconds()).unwrap_or(at)),
                );
                value::set(&mut new, "metadata.deletionGracePeriodSeconds", grace);
            }
        }
    }
    if new == *object { Plan::Nothing } else { Plan::Mark(new) }
}

fn set_finalizers(resource: &Resource, object: &mut Value, propagation: Option<Propagation>) {
    let present: Vec<String> = value::list(object, "metadata.finalizers")
        .iter()
        .filter_map(|f| f.as_str().map(str::to_owned))
        .collect();
    let (orphan, foreground) = match propagation {
        Some(p) => (p == Propagation::Orphan, p == Propagation::Foreground),
        None if present.iter().any(|f| f == ORPHAN || f == FOREGROUND) => return,
        None => (resource.strategy.orphans_by_default(), false),
    };
    let mut wanted: Vec<String> =
        present.iter().filter(|f| *f != ORPHAN && *f != FOREGROUND).cloned().collect();
    if orphan {
        wanted.push(ORPHAN.into());
    }
    if foreground {
        wanted.push(FOREGROUND.into());
    }
    if wanted.is_empty() {
        value::remove(object, "metadata.finalizers");
    } else if wanted != present {
        value::set(object, "metadata.finalizers", json!(wanted));
    }
}

impl Registry {
    pub(super) async fn delete_request(&self, mut ctx: Context) -> Result<Response<Body>, Status> {
        let options = self.delete_options(&ctx)?;
        let name = ctx.name().to_owned();
        let namespace = ctx.namespace().to_owned();
        let mut response = match self.delete_object(&mut ctx, &namespace, &name, &options).await? {
            Deleted::Gone(object) => {
                let uid = value::text(&object.value()?, "metadata.uid").to_owned();
                let status = Status::success(&ctx.resource.group, &ctx.resource.plural, &name, &uid);
                status.into_response()
            }
            Deleted::Pending(object) => respond::object(&ctx.resource, &object, StatusCode::OK, &ctx.wanted)?,
        };
        respond::warn(&mut response, &ctx.warnings);
        Ok(response)
    }

    fn delete_options(&self, ctx: &Context) -> Result<DeleteOptions, Status> {
        let body = if ctx.request.body.is_empty() {
            Value::Null
        } else {
            codec::decode(&ctx.request.headers, &ctx.request.body)?.value
        };
        DeleteOptions::parse(&ctx.query, &body)
    }

    /// Deletes one object, or begins to.
    pub(super) async fn delete_object(
        &self,
        ctx: &mut Context,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
    ) -> Result<Deleted, Status> {
        let resource = ctx.stored.clone();
        let key = key_of(&resource.storage, namespace, name);
        for _ in 0..ATTEMPTS {
            let record = self.inner.store.get(&key).await.map_err(store_status)?;
            let record = record.ok_or_else(|| ctx.resource.not_found(name))?;
            let object = Object::from_stored(&record.value, record.revision, EventType::Deleted)?;
            let old = object.value()?;
            preconditions(ctx, name, &old, options)?;
            let mut attrs = ctx.attributes(
                Operation::Delete,
                &ctx.resource.kind.clone(),
                None,
                Some(old.clone()),
                options.dry_run,
            );
            attrs.info.name = name.to_owned();
            attrs.info.namespace = namespace.to_owned();
            let admission = self.admission();
            admission.admit(&mut attrs).await?;
            admission.validate(&mut attrs).await?;

            match plan(&resource, &old, options, Timestamp::now()) {
                Plan::Nothing => return Ok(Deleted::Pending(object)),
                Plan::Remove if options.dry_run => return Ok(Deleted::Gone(object)),
                Plan::Remove => {
                    let done = self
                        .inner
                        .store
                        .compare_and_swap(&key, Expect::Revision(record.revision), Write::Delete)
                        .await;
                    if let Outcome::Committed(revision) = done.map_err(store_status)? {
                        self.inner.services.released(&resource, &old, None);
                        return Ok(Deleted::Gone(Object::from_stored(
                            &record.value,
                            revision,
                            EventType::Deleted,
                        )?));
                    }
                }
                Plan::Mark(mut new) => {
                    let stored = to_stored(&mut new);
                    if options.dry_run {
                        return Ok(Deleted::Pending(Object::from_stored(
                            &stored,
                            record.revision,
                            EventType::Modified,
                        )?));
                    }
                    if let Ok(revision) =
                        self.put(&resource, &key, Expect::Revision(record.revision), stored.clone()).await?
                    {
                        return Ok(Deleted::Pending(Object::from_stored(
                            &stored,
                            revision,
                            EventType::Modified,
                        )?));
                    }
                }
            }
        }
        Err(Status::conflict(
            &ctx.resource.group,
            &ctx.resource.plural,
            name,
            "the object is being changed too often; try again",
        ))
    }

    /// Removes an object whose last finalizer an update took away.
    pub(super) async fn finish_deletion(
        &self,
        resource: &Resource,
        key: &str,
        record: &Record,
        stored: &[u8],
    ) -> Result<Object, Status> {
        let done =
            self.inner.store.compare_and_swap(key, Expect::Revision(record.revision), Write::Delete).await;
        match done.map_err(store_status)? {
            Outcome::Committed(revision) => {
                let object = Object::from_stored(stored, revision, EventType::Deleted)?;
                self.inner.services.released(resource, &object.value()?, None);
                Ok(object)
            }
            Outcome::Conflict(_) => {
                let name = key.rsplit('/').next().unwrap_or("");
                Err(Status::conflict(
                    &resource.group,
                    &resource.plural,
                    name,
                    "the object has been modified; please apply your changes to the latest version and try again",
                ))
            }
        }
    }

    pub(super) async fn delete_collection_request(&self, mut ctx: Context) -> Result<Response<Body>, Status> {
        let options = self.delete_options(&ctx)?;
        let listing = ListOptions::parse(&ctx.query, false)?;
        let selection = ctx.selection()?;
        let (objects, meta) = self.select(&ctx.resource.clone(), &selection, &listing).await?;
        for object in &objects {
            let (namespace, name) = (object.namespace().to_owned(), object.name().to_owned());
            match self.delete_object(&mut ctx, &namespace, &name, &options).await {
                Err(e) if !e.is_not_found() => return Err(e),
                _ => {}
            }
        }
        respond::list(&ctx.resource, &objects, &meta, &ctx.wanted)
    }
}

fn preconditions(ctx: &Context, name: &str, object: &Value, options: &DeleteOptions) -> Result<(), Status> {
    let fail = |what: &str, wanted: &str, got: &str| {
        let why =
            format!("Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {got}");
        Err(Status::conflict(&ctx.resource.group, &ctx.resource.plural, name, &why))
    };
    let uid = value::text(object, "metadata.uid");
    if let Some(wanted) = options.uid.as_deref()
        && wanted != uid
    {
        return fail("UID", wanted, uid);
    }
    let version = value::text(object, "metadata.resourceVersion");
    match options.resource_version.as_deref() {
        Some(wanted) if wanted != version => fail("ResourceVersion", wanted, version),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::ResourceTable;

    #[test]
    fn deletion_plans() {
        let table = ResourceTable::builtin();
        let pods = table.get("", "v1", "pods").expect("pods");
        let maps = table.get("", "v1", "configmaps").expect("configmaps");
        let jobs = table.get("batch", "v1", "jobs").expect("jobs");
        let spaces = table.get("", "v1", "namespaces").expect("namespaces");
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().expect("time");
        let o = DeleteOptions::default;

        assert_eq!(plan(maps, &json!({"metadata": {"name": "a"}}), &o(), now), Plan::Remove);
        let held = json!({"metadata": {"name": "a", "finalizers": ["x/y"]}});
        let Plan::Mark(m) = plan(maps, &held, &o(), now) else { panic!("held by a finalizer") };
        assert_eq!(m["metadata"]["deletionTimestamp"], "2026-01-01T00:00:00Z");
        assert_eq!(plan(maps, &m, &o(), now), Plan::Nothing);

        let unscheduled = json!({"metadata": {"name": "a"}, "spec": {}});
        assert_eq!(plan(pods, &unscheduled, &o(), now), Plan::Remove);
        let running = json!({"metadata": {"name": "a"}, "spec": {"nodeName": "n", "terminationGracePeriodSeconds": 30}});
        let Plan::Mark(m) = plan(pods, &running, &o(), now) else { panic!("a running pod stops first") };
        assert_eq!(m["metadata"]["deletionTimestamp"], "2026-01-01T00:00:30Z");
        assert_eq!(m["metadata"]["deletionGracePeriodSeconds"], 30);
        assert_eq!(plan(pods, &m, &o(), now), Plan::Nothing);
        let Plan::Mark(short) = plan(pods, &m, &DeleteOptions { grace: Some(5), ..o() }, now) else {
            panic!("shorter")
        };
        assert_eq!(short["metadata"]["deletionTimestamp"], "2026-01-01T00:00:05Z");
        assert_eq!(plan(pods, &short, &DeleteOptions { grace: Some(9), ..o() }, now), Plan::Nothing);
        assert_eq!(plan(pods, &m, &DeleteOptions { grace: Some(0), ..o() }, now), Plan::Remove);

        let foreground = DeleteOptions { propagation: Some(Propagation::Foreground), ..o() };
        let Plan::Mark(m) = plan(maps, &json!({"metadata": {"name": "a"}}), &foreground, now) else {
            panic!("foreground")
        };
        assert_eq!(m["metadata"]["finalizers"], json!(["foregroundDeletion"]));
        let Plan::Mark(m) = plan(jobs, &json!({"metadata": {"name": "a"}}), &o(), now) else {
            panic!("jobs orphan by default")
        };
        assert_eq!(m["metadata"]["finalizers"], json!(["orphan"]));

        let space = json!({"metadata": {"name": "a"}, "spec": {"finalizers": ["kubernetes"]}});
        let Plan::Mark(m) = plan(spaces, &space, &o(), now) else {
            panic!("namespaces wait for their content")
        };
        assert_eq!(m["status"]["phase"], "Terminating");
    }
}
