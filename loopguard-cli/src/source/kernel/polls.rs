//! Probes the polls of tokio's tasks, and reads what the kernel programs know of them.

use std::{collections::HashMap as StdHashMap, num::NonZeroU32, path::Path, thread};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData},
    programs::{
        BtfTracePoint, TracePoint, UProbe,
        trace_point::TracePointLinkId,
        uprobe::{UProbeAttachLocation, UProbeAttachPoint, UProbeLink, UProbeScope},
    },
};
use loopguard_common::{
    trail::{TaskKey, Trail},
    worker::{PLACE_MARKED, PLACE_REPORTED, PollCookie, ReturnPlace, Worker},
};

use super::{Kernel, TRACEFS, program_mut, take_map};
use crate::{
    core::event::Tid,
    runtime::{
        probe_site::ProbeSite,
        tokio::{PollSite, ReturnSite},
    },
};

const POLL: &str = "on_task_poll";
const RETURN: &str = "on_task_return";
/// What tells which threads a poll wakes and starts: loaded with everything else, attached where tokio is.
pub const WAKES: [(&str, &str); 2] = [("on_sched_waking", "sched_waking"), ("on_sched_wakeup_new", "sched_wakeup_new")];
const BLOCKING: &str = "on_blocking_task";
/// The system calls with which connections are read and written, by the program that looks at their ends.
const TRANSFERS: [(&str, &str); 6] = [
    ("on_read", "recvfrom"),
    ("on_read", "read"),
    ("on_read", "readv"),
    ("on_write", "sendto"),
    ("on_write", "write"),
    ("on_write", "writev"),
];

pub struct PollProbes {
    workers: Array<MapData, Worker>,
    trails: HashMap<MapData, TaskKey, Trail>,
    returns: HashMap<MapData, ReturnPlace, u32>,
    are_loaded: bool,
    /// By process: what is attached while its polls are marked.
    marked: StdHashMap<u32, Vec<UProbeLink>>,
    /// By process: what stays.
    blocking: StdHashMap<u32, Vec<UProbeLink>>,
    /// Attached while the polls of any process are marked.
    transfers: Vec<(&'static str, TracePointLinkId)>,
}

impl PollProbes {
    pub fn new(bpf: &mut Ebpf) -> Result<Self> {
        Ok(Self {
            workers: take_map(bpf, "WORKERS")?.try_into()?,
            trails: take_map(bpf, "TRAILS")?.try_into()?,
            returns: take_map(bpf, "RETURNS")?.try_into()?,
            are_loaded: false,
            marked: StdHashMap::new(),
            blocking: StdHashMap::new(),
            transfers: Vec::new(),
        })
    }

    pub fn forget_worker(&mut self, slot: u32) -> Result<()> {
        Ok(self.workers.set(slot, Worker::default(), 0)?)
    }
}

/// Removes probes aside: the kernel takes about a tenth of a second for each, one after the other, and the loops are to
/// be watched meanwhile.
fn remove(probes: Vec<UProbeLink>) {
    thread::spawn(move || drop(probes));
}

impl Kernel {
    /// Loads the programs that only processes with tokio need.
    fn load_polls(&mut self) -> Result<()> {
        if self.polls.are_loaded {
            return Ok(());
        }
        for name in [POLL, RETURN, BLOCKING] {
            let program: &mut UProbe = program_mut(&mut self.bpf, name)?.try_into()?;
            program.load().with_context(|| format!("load the program {name}"))?;
        }
        for name in ["on_read", "on_write"] {
            let program: &mut TracePoint = program_mut(&mut self.bpf, name)?.try_into()?;
            program.load().with_context(|| format!("load the program {name}"))?;
        }
        for (name, tracepoint) in WAKES {
            let program: &mut BtfTracePoint = program_mut(&mut self.bpf, name)?.try_into()?;
            program.attach().with_context(|| format!("attach {tracepoint}"))?;
        }
        self.polls.are_loaded = true;
        Ok(())
    }

    /// Probes where tasks of the blocking pool begin; they stay, since they only cost where such tasks run.
    pub fn mark_blocking_tasks(&mut self, pid: u32, sites: &[ProbeSite]) -> Result<()> {
        self.load_polls()?;
        if self.polls.blocking.contains_key(&pid) {
            return Ok(());
        }
        let links = sites.iter().map(|site| self.attach_probe(BLOCKING, pid, (site, 0))).collect::<Result<Vec<_>>>()?;
        self.polls.blocking.insert(pid, links);
        Ok(())
    }

    /// Probes where polls begin, and where they are known to end.
    pub fn mark_polls(&mut self, pid: u32, polls: &[PollSite], returns: &[(u64, ReturnSite)]) -> Result<()> {
        self.load_polls()?;
        if self.polls.marked.contains_key(&pid) {
            return Ok(());
        }
        self.polls.marked.insert(pid, Vec::new());
        self.watch_transfers()?;
        for (address, site) in returns {
            self.mark_return(pid, *address, site)?;
        }
        for poll in polls {
            let cookie = PollCookie { task_type: poll.task, id_offset: poll.id_offset, stack_down: poll.stack_down };
            let link = self.attach_probe(POLL, pid, (&poll.site, cookie.word()))?;
            self.polls.marked.entry(pid).or_default().push(link);
        }
        Ok(())
    }

    /// Probes where polls end that return to `address`. From then on such polls are steps.
    pub fn mark_return(&mut self, pid: u32, address: u64, site: &ReturnSite) -> Result<()> {
        let cookie = i64::from(site.stack_down) as u64;
        let link = self.attach_probe(RETURN, pid, (&site.site, cookie))?;
        self.polls.marked.entry(pid).or_default().push(link);
        let place = ReturnPlace { address, tgid: pid, _pad: 0 };
        let known = self.polls.returns.get(&place, 0).unwrap_or(PLACE_REPORTED);
        Ok(self.polls.returns.insert(place, known | PLACE_MARKED, 0)?)
    }

    fn attach_probe(&mut self, name: &str, pid: u32, (site, cookie): (&ProbeSite, u64)) -> Result<UProbeLink> {
        let program: &mut UProbe = program_mut(&mut self.bpf, name)?.try_into()?;
        let scope = UProbeScope::OneProcess(NonZeroU32::new(pid).context("pid 0 is the kernel's")?);
        let point =
            UProbeAttachPoint { location: UProbeAttachLocation::AbsoluteOffset(site.offset), cookie: Some(cookie) };
        let link = program.attach(point, &site.file, scope).with_context(|| format!("attach {name}"))?;
        Ok(program.take_link(link)?)
    }

    fn watch_transfers(&mut self) -> Result<()> {
        if !self.polls.transfers.is_empty() {
            return Ok(());
        }
        for (name, call) in TRANSFERS {
            let tracepoint = format!("sys_exit_{call}");
            // Not every architecture and kernel has all of them.
            if Path::new(TRACEFS).join("events/syscalls").join(&tracepoint).exists() {
                let program: &mut TracePoint = program_mut(&mut self.bpf, name)?.try_into()?;
                let link = program.attach("syscalls", &tracepoint).with_context(|| format!("attach {tracepoint}"))?;
                self.polls.transfers.push((name, link));
            }
        }
        Ok(())
    }

    /// Takes the probes of a process's polls away.
    pub fn unmark_polls(&mut self, pid: u32) {
        let Some(links) = self.polls.marked.remove(&pid) else { return };
        // Until they are marked again nobody sees the ends of polls.
        let places: Vec<ReturnPlace> =
            self.polls.returns.keys().filter_map(Result::ok).filter(|place| place.tgid == pid).collect();
        for place in places {
            let _ = self.polls.returns.remove(&place);
        }
        remove(links);
        if self.polls.marked.is_empty() {
            for (name, link) in std::mem::take(&mut self.polls.transfers) {
                if let Ok(program) = program_mut(&mut self.bpf, name).map(<&mut TracePoint>::try_from)
                    && let Ok(program) = program
                {
                    let _ = program.detach(link);
                }
            }
        }
    }

    /// The process is gone.
    pub fn forget_polls(&mut self, pid: u32) {
        self.unmark_polls(pid);
        if let Some(links) = self.polls.blocking.remove(&pid) {
            remove(links);
        }
    }

    /// Which task a worker polls.
    pub fn worker(&self, tid: Tid) -> Option<Worker> {
        let slot = self.owners.iter().position(|owner| *owner == Some(tid))?;
        self.polls.workers.get(&(slot as u32), 0).ok()
    }

    /// What the connection of a task has read and written.
    pub fn trail(&self, pid: u32, task_id: u64) -> Option<Box<Trail>> {
        self.polls.trails.get(&TaskKey { task_id, tgid: pid, _pad: 0 }, 0).ok().map(Box::new)
    }
}
