//! The pure middle: events in, incidents out. No files, no clocks, no kernel.

pub mod event;

pub mod captures;
pub mod cumulative;
pub mod cut;
pub mod hint;
pub mod incident;
pub mod profile;
pub mod request;
pub mod routes;
pub mod status;
pub mod summary;
pub mod threshold;

#[cfg(test)]
pub(crate) mod story;
