//! Follows requests that a server tells of by its own probes: places the readers, remembers what each open request is
//! called, and turns its end into an event.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    os::unix::fs::MetadataExt as _,
    sync::Arc,
};

use loopguard_common::{
    records::{STEP_WAS_HELD, StepRecord},
    request::{
        REQUEST_HELD, REQUEST_OPEN_BEFORE, REQUEST_RAN_UNSEEN, RequestEndRecord, RequestRouteRecord,
        RequestStartRecord, RequestTotals,
    },
};

use super::Live;
use crate::{
    core::{
        event::{Event, How, Owner, RequestFacts},
        request::{EndedRequest, Held, OWN_ID, RequestCounts, merged, same_request},
    },
    runtime::{
        elf::{self, Image},
        usdt::{self, RequestProbe, Site},
    },
    source::{kernel::MAX_OPEN_REQUESTS, process},
};

/// How often it is asked whether a process maps something else by now, and looked through for libraries that came later.
const LOOK_EVERY_NS: u64 = 1_000_000_000;
/// Even if it maps as much as before, it is looked through after this time.
const LOOK_ANYWAY_NS: u64 = 10_000_000_000;
/// For so long a request that has ended waits for what may still be told of one of its steps: a worker that goes on
/// parks or polls at once.
const HELD_NS: u64 = 100_000_000;
/// Files of one process that are looked into.
const MAX_FILES: usize = 4096;
/// Probe sites that are watched in one process.
const MAX_SITES: usize = 64;

/// The processes that tell of their requests, and those requests that are open.
#[derive(Default)]
pub(super) struct Requests {
    processes: HashMap<u32, Provider>,
    open: HashMap<Key, Open>,
    /// The open requests by age: the oldest make room.
    by_age: BTreeSet<(u64, Key)>,
    /// Those that have ended, but not all of whose blocks are known.
    held: VecDeque<(Key, EndedRequest)>,
    counts: RequestCounts,
    /// Of the kernel's counter: how many had been passed over when its table was last cleared of dead entries.
    untracked_when_swept: u64,
}

/// Process and the server's own id.
type Key = (u32, u64);

struct Open {
    facts: Arc<RequestFacts>,
    start_ns: u64,
    /// It began before loopguard came; what it is called is known from elsewhere.
    began_before: bool,
    /// Of its steps that were held: how many have blocked after all, and for how long.
    late_blocks: u32,
    late_ns: u64,
}

impl Open {
    fn new(facts: RequestFacts, start_ns: u64, began_before: bool) -> Self {
        Self { facts: Arc::new(facts), start_ns, began_before, late_blocks: 0, late_ns: 0 }
    }
}

/// What is known of a process's own probes.
#[derive(Default)]
struct Provider {
    since_ns: u64,
    look_again_ns: u64,
    /// How much it mapped when it was last looked through, and when that was.
    pages: Option<u64>,
    looked_ns: u64,
    /// Mappings that were looked into, by path and address.
    seen: HashSet<(String, u64)>,
    /// Sites that are watched: device, inode and offset. The same library can be mapped twice.
    sites: HashSet<(u64, u64, u64)>,
    told_unusable: bool,
}

impl Requests {
    fn add(&mut self, key: Key, open: Open) {
        self.remove(key);
        self.by_age.insert((open.start_ns, key));
        self.open.insert(key, open);
    }

    fn remove(&mut self, key: Key) -> Option<Open> {
        let open = self.open.remove(&key)?;
        self.by_age.remove(&(open.start_ns, key));
        Some(open)
    }

    fn started(&mut self, record: &RequestStartRecord) {
        let key = (record.header.tgid, record.id);
        let text = |bytes: &[u8], length: u32| text(bytes, length as usize);
        let name = text(&record.request_id, record.request_id_length);
        let trace_id = crate::runtime::http::trace_id(&name);
        let id = if name.is_empty() || trace_id.is_some() { own_id(key) } else { name.trim().to_owned() };
        let method = text(&record.method, record.method_length);
        let facts = RequestFacts {
            id,
            method: (!method.is_empty()).then_some(method),
            path: text(&record.path, record.path_length),
            route: None,
            client: None,
            trace_id,
        };
        if self.open.contains_key(&key) {
            // The id came again before its request had ended.
            self.counts.never_ended += 1;
        }
        self.add(key, Open::new(facts, record.at_ns, false));
    }

    fn routed(&mut self, record: &RequestRouteRecord) {
        if let Some(open) = self.open.get_mut(&(record.header.tgid, record.id)) {
            let route = text(&record.route, record.route_length as usize);
            Arc::make_mut(&mut open.facts).route = (!route.is_empty()).then_some(route);
        }
    }

    /// `None`: it has ended, but waits for what is to be told of its steps.
    fn ended(&mut self, record: &RequestEndRecord) -> Option<EndedRequest> {
        let key = (record.header.tgid, record.id);
        let totals = &record.totals;
        let open = self.remove(key);
        let started = open.as_ref().filter(|open| !open.began_before).map(|open| open.start_ns);
        let since = self.processes.get(&key.0).map_or(0, |provider| provider.since_ns);
        let was_tracked = totals.start_ns != 0;
        let (late_blocks, late_ns) = open.as_ref().map_or((0, 0), |open| (open.late_blocks, open.late_ns));
        let ended = EndedRequest {
            pid: key.0,
            status: (record.status != 0).then_some(record.status),
            start_ns: started.unwrap_or(since).min(record.end_ns),
            end_ns: record.end_ns,
            held: Held { blocks: totals.blocks + late_blocks, blocked_ns: totals.blocked_ns + late_ns, ..held(totals) },
            is_complete: started.is_some()
                && was_tracked
                && totals.flags & (REQUEST_OPEN_BEFORE | REQUEST_RAN_UNSEEN) == 0,
            facts: open.map_or_else(|| Arc::new(unnamed(key)), |open| open.facts),
        };
        if totals.flags & REQUEST_HELD == 0 {
            return Some(ended);
        }
        self.held.push_back((key, ended));
        None
    }

    /// A step has blocked, and may be one that its request's sums lack.
    pub(super) fn blocked(&mut self, record: &StepRecord) {
        if record.flags & STEP_WAS_HELD == 0 || record.request == 0 {
            return;
        }
        let key = (record.header.tgid, record.request);
        let ns = record.end_ns.saturating_sub(record.start_ns);
        if let Some(open) = self.open.get_mut(&key) {
            open.late_blocks += 1;
            open.late_ns += ns;
        } else if let Some((_, ended)) = self.held.iter_mut().rfind(|(held, _)| *held == key) {
            ended.held.blocks += 1;
            ended.held.blocked_ns += ns;
        }
    }

    /// Those that have waited for long enough at `now_ns`.
    fn settled(&mut self, now_ns: u64) -> Vec<EndedRequest> {
        let waits = |(_, ended): &(Key, EndedRequest)| ended.end_ns.saturating_add(HELD_NS) > now_ns;
        let count = self.held.iter().position(waits).unwrap_or(self.held.len());
        self.held.drain(..count).map(|(_, ended)| ended).collect()
    }

    /// Whose step it is that the probes of request `id` bracket; `None`: nobody's, or loopguard came too late to know.
    pub(super) fn owner(&self, pid: u32, id: u64) -> Option<Owner> {
        let key = (pid, id);
        let of_held = || self.held.iter().rfind(|(held, _)| *held == key).map(|(_, ended)| &ended.facts);
        let facts = self.open.get(&key).map(|open| &open.facts).or_else(of_held).filter(|_| id != 0)?;
        Some(Owner::Request { request: Arc::clone(facts), how: How::Usdt })
    }

    /// The frames of a step that request `id` brackets showed this request. `is_first`: for the first time in the step.
    pub(super) fn seen_in_frames(&mut self, key: Key, in_frames: &RequestFacts, is_first: bool) {
        if key.1 == 0 {
            return;
        }
        let Some(open) = self.open.get_mut(&key) else {
            // Nobody told what it is called, since it began before loopguard came.
            let start_ns = process::monotonic_ns();
            self.add(key, Open::new(in_frames.clone(), start_ns, true));
            return;
        };
        let agree = same_request(&open.facts, in_frames);
        if agree {
            let both = merged(&open.facts, in_frames);
            if both != *open.facts {
                open.facts = Arc::new(both);
            }
        }
        if is_first && !open.began_before {
            let count = if agree { &mut self.counts.frames_agree } else { &mut self.counts.frames_disagree };
            *count += 1;
        }
    }

    pub(super) fn are_told_by(&self, pid: u32) -> bool {
        self.processes.get(&pid).is_some_and(|provider| !provider.sites.is_empty())
    }

    pub(super) fn close_process(&mut self, pid: u32) {
        if self.processes.remove(&pid).is_none() {
            return;
        }
        let keys: Vec<Key> = self.open.keys().filter(|key| key.0 == pid).copied().collect();
        for key in keys {
            self.remove(key);
            self.counts.never_ended += 1;
        }
    }
}

impl Live {
    /// Where a process had no probes, one forked from it has none: its files need not be read again.
    pub(super) fn inherit_request_probes(&mut self, pid: u32, parent: u32) {
        let Some(provider) = self.requests.processes.get(&parent).filter(|provider| provider.sites.is_empty()) else {
            return;
        };
        let (now, seen) = (process::monotonic_ns(), provider.seen.clone());
        let inherited = Provider { since_ns: now, look_again_ns: now + LOOK_EVERY_NS, seen, ..Provider::default() };
        self.requests.processes.insert(pid, inherited);
    }

    /// Looks for the provider in files of `pid` that were not looked into yet.
    pub(super) fn find_request_probes(&mut self, pid: u32) {
        let now = process::monotonic_ns();
        let provider = self.requests.processes.entry(pid).or_default();
        if now < provider.look_again_ns {
            return;
        }
        if provider.since_ns == 0 {
            provider.since_ns = now;
        }
        provider.look_again_ns = now + LOOK_EVERY_NS;
        // Before the mappings: what comes meanwhile is seen the next time.
        let pages = elf::mapped_pages(pid);
        if pages.is_some() && pages == provider.pages && now - provider.looked_ns < LOOK_ANYWAY_NS {
            return;
        }
        let Ok(mappings) = elf::mappings(pid) else { return };
        (provider.pages, provider.looked_ns) = (pages, now);
        let mut found = Vec::new();
        for mapping in mappings.iter().filter(|mapping| mapping.executable) {
            let is_new = provider.seen.len() < MAX_FILES && provider.seen.insert((mapping.path.clone(), mapping.start));
            if !is_new {
                continue;
            }
            // What is no ELF file, or cannot be opened, tells of no requests.
            let Ok(image) = Image::open(pid, &mapping.path, &mappings) else { continue };
            let sites = usdt::sites(&image);
            if let Some(reason) = &sites.reason
                && !std::mem::replace(&mut provider.told_unusable, true)
            {
                self.notices.push(format!(
                    "process {pid}: {} request probes of {} cannot be used: {reason}",
                    sites.unusable, mapping.path
                ));
            }
            let Ok(metadata) = std::fs::metadata(&image.opened) else { continue };
            for site in sites.usable {
                let key = (metadata.dev(), metadata.ino(), site.offset);
                if provider.sites.len() < MAX_SITES && provider.sites.insert(key) {
                    found.push(site);
                }
            }
        }
        self.place_request_probes(pid, found);
    }

    fn place_request_probes(&mut self, pid: u32, mut sites: Vec<Site>) {
        if sites.is_empty() {
            return;
        }
        // Enters last: what was entered must be seen to be left.
        sites.sort_by_key(|site| (site.probe == RequestProbe::Enter, site.probe));
        for site in &sites {
            if let Err(error) = self.kernel.attach_request(pid, site) {
                self.notices.push(format!("process {pid}: its requests are not followed: {error:#}"));
                self.kernel.detach_requests(pid);
                return;
            }
        }
        self.requests.counts.are_told = true;
        self.notices.push(format!("process {pid} tells of its requests"));
        self.mark_workers(pid);
    }

    pub(super) fn request_started(&mut self, record: &RequestStartRecord) {
        self.requests.started(record);
        while self.requests.open.len() > MAX_OPEN_REQUESTS as usize {
            let Some(&(_, oldest)) = self.requests.by_age.first() else { return };
            self.requests.remove(oldest);
            self.requests.counts.never_ended += 1;
            self.kernel.forget_request(oldest.0, oldest.1);
        }
    }

    pub(super) fn request_routed(&mut self, record: &RequestRouteRecord) {
        self.requests.routed(record);
    }

    pub(super) fn request_ended(&mut self, record: &RequestEndRecord) -> Option<Event> {
        self.requests.ended(record).map(Event::Request)
    }

    /// Requests that waited for what may be told of their steps, up to `now_ns`.
    pub(super) fn settle_requests(&mut self, now_ns: u64, events: &mut Vec<Event>) {
        events.extend(self.requests.settled(now_ns).into_iter().map(Event::Request));
    }

    /// Looks for new libraries, and makes room for new requests if there is none.
    pub(super) fn tend_requests(&mut self) {
        // Children that were never looked into have no loops.
        let pids = self.targets.iter().filter(|(_, target)| target.looked_into).map(|(pid, _)| *pid);
        for pid in pids.collect::<Vec<_>>() {
            self.find_request_probes(pid);
        }
        let untracked = self.kernel.counts().requests_untracked;
        if untracked > self.requests.untracked_when_swept {
            self.requests.untracked_when_swept = untracked;
            // Requests from before loopguard came whose end was lost, and those of processes that are gone.
            for key in self.kernel.open_requests() {
                if !self.requests.open.contains_key(&(key.tgid, key.id)) {
                    self.kernel.forget_request(key.tgid, key.id);
                }
            }
        }
    }

    pub(super) fn request_counts(&self) -> RequestCounts {
        let kernel = self.kernel.counts();
        RequestCounts {
            open: self.requests.open.len() as u64,
            untracked: kernel.requests_untracked,
            unpaired: kernel.requests_astray,
            ..self.requests.counts
        }
    }
}

fn held(totals: &RequestTotals) -> Held {
    Held {
        ns: totals.held_ns,
        off_cpu: totals.off_cpu,
        blocked_ns: totals.blocked_ns,
        longest_ns: totals.longest_ns,
        steps: totals.steps,
        blocks: totals.blocks,
    }
}

fn text(bytes: &[u8], length: usize) -> String {
    String::from_utf8_lossy(&bytes[..length.min(bytes.len())]).into_owned()
}

fn own_id((pid, id): Key) -> String {
    format!("{OWN_ID}{pid}-{id}")
}

/// All that is known of a request whose start was not seen.
fn unnamed(key: Key) -> RequestFacts {
    RequestFacts { id: own_id(key), method: None, path: String::new(), route: None, client: None, trace_id: None }
}

#[cfg(test)]
mod tests {
    use loopguard_common::records::{RecordHeader, RecordKind};

    use super::*;

    fn header(kind: RecordKind) -> RecordHeader {
        RecordHeader { kind: kind as u32, tgid: 7, tid: 8, _pad: 0 }
    }

    fn start(id: u64, at_ns: u64, [method, path, name]: [&[u8]; 3]) -> RequestStartRecord {
        fn copied<const N: usize>(bytes: &[u8]) -> [u8; N] {
            let mut copy = [0xaa; N];
            copy[..bytes.len()].copy_from_slice(bytes);
            copy
        }
        RequestStartRecord {
            header: header(RecordKind::RequestStart),
            id,
            at_ns,
            method_length: method.len() as u32,
            path_length: path.len() as u32,
            request_id_length: name.len() as u32,
            _pad: 0,
            method: copied(method),
            path: copied(path),
            request_id: copied(name),
        }
    }

    fn end(id: u64, end_ns: u64, totals: RequestTotals) -> RequestEndRecord {
        RequestEndRecord { header: header(RecordKind::RequestEnd), id, status: 200, end_ns, totals }
    }

    fn requests() -> Requests {
        let processes = [(7, Provider { since_ns: 50, ..Provider::default() })].into();
        Requests { processes, ..Requests::default() }
    }

    #[test]
    fn a_request_is_called_what_its_client_calls_it() {
        let mut requests = requests();
        let trace = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        for (name, id, trace_id) in [
            (&b"abc"[..], "abc", None),
            (b"", "lg-7-1", None),
            (trace, "lg-7-1", Some("4bf92f3577b34da6a3ce929d0e0e4736")),
            (b"\xff\x1b", "\u{fffd}\u{1b}", None),
        ] {
            requests.started(&start(1, 100, [b"GET", b"/x", name]));
            let ended =
                requests.ended(&end(1, 130, RequestTotals { start_ns: 100, ..RequestTotals::default() })).unwrap();
            assert_eq!((ended.facts.id.as_str(), ended.facts.trace_id.as_deref()), (id, trace_id));
            assert_eq!((ended.facts.path.as_str(), ended.duration_ns(), ended.is_complete), ("/x", 30, true));
        }
        assert_eq!(requests.counts.never_ended, 0);
    }

    #[test]
    fn a_request_from_before_has_an_honest_start() {
        let mut requests = requests();
        let totals = RequestTotals { flags: REQUEST_OPEN_BEFORE, held_ns: 9, steps: 1, ..RequestTotals::default() };
        let ended = requests.ended(&end(3, 80, totals)).unwrap();
        assert_eq!((ended.start_ns, ended.end_ns, ended.is_complete), (50, 80, false));
        assert_eq!((ended.facts.id.as_str(), ended.facts.path.as_str()), ("lg-7-3", ""));
        // Never a negative duration, whatever comes.
        assert_eq!(requests.ended(&end(3, 20, totals)).unwrap().duration_ns(), 0);
    }

    #[test]
    fn an_id_that_comes_again_replaces_and_is_counted() {
        let mut requests = requests();
        requests.started(&start(1, 100, [b"GET", b"/a", b""]));
        requests.started(&start(1, 200, [b"GET", b"/b", b""]));
        assert_eq!((requests.open.len(), requests.by_age.len(), requests.counts.never_ended), (1, 1, 1));
        let ended = requests.ended(&end(1, 230, RequestTotals { start_ns: 200, ..RequestTotals::default() })).unwrap();
        assert_eq!((ended.facts.path.as_str(), ended.duration_ns()), ("/b", 30));
        assert!(requests.by_age.is_empty());
    }

    #[test]
    fn requests_of_a_process_that_ended_are_counted() {
        let mut requests = requests();
        (0..5).for_each(|id| requests.started(&start(id, 100, [b"GET", b"/", b""])));
        requests.close_process(7);
        requests.close_process(7);
        assert_eq!((requests.open.len(), requests.by_age.len(), requests.counts.never_ended), (0, 0, 5));
    }

    #[test]
    fn frames_name_what_nobody_told_and_agree_or_not() {
        let mut requests = requests();
        let seen = |path: &str| RequestFacts {
            path: path.to_owned(),
            client: Some("10.0.0.9:1".to_owned()),
            ..unnamed((7, 0))
        };
        requests.seen_in_frames((7, 1), &seen("/before"), true);
        assert_eq!((requests.counts.frames_agree, requests.counts.frames_disagree), (0, 0));
        assert!(matches!(requests.owner(7, 1), Some(Owner::Request { request, .. }) if request.path == "/before"));
        assert!(!requests.ended(&end(1, 80, RequestTotals::default())).unwrap().is_complete);

        requests.started(&start(2, 100, [b"GET", b"/x", b"abc"]));
        requests.seen_in_frames((7, 2), &seen("/x"), true);
        requests.seen_in_frames((7, 2), &seen("/x"), false);
        requests.seen_in_frames((7, 2), &seen("/y"), true);
        assert_eq!((requests.counts.frames_agree, requests.counts.frames_disagree), (1, 1));
        let Some(Owner::Request { request, how: How::Usdt }) = requests.owner(7, 2) else { panic!() };
        assert_eq!((request.id.as_str(), request.client.as_deref()), ("abc", Some("10.0.0.9:1")));
        assert_eq!(requests.owner(7, 0), None);
    }

    /// A step of request `id` that was held and has blocked.
    fn released(id: u64, [start_ns, end_ns]: [u64; 2], flags: u32) -> StepRecord {
        // SAFETY: integers only.
        let empty: StepRecord = unsafe { std::mem::zeroed() };
        StepRecord { header: header(RecordKind::Step), request: id, start_ns, end_ns, flags, ..empty }
    }

    #[test]
    fn a_step_that_was_held_counts_once_it_has_blocked() {
        let mut requests = requests();
        let totals = RequestTotals { start_ns: 100, flags: REQUEST_HELD, steps: 2, ..RequestTotals::default() };
        // The first one's is told while it is open, the second one's after its end, the third gave its worker away.
        (1..=3).for_each(|id| requests.started(&start(id, 100, [b"GET", b"/x", b""])));
        requests.blocked(&released(1, [110, 140], STEP_WAS_HELD));
        (1..=3).for_each(|id| assert_eq!(requests.ended(&end(id, 150 + id, totals)), None));
        assert!(matches!(requests.owner(7, 2), Some(Owner::Request { how: How::Usdt, .. })));
        requests.blocked(&released(2, [120, 140], STEP_WAS_HELD));
        // The kernel's sums have this one.
        requests.blocked(&released(3, [120, 140], 0));
        requests.blocked(&released(0, [120, 140], STEP_WAS_HELD));
        assert_eq!(requests.settled(150 + HELD_NS), []);
        let blocked = |ended: Vec<EndedRequest>| {
            ended.iter().map(|ended| (ended.held.blocks, ended.held.blocked_ns)).collect::<Vec<_>>()
        };
        assert_eq!(blocked(requests.settled(152 + HELD_NS)), [(1, 30), (1, 20)]);
        assert_eq!(blocked(requests.settled(u64::MAX)), [(0, 0)]);
        assert_eq!(requests.owner(7, 3), None);
    }
}
