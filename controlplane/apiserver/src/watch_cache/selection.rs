//! Which objects a list or watch shows: namespace, name, labels and fields.

use orlop_api::selector::Selector;

use crate::{registry::object::Object, resources::Resource, status::Status};

/// A parsed selection.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Only this namespace, when not empty.
    pub namespace: String,
    /// Only this name, when not empty.
    pub name: String,
    labels: Selector,
    /// Name and namespace conditions of the field selector.
    identity: Vec<(bool, String, bool)>,
    /// (index of the selectable field, wanted value, negated)
    fields: Vec<(usize, String, bool)>,
}

impl Selection {
    /// Parses the query parameters of a list or watch.
    ///
    /// # Errors
    /// 400 for a malformed selector or a field that the kind does not support.
    pub fn parse(
        resource: &Resource,
        namespace: &str,
        labels: &str,
        fields: &str,
    ) -> Result<Selection, Status> {
        let labels = Selector::parse(labels).map_err(|e| Status::bad_request(e.to_string()))?;
        let mut selection = Selection { namespace: namespace.to_owned(), labels, ..Selection::default() };
        for term in fields.split(',').filter(|t| !t.trim().is_empty()) {
            selection.field(resource, term.trim())?;
        }
        Ok(selection)
    }

    fn field(&mut self, resource: &Resource, term: &str) -> Result<(), Status> {
        let (path, value, negated) = if let Some((p, v)) = term.split_once("!=") {
            (p, v, true)
        } else if let Some((p, v)) = term.split_once("==").or_else(|| term.split_once('=')) {
            (p, v, false)
        } else {
            return Err(Status::bad_request(format!("invalid field selector {term:?}; can't understand it")));
        };
        let value = value.replace("\\,", ",").replace("\\=", "=").replace("\\\\", "\\");
        match path {
            "metadata.name" if !negated => self.name = value,
            "metadata.namespace" if !negated && (self.namespace.is_empty() || self.namespace == value) => {
                self.namespace = value
            }
            "metadata.name" => self.identity.push((true, value, true)),
            "metadata.namespace" => self.identity.push((false, value, negated)),
            _ => {
                let known = resource.strategy.selectable().iter().position(|p| *p == path);
                let index =
                    known.ok_or_else(|| Status::bad_request(format!("field label not supported: {path}")))?;
                self.fields.push((index, value, negated));
            }
        }
        Ok(())
    }

    /// Whether it selects everything of its namespace.
    pub fn is_plain(&self) -> bool {
        self.name.is_empty() && self.labels.is_empty() && self.fields.is_empty() && self.identity.is_empty()
    }

    /// Whether an object is selected.
    pub fn matches(&self, resource: &Resource, object: &Object) -> bool {
        (self.namespace.is_empty() || object.namespace() == self.namespace)
            && (self.name.is_empty() || object.name() == self.name)
            && self.identity.iter().all(|(of_name, wanted, negated)| {
                let actual = if *of_name { object.name() } else { object.namespace() };
                (actual == wanted) != *negated
            })
            && (self.labels.is_empty() || self.labels.matches(object.labels()))
            && self
                .fields
                .iter()
                .all(|(i, wanted, negated)| (object.field(resource, *i) == wanted) != *negated)
    }
}
