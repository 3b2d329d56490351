//! The link that carries the server's link-local address, so that pods reach it at the same address on every node.

use std::net::IpAddr;

use futures::TryStreamExt;
use netlink_packet_route::address::AddressScope;
use rtnetlink::{Handle, LinkBridge, LinkDummy, LinkMessageBuilder, LinkUnspec, new_connection};

use crate::Error;

const EEXIST: i32 = 17;
const ENODEV: i32 = 19;
const EOPNOTSUPP: i32 = 95;

fn errno(e: &rtnetlink::Error) -> Option<i32> {
    match e {
        rtnetlink::Error::NetlinkError(m) => Some(m.raw_code().abs()),
        _ => None,
    }
}

fn failed(name: &str, what: &'static str) -> impl FnOnce(rtnetlink::Error) -> Error {
    let link = name.to_owned();
    move |source| Error::Link { link, what, source }
}

/// Runs `f` with a netlink conversation that ends with it.
async fn with_netlink<T, F: Future<Output = Result<T, Error>>>(
    f: impl FnOnce(Handle) -> F,
) -> Result<T, Error> {
    let (connection, handle, _) = new_connection().map_err(Error::Netlink)?;
    // The connection never ends before the handle is dropped, and `f` owns the handle.
    tokio::select! {
        result = f(handle) => result,
        () = connection => Err(Error::Netlink(std::io::ErrorKind::ConnectionAborted.into())),
    }
}

async fn index_of(handle: &Handle, name: &str) -> Result<Option<u32>, Error> {
    match handle.link().get().match_name(name.to_owned()).execute().try_next().await {
        Ok(found) => Ok(found.map(|l| l.header.index)),
        Err(e) if errno(&e) == Some(ENODEV) => Ok(None),
        Err(e) => Err(failed(name, "look up")(e)),
    }
}

/// Makes the link with its addresses; what is there already is kept.
pub async fn ensure(name: &str, addresses: &[IpAddr]) -> Result<(), Error> {
    with_netlink(|handle| async move {
        let index = match index_of(&handle, name).await? {
            Some(index) => index,
            None => {
                create(&handle, name).await?;
                index_of(&handle, name).await?.ok_or_else(|| {
                    Error::Netlink(std::io::Error::other(format!("link {name} vanished after it was made")))
                })?
            }
        };
        let up = LinkMessageBuilder::<LinkUnspec>::default().index(index).up().build();
        handle.link().set(up).execute().await.map_err(failed(name, "bring up"))?;
        for &ip in addresses {
            let mut add = handle.address().add(index, ip, if ip.is_ipv4() { 32 } else { 128 });
            // Of host scope: the kernel must never choose it as the source of other traffic.
            add.message_mut().header.scope = AddressScope::Host;
            match add.execute().await {
                Err(e) if errno(&e) == Some(EEXIST) => {}
                other => other.map_err(failed(name, "give an address to"))?,
            }
        }
        Ok(())
    })
    .await
}

/// A dummy link; where the kernel has none, a bridge without ports does the same.
async fn create(handle: &Handle, name: &str) -> Result<(), Error> {
    match handle.link().add(LinkDummy::new(name).build()).execute().await {
        Err(e) if errno(&e) == Some(EOPNOTSUPP) => {
            handle.link().add(LinkBridge::new(name).build()).execute().await.map_err(failed(name, "make"))
        }
        Err(e) if errno(&e) == Some(EEXIST) => Ok(()),
        other => other.map_err(failed(name, "make")),
    }
}

/// Deletes the link; none is fine.
pub async fn remove(name: &str) -> Result<(), Error> {
    with_netlink(|handle| async move {
        let Some(index) = index_of(&handle, name).await? else { return Ok(()) };
        match handle.link().del(index).execute().await {
            Err(e) if errno(&e) == Some(ENODEV) => Ok(()),
            other => other.map_err(failed(name, "delete")),
        }
    })
    .await
}
