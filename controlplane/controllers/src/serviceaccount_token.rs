//! Fills Secrets of type `kubernetes.io/service-account-token` with a token for the account that they name, and deletes
//! them with their account. The token is bound to the Secret, so deleting the Secret revokes it.

use std::sync::Arc;

use k8s_openapi::ByteString;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Secret, ServiceAccount};
use kube::Api;
use kube::api::{DeleteParams, PostParams, Preconditions};
use orlop_api::meta::{Key, annotation, is_terminating};
use orlop_client::{Change, Outcome, Queue};

use crate::runtime::{Builders, Context, ReconcileError, Result, has_code, unless_gone};

pub(crate) const SECRET_TYPE: &str = "kubernetes.io/service-account-token";
const ACCOUNT: &str = "kubernetes.io/service-account.name";
const ACCOUNT_UID: &str = "kubernetes.io/service-account.uid";
/// Such tokens have no natural end; ten years stands in for it.
const LIFE_SECONDS: i64 = 10 * 365 * 24 * 3600;

pub(crate) struct Controller {
    queue: Queue<Key>,
    by_account: Queue<Key>,
}

impl Controller {
    pub fn new(b: &mut Builders) -> Controller {
        let (queue, by_account) = (Queue::default(), Queue::default());
        let q = queue.clone();
        b.token_secrets.add_handler(move |c: &Change<Secret>| q.add(Key::of(&c.object().metadata)));
        let q = by_account.clone();
        b.serviceaccounts.add_handler(move |c: &Change<ServiceAccount>| q.add(Key::of(&c.object().metadata)));
        Controller { queue, by_account }
    }

    pub fn start(self, context: &Context, root_ca: &str) {
        let (ctx, ca) = (context.clone(), Arc::<str>::from(root_ca));
        self.queue
            .run(&context.tasks, "serviceaccount-token", 2, move |k| reconcile(ctx.clone(), ca.clone(), k));
        let (informers, secrets) = (context.informers.clone(), self.queue.clone());
        self.by_account.run(&context.tasks, "serviceaccount-token accounts", 1, move |account: Key| {
            for s in informers.token_secrets.list_namespace(&account.namespace) {
                if annotation(&s.metadata, ACCOUNT) == Some(&account.name) {
                    secrets.add(Key::of(&s.metadata));
                }
            }
            async { Ok::<_, ReconcileError>(Outcome::Done) }
        });
    }
}

async fn reconcile(ctx: Context, ca: Arc<str>, key: Key) -> Result {
    let Some(secret) = ctx.informers.token_secrets.get(&key) else { return Ok(Outcome::Done) };
    let Some(account) = annotation(&secret.metadata, ACCOUNT) else { return Ok(Outcome::Done) };
    if is_terminating(&secret.metadata) {
        return Ok(Outcome::Done);
    }
    let api: Api<Secret> = Api::namespaced(ctx.client.clone(), &key.namespace);
    let accounts: Api<ServiceAccount> = Api::namespaced(ctx.client.clone(), &key.namespace);
    // Asked of the server, not of the local copy: a Secret is deleted on the strength of the answer.
    let live = accounts.get_opt(account).await?;
    let wanted_uid = annotation(&secret.metadata, ACCOUNT_UID);
    let matches = live.as_ref().filter(|sa| wanted_uid.is_none() || sa.metadata.uid.as_deref() == wanted_uid);
    let Some(sa) = matches else {
        let uid = secret.metadata.uid.clone();
        let dp = DeleteParams {
            preconditions: Some(Preconditions { uid, resource_version: None }),
            ..Default::default()
        };
        unless_gone(api.delete(&key.name, &dp).await)?;
        return Ok(Outcome::Done);
    };
    let has = |name: &str| secret.data.as_ref().is_some_and(|d| d.get(name).is_some_and(|v| !v.0.is_empty()));
    if has("token") && has("ca.crt") && has("namespace") && wanted_uid.is_some() {
        return Ok(Outcome::Done);
    }
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            expiration_seconds: Some(LIFE_SECONDS),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Secret".into()),
                name: secret.metadata.name.clone(),
                uid: secret.metadata.uid.clone(),
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let token = accounts.create_token_request(account, &PostParams::default(), &request).await?;
    let Some(issued) = token.status.and_then(|s| s.token) else {
        return Err(ReconcileError::Invalid(format!("the server issued no token for {key}")));
    };
    let mut filled = (*secret).clone();
    filled
        .metadata
        .annotations
        .get_or_insert_default()
        .insert(ACCOUNT_UID.into(), sa.metadata.uid.clone().unwrap_or_default());
    let data = filled.data.get_or_insert_default();
    data.insert("token".into(), ByteString(issued.into_bytes()));
    data.insert("ca.crt".into(), ByteString(ca.as_bytes().to_vec()));
    data.insert("namespace".into(), ByteString(key.namespace.clone().into_bytes()));
    match api.replace(&key.name, &PostParams::default(), &filled).await {
        Err(e) if !has_code(&e, 404) => Err(e.into()),
        _ => Ok(Outcome::Done),
    }
}
