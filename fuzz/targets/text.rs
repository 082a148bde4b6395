//! Text of the target: the heads of its requests, and what is shown of its strings.
#![no_main]

use libfuzzer_sys::fuzz_target;
use loopguard::{
    runtime::http::{Trail, current},
    sink::escape::{is_dangerous, printable, word},
};

fuzz_target!(|bytes: &[u8]| {
    let Some(([answers, cut, more], text)) = bytes.split_first_chunk::<3>() else { return };
    let (read, answer) = text.split_at(text.len().min(usize::from(*cut) * 8));
    let trail = Trail {
        read,
        read_length: read.len() as u64 + u64::from(*more),
        answers: u32::from(answers % 4),
        answer,
        answer_length: answer.len() as u64,
    };
    let _ = current(&trail);
    let shown = String::from_utf8_lossy(text);
    for escaped in [printable(&shown).to_string(), word(&shown).to_string()] {
        assert!(!escaped.chars().any(is_dangerous), "a control character is shown");
    }
});
