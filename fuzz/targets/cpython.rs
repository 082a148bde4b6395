//! Interpreters whose memory lies: recordings of real ones, with bytes and pointers replaced.
//!
//! The first byte of an input picks the recording and what is looked at; then follow changes of eleven bytes: where, what kind, with what.
#![no_main]

use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use loopguard::runtime::cpython::{Inspector, Interpreter, MemoryImage, PyThreadInfo};
use loopguard_common::{
    records::{CaptureRecord, WalkStatus},
    walk::{Scratch, snapshot_request, walk_frames},
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    native_thread_id: u64,
    state: u64,
    interpreter: u64,
    image: MemoryImage,
}

struct Recording {
    thread: PyThreadInfo,
    image: MemoryImage,
}

fn recordings() -> &'static [Recording] {
    static RECORDINGS: OnceLock<Vec<Recording>> = OnceLock::new();
    RECORDINGS.get_or_init(|| {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../loopguard-cli/tests/images");
        let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let read = |file: &std::path::PathBuf| {
            let Case { native_thread_id, state, interpreter, image } =
                serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
            Recording { thread: PyThreadInfo { native_thread_id, state, interpreter }, image }
        };
        files.iter().map(read).collect()
    })
}

fuzz_target!(|bytes: &[u8]| {
    let Some((which, changes)) = bytes.split_first() else { return };
    let (look, recording) = (usize::from(*which) / recordings().len(), usize::from(*which) % recordings().len());
    let recording = &recordings()[recording];
    let mut image = recording.image.clone();
    let size = image.memory.size();
    let (changes, _) = changes.as_chunks::<11>();
    for [low, high, kind, value @ ..] in changes {
        let nth = usize::from(u16::from_le_bytes([*low, *high])) % size;
        let new = match kind % 3 {
            0 => value[..1].to_vec(),
            1 => value.to_vec(),
            // A pointer to somewhere in the recording: what real pointers lead to, but not this one.
            _ => {
                let to = usize::from(u16::from_le_bytes([value[0], value[1]])) % size;
                image.memory.address_of(to).unwrap_or_default().to_le_bytes().to_vec()
            }
        };
        // Pointers are where pointers are aligned.
        let back = if new.len() == 8 { image.memory.address_of(nth).unwrap_or_default() as usize % 8 } else { 0 };
        let old = &mut image.memory.bytes_mut()[nth.saturating_sub(back)..];
        let length = new.len().min(old.len());
        old[..length].copy_from_slice(&new[..length]);
    }
    if let Ok(interpreter) = image.interpreter() {
        look_at(look, Arc::new(interpreter), &recording.thread);
    }
});

/// One thing at a time: the fuzzer learns more of many short looks than of a few long ones.
fn look_at(which: usize, interpreter: Arc<Interpreter>, thread: &PyThreadInfo) {
    // SAFETY: integers only.
    let mut capture: CaptureRecord = unsafe { std::mem::zeroed() };
    let mut scratch = Scratch::default();
    let layout = interpreter.layout();
    walk_frames(interpreter.memory(), &layout, thread.walked(), &mut scratch, &mut capture);
    match which % 4 {
        0 => {
            let frames = &capture.frames[..capture.frame_count as usize];
            Inspector::new(interpreter).stack(frames, WalkStatus::Complete);
        }
        1 => {
            snapshot_request(interpreter.memory(), &layout, &mut scratch, &capture.frames, &mut capture.request);
            Inspector::new(interpreter).request(&capture.request);
        }
        2 => {
            let mut inspector = Inspector::new(interpreter);
            if let Ok(Some(task)) = inspector.current_task(thread, capture.task) {
                let _ = inspector.request_of_task(task.address);
            }
        }
        _ => {
            let _ = interpreter.threads();
            interpreter.gil_ranges(thread.interpreter);
            let _ = Inspector::new(interpreter).requests_in_flight(thread, None);
        }
    }
}
