//! `loopguard doctor`: says what works on this machine and for one process, what does not, and what to do about it.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use anyhow::Result;

use crate::{
    args,
    runtime::{
        cpython::{self, Interpreter, NotUsable, StepProbe},
        tokio::{self, Tokio},
    },
    sink::escape::{plain, printable},
    source::{
        btf,
        features::{Features, Need},
        kernel, process, target,
    },
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Fine,
    /// It works, with less.
    Limited,
    /// It does not work.
    Broken,
}

struct Finding {
    level: Level,
    about: &'static str,
    text: String,
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, level: Level, about: &'static str, text: impl Into<String>) {
        self.0.push(Finding { level, about, text: text.into() });
    }
}

/// Whether attaching would work.
pub fn run(arguments: &args::Doctor) -> Result<bool> {
    let mut findings = Findings::default();
    look_at_machine(&mut findings);
    if let Some(pid) = arguments.pid {
        match target::check(pid) {
            Err(reason) => findings.add(Level::Broken, "target", reason.to_string()),
            Ok(()) => look_at_target(pid, &mut findings),
        }
    }
    let mut out = io::stdout().lock();
    for Finding { level, about, text } in &findings.0 {
        let mark = match level {
            Level::Fine => "ok     ",
            Level::Limited => "limited",
            Level::Broken => "MISSING",
        };
        writeln!(out, "{mark}  {about:<14} {}", printable(text))?;
    }
    Ok(findings.0.iter().all(|finding| finding.level < Level::Broken))
}

fn look_at_machine(findings: &mut Findings) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    findings.add(Level::Fine, "kernel", format!("Linux {release}"));
    if !cfg!(target_arch = "x86_64") {
        findings.add(Level::Broken, "processor", "the kernel programs read x86_64 registers only, so far");
    }
    match Features::of_this_kernel() {
        Ok(features) => {
            findings.add(Level::Fine, "BTF", format!("the kernel describes its types ({})", btf::VMLINUX));
            look_at_features(&features, findings);
        }
        Err(error) => findings.add(Level::Broken, "BTF", format!("{error:#}")),
    }
    let events = fs::read_dir(Path::new(kernel::TRACEFS).join("events"));
    if events.is_ok() {
        findings.add(Level::Fine, "tracefs", format!("mounted at {}", kernel::TRACEFS));
    } else if events.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
        findings.add(
            Level::Broken,
            "tracefs",
            format!("{} cannot be read: give loopguard CAP_DAC_READ_SEARCH, or run it as root", kernel::TRACEFS),
        );
    } else if Path::new(kernel::TRACEFS).exists() {
        findings.add(
            Level::Fine,
            "tracefs",
            format!("not mounted; loopguard mounts it for itself, or: mount -t tracefs nodev {} ", kernel::TRACEFS),
        );
    } else {
        findings.add(
            Level::Broken,
            "tracefs",
            "not in this kernel: CONFIG_FTRACE and CONFIG_FTRACE_SYSCALLS are needed",
        );
    }
    for (name, held) in target::privileges() {
        if held {
            findings.add(Level::Fine, "privilege", name);
        } else {
            findings.add(Level::Broken, "privilege", format!("{name} is missing: run as root (sudo)"));
        }
    }
    if target::check_privileges().is_err() {
        findings.add(Level::Limited, "programs", "not tried without the privileges above");
        return;
    }
    match kernel::try_load() {
        Ok(most) => {
            let most = most.map_or(String::new(), |(name, verified)| {
                format!(" (its verifier looked at up to {verified} instructions, in {name})")
            });
            findings.add(Level::Fine, "programs", format!("the kernel accepts all of loopguard's programs{most}"));
        }
        Err(error) => findings.add(Level::Broken, "programs", plain(&first_line(&format!("{error:#}")))),
    }
}

fn look_at_features(features: &Features, findings: &mut Findings) {
    for finding in features.findings() {
        match finding.answer {
            Ok(text) => findings.add(Level::Fine, finding.name, text),
            Err((Need::Fallback, text)) => findings.add(Level::Limited, finding.name, text),
            Err((Need::Required, text)) => findings.add(Level::Broken, finding.name, text),
        }
    }
}

fn look_at_target(pid: u32, findings: &mut Findings) {
    findings.add(Level::Fine, "target", format!("process {pid}: {}", process::command_line(pid)));
    let polls = process::epoll_descriptors(pid).len();
    if polls == 0 {
        findings.add(Level::Broken, "loops", "the process has no epoll descriptor now: no event loop, or not yet");
    } else {
        findings.add(Level::Fine, "loops", format!("{polls} epoll descriptor(s) open"));
    }
    match cpython::find(pid) {
        Ok(interpreter) => look_at_python(pid, &interpreter, findings),
        Err(NotUsable::NotPython) => match tokio::find(pid) {
            Ok(tokio) => look_at_tokio(&tokio, findings),
            Err(tokio::NotUsable::NotTokio) => findings.add(
                Level::Limited,
                "runtime",
                "no CPython and no tokio in this process: blocks of its epoll loops are found, without requests and lines",
            ),
            Err(error) => findings.add(
                Level::Limited,
                "runtime",
                format!("{error}; blocks of its epoll loops are found, without requests"),
            ),
        },
        Err(error) => findings.add(
            Level::Limited,
            "runtime",
            format!("{error}; blocks are found, without requests and Python lines"),
        ),
    }
}

fn look_at_python(pid: u32, interpreter: &Interpreter, findings: &mut Findings) {
    findings.add(Level::Fine, "runtime", format!("CPython {}", interpreter.version));
    match interpreter.threads() {
        Ok(threads) => findings.add(Level::Fine, "frames", format!("{} Python thread(s) can be read", threads.len())),
        Err(error) => findings.add(Level::Broken, "frames", format!("its thread states cannot be read: {error}")),
    }
    let uvloop = process::uses_uvloop(pid);
    findings.add(
        Level::Fine,
        "requests",
        "by the ASGI scope in the running frames (exact), else by the current task and those that await it (inferred)",
    );
    for (which, what) in [
        (StepProbe::ContextRun, "asyncio steps"),
        (StepProbe::ContextEnter, if uvloop { "uvloop steps" } else { "uvloop steps (not loaded now)" }),
    ] {
        match interpreter.probe_site(which) {
            Ok(site) => {
                findings.add(Level::Fine, "steps", format!("{what}: exact, by a probe on `{}`", site.instruction))
            }
            Err(reason) => findings.add(
                Level::Limited,
                "steps",
                format!("{what}: {reason}; ticks with several owners are cut by captures (inferred)"),
            ),
        }
    }
}

fn look_at_tokio(tokio: &Tokio, findings: &mut Findings) {
    let version = tokio.version.as_deref().unwrap_or("of unknown version");
    findings.add(Level::Fine, "runtime", format!("tokio {version}"));
    let polls = tokio.polls();
    findings.add(
        Level::Fine,
        "steps",
        format!(
            "polls of {} type(s) of tasks are exact, by probes on `{}` and the like; {} type(s) of the blocking pool are left out",
            polls.len(),
            polls.first().map_or("", |poll| &poll.site.instruction),
            tokio.blocking().len(),
        ),
    );
    for unmarked in &tokio.unmarked {
        findings.add(Level::Limited, "steps", format!("polls without probes: {unmarked}"));
    }
    findings.add(
        Level::Fine,
        "tasks",
        match tokio.named_tasks() {
            0 => "no symbols: tasks are shown by their number and the address of their poll function".to_owned(),
            named => format!("{named} type(s) of tasks have a name"),
        },
    );
    findings.add(
        Level::Limited,
        "requests",
        "HTTP/1 in clear by what the connection's task reads; TLS and HTTP/2 need the probes of loopguard-emit",
    );
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}
