//! Probes at many places by one link (uprobe_multi, Linux 6.6): they come and go together, in milliseconds.
//!
//! A link of its own for each place takes the kernel a tenth of a second to remove. aya has no such links, so programs
//! for them are loaded and attached by the system call itself; what they share with the others are the maps.

use std::{
    collections::HashMap,
    ffi::{CString, c_int},
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::{Ebpf, maps::Map};
use aya_obj::{
    Object,
    generated::{bpf_attach_type::BPF_TRACE_UPROBE_MULTI, bpf_attr, bpf_cmd, bpf_prog_info, bpf_prog_type},
};

/// Where to probe in a file, and what the program is told there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub offset: u64,
    pub cookie: u64,
}

/// The maps that all programs share, by name.
pub struct Maps(HashMap<String, OwnedFd>);

impl Maps {
    /// Of what was loaded, before any is taken out of it.
    pub fn of(bpf: &Ebpf) -> io::Result<Self> {
        let mut maps = HashMap::new();
        for (name, map) in bpf.maps() {
            if let Map::Array(data)
            | Map::PerCpuArray(data)
            | Map::HashMap(data)
            | Map::Queue(data)
            | Map::LruHashMap(data)
            | Map::RingBuf(data)
            | Map::PerfEventArray(data) = map
            {
                maps.insert(name.to_owned(), data.fd().as_fd().try_clone_to_owned()?);
            }
        }
        Ok(Self(maps))
    }
}

/// Programs that can be loaded for such links, with their maps in place.
pub struct Programs(Object);

impl Programs {
    /// From the object that the maps were made of.
    pub fn new(object: &[u8], Maps(maps): &Maps) -> Result<Self> {
        let mut object = Object::parse(object).context("read the kernel object")?;
        let text = object.functions.keys().map(|(section, _)| *section).collect();
        let known = object.maps.clone();
        let mut numbers = Vec::with_capacity(known.len());
        for (name, map) in &known {
            let fd = maps.get(name).with_context(|| format!("the map {name} is not there"))?;
            numbers.push((name.as_str(), fd.as_raw_fd(), map));
        }
        object.relocate_maps(numbers.into_iter(), &text)?;
        object.relocate_calls(&text)?;
        Ok(Self(object))
    }

    /// Loads one of them.
    ///
    /// # Errors
    /// What the kernel says; old ones take the program, but have no such links.
    pub fn load(&self, name: &str) -> io::Result<Program> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("no program {name}"));
        let Self(object) = self;
        let program = object.programs.get(name).ok_or_else(missing)?;
        let function = object.functions.get(&program.function_key()).ok_or_else(missing)?;
        // SAFETY: integers, for which all zero is a value.
        let mut attributes: bpf_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the member that the command reads.
        let load = unsafe { &mut attributes.__bindgen_anon_3 };
        load.prog_type = bpf_prog_type::BPF_PROG_TYPE_KPROBE as u32;
        load.expected_attach_type = BPF_TRACE_UPROBE_MULTI as u32;
        load.insns = function.instructions.as_ptr() as u64;
        load.insn_cnt = function.instructions.len() as u32;
        load.license = program.license.as_ptr() as u64;
        for (to, from) in load.prog_name.iter_mut().take(15).zip(name.bytes()) {
            *to = from as _;
        }
        let fd = bpf_fd(bpf_cmd::BPF_PROG_LOAD, &mut attributes)?;
        Ok(Program { fd })
    }
}

/// A loaded program.
pub struct Program {
    fd: OwnedFd,
}

impl Program {
    /// Probes places of a file in process `pid` until the handle is dropped.
    pub fn attach(&self, pid: u32, file: &Path, places: &[Place]) -> io::Result<OwnedFd> {
        let path = CString::new(file.as_os_str().as_bytes())?;
        let offsets: Vec<u64> = places.iter().map(|place| place.offset).collect();
        let cookies: Vec<u64> = places.iter().map(|place| place.cookie).collect();
        // SAFETY: integers, for which all zero is a value.
        let mut attributes: bpf_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the members that the command reads.
        let (create, probes) = unsafe {
            let create = &raw mut attributes.link_create;
            (&mut *create, &mut (*create).__bindgen_anon_3.uprobe_multi)
        };
        create.__bindgen_anon_1.prog_fd = self.fd.as_raw_fd() as u32;
        create.attach_type = BPF_TRACE_UPROBE_MULTI as u32;
        probes.path = path.as_ptr() as u64;
        probes.offsets = offsets.as_ptr() as u64;
        probes.cookies = cookies.as_ptr() as u64;
        probes.cnt = places.len() as u32;
        probes.pid = pid;
        bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attributes)
    }

    /// Whether the kernel has such links, and binds them to whole processes: the first kernels that have them take a
    /// process's first thread for all of it. Told, as libbpf does, by what they say of a folder: it is no file to probe,
    /// but where an impossible process is noticed first, that was mended. (Loading says nothing: kernels without such
    /// links load a program for them as well.)
    pub fn attaches_to_whole_processes(&self) -> bool {
        const NO_PROCESS: u32 = u32::MAX;
        let refused = |pid| {
            let place = Place { offset: 1, cookie: 0 };
            self.attach(pid, Path::new("/"), &[place]).err().and_then(|error| error.raw_os_error())
        };
        refused(0) == Some(libc::EBADF) && refused(NO_PROCESS) == Some(libc::EINVAL)
    }

    /// CPU time of the program while the kernel's statistics were on, and what its verifier had to look at.
    pub fn figures(&self) -> io::Result<(Duration, u32)> {
        // SAFETY: integers, for which all zero is a value.
        let (mut attributes, mut info): (bpf_attr, bpf_prog_info) = unsafe { std::mem::zeroed() };
        attributes.info.bpf_fd = self.fd.as_raw_fd() as u32;
        attributes.info.info_len = size_of::<bpf_prog_info>() as u32;
        attributes.info.info = (&raw mut info) as u64;
        bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
        Ok((Duration::from_nanos(info.run_time_ns), info.verified_insns))
    }
}

fn bpf_fd(command: bpf_cmd, attributes: &mut bpf_attr) -> io::Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: a command that returns a descriptor of ours has succeeded.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf(command: bpf_cmd, attributes: &mut bpf_attr) -> io::Result<c_int> {
    // SAFETY: the attributes are those of the command, and what they point to lives until it is done.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command as c_int, &raw mut *attributes, size_of::<bpf_attr>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as c_int) }
}
