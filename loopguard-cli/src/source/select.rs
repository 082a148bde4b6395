//! Turns what people know of a process (its name, its container, its control group) into process ids.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use super::process;

/// Where the control groups are mounted, nearly everywhere.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// The kernel keeps so many bytes of a process's name (TASK_COMM_LEN less its NUL).
const COMM_LENGTH: usize = 15;
/// Digits of a container id.
const CONTAINER_ID: usize = 64;
/// Fewer digits than this say too little.
const SHORTEST_ID: usize = 6;

/// What was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    pub pids: Vec<u32>,
    pub names: Vec<String>,
    /// As in /proc/PID/cgroup, or as a folder below /sys/fs/cgroup; those below it included.
    pub cgroups: Vec<String>,
    /// Container ids or the beginnings of some.
    pub containers: Vec<String>,
}

impl Selection {
    /// Whether processes that start later may belong to it.
    pub fn is_open(&self) -> bool {
        !(self.names.is_empty() && self.cgroups.is_empty() && self.containers.is_empty())
    }

    /// The processes it names now.
    ///
    /// # Errors
    /// A sentence that says what fits nothing, or more than one container.
    pub fn find(&self) -> Result<BTreeSet<u32>> {
        let mut found: BTreeSet<u32> = self.pids.iter().copied().collect();
        if !self.is_open() {
            return Ok(found);
        }
        let described: Vec<Described> = others().filter_map(Described::of).collect();
        let mut take = |what: String, fits: &dyn Fn(&Described) -> bool| {
            let before = found.len();
            found.extend(described.iter().filter(|process| fits(process)).map(|process| process.pid));
            if found.len() == before { bail!("there is no process {what}") } else { Ok(()) }
        };
        for name in &self.names {
            take(format!("called {name}"), &|process| process.is_called(name))?;
        }
        for cgroup in &self.cgroups {
            take(format!("in the control group {cgroup}"), &|process| process.is_in(cgroup))?;
        }
        for id in &self.containers {
            let whole: BTreeSet<&str> = described
                .iter()
                .flat_map(|process| process.containers())
                .filter(|whole| whole.starts_with(id))
                .collect();
            if whole.len() > 1 {
                bail!("{} containers have an id that begins with {id}: give more of it", whole.len());
            }
            take(format!("in a container {id}"), &|process| process.containers().any(|whole| whole.starts_with(id)))?;
        }
        Ok(found)
    }

    /// Those among `pids` that belong to it: for processes that came later.
    pub fn of(&self, pids: impl IntoIterator<Item = u32>) -> Vec<u32> {
        let fits = |process: &Described| {
            self.names.iter().any(|name| process.is_called(name))
                || self.cgroups.iter().any(|cgroup| process.is_in(cgroup))
                || self.containers.iter().any(|id| process.containers().any(|whole| whole.starts_with(id)))
        };
        pids.into_iter().filter_map(Described::of).filter(fits).map(|process| process.pid).collect()
    }
}

/// Every process but this one.
pub fn others() -> impl Iterator<Item = u32> {
    process::all().into_iter().filter(|pid| *pid != std::process::id())
}

/// Finds processes of a selection that start later.
pub struct Newcomers {
    selection: Selection,
    first_seen: HashMap<u32, Instant>,
}

/// A process may be started under one name and go on under another: it is looked at for so long.
const SETTLED_AFTER: Duration = Duration::from_secs(3);

impl Newcomers {
    /// `None` for a selection that cannot have any.
    pub fn of(selection: &Selection) -> Option<Self> {
        selection.is_open().then(|| Self { selection: selection.clone(), first_seen: HashMap::new() })
    }

    /// Those that fit, among the processes that are young; known ones may be among them.
    pub fn look(&mut self) -> Vec<u32> {
        let now = Instant::now();
        let before = std::mem::take(&mut self.first_seen);
        self.first_seen = others().map(|pid| (pid, before.get(&pid).copied().unwrap_or(now))).collect();
        let young = self.first_seen.iter().filter(|(_, since)| now.duration_since(**since) < SETTLED_AFTER);
        let mut young: Vec<u32> = young.map(|(pid, _)| *pid).collect();
        young.sort_unstable();
        self.selection.of(young)
    }
}

/// What a process is known by.
struct Described {
    pid: u32,
    /// The kernel's name for it.
    comm: String,
    /// The program and its first arguments, each without its folder.
    words: Vec<String>,
    /// Its control groups, one per hierarchy.
    cgroups: Vec<String>,
}

impl Described {
    /// `None` for what has no program: kernel threads, and what is gone.
    fn of(pid: u32) -> Option<Self> {
        let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).ok();
        let command = read("cmdline").filter(|command| !command.is_empty())?;
        let cgroups = String::from_utf8_lossy(&read("cgroup")?).into_owned();
        Some(Self {
            pid,
            comm: process::thread_name(pid, pid),
            words: words(&command),
            cgroups: cgroups.lines().filter_map(cgroup_path).map(str::to_owned).collect(),
        })
    }

    /// By the kernel's name, the program, or the script or module that an interpreter runs.
    fn is_called(&self, name: &str) -> bool {
        let cut = name.get(..COMM_LENGTH).unwrap_or(name);
        let is_interpreter = |word: &str| word.starts_with("python") || word.starts_with("pypy");
        self.comm == cut
            || self.words.first().is_some_and(|word| word == name)
            || (self.words.first().is_some_and(|word| is_interpreter(word)) && script(&self.words) == Some(name))
    }

    fn is_in(&self, cgroup: &str) -> bool {
        let wanted = cgroup.strip_prefix(CGROUP_ROOT).unwrap_or(cgroup).trim_matches('/');
        self.cgroups.iter().any(|path| {
            let path = path.trim_matches('/');
            // In the first version a hierarchy's name stands before the path.
            let unrooted = wanted.split_once('/').map_or("", |(_, rest)| rest);
            [wanted, unrooted].into_iter().any(|wanted| {
                !wanted.is_empty()
                    && path.strip_prefix(wanted).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            })
        })
    }

    /// Ids of the containers that its control groups are named after, whatever runs them: `docker-ID.scope`,
    /// `cri-containerd-ID.scope`, `/docker/ID`.
    fn containers(&self) -> impl Iterator<Item = &str> {
        let parts = self.cgroups.iter().flat_map(|path| path.split(['/', '-', '.', ':']));
        parts.filter(|part| part.len() == CONTAINER_ID && part.bytes().all(|byte| byte.is_ascii_hexdigit()))
    }
}

/// `12:cpu,cpuacct:/docker/ab..` or `0::/system.slice/app.service`.
fn cgroup_path(line: &str) -> Option<&str> {
    line.splitn(3, ':').nth(2)
}

fn words(command: &[u8]) -> Vec<String> {
    let words = command.split(|byte| *byte == 0).filter(|word| !word.is_empty()).take(8);
    let name = |word: &[u8]| {
        let word = String::from_utf8_lossy(word).into_owned();
        Path::new(&word).file_name().map_or(word.clone(), |name| name.to_string_lossy().into_owned())
    };
    words.map(name).collect()
}

/// What an interpreter runs: the word after `-m`, else the first that is no option.
fn script(words: &[String]) -> Option<&str> {
    let mut rest = words.iter().skip(1).map(String::as_str);
    while let Some(word) = rest.next() {
        match word {
            "-m" => return rest.next(),
            "-X" | "-W" => drop(rest.next()),
            option if option.starts_with('-') => {}
            script => return Some(script),
        }
    }
    None
}

/// Whether this can be the beginning of a container's id; if not, why.
pub fn check_container_id(id: &str) -> Result<(), String> {
    if id.len() < SHORTEST_ID || id.len() > CONTAINER_ID || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(format!(
            "a container id is {SHORTEST_ID} to {CONTAINER_ID} hexadecimal digits, as docker ps shows it"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(command: &str, comm: &str, cgroup: &str) -> Described {
        let command: Vec<u8> = command.replace(' ', "\0").into_bytes();
        let cgroups = cgroup.lines().filter_map(cgroup_path).map(str::to_owned).collect();
        Described { pid: 7, comm: comm.to_owned(), words: words(&command), cgroups }
    }

    #[test]
    fn processes_are_called_by_what_they_run() {
        let named = |command: &str, name: &str| process(command, "x", "").is_called(name);
        assert!(named("/usr/sbin/nginx -g daemon", "nginx"));
        assert!(named("/venv/bin/python3.12 /venv/bin/gunicorn app:app", "gunicorn"));
        assert!(named("python -X dev -m uvicorn app:app", "uvicorn"));
        assert!(named("python server.py", "server.py"));
        assert!(!named("python server.py gunicorn", "gunicorn"));
        assert!(!named("grep gunicorn", "gunicorn"));
        assert!(!named("python -c x", "app"));
        assert!(
            process("/opt/x/a-very-long-program-name", "a-very-long-pro", "").is_called("a-very-long-program-name")
        );
    }

    #[test]
    fn control_groups_hold_what_is_below_them() {
        let is_in = |cgroup: &str, wanted: &str| process("x", "x", cgroup).is_in(wanted);
        let service = "0::/system.slice/app.service/worker";
        assert!(is_in(service, "/system.slice/app.service"));
        assert!(is_in(service, "/sys/fs/cgroup/system.slice/app.service/"));
        assert!(is_in(service, "system.slice/app.service/worker"));
        assert!(!is_in(service, "/system.slice/app.serv"));
        assert!(!is_in(service, "/"));
        assert!(is_in("3:cpu,cpuacct:/app\n0::/", "/sys/fs/cgroup/cpu,cpuacct/app"));
    }

    #[test]
    fn containers_are_known_by_their_ids() {
        let id = "0123456789abcdef".repeat(4);
        for path in [
            format!("0::/system.slice/docker-{id}.scope"),
            format!("0::/kubepods.slice/kubepods-burstable.slice/cri-containerd-{id}.scope"),
            format!("4:memory:/docker/{id}"),
            format!("0::/machine.slice/libpod-{id}.scope/container"),
        ] {
            assert_eq!(process("x", "x", &path).containers().collect::<Vec<_>>(), [id.as_str()], "{path}");
        }
        assert_eq!(process("x", "x", "0::/docker-0123.scope").containers().count(), 0);
        assert!(check_container_id("0123456789ab").is_ok());
        assert!(check_container_id("web").is_err() && check_container_id("abcde").is_err());
    }
}
