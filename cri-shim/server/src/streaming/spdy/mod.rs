//! SPDY/3.1, as much of it as Kubernetes clients use: streams that the client opens, data both ways, half-close, reset, ping.
//!
//! There is no flow control: upstream's clients neither send nor honour window updates. TCP's does.

mod connection;
mod frame;
mod headers;
pub(super) mod remote;

#[cfg(test)]
pub(super) use connection::samples;
pub(super) use connection::{Event, Reader, Writer, connection};
#[cfg(test)]
pub(super) use frame::{Decoder, Encoder, Frame, plain};
