//! loopguard, as a library for its own binary and tests. ARCHITECTURE.md is the map.
//!
//! The data's way: kernel record ([`source`]) → [`core::event::Event`] → [`core::profile::Profile::apply`] →
//! [`core::incident::Update`] → [`sink`].

mod alarm;
pub mod args;
pub mod attach;
pub mod config;
pub mod core;
pub mod doctor;
pub mod options;
pub mod output;
pub mod run;
pub mod runtime;
pub mod sink;
pub mod source;
pub mod symbol;
pub mod tui;
