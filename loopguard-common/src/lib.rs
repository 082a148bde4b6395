//! What the kernel programs and the user-space program share.
//!
//! * [`records`]: one wire struct per record the kernel sends, and what it is told of a thread.
//! * [`clock`]: the state machine of one loop thread: ticks, steps and where their time went.
//! * [`layout`]: where one build of CPython keeps its fields.
//! * [`request`]: what a server's own probes tell of its requests.
//! * [`walk`]: the interpreter walker: frames, and the ASGI scope in them.
//!
//! Everything here is `no_std`, never allocates and reads the target only through [`walk::Memory`], so
//! that the same code runs in the kernel, against a live process and in tests on recorded memory.
#![cfg_attr(not(test), no_std)]

pub mod clock;
pub mod layout;
pub mod records;
pub mod request;
pub mod short;
pub mod trail;
pub mod walk;
pub mod worker;
