//! Puts a thread's Python frames where they run in its native stack: in place of the interpreter's evaluation loop.
//!
//! One native call of the evaluation loop runs many Python frames, since calls from Python to Python stay in it. Each
//! such call puts an entry frame on the native stack (CPython 3.12 on), whose address tells which call it is, in
//! stripped interpreters too. In 3.11 a flag tells where a call's frames end, and the loop's name which call it is.

use std::sync::Arc;

use crate::core::event::{Frame, Stack};

/// A native call, named.
#[derive(Clone, Debug)]
pub struct NativeCall {
    /// The stack it had: from its stack pointer to that of its caller.
    pub sp: u64,
    pub cfa: u64,
    /// Innermost first.
    pub frames: Arc<[Arc<Frame>]>,
    /// The evaluation loop, by its name.
    pub is_eval: bool,
}

/// The Python frames that one call of the evaluation loop runs, innermost first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PythonRun {
    pub frames: Vec<Arc<Frame>>,
    /// Address of its entry frame, if it has one.
    pub entry: Option<u64>,
}

/// What is known of a stack's outer end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// Why the outermost frames are missing, if they are.
    pub native: Option<&'static str>,
    pub python: Option<&'static str>,
}

/// One stack of both. No Python frame is ever left out: where it cannot be told in which native call it runs, it stands
/// between those of its neighbours.
pub fn join(native: &[NativeCall], python: &[PythonRun], ends: Ends) -> Stack {
    let places = places(native, python, ends);
    let mut frames = Vec::with_capacity(native.len() + python.iter().map(|run| run.frames.len()).sum::<usize>());
    let mut next_run = 0;
    for (at, call) in native.iter().enumerate() {
        match places.iter().position(|place| *place == Some(at)) {
            Some(run) if run >= next_run => {
                for run in &python[next_run..=run] {
                    frames.extend(run.frames.iter().cloned());
                }
                next_run = run + 1;
            }
            _ => frames.extend(call.frames.iter().cloned()),
        }
    }
    let left_over = &python[next_run.min(python.len())..];
    for run in left_over {
        frames.extend(run.frames.iter().cloned());
    }
    Stack { frames, incomplete: ends.native.or(ends.python) }
}

/// In which native call each run's frames run.
fn places(native: &[NativeCall], python: &[PythonRun], ends: Ends) -> Vec<Option<usize>> {
    let by_entry = |run: &PythonRun| {
        let entry = run.entry?;
        native.iter().position(|call| call.sp <= entry && entry < call.cfa)
    };
    let mut places: Vec<Option<usize>> = python.iter().map(by_entry).collect();
    if python.iter().any(|run| run.entry.is_some()) {
        return places;
    }
    // Without entry frames in order. The outer end is the surer one: a call that has only begun has no frame yet.
    let loops: Vec<usize> = (0..native.len()).filter(|&at| native[at].is_eval).collect();
    let skip =
        if ends.native.is_none() && ends.python.is_none() { loops.len().saturating_sub(python.len()) } else { 0 };
    for (place, at) in places.iter_mut().zip(loops.into_iter().skip(skip)) {
        *place = Some(at);
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::event::{FrameKind, Origin};

    fn frame(name: &str) -> Arc<Frame> {
        let kind = if name.ends_with(".py") { FrameKind::Python } else { FrameKind::Native };
        let function = name.into();
        Arc::new(Frame { kind, origin: Origin::Runtime, function, file: None, line: None, module: None })
    }

    /// Native calls from address 0 up, 16 bytes each; `eval` marks the loop, `?` the loop in a stripped interpreter.
    fn native(names: &str) -> Vec<NativeCall> {
        let call = |(at, name): (usize, &str)| NativeCall {
            sp: 16 * at as u64,
            cfa: 16 * at as u64 + 16,
            frames: [frame(name)].into(),
            is_eval: name == "eval",
        };
        names.split_whitespace().enumerate().map(call).collect()
    }

    /// `a b @3` : frames a.py and b.py, with the entry frame in the fourth native call.
    fn python(runs: &[&str]) -> Vec<PythonRun> {
        let run = |text: &&str| {
            let (frames, entry) = text.split_once('@').map_or((*text, None), |(frames, at)| (frames, Some(at)));
            PythonRun {
                frames: frames.split_whitespace().map(|name| frame(&format!("{name}.py"))).collect(),
                entry: entry.map(|at| at.parse::<u64>().unwrap() * 16 + 8),
            }
        };
        runs.iter().map(run).collect()
    }

    fn check(calls: &str, runs: &[&str], ends: Ends, expected: &str) {
        let stack = join(&native(calls), &python(runs), ends);
        let names: Vec<&str> = stack.frames.iter().map(|frame| frame.function.as_ref()).collect();
        assert_eq!(names.join(" "), expected);
        assert_eq!(stack.incomplete, ends.native.or(ends.python));
    }

    const WHOLE: Ends = Ends { native: None, python: None };
    const CUT: Ends = Ends { native: Some("cut"), python: None };

    #[test]
    fn python_frames_replace_the_loop_they_run_in() {
        check(
            "nanosleep time_sleep eval vectorcall uv_run eval main",
            &["deep handler @2", "run @5"],
            WHOLE,
            "nanosleep time_sleep deep.py handler.py vectorcall uv_run run.py main",
        );
        check("nanosleep ? ? ? main", &["deep @2"], WHOLE, "nanosleep ? deep.py ? main");
    }

    #[test]
    fn without_entry_frames_they_follow_the_order_of_calls() {
        check("sleep eval call eval main", &["a", "b c"], WHOLE, "sleep a.py call b.py c.py main");
        // The innermost call has no frame of its own yet.
        check("eval call eval main", &["b"], WHOLE, "eval call b.py main");
        check("sleep eval call", &["a", "b"], CUT, "sleep a.py call b.py");
    }

    #[test]
    fn a_stack_cut_short_keeps_what_it_has() {
        check("sleep eval call", &["a @1", "b @9"], CUT, "sleep a.py call b.py");
        check("", &["a", "b"], CUT, "a.py b.py");
        check("sleep call", &[], CUT, "sleep call");
    }

    #[test]
    fn no_python_frame_is_lost_where_entries_make_no_sense() {
        check("sleep eval eval main", &["a @2", "b @1", "c @99"], WHOLE, "sleep a.py b.py eval main c.py");
        check("sleep eval main", &["a @77", "b @1"], WHOLE, "sleep a.py b.py main");
    }
}
