//! flowcontrol.apiserver.k8s.io/v1.

use serde_json::Value;

use super::{Column, Plain, Resource, Strategy, col, num};
use crate::{table::human, value};

const GROUP: &str = "flowcontrol.apiserver.k8s.io";

pub(super) fn resources() -> Vec<Resource> {
    vec![
        Resource::new(GROUP, "v1", "FlowSchema", "flowschemas", FlowSchema)
            .cluster()
            .with_status()
            .generation(),
        Resource::new(GROUP, "v1", "PriorityLevelConfiguration", "prioritylevelconfigurations", Plain)
            .cluster()
            .with_status()
            .generation(),
    ]
}

struct FlowSchema;

impl Strategy for FlowSchema {
    fn defaults(&self, object: &mut Value) {
        value::default(object, "spec.matchingPrecedence", 1000);
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("PriorityLevel"), num("MatchingPrecedence"), col("DistinguisherMethod")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        vec![
            value::text(object, "spec.priorityLevelConfiguration.name").into(),
            value::int(object, "spec.matchingPrecedence").unwrap_or(0).into(),
            human::or_none(value::text(object, "spec.distinguisherMethod.type")),
        ]
    }
}
