//! Turns call frame information (`.eh_frame`, `.debug_frame`) into the rules that undo one function call.
//!
//! The tables are the target's: they may be cut off, run in circles or lie. Whatever they hold, a lookup ends, and with
//! a reason when it finds nothing.

use std::{collections::HashMap, sync::Arc};

use gimli::{
    BaseAddresses, CfaRule, DebugFrame, EhFrame, EhFrameHdr, Encoding, EndianSlice, FrameDescriptionEntry,
    LittleEndian, ParsedEhFrameHdr, Reader as _, RegisterRule, UnwindContext, UnwindExpression, UnwindSection,
    UnwindTableRow,
};

use super::{recent::Recent, shared::Shared};

type Slice<'a> = EndianSlice<'a, LittleEndian>;

/// Bytes of one function's entry; the largest real ones have some ten thousand.
const MAX_ENTRY: usize = 1 << 20;
/// Functions of one file that an index is made of.
const MAX_FUNCTIONS: usize = 4 << 20;
/// Rows that are remembered at least.
const ROWS: usize = 2048;
const ADDRESS_SIZE: u8 = 8;

/// A section's bytes and its address in the file's own terms.
#[derive(Clone, Debug, Default)]
pub struct Section {
    pub address: u64,
    pub bytes: Arc<[u8]>,
}

/// The call frame information of one file. Addresses are the file's own.
#[derive(Debug, Default)]
pub struct Tables {
    pub eh_frame: Option<Section>,
    pub eh_frame_hdr: Option<Section>,
    pub debug_frame: Option<Section>,
    pub text: u64,
    pub got: u64,
}

/// How one function's caller is found at one instruction.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Row {
    pub cfa: Cfa,
    /// By DWARF number. A register without a rule is what it was.
    pub registers: Vec<(u16, Rule)>,
    /// The code a signal handler returns to: the frame above was interrupted, not called.
    pub is_signal: bool,
    pub encoding: Encoding,
}

/// The canonical frame address: the stack pointer before the call.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Cfa {
    Register { number: u16, offset: i64 },
    Expression(Box<[u8]>),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    Undefined,
    SameValue,
    /// Saved at the canonical frame address plus this.
    At(i64),
    /// Is the canonical frame address plus this.
    Is(i64),
    Register(u16),
    AtExpression(Box<[u8]>),
    IsExpression(Box<[u8]>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoRow {
    /// No entry covers the address.
    Uncovered,
    /// There is one, or there should be, and it makes no sense.
    Malformed,
}

impl Tables {
    /// The rules at `address`.
    pub fn row(&self, index: &Index, address: u64) -> Result<Row, NoRow> {
        let mut outcome = NoRow::Uncovered;
        for section in [Which::EhFrame, Which::DebugFrame] {
            match self.row_in(section, index, address) {
                Ok(row) => return Ok(row),
                Err(NoRow::Malformed) => outcome = NoRow::Malformed,
                Err(NoRow::Uncovered) => {}
            }
        }
        Err(outcome)
    }

    fn row_in(&self, which: Which, index: &Index, address: u64) -> Result<Row, NoRow> {
        match which {
            Which::EhFrame => {
                let Some(section) = &self.eh_frame else { return Err(NoRow::Uncovered) };
                let mut frames = EhFrame::new(&section.bytes, LittleEndian);
                frames.set_address_size(ADDRESS_SIZE);
                let offset = match self.by_header(section, address) {
                    Some(offset) => Some(offset),
                    None => index.find(&index.eh_frame, address),
                };
                self.row_at(&frames, offset.ok_or(NoRow::Uncovered)?, address)
            }
            Which::DebugFrame => {
                let Some(section) = &self.debug_frame else { return Err(NoRow::Uncovered) };
                let mut frames = DebugFrame::new(&section.bytes, LittleEndian);
                frames.set_address_size(ADDRESS_SIZE);
                let offset = index.find(&index.debug_frame, address).ok_or(NoRow::Uncovered)?;
                self.row_at(&frames, offset, address)
            }
        }
    }

    /// Where the entry for `address` stands, by the sorted table in `.eh_frame_hdr`.
    fn by_header(&self, eh_frame: &Section, address: u64) -> Option<usize> {
        let header = self.header()?;
        let pointer = header.table()?.lookup(address, &self.bases()).ok()?.direct().ok()?;
        usize::try_from(pointer.checked_sub(eh_frame.address)?).ok()
    }

    fn header(&self) -> Option<ParsedEhFrameHdr<Slice<'_>>> {
        let section = self.eh_frame_hdr.as_ref()?;
        EhFrameHdr::new(&section.bytes, LittleEndian).parse(&self.bases(), ADDRESS_SIZE).ok()
    }

    fn bases(&self) -> BaseAddresses {
        let address = |section: &Option<Section>| section.as_ref().map_or(0, |section| section.address);
        BaseAddresses::default()
            .set_eh_frame(address(&self.eh_frame))
            .set_eh_frame_hdr(address(&self.eh_frame_hdr))
            .set_text(self.text)
            .set_got(self.got)
    }

    fn row_at<'a, S>(&self, frames: &S, offset: usize, address: u64) -> Result<Row, NoRow>
    where
        S: UnwindSection<Slice<'a>>,
    {
        let bases = self.bases();
        let entry = frames
            .fde_from_offset(&bases, S::Offset::from(offset), S::cie_from_offset)
            .map_err(|_| NoRow::Malformed)?;
        if !entry.contains(address) {
            return Err(NoRow::Uncovered);
        }
        if entry.entry_len() > MAX_ENTRY || entry.cie().entry_len() > MAX_ENTRY {
            return Err(NoRow::Malformed);
        }
        let mut context = UnwindContext::new();
        let row = entry.unwind_info_for_address(frames, &bases, &mut context, address).map_err(|_| NoRow::Malformed)?;
        convert(frames, row, &entry).ok_or(NoRow::Malformed)
    }

    /// What has to be looked through once because no table leads to it.
    pub fn index(&self) -> Index {
        let mut index = Index::default();
        let bases = self.bases();
        if let Some(section) = &self.eh_frame
            && self.header().is_none_or(|header| header.table().is_none())
        {
            let mut frames = EhFrame::new(&section.bytes, LittleEndian);
            frames.set_address_size(ADDRESS_SIZE);
            index.eh_frame = functions(&frames, &bases);
        }
        if let Some(section) = &self.debug_frame {
            let mut frames = DebugFrame::new(&section.bytes, LittleEndian);
            frames.set_address_size(ADDRESS_SIZE);
            index.debug_frame = functions(&frames, &bases);
        }
        index
    }
}

#[derive(Clone, Copy)]
enum Which {
    EhFrame,
    DebugFrame,
}

/// Where the entries of functions stand, by the functions' addresses.
#[derive(Debug, Default)]
pub struct Index {
    eh_frame: Vec<Function>,
    debug_frame: Vec<Function>,
}

#[derive(Clone, Copy, Debug)]
struct Function {
    start: u64,
    end: u64,
    offset: usize,
}

impl Index {
    fn find(&self, functions: &[Function], address: u64) -> Option<usize> {
        let after = functions.partition_point(|function| function.start <= address);
        let function = functions.get(after.checked_sub(1)?)?;
        (address < function.end).then_some(function.offset)
    }
}

/// Up to the first entry that makes no sense.
fn functions<'a, S>(frames: &S, bases: &BaseAddresses) -> Vec<Function>
where
    S: UnwindSection<Slice<'a>>,
{
    let mut functions = Vec::new();
    let mut entries = frames.entries(bases);
    // The entries that all others refer to are few.
    let mut commons: HashMap<usize, _> = HashMap::new();
    while let Ok(Some(entry)) = entries.next() {
        let gimli::CieOrFde::Fde(partial) = entry else { continue };
        let parsed = partial.parse(|section, bases, offset| {
            let at: usize = gimli::UnwindOffset::into(offset);
            if let Some(known) = commons.get(&at) {
                return Ok(Clone::clone(known));
            }
            let common = section.cie_from_offset(bases, offset)?;
            commons.insert(at, common.clone());
            Ok(common)
        });
        let Ok(entry) = parsed else { continue };
        functions.push(Function { start: entry.initial_address(), end: entry.end_address(), offset: entry.offset() });
        if functions.len() == MAX_FUNCTIONS {
            break;
        }
    }
    functions.sort_unstable_by_key(|function| function.start);
    functions
}

fn convert<'a, S>(frames: &S, row: &UnwindTableRow<usize>, entry: &FrameDescriptionEntry<Slice<'a>>) -> Option<Row>
where
    S: UnwindSection<Slice<'a>>,
{
    let code = |expression: &UnwindExpression<usize>| -> Option<Box<[u8]>> {
        Some(expression.get(frames).ok()?.0.to_slice().ok()?.into())
    };
    let cfa = match row.cfa() {
        CfaRule::RegisterAndOffset { register, offset } => Cfa::Register { number: register.0, offset: *offset },
        CfaRule::Expression(expression) => Cfa::Expression(code(expression)?),
    };
    let rule = |rule: &RegisterRule<usize>| {
        Some(match rule {
            RegisterRule::SameValue => Rule::SameValue,
            RegisterRule::Offset(offset) => Rule::At(*offset),
            RegisterRule::ValOffset(offset) => Rule::Is(*offset),
            RegisterRule::Register(register) => Rule::Register(register.0),
            RegisterRule::Expression(expression) => Rule::AtExpression(code(expression)?),
            RegisterRule::ValExpression(expression) => Rule::IsExpression(code(expression)?),
            _ => Rule::Undefined,
        })
    };
    let registers = row.registers().map(|(register, how)| Some((register.0, rule(how)?))).collect::<Option<_>>()?;
    Some(Row { cfa, registers, is_signal: entry.is_signal_trampoline(), encoding: entry.cie().encoding() })
}

/// Rows looked up before, by file and address.
#[derive(Debug)]
pub struct Rows {
    known: Known,
    by_code: Known,
    /// A function has many places and few rows, most of them other functions' as well.
    rows: Shared<Row>,
}

type Known = Recent<(u32, u64), Result<Arc<Row>, NoRow>>;

impl Default for Rows {
    fn default() -> Self {
        Self { known: Recent::of(ROWS), by_code: Recent::of(ROWS), rows: Shared::default() }
    }
}

impl Rows {
    pub fn get(&mut self, key: (u32, u64), look_up: impl FnOnce() -> Result<Row, NoRow>) -> Result<Arc<Row>, NoRow> {
        Self::get_in(&mut self.known, &mut self.rows, key, look_up)
    }

    /// The same for rules that come from code.
    pub fn get_by_code(
        &mut self,
        key: (u32, u64),
        look_up: impl FnOnce() -> Result<Row, NoRow>,
    ) -> Result<Arc<Row>, NoRow> {
        Self::get_in(&mut self.by_code, &mut self.rows, key, look_up)
    }

    fn get_in(
        known: &mut Known,
        rows: &mut Shared<Row>,
        key: (u32, u64),
        look_up: impl FnOnce() -> Result<Row, NoRow>,
    ) -> Result<Arc<Row>, NoRow> {
        if let Some(known) = known.get(key) {
            return known;
        }
        let row = look_up().map(|row| rows.one(row));
        known.insert(key, row.clone());
        row
    }
}
