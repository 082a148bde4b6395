//! The part of the kernel programs that reads a server's own probes: where they are placed, and the open requests.

use std::{collections::HashMap as StdHashMap, num::NonZeroU32};

use anyhow::{Context as _, Result, bail};
use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData},
    programs::{
        UProbe,
        uprobe::{UProbeAttachLocation, UProbeAttachPoint, UProbeLinkId, UProbeScope},
    },
};
use loopguard_common::request::{ProbeArguments, RequestKey, RequestTotals};

use super::{Kernel, program_mut, take_map};
use crate::runtime::usdt::{RequestProbe, Site};

pub(super) struct RequestMaps {
    arguments: Array<MapData, ProbeArguments>,
    open: HashMap<MapData, RequestKey, RequestTotals>,
    /// What is in `arguments`: the sites of all processes share the few ways in which arguments are passed.
    known: Vec<ProbeArguments>,
    /// By process.
    links: StdHashMap<u32, Vec<(RequestProbe, UProbeLinkId)>>,
}

impl RequestMaps {
    pub(super) fn take(bpf: &mut Ebpf) -> Result<Self> {
        Ok(Self {
            arguments: take_map(bpf, "PROBE_ARGUMENTS")?.try_into()?,
            open: take_map(bpf, "REQUESTS")?.try_into()?,
            known: Vec::new(),
            links: StdHashMap::new(),
        })
    }

    /// The index of these arguments in the kernel's table.
    fn index(&mut self, arguments: &ProbeArguments) -> Result<u32> {
        if let Some(index) = self.known.iter().position(|known| known == arguments) {
            return Ok(index as u32);
        }
        let index = self.known.len() as u32;
        if index >= self.arguments.len() {
            bail!("there are more kinds of probe sites than the kernel programs can tell apart");
        }
        self.arguments.set(index, arguments, 0)?;
        self.known.push(*arguments);
        Ok(index)
    }
}

impl Kernel {
    /// Has the programs called when `pid` passes this site.
    pub fn attach_request(&mut self, pid: u32, site: &Site) -> Result<()> {
        let index = self.requests.index(&site.arguments)?;
        let program: &mut UProbe = program_mut(&mut self.bpf, program(site.probe))?.try_into()?;
        let scope = UProbeScope::OneProcess(NonZeroU32::new(pid).context("pid 0 is the kernel's")?);
        let point = UProbeAttachPoint {
            location: UProbeAttachLocation::AbsoluteOffset(site.offset),
            cookie: Some(u64::from(index)),
        };
        let link = program.attach(point, &site.file, scope).with_context(|| format!("attach {}", site.probe.name()))?;
        self.requests.links.entry(pid).or_default().push((site.probe, link));
        Ok(())
    }

    pub fn detach_requests(&mut self, pid: u32) {
        // Enters first: what was entered can still be left.
        let mut links = self.requests.links.remove(&pid).unwrap_or_default();
        links.sort_by_key(|(probe, _)| *probe != RequestProbe::Enter);
        for (probe, link) in links {
            if let Ok(program) = program_mut(&mut self.bpf, program(probe))
                && let Ok(program) = <&mut UProbe>::try_from(program)
                && let Ok(link) = program.take_link(link)
            {
                self.closing.close(link);
            }
        }
    }

    /// Makes room for another request: this one will not end.
    pub fn forget_request(&mut self, pid: u32, id: u64) {
        let _ = self.requests.open.remove(&RequestKey { id, tgid: pid, _pad: 0 });
    }

    /// The requests of which the kernel holds sums.
    pub fn open_requests(&self) -> Vec<RequestKey> {
        self.requests.open.keys().filter_map(Result::ok).take(super::MAX_OPEN_REQUESTS as usize).collect()
    }
}

pub(super) fn program(probe: RequestProbe) -> &'static str {
    match probe {
        RequestProbe::Start => "on_request_start",
        RequestProbe::Route => "on_request_route",
        RequestProbe::Enter => "on_request_enter",
        RequestProbe::Exit => "on_request_exit",
        RequestProbe::End => "on_request_end",
    }
}
