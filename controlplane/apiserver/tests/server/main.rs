//! The whole server over TLS. One binary, so that it is linked once.

mod front;
mod malformed;
mod nodeproxy;
mod protobuf;
mod support;
