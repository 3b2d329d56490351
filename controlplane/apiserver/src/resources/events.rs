//! events.k8s.io/v1: the Events of the core group under other field names.

use super::{
    Resource,
    core::{EVENTS_CONVERSION, Event, events},
};

pub(super) fn resources() -> Vec<Resource> {
    let mut r = Resource::new("events.k8s.io", "v1", "Event", "events", Event)
        .short(&["ev"])
        .stored_by(&events(), EVENTS_CONVERSION);
    r.expires = true;
    vec![r]
}
