//! Turns places in files into functions, files and lines: those that were inlined there too.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    ops::Range,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use blazesym::symbolize::{
    CodeInfo, Input, Symbolized, Symbolizer,
    source::{Elf, Source},
};

use super::{
    object::{Object, debug_file},
    origin::{Module, origin},
    recent::Recent,
    shared::Shared,
    space::Place,
};
use crate::core::event::{Frame, FrameKind, Origin};
use crate::runtime::target_file;

/// Places that are remembered at least. A server runs through some hundreds again and again, and through others once.
const PLACES: usize = 512;
/// Functions of the language's own files that are remembered at most: a server runs through a hundred or two.
const FUNCTIONS: usize = 1024;
const MAX_NAME: usize = 512;
const MAX_PATH: usize = 1024;
/// Inlined functions at one place.
const MAX_INLINED: usize = 64;

/// The function at a place and what was inlined into it there, innermost first.
#[derive(Clone, Debug)]
pub struct Named {
    pub frames: Arc<[Arc<Frame>]>,
    /// No function's name could be found.
    pub is_unnamed: bool,
    /// The interpreter's evaluation loop, in which Python frames run.
    pub is_eval: bool,
}

/// What was read of a file's debug information is kept for so many times as long as it took to begin reading it, from
/// the last place on: it grows with every place, and once the usual places are known few others come.
const KEPT_TIMES: u32 = 20;

/// Names places and remembers the answers by file and address: a file is the same in all processes that map it.
pub struct Names {
    readers: HashMap<u32, Reader>,
    known: Recent<(u32, u64), Named>,
    functions: Functions,
    /// A line has many places, and a function that is inlined everywhere even more.
    frames: Shared<Frame>,
    /// A function has many lines, and a file many functions.
    texts: Shared<str>,
    sources: HashMap<u32, Sources>,
    /// Files in which a name was not found, once each.
    nameless: HashMap<u32, Arc<Object>>,
    new_nameless: Vec<Arc<Object>>,
}

impl Default for Names {
    fn default() -> Self {
        Self {
            readers: HashMap::new(),
            known: Recent::of(PLACES),
            functions: Functions::default(),
            frames: Shared::default(),
            texts: Shared::default(),
            sources: HashMap::new(),
            nameless: HashMap::new(),
            new_nameless: Vec::new(),
        }
    }
}

impl Names {
    pub fn name(&mut self, pid: u32, executable: &str, place: &Place) -> Named {
        let key = (place.object.id, place.address);
        if let Some(known) = self.functions.at(key).or_else(|| self.known.get(key)) {
            return known;
        }
        let named = match self.look_up(pid, executable, place) {
            Found::Place(named) => named,
            Found::Function(range, named) => {
                self.functions.insert(place.object.id, range, named.clone());
                return named;
            }
        };
        if named.is_unnamed && self.nameless.insert(place.object.id, place.object.clone()).is_none() {
            self.new_nameless.push(place.object.clone());
        }
        self.known.insert(key, named.clone());
        named
    }

    /// Files that were found to lack names since the last call.
    pub fn take_nameless(&mut self) -> Vec<Arc<Object>> {
        std::mem::take(&mut self.new_nameless)
    }

    /// Whether anything is remembered of what was read of debug information.
    pub fn is_reading(&self) -> bool {
        !self.readers.is_empty()
    }

    /// Forgets what was read of debug information some time ago.
    pub fn let_go(&mut self) {
        self.readers.retain(|_, reader| reader.used.elapsed() < reader.took * KEPT_TIMES);
    }

    fn look_up(&mut self, pid: u32, executable: &str, place: &Place) -> Found {
        let object = &place.object;
        let sources = self.sources.entry(object.id).or_insert_with(|| Sources::of(pid, object));
        let module = Module { path: &object.path, is_executable: object.path == executable };
        let at = Input::VirtOffset(place.address);
        // Nobody changes a line of the interpreter or of libc: the names of their functions are enough, and one look
        // serves for all of a function. Of the interpreter the files are needed too: they tell the modules that a program
        // calls from what runs the program.
        let is_told_by_function = module.is_runtime();
        let by_symbols = is_told_by_function && !module.is_interpreter();
        let first = if by_symbols { &sources.symbol_table } else { &sources.debug_information };
        let reader = self.readers.entry(object.id).or_insert_with(|| Reader::open(first, at));
        reader.used = Instant::now();
        let mut found = reader.symbolizer.symbolize_single(first, at);
        if by_symbols && !matches!(found, Ok(Symbolized::Sym(_))) {
            found = reader.symbolizer.symbolize_single(&sources.debug_information, at);
        }
        let Ok(Symbolized::Sym(symbol)) = found else {
            let function = format!("{}+{:#x}", object.name(), place.address);
            let frame = frame(&mut self.texts, &module, Name::Offset(function), None);
            return Found::Place(Named { frames: [Arc::new(frame)].into(), is_unnamed: true, is_eval: false });
        };
        let is_eval = as_written(&symbol.name) == EVAL;
        if is_told_by_function {
            let name = Name::Function(as_written(&symbol.name).to_owned());
            let frame = Frame { line: None, ..frame(&mut self.texts, &module, name, symbol.code_info.as_deref()) };
            let named = Named { frames: [self.frames.one(frame)].into(), is_unnamed: false, is_eval };
            let range = symbol.addr..symbol.addr.saturating_add(symbol.size.unwrap_or_default() as u64);
            return if range.contains(&place.address) { Found::Function(range, named) } else { Found::Place(named) };
        }
        let mut name = symbol.name.into_owned();
        if symbol.code_info.as_deref().is_some_and(is_rust)
            && lacks_path(&name)
            && let Ok(Symbolized::Sym(same)) = reader.symbolizer.symbolize_single(&sources.symbol_table, at)
            && is_path_of(&same.name, &name)
        {
            name = same.name.into_owned();
        }
        // Outermost first: the location of each is where it stands in that function.
        let outer = frame(&mut self.texts, &module, Name::Function(name), symbol.code_info.as_deref());
        let inlined = symbol.inlined.iter().take(MAX_INLINED).map(|inner| {
            frame(&mut self.texts, &module, Name::Function(inner.name.to_string()), inner.code_info.as_ref())
        });
        let mut frames: Vec<_> = std::iter::once(outer).chain(inlined).map(|frame| self.frames.one(frame)).collect();
        frames.reverse();
        Found::Place(Named { frames: frames.into(), is_unnamed: false, is_eval })
    }
}

/// What a name is true for.
enum Found {
    /// For the place that was asked for.
    Place(Named),
    /// For all places between two addresses of the file.
    Function(Range<u64>, Named),
}

/// Functions of which no lines are told, by their files and addresses.
#[derive(Default)]
struct Functions(BTreeMap<(u32, u64), (u64, Named)>);

impl Functions {
    fn at(&self, (object, address): (u32, u64)) -> Option<Named> {
        let (&(of, _), (end, named)) = self.0.range(..=(object, address)).next_back()?;
        (of == object && address < *end).then(|| named.clone())
    }

    fn insert(&mut self, object: u32, range: Range<u64>, named: Named) {
        if self.0.len() >= FUNCTIONS {
            self.0.clear();
        }
        self.0.insert((object, range.start), (range.end, named));
    }
}

/// What was read of one file.
struct Reader {
    symbolizer: Symbolizer,
    /// How long the first place took.
    took: Duration,
    used: Instant,
}

impl Reader {
    fn open(source: &Source<'static>, first: Input<u64>) -> Self {
        let opened = Instant::now();
        let symbolizer = Symbolizer::builder().enable_auto_reload(false).build();
        // The answer comes once more, at no cost, to who asks for it.
        let _ = symbolizer.symbolize_single(source, first);
        Self { symbolizer, took: opened.elapsed(), used: Instant::now() }
    }
}

/// The function in which CPython runs frames (`Python/ceval.c`).
const EVAL: &str = "_PyEval_EvalFrameDefault";

/// The name of a function of C in its source: compilers call parts and copies of it `f.cold` and `f.constprop.0`.
fn as_written(symbol: &str) -> &str {
    match symbol.split_once('.') {
        Some((name, _)) if name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') => name,
        _ => symbol,
    }
}

/// Where a file's names are.
struct Sources {
    debug_information: Source<'static>,
    symbol_table: Source<'static>,
    /// Open as long as it is read from.
    _debug_file: Option<File>,
}

impl Sources {
    fn of(pid: u32, object: &Object) -> Self {
        let debug_file = debug_file(pid, object);
        let path = debug_file.as_ref().map_or_else(|| object.own_path().to_owned(), target_file::own_path);
        // A name in the file would be followed wherever it leads; where that is right, it was found already.
        let follows_link = debug_file.is_none() && object.image.section_bytes(".gnu_debuglink").is_some();
        // Split debug information lies beside the file, so that has to be opened by its own name.
        let is_split = target_file::open(pid, &format!("{}.dwp", object.path)).is_ok();
        let path = if is_split { PathBuf::from(format!("/proc/{pid}/root{}", object.path)) } else { path };
        let source = |debug_information: bool| {
            let mut elf = Elf::new(&path);
            elf.debug_syms = debug_information && !follows_link;
            Source::Elf(elf)
        };
        Self { debug_information: source(true), symbol_table: source(false), _debug_file: debug_file }
    }
}

fn is_rust(at: &CodeInfo) -> bool {
    at.file.as_encoded_bytes().ends_with(b".rs")
}

/// Line tables alone (Cargo's `line-tables-only`) say `poll<app::Handler>` and `{closure#0}`, not in which module that is.
fn lacks_path(name: &str) -> bool {
    !name.starts_with('<') && !name.split('<').next().unwrap_or(name).contains("::")
}

/// Whether `path`, a name in full, ends in `name`. Functions of the same code may share a place under one of their names.
fn is_path_of(path: &str, name: &str) -> bool {
    let name = name.split('<').next().unwrap_or(name);
    let last = last_part(path);
    // What has no name of its own is called by its kind, not by everybody alike: `{closure#0}`, `{{closure}}`.
    last.len() < path.len() && (last == name || last.starts_with('{') && name.starts_with('{'))
}

/// `f` of `<a::B as c::D>::f::<g::H>`.
fn last_part(path: &str) -> &str {
    let bytes = path.as_bytes();
    let (mut depth, mut start, mut end) = (0, 0, path.len());
    for (at, byte) in bytes.iter().enumerate() {
        match byte {
            b'<' => depth += 1,
            // Not of `fn() -> T`.
            b'>' if at == 0 || bytes[at - 1] != b'-' => depth -= 1,
            b':' if depth == 0 && bytes[..at].ends_with(b":") => match bytes.get(at + 1) {
                Some(b'<') => end = at - 1,
                _ => (start, end) = (at + 1, path.len()),
            },
            _ => {}
        }
    }
    path.get(start..end).unwrap_or(path)
}

enum Name {
    Function(String),
    /// `file+0x1234`.
    Offset(String),
}

fn frame(texts: &mut Shared<str>, module: &Module, name: Name, at: Option<&CodeInfo>) -> Frame {
    let file = at.map(file);
    let (function, known) = match name {
        Name::Function(name) => (name, true),
        Name::Offset(name) => (name, false),
    };
    let origin = origin(module, known.then_some(&function), file.as_deref());
    Frame {
        kind: FrameKind::Native,
        origin,
        function: texts.one(bounded(function, MAX_NAME)),
        file: file.map(|file| texts.one(bounded(file, MAX_PATH))),
        line: at.and_then(|at| at.line),
        module: Some(texts.one(module.path)),
    }
}

fn file(at: &CodeInfo) -> String {
    let path = at.to_path();
    let text = path.to_string_lossy();
    text.replace("/./", "/")
}

fn bounded(mut text: String, limit: usize) -> String {
    if text.len() > limit {
        let end = (0..=limit).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

/// A call at an address that is in no file.
pub fn unplaced(address: u64) -> Named {
    let frame = Frame {
        kind: FrameKind::Native,
        origin: Origin::Library,
        function: format!("{address:#x}").into(),
        file: None,
        line: None,
        module: None,
    };
    Named { frames: [Arc::new(frame)].into(), is_unnamed: true, is_eval: false }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::symbol::{object::Objects, space::AddressSpace};

    #[test]
    fn names_come_again_once_what_was_read_is_let_go() {
        let (pid, mut objects) = (std::process::id(), Objects::default());
        let mut space = AddressSpace::new(pid);
        space.refresh();
        let here = names_come_again_once_what_was_read_is_let_go as fn() as usize as u64;
        let Ok(place) = space.place(&mut objects, here) else { panic!("our own code is in our own file") };
        let mut names = Names::default();
        let name = |names: &mut Names| match names.look_up(pid, "", &place) {
            Found::Place(named) | Found::Function(_, named) => named.frames,
        };
        let first = name(&mut names);
        assert!(first.iter().any(|frame| frame.function.contains("names_come_again")), "{first:?}");
        assert!(names.is_reading());
        for reader in names.readers.values_mut() {
            reader.used = reader.used.checked_sub(Duration::from_secs(600)).expect("the machine runs for longer");
        }
        names.let_go();
        assert!(!names.is_reading());
        assert_eq!(name(&mut names), first);
    }

    #[test]
    fn one_look_names_all_of_a_function_of_the_languages_own() {
        let (pid, mut objects) = (std::process::id(), Objects::default());
        let mut space = AddressSpace::new(pid);
        space.refresh();
        let start = libc::strtol as *const () as u64;
        let mut at = |address: u64| match space.place(&mut objects, address) {
            Ok(place) => place,
            Err(_) => panic!("libc is a file"),
        };
        let (start, inside) = (at(start), at(start + 1));
        assert!(start.object.name().starts_with("libc.") || start.object.name().starts_with("ld-musl"));
        let mut names = Names::default();
        let first = names.name(pid, "", &start);
        let [frame] = &*first.frames else { panic!("nothing inlined is told: {first:?}") };
        assert!(frame.function.contains("strtol") && !first.is_unnamed, "{frame:?}");
        assert_eq!((frame.origin, frame.line), (Origin::Runtime, None));
        names.readers.clear();
        assert!(Arc::ptr_eq(&names.name(pid, "", &inside).frames[0], frame));
        assert!(!names.is_reading());
    }

    #[test]
    fn the_interpreters_functions_have_files_and_no_lines() {
        let path = std::env::current_exe().expect("a test is a file");
        let file = std::fs::File::open(&path).expect("it can be read");
        let object = Arc::new(Object::new(1, file, "/usr/bin/python3.13").expect("it is a program"));
        let (pid, mut space) = (std::process::id(), AddressSpace::new(std::process::id()));
        space.refresh();
        let Ok(here) =
            space.place(&mut Objects::default(), as_written as fn(&'static str) -> &'static str as usize as u64)
        else {
            panic!("our own code is in our own file")
        };
        let at = |address: u64| Place { object: object.clone(), address };
        let mut names = Names::default();
        let first = names.name(pid, "", &at(here.address));
        let [frame] = &*first.frames else { panic!("nothing inlined is told: {first:?}") };
        assert!(frame.function.contains("as_written"), "{frame:?}");
        assert!(frame.file.as_deref().is_some_and(|file| file.ends_with("names.rs")), "{frame:?}");
        assert_eq!((frame.origin, frame.line), (Origin::Runtime, None));
        names.readers.clear();
        assert!(Arc::ptr_eq(&names.name(pid, "", &at(here.address + 1)).frames[0], frame));
        assert!(!names.is_reading());
    }

    #[test]
    fn functions_are_known_from_their_first_byte_to_their_last_and_in_their_file() {
        let mut functions = Functions::default();
        functions.insert(1, 100..110, unplaced(1));
        functions.insert(2, 50..60, unplaced(2));
        let known = |object, address| functions.at((object, address)).map(|named| named.frames[0].function.to_string());
        for (object, address, expected) in [
            (1, 99, None),
            (1, 100, Some("0x1")),
            (1, 109, Some("0x1")),
            (1, 110, None),
            (2, 49, None),
            (2, 55, Some("0x2")),
            (2, 105, None),
            (3, 55, None),
        ] {
            assert_eq!(known(object, address).as_deref(), expected, "{object} {address}");
        }
    }

    #[test]
    fn what_a_compiler_added_to_a_name_is_no_part_of_it() {
        for (symbol, name) in [
            ("gc_collect_main.constprop.0", "gc_collect_main"),
            ("time_sleep", "time_sleep"),
            ("std::filesystem::copy(char const*) [clone .cold]", "std::filesystem::copy(char const*) [clone .cold]"),
            ("", ""),
        ] {
            assert_eq!(as_written(symbol), name);
        }
    }

    #[test]
    fn a_name_in_full_is_taken_only_for_the_same_function() {
        for (path, name, same) in [
            ("shop::orders::total", "total", true),
            ("shop::orders::total::<shop::Item>", "total<shop::Item>", true),
            ("<shop::Cart as core::future::Future>::poll", "poll", true),
            ("<fn() -> shop::Cart as core::ops::FnOnce<()>>::call_once", "call_once<fn() -> shop::Cart, ()>", true),
            ("shop::main::{closure#0}", "{closure#0}", true),
            ("shop::handler::{{closure}}", "{async_fn#0}", true),
            ("shop::orders::sum", "total", false),
            ("shop::orders::subtotal", "total", false),
            ("total", "total", false),
            ("shop::total::<shop", "total", true),
            ("::", "", true),
            ("", "", false),
        ] {
            assert_eq!(is_path_of(path, name), same, "{path} {name}");
        }
        assert!(lacks_path("{closure#0}") && lacks_path("call_once<shop::Cart, ()>"));
        assert!(!lacks_path("shop::total") && !lacks_path("<shop::Cart>::total"));
    }
}
