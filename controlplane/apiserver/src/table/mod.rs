//! Tables as kubectl prints them: one row for each object, cells from the kind's strategy.

use serde_json::{Value, json};

use crate::{
    registry::respond::partial,
    resources::{Column, Resource},
    value,
};

pub mod human;

/// What the rows carry besides their cells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Include {
    /// Nothing.
    None,
    /// The object's metadata.
    #[default]
    Metadata,
    /// The whole object.
    Object,
}

impl Include {
    /// From the query parameter `includeObject`.
    pub fn parse(text: &str) -> Include {
        match text {
            "None" => Include::None,
            "Object" => Include::Object,
            _ => Include::Metadata,
        }
    }
}

fn definition(column: &Column, format: &str) -> Value {
    json!({"name": column.name, "type": column.ty, "format": format, "description": column.name, "priority": column.priority})
}

/// The table of some objects, in the order given.
pub fn table(resource: &Resource, objects: &[Value], include: Include) -> Value {
    let strategy = &resource.strategy;
    let columns = strategy.columns();
    let first_wide = columns.iter().position(|c| c.priority > 0).unwrap_or(columns.len());
    let name = Column { name: "Name", ty: "string", priority: 0 };
    let age = Column { name: "Age", ty: "string", priority: 0 };
    // AGE stands behind the columns that are always shown and before those of -o wide, unless the kind places it itself.
    let placed = columns.iter().position(|c| c.name == "Age");
    let adds_age = placed.is_none() && strategy.shows_age();
    let mut definitions = Vec::with_capacity(columns.len() + 2);
    if strategy.shows_name() {
        definitions.push(definition(&name, "name"));
    }
    definitions.extend(columns[..first_wide].iter().map(|c| definition(c, "")));
    if adds_age {
        definitions.push(definition(&age, ""));
    }
    definitions.extend(columns[first_wide..].iter().map(|c| definition(c, "")));

    let rows: Vec<Value> = objects
        .iter()
        .map(|o| {
            let mut cells = Vec::with_capacity(columns.len() + 2);
            if strategy.shows_name() {
                cells.push(Value::from(value::text(o, "metadata.name")));
            }
            let age: Value = human::age(value::text(o, "metadata.creationTimestamp")).into();
            let mut own = strategy.row(o);
            if let Some(at) = placed.filter(|at| *at <= own.len()) {
                own.insert(at, age.clone());
            }
            own.resize(columns.len(), Value::from("<none>"));
            let tail = own.split_off(first_wide);
            cells.append(&mut own);
            if adds_age {
                cells.push(age);
            }
            cells.extend(tail);
            match include {
                Include::None => json!({"cells": cells}),
                Include::Metadata => json!({"cells": cells, "object": partial(o)}),
                Include::Object => json!({"cells": cells, "object": o}),
            }
        })
        .collect();
    json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {}, "columnDefinitions": definitions, "rows": rows})
}
