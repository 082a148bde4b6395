//! Probes the polls of tokio's tasks, and reads what the kernel programs know of them.

use std::{collections::HashMap as StdHashMap, num::NonZeroU32, os::fd::OwnedFd, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData},
    programs::{
        BtfTracePoint, TracePoint, UProbe,
        tp_btf::BtfTracePointLinkId,
        trace_point::TracePointLinkId,
        uprobe::{UProbeAttachLocation, UProbeAttachPoint, UProbeLink, UProbeScope},
    },
};
use loopguard_common::{
    trail::{TaskKey, Trail},
    worker::{PLACE_MARKED, PLACE_REPORTED, PollCookie, ReturnPlace, Worker},
};

use super::{
    Kernel, OBJECT, TRACEFS,
    multi::{self, Place},
    program_mut, take_map,
};
use crate::{
    core::event::Tid,
    runtime::{
        probe_site::ProbeSite,
        tokio::{PollSite, ReturnSite},
    },
};

const POLL: &str = "on_task_poll";
const RETURN: &str = "on_task_return";
/// What tells which threads a poll wakes and starts: loaded with everything else, attached while polls are marked.
pub const WAKES: [(&str, &str); 2] = [("on_sched_waking", "sched_waking"), ("on_sched_wakeup_new", "sched_wakeup_new")];
const BLOCKING: &str = "on_blocking_task";
const PROBES: [&str; 3] = [POLL, RETURN, BLOCKING];
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
    maps: multi::Maps,
    way: Option<Way>,
    /// By process: what is attached while its polls are marked.
    marked: StdHashMap<u32, Vec<Placed>>,
    /// By process: what stays.
    blocking: StdHashMap<u32, Vec<Placed>>,
    /// Attached while the polls of any process are marked.
    transfers: Vec<(&'static str, TracePointLinkId)>,
    wakes: Vec<(&'static str, BtfTracePointLinkId)>,
}

/// How probes are attached.
enum Way {
    /// All of a program by one link.
    Together(Box<[(&'static str, multi::Program)]>),
    /// Each by its own.
    OneByOne,
}

/// Probes that stay until this is dropped.
#[expect(dead_code, reason = "what they hold is only dropped")]
enum Placed {
    Together(OwnedFd),
    One(UProbeLink),
}

impl PollProbes {
    pub fn new(bpf: &mut Ebpf, maps: multi::Maps) -> Result<Self> {
        Ok(Self {
            maps,
            workers: take_map(bpf, "WORKERS")?.try_into()?,
            trails: take_map(bpf, "TRAILS")?.try_into()?,
            returns: take_map(bpf, "RETURNS")?.try_into()?,
            way: None,
            marked: StdHashMap::new(),
            blocking: StdHashMap::new(),
            transfers: Vec::new(),
            wakes: Vec::new(),
        })
    }

    pub fn forget_worker(&mut self, slot: u32) -> Result<()> {
        Ok(self.workers.set(slot, Worker::default(), 0)?)
    }
}

impl Kernel {
    /// Loads the programs that only processes with tokio need.
    pub fn load_polls(&mut self) -> Result<()> {
        if self.polls.way.is_some() {
            return Ok(());
        }
        let way = match self.load_together() {
            Some(programs) => Way::Together(programs),
            None => {
                for name in PROBES {
                    let program: &mut UProbe = program_mut(&mut self.bpf, name)?.try_into()?;
                    program.load().with_context(|| format!("load the program {name}"))?;
                }
                Way::OneByOne
            }
        };
        for name in ["on_read", "on_write"] {
            let program: &mut TracePoint = program_mut(&mut self.bpf, name)?.try_into()?;
            program.load().with_context(|| format!("load the program {name}"))?;
        }
        self.polls.way = Some(way);
        Ok(())
    }

    /// For links that the kernel may not have; the other way works, or says why not.
    fn load_together(&self) -> Option<Box<[(&'static str, multi::Program)]>> {
        let programs = multi::Programs::new(OBJECT, &self.polls.maps).ok()?;
        let loaded = PROBES.into_iter().map(|name| Some((name, programs.load(name).ok()?)));
        let loaded = loaded.collect::<Option<Box<[_]>>>()?;
        loaded.first()?.1.attaches_to_whole_processes().then_some(loaded)
    }

    /// The programs among these that aya knows nothing of: name, CPU time, and what the verifier had to look at.
    pub(super) fn poll_figures(&self) -> impl Iterator<Item = (&'static str, Duration, u32)> {
        let programs = match &self.polls.way {
            Some(Way::Together(programs)) => &programs[..],
            Some(Way::OneByOne) | None => &[],
        };
        programs.iter().filter_map(|(name, program)| {
            let (run_time, instructions) = program.figures().ok()?;
            Some((*name, run_time, instructions))
        })
    }

    /// Probes where tasks of the blocking pool begin; they stay, since they only cost where such tasks run.
    pub fn mark_blocking_tasks(&mut self, pid: u32, sites: &[ProbeSite]) -> Result<()> {
        self.load_polls()?;
        if self.polls.blocking.contains_key(&pid) {
            return Ok(());
        }
        let sites: Vec<_> = sites.iter().map(|site| (site, 0)).collect();
        let placed = self.attach_probes(BLOCKING, pid, &sites)?;
        self.polls.blocking.insert(pid, placed);
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
        self.watch_wakes()?;
        self.mark_returns(pid, returns)?;
        let cookie = |poll: &PollSite| PollCookie {
            task_type: poll.task,
            id_offset: poll.id_offset,
            stack_down: poll.stack_down,
        };
        let sites: Vec<_> = polls.iter().map(|poll| (&poll.site, cookie(poll).word())).collect();
        let placed = self.attach_probes(POLL, pid, &sites)?;
        self.polls.marked.entry(pid).or_default().extend(placed);
        Ok(())
    }

    /// Probes where polls end, each by the address that they return to. From then on such polls are steps.
    pub fn mark_returns(&mut self, pid: u32, returns: &[(u64, ReturnSite)]) -> Result<()> {
        let sites: Vec<_> = returns.iter().map(|(_, end)| (&end.site, i64::from(end.stack_down) as u64)).collect();
        let placed = self.attach_probes(RETURN, pid, &sites)?;
        self.polls.marked.entry(pid).or_default().extend(placed);
        for (address, _) in returns {
            let place = ReturnPlace { address: *address, tgid: pid, _pad: 0 };
            let known = self.polls.returns.get(&place, 0).unwrap_or(PLACE_REPORTED);
            self.polls.returns.insert(place, known | PLACE_MARKED, 0)?;
        }
        Ok(())
    }

    /// Each with what the program is told there.
    fn attach_probes(&mut self, name: &'static str, pid: u32, sites: &[(&ProbeSite, u64)]) -> Result<Vec<Placed>> {
        let process = NonZeroU32::new(pid).context("pid 0 is the kernel's")?;
        if let Some(Way::Together(programs)) = &self.polls.way {
            let (_, program) =
                programs.iter().find(|(known, _)| *known == name).with_context(|| format!("no program {name}"))?;
            let place = |(site, cookie): &(&ProbeSite, u64)| Place { offset: site.offset, cookie: *cookie };
            // All of a process's are in its program's file.
            let of_one_file = sites.chunk_by(|(one, _), (other, _)| one.file == other.file);
            return of_one_file
                .map(|sites| {
                    let places: Vec<Place> = sites.iter().map(place).collect();
                    let link = program.attach(pid, &sites[0].0.file, &places);
                    Ok(Placed::Together(link.with_context(|| format!("attach {name}"))?))
                })
                .collect();
        }
        let program: &mut UProbe = program_mut(&mut self.bpf, name)?.try_into()?;
        let place = |(site, cookie): &(&ProbeSite, u64)| {
            let point = UProbeAttachPoint {
                location: UProbeAttachLocation::AbsoluteOffset(site.offset),
                cookie: Some(*cookie),
            };
            let link = program.attach(point, &site.file, UProbeScope::OneProcess(process));
            Ok(Placed::One(program.take_link(link.with_context(|| format!("attach {name}"))?)?))
        };
        sites.iter().map(place).collect()
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

    fn watch_wakes(&mut self) -> Result<()> {
        if !self.polls.wakes.is_empty() {
            return Ok(());
        }
        for (name, tracepoint) in WAKES {
            let program: &mut BtfTracePoint = program_mut(&mut self.bpf, name)?.try_into()?;
            let link = program.attach().with_context(|| format!("attach {tracepoint}"))?;
            self.polls.wakes.push((name, link));
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
        self.closing.close(links);
        if self.polls.marked.is_empty() {
            for (name, link) in std::mem::take(&mut self.polls.transfers) {
                if let Ok(program) = program_mut(&mut self.bpf, name).map(<&mut TracePoint>::try_from)
                    && let Ok(link) = program.and_then(|program| program.take_link(link))
                {
                    self.closing.close(link);
                }
            }
            for (name, link) in std::mem::take(&mut self.polls.wakes) {
                if let Ok(program) = program_mut(&mut self.bpf, name).map(<&mut BtfTracePoint>::try_from)
                    && let Ok(link) = program.and_then(|program| program.take_link(link))
                {
                    self.closing.close(link);
                }
            }
        }
    }

    /// The process is gone.
    pub fn forget_polls(&mut self, pid: u32) {
        self.unmark_polls(pid);
        if let Some(links) = self.polls.blocking.remove(&pid) {
            self.closing.close(links);
        }
    }

    /// Which task a worker polls.
    pub fn worker(&self, tid: Tid) -> Option<Worker> {
        self.polls.workers.get(&self.slot_of(tid)?, 0).ok()
    }

    /// What the connection of a task has read and written.
    pub fn trail(&self, pid: u32, task_id: u64) -> Option<Box<Trail>> {
        self.polls.trails.get(&TaskKey { task_id, tgid: pid, _pad: 0 }, 0).ok().map(Box::new)
    }
}
