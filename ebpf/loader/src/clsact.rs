//! Packet programs on kernels without tcx: filters on the clsact queueing discipline.
//!
//! A folder among the pins marks each interface that has our filters, another one those whose discipline we made: only
//! that is removed again, and only while nobody else has a filter there.

use std::fs;
use std::io;
use std::path::Path;

use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};

use crate::netlink::Netlink;
use crate::{Error, path_err, pin};

/// Place of our filters among others'.
const PRIORITY: u16 = 49;
const HANDLE: TcHandle = TcHandle::new(0, 1);

const ROUTE: isize = 0;
const RTM_DELQDISC: u16 = 37;
const RTM_GETTFILTER: u16 = 46;
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const HOOKS: [u32; 2] = [0xffff_fff2, 0xffff_fff3];

/// Attaches both programs, in place of older ones.
pub(crate) fn attach(
    pins: &Path,
    index: u32,
    name: &str,
    ingress: &mut SchedClassifier,
    egress: &mut SchedClassifier,
) -> Result<(), Error> {
    let failed = |program| {
        move |source: Box<dyn std::error::Error + Send + Sync>| Error::Clsact {
            program,
            target: name.to_owned(),
            source,
        }
    };
    let dir = pin::links(pins);
    let mark = dir.join(format!("clsact_{index}"));
    fs::create_dir_all(&mark).map_err(path_err("create", &mark))?;
    match qdisc_add_clsact(name) {
        Ok(()) => {
            let made = dir.join(format!("qdisc_{index}"));
            fs::create_dir_all(&made).map_err(path_err("create", &made))?;
        }
        Err(TcError::AlreadyAttached) => {}
        Err(TcError::NetlinkError(e)) if e.raw_os_error() == Some(libc::EEXIST) => {}
        Err(e) => return Err(failed("lb_ingress")(Box::new(e))),
    }
    filter(egress, name, TcAttachType::Egress).map_err(|e| failed("lb_egress")(Box::new(e)))?;
    filter(ingress, name, TcAttachType::Ingress).map_err(|e| failed("lb_ingress")(Box::new(e)))
}

fn filter(program: &mut SchedClassifier, interface: &str, attach: TcAttachType) -> Result<(), ProgramError> {
    let old = SchedClassifierLink::attached(interface, attach, PRIORITY, HANDLE, None)?;
    let id = match program.attach_to_link(old) {
        Ok(id) => id,
        Err(_) => program.attach_with_options(
            interface,
            attach,
            TcAttachOptions::Netlink(NlOptions { priority: PRIORITY, handle: HANDLE, classid: None }),
        )?,
    };
    // The filter must outlive this process.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

fn interface_name(index: u32) -> Option<String> {
    nix::net::if_::if_indextoname(index).ok().and_then(|n| n.into_string().ok())
}

/// Takes our filters off an interface, and the discipline too when it is ours and nobody uses it.
pub(crate) fn detach(pins: &Path, index: u32) {
    let dir = pin::links(pins);
    let made = dir.join(format!("qdisc_{index}"));
    if let Some(name) = interface_name(index) {
        for attach in [TcAttachType::Ingress, TcAttachType::Egress] {
            if let Ok(link) = SchedClassifierLink::attached(&name, attach, PRIORITY, HANDLE, None)
                && let Err(e) = aya::programs::links::Link::detach(link)
            {
                tracing::debug!(interface = name, error = %e, "no filter to remove");
            }
        }
        // Pods' interfaces go at any time, and take everything along.
        if made.exists()
            && let Err(e) = remove_unused(index)
            && e.raw_os_error() != Some(nix::errno::Errno::ENODEV as i32)
        {
            tracing::warn!(interface = name, error = %e, "its clsact queueing discipline stays");
        }
    }
    // Empty folders; when one stays, the next start tries again.
    let _ = fs::remove_dir(&made);
    let _ = fs::remove_dir(dir.join(format!("clsact_{index}")));
}

/// struct tcmsg.
fn message(index: u32, handle: u32, parent: u32) -> Vec<u8> {
    let mut m = vec![0u8; 4];
    m.extend(index.to_ne_bytes());
    m.extend(handle.to_ne_bytes());
    m.extend(parent.to_ne_bytes());
    m.extend([0; 4]);
    m
}

fn remove_unused(index: u32) -> io::Result<()> {
    let netlink = Netlink::open(ROUTE)?;
    let mut filters = 0;
    for hook in HOOKS {
        netlink.dump(RTM_GETTFILTER, &message(index, 0, hook), |_| filters += 1)?;
    }
    if filters > 0 {
        return Ok(());
    }
    netlink.act(RTM_DELQDISC, 0, &message(index, CLSACT_HANDLE, CLSACT))
}

/// Takes filters off the interfaces that the pins name.
pub(crate) fn detach_all(pins: &Path) {
    for entry in fs::read_dir(pin::links(pins)).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if let Some(Ok(index)) = name.to_str().and_then(|n| n.strip_prefix("clsact_")).map(str::parse) {
            detach(pins, index);
        }
    }
}
