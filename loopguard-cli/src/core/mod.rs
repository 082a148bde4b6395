//! The pure middle: events in, incidents out. No files, no clocks, no kernel.

pub mod event;
