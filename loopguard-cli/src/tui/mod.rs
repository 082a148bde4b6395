//! Turns updates into a live screen: `state` is told and asked and never draws, `draw` draws it and changes nothing,
//! `screen` owns the terminal.

pub mod state;

pub mod draw;

pub mod screen;

pub mod export;
pub mod source;
