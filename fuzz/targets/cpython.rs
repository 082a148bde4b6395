//! Interpreters whose memory lies: recordings of real ones, with bytes and pointers replaced.
//!
//! The first byte of an input picks the recording; then follow changes of eleven bytes: where, what kind, with what.
#![no_main]

use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use loopguard::runtime::{
    cpython::{Inspector, MemoryImage, PyThreadInfo},
    memory::RecordedMemory,
};
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
    pieces: Vec<(u64, Vec<u8>)>,
    size: usize,
}

fn recordings() -> &'static [Recording] {
    static RECORDINGS: OnceLock<Vec<Recording>> = OnceLock::new();
    RECORDINGS.get_or_init(|| {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../loopguard-cli/tests/images");
        let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let read = |file: &std::path::PathBuf| {
            let Case { native_thread_id, state, interpreter, mut image } =
                serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
            let memory = std::mem::take(&mut image.memory);
            let pieces: Vec<_> = memory.pieces().map(|(address, bytes)| (address, bytes.to_vec())).collect();
            let size = memory.size();
            Recording { thread: PyThreadInfo { native_thread_id, state, interpreter }, image, pieces, size }
        };
        files.iter().map(read).collect()
    })
}

/// Piece and offset of the `nth` byte.
fn place(pieces: &[(u64, Vec<u8>)], mut nth: usize) -> Option<(usize, usize)> {
    for (i, (_, bytes)) in pieces.iter().enumerate() {
        if nth < bytes.len() {
            return Some((i, nth));
        }
        nth -= bytes.len();
    }
    None
}

fuzz_target!(|bytes: &[u8]| {
    let Some((which, changes)) = bytes.split_first() else { return };
    let recording = &recordings()[usize::from(*which) % recordings().len()];
    let mut pieces = recording.pieces.clone();
    let (changes, _) = changes.as_chunks::<11>();
    for [low, high, kind, value @ ..] in changes {
        let nth = usize::from(u16::from_le_bytes([*low, *high])) % recording.size;
        let Some((piece, offset)) = place(&pieces, nth) else { continue };
        let new = match kind % 3 {
            0 => value[..1].to_vec(),
            1 => value.to_vec(),
            // A pointer to somewhere in the recording: what real pointers lead to, but not this one.
            _ => {
                let to = usize::from(u16::from_le_bytes([value[0], value[1]])) % recording.size;
                let Some((piece, offset)) = place(&pieces, to) else { continue };
                (pieces[piece].0 + offset as u64).to_le_bytes().to_vec()
            }
        };
        // Pointers are where pointers are aligned.
        let offset = if new.len() == 8 { offset & !7 } else { offset };
        let old = &mut pieces[piece].1[offset..];
        let length = new.len().min(old.len());
        old[..length].copy_from_slice(&new[..length]);
    }
    let mut image = recording.image.clone();
    image.memory = RecordedMemory::from_pieces(pieces);
    if let Ok(interpreter) = image.interpreter() {
        look_at_everything(Arc::new(interpreter), &recording.thread);
    }
});

fn look_at_everything(interpreter: Arc<loopguard::runtime::cpython::Interpreter>, thread: &PyThreadInfo) {
    let _ = interpreter.threads();
    interpreter.gil_ranges(thread.interpreter);
    // SAFETY: integers only.
    let mut capture: CaptureRecord = unsafe { std::mem::zeroed() };
    let mut scratch = Scratch::default();
    let layout = interpreter.layout();
    walk_frames(interpreter.memory(), &layout, thread.walked(), &mut scratch, &mut capture);
    snapshot_request(interpreter.memory(), &layout, &mut scratch, &mut capture.request);
    let mut inspector = Inspector::new(interpreter);
    inspector.stack(&capture.frames[..capture.frame_count as usize], WalkStatus::Complete);
    inspector.request(&capture.request);
    if let Ok(Some(task)) = inspector.current_task(thread, capture.task) {
        let _ = inspector.request_of_task(task.address);
    }
}
