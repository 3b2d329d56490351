//! The table of resources: what is served, and how each kind differs from the generic registry.

use std::{borrow::Cow, collections::HashMap, sync::Arc};

use serde_json::Value;

use crate::{
    schema,
    status::Status,
    validation::{Errors, meta::NameRule, names},
};

mod admissionregistration;
mod apiextensions;
pub mod apps;
mod authentication;
mod autoscaling;
pub mod batch;
pub(crate) mod certificates;
mod coordination;
pub mod core;
mod discovery;
mod events;
mod flowcontrol;
pub mod networking;
mod node;
pub mod pod_template;
mod policy;
mod rbac;
mod resource;
mod scheduling;
mod storage;

/// Text that is static for built-in kinds and owned for those that come at run time.
pub type Text = Cow<'static, str>;

/// A column of a table.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    /// Heading.
    pub name: &'static str,
    /// `string`, `integer` or `date`.
    pub ty: &'static str,
    /// 0 = always shown, 1 = shown by `-o wide`.
    pub priority: i32,
}

/// A text column.
pub const fn col(name: &'static str) -> Column {
    Column { name, ty: "string", priority: 0 }
}

/// A number column.
pub const fn num(name: &'static str) -> Column {
    Column { name, ty: "integer", priority: 0 }
}

/// A text column of `-o wide`.
pub const fn wide(name: &'static str) -> Column {
    Column { name, ty: "string", priority: 1 }
}

/// What a kind does differently. All functions are pure; they see objects of the storage version.
pub trait Strategy: Send + Sync + 'static {
    /// Fills in what the user left out.
    fn defaults(&self, _object: &mut Value) {}
    /// Resets what a user may not set on creation, after the generic reset of `status`.
    fn prepare_create(&self, _object: &mut Value) {}
    /// Carries over what a user may not change by this endpoint, after the generic carry-over of `status`.
    fn prepare_update(&self, _new: &mut Value, _old: &Value) {}
    /// Checks a new object.
    fn validate(&self, _object: &Value, _errors: &mut Errors) {}
    /// Checks a changed object; by default the checks of a new one.
    fn validate_update(&self, new: &Value, _old: &Value, errors: &mut Errors) {
        self.validate(new, errors);
    }
    /// Checks a change of the status subresource.
    fn validate_status(&self, _new: &Value, _old: &Value, _errors: &mut Errors) {}
    /// Resets what a user may not change by the status endpoint, after the generic carry-over of all but `status`.
    fn prepare_status(&self, _new: &mut Value, _old: &Value) {}
    /// Whether `new` has another generation than `old`; by default when anything but metadata and status differs.
    fn generation_changes(&self, new: &Value, old: &Value) -> bool {
        let rest = |v: &Value| -> Vec<(String, Value)> {
            let map = v.as_object().into_iter().flatten();
            map.filter(|(k, _)| !matches!(k.as_str(), "metadata" | "status" | "apiVersion" | "kind"))
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect()
        };
        rest(new) != rest(old)
    }
    /// The time in seconds that a deletion leaves the object to stop by itself; `None` = it goes at once.
    fn grace_period(&self, _object: &Value, _requested: Option<i64>) -> Option<i64> {
        None
    }
    /// Finalizer semantics when the request names none: whether dependents are orphaned.
    fn orphans_by_default(&self) -> bool {
        false
    }
    /// Whether an update may come without a resource version.
    fn unconditional_update(&self) -> bool {
        true
    }
    /// Whether PUT on a missing name creates the object.
    fn create_on_update(&self) -> bool {
        false
    }
    /// Warnings for the user, shown by kubectl.
    fn warnings(&self, _object: &Value) -> Vec<String> {
        Vec::new()
    }
    /// Columns besides NAME and AGE. A column called `Age` only places AGE: [`Strategy::row`] has no cell for it.
    fn columns(&self) -> &'static [Column] {
        &[]
    }
    /// The cells for [`Strategy::columns`].
    fn row(&self, _object: &Value) -> Vec<Value> {
        Vec::new()
    }
    /// Whether the table has an AGE column.
    fn shows_age(&self) -> bool {
        true
    }
    /// Whether the table begins with NAME.
    fn shows_name(&self) -> bool {
        true
    }
    /// Paths that field selectors may name, besides `metadata.name` and `metadata.namespace`.
    fn selectable(&self) -> &'static [&'static str] {
        &[]
    }
    /// The value of a selectable path.
    fn select(&self, object: &Value, path: &str) -> String {
        match crate::value::at(object, path) {
            Some(Value::String(s)) => s.clone(),
            Some(Value::Null) | None => String::new(),
            Some(other) => other.to_string(),
        }
    }
}

/// A kind without any peculiarity.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain;

impl Strategy for Plain {}

/// The scale subresource: paths below the object.
#[derive(Clone, Debug)]
pub struct ScalePaths {
    /// Path of the wanted number.
    pub spec: Text,
    /// Path of the present number.
    pub status: Text,
    /// Path of the selector: a label selector or a map of labels.
    pub selector: Text,
}

/// How a served version differs from the stored one.
#[derive(Clone, Copy)]
pub struct Conversion {
    /// From the stored form to the served one.
    pub serve: fn(&mut Value),
    /// From the served form to the stored one.
    pub store: fn(&mut Value),
}

/// A subresource that only some kinds have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extra {
    /// Its name in the path.
    pub name: &'static str,
    /// Group of its kind, empty = the resource's.
    pub group: &'static str,
    /// Version of its kind, empty = the resource's.
    pub version: &'static str,
    /// Its kind.
    pub kind: &'static str,
    /// Verbs that discovery shows.
    pub verbs: &'static [&'static str],
}

/// All verbs of a stored resource.
pub const ALL_VERBS: &[&str] =
    &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

/// One row of the table: a resource in one version.
#[derive(Clone)]
pub struct Resource {
    /// API group, empty for core.
    pub group: Text,
    /// Served version.
    pub version: Text,
    /// Kind.
    pub kind: Text,
    /// Name in paths.
    pub plural: Text,
    /// Name for people.
    pub singular: Text,
    /// Kind of a list.
    pub list_kind: Text,
    /// For kubectl.
    pub short_names: Vec<Text>,
    /// For kubectl.
    pub categories: Vec<Text>,
    /// Whether objects live in namespaces.
    pub namespaced: bool,
    /// Verbs served.
    pub verbs: &'static [&'static str],
    /// Group and plural name under which objects are stored, for example `core/pods`.
    pub storage: Arc<str>,
    /// `apiVersion` and kind in which objects are stored.
    pub stored_as: (Text, Text),
    /// Name of the type in the schema.
    pub type_name: Option<&'static str>,
    /// Whether there is a status subresource.
    pub status: bool,
    /// The scale subresource.
    pub scale: Option<ScalePaths>,
    /// Other subresources.
    pub extras: Vec<Extra>,
    /// Whether `metadata.generation` counts.
    pub generation: bool,
    /// Rule for names.
    pub name_rule: NameRule,
    /// How this version differs from the stored one.
    pub conversion: Option<Conversion>,
    /// The kind's own behaviour.
    pub strategy: Arc<dyn Strategy>,
    /// Whether objects expire like Events.
    pub expires: bool,
    /// Whether it is only shown by discovery and answered elsewhere (token and access reviews).
    pub review: bool,
}

impl Resource {
    /// A namespaced resource with the usual names and verbs.
    pub fn new(
        group: &'static str,
        version: &'static str,
        kind: &'static str,
        plural: &'static str,
        strategy: impl Strategy,
    ) -> Resource {
        let storage = format!("{}/{plural}", if group.is_empty() { "core" } else { group });
        let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
        Resource {
            group: group.into(),
            version: version.into(),
            kind: kind.into(),
            plural: plural.into(),
            singular: kind.to_lowercase().into(),
            list_kind: format!("{kind}List").into(),
            short_names: Vec::new(),
            categories: Vec::new(),
            namespaced: true,
            verbs: ALL_VERBS,
            storage: storage.into(),
            stored_as: (api_version.into(), kind.into()),
            type_name: schema::type_of(group, version, kind),
            status: false,
            scale: None,
            extras: Vec::new(),
            generation: false,
            name_rule: names::dns_subdomain,
            conversion: None,
            strategy: Arc::new(strategy),
            expires: false,
            review: false,
        }
    }

    /// `group/version`, or only the version in the core group.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_string()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    fn cluster(mut self) -> Resource {
        self.namespaced = false;
        self
    }

    fn short(mut self, names: &[&'static str]) -> Resource {
        self.short_names = names.iter().map(|n| Cow::Borrowed(*n)).collect();
        self
    }

    fn category(mut self, names: &[&'static str]) -> Resource {
        self.categories = names.iter().map(|n| Cow::Borrowed(*n)).collect();
        self
    }

    fn with_status(mut self) -> Resource {
        self.status = true;
        self
    }

    fn generation(mut self) -> Resource {
        self.generation = true;
        self
    }

    fn scaled(mut self, selector: &'static str) -> Resource {
        self.scale = Some(ScalePaths {
            spec: "spec.replicas".into(),
            status: "status.replicas".into(),
            selector: selector.into(),
        });
        self
    }

    fn extra(
        mut self,
        name: &'static str,
        kind: (&'static str, &'static str, &'static str),
        verbs: &'static [&'static str],
    ) -> Resource {
        self.extras.push(Extra { name, group: kind.0, version: kind.1, kind: kind.2, verbs });
        self
    }

    fn named(mut self, rule: NameRule) -> Resource {
        self.name_rule = rule;
        self
    }

    fn verbs(mut self, verbs: &'static [&'static str]) -> Resource {
        self.verbs = verbs;
        self
    }

    /// A kind that is answered and never stored.
    fn review(mut self) -> Resource {
        self.review = true;
        self.verbs = &["create"];
        self
    }

    /// Serves objects that another row stores.
    fn stored_by(mut self, other: &Resource, conversion: Conversion) -> Resource {
        self.storage = other.storage.clone();
        self.stored_as = other.stored_as.clone();
        self.conversion = Some(conversion);
        self
    }

    /// Whether the verb is served.
    pub fn serves(&self, verb: &str) -> bool {
        self.verbs.contains(&verb)
    }

    /// Subresources with the kind of their bodies, as discovery lists them.
    pub fn subresources(&self) -> Vec<Extra> {
        let mut all = self.extras.clone();
        if self.scale.is_some() {
            let verbs: &[&str] = &["get", "patch", "update"];
            all.push(Extra { name: "scale", group: "autoscaling", version: "v1", kind: "Scale", verbs });
        }
        all
    }

    /// A 404 for an object of this resource.
    pub fn not_found(&self, name: &str) -> Status {
        Status::not_found(&self.group, &self.plural, name)
    }
}

impl std::fmt::Debug for Resource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}/{}", self.plural, self.group, self.version)
    }
}

/// All resources served at a time. It can grow and shrink at run time.
#[derive(Clone, Default)]
pub struct ResourceTable {
    rows: Vec<Arc<Resource>>,
    by_path: HashMap<(Text, Text, Text), usize>,
}

impl ResourceTable {
    /// The built-in resources, in the order in which discovery shows them.
    pub fn builtin() -> ResourceTable {
        let mut table = ResourceTable::default();
        let groups = [
            core::resources(),
            apps::resources(),
            authentication::resources(),
            autoscaling::resources(),
            batch::resources(),
            certificates::resources(),
            networking::resources(),
            policy::resources(),
            rbac::resources(),
            storage::resources(),
            admissionregistration::resources(),
            apiextensions::resources(),
            scheduling::resources(),
            coordination::resources(),
            node::resources(),
            discovery::resources(),
            flowcontrol::resources(),
            resource::resources(),
            events::resources(),
        ];
        groups.into_iter().flatten().for_each(|r| table.insert(r));
        table
    }

    /// Adds a resource, or replaces the one at the same path.
    pub fn insert(&mut self, resource: Resource) {
        let key = (resource.group.clone(), resource.version.clone(), resource.plural.clone());
        let resource = Arc::new(resource);
        match self.by_path.get(&key) {
            Some(&i) => self.rows[i] = resource,
            None => {
                self.by_path.insert(key, self.rows.len());
                self.rows.push(resource);
            }
        }
    }

    /// Removes a resource.
    pub fn remove(&mut self, group: &str, version: &str, plural: &str) {
        self.rows.retain(|r| !(r.group == group && r.version == version && r.plural == plural));
        self.by_path = self
            .rows
            .iter()
            .enumerate()
            .map(|(i, r)| ((r.group.clone(), r.version.clone(), r.plural.clone()), i))
            .collect();
    }

    /// The resource at a path.
    pub fn get(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Resource>> {
        let key =
            (Cow::Owned(group.to_owned()), Cow::Owned(version.to_owned()), Cow::Owned(plural.to_owned()));
        self.by_path.get(&key).map(|&i| &self.rows[i])
    }

    /// The first version of a resource.
    pub fn any_version(&self, group: &str, plural: &str) -> Option<&Arc<Resource>> {
        self.rows.iter().find(|r| r.group == group && r.plural == plural)
    }

    /// The row that stores objects under this name.
    pub fn by_storage(&self, storage: &str) -> Option<&Arc<Resource>> {
        self.rows.iter().find(|r| &*r.storage == storage && r.conversion.is_none())
    }

    /// All rows.
    pub fn rows(&self) -> &[Arc<Resource>] {
        &self.rows
    }
}
