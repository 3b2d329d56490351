//! The server with the real monitor, a test's own folder each.

mod node;
mod pods;
mod survival;
