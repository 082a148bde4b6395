//! Machine code, in which places for probes are looked for.
#![no_main]

use libfuzzer_sys::fuzz_target;
use loopguard::runtime::probe_site::{callees, ending, entry_block_site, moved, straight_line_site};

fuzz_target!(|bytes: &[u8]| {
    let Some((address, code)) = bytes.split_first_chunk::<8>() else { return };
    let address = u64::from_le_bytes(*address);
    for site in [entry_block_site(code, address), straight_line_site(code, address)] {
        if let Ok((distance, _)) = site {
            assert!((distance as usize) < code.len(), "a place outside of the code");
            let _ = moved(code, distance);
        }
    }
    let _ = (callees(code, address), ending(code, address));
});
