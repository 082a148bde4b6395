//! The pure middle: events in, incidents out. No files, no clocks, no kernel.

pub mod event;

pub mod captures;
pub mod cut;
pub mod incident;
pub mod profile;
pub mod status;
pub mod summary;

#[cfg(test)]
mod story;
