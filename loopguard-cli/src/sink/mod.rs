//! Where updates go: one small trait, one file per form of output.

use std::io;

use crate::core::incident::Update;
use crate::core::status::Status;
use crate::core::summary::Summary;

pub mod escape;
pub mod jsonl;
pub mod text;

#[cfg(test)]
mod example;

pub trait Sink {
    /// Shows one update. An error means that nothing more can be shown (disk full, reader of a pipe gone).
    fn update(&mut self, update: &Update) -> io::Result<()>;

    /// Shows the live figures; called about once a second. Many forms of output have no place for them.
    fn status(&mut self, _status: &Status) -> io::Result<()> {
        Ok(())
    }

    /// Shows the closing summary.
    fn finish(&mut self, summary: &Summary) -> io::Result<()>;
}
