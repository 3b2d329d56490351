//! The CNI plugin of Orlop: a veth pair with host routes for each pod, and the addresses of the node's podCIDR.
//! Our own runtime calls it in its process ([`builtin`]), others start the program `orlop-cni`.

mod cmd;
mod conf;
mod conntrack;
mod error;
mod ipam;
mod links;
mod nat;
mod netfilter;
mod netlink;
mod nft;
mod removal;
mod wire;

use std::cell::RefCell;
use std::path::PathBuf;
use std::time::Instant;

use orlop_cni_types::{Answer, Builtin, Call, Command, SpecVersion};
use serde_json::Value;

use conf::Conf;
pub use error::Error;

/// Whose process a call is carried out in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// One that ends with the call.
    Ends,
    /// One that goes on and has other threads.
    GoesOn,
}

/// A call under way.
struct Work<'a> {
    call: &'a Call,
    conf: &'a Conf,
    host: Host,
    deadline: Instant,
    notes: RefCell<Vec<String>>,
}

impl Work<'_> {
    fn note(&self, text: String) {
        self.notes.borrow_mut().push(text);
    }
}

/// The plugin as a part of another program, beside which it also lies as one.
pub fn builtin(program_dir: PathBuf) -> Builtin {
    Builtin { name: "orlop-cni", call: |call| serve(call, Host::GoesOn), program_dir }
}

/// Carries a call out. The calling thread is in the pod's network namespace afterwards.
pub fn serve(call: &Call, host: Host) -> Answer {
    let mut version = SpecVersion::V1_1_0;
    let mut notes = Vec::new();
    let result = answer(call, host, &mut version, &mut notes).map_err(|e| e.to_result(version));
    Answer { result, notes }
}

/// `version` becomes the one that the runtime speaks as soon as that is known.
fn answer(
    call: &Call,
    host: Host,
    version: &mut SpecVersion,
    notes: &mut Vec<String>,
) -> Result<Option<Value>, Error> {
    if call.command == Command::Version {
        return Ok(Some(cmd::version()));
    }
    let conf = Conf::parse(&call.conf)?;
    *version = conf.version;
    let deadline = Instant::now() + call.limit;
    let work = Work { call, conf: &conf, host, deadline, notes: RefCell::default() };
    let result = work.run();
    *notes = work.notes.into_inner();
    result
}
