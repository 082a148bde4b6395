//! Turns a process into the places that tell which tokio task runs on which of its threads.
//!
//! Every poll of a task goes through a function of its type, `tokio::runtime::task::raw::poll<T, S>`. The tables that
//! list these functions are found by their form ([`vtable`]), so no symbols are needed; where there are some, they give
//! the tasks' names ([`name`]). A poll ends behind the call that polls, in tokio's own code: that place is only known
//! once a poll was seen, by the address it returns to ([`Tokio::poll_return`]).

mod ids;
mod name;
mod vtable;

use std::collections::{BTreeSet, HashMap};

use ids::IdCounter;
use thiserror::Error;
use vtable::Vtable;

use super::{
    elf::{self, Image, SymbolTable},
    memory::{ProcessMemory, TargetMemory as _},
    probe_site::{
        Ending, MAX_FUNCTION, ProbeSite, callees, ending, entry_block_site, function_starts, moved, straight_line_site,
    },
};

/// One read of the target's memory.
const PIECE: u64 = 1 << 16;
/// The largest section that is looked through.
const MAX_SECTION: u64 = 64 << 20;
/// More types of tasks than a program has.
const MAX_TASKS: usize = 4096;
const BLOCKING_TASK: &str = "tokio::runtime::blocking::task::BlockingTask<";
/// tokio's own sources leave their path in every binary that can panic.
const SOURCE_PATH: &[u8] = b"/tokio-";

#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum NotUsable {
    #[error("no tokio in this process")]
    NotTokio,
    #[error("it uses tokio {0}, whose tasks loopguard does not know (1.23 or newer)")]
    OtherVersion(String),
    #[error("its program file cannot be read: {0}")]
    Unreadable(String),
    #[error("none of its {0} types of tasks begins with an instruction that the kernel emulates")]
    NoSites(usize),
}

/// A process that runs tasks of tokio 1.x.
#[derive(Debug)]
pub struct Tokio {
    /// As far as the program says.
    pub version: Option<String>,
    /// Types of tasks whose polls cannot be marked, and why.
    pub unmarked: Vec<String>,
    polls: Vec<PollSite>,
    blocking: Vec<ProbeSite>,
    tasks: Vec<TaskType>,
    next_id: Option<u64>,
    /// What may count ids, as long as the former is not known.
    id_counter: IdCounter,
    starts: Vec<u64>,
    image: Image,
}

/// Where polls of one type of task begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PollSite {
    pub site: ProbeSite,
    /// Index for [`Tokio::task_name`].
    pub task: u16,
    /// From a task's header to its id, in bytes.
    pub id_offset: u16,
    /// How far the stack pointer has come down there since the function was called, in bytes.
    pub stack_down: u16,
}

/// Where polls end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReturnSite {
    pub site: ProbeSite,
    /// As for [`PollSite`]; negative: it has come up.
    pub stack_down: i16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct TaskType {
    name: Option<String>,
    poll: u64,
}

/// Looks for tokio in the program of process `pid`.
///
/// # Errors
/// Why its polls can't be marked.
pub fn find(pid: u32) -> Result<Tokio, NotUsable> {
    let unreadable = |error: std::io::Error| NotUsable::Unreadable(error.to_string());
    let mappings = elf::mappings(pid).map_err(unreadable)?;
    let exe = std::fs::read_link(format!("/proc/{pid}/exe")).map_err(unreadable)?;
    let image = Image::open(pid, &exe.to_string_lossy(), &mappings).map_err(unreadable)?;
    Tokio::of(image, ProcessMemory { pid })
}

impl Tokio {
    fn of(image: Image, memory: ProcessMemory) -> Result<Self, NotUsable> {
        let version = image.section_bytes(".rodata").and_then(|(_, bytes)| version_in(&bytes));
        let text = image.section(".text").map(|text| text.address..text.address + text.size).unwrap_or_default();
        let mut starts = function_starts(&image).unwrap_or_default();
        starts.sort_unstable();
        let is_function =
            |address: u64| text.contains(&address) && (starts.is_empty() || starts.binary_search(&address).is_ok());
        // Relocated: as the process has them. Programs that are not position-independent keep them in `.rodata`.
        let mut vtables: Vec<Vtable> = [".data.rel.ro", ".rodata"]
            .into_iter()
            .flat_map(|name| vtable::scan(&section_words(&image, name, &memory), is_function))
            .take(MAX_TASKS)
            .collect();
        let mut seen = BTreeSet::new();
        vtables.retain(|table| seen.insert(table.poll));
        if vtables.is_empty() {
            return Err(match version {
                Some(version) => NotUsable::OtherVersion(version),
                None => NotUsable::NotTokio,
            });
        }
        let mut tokio = Self {
            version,
            unmarked: Vec::new(),
            polls: Vec::new(),
            blocking: Vec::new(),
            tasks: Vec::new(),
            next_id: None,
            id_counter: IdCounter::default(),
            starts,
            image,
        };
        tokio.place(&vtables, &memory);
        if tokio.polls.is_empty() {
            return Err(NotUsable::NoSites(vtables.len()));
        }
        if tokio.next_id.is_none() {
            tokio.id_counter = IdCounter::among(ids::counters(&tokio.image, &tokio.starts, &memory));
        }
        Ok(tokio)
    }

    fn place(&mut self, vtables: &[Vtable], memory: &ProcessMemory) {
        let blocking: HashMap<u64, bool> =
            vtables.iter().map(|table| (table.schedule, self.never_returns(table.schedule, memory, 4))).collect();
        let names = self.names(vtables);
        for table in vtables {
            // A task of the blocking pool is never scheduled: its `schedule` can only panic.
            let name = names.get(&table.poll).cloned().flatten();
            if blocking[&table.schedule] || name.as_ref().is_some_and(|name| name.starts_with(BLOCKING_TASK)) {
                self.blocking.extend(self.entry_site(table.poll).map(|(site, _)| site));
                continue;
            }
            match self.entry_site(table.poll) {
                Ok((site, stack_down)) => {
                    let task = self.tasks.len() as u16;
                    self.polls.push(PollSite { site, task, id_offset: table.id_offset, stack_down });
                    self.tasks.push(TaskType { name, poll: table.poll });
                }
                Err(why) => self.unmarked.push(format!("{}: {why}", name.unwrap_or_else(|| "a task".to_owned()))),
            }
        }
    }

    fn code(&self, function: u64) -> Option<Vec<u8>> {
        let next = self.starts.partition_point(|&start| start <= function);
        let length = self.starts.get(next).map_or(MAX_FUNCTION, |next| next - function);
        self.image.bytes_at(function, length.min(4 * MAX_FUNCTION) as usize)
    }

    fn entry_site(&self, function: u64) -> Result<(ProbeSite, u16), String> {
        let code = self.code(function).ok_or("its code is not in the file")?;
        let (distance, instruction) = entry_block_site(&code, function)?;
        let moved = moved(&code, distance).ok_or("its stack pointer can't be followed")?;
        if !moved.keeps_first_argument {
            return Err("it loses its argument before a place that can be probed".to_owned());
        }
        let stack_down = u16::try_from(moved.stack_down).map_err(|_| "its stack pointer can't be followed")?;
        Ok((self.site(function + distance, instruction)?, stack_down))
    }

    fn site(&self, address: u64, instruction: String) -> Result<ProbeSite, String> {
        let offset = self.image.file_offset(address).ok_or("its code is not in the file")?;
        Ok(ProbeSite { file: self.image.opened.clone(), offset, instruction })
    }

    fn never_returns(&self, function: u64, memory: &ProcessMemory, depth: u32) -> bool {
        let Some(code) = self.code(function).filter(|_| depth > 0) else { return false };
        match ending(&code, function) {
            Ending::Returns => false,
            Ending::Diverges => true,
            Ending::Jumps(to) => self.never_returns(to, memory, depth - 1),
            Ending::JumpsThrough(slot) => memory.u64(slot).is_ok_and(|to| self.never_returns(to, memory, depth - 1)),
        }
    }

    /// The names of the futures, by poll function, and where tokio counts its task ids.
    fn names(&mut self, vtables: &[Vtable]) -> HashMap<u64, Option<String>> {
        let around: Vec<(u64, BTreeSet<u64>)> = vtables
            .iter()
            .map(|table| {
                let own = [table.poll, table.dealloc, table.shutdown];
                let calls = |function: &u64| self.code(*function).map_or(Vec::new(), |code| callees(&code, *function));
                let first: Vec<u64> = own.iter().flat_map(calls).collect();
                // `poll` is often nothing but a jump to what it does.
                let second = calls(&table.poll).iter().take(1).flat_map(calls).collect::<Vec<_>>();
                (table.poll, own.into_iter().chain(first).chain(second).collect())
            })
            .collect();
        let wanted: BTreeSet<u64> = around.iter().flat_map(|(_, functions)| functions.iter().copied()).collect();
        let mut symbols: HashMap<u64, Vec<String>> = HashMap::new();
        let mut next_id = None;
        self.image.each_symbol(SymbolTable::Full, |name, symbol| {
            if wanted.contains(&symbol.address) {
                let name = format!("{:#}", rustc_demangle::demangle(&String::from_utf8_lossy(name)));
                symbols.entry(symbol.address).or_default().push(name);
            } else if name.windows(7).any(|part| part == b"NEXT_ID") {
                let name = format!("{:#}", rustc_demangle::demangle(&String::from_utf8_lossy(name)));
                if name.contains("tokio::runtime::task::id::Id::next::NEXT_ID")
                    || name.contains("::task::id::Id>::next::NEXT_ID")
                {
                    next_id = Some(symbol.address);
                }
            }
        });
        self.next_id = next_id;
        around
            .into_iter()
            .map(|(poll, functions)| {
                // Functions with the same code share an address: what several names say of it is no name.
                let names: Vec<String> =
                    functions.iter().filter_map(|function| symbols.get(function)).flatten().cloned().collect();
                (poll, name::future(&names))
            })
            .collect()
    }

    /// Where polls of tasks begin.
    pub fn polls(&self) -> &[PollSite] {
        &self.polls
    }

    /// Where tasks of the blocking pool begin: a thread that runs one is no worker meanwhile.
    pub fn blocking(&self) -> &[ProbeSite] {
        &self.blocking
    }

    /// Where the next task id stands, as far as that is known: a symbol says it, or the ids of tasks that were seen.
    pub fn next_id(&self) -> Option<u64> {
        self.next_id
    }

    /// Takes the ids of tasks that polls were seen of. Whether that told [where the next one stands](Self::next_id).
    pub fn saw_ids(&mut self, ids: impl IntoIterator<Item = u64>, memory: &ProcessMemory) -> bool {
        if self.next_id.is_some() || !self.id_counter.is_open() {
            return false;
        }
        self.next_id = self.id_counter.look(ids, |address| memory.u64(address).ok());
        self.next_id.is_some()
    }

    /// Where polls end that return to `address`.
    pub fn poll_return(&self, address: u64) -> Result<ReturnSite, String> {
        let code = self.image.bytes_at(address, 256).ok_or("its code is not in the file")?;
        let (distance, instruction) = straight_line_site(&code, address)?;
        let moved = moved(&code, distance).ok_or("its stack pointer can't be followed")?;
        let stack_down = i16::try_from(moved.stack_down).map_err(|_| "its stack pointer can't be followed")?;
        Ok(ReturnSite { site: self.site(address + distance, instruction)?, stack_down })
    }

    /// How many types of tasks have a name.
    pub fn named_tasks(&self) -> usize {
        self.tasks.iter().filter(|task| task.name.is_some()).count()
    }

    /// What to call a task: its future's type, else where its poll function stands; with tokio's own id.
    pub fn task_name(&self, task: u16, id: u64) -> String {
        match self.tasks.get(usize::from(task)) {
            Some(TaskType { name: Some(name), .. }) => format!("{name} (task {id})"),
            Some(TaskType { name: None, poll }) => {
                let offset = self.image.file_offset(*poll).unwrap_or(*poll);
                format!("task {id} (polled at {offset:#x})")
            }
            None => format!("task {id}"),
        }
    }
}

/// The words of a section as the process has them.
fn section_words(image: &Image, name: &str, memory: &ProcessMemory) -> Vec<u64> {
    let Some(section) = image.section(name).filter(|section| section.size <= MAX_SECTION) else { return Vec::new() };
    let start = section.address.next_multiple_of(8);
    let end = section.address + section.size;
    let mut words = Vec::with_capacity((section.size / 8) as usize);
    let mut at = start;
    while at + 8 <= end {
        let count = ((end - at).min(PIECE) / 8) as usize;
        match memory.words(at, count) {
            Ok(piece) => words.extend(piece),
            // Not all of it is there: what is missing is no table.
            Err(_) => words.extend(std::iter::repeat_n(0, count)),
        }
        at += count as u64 * 8;
    }
    words
}

/// `1.54.1`, from a path like `/home/me/.cargo/registry/src/…/tokio-1.54.1/src/runtime/…`.
fn version_in(bytes: &[u8]) -> Option<String> {
    let mut rest = bytes;
    loop {
        let at = rest.windows(SOURCE_PATH.len()).position(|window| window == SOURCE_PATH)?;
        rest = &rest[at + SOURCE_PATH.len()..];
        let Some(length) = rest.iter().take(24).position(|&byte| byte == b'/') else { continue };
        let version = std::str::from_utf8(&rest[..length]).unwrap_or_default();
        let numbers = version.split('.').filter(|part| part.parse::<u32>().is_ok()).count();
        if numbers == 3 && version.split('.').count() == 3 {
            return Some(version.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_stand_in_paths() {
        let check = |text: &[u8], expected| assert_eq!(version_in(text).as_deref(), expected);
        check(b"x/registry/src/i/tokio-util-0.7.1/src/a.rs/tokio-1.54.1/src/runtime/task", Some("1.54.1"));
        check(b"/tokio-0.2.25/src/task/core.rs", Some("0.2.25"));
        check(b"/tokio-1.54/src /tokio-", None);
        check(b"", None);
    }

    #[test]
    fn what_has_no_tokio_is_said_to_have_none() {
        // Nobody reads this process's own tasks: the test program links no tokio runtime code that runs, but cargo may
        // have linked some; what matters is that a shell has none.
        let mut child = std::process::Command::new("sleep").arg("5").spawn().unwrap();
        let found = find(child.id()).map(drop);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(found, Err(NotUsable::NotTokio | NotUsable::Unreadable(_))), "{found:?}");
    }
}
