//! Ring buffer entries.
#![no_main]

use libfuzzer_sys::fuzz_target;
use loopguard::source::decode::{Record, decode};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(Record::Capture(capture)) = decode(bytes) {
        assert!(capture.frames.get(..capture.frame_count as usize).is_some(), "more frames than there can be");
    }
});
