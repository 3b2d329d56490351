//! Subresources that are not plain views of the object: scale, binding, eviction, and the narrow pod and namespace endpoints.

use http::{Response, StatusCode};
use serde_json::{Value, json};

use super::{
    Body, Operation, Registry,
    context::{Context, check_kind},
    delete::Deleted,
    metadata,
    options::{DeleteOptions, ListOptions, Query, WriteOptions},
    respond,
    write::Endpoint,
};
use crate::{
    codec,
    patch::{Patch, PatchType},
    resources::{ScalePaths, certificates},
    schema::Extent,
    status::Status,
    validation::{Errors, selector_of},
    value,
    watch_cache::Selection,
};

impl Registry {
    /// Routes a request for a subresource.
    pub(super) async fn subresource_request(&self, ctx: Context) -> Result<Response<Body>, Status> {
        let (verb, name) = (ctx.request.info.verb.clone(), ctx.request.info.subresource.clone());
        if name == "status" && ctx.resource.status {
            return match verb.as_str() {
                "get" => self.get_request(&ctx).await,
                "update" => self.update_request(ctx, Endpoint::Status).await,
                "patch" => self.patch_request(ctx, Endpoint::Status).await,
                _ => Err(not_allowed(&ctx)),
            };
        }
        if name == "scale"
            && let Some(paths) = ctx.resource.scale.clone()
        {
            return self.scale_request(ctx, &paths).await;
        }
        if !ctx.resource.extras.iter().any(|e| e.name == name) {
            return Err(Status::no_such_path());
        }
        match (name.as_str(), verb.as_str()) {
            ("binding", "create") => self.bind_request(ctx).await,
            ("eviction", "create") => self.evict_request(ctx).await,
            ("ephemeralcontainers" | "resize" | "approval", "get") => self.get_request(&ctx).await,
            ("ephemeralcontainers", "update" | "patch") => self.narrow(ctx, "ephemeralcontainers").await,
            ("resize", "update" | "patch") => self.narrow(ctx, "resize").await,
            ("finalize", "update") => self.narrow(ctx, "finalize").await,
            ("approval", "update" | "patch") => self.narrow(ctx, "approval").await,
            _ => Err(not_allowed(&ctx)),
        }
    }

    /// An endpoint that changes only a part of the object.
    async fn narrow(&self, mut ctx: Context, part: &'static str) -> Result<Response<Body>, Status> {
        let options = ctx.write_options()?;
        let patch = match ctx.request.info.verb.as_str() {
            "patch" => Some(Patch::parse(PatchType::of(&ctx.request.headers)?, &ctx.request.body)?),
            _ => None,
        };
        let body = match &patch {
            Some(_) => Value::Null,
            None => ctx.body(&options)?,
        };
        let validation = options.validation;
        let written = self
            .change(&mut ctx, Endpoint::Other(part), &options, move |ctx, current| {
                let mut wanted = match &patch {
                    Some(patch) => patch.apply(current, ctx.resource.type_name)?,
                    None => body.clone(),
                };
                let resource = ctx.resource.clone();
                check_kind(&mut wanted, &resource.api_version(), &resource.kind)?;
                ctx.conform(&mut wanted, &resource, Vec::new(), validation, Extent::Whole)?;
                let mut new = current.clone();
                take_part(&mut new, &wanted, part);
                value::carry(&mut new, &wanted, "metadata.resourceVersion");
                Ok(new)
            })
            .await?;
        respond::object(&ctx.resource, &written.object, StatusCode::OK, &ctx.wanted)
    }

    async fn scale_request(&self, mut ctx: Context, paths: &ScalePaths) -> Result<Response<Body>, Status> {
        let verb = ctx.request.info.verb.clone();
        if verb == "get" {
            let object = self.load(&ctx.resource, ctx.namespace(), ctx.name()).await?.value()?;
            return respond::plain(&scale_of(&object, paths), StatusCode::OK, &ctx.wanted);
        }
        if !matches!(verb.as_str(), "update" | "patch") {
            return Err(not_allowed(&ctx));
        }
        let options = ctx.write_options()?;
        let patch = match verb.as_str() {
            "patch" => Some(Patch::parse(PatchType::of(&ctx.request.headers)?, &ctx.request.body)?),
            _ => None,
        };
        let mut body = Value::Null;
        if patch.is_none() {
            body = codec::decode(&ctx.request.headers, &ctx.request.body)?.value;
            check_kind(&mut body, "autoscaling/v1", "Scale")?;
        }
        let at = paths.clone();
        let written = self
            .change(&mut ctx, Endpoint::Main, &options, move |ctx, current| {
                let wanted = match &patch {
                    Some(patch) => {
                        patch.apply(&scale_of(current, &at), Some("io.k8s.api.autoscaling.v1.Scale"))?
                    }
                    None => body.clone(),
                };
                let replicas = value::int(&wanted, "spec.replicas").unwrap_or(0);
                if replicas < 0 {
                    let mut errors = Errors::default();
                    errors.invalid("spec.replicas", &replicas.into(), "must be greater than or equal to 0");
                    return Err(Status::invalid("autoscaling", "Scale", ctx.name(), errors.into_causes()));
                }
                let mut new = current.clone();
                value::set(&mut new, &at.spec, replicas);
                if !value::text(&wanted, "metadata.resourceVersion").is_empty() {
                    value::carry(&mut new, &wanted, "metadata.resourceVersion");
                }
                Ok(new)
            })
            .await?;
        respond::plain(&scale_of(&written.object.value()?, paths), StatusCode::OK, &ctx.wanted)
    }

    async fn bind_request(&self, mut ctx: Context) -> Result<Response<Body>, Status> {
        let options = ctx.write_options()?;
        let mut binding = codec::decode(&ctx.request.headers, &ctx.request.body)?.value;
        check_kind(&mut binding, "v1", "Binding")?;
        let binding =
            self.admit_extra(&mut ctx, "Binding", Operation::Create, binding, options.dry_run).await?;
        self.bind(&mut ctx, &binding, &options).await?;
        respond::plain(&success(), StatusCode::CREATED, &ctx.wanted)
    }

    /// Assigns a pod to a node.
    pub(super) async fn bind(
        &self,
        ctx: &mut Context,
        binding: &Value,
        options: &WriteOptions,
    ) -> Result<(), Status> {
        let node = value::text(binding, "target.name").to_owned();
        let kind = value::text(binding, "target.kind");
        let mut errors = Errors::default();
        if !kind.is_empty() && kind != "Node" {
            errors.not_supported("target.kind", &kind.into(), &["Node", "<empty>"]);
        }
        if node.is_empty() {
            errors.required("target.name", "");
        }
        if !errors.is_empty() {
            return Err(Status::invalid("", "Binding", ctx.name(), errors.into_causes()));
        }
        let binding = binding.clone();
        self.change(ctx, Endpoint::Other("binding"), options, move |ctx, pod| {
            let fail = |why: String| Err(Status::conflict("", "pods/binding", ctx.name(), &why));
            if value::has(pod, "metadata.deletionTimestamp") {
                return fail(format!("pod {} is being deleted, cannot be assigned to a host", ctx.name()));
            }
            let present = value::text(pod, "spec.nodeName");
            if !present.is_empty() {
                return fail(format!("pod {} is already assigned to node {present:?}", ctx.name()));
            }
            if !value::list(pod, "spec.schedulingGates").is_empty() {
                return fail(format!("pod {} has non-empty .spec.schedulingGates", ctx.name()));
            }
            let uid = value::text(&binding, "metadata.uid");
            if !uid.is_empty() && uid != value::text(pod, "metadata.uid") {
                return fail(format!(
                    "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                    value::text(pod, "metadata.uid")
                ));
            }
            let mut new = pod.clone();
            value::set(&mut new, "spec.nodeName", node.clone());
            for part in ["annotations", "labels"] {
                for (k, v) in value::map(&binding, &format!("metadata.{part}")).into_iter().flatten() {
                    value::ensure_map(&mut new, &format!("metadata.{part}")).insert(k.clone(), v.clone());
                }
            }
            set_condition(&mut new, "PodScheduled", "True");
            Ok(new)
        })
        .await
        .map(|_| ())
    }

    async fn evict_request(&self, mut ctx: Context) -> Result<Response<Body>, Status> {
        let mut eviction = codec::decode(&ctx.request.headers, &ctx.request.body)?.value;
        check_kind(&mut eviction, "policy/v1", "Eviction")?;
        let body = eviction.get("deleteOptions").cloned().unwrap_or_default();
        let options = DeleteOptions::parse(&ctx.query, &body)?;
        self.admit_extra(&mut ctx, "Eviction", Operation::Create, eviction, options.dry_run).await?;
        let (namespace, name) = (ctx.namespace().to_owned(), ctx.name().to_owned());
        let pod = self.load(&ctx.resource, &namespace, &name).await?.value()?;
        if counts_for_budgets(&pod) {
            self.spend_budget(&ctx, &pod, options.dry_run).await?;
        }
        match self.delete_object(&mut ctx, &namespace, &name, &options).await? {
            Deleted::Gone(_) | Deleted::Pending(_) => {
                respond::plain(&success(), StatusCode::CREATED, &ctx.wanted)
            }
        }
    }

    /// Takes one disruption from the budget that covers the pod.
    async fn spend_budget(&self, ctx: &Context, pod: &Value, dry_run: bool) -> Result<(), Status> {
        let table = self.table();
        let Some(resource) = table.get("policy", "v1", "poddisruptionbudgets") else { return Ok(()) };
        let selection = Selection::parse(resource, ctx.namespace(), "", "")?;
        let all = ListOptions::parse(&Query::default(), false)?;
        let labels = value::labels(pod);
        let mut covering = Vec::new();
        for object in self.select(resource, &selection, &all).await?.0 {
            let budget = object.value()?;
            let selector = budget.pointer("/spec/selector").and_then(selector_of);
            if selector.is_some_and(|s| s.matches(&labels)) {
                covering.push(budget);
            }
        }
        match covering.as_slice() {
            [] => Ok(()),
            [budget] => self.spend(ctx, budget, dry_run).await,
            _ => Err(Status::internal(
                "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
            )),
        }
    }

    async fn spend(&self, ctx: &Context, budget: &Value, dry_run: bool) -> Result<(), Status> {
        let refuse = |cause: String| {
            let mut status = Status::too_many_requests(
                "Cannot evict pod as it would violate the pod's disruption budget.",
                0,
            );
            let details = status.details.get_or_insert_default();
            details.causes.push(crate::status::Cause {
                reason: "DisruptionBudget".into(),
                message: cause,
                field: String::new(),
            });
            status
        };
        let name = value::text(budget, "metadata.name").to_owned();
        let observed = value::int(budget, "status.observedGeneration").unwrap_or(0);
        if observed < value::int(budget, "metadata.generation").unwrap_or(0) {
            return Err(refuse(format!(
                "The disruption budget {name} is still being processed by the server."
            ))
            .retry_after(10));
        }
        let mut sub = self.context_for("policy", "poddisruptionbudgets", ctx.namespace(), &name, "update")?;
        let pod_name = ctx.name().to_owned();
        let mut options = sub.write_options()?;
        options.dry_run = dry_run;
        self.change(&mut sub, Endpoint::Status, &options, move |_, current| {
            let left = value::int(current, "status.disruptionsAllowed").unwrap_or(0);
            if left < 1 {
                let wanted = value::int(current, "status.desiredHealthy").unwrap_or(0);
                let healthy = value::int(current, "status.currentHealthy").unwrap_or(0);
                return Err(refuse(format!(
                    "The disruption budget {} needs {wanted} healthy pods and has {healthy} currently",
                    value::text(current, "metadata.name")
                )));
            }
            let mut new = current.clone();
            value::set(&mut new, "status.disruptionsAllowed", left - 1);
            value::ensure_map(&mut new, "status.disruptedPods")
                .insert(pod_name.clone(), metadata::now().into());
            Ok(new)
        })
        .await
        .map(|_| ())
    }
}

fn not_allowed(ctx: &Context) -> Status {
    Status::method_not_allowed(&ctx.resource.group, &ctx.resource.plural, &ctx.request.info.verb)
}

fn success() -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201})
}

/// Pods that have ended or never ran do not count as disruptions.
fn counts_for_budgets(pod: &Value) -> bool {
    !matches!(value::text(pod, "status.phase"), "Succeeded" | "Failed" | "Pending")
        && !value::has(pod, "metadata.deletionTimestamp")
}

/// Sets a condition of a pod.
fn set_condition(object: &mut Value, kind: &str, status: &str) {
    let mut conditions = value::list(object, "status.conditions").to_vec();
    let new = json!({"type": kind, "status": status, "lastTransitionTime": metadata::now(), "observedGeneration": value::int(object, "metadata.generation")});
    match conditions.iter_mut().find(|c| value::text(c, "type") == kind) {
        Some(c) if value::text(c, "status") == status => return,
        Some(c) => *c = new,
        None => conditions.push(new),
    }
    value::set(object, "status.conditions", conditions);
}

/// `autoscaling/v1 Scale` of an object.
fn scale_of(object: &Value, paths: &ScalePaths) -> Value {
    let selector = match value::at(object, &paths.selector) {
        Some(s) if value::has(s, "matchLabels") || value::has(s, "matchExpressions") => {
            crate::table::human::selector(object, &paths.selector).as_str().unwrap_or("").to_owned()
        }
        Some(Value::Object(map)) => {
            map.iter().filter_map(|(k, v)| Some(format!("{k}={}", v.as_str()?))).collect::<Vec<_>>().join(",")
        }
        Some(Value::String(text)) => text.clone(),
        _ => String::new(),
    };
    let mut meta = json!({});
    for key in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        value::carry(&mut meta, object.get("metadata").unwrap_or(&Value::Null), key);
    }
    let mut status = json!({"replicas": value::int(object, &paths.status).unwrap_or(0)});
    if !selector.is_empty() {
        status["selector"] = selector.into();
    }
    json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": meta,
        "spec": {"replicas": value::int(object, &paths.spec).unwrap_or(0)},
        "status": status,
    })
}

/// Copies from `wanted` what the endpoint may change.
fn take_part(new: &mut Value, wanted: &Value, part: &str) {
    match part {
        "ephemeralcontainers" => value::carry(new, wanted, "spec.ephemeralContainers"),
        "finalize" => {
            value::carry(new, wanted, "spec.finalizers");
            value::carry(new, wanted, "metadata.finalizers");
        }
        "approval" => {
            let old = new.clone();
            for at in ["status.conditions", "metadata.labels", "metadata.annotations"] {
                value::carry(new, wanted, at);
            }
            certificates::stamp(new, &old);
        }
        "resize" => {
            value::carry(new, wanted, "spec.resources");
            for list in ["spec.containers", "spec.initContainers"] {
                for container in value::list_mut(new, list) {
                    let name = value::text(container, "name").to_owned();
                    if let Some(w) = value::list(wanted, list).iter().find(|c| value::text(c, "name") == name)
                    {
                        value::carry(container, w, "resources");
                        value::carry(container, w, "resizePolicy");
                    }
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_shows_both_forms_of_selectors() {
        let paths = ScalePaths {
            spec: "spec.replicas".into(),
            status: "status.replicas".into(),
            selector: "spec.selector".into(),
        };
        let d = json!({"metadata": {"name": "a"}, "spec": {"replicas": 3, "selector": {"matchLabels": {"x": "y"}}}, "status": {"replicas": 2}});
        let s = scale_of(&d, &paths);
        assert_eq!((s["spec"]["replicas"].as_i64(), s["status"]["replicas"].as_i64()), (Some(3), Some(2)));
        assert_eq!(s["status"]["selector"], "x=y");
        let rc = json!({"spec": {"selector": {"a": "b"}}});
        assert_eq!(scale_of(&rc, &paths)["status"]["selector"], "a=b");
    }

    #[test]
    fn a_narrow_endpoint_takes_only_its_part() {
        let mut pod = json!({"spec": {"nodeName": "n", "containers": [{"name": "a", "image": "1"}]}});
        let wanted = json!({"spec": {"nodeName": "other", "containers": [{"name": "a", "image": "2", "resources": {"limits": {"cpu": "1"}}}]}});
        take_part(&mut pod, &wanted, "resize");
        assert_eq!(
            pod,
            json!({"spec": {"nodeName": "n", "containers": [{"name": "a", "image": "1", "resources": {"limits": {"cpu": "1"}}}]}})
        );
    }
}
