//! Turns a CPython version, and from 3.13 on the `_Py_DebugOffsets` it carries, into where that build keeps its fields.
//!
//! All offsets are bytes. 3.11 and 3.12 come from `offsetof` over their headers (`Include/internal/pycore_*.h`); later
//! versions describe themselves at the start of `_PyRuntime` (`pycore_runtime.h`, from 3.14 `pycore_debug_offsets.h`),
//! but for the few fields listed in [`Undescribed`].

use loopguard_common::layout::{ABSENT, PyLayout};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Bytes of `_PyRuntime` that hold every version's `_Py_DebugOffsets`.
pub const DEBUG_OFFSETS_SIZE: usize = 2048;
const COOKIE: &[u8; 8] = b"xdebugpy";
/// No field of a struct that loopguard reads lies further in; more is a sign of a wrong table.
const MAX_OFFSET: u64 = 1 << 20;

/// Where one build keeps what only user space reads, beside the [`PyLayout`] the kernel is told as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offsets {
    pub layout: PyLayout,
    /// `_PyRuntimeState.interpreters.head`.
    pub interpreters_head: u64,
    /// `PyInterpreterState`.
    pub interpreter_next: u64,
    pub threads_head: u64,
    /// The dict `sys.modules`.
    pub modules: u64,
    pub gil: Gil,
    /// `PyThreadState`.
    pub thread_next: u64,
    pub running_loop: RunningLoop,
    /// `_PyInterpreterFrame.stacktop` (an index, before 3.14) or `.stackpointer` (an address).
    pub frame_stack: u64,
    pub stack: StackTop,
    /// `PyCodeObject`.
    pub code_filename: u64,
    pub code_linetable: u64,
    pub code_firstlineno: u64,
    pub code_localsplusnames: u64,
    pub code_nlocalsplus: u64,
    pub code_adaptive: u64,
    /// `PyASCIIObject.state`.
    pub str_state: u64,
    /// Size of `PyCompactUnicodeObject`: where a string's characters start that is not ASCII.
    pub str_compact_data: u64,
    /// `PyDictObject.ma_values`.
    pub dict_values: u64,
    /// `PyDictValues.values`.
    pub values_start: u64,
    pub instance_dict: InstanceDict,
    /// `PyHeapTypeObject.ht_cached_keys`.
    pub cached_keys: u64,
    /// `PyGenObject`.
    pub generator_frame: u64,
    pub generator_qualname: u64,
    /// `PyGenObject.gi_frame_state`, one signed byte.
    pub generator_state: u64,
    /// `PySetObject`; 0 before 3.14, where nothing needs it.
    pub set_mask: u64,
    pub set_table: u64,
    /// `TaskObj`; from 3.14 on replaced by [`AsyncioOffsets`].
    pub task_coro: u64,
    pub task_name: u64,
}

/// Where the `struct _gil_runtime_state` is (`pycore_gil.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gil {
    /// At this offset of `_PyRuntime` (3.11).
    InRuntime(u64),
    /// Pointed to from this offset of the interpreter state (3.12 on).
    Behind(u64),
}

/// Where a thread's running event loop is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunningLoop {
    /// In a holder under `__asyncio_running_event_loop__` in the dict at this offset of the thread state (3.11, 3.12).
    InDict(u64),
    /// At this offset of the thread state (3.13 on: `_PyThreadStateImpl.asyncio_running_loop`).
    InThread(u64),
}

/// How a suspended frame says how many values its stack holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StackTop {
    Index,
    Pointer,
}

/// Where an instance's attributes are when its type has `Py_TPFLAGS_MANAGED_DICT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstanceDict {
    /// 3.11: values 32 bytes before the object, else a dict 24 bytes before it.
    ValuesOrDict,
    /// 3.12: one word 24 bytes before the object; bit 0 set: values at that word + 1, else a dict.
    Tagged,
    /// 3.13 on: a dict 24 bytes before the object, else values inline after the object.
    Inline,
}

/// What the `_asyncio` extension says of itself from 3.14 on (`Py_AsyncioModuleDebugOffsets`, section `.AsyncioDebug`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AsyncioOffsets {
    pub task_name: u64,
    pub task_awaited_by: u64,
    pub task_awaited_by_is_set: u64,
    pub task_coro: u64,
    pub running_task: u64,
    /// Where a task is linked into the list of its thread's tasks, and where the thread state has the list's head.
    #[serde(default)]
    pub task_node: u64,
    #[serde(default)]
    pub tasks_head: u64,
}

/// Bytes of `.AsyncioDebug` that are read.
pub const ASYNCIO_OFFSETS_SIZE: usize = 13 * 8;

impl AsyncioOffsets {
    /// `None` when the bytes can't be such a table.
    pub fn parse(bytes: &[u8; ASYNCIO_OFFSETS_SIZE]) -> Option<Self> {
        let word = |index: usize| u64::from_le_bytes(bytes.as_chunks::<8>().0[index]);
        let offsets = Self {
            task_name: word(1),
            task_awaited_by: word(2),
            task_awaited_by_is_set: word(4),
            task_coro: word(5),
            running_task: word(11),
            task_node: word(6),
            tasks_head: word(12),
        };
        let task_size = word(0);
        let within = [offsets.task_name, offsets.task_awaited_by, offsets.task_awaited_by_is_set, offsets.task_coro]
            .iter()
            .all(|&offset| 0 < offset && offset < task_size);
        (within && task_size < 4096 && 0 < offsets.running_task && offsets.running_task < word(9).min(ABSENT.into()))
            .then_some(offsets)
    }
}

#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum BadOffsets {
    #[error("no table for this version")]
    Version,
    #[error("it runs without the GIL")]
    FreeThreaded,
    #[error("its _Py_DebugOffsets make no sense")]
    Nonsense,
}

/// Offsets of 3.`minor`; `head` is the start of `_PyRuntime`. Addresses in the layout are still 0.
pub fn offsets(minor: u32, head: &[u8]) -> Result<Offsets, BadOffsets> {
    match minor {
        11 => Ok(PYTHON_3_11),
        12 => Ok(PYTHON_3_12),
        13 => described(head, FIELDS_3_13, &UNDESCRIBED_3_13),
        14 => described(head, FIELDS_3_14, &UNDESCRIBED_3_14),
        15 => described(head, FIELDS_3_15, &UNDESCRIBED_3_15),
        _ => Err(BadOffsets::Version),
    }
}

/// `(major, minor, micro)` of a `PY_VERSION_HEX`.
pub fn version_of_hex(hex: u64) -> (u32, u32, u32) {
    ((hex >> 24 & 0xff) as u32, (hex >> 16 & 0xff) as u32, (hex >> 8 & 0xff) as u32)
}

/// `PY_VERSION_HEX` as `_Py_DebugOffsets` says it; `None`: `head` does not begin with one (before 3.13).
pub fn described_version(head: &[u8]) -> Option<u64> {
    let words = head.as_chunks::<8>().0;
    (words.first()? == COOKIE).then(|| words.get(1).map(|word| u64::from_le_bytes(*word)))?
}

/// Where the `GIL`'s futexes are: two longs, two words, then a condition and a mutex, twice.
pub const GIL_SIZE: u64 =
    32 + 2 * (size_of::<libc::pthread_cond_t>() as u64 + size_of::<libc::pthread_mutex_t>() as u64);

/// What is the same in every supported version with the GIL, on 64-bit machines.
const COMMON_LAYOUT: PyLayout = PyLayout {
    dict_type: 0,
    cell_type: 0,
    ts_frame: 0,
    cframe_frame: ABSENT,
    ts_native_thread_id: 0,
    ts_running_task: ABSENT,
    frame_executable: 0,
    frame_previous: 8,
    frame_instr: 56,
    frame_owner: 70,
    frame_locals: 72,
    // FRAME_OWNED_BY_CSTACK, and from 3.14 on FRAME_OWNED_BY_INTERPRETER.
    shim_owner: 3,
    code_qualname: 128,
    ob_type: 8,
    dict_keys: 32,
    str_length: 16,
    str_ascii_data: 40,
    tuple_items: 24,
    list_items: 24,
    var_size: 16,
    bytes_data: 32,
    long_digit: 24,
    cell_ref: 16,
    frame_is_entry: ABSENT,
    _pad: [0; 2],
};

const PYTHON_3_11: Offsets = Offsets {
    layout: PyLayout {
        ts_frame: 56,
        cframe_frame: 8,
        ts_native_thread_id: 160,
        frame_executable: 32,
        frame_previous: 48,
        frame_owner: 69,
        frame_is_entry: 68,
        // No shims: every frame runs Python code.
        shim_owner: 256,
        str_ascii_data: 48,
        ..COMMON_LAYOUT
    },
    interpreters_head: 40,
    interpreter_next: 0,
    threads_head: 16,
    modules: 888,
    gil: Gil::InRuntime(360),
    thread_next: 8,
    running_loop: RunningLoop::InDict(128),
    frame_stack: 64,
    stack: StackTop::Index,
    code_filename: 112,
    code_linetable: 136,
    code_firstlineno: 72,
    code_localsplusnames: 96,
    code_nlocalsplus: 76,
    code_adaptive: 184,
    str_state: 32,
    str_compact_data: 72,
    dict_values: 40,
    values_start: 0,
    instance_dict: InstanceDict::ValuesOrDict,
    cached_keys: 872,
    generator_frame: 80,
    generator_qualname: 40,
    generator_state: 75,
    set_mask: 0,
    set_table: 0,
    task_coro: 136,
    task_name: 144,
};

const PYTHON_3_12: Offsets = Offsets {
    layout: PyLayout { ts_frame: 56, cframe_frame: 0, ts_native_thread_id: 144, ..COMMON_LAYOUT },
    threads_head: 72,
    modules: 944,
    gil: Gil::Behind(384),
    running_loop: RunningLoop::InDict(112),
    code_firstlineno: 68,
    code_nlocalsplus: 72,
    code_adaptive: 192,
    str_compact_data: 56,
    instance_dict: InstanceDict::Tagged,
    cached_keys: 880,
    generator_frame: 72,
    generator_qualname: 32,
    generator_state: 67,
    ..PYTHON_3_11
};

/// What `_Py_DebugOffsets` of a version does not say.
struct Undescribed {
    generator_frame: u64,
    cached_keys: u64,
    task_coro: u64,
    task_name: u64,
    stack: StackTop,
}

const UNDESCRIBED_3_13: Undescribed =
    Undescribed { generator_frame: 72, cached_keys: 880, task_coro: 120, task_name: 128, stack: StackTop::Index };
const UNDESCRIBED_3_14: Undescribed =
    Undescribed { task_coro: 128, task_name: 136, stack: StackTop::Pointer, ..UNDESCRIBED_3_13 };
const UNDESCRIBED_3_15: Undescribed = Undescribed { cached_keys: 888, ..UNDESCRIBED_3_14 };

/// The structs of one version's `_Py_DebugOffsets` in order, each with its fields in order; every field is a u64.
type Fields = &'static [(&'static str, &'static [&'static str])];

const RUNTIME: &[&str] = &["size", "finalizing", "interpreters_head"];
const INTERPRETER_3_13: &[&str] = &[
    "size",
    "id",
    "next",
    "threads_head",
    "gc",
    "imports_modules",
    "sysdict",
    "builtins",
    "ceval_gil",
    "gil_runtime_state",
    "gil_runtime_state_enabled",
    "gil_runtime_state_locked",
    "gil_runtime_state_holder",
];
const INTERPRETER_3_14: &[&str] = &[
    "size",
    "id",
    "next",
    "threads_head",
    "threads_main",
    "gc",
    "imports_modules",
    "sysdict",
    "builtins",
    "ceval_gil",
    "gil_runtime_state",
    "gil_runtime_state_enabled",
    "gil_runtime_state_locked",
    "gil_runtime_state_holder",
    "code_object_generation",
    "tlbc_generation",
];
const THREAD_3_13: &[&str] =
    &["size", "prev", "next", "interp", "current_frame", "thread_id", "native_thread_id", "datastack_chunk", "status"];
const THREAD_3_15: &[&str] = &[
    "size",
    "prev",
    "next",
    "interp",
    "current_frame",
    "base_frame",
    "last_profiled_frame",
    "last_profiled_frame_seq",
    "thread_id",
    "native_thread_id",
    "datastack_chunk",
    "status",
    "holds_gil",
    "gil_requested",
    "current_exception",
    "exc_state",
];
const FRAME_3_13: &[&str] = &["size", "previous", "executable", "instr_ptr", "localsplus", "owner"];
const FRAME_3_14: &[&str] =
    &["size", "previous", "executable", "instr_ptr", "localsplus", "owner", "stackpointer", "tlbc_index"];
const CODE_3_13: &[&str] = &[
    "size",
    "filename",
    "name",
    "qualname",
    "linetable",
    "firstlineno",
    "argcount",
    "localsplusnames",
    "localspluskinds",
    "co_code_adaptive",
];
const CODE_3_14: &[&str] = &[
    "size",
    "filename",
    "name",
    "qualname",
    "linetable",
    "firstlineno",
    "argcount",
    "localsplusnames",
    "localspluskinds",
    "co_code_adaptive",
    "co_tlbc",
];
const OBJECT: &[&str] = &["size", "ob_type"];
const TYPE_3_13: &[&str] = &["size", "tp_name", "tp_repr", "tp_flags"];
const TYPE_3_15: &[&str] = &["size", "tp_name", "tp_repr", "tp_flags", "tp_basicsize", "tp_dictoffset"];
const HEAP_TYPE: &[&str] = &["size", "ht_cached_keys"];
const TUPLE: &[&str] = &["size", "ob_item", "ob_size"];
const LIST: &[&str] = &["size", "ob_item", "ob_size"];
const SET: &[&str] = &["size", "used", "table", "mask"];
const DICT: &[&str] = &["size", "ma_keys", "ma_values"];
const FLOAT: &[&str] = &["size", "ob_fval"];
const LONG: &[&str] = &["size", "lv_tag", "ob_digit"];
const BYTES: &[&str] = &["size", "ob_size", "ob_sval"];
const UNICODE_3_13: &[&str] = &["size", "state", "length", "asciiobject_size"];
const UNICODE_3_15: &[&str] = &["size", "state", "length", "asciiobject_size", "compactunicodeobject_size"];
const GC_3_13: &[&str] = &["size", "collecting"];
const GC_3_15: &[&str] = &["size", "collecting", "frame", "generation_stats_size", "generation_stats"];
const GENERATOR: &[&str] = &["size", "gi_name", "gi_iframe", "gi_frame_state"];

const FIELDS_3_13: Fields = &[
    ("runtime", RUNTIME),
    ("interpreter", INTERPRETER_3_13),
    ("thread", THREAD_3_13),
    ("frame", FRAME_3_13),
    ("code", CODE_3_13),
    ("object", OBJECT),
    ("type", TYPE_3_13),
    ("tuple", TUPLE),
    ("list", LIST),
    ("dict", DICT),
    ("float", FLOAT),
    ("long", LONG),
    ("bytes", BYTES),
    ("unicode", UNICODE_3_13),
    ("gc", GC_3_13),
];
const FIELDS_3_14: Fields = &[
    ("runtime", RUNTIME),
    ("interpreter", INTERPRETER_3_14),
    ("thread", THREAD_3_13),
    ("frame", FRAME_3_14),
    ("code", CODE_3_14),
    ("object", OBJECT),
    ("type", TYPE_3_13),
    ("tuple", TUPLE),
    ("list", LIST),
    ("set", SET),
    ("dict", DICT),
    ("float", FLOAT),
    ("long", LONG),
    ("bytes", BYTES),
    ("unicode", UNICODE_3_13),
    ("gc", GC_3_13),
    ("generator", GENERATOR),
];
const FIELDS_3_15: Fields = &[
    ("runtime", RUNTIME),
    ("interpreter", INTERPRETER_3_14),
    ("thread", THREAD_3_15),
    ("exception", &["exc_value"]),
    ("frame", FRAME_3_14),
    ("code", CODE_3_14),
    ("object", OBJECT),
    ("type", TYPE_3_15),
    ("heap_type", HEAP_TYPE),
    ("tuple", TUPLE),
    ("list", LIST),
    ("set", SET),
    ("dict", DICT),
    ("float", FLOAT),
    ("long", LONG),
    ("bytes", BYTES),
    ("unicode", UNICODE_3_15),
    ("gc", GC_3_15),
    ("generator", GENERATOR),
];

/// A `_Py_DebugOffsets` and the names of its words.
struct Described<'a> {
    words: &'a [[u8; 8]],
    fields: Fields,
}

impl Described<'_> {
    /// `None`: this version does not describe it.
    fn optional(&self, of: &str, field: &str) -> Result<Option<u64>, BadOffsets> {
        // The cookie, the version and the free-threaded flag come first.
        let mut index = 3;
        for (name, fields) in self.fields {
            if *name == of {
                let Some(position) = fields.iter().position(|name| *name == field) else { return Ok(None) };
                let word = self.words.get(index + position).ok_or(BadOffsets::Nonsense)?;
                let offset = u64::from_le_bytes(*word);
                return if offset < MAX_OFFSET { Ok(Some(offset)) } else { Err(BadOffsets::Nonsense) };
            }
            index += fields.len();
        }
        Ok(None)
    }

    fn get(&self, of: &str, field: &str) -> Result<u64, BadOffsets> {
        self.optional(of, field)?.ok_or(BadOffsets::Nonsense)
    }

    fn small(&self, of: &str, field: &str) -> Result<u16, BadOffsets> {
        // The walker copies the first words of a frame and indexes them by these.
        let limit = if of == "frame" { 96 } else { ABSENT };
        self.get(of, field)?.try_into().ok().filter(|offset| *offset < limit).ok_or(BadOffsets::Nonsense)
    }
}

fn described(head: &[u8], fields: Fields, undescribed: &Undescribed) -> Result<Offsets, BadOffsets> {
    let words = head.as_chunks::<8>().0;
    if words.first() != Some(COOKIE) {
        return Err(BadOffsets::Nonsense);
    }
    match words.get(2).map(|word| u64::from_le_bytes(*word)) {
        Some(0) => {}
        Some(1) => return Err(BadOffsets::FreeThreaded),
        _ => return Err(BadOffsets::Nonsense),
    }
    let d = Described { words, fields };
    let layout = PyLayout {
        ts_frame: d.small("thread", "current_frame")?,
        ts_native_thread_id: d.small("thread", "native_thread_id")?,
        frame_executable: d.small("frame", "executable")?,
        frame_previous: d.small("frame", "previous")?,
        frame_instr: d.small("frame", "instr_ptr")?,
        frame_owner: d.small("frame", "owner")?,
        frame_locals: d.small("frame", "localsplus")?,
        code_qualname: d.small("code", "qualname")?,
        ob_type: d.small("object", "ob_type")?,
        dict_keys: d.small("dict", "ma_keys")?,
        str_length: d.small("unicode", "length")?,
        str_ascii_data: d.small("unicode", "asciiobject_size")?,
        tuple_items: d.small("tuple", "ob_item")?,
        list_items: d.small("list", "ob_item")?,
        var_size: d.small("list", "ob_size")?,
        bytes_data: d.small("bytes", "ob_sval")?,
        long_digit: d.small("long", "ob_digit")?,
        ..COMMON_LAYOUT
    };
    // What the walker takes for granted.
    if d.get("code", "linetable")? != u64::from(layout.code_qualname) + 8 {
        return Err(BadOffsets::Nonsense);
    }
    Ok(Offsets {
        layout,
        interpreters_head: d.get("runtime", "interpreters_head")?,
        interpreter_next: d.get("interpreter", "next")?,
        threads_head: d.get("interpreter", "threads_head")?,
        modules: d.get("interpreter", "imports_modules")?,
        gil: Gil::Behind(d.get("interpreter", "ceval_gil")?),
        thread_next: d.get("thread", "next")?,
        // The first field after the described struct; from 3.14 on the running task is there as well, and is used.
        running_loop: RunningLoop::InThread(d.get("thread", "size")?),
        frame_stack: d.optional("frame", "stackpointer")?.unwrap_or(PYTHON_3_12.frame_stack),
        stack: undescribed.stack,
        code_filename: d.get("code", "filename")?,
        code_linetable: d.get("code", "linetable")?,
        code_firstlineno: d.get("code", "firstlineno")?,
        code_localsplusnames: d.get("code", "localsplusnames")?,
        code_nlocalsplus: d.get("code", "firstlineno")? + 4,
        code_adaptive: d.get("code", "co_code_adaptive")?,
        str_state: d.get("unicode", "state")?,
        // A UTF-8 length and pointer follow the ASCII header.
        str_compact_data: d.get("unicode", "asciiobject_size")? + 16,
        dict_values: d.get("dict", "ma_values")?,
        values_start: 8,
        instance_dict: InstanceDict::Inline,
        cached_keys: d.optional("heap_type", "ht_cached_keys")?.unwrap_or(undescribed.cached_keys),
        generator_frame: d.optional("generator", "gi_iframe")?.unwrap_or(undescribed.generator_frame),
        generator_qualname: d.optional("generator", "gi_name")?.map_or(PYTHON_3_12.generator_qualname, |name| name + 8),
        generator_state: d.optional("generator", "gi_frame_state")?.unwrap_or(PYTHON_3_12.generator_state),
        set_mask: d.optional("set", "mask")?.unwrap_or(0),
        set_table: d.optional("set", "table")?.unwrap_or(0),
        task_coro: undescribed.task_coro,
        task_name: undescribed.task_name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(version_of_hex(0x030d_12f0), (3, 13, 18));
        assert_eq!(described_version(b"xdebugpy\xf0\x12\x0d\x03\0\0\0\0"), Some(0x030d_12f0));
        for head in [&b""[..], b"xdebugpy", b"ydebugpy\0\0\0\0\0\0\0\0"] {
            assert_eq!(described_version(head), None);
        }
    }

    #[test]
    fn a_head_that_is_no_debug_offsets_is_refused() {
        for minor in 13..=15 {
            assert_eq!(offsets(minor, &[0; DEBUG_OFFSETS_SIZE]), Err(BadOffsets::Nonsense));
            let mut head = [0xff; DEBUG_OFFSETS_SIZE];
            head[..8].copy_from_slice(COOKIE);
            assert_eq!(offsets(minor, &head), Err(BadOffsets::Nonsense));
            head[16..24].copy_from_slice(&1u64.to_le_bytes());
            assert_eq!(offsets(minor, &head), Err(BadOffsets::FreeThreaded));
            head[16..24].copy_from_slice(&0u64.to_le_bytes());
            assert_eq!(offsets(minor, &head), Err(BadOffsets::Nonsense));
            assert_eq!(offsets(minor, &head[..24]), Err(BadOffsets::Nonsense));
        }
        assert_eq!(offsets(10, &[]), Err(BadOffsets::Version));
        assert_eq!(offsets(16, &[]), Err(BadOffsets::Version));
        assert_eq!(AsyncioOffsets::parse(&[0; ASYNCIO_OFFSETS_SIZE]), None);
        assert_eq!(AsyncioOffsets::parse(&[0xff; ASYNCIO_OFFSETS_SIZE]), None);
    }
}
