//! Turns code objects and instruction addresses into functions, files and lines.

use std::collections::HashMap;
use std::sync::Arc;

use loopguard_common::records::{FRAME_ENTRY, FRAME_SHIM, RawFrame};
use loopguard_common::walk::fingerprint;

use super::{Fault, Interpreter};
use crate::core::event::{Frame, FrameKind, Origin};
use crate::runtime::memory::TargetMemory;

/// Code objects kept at a time; a large server runs some thousands.
const MAX_CODES: usize = 16384;
/// Different places in one code object kept at a time.
const MAX_PLACES: usize = 256;
const MAX_NAME: usize = 512;
const MAX_PATH: usize = 4096;
/// The largest location table that is read, in bytes.
const MAX_LINE_TABLE: u64 = 256 << 10;
/// Locals that are looked at for a name.
const MAX_LOCALS: usize = 64;
/// Bytes of a code unit of bytecode.
const CODE_UNIT: u64 = 2;

/// What is known of one code object.
#[derive(Debug)]
pub(super) struct Code {
    fingerprint: u64,
    pub function: Arc<str>,
    file: Arc<str>,
    origin: Origin,
    first_line: u32,
    line_table: Vec<u8>,
    pub request: RequestIn,
    /// By the instruction's distance from the code object.
    frames: HashMap<u64, Arc<Frame>>,
}

/// Where a function's frame may hold the request it works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestIn {
    Nowhere,
    /// An ASGI scope, in the local with this index.
    Scope(u64),
    /// An ASGI scope, in the attribute `scope` of the first local (uvicorn's `RequestResponseCycle.run_asgi`).
    ScopeOfSelf,
    /// A server's own request object, in the local with this index.
    Object(u64),
    /// Likewise, in the attribute `request` of the first local (Tornado's `RequestHandler._execute`).
    ObjectOfSelf,
}

impl RequestIn {
    fn of(function: &str, locals: &[String]) -> Self {
        let is_method = locals.first().is_some_and(|name| name == "self");
        if let Some(slot) = locals.iter().position(|name| name == "scope") {
            Self::Scope(slot as u64)
        } else if is_method && function.ends_with(".run_asgi") {
            Self::ScopeOfSelf
        // What a function was called with comes first among its locals. A server's loop over a connection's requests
        // keeps the last one in a local, too, long after it was answered.
        } else if let Some(slot) = locals.iter().take(2).position(|name| name == "request") {
            Self::Object(slot as u64)
        } else if is_method && function == "RequestHandler._execute" {
            Self::ObjectOfSelf
        } else {
            Self::Nowhere
        }
    }
}

/// The code objects seen so far, by address. A hit needs no remote read: the kernel looked at the fingerprint.
#[derive(Debug)]
pub(super) struct Codes {
    known: HashMap<u64, Code>,
    unknown: Arc<Frame>,
}

impl Default for Codes {
    fn default() -> Self {
        let unknown = Frame {
            kind: FrameKind::Python,
            origin: Origin::Runtime,
            function: "<unknown>".into(),
            file: None,
            line: None,
            module: None,
        };
        Self { known: HashMap::new(), unknown: Arc::new(unknown) }
    }
}

impl Codes {
    /// `None` for an entry shim, which runs no Python code; `<unknown>` when the code object is not what it was when
    /// the kernel came past it.
    pub fn frame(&mut self, interpreter: &Interpreter, raw: &RawFrame) -> Option<Arc<Frame>> {
        if raw.code & FRAME_SHIM != 0 {
            return None;
        }
        let address = raw.code & !(FRAME_SHIM | FRAME_ENTRY);
        let Ok(code) = self.code(interpreter, address, Some(raw.fingerprint)) else {
            return Some(self.unknown.clone());
        };
        let start = address.wrapping_add(interpreter.offsets.code_adaptive);
        let offset = raw.instr.wrapping_sub(start);
        if let Some(frame) = code.frames.get(&offset) {
            return Some(frame.clone());
        }
        if code.frames.len() >= MAX_PLACES {
            code.frames.clear();
        }
        let line = code.line(offset as i64);
        // A line has several places.
        let known = code.frames.values().find(|known| known.line == line).cloned();
        let frame = known.unwrap_or_else(|| {
            Arc::new(Frame {
                kind: FrameKind::Python,
                origin: code.origin,
                function: code.function.clone(),
                file: Some(code.file.clone()),
                line,
                module: None,
            })
        });
        code.frames.insert(offset, frame.clone());
        Some(frame)
    }

    /// Whether `frame` stands for one that could not be told.
    pub fn is_unknown(&self, frame: &Arc<Frame>) -> bool {
        Arc::ptr_eq(frame, &self.unknown)
    }

    /// The code object at `address`: the one with this fingerprint, or the one that is there now.
    pub fn code(&mut self, interpreter: &Interpreter, address: u64, expected: Option<u64>) -> Result<&mut Code, Fault> {
        let expected = match expected {
            Some(expected) => expected,
            None => interpreter.code_fingerprint(address)?,
        };
        if self.known.get(&address).is_none_or(|code| code.fingerprint != expected) {
            interpreter.memory.look_again();
            let code = interpreter.read_code(address)?;
            interpreter.memory.look_again();
            // Once more: it may have been replaced while it was read.
            if code.fingerprint != expected || interpreter.code_fingerprint(address)? != expected {
                return Err(Fault::Unexpected { address, expected: "the code object that ran" });
            }
            if self.known.len() >= MAX_CODES {
                self.known.clear();
            }
            self.known.insert(address, code);
        }
        self.known.get_mut(&address).ok_or(Fault::Unexpected { address, expected: "a code object" })
    }
}

impl Interpreter {
    fn code_fingerprint(&self, code: u64) -> Result<u64, Fault> {
        let qualname = self.memory.field(code, self.offsets.layout.code_qualname)?;
        let line_table = self.memory.field(code, self.offsets.code_linetable)?;
        Ok(fingerprint(qualname, line_table))
    }

    fn read_code(&self, address: u64) -> Result<Code, Fault> {
        let field = |offset: u64| self.memory.field(address, offset);
        let qualname = field(self.offsets.layout.code_qualname.into())?;
        let line_table = field(self.offsets.code_linetable)?;
        let function = self.str(qualname, MAX_NAME)?;
        let file = self.str(field(self.offsets.code_filename)?, MAX_PATH)?;
        let first_line = self.memory.u32(address.wrapping_add(self.offsets.code_firstlineno))?;
        let length = self.memory.field(line_table, self.offsets.layout.var_size)?.min(MAX_LINE_TABLE);
        let table = line_table.wrapping_add(self.offsets.layout.bytes_data.into());
        let locals = self.tuple(field(self.offsets.code_localsplusnames)?, MAX_LOCALS)?;
        let names: Vec<String> = locals.iter().map(|&name| self.str(name, 16).unwrap_or_default()).collect();
        Ok(Code {
            fingerprint: fingerprint(qualname, line_table),
            origin: origin(&file),
            request: RequestIn::of(&function, &names),
            function: function.into(),
            file: file.into(),
            first_line,
            line_table: self.memory.bytes(table, length as usize)?,
            frames: HashMap::new(),
        })
    }
}

impl Code {
    fn line(&self, offset: i64) -> Option<u32> {
        match u64::try_from(offset) {
            Ok(offset) => line_at(&self.line_table, self.first_line, offset),
            // Before the first instruction: the frame was only just set up.
            Err(_) if offset >= -(CODE_UNIT as i64) => Some(self.first_line),
            Err(_) => None,
        }
    }
}

/// The line of the instruction `offset` bytes into the bytecode, by a location table of 3.11 or later
/// (`Objects/locations.md`). `None`: the instruction has no line, or the table does not reach that far.
fn line_at(table: &[u8], first_line: u32, offset: u64) -> Option<u32> {
    let mut bytes = table.iter().copied();
    let mut line = i64::from(first_line);
    let mut end = 0;
    while let Some(head) = bytes.next() {
        let here = match head >> 3 & 15 {
            // Short forms: on the same line, one byte of columns follows.
            0..=9 => {
                bytes.next()?;
                Some(line)
            }
            // One-line forms: the line moves by 0 to 2, two bytes of columns follow.
            kind @ 10..=12 => {
                line += i64::from(kind) - 10;
                bytes.nth(1)?;
                Some(line)
            }
            13 => {
                line = line.checked_add(signed(&mut bytes)?)?;
                Some(line)
            }
            14 => {
                line = line.checked_add(signed(&mut bytes)?)?;
                // End line, column and end column.
                for _ in 0..3 {
                    unsigned(&mut bytes)?;
                }
                Some(line)
            }
            _ => None,
        };
        end += CODE_UNIT * (u64::from(head & 7) + 1);
        if offset < end {
            return here.and_then(|line| u32::try_from(line).ok());
        }
    }
    None
}

fn unsigned(bytes: &mut impl Iterator<Item = u8>) -> Option<u64> {
    let (mut value, mut shift) = (0u64, 0);
    loop {
        let byte = bytes.next()?;
        value |= u64::from(byte & 63).checked_shl(shift).filter(|_| shift < 60)?;
        if byte & 64 == 0 {
            return Some(value);
        }
        shift += 6;
    }
}

fn signed(bytes: &mut impl Iterator<Item = u8>) -> Option<i64> {
    let value = unsigned(bytes)?;
    let magnitude = (value >> 1) as i64;
    Some(if value & 1 == 1 { -magnitude } else { magnitude })
}

/// Whose code a file is, by where it lies.
fn origin(file: &str) -> Origin {
    if let Some(name) = file.strip_prefix('<') {
        // What `python -c` and `exec` run is somebody's own; other made-up names are those of code generators.
        return match name {
            _ if name.starts_with("frozen ") => Origin::Runtime,
            "string>" | "stdin>" => Origin::User,
            _ => Origin::Library,
        };
    }
    let mut library = Origin::User;
    let mut parts = file.split('/').peekable();
    while let Some(part) = parts.next() {
        let Some(next) = parts.peek() else {
            // The file itself: a zipped standard library, or a script that pip installed.
            break;
        };
        match part {
            "site-packages" | "dist-packages" => return Origin::Library,
            "lib" | "lib64" if is_python_directory(next) => library = Origin::Runtime,
            "bin" | "sbin" if !next.contains('.') => return Origin::Library,
            _ => {}
        }
    }
    library
}

/// `python3.12`, or `python312.zip`.
fn is_python_directory(name: &str) -> bool {
    name.strip_prefix("python3").is_some_and(|rest| rest.starts_with('.') || rest.ends_with(".zip"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_of_every_kind_of_entry() {
        let table = [
            // 2 units, no line change, long form without columns: line +1.
            0x80 | 13 << 3 | 1,
            2,
            // 1 unit, short form.
            0x80,
            0x11,
            // 1 unit, one-line form, line +2.
            0x80 | 12 << 3,
            0,
            9,
            // 8 units, no location.
            0x80 | 15 << 3 | 7,
            // 1 unit, long form: line -40 (two bytes), end line, column, end column.
            0x80 | 14 << 3,
            0x40 | 81 & 63,
            81 >> 6,
            0,
            1,
            1,
        ];
        let lines: Vec<Option<u32>> = (0..14).map(|unit| line_at(&table, 100, unit * 2)).collect();
        let mut expected = vec![Some(101), Some(101), Some(101), Some(103)];
        expected.extend([None; 8]);
        expected.extend([Some(63), None]);
        assert_eq!(lines, expected);
        // Inside an instruction, its caches included.
        assert_eq!(line_at(&table, 100, 7), Some(103));
        for cut in 0..table.len() {
            line_at(&table[..cut], 100, 24);
        }
    }

    #[test]
    fn a_line_below_zero_is_none() {
        assert_eq!(line_at(&[0x80 | 13 << 3, 5], 1, 0), None);
        assert_eq!(
            line_at(&[0x80 | 13 << 3, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f], 1, 0),
            None
        );
    }

    proptest! {
        #[test]
        fn any_table_is_harmless(table in proptest::collection::vec(any::<u8>(), 0..300), first: u32, offset: u64) {
            line_at(&table, first, offset);
            line_at(&table, first, offset % 600);
        }
    }

    #[test]
    fn origins() {
        for (file, expected) in [
            ("/srv/shop/app.py", Origin::User),
            ("app.py", Origin::User),
            ("", Origin::User),
            ("<string>", Origin::User),
            ("/srv/bin/tool.py", Origin::User),
            ("/home/me/python3.12/app.py", Origin::User),
            ("/venv/lib/python3.12/site-packages/fastapi/routing.py", Origin::Library),
            ("/usr/lib/python3/dist-packages/yaml/loader.py", Origin::Library),
            ("/venv/bin/uvicorn", Origin::Library),
            ("<attrs generated init a.B>", Origin::Library),
            ("/usr/lib/python3.12/asyncio/events.py", Origin::Runtime),
            ("/opt/lib64/python3.14/json/decoder.py", Origin::Runtime),
            ("/usr/lib/python313.zip/json/decoder.py", Origin::Runtime),
            ("<frozen runpy>", Origin::Runtime),
        ] {
            assert_eq!(origin(file), expected, "{file}");
        }
    }
}
