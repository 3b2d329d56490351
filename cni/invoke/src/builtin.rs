//! One run of a plugin that is part of this program.

use std::panic::{AssertUnwindSafe, catch_unwind};

use orlop_cni_types::{Builtin, Call};
use serde_json::Value;
use tokio::sync::oneshot;

use crate::error::Error;
use crate::locks::Held;

/// Gives what the plugin says, `Null` when that is nothing. On a thread that ends with the call: it may be in another network
/// namespace by then.
pub(crate) async fn call(builtin: &Builtin, call: Call, held: Held) -> Result<Value, Error> {
    let (plugin, command, work) = (builtin.name.to_owned(), call.command, builtin.call);
    let (tell, told) = oneshot::channel();
    let started = std::thread::Builder::new().name("cni".into()).stack_size(512 << 10).spawn(move || {
        let answer = catch_unwind(AssertUnwindSafe(|| work(&call)));
        // First what the next operation waits for.
        drop(held);
        // Nobody waiting any more is fine.
        let _ = tell.send(answer);
    });
    started.map_err(|source| Error::Start { plugin: builtin.name.into(), source })?;
    let Ok(Ok(answer)) = told.await else {
        return Err(Error::Panicked { plugin, command });
    };
    for note in answer.notes {
        tracing::debug!(%plugin, %command, "plugin wrote: {note}");
    }
    match answer.result {
        Ok(value) => Ok(value.unwrap_or_default()),
        Err(source) => Err(Error::Plugin { plugin, command, source }),
    }
}
