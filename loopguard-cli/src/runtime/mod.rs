//! What marks each kind of event loop, and how to read its target.

pub mod cpython;
pub mod elf;
pub mod http;
pub mod memory;
pub mod probe_site;
pub mod target_file;
pub mod tokio;
pub mod usdt;
