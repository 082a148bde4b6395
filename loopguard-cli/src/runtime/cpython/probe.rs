//! Finds the functions of an interpreter that mark the start of a step.
//!
//! Every step of asyncio's own loop goes through `Context.run` (`context_run` in `Python/context.c`), every step under
//! uvloop through `PyContext_Enter`.

use super::{Interpreter, candidates};
use crate::runtime::elf::{self, Image};
use crate::runtime::memory::TargetMemory;
use crate::runtime::probe_site::{MAX_FUNCTION, ProbeSite, entry_block_site, function_limit};

/// `PyTypeObject.tp_methods`, the same in all supported versions.
const TYPE_METHODS: u64 = 232;
/// Bytes of a `PyMethodDef`: name, function, flags, doc.
const METHOD_DEF: u64 = 32;
const MAX_METHODS: u64 = 64;

/// What marks the start of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepProbe {
    /// `Context.run`: asyncio's own loop.
    ContextRun,
    /// `PyContext_Enter`: uvloop.
    ContextEnter,
}

impl Interpreter {
    /// Where to probe; the error is a sentence for the user.
    pub fn probe_site(&self, probe: StepProbe) -> Result<ProbeSite, String> {
        let mappings = elf::mappings(self.pid).map_err(|error| format!("its memory map can't be read: {error}"))?;
        let image = candidates(self.pid, &mappings)
            .iter()
            .filter_map(|path| Image::open(self.pid, path, &mappings).ok())
            .find(|image| image.symbols(["PyContext_Enter"])[0].is_some())
            .ok_or("the interpreter exports no PyContext_Enter")?;
        let [enter, run, context_type] = image.symbols(["PyContext_Enter", "context_run", "PyContext_Type"]);
        let (name, entry, size) = match (probe, run, context_type) {
            (StepProbe::ContextEnter, ..) => {
                let enter = enter.ok_or("the interpreter exports no PyContext_Enter")?;
                ("PyContext_Enter", enter.address, enter.size)
            }
            (StepProbe::ContextRun, Some(run), _) => ("context_run", run.address, run.size),
            (StepProbe::ContextRun, None, Some(of_type)) => ("context_run", self.context_run(of_type.address)?, 0),
            (StepProbe::ContextRun, None, None) => return Err("the interpreter has no symbol for Context".to_owned()),
        };
        let limit = if size == 0 { function_limit(&image, entry) } else { size };
        let code = image
            .bytes_at(entry, limit.min(MAX_FUNCTION) as usize)
            .ok_or_else(|| format!("{name} is not in {}", image.path))?;
        let (distance, instruction) = entry_block_site(&code, entry).map_err(|why| format!("{name}: {why}"))?;
        let offset = image.file_offset(entry + distance).ok_or_else(|| format!("{name} is not in {}", image.path))?;
        Ok(ProbeSite { file: image.opened, offset, instruction: format!("{name}+{distance:#x}: {instruction}") })
    }

    /// The function of the method `run` of `contextvars.Context`: in stripped builds it has no symbol.
    fn context_run(&self, context_type: u64) -> Result<u64, String> {
        let methods = self.memory.field(context_type, TYPE_METHODS).map_err(|fault| fault.to_string())?;
        for n in 0..MAX_METHODS {
            let method =
                self.memory.words(methods.wrapping_add(n * METHOD_DEF), 2).map_err(|fault| fault.to_string())?;
            match method[0] {
                0 => break,
                name if self.memory.c_string(name, 8).as_deref() == Ok("run") => return Ok(method[1]),
                _ => {}
            }
        }
        Err("its Context type has no method run".to_owned())
    }
}
