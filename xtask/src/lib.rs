//! What the chores and the CLI's build script share: where things are, and how the kernel programs are built.
//!
//! This library is a build-dependency of `loopguard`, so it stays small; the chores themselves live in the binary.

pub mod toolchain;
pub mod workspace;
