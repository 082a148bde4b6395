//! Copies the top of a loop thread's user stack page by page, and sends the pages ahead of their capture.

use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid,
    generated::{bpf_probe_read_user, bpf_ringbuf_output},
};
use loopguard_common::records::{Counter, MAX_STACK_PAGES, RecordHeader, RecordKind, STACK_PAGE, StackPage};

use crate::{
    maps::{STACK_PAGES, STACKS, at_slot, capture_buffer, count},
    send::NO_WAKEUP,
};

/// Pages copied of the stack of a thread that has no room for more of its own, set at load.
#[unsafe(no_mangle)]
static STACK_PAGE_LIMIT: u32 = 0;

#[inline(always)]
fn limit() -> u32 {
    // SAFETY: set before the program is loaded: it must be read, not taken for what stands here.
    unsafe { core::ptr::read_volatile(&raw const STACK_PAGE_LIMIT) }
}

/// Copies the current thread's stack from the page of `sp` on, up to the first page that is not there. How many pages
/// that were, and where they are, stands in its capture buffer then.
///
/// A global function, like [`capture_take`](crate::capture::capture_take) and for the same reason.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn stack_copy(slot: u32, tid: u32, at_ns: u64, sp: u64) -> u32 {
    let Some(target) = at_slot(slot, tid) else { return 0 };
    let Some(buffer) = capture_buffer(slot) else { return 0 };
    let tgid = (bpf_get_current_pid_tgid() >> 32) as u32;
    let stack = sp & !(STACK_PAGE as u64 - 1);
    let (first, limit) = match target.thread.deep_stack {
        0 => (slot * limit(), limit()),
        room => (room, MAX_STACK_PAGES as u32),
    };
    buffer.record.stack_first = first;
    buffer.record.stack_pages = 0;
    for i in 0..MAX_STACK_PAGES as u32 {
        if i >= limit {
            break;
        }
        let Some(page) = STACK_PAGES.get_ptr_mut(first + i) else { break };
        // SAFETY: a slot belongs to one thread.
        let page = unsafe { &mut *page };
        let address = stack + u64::from(i) * STACK_PAGE as u64;
        let to = (&raw mut page.bytes).cast();
        // SAFETY: `bytes` has that many; any user address may be asked for.
        if unsafe { bpf_probe_read_user(to, STACK_PAGE as u32, address as *const _) } != 0 {
            break;
        }
        page.header = RecordHeader { kind: RecordKind::StackPage as u32, tgid, tid, _pad: 0 };
        page.at_ns = at_ns;
        page.address = address;
        buffer.record.stack_pages = i + 1;
    }
    0
}

/// Sends the pages that [`stack_copy`] left. User space may have given the thread more room since: they are where they
/// were put.
/// Global too.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn stack_send(slot: u32) -> u32 {
    let Some(buffer) = capture_buffer(slot) else { return 0 };
    let (first, pages) = (buffer.record.stack_first, buffer.record.stack_pages);
    for i in 0..MAX_STACK_PAGES as u32 {
        if i >= pages {
            break;
        }
        let Some(page) = STACK_PAGES.get_ptr_mut(first + i) else { break };
        // SAFETY: a whole page.
        let sent = unsafe {
            bpf_ringbuf_output(
                (&raw const STACKS).cast_mut().cast(),
                page.cast(),
                size_of::<StackPage>() as u64,
                NO_WAKEUP,
            )
        };
        if sent != 0 {
            count(Counter::LostStackPages);
            break;
        }
    }
    0
}
