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
const FRAME_BYTES: u64 = 8 * FRAME_WORDS as u64;
/// Frames that call each other directly stand on the thread's data stack, the caller's below (`_PyThreadState_PushFrame`,
/// pycore_frame.h): where one is so close to the last, what is below it is read in the same go, up to so many words.
const WINDOW_WORDS: usize = 256;
const WINDOW_BYTES: u64 = 8 * WINDOW_WORDS as u64;
const CLOSE_BYTES: u64 = WINDOW_BYTES / 2;
/// Chunks of that stack begin with a page: what is below may not be there.
const PAGE_BYTES: u64 = 4096;
const MAX_LOCALS: usize = 2 * MAX_FRAMES;
/// Different dicts among the frames' first two locals that are tried as the ASGI scope, the outermost first.
pub const SCOPE_CANDIDATES: usize = 3;
/// Entries of a dict that are looked at; uvicorn's scope has 13, FastAPI adds about as many.
const MAX_DICT_ENTRIES: usize = 32;
/// Headers that are looked at.
const MAX_HEADERS: usize = 32;

const _: () = assert!(MAX_HEADERS <= 2 * MAX_DICT_ENTRIES);

/// Scratch memory of the walks of one thread; in the kernel it lives in a map.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Scratch {
    words: [u64; 16],
    /// Where the window begins, how much of it is there, and with which word of it the frame begins that was read.
    window_start: u64,
    window_bytes: u64,
    frame_at: u64,
    /// The scope whose request was copied before, if that copy is still the current step's; else 0.
    pub known_scope: u64,
    /// The local that led to it, which may be a cell, and where it stood: how many locals from the outermost frame's first
    /// one, itself counted.
    known_local: u64,
    known_local_depth: u64,
    /// By which code the frames got there, from the outermost one; 0: nothing is known.
    known_way: u64,
    /// How many locals the last walk saw, and how many of them were not looked at yet: the first ones.
    locals_count: u64,
    locals_left: u64,
    /// The dict that was found last.
    last_dict: u64,
    fields: ScopeFields,
    /// Those of the request's own scope.
    request: ScopeFields,
    /// The keys of scopes seen before. Servers write them as literals, which the interpreter keeps once: knowing an
    /// address saves reading the string. Whoever reuses the memory for another process clears it.
    keys: ScopeFields,
    /// The second and the first local of each frame of the last walk, innermost frame first.
    locals: [u64; MAX_LOCALS],
    /// Several frames, and room for one that is said to begin with the last word.
    window: [u64; WINDOW_WORDS + FRAME_WORDS],
    /// Of the dict that is looked at, then the headers.
    entry_count: u64,
    entries: [[u64; 2]; MAX_DICT_ENTRIES],
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            words: [0; 16],
            window_start: 0,
            window_bytes: 0,
            frame_at: 0,
            known_scope: 0,
            known_local: 0,
            known_local_depth: 0,
            known_way: 0,
            locals_count: 0,
            locals_left: 0,
            last_dict: 0,
            fields: ScopeFields::NONE,
            request: ScopeFields::NONE,
            keys: ScopeFields::NONE,
            locals: [0; MAX_LOCALS],
            window: [0; WINDOW_WORDS + FRAME_WORDS],
            entry_count: 0,
            entries: [[0; 2]; MAX_DICT_ENTRIES],
        }
    }
}

/// The last thing captured on one thread, and the walk's working memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CaptureBuffer {
    pub record: CaptureRecord,
    pub scratch: Scratch,
}

#[cfg(feature = "user")]
// SAFETY: integers through and through, without padding: both structs are multiples of 8 bytes.
unsafe impl aya::Pod for CaptureBuffer {}

impl Scratch {
    /// Forgets what is true of one process only.
    #[inline(always)]
    pub fn change_process(&mut self) {
        self.known_scope = 0;
        self.known_way = 0;
        self.keys = ScopeFields::NONE;
    }
}

/// Addresses of the values of one scope dict.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ScopeFields {
    kind: u64,
    path: u64,
    method: u64,
    headers: u64,
    client: u64,
    route: u64,
}

impl ScopeFields {
    const NONE: Self = Self { kind: 0, path: 0, method: 0, headers: 0, client: 0, route: 0 };
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
    scratch.locals_count = 0;
    scratch.locals_left = 0;
    scratch.last_dict = 0;
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
    let (mut count, mut last) = (0, 0);
    scratch.window_bytes = 0;
    for i in 0..MAX_FRAMES {
        if frame == 0 {
            status = WalkStatus::Complete;
            break;
        }
        if !read_frame(memory, frame, last, scratch) {
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
            scratch.locals[2 * i] = field(&scratch.words, layout.frame_locals + 8);
            scratch.locals[2 * i + 1] = field(&scratch.words, layout.frame_locals);
        } else {
            out.frames[i] = RawFrame { code: FRAME_SHIM, instr: frame, fingerprint: 0 };
            scratch.locals[2 * i] = 0;
            scratch.locals[2 * i + 1] = 0;
        }
        count = i + 1;
        last = frame;
        frame = field(&scratch.words, layout.frame_previous);
    }
    scratch.locals_count = 2 * count as u64;
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
    let (mut count, mut last) = (0, 0);
    scratch.window_bytes = 0;
    for i in 0..HOLDER_FRAMES {
        if frame == 0 || !read_frame(memory, frame, last, scratch) {
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
        last = frame;
        frame = field(&scratch.words, layout.frame_previous);
    }
    out.frame_count = count as u32;
}

/// Reads `frame`, which called the one at `last` (0: none), to the scratch's words.
#[inline(always)]
fn read_frame<M: Memory>(memory: &M, frame: u64, last: u64, scratch: &mut Scratch) -> bool {
    let at = frame.wrapping_sub(read_back(&scratch.window_start));
    if at < WINDOW_BYTES && at + FRAME_BYTES <= read_back(&scratch.window_bytes) && at & 7 == 0 {
        take_from_window(scratch, at);
        return true;
    }
    if last.wrapping_sub(frame) < CLOSE_BYTES {
        let end = frame.wrapping_add(FRAME_BYTES);
        let start = (frame & !(PAGE_BYTES - 1)).max(end.wrapping_sub(WINDOW_BYTES));
        scratch.window_start = start;
        scratch.window_bytes = end.wrapping_sub(start);
        let length = read_back(&scratch.window_bytes).min(WINDOW_BYTES);
        // SAFETY: at most as much as there is room for.
        if unsafe { memory.read_raw(start, scratch.window.as_mut_ptr().cast(), length as usize) } {
            scratch.window_bytes = length;
            take_from_window(scratch, length.wrapping_sub(FRAME_BYTES));
            return true;
        }
        scratch.window_bytes = 0;
    }
    read_one_frame(memory, frame, &mut scratch.words)
}

/// Copies the frame at byte `at` of the window.
#[inline(always)]
fn take_from_window(scratch: &mut Scratch, at: u64) {
    scratch.frame_at = at >> 3;
    let first = read_back(&scratch.frame_at) as usize & (WINDOW_WORDS - 1);
    for n in 0..FRAME_WORDS {
        scratch.words[n] = scratch.window[first + n];
    }
}

/// The last frame of a stack chunk may end less than [`FRAME_WORDS`] before unmapped memory: then without its locals.
#[inline(always)]
fn read_one_frame<M: Memory>(memory: &M, frame: u64, words: &mut [u64; 16]) -> bool {
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

/// What an earlier loop stored. To the verifier every number of iterations it may have had would be a case of its own;
/// a value that comes from memory is one it knows nothing of.
#[inline(always)]
fn read_back(value: &u64) -> u64 {
    // SAFETY: a reference.
    unsafe { core::ptr::read_volatile(value) }
}

/// The next dict, from the outermost frame inwards, among the first two locals of the frames of the last walk; 0: no
/// more. The scope stands in the first frames of the server's that are looked at, so most locals never are.
#[inline(always)]
fn next_dict<M: Memory>(memory: &M, layout: &PyLayout, scratch: &mut Scratch) -> u64 {
    for _ in 0..MAX_LOCALS {
        let left = scratch.locals_left;
        if left == 0 {
            break;
        }
        scratch.locals_left = left - 1;
        let local = scratch.locals[((left - 1) & (MAX_LOCALS as u64 - 1)) as usize];
        let dict = dict_behind(memory, layout, local, scratch.last_dict);
        if dict != 0 {
            scratch.last_dict = dict;
            return dict;
        }
    }
    0
}

/// The dict that a local is, or that its cell holds; 0 if there is none, or if it is `last`.
#[inline(always)]
fn dict_behind<M: Memory>(memory: &M, layout: &PyLayout, local: u64, last: u64) -> u64 {
    // Stack references carry tags in their low bits.
    let mut object = local & !3;
    if object < 4096 || object == last {
        return 0;
    }
    let mut of_type = memory.read_u64(object.wrapping_add(layout.ob_type as u64));
    if of_type == layout.cell_type {
        object = memory.read_u64(object.wrapping_add(layout.cell_ref as u64));
        if object < 4096 || object == last {
            return 0;
        }
        of_type = memory.read_u64(object.wrapping_add(layout.ob_type as u64));
    }
    if of_type == layout.dict_type { object } else { 0 }
}

/// Copies the request from the outermost ASGI scope among `frames`, those of the last walk, the route from the first that
/// has one (middleware may hand on a copy). What was copied before of the [known scope](Scratch::known_scope) stays.
#[inline(always)]
pub fn snapshot_request<M: Memory>(
    memory: &M,
    layout: &PyLayout,
    scratch: &mut Scratch,
    frames: &[RawFrame; MAX_FRAMES],
    out: &mut RequestSnapshot,
) {
    let locals_count = read_back(&scratch.locals_count);
    let at = locals_count.wrapping_sub(scratch.known_local_depth);
    let local = scratch.locals[(at & (MAX_LOCALS as u64 - 1)) as usize];
    // Nearly always: the same scope as before, in the same place.
    if scratch.known_scope != 0 && out.route != 0 && at < locals_count && local == scratch.known_local {
        return;
    }
    let mut outermost = 0;
    // Mostly, in another step: where the same code kept it before. What its callers have was looked into then.
    if scratch.known_way != 0 && at < locals_count && scratch.known_way == way(scratch, frames) {
        outermost = dict_behind(memory, layout, local, 0);
        scratch.last_dict = outermost;
        scratch.locals_left = at;
        // Unless it is a request's again, the next look begins with the outermost frame.
        scratch.known_way = 0;
    }
    if outermost == 0 {
        scratch.locals_left = locals_count;
        outermost = next_dict(memory, layout, scratch);
    }
    if outermost != 0 && outermost == scratch.known_scope && out.route != 0 {
        return;
    }
    snapshot_dicts(memory, layout, outermost, scratch, out);
    if out.scope != 0 {
        scratch.known_way = way(scratch, frames);
    }
}

/// The code from the outermost frame to the one of the known local, in one number.
#[inline(always)]
fn way(scratch: &Scratch, frames: &[RawFrame; MAX_FRAMES]) -> u64 {
    let count = read_back(&scratch.locals_count) / 2;
    let frames_to_it = read_back(&scratch.known_local_depth).div_ceil(2);
    let mut way = frames_to_it;
    for i in 0..MAX_FRAMES as u64 {
        if i >= frames_to_it {
            break;
        }
        let at = count.wrapping_sub(1 + i) & (MAX_FRAMES as u64 - 1);
        way = way.rotate_left(7) ^ frames[at as usize].code;
    }
    way
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
    scratch.locals_left = 0;
    snapshot_dicts(memory, layout, scope, scratch, out);
    out.scope != 0
}

/// Tries `dict`, then the next ones.
#[inline(always)]
fn snapshot_dicts<M: Memory>(
    memory: &M,
    layout: &PyLayout,
    mut dict: u64,
    scratch: &mut Scratch,
    out: &mut RequestSnapshot,
) {
    out.scope = 0;
    out.route = 0;
    for i in 0..SCOPE_CANDIDATES {
        if dict == 0 {
            break;
        }
        find_fields(memory, layout, dict, scratch);
        if is_request(memory, layout, &scratch.fields, &mut scratch.words) {
            if out.scope == 0 {
                out.scope = dict;
                scratch.request = scratch.fields;
                let at = scratch.locals_left;
                scratch.known_local = scratch.locals[(at & (MAX_LOCALS as u64 - 1)) as usize];
                scratch.known_local_depth = scratch.locals_count.wrapping_sub(at);
            }
            out.route = scratch.fields.route;
        }
        if i + 1 == SCOPE_CANDIDATES || (out.scope != 0 && out.route != 0) {
            break;
        }
        dict = next_dict(memory, layout, scratch);
    }
    if out.scope != 0 {
        copy_request(memory, layout, scratch, out);
    }
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
    scratch.fields = ScopeFields::NONE;
    let keys = memory.read_u64(dict.wrapping_add(layout.dict_keys as u64));
    let mut header = [0u64; 4];
    if !memory.read(keys, &mut header) {
        return;
    }
    let log2_index_bytes = (header[1] >> 8) & 31;
    let general = (header[1] >> 16) & 0xff == 0;
    let entries = keys.wrapping_add(32 + (1 << log2_index_bytes));
    scratch.entry_count = header[3];
    if general {
        // Its entries begin with the hash.
        for i in 0..MAX_DICT_ENTRIES {
            if i as u64 >= read_back(&scratch.entry_count)
                || !memory.read(entries.wrapping_add(i as u64 * 24 + 8), &mut scratch.entries[i])
            {
                break;
            }
        }
    } else {
        let count = read_back(&scratch.entry_count).min(MAX_DICT_ENTRIES as u64);
        // SAFETY: `count` entries fit.
        if !unsafe { memory.read_raw(entries, scratch.entries.as_mut_ptr().cast(), (count * 16) as usize) } {
            return;
        }
    }
    for i in 0..MAX_DICT_ENTRIES {
        if i as u64 >= read_back(&scratch.entry_count) {
            break;
        }
        let [key, value] = scratch.entries[i];
        match key {
            0 => {}
            key if key == scratch.keys.kind => scratch.fields.kind = value,
            key if key == scratch.keys.path => scratch.fields.path = value,
            key if key == scratch.keys.method => scratch.fields.method = value,
            key if key == scratch.keys.headers => scratch.fields.headers = value,
            key if key == scratch.keys.client => scratch.fields.client = value,
            key if key == scratch.keys.route => scratch.fields.route = value,
            _ => {}
        }
    }
    let found = &scratch.fields;
    if found.kind != 0 && found.path != 0 && found.headers != 0 && scratch.keys.route != 0 {
        return;
    }
    // Keys that are not known yet, or not the ones known.
    for i in 0..MAX_DICT_ENTRIES {
        if i as u64 >= read_back(&scratch.entry_count) {
            break;
        }
        find_field(memory, layout, i, scratch);
    }
}

/// Reads the key of entry `i`: whether it is one of those of interest.
#[inline(always)]
fn find_field<M: Memory>(memory: &M, layout: &PyLayout, i: usize, scratch: &mut Scratch) {
    let [key_object, value] = scratch.entries[i];
    if key_object == 0 || value == 0 || !memory.read(key_object, key_words(&mut scratch.words)) {
        return;
    }
    let length = field(&scratch.words, layout.str_length);
    let first = field(&scratch.words, layout.str_ascii_data);
    // What Litestar keeps instead of a route: a string.
    if length == 13
        && first == const { key(b"path_tem") }
        && field(&scratch.words, layout.str_ascii_data + 8) & 0xff_ffff_ffff == const { key(b"plate") }
    {
        (scratch.keys.route, scratch.fields.route) = (key_object, value);
        return;
    }
    if length == 0 || length > 8 {
        return;
    }
    let name = first & (u64::MAX >> ((64 - length * 8) & 63));
    if name == const { key(b"type") } {
        (scratch.keys.kind, scratch.fields.kind) = (key_object, value);
    } else if name == const { key(b"path") } {
        (scratch.keys.path, scratch.fields.path) = (key_object, value);
    } else if name == const { key(b"method") } {
        (scratch.keys.method, scratch.fields.method) = (key_object, value);
    } else if name == const { key(b"headers") } {
        (scratch.keys.headers, scratch.fields.headers) = (key_object, value);
    } else if name == const { key(b"client") } {
        (scratch.keys.client, scratch.fields.client) = (key_object, value);
    } else if name == const { key(b"route") } {
        (scratch.keys.route, scratch.fields.route) = (key_object, value);
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
    let items = memory.read_u64(headers.wrapping_add(layout.list_items as u64));
    scratch.entry_count = memory.read_u64(headers.wrapping_add(layout.var_size as u64));
    let count = read_back(&scratch.entry_count).min(MAX_HEADERS as u64);
    // SAFETY: so many words fit.
    if !unsafe { memory.read_raw(items, scratch.entries.as_mut_ptr().cast(), (count * 8) as usize) } {
        return;
    }
    for i in 0..MAX_HEADERS {
        if i as u64 >= read_back(&scratch.entry_count) {
            break;
        }
        let pair = scratch.entries.as_flattened()[i];
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

#[cfg(test)]
mod tests {
    use core::cell::Cell;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    use super::*;

    const DICT_TYPE: u64 = 0x1000_0000;
    const CELL_TYPE: u64 = 0x2000_0000;
    const SCOPE: u64 = 0x10_0000;
    const OTHER: u64 = 0x20_0000;
    const CELL: u64 = 0x30_0000;

    const FRAMES: [RawFrame; MAX_FRAMES] = [RawFrame { code: 0, instr: 0, fingerprint: 0 }; MAX_FRAMES];

    /// Words by address; others are 0. Counts what is read.
    #[derive(Default)]
    struct Words {
        words: BTreeMap<u64, u64>,
        reads: Cell<usize>,
        /// Nothing below can be read.
        begins: u64,
    }

    impl Memory for Words {
        unsafe fn read_raw(&self, address: u64, to: *mut u8, length: usize) -> bool {
            self.reads.set(self.reads.get() + 1);
            if address < self.begins {
                return false;
            }
            let word = |at: u64| self.words.get(&(at & !7)).map_or(0, |word| word >> ((at & 7) * 8));
            for at in 0..length {
                // SAFETY: within what the caller promised.
                unsafe { *to.add(at) = word(address + at as u64) as u8 };
            }
            true
        }
    }

    impl Words {
        fn put(&mut self, address: u64, words: &[u64]) {
            self.words.extend(words.iter().enumerate().map(|(n, word)| (address + 8 * n as u64, *word)));
        }

        fn string(&mut self, at: u64, text: &[u8]) -> u64 {
            self.put(at + 16, &[text.len() as u64]);
            self.put(at + 40, &text.chunks(8).map(key).collect::<Vec<_>>());
            at
        }

        fn dict(&mut self, at: u64, entries: &[(&[u8], u64)]) {
            let keys = at + 0x1000;
            self.put(at + 8, &[DICT_TYPE]);
            self.put(at + 32, &[keys]);
            // Eight bytes of index, keys that are all strings.
            self.put(keys, &[1, 3 << 8 | 1 << 16, 0, entries.len() as u64]);
            for (n, (name, value)) in entries.iter().enumerate() {
                let name = self.string(at + 0x2000 + 0x100 * n as u64, name);
                self.put(keys + 40 + 16 * n as u64, &[name, *value]);
            }
        }
    }

    fn layout() -> PyLayout {
        PyLayout {
            dict_type: DICT_TYPE,
            cell_type: CELL_TYPE,
            ob_type: 8,
            cell_ref: 16,
            dict_keys: 32,
            str_length: 16,
            str_ascii_data: 40,
            var_size: 16,
            list_items: 24,
            ..PyLayout::default()
        }
    }

    #[test]
    fn the_template_of_a_path_stands_under_one_of_two_names() {
        for (name, is_route) in
            [(&b"route"[..], true), (b"path_template", true), (b"path_templates", false), (b"path_tem", false)]
        {
            let mut memory = Words::default();
            let http = memory.string(0x40_0000, b"http");
            memory.dict(SCOPE, &[(b"type", http), (b"path", 0x41_0000), (b"headers", 0x42_0000), (name, 0x43_0000)]);
            let mut scratch = Scratch::default();
            // SAFETY: integers only.
            let mut out: RequestSnapshot = unsafe { core::mem::zeroed() };
            assert!(snapshot_scope(&memory, &layout(), SCOPE, &mut scratch, &mut out));
            assert_eq!(out.route, if is_route { 0x43_0000 } else { 0 });
        }
    }

    /// Every wait is looked at: what was copied in the same step already must cost no more reads, also behind a cell
    /// and below dicts that are no scopes.
    #[test]
    fn a_request_that_is_known_is_not_read_again() {
        let layout = layout();
        let mut memory = Words::default();
        let http = memory.string(0x40_0000, b"http");
        memory.dict(OTHER, &[(b"type", http)]);
        memory.dict(SCOPE, &[(b"type", http), (b"path", 0x41_0000), (b"headers", 0x42_0000), (b"route", 0x43_0000)]);
        memory.put(CELL + 8, &[CELL_TYPE, SCOPE]);
        let mut scratch = Scratch::default();
        // SAFETY: integers only.
        let mut out: RequestSnapshot = unsafe { core::mem::zeroed() };
        let mut snapshot = |known_scope: u64, locals: &[u64]| {
            scratch.locals[..locals.len()].copy_from_slice(locals);
            scratch.locals_count = locals.len() as u64;
            scratch.last_dict = 0;
            scratch.known_scope = known_scope;
            memory.reads.set(0);
            snapshot_request(&memory, &layout, &mut scratch, &FRAMES, &mut out);
            (memory.reads.get(), out.scope)
        };
        let locals: Vec<u64> = [0, 0, 0, CELL, OTHER, 0].into();
        let (reads, scope) = snapshot(0, &locals);
        assert!(reads > 0 && scope == SCOPE);
        assert_eq!(snapshot(SCOPE, &locals), (0, SCOPE));
        // One call deeper.
        assert_eq!(snapshot(SCOPE, &[&[7, 7], &locals[..]].concat()), (0, SCOPE));
        // In another step it may be another request, and elsewhere it is one.
        assert!(snapshot(0, &locals).0 > 0);
        assert_eq!(snapshot(SCOPE, &[0, 0, 0, 0, OTHER, 0]).1, 0);
    }

    /// A server calls all its handlers by the same way, so the next request stands where the last one stood.
    #[test]
    fn another_request_is_looked_for_where_the_last_one_stood() {
        const NEXT: u64 = 0x50_0000;
        let layout = layout();
        let mut memory = Words::default();
        let http = memory.string(0x40_0000, b"http");
        let lifespan = memory.string(0x48_0000, b"lifespan");
        memory.dict(OTHER, &[(b"kind", http), (b"name", http), (b"owner", http)]);
        for (scope, kind) in [(SCOPE, http), (NEXT, http), (SCOPE + 0x8_0000, lifespan)] {
            memory.dict(scope, &[(b"type", kind), (b"path", kind), (b"headers", 0x42_0000), (b"route", 0x43_0000)]);
        }
        let mut scratch = Scratch::default();
        // SAFETY: integers only.
        let mut out: RequestSnapshot = unsafe { core::mem::zeroed() };
        // Each in a step of its own; `codes` and `locals` innermost first.
        let mut snapshot = |codes: &[u64], locals: &[u64]| {
            let mut frames = FRAMES;
            for (frame, code) in frames.iter_mut().zip(codes) {
                frame.code = *code;
            }
            scratch.locals[..locals.len()].copy_from_slice(locals);
            scratch.locals_count = locals.len() as u64;
            scratch.last_dict = 0;
            scratch.known_scope = 0;
            memory.reads.set(0);
            snapshot_request(&memory, &layout, &mut scratch, &frames, &mut out);
            (memory.reads.get(), out.scope)
        };
        let (first, scope) = snapshot(&[30, 20, 10], &[0, 0, 0, SCOPE, OTHER, OTHER]);
        assert_eq!(scope, SCOPE);
        let (next, scope) = snapshot(&[30, 20, 10], &[0, 0, 0, NEXT, OTHER, OTHER]);
        assert_eq!(scope, NEXT);
        // Neither the other dict nor its keys.
        assert!(next + 4 < first, "{next} after {first}");
        // One call deeper it stands as far from the outermost frame.
        let deeper = snapshot(&[40, 30, 20, 10], &[0, 0, 0, 0, 0, NEXT, OTHER, OTHER]);
        assert!(deeper.0 <= next && deeper.1 == NEXT, "{deeper:?} after {next}");
        // By another way an outer frame may have one as well.
        let (by_another_way, scope) = snapshot(&[30, 20, 11], &[0, 0, 0, NEXT, SCOPE, OTHER]);
        assert!(by_another_way > next && scope == SCOPE);
        // What is there is no request's: the next time nothing is taken for granted.
        assert_eq!(snapshot(&[30, 20, 11], &[0, NEXT, 0, OTHER, SCOPE + 0x8_0000, OTHER]).1, NEXT);
        assert_eq!(snapshot(&[30, 20, 11], &[0, 0, 0, 0, 7, OTHER]).1, 0);
        assert_eq!(snapshot(&[30, 20, 11], &[0, 0, 0, 0, NEXT, SCOPE]).1, SCOPE);
    }

    /// What a walk saw of frames at these addresses, innermost first, and how often it read. Each frame says where it is.
    fn walked(addresses: &[u64], begins: u64) -> (Vec<u64>, WalkStatus, usize) {
        const STATE: u64 = 0x9000_0000;
        const CODE: u64 = 0x9100_0000;
        let layout = PyLayout {
            ts_frame: 16,
            cframe_frame: ABSENT,
            ts_native_thread_id: 8,
            ts_running_task: ABSENT,
            frame_is_entry: ABSENT,
            frame_previous: 8,
            frame_instr: 56,
            frame_owner: 70,
            frame_locals: 80,
            shim_owner: 3,
            ..layout()
        };
        let mut memory = Words { begins, ..Words::default() };
        memory.put(STATE + 8, &[1, addresses[0]]);
        for (n, frame) in addresses.iter().enumerate() {
            let previous = addresses.get(n + 1).copied().unwrap_or(0);
            memory.put(*frame, &[CODE, previous, 0, 0, 0, 0, 0, *frame, 0, 0, *frame + 1, *frame + 2]);
        }
        let mut scratch = Scratch::default();
        // SAFETY: integers only.
        let mut record: CaptureRecord = unsafe { core::mem::zeroed() };
        walk_frames(&memory, &layout, PyThread { state: STATE, native_thread_id: 1 }, &mut scratch, &mut record);
        let frames = &record.frames[..record.frame_count as usize];
        for (n, frame) in frames.iter().enumerate() {
            assert_eq!(scratch.locals[2 * n..2 * n + 2], [frame.instr + 2, frame.instr + 1]);
        }
        let status = [WalkStatus::Complete, WalkStatus::TooDeep]
            .into_iter()
            .find(|status| *status as u32 == record.walk)
            .expect("a walk that came to an end");
        (frames.iter().map(|frame| frame.instr).collect(), status, memory.reads.get())
    }

    /// Every wait is looked at: frames that stand side by side are not read one by one.
    #[test]
    fn frames_that_call_each_other_are_read_together() {
        const TOP: u64 = 0x5000_3e00;
        let stack: Vec<u64> = (0..50).map(|n| TOP - 128 * n).collect();
        let (seen, status, reads) = walked(&stack, 0x5000_0000);
        assert_eq!((&seen, status), (&stack, WalkStatus::Complete));
        // One each for their code, and for three pages of frames some more.
        assert!((54..64).contains(&reads), "{reads}");

        // Anywhere else, and in between: coroutines have theirs for themselves.
        let coroutines: Vec<u64> = (0..20).map(|n| 0x6000_0000 + 0x1_0000 * (n * 7 % 20)).collect();
        let (seen, _, reads) = walked(&coroutines, 0);
        assert_eq!((seen, reads), (coroutines.clone(), 2 + 40));
        let mixed: Vec<u64> = stack[..30].iter().zip(&coroutines).flat_map(|(a, b)| [*a, *b]).collect();
        assert_eq!(walked(&mixed, 0).0, mixed);
        // In any order, side by side: some stand right below what was read last, or reach into it.
        for step in [1, 7, 37, 59] {
            let shuffled: Vec<u64> = (0..60).map(|n| TOP - FRAME_BYTES * (n * step % 60)).collect();
            assert_eq!(walked(&shuffled, 0).0, shuffled, "{step}");
        }
    }

    #[test]
    fn nothing_is_read_below_the_page_of_a_frame() {
        // A chunk begins with its page, and there is nothing before it.
        let stack: Vec<u64> = (0..20).map(|n| 0x5000_1000 + 128 * (19 - n)).collect();
        let (seen, status, reads) = walked(&stack, 0x5000_1000);
        assert_eq!((seen, status), (stack, WalkStatus::Complete));
        assert!(reads < 30, "{reads}");
    }
}
