//! Where records come from.
//!
//! [`live`] follows running processes: it owns the kernel programs ([`kernel`]), decodes what they send ([`decode`]) and
//! reads the target while a step still runs ([`process`], [`crate::runtime`]). What leaves it are
//! [`Event`](crate::core::event::Event)s; a recording of those replays through the same core.

pub mod btf;
mod cost;
pub mod decode;
pub mod features;
pub mod governor;
pub mod kernel;
pub mod live;
pub mod process;
pub mod select;
pub mod syscall;
pub mod target;
