//! Where updates go: one small trait, one file per form of output.

use std::io;

use crate::core::incident::Update;
use crate::core::status::Status;
use crate::core::summary::Summary;

pub mod escape;
pub mod gate;
pub mod jsonl;
pub mod log;
pub mod prometheus;
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

    /// Opens its file anew, should somebody have moved it away.
    fn reopen(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Shows the closing summary.
    fn finish(&mut self, summary: &Summary) -> io::Result<()>;
}

/// Several at once, one after the other.
#[derive(Default)]
pub struct Sinks(pub Vec<Box<dyn Sink>>);

impl Sink for Sinks {
    fn update(&mut self, update: &Update) -> io::Result<()> {
        self.0.iter_mut().try_for_each(|sink| sink.update(update))
    }

    fn status(&mut self, status: &Status) -> io::Result<()> {
        self.0.iter_mut().try_for_each(|sink| sink.status(status))
    }

    fn reopen(&mut self) -> io::Result<()> {
        self.0.iter_mut().try_for_each(|sink| sink.reopen())
    }

    fn finish(&mut self, summary: &Summary) -> io::Result<()> {
        self.0.iter_mut().try_for_each(|sink| sink.finish(summary))
    }
}
