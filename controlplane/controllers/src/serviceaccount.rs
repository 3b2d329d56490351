//! Keeps the `default` ServiceAccount in every active namespace.

use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use kube::Api;
use kube::api::PostParams;
use orlop_api::meta::{Key, is_terminating};
use orlop_client::{Change, Outcome, Queue};

use crate::runtime::{Builders, Context, Result, has_code, namespace_ends};

const NAME: &str = "default";

pub(crate) struct Controller {
    queue: Queue<String>,
}

impl Controller {
    pub fn new(b: &mut Builders) -> Controller {
        let queue = Queue::default();
        let q = queue.clone();
        b.namespaces.add_handler(move |c: &Change<Namespace>| {
            q.add(c.object().metadata.name.clone().unwrap_or_default());
        });
        let q = queue.clone();
        b.serviceaccounts.add_handler(move |c: &Change<ServiceAccount>| {
            if let Change::Deleted(sa) = c
                && sa.metadata.name.as_deref() == Some(NAME)
            {
                q.add(sa.metadata.namespace.clone().unwrap_or_default());
            }
        });
        Controller { queue }
    }

    pub fn start(self, context: &Context) {
        let ctx = context.clone();
        self.queue
            .run(&context.tasks, "serviceaccount", 2, move |namespace| reconcile(ctx.clone(), namespace));
    }
}

async fn reconcile(ctx: Context, namespace: String) -> Result {
    let Some(ns) = ctx.informers.namespaces.get(&Key::new("", &*namespace)) else { return Ok(Outcome::Done) };
    let key = Key::new(&*namespace, NAME);
    if is_terminating(&ns.metadata) || ctx.informers.serviceaccounts.get(&key).is_some() {
        return Ok(Outcome::Done);
    }
    let mut sa = ServiceAccount::default();
    sa.metadata.name = Some(NAME.into());
    let api: Api<ServiceAccount> = Api::namespaced(ctx.client, &namespace);
    match api.create(&PostParams::default(), &sa).await {
        Err(e) if !has_code(&e, 409) && !has_code(&e, 404) && !namespace_ends(&e) => Err(e.into()),
        _ => Ok(Outcome::Done),
    }
}
