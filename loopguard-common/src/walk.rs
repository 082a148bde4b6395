//! Walks an interpreter's frames and copies the request out of the ASGI scope in them.
//!
//! The same code runs in the kernel (inside the thread it looks at), against a live process and on recorded memory.
//! For the verifier's sake results go straight into the caller's memory, indices never advance conditionally, and
//! what one loop leaves for the next is stored and read back.

use crate::layout::{ABSENT, PyLayout};
use crate::records::{
    CaptureRecord, FRAME_ENTRY, FRAME_SHIM, GilHolder, HOLDER_FRAMES, MAX_FRAMES, RawFrame, RequestSnapshot, WalkStatus,
};

/// Reads the target's memory.
pub trait Memory {
    /// Reads exactly `length` bytes at `address` to `to`; `false` when they are not all readable.
    ///
    /// # Safety
    /// `to` must be valid for writing `length` bytes.
    unsafe fn read_raw(&self, address: u64, to: *mut u8, length: usize) -> bool;

    /// Reads a value of plain integers.
    #[inline(always)]
    fn read<T: Plain>(&self, address: u64, to: &mut T) -> bool {
        // SAFETY: any bytes are a valid `T`, and `to` is as large as one.
        unsafe { self.read_raw(address, (to as *mut T).cast(), size_of::<T>()) }
    }

    #[inline(always)]
    fn read_u64(&self, address: u64) -> u64 {
        let mut value = 0u64;
        if self.read(address, &mut value) { value } else { 0 }
    }
}

/// Types made of integers only, for which any bytes are a value.
///
/// # Safety
/// No padding, no invalid bit patterns.
pub unsafe trait Plain: Copy {}
// SAFETY: an integer.
unsafe impl Plain for u32 {}
// SAFETY: an integer.
unsafe impl Plain for u64 {}
// SAFETY: integers.
unsafe impl<const N: usize> Plain for [u64; N] {}
// SAFETY: integers.
unsafe impl<const N: usize> Plain for [u8; N] {}

/// Words read of a frame: through its first two locals in every supported version.
const FRAME_WORDS: usize = 13;
/// Dicts among the outermost frames' first locals that may be an ASGI scope.
pub const SCOPE_CANDIDATES: usize = 3;
/// Entries of a dict that are looked at; uvicorn's scope has 13, FastAPI adds about as many.
const MAX_DICT_ENTRIES: usize = 32;
/// Headers that are looked at.
const MAX_HEADERS: usize = 32;

/// Scratch memory of one walk; in the kernel it lives in a map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Scratch {
    words: [u64; 16],
    /// The scope whose request was copied before, if that copy is still the current step's.
    pub known_scope: u64,
    /// Dicts seen in the frames' first two locals, the outermost first.
    scopes: [u64; SCOPE_CANDIDATES],
    fields: ScopeFields,
    /// Those of the request's own scope.
    request: ScopeFields,
}

impl Scratch {
    /// The dict that the last walk saw furthest out: the scope, if there is one.
    #[inline(always)]
    pub fn outermost(&self) -> u64 {
        self.scopes[0]
    }
}

/// Addresses of the values of one scope dict.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct ScopeFields {
    kind: u64,
    path: u64,
    method: u64,
    headers: u64,
    client: u64,
    route: u64,
}

/// One Python thread of the target.
#[derive(Clone, Copy, Debug)]
pub struct PyThread {
    /// Address of its `PyThreadState`.
    pub state: u64,
    /// What `native_thread_id` must hold for the state to be this thread's.
    pub native_thread_id: u64,
}

/// Tells a code object from a later one at the same address: its `co_qualname` and `co_linetable` pointers.
#[inline(always)]
pub fn fingerprint(qualname: u64, linetable: u64) -> u64 {
    qualname.rotate_left(32) ^ linetable
}

/// Walks `thread`'s frames into `out`: `frames`, `frame_count`, `walk`, `task`.
#[inline(always)]
pub fn walk_frames<M: Memory>(
    memory: &M,
    layout: &PyLayout,
    thread: PyThread,
    scratch: &mut Scratch,
    out: &mut CaptureRecord,
) {
    out.frame_count = 0;
    out.task = 0;
    scratch.scopes = [0; SCOPE_CANDIDATES];
    if memory.read_u64(thread.state.wrapping_add(layout.ts_native_thread_id as u64)) != thread.native_thread_id {
        out.walk = WalkStatus::NotThisThread as u32;
        return;
    }
    if layout.ts_running_task != ABSENT {
        out.task = memory.read_u64(thread.state.wrapping_add(layout.ts_running_task as u64));
    }
    let mut frame = memory.read_u64(thread.state.wrapping_add(layout.ts_frame as u64));
    if layout.cframe_frame != ABSENT {
        frame = memory.read_u64(frame.wrapping_add(layout.cframe_frame as u64));
    }
    let mut status = WalkStatus::TooDeep;
    let mut count = 0;
    for i in 0..MAX_FRAMES {
        if frame == 0 {
            status = WalkStatus::Complete;
            break;
        }
        if !read_frame(memory, frame, &mut scratch.words) {
            status = WalkStatus::Unreadable;
            break;
        }
        let owner = field(&scratch.words, layout.frame_owner) & 0xff;
        let code = field(&scratch.words, layout.frame_executable) & !3;
        if owner < layout.shim_owner as u64 {
            let mut names = [0u64; 2];
            memory.read(code.wrapping_add(layout.code_qualname as u64), &mut names);
            let mut entry = 0;
            if layout.frame_is_entry != ABSENT && field(&scratch.words, layout.frame_is_entry) & 1 != 0 {
                entry = FRAME_ENTRY;
            }
            out.frames[i] = RawFrame {
                code: code | entry,
                instr: field(&scratch.words, layout.frame_instr),
                fingerprint: fingerprint(names[0], names[1]),
            };
            note_scope(memory, layout, field(&scratch.words, layout.frame_locals), &mut scratch.scopes);
            note_scope(memory, layout, field(&scratch.words, layout.frame_locals + 8), &mut scratch.scopes);
        } else {
            out.frames[i] = RawFrame { code: FRAME_SHIM, instr: frame, fingerprint: 0 };
        }
        count = i + 1;
        frame = field(&scratch.words, layout.frame_previous);
    }
    out.frame_count = count as u32;
    out.walk = status as u32;
}

/// `_gil_runtime_state.last_holder` (`pycore_gil.h`): who has the GIL while it is locked.
const GIL_LAST_HOLDER: u64 = 8;

/// Walks the innermost frames of the thread that holds the GIL whose state is at `gil`.
#[inline(always)]
pub fn walk_holder<M: Memory>(memory: &M, layout: &PyLayout, gil: u64, scratch: &mut Scratch, out: &mut GilHolder) {
    out.native_thread_id = 0;
    out.frame_count = 0;
    let state = memory.read_u64(gil.wrapping_add(GIL_LAST_HOLDER));
    if state == 0 {
        return;
    }
    out.native_thread_id = memory.read_u64(state.wrapping_add(layout.ts_native_thread_id as u64));
    let mut frame = memory.read_u64(state.wrapping_add(layout.ts_frame as u64));
    if layout.cframe_frame != ABSENT {
        frame = memory.read_u64(frame.wrapping_add(layout.cframe_frame as u64));
    }
    let mut count = 0;
    for i in 0..HOLDER_FRAMES {
        if frame == 0 || !read_frame(memory, frame, &mut scratch.words) {
            break;
        }
        let owner = field(&scratch.words, layout.frame_owner) & 0xff;
        let code = field(&scratch.words, layout.frame_executable) & !3;
        if owner < layout.shim_owner as u64 {
            let mut names = [0u64; 2];
            memory.read(code.wrapping_add(layout.code_qualname as u64), &mut names);
            out.frames[i] = RawFrame {
                code,
                instr: field(&scratch.words, layout.frame_instr),
                fingerprint: fingerprint(names[0], names[1]),
            };
        } else {
            out.frames[i] = RawFrame { code: FRAME_SHIM, instr: frame, fingerprint: 0 };
        }
        count = i + 1;
        frame = field(&scratch.words, layout.frame_previous);
    }
    out.frame_count = count as u32;
}

/// The last frame of a stack chunk may end less than [`FRAME_WORDS`] before unmapped memory: then without its locals.
#[inline(always)]
fn read_frame<M: Memory>(memory: &M, frame: u64, words: &mut [u64; 16]) -> bool {
    // SAFETY: both lengths fit 16 words.
    unsafe {
        if memory.read_raw(frame, words.as_mut_ptr().cast(), FRAME_WORDS * 8) {
            return true;
        }
        words[10] = 0;
        words[11] = 0;
        words[12] = 0;
        memory.read_raw(frame, words.as_mut_ptr().cast(), 10 * 8)
    }
}

/// The field at `offset` and the bytes above it in its word.
#[inline(always)]
fn field(words: &[u64; 16], offset: u16) -> u64 {
    words[((offset >> 3) & 15) as usize] >> ((offset & 7) * 8)
}

/// Keeps the dict behind `local` (looking through a cell), the newest, so outermost, first.
#[inline(always)]
fn note_scope<M: Memory>(memory: &M, layout: &PyLayout, local: u64, scopes: &mut [u64; SCOPE_CANDIDATES]) {
    // Stack references carry tags in their low bits.
    let mut object = local & !3;
    if object < 4096 || object == scopes[0] {
        return;
    }
    let mut of_type = memory.read_u64(object.wrapping_add(layout.ob_type as u64));
    if of_type == layout.cell_type {
        object = memory.read_u64(object.wrapping_add(layout.cell_ref as u64));
        if object < 4096 || object == scopes[0] {
            return;
        }
        of_type = memory.read_u64(object.wrapping_add(layout.ob_type as u64));
    }
    if of_type == layout.dict_type {
        scopes[2] = scopes[1];
        scopes[1] = scopes[0];
        scopes[0] = object;
    }
}

/// Copies the request from the outermost ASGI scope that [`walk_frames`] came past, the route from the first that has
/// one (middleware may hand on a copy).
#[inline(always)]
pub fn snapshot_request<M: Memory>(memory: &M, layout: &PyLayout, scratch: &mut Scratch, out: &mut RequestSnapshot) {
    out.scope = 0;
    out.route = 0;
    for i in 0..SCOPE_CANDIDATES {
        let dict = scratch.scopes[i];
        if dict == 0 || (out.scope != 0 && out.route != 0) {
            break;
        }
        find_fields(memory, layout, dict, scratch);
        if !is_request(memory, layout, &scratch.fields, &mut scratch.words) {
            continue;
        }
        if out.scope == 0 {
            out.scope = dict;
            scratch.request = scratch.fields;
        }
        out.route = scratch.fields.route;
    }
    if out.scope != 0 {
        copy_request(memory, layout, scratch, out);
    }
}

/// Copies the facts of the request behind `scope`, a dict, whatever frames hold it. `false`: not an HTTP or websocket
/// scope.
pub fn snapshot_scope<M: Memory>(
    memory: &M,
    layout: &PyLayout,
    scope: u64,
    scratch: &mut Scratch,
    out: &mut RequestSnapshot,
) -> bool {
    scratch.scopes = [scope, 0, 0];
    snapshot_request(memory, layout, scratch, out);
    out.scope != 0
}

const fn key(name: &[u8]) -> u64 {
    let mut word = 0;
    let mut i = name.len();
    while i > 0 {
        i -= 1;
        word = word << 8 | name[i] as u64;
    }
    word
}

/// Finds the values of interest in a dict with string keys (`dictobject.c`: `PyDictKeysObject`, then its index table,
/// then the entries).
#[inline(always)]
fn find_fields<M: Memory>(memory: &M, layout: &PyLayout, dict: u64, scratch: &mut Scratch) {
    scratch.fields = ScopeFields { kind: 0, path: 0, method: 0, headers: 0, client: 0, route: 0 };
    let keys = memory.read_u64(dict.wrapping_add(layout.dict_keys as u64));
    let mut header = [0u64; 4];
    if !memory.read(keys, &mut header) {
        return;
    }
    let log2_index_bytes = (header[1] >> 8) & 31;
    let general = (header[1] >> 16) & 0xff == 0;
    let entries = keys.wrapping_add(32 + (1 << log2_index_bytes));
    let count = header[3];
    // A general table's entries begin with the hash.
    let (stride, first) = if general { (24, 8) } else { (16, 0) };
    for i in 0..MAX_DICT_ENTRIES as u64 {
        if i >= count {
            break;
        }
        let mut entry = [0u64; 2];
        if !memory.read(entries.wrapping_add(i * stride + first), &mut entry) {
            break;
        }
        if entry[0] == 0 || entry[1] == 0 || !memory.read(entry[0], key_words(&mut scratch.words)) {
            continue;
        }
        let length = field(&scratch.words, layout.str_length);
        if length == 0 || length > 8 {
            continue;
        }
        let name = field(&scratch.words, layout.str_ascii_data) & (u64::MAX >> ((64 - length * 8) & 63));
        if name == const { key(b"type") } {
            scratch.fields.kind = entry[1];
        } else if name == const { key(b"path") } {
            scratch.fields.path = entry[1];
        } else if name == const { key(b"method") } {
            scratch.fields.method = entry[1];
        } else if name == const { key(b"headers") } {
            scratch.fields.headers = entry[1];
        } else if name == const { key(b"client") } {
            scratch.fields.client = entry[1];
        } else if name == const { key(b"route") } {
            scratch.fields.route = entry[1];
        }
    }
}

#[inline(always)]
fn key_words(words: &mut [u64; 16]) -> &mut [u64; 8] {
    // SAFETY: the first 8 of 16 words.
    unsafe { &mut *words.as_mut_ptr().cast() }
}

/// An HTTP or websocket scope, as the ASGI specification requires them to look.
#[inline(always)]
fn is_request<M: Memory>(memory: &M, layout: &PyLayout, fields: &ScopeFields, words: &mut [u64; 16]) -> bool {
    if fields.kind == 0 || fields.path == 0 || fields.headers == 0 || !memory.read(fields.kind, key_words(words)) {
        return false;
    }
    let length = field(words, layout.str_length);
    let name = field(words, layout.str_ascii_data);
    (length == 4 && name & 0xffff_ffff == const { key(b"http") }) || (length == 9 && name == const { key(b"websocke") })
}

#[inline(always)]
fn copy_request<M: Memory>(memory: &M, layout: &PyLayout, scratch: &mut Scratch, out: &mut RequestSnapshot) {
    copy_object(memory, scratch.request.path, &mut out.path);
    copy_object(memory, scratch.request.method, &mut out.method);
    out.client_port = 0;
    out.client_host[16] = 0;
    let mut client = [0u64; 2];
    if scratch.request.client != 0
        && memory.read(scratch.request.client.wrapping_add(layout.tuple_items as u64), &mut client)
    {
        copy_object(memory, client[0], &mut out.client_host);
        let mut port = 0u32;
        memory.read(client[1].wrapping_add(layout.long_digit as u64), &mut port);
        out.client_port = port;
    } else {
        clear(&mut out.client_host);
    }
    clear(&mut out.request_id);
    clear(&mut out.traceparent);
    let headers = scratch.request.headers;
    let count = memory.read_u64(headers.wrapping_add(layout.var_size as u64));
    let items = memory.read_u64(headers.wrapping_add(layout.list_items as u64));
    for i in 0..MAX_HEADERS as u64 {
        if i >= count {
            break;
        }
        let pair = memory.read_u64(items.wrapping_add(i * 8));
        let mut header = [0u64; 2];
        if pair == 0
            || !memory.read(pair.wrapping_add(layout.tuple_items as u64), &mut header)
            || !memory.read(header[0], key_words(&mut scratch.words))
        {
            continue;
        }
        let length = field(&scratch.words, layout.var_size);
        let first = field(&scratch.words, layout.bytes_data);
        let second = field(&scratch.words, layout.bytes_data + 8);
        if length == 12 && first == const { key(b"x-reques") } && second & 0xffff_ffff == const { key(b"t-id") } {
            copy_object(memory, header[1], &mut out.request_id);
        } else if length == 11 && first == const { key(b"tracepar") } && second & 0xff_ffff == const { key(b"ent") } {
            copy_object(memory, header[1], &mut out.traceparent);
        }
    }
}

#[inline(always)]
fn clear<const N: usize>(object: &mut [u8; N]) {
    // Enough to make the object's length, so the object, nothing; clearing all of it byte by byte is costly in BPF.
    let mut i = 0;
    while i < 48 && i < N {
        object[i] = 0;
        i += 1;
    }
}

/// Copies the head of an object, up to the end of its page when the next one is not there.
#[inline(always)]
fn copy_object<M: Memory, const N: usize>(memory: &M, object: u64, to: &mut [u8; N]) {
    // SAFETY: `to` holds N bytes.
    if object != 0 && unsafe { memory.read_raw(object, to.as_mut_ptr(), N) } {
        return;
    }
    clear(to);
    let in_page = 4096 - (object & 4095);
    if object != 0 && in_page < N as u64 {
        // SAFETY: less than N bytes.
        unsafe { memory.read_raw(object, to.as_mut_ptr(), in_page as usize) };
    }
}
