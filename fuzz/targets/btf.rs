//! The kernel's own type information.
#![no_main]

use libfuzzer_sys::fuzz_target;
use loopguard::source::btf::KernelTypes;

fuzz_target!(|bytes: &[u8]| {
    let Some(types) = KernelTypes::parse(bytes.to_vec()) else { return };
    let _ = types.field_offset("task_struct", "pid");
    let _ = types.has_enumerator("bpf_func_id", "BPF_FUNC_ringbuf_output");
    let _ = types.tracepoint("sched_switch");
});
