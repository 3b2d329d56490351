//! authentication.k8s.io and authorization.k8s.io: kinds that are asked and answered, never stored.

use super::{Plain, Resource};

pub(super) fn resources() -> Vec<Resource> {
    let review = |group, kind, plural| Resource::new(group, "v1", kind, plural, Plain).cluster().review();
    let (authn, authz) = ("authentication.k8s.io", "authorization.k8s.io");
    let mut local = review(authz, "LocalSubjectAccessReview", "localsubjectaccessreviews");
    local.namespaced = true;
    vec![
        review(authn, "TokenReview", "tokenreviews"),
        review(authn, "SelfSubjectReview", "selfsubjectreviews"),
        local,
        review(authz, "SelfSubjectAccessReview", "selfsubjectaccessreviews"),
        review(authz, "SelfSubjectRulesReview", "selfsubjectrulesreviews"),
        review(authz, "SubjectAccessReview", "subjectaccessreviews"),
    ]
}
