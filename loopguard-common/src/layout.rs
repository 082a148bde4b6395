//! Where one build of CPython keeps the fields the walker reads.

/// No such field in this build.
pub const ABSENT: u16 = u16::MAX;

/// Addresses and offsets (bytes) for one process; key in the kernel: tgid.
///
/// Offsets come from `_Py_DebugOffsets` at the start of `_PyRuntime` (CPython 3.13 on) or from a table of what the
/// headers of 3.11 and 3.12 say.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PyLayout {
    /// Addresses of `PyDict_Type` and `PyCell_Type` in the target.
    pub dict_type: u64,
    pub cell_type: u64,
    /// `PyThreadState`: the current frame, or in 3.11 and 3.12 the `_PyCFrame` that holds it.
    pub ts_frame: u16,
    /// Offset of the current frame in `_PyCFrame`; [`ABSENT`] from 3.13 on.
    pub cframe_frame: u16,
    pub ts_native_thread_id: u16,
    /// The running asyncio task in the thread state (3.14 on), else [`ABSENT`].
    pub ts_running_task: u16,
    /// `_PyInterpreterFrame`.
    pub frame_executable: u16,
    pub frame_previous: u16,
    pub frame_instr: u16,
    pub frame_owner: u16,
    pub frame_locals: u16,
    /// Frames whose owner is at least this are entry shims.
    pub shim_owner: u16,
    /// `PyCodeObject.co_qualname`; `co_linetable` follows it.
    pub code_qualname: u16,
    /// `PyObject.ob_type`.
    pub ob_type: u16,
    /// `PyDictObject.ma_keys`.
    pub dict_keys: u16,
    /// `PyASCIIObject.length`, and the size of that struct: where an ASCII string's characters start.
    pub str_length: u16,
    pub str_ascii_data: u16,
    /// `PyTupleObject.ob_item`.
    pub tuple_items: u16,
    /// `PyListObject.ob_item`.
    pub list_items: u16,
    /// `PyVarObject.ob_size`, of tuples, lists and bytes alike.
    pub var_size: u16,
    /// `PyBytesObject.ob_sval`.
    pub bytes_data: u16,
    /// `PyLongObject`'s first digit.
    pub long_digit: u16,
    /// `PyCellObject.ob_ref`.
    pub cell_ref: u16,
    /// `_PyInterpreterFrame.is_entry` (3.11), else [`ABSENT`].
    pub frame_is_entry: u16,
    pub _pad: [u16; 2],
}

const _: () = assert!(size_of::<PyLayout>() == 64);

#[cfg(feature = "user")]
// SAFETY: plain integers without padding bytes.
unsafe impl aya::Pod for PyLayout {}
