//! discovery.k8s.io/v1: EndpointSlices.

use serde_json::Value;

use super::{Column, Resource, Strategy, col};
use crate::{table::human, validation::Errors, value};

pub(super) fn resources() -> Vec<Resource> {
    vec![Resource::new("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices", Slice).generation()]
}

/// Most entries that a table cell shows.
const SHOWN: usize = 3;

fn shortened(mut all: Vec<String>) -> Value {
    let more = all.len().saturating_sub(SHOWN);
    all.truncate(SHOWN);
    let mut text = all.join(",");
    if more > 0 {
        text.push_str(&format!(" + {more} more..."));
    }
    if text.is_empty() { "<unset>".into() } else { text.into() }
}

struct Slice;

impl Strategy for Slice {
    fn defaults(&self, object: &mut Value) {
        for port in value::list_mut(object, "ports") {
            value::default(port, "name", "");
            value::default_text(port, "protocol", "TCP");
        }
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        if value::text(object, "addressType").is_empty() {
            errors.required("addressType", "");
        }
        errors.one_of(object, "addressType", &["FQDN", "IPv4", "IPv6"]);
        if value::list(object, "endpoints").len() > 1000 {
            errors.too_long("endpoints", 1000);
        }
        for (i, e) in value::list(object, "endpoints").iter().enumerate() {
            if value::list(e, "addresses").is_empty() {
                errors.required(&format!("endpoints[{i}].addresses"), "must contain at least 1 address");
            }
        }
    }

    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        self.validate(new, errors);
        errors.immutable(new, old, "addressType");
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("AddressType"), col("Ports"), col("Endpoints")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let ports = value::list(object, "ports")
            .iter()
            .map(|p| value::int(p, "port").map_or("*".into(), |n| n.to_string()))
            .collect();
        let endpoints: Vec<String> = value::list(object, "endpoints")
            .iter()
            .flat_map(|e| value::list(e, "addresses").iter().filter_map(|a| a.as_str().map(str::to_owned)))
            .collect();
        vec![human::or_none(value::text(object, "addressType")), shortened(ports), shortened(endpoints)]
    }
}
