//! create, update and patch.

use std::sync::Arc;

use http::{Response, StatusCode};
use orlop_store::{Expect, Outcome, Revision, Write};
use serde_json::Value;

use super::{
    Attributes, Body, Operation, Registry,
    context::{Context, check_kind},
    metadata,
    object::{EventType, Object, to_stored},
    options::{FieldValidation, WriteOptions},
    respond,
};
use crate::{
    apply, codec,
    patch::{self, PatchType},
    resources::Resource,
    schema::Extent,
    status::Status,
    validation::{Errors, meta},
    value,
    watch_cache::{key_of, store_status},
};

/// Names tried for one `generateName`.
const NAME_ATTEMPTS: usize = 8;
/// How often a write without a resource version is tried again when others write the same object.
const WRITE_ATTEMPTS: usize = 16;

/// The endpoint through which an object is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// The object itself: `status` is kept.
    Main,
    /// `…/status`: everything but `status` and metadata is kept.
    Status,
    /// Another subresource that shapes the change itself: nothing is carried over but system metadata.
    Other(&'static str),
}

impl Endpoint {
    pub(super) fn subresource(self) -> &'static str {
        match self {
            Endpoint::Main => "",
            Endpoint::Status => "status",
            Endpoint::Other(name) => name,
        }
    }
}

/// What a change did.
pub(super) struct Written {
    pub object: Object,
    pub created: bool,
}

impl Registry {
    pub(super) async fn create_request(&self, mut ctx: Context) -> Result<Response<Body>, Status> {
        let options = ctx.write_options()?;
        let object = ctx.body(&options)?;
        let written = self.create_object(&mut ctx, object, &options).await?;
        let mut response = respond::object(&ctx.resource, &written, StatusCode::CREATED, &ctx.wanted)?;
        respond::warn(&mut response, &ctx.warnings);
        Ok(response)
    }

    /// Creates an object given in the version of the request.
    pub(super) async fn create_object(
        &self,
        ctx: &mut Context,
        mut object: Value,
        options: &WriteOptions,
    ) -> Result<Object, Status> {
        let resource = ctx.stored.clone();
        if resource.namespaced && ctx.namespace().is_empty() {
            return Err(Status::bad_request("an empty namespace may not be set during creation"));
        }
        metadata::check_namespace(&mut object, ctx.namespace())?;
        if value::has(&object, "metadata.resourceVersion")
            && !value::text(&object, "metadata.resourceVersion").is_empty()
        {
            return Err(Status::bad_request("resourceVersion should not be set on objects to be created"));
        }
        if !ctx.name().is_empty() {
            value::default_text(&mut object, "metadata.name", ctx.name());
        }
        to_storage(&ctx.resource, &resource, &mut object);
        metadata::begin(&mut object, resource.generation);
        metadata::tidy(&mut object);
        if resource.status {
            value::remove(&mut object, "status");
        }
        resource.strategy.prepare_create(&mut object);
        resource.strategy.defaults(&mut object);

        let base = value::text(&object, "metadata.generateName").to_owned();
        let generated = value::text(&object, "metadata.name").is_empty() && !base.is_empty();
        let mut last = Status::internal("no name was tried");
        for _ in 0..if generated { NAME_ATTEMPTS } else { 1 } {
            let mut attempt = object.clone();
            if generated {
                value::set(&mut attempt, "metadata.name", metadata::generate_name(&base));
            }
            match self.create_once(ctx, attempt, options).await {
                Err(e) if generated && e.is_already_exists() => last = e,
                done => return done,
            }
        }
        Err(last)
    }

    async fn create_once(
        &self,
        ctx: &mut Context,
        object: Value,
        options: &WriteOptions,
    ) -> Result<Object, Status> {
        let resource = ctx.stored.clone();
        let mut attrs = ctx.attributes(
            Operation::Create,
            &ctx.resource.kind.clone(),
            Some(object),
            None,
            options.dry_run,
        );
        attrs.info.name =
            attrs.object.as_ref().map(|o| value::text(o, "metadata.name").to_owned()).unwrap_or_default();
        let admission = self.admission();
        admission.admit(&mut attrs).await?;
        let mut object = attrs.object.take().unwrap_or_default();
        resource.strategy.defaults(&mut object);
        let reserved = self.inner.services.reserve(&resource, &mut object, None)?;
        apply::track(
            &resource,
            ctx.resource.api_version(),
            &mut object,
            None,
            options,
            ctx.request.info.subresource.as_str(),
        );

        let mut errors = Errors::default();
        meta::object_meta(&object, resource.name_rule, &mut errors);
        resource.strategy.validate(&object, &mut errors);
        refuse(&resource, &object, errors)?;
        attrs.object = Some(object);
        admission.validate(&mut attrs).await?;
        ctx.warnings.append(&mut attrs.warnings);
        let mut object = attrs.object.take().unwrap_or_default();
        ctx.warnings.extend(resource.strategy.warnings(&object));

        let name = value::text(&object, "metadata.name").to_owned();
        let key = key_of(&resource.storage, ctx.namespace(), &name);
        let stored = to_stored(&mut object);
        if options.dry_run {
            if self.inner.store.get(&key).await.map_err(store_status)?.is_some() {
                return Err(Status::already_exists(&ctx.resource.group, &ctx.resource.plural, &name));
            }
            return Object::from_stored(&stored, 0, EventType::Added);
        }
        match self.put(&resource, &key, Expect::Absent, stored.clone()).await? {
            Ok(revision) => {
                reserved.keep();
                Object::from_stored(&stored, revision, EventType::Added)
            }
            Err(_) => Err(Status::already_exists(&ctx.resource.group, &ctx.resource.plural, &name)),
        }
    }

    /// Stores bytes; the inner error says that the expectation did not hold.
    pub(super) async fn put(
        &self,
        resource: &Resource,
        key: &str,
        expect: Expect,
        stored: Vec<u8>,
    ) -> Result<Result<Revision, ()>, Status> {
        let ttl = resource.expires.then_some(self.inner.options.event_ttl);
        let write = Write::Put { value: stored.into(), ttl };
        match self.inner.store.compare_and_swap(key, expect, write).await.map_err(store_status)? {
            Outcome::Committed(revision) => Ok(Ok(revision)),
            Outcome::Conflict(_) => Ok(Err(())),
        }
    }

    pub(super) async fn update_request(
        &self,
        mut ctx: Context,
        endpoint: Endpoint,
    ) -> Result<Response<Body>, Status> {
        let options = ctx.write_options()?;
        let mut body = ctx.body(&options)?;
        metadata::check_namespace(&mut body, ctx.namespace())?;
        let name = ctx.name().to_owned();
        match value::text(&body, "metadata.name") {
            "" => value::set(&mut body, "metadata.name", name.clone()),
            same if same == name => {}
            other => {
                return Err(Status::bad_request(format!(
                    "the name of the object ({other}) does not match the name on the URL ({name})"
                )));
            }
        }
        let replacement = body.clone();
        let written = self.change(&mut ctx, endpoint, &options, move |_, _| Ok(replacement.clone())).await;
        let written = match written {
            Err(e)
                if e.is_not_found()
                    && endpoint == Endpoint::Main
                    && ctx.stored.strategy.create_on_update() =>
            {
                value::remove(&mut body, "metadata.resourceVersion");
                Written { object: self.create_object(&mut ctx, body, &options).await?, created: true }
            }
            other => other?,
        };
        self.answer(ctx, written)
    }

    fn answer(&self, ctx: Context, written: Written) -> Result<Response<Body>, Status> {
        let code = if written.created { StatusCode::CREATED } else { StatusCode::OK };
        let mut response = respond::object(&ctx.resource, &written.object, code, &ctx.wanted)?;
        respond::warn(&mut response, &ctx.warnings);
        Ok(response)
    }

    pub(super) async fn patch_request(
        &self,
        mut ctx: Context,
        endpoint: Endpoint,
    ) -> Result<Response<Body>, Status> {
        let options = ctx.write_options()?;
        let kind = PatchType::of(&ctx.request.headers)?;
        if kind == PatchType::Apply {
            let written = self.apply_request(&mut ctx, endpoint, options).await?;
            return self.answer(ctx, written);
        }
        let patch = patch::Patch::parse(kind, &ctx.request.body)?;
        let resource = ctx.resource.clone();
        let validation = options.validation;
        let written = self
            .change(&mut ctx, endpoint, &options, move |ctx, current| {
                // Upstream's types always have a status; patches by path rely on it.
                let mut bare = None;
                if endpoint == Endpoint::Status && !value::has(current, "status") {
                    let mut v = current.clone();
                    value::set(&mut v, "status", serde_json::json!({}));
                    bare = Some(v);
                }
                let mut patched = patch.apply(bare.as_ref().unwrap_or(current), resource.type_name)?;
                check_kind(&mut patched, &resource.api_version(), &resource.kind)?;
                ctx.conform(&mut patched, &resource, Vec::new(), validation, Extent::Whole)?;
                Ok(patched)
            })
            .await?;
        self.answer(ctx, written)
    }

    /// Server-side apply: creates the object when there is none.
    async fn apply_request(
        &self,
        ctx: &mut Context,
        endpoint: Endpoint,
        mut options: WriteOptions,
    ) -> Result<Written, Status> {
        if ctx.query.text("fieldManager").is_empty() {
            let mut errors = Errors::default();
            errors.required("fieldManager", "is required for apply patch");
            return Err(Status::invalid("meta.k8s.io", "PatchOptions", "", errors.into_causes()));
        }
        options.applying = true;
        let resource = ctx.resource.clone();
        let mut applied = codec::yaml(&ctx.request.body)?.value;
        if value::text(&applied, "apiVersion").is_empty() || value::text(&applied, "kind").is_empty() {
            return Err(Status::bad_request("apiVersion and kind must be set in an apply patch"));
        }
        check_kind(&mut applied, &resource.api_version(), &resource.kind)?;
        ctx.conform(&mut applied, &resource, Vec::new(), options.validation, Extent::Part)?;
        metadata::check_namespace(&mut applied, ctx.namespace())?;
        if !value::list(&applied, "metadata.managedFields").is_empty() {
            return Err(Status::bad_request("metadata.managedFields must be nil"));
        }
        let name = ctx.name().to_owned();
        value::default_text(&mut applied, "metadata.name", &name);
        if value::text(&applied, "metadata.name") != name {
            return Err(Status::bad_request("the name of the object does not match the name on the URL"));
        }
        let (wanted, rules) = (applied.clone(), options.clone());
        let merged = move |ctx: &mut Context, live: &Value| {
            let mut merged = apply::apply(&ctx.resource, live, &wanted, &rules, endpoint.subresource())?;
            let resource = ctx.resource.clone();
            ctx.conform(&mut merged, &resource, Vec::new(), FieldValidation::Ignore, Extent::Whole)?;
            Ok(merged)
        };
        match self.change(ctx, endpoint, &options, merged).await {
            Err(e) if e.is_not_found() && endpoint == Endpoint::Main => {
                ctx.conform(&mut applied, &resource, Vec::new(), FieldValidation::Ignore, Extent::Whole)?;
                apply::create(&resource, &mut applied, &options, "");
                Ok(Written { object: self.create_object(ctx, applied, &options).await?, created: true })
            }
            other => other,
        }
    }

    /// Reads, changes and writes an object, again when another writer was faster and the client named no version.
    /// `change` gets the object in the version of the request and returns the wanted one.
    pub(super) async fn change(
        &self,
        ctx: &mut Context,
        endpoint: Endpoint,
        options: &WriteOptions,
        change: impl Fn(&mut Context, &Value) -> Result<Value, Status>,
    ) -> Result<Written, Status> {
        let resource = ctx.stored.clone();
        let key = key_of(&resource.storage, ctx.namespace(), ctx.name());
        let warned = ctx.warnings.len();
        for _ in 0..WRITE_ATTEMPTS {
            ctx.warnings.truncate(warned);
            let record = self.inner.store.get(&key).await.map_err(store_status)?;
            let record = record.ok_or_else(|| ctx.resource.not_found(ctx.name()))?;
            let current = Object::from_stored(&record.value, record.revision, EventType::Modified)?;
            let old = current.value()?;
            let mut served = old.clone();
            if let Some(conversion) = &ctx.resource.conversion {
                (conversion.serve)(&mut served);
            }
            let mut new = change(ctx, &served)?;
            let versioned = check_version(ctx, &new, &served)?;
            to_storage(&ctx.resource, &resource, &mut new);
            let reserved = self.prepare(ctx, endpoint, options, &mut new, &old).await?;

            let stored = to_stored(&mut new);
            if stored == record.value[..] || options.dry_run {
                let revision = record.revision;
                return Ok(Written {
                    object: Object::from_stored(&stored, revision, EventType::Modified)?,
                    created: false,
                });
            }
            if gone(&resource, &new) {
                return self
                    .finish_deletion(&resource, &key, &record, &stored)
                    .await
                    .map(|object| Written { object, created: false });
            }
            match self.put(&resource, &key, Expect::Revision(record.revision), stored.clone()).await? {
                Ok(revision) => {
                    reserved.keep();
                    let object = Object::from_stored(&stored, revision, EventType::Modified)?;
                    self.inner.services.released(&resource, &old, Some(&new));
                    return Ok(Written { object, created: false });
                }
                Err(()) if versioned => return Err(modified(ctx)),
                Err(()) => {}
            }
        }
        Err(modified(ctx))
    }

    /// Everything between the wanted object and the stored one: carry-over, defaults, admission, validation.
    async fn prepare(
        &self,
        ctx: &mut Context,
        endpoint: Endpoint,
        options: &WriteOptions,
        new: &mut Value,
        old: &Value,
    ) -> Result<super::services::Reservation, Status> {
        let resource = ctx.stored.clone();
        metadata::carry(new, old);
        metadata::tidy(new);
        match endpoint {
            Endpoint::Main => {
                if resource.status {
                    value::carry(new, old, "status");
                }
                resource.strategy.prepare_update(new, old);
            }
            Endpoint::Status => {
                keep_all_but_status(new, old);
                resource.strategy.prepare_status(new, old);
            }
            Endpoint::Other(_) => {}
        }
        resource.strategy.defaults(new);
        let mut attrs = ctx.attributes(
            Operation::Update,
            &ctx.resource.kind.clone(),
            Some(std::mem::take(new)),
            Some(old.clone()),
            options.dry_run,
        );
        let admission = self.admission();
        admission.admit(&mut attrs).await?;
        *new = attrs.object.take().unwrap_or_default();
        resource.strategy.defaults(new);
        if resource.generation
            // Binding a pod is the system's part of its start, no change that somebody asked for.
            && !matches!(endpoint, Endpoint::Status | Endpoint::Other("binding"))
            && resource.strategy.generation_changes(new, old)
        {
            value::set(new, "metadata.generation", value::int(old, "metadata.generation").unwrap_or(0) + 1);
        }
        let reserved = if endpoint == Endpoint::Main {
            self.inner.services.reserve(&resource, new, Some(old))?
        } else {
            super::services::Reservation::none()
        };
        apply::track(&resource, ctx.resource.api_version(), new, Some(old), options, endpoint.subresource());

        let mut errors = Errors::default();
        meta::object_meta(new, resource.name_rule, &mut errors);
        meta::object_meta_update(new, old, &mut errors);
        match endpoint {
            Endpoint::Status => resource.strategy.validate_status(new, old, &mut errors),
            _ => resource.strategy.validate_update(new, old, &mut errors),
        }
        refuse(&resource, new, errors)?;
        attrs.object = Some(std::mem::take(new));
        admission.validate(&mut attrs).await?;
        ctx.warnings.append(&mut attrs.warnings);
        *new = attrs.object.take().unwrap_or_default();
        if endpoint == Endpoint::Main {
            ctx.warnings.extend(resource.strategy.warnings(new));
        }
        Ok(reserved)
    }

    pub(super) fn admission(&self) -> Arc<dyn super::Admission> {
        self.inner.admission.read().clone()
    }

    /// Runs admission for a request whose body is not stored (binding, eviction, scale).
    pub(super) async fn admit_extra(
        &self,
        ctx: &mut Context,
        kind: &str,
        operation: Operation,
        body: Value,
        dry_run: bool,
    ) -> Result<Value, Status> {
        let mut attrs: Attributes = ctx.attributes(operation, kind, Some(body), None, dry_run);
        let admission = self.admission();
        admission.admit(&mut attrs).await?;
        admission.validate(&mut attrs).await?;
        ctx.warnings.append(&mut attrs.warnings);
        Ok(attrs.object.take().unwrap_or_default())
    }
}

/// Turns a served object into the stored version.
pub(super) fn to_storage(served: &Resource, stored: &Resource, object: &mut Value) {
    if let Some(conversion) = &served.conversion {
        (conversion.store)(object);
    }
    let (api_version, kind) = stored.stored_as.clone();
    value::set(object, "apiVersion", api_version.into_owned());
    value::set(object, "kind", kind.into_owned());
}

fn refuse(resource: &Resource, object: &Value, errors: Errors) -> Result<(), Status> {
    if errors.is_empty() {
        return Ok(());
    }
    let name = value::text(object, "metadata.name");
    let name = if name.is_empty() { value::text(object, "metadata.generateName") } else { name };
    Err(Status::invalid(&resource.group, &resource.kind, name, errors.into_causes()))
}

/// A deleted object whose last finalizer went, and that need not wait any more.
fn gone(resource: &Resource, object: &Value) -> bool {
    value::has(object, "metadata.deletionTimestamp")
        && value::list(object, "metadata.finalizers").is_empty()
        && value::int(object, "metadata.deletionGracePeriodSeconds").unwrap_or(0) == 0
        && !super::delete::has_spec_finalizers(resource, object)
}

/// Refuses a version or UID that is not the present one. Returns whether the client named a version.
fn check_version(ctx: &Context, new: &Value, current: &Value) -> Result<bool, Status> {
    let uid = value::text(new, "metadata.uid");
    if !uid.is_empty() && uid != value::text(current, "metadata.uid") {
        return Err(Status::conflict(
            &ctx.resource.group,
            &ctx.resource.plural,
            ctx.name(),
            &format!(
                "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                value::text(current, "metadata.uid")
            ),
        ));
    }
    let wanted = value::text(new, "metadata.resourceVersion");
    if wanted.is_empty() || wanted == "0" {
        if !ctx.stored.strategy.unconditional_update() && ctx.request.info.verb == "update" {
            let mut errors = Errors::default();
            errors.invalid("metadata.resourceVersion", &0.into(), "must be specified for an update");
            return Err(Status::invalid(
                &ctx.resource.group,
                &ctx.resource.kind,
                ctx.name(),
                errors.into_causes(),
            ));
        }
        return Ok(false);
    }
    if wanted != value::text(current, "metadata.resourceVersion") {
        return Err(modified(ctx));
    }
    // A patch that names no version carries the one it was applied to; it may be tried again on a newer one.
    Ok(ctx.request.info.verb != "patch")
}

fn modified(ctx: &Context) -> Status {
    Status::conflict(
        &ctx.resource.group,
        &ctx.resource.plural,
        ctx.name(),
        "the object has been modified; please apply your changes to the latest version and try again",
    )
}

/// The status endpoint changes `status` and metadata only.
fn keep_all_but_status(new: &mut Value, old: &Value) {
    let Some(map) = new.as_object_mut() else { return };
    map.retain(|k, _| matches!(k.as_str(), "status" | "metadata" | "apiVersion" | "kind"));
    for (k, v) in old.as_object().into_iter().flatten() {
        if !matches!(k.as_str(), "status" | "metadata" | "apiVersion" | "kind") {
            map.insert(k.clone(), v.clone());
        }
    }
    value::carry(new, old, "metadata.ownerReferences");
}
