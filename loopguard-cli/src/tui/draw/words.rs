//! The short texts that several parts of the screen use.

use super::look::Look;
use crate::core::event::{Frame, Owner};
use crate::core::incident::{Attribution, Blame};
use crate::core::summary::LineLabel;
use crate::sink::text::shortened;
use crate::tui::state::{Scope, Seen, WaitLabel};

pub fn owner(blame: &Blame) -> String {
    owner_name(&blame.owner)
}

pub fn owner_name(owner: &Owner) -> String {
    match owner {
        Owner::Request { request, .. } => format!("{} {}", request.method.as_deref().unwrap_or("?"), request.path),
        Owner::NoRequest { task: Some(task) } | Owner::Task { task } => format!("(no request) task {task}"),
        Owner::NoRequest { task: None } => "(no request)".to_owned(),
        Owner::Unknown(_) => "(request unknown)".to_owned(),
    }
}

/// Whose it was, and that it was many.
pub fn seen(block: &Seen) -> String {
    match block {
        Seen::Single(block) => owner(&block.blame),
        Seen::Cumulative(block) => format!("{} steps of {}", block.count, owner(&block.blame)),
    }
}

pub fn attribution(blame: &Blame) -> &'static str {
    match blame.attribution {
        Attribution::Exact => "exact",
        Attribution::Inferred => "inferred",
        Attribution::Unknown => "unknown",
    }
}

/// The user's line, or why there is none.
pub fn place(blame: &Blame, look: &Look) -> String {
    match blame.user_line() {
        Some(at) => frame(at.frame, look),
        None => match (blame.stack.frames.first(), blame.stack.incomplete) {
            (Some(innermost), _) => format!("(no user code) {}", innermost.function),
            (None, Some(why)) => format!("({why})"),
            (None, None) => "(no stack)".to_owned(),
        },
    }
}

pub fn frame(frame: &Frame, look: &Look) -> String {
    function_at(&frame.function, (frame.file.as_deref().or(frame.module.as_deref()), frame.line), look)
}

fn function_at(function: &str, place: (Option<&str>, Option<u32>), look: &Look) -> String {
    match place {
        (Some(file), Some(line)) => format!("{}:{line} {function}", shortened(file, look.current_dir.as_deref())),
        (Some(file), None) => format!("{} {function}", shortened(file, look.current_dir.as_deref())),
        (None, _) => function.to_owned(),
    }
}

/// `app.py:82`, without the folders.
pub fn file_and_line(frame: &Frame) -> Option<String> {
    let file = frame.file.as_deref()?.rsplit('/').next()?;
    Some(frame.line.map_or_else(|| file.to_owned(), |line| format!("{file}:{line}")))
}

/// [`place`], without the folders where it would not fit.
pub fn place_within(blame: &Blame, columns: u16, look: &Look) -> String {
    let whole = place(blame, look);
    match blame.user_line().and_then(|at| Some((at.frame, file_and_line(at.frame)?))) {
        Some((frame, short)) if whole.len() > usize::from(columns) => format!("{short} {}", frame.function),
        _ => whole,
    }
}

pub fn line(label: &LineLabel, look: &Look) -> String {
    match label {
        LineLabel::Line { file, line, function, called } => {
            let at = function_at(function, (file.as_deref(), *line), look);
            called.as_ref().map_or(at.clone(), |called| format!("{at}, calling {called}"))
        }
        LineLabel::NoUserCode => "(no user code on the stack)".to_owned(),
        LineLabel::Other => "(other)".to_owned(),
    }
}

pub fn wait(label: &WaitLabel) -> String {
    match label {
        WaitLabel::On { syscall, on: Some(on) } => format!("{syscall} on {on}"),
        WaitLabel::On { syscall, on: None } => syscall.clone(),
        WaitLabel::Other => "(other)".to_owned(),
    }
}

pub fn scope(scope: &Scope, look: &Look) -> String {
    match scope {
        Scope::Route(label) => crate::sink::text::route(label),
        Scope::Line(label) => line(label, look),
        Scope::Wait(label) => wait(label),
        Scope::Frames(path) => path.last().map_or_else(|| "all".to_owned(), |last| frame(last, look)),
    }
}

/// A share with two digits that matter.
pub fn percent(share: f64) -> String {
    match share * 100.0 {
        none if none <= 0.0 => "0 %".to_owned(),
        small if small < 0.1 => "<0.1 %".to_owned(),
        few if few < 9.95 => format!("{few:.1} %"),
        many => format!("{many:.0} %"),
    }
}

#[cfg(test)]
mod tests {
    use super::percent;

    #[test]
    fn shares() {
        let shown = [0.0, 0.0004, 0.012, 0.0994, 0.0996, 0.5, 1.0].map(percent);
        assert_eq!(shown, ["0 %", "<0.1 %", "1.2 %", "9.9 %", "10 %", "50 %", "100 %"]);
    }
}
