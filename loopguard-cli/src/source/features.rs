//! Says from the kernel's own type information what it offers, and what loopguard does without what it lacks.
//!
//! Version numbers say little: distributions add features to old kernels and leave others out of new ones. So every
//! answer here comes from the kernel that runs.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use loopguard_common::records::RunQueueFields;

use super::{
    btf::{self, Argument, KernelTypes},
    kernel::TRACEFS,
};

/// What of the kernel the programs and their loader depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Features {
    /// Offset of `task_struct.pid`.
    pub task_pid: Option<u32>,
    /// Offset of `task_struct.tgid`.
    pub task_tgid: Option<u32>,
    /// Offset of `task_struct.start_boottime` (5.5).
    pub task_start: Option<u32>,
    /// What `sched_switch` tells of the thread that leaves the processor.
    pub switch: Option<SwitchShape>,
    /// How long a thread was kept from a CPU (CONFIG_SCHED_INFO).
    pub run_queue: Option<RunQueueFields>,
    /// Ring buffers (Linux 5.8).
    pub ring_buffer: bool,
    /// `bpf_task_pt_regs` (5.15): the registers with which a thread entered the kernel.
    pub task_registers: bool,
    /// `bpf_get_attach_cookie` (5.15): which loop a step probe was placed for.
    pub attach_cookies: bool,
    /// Probes on instructions of programs (CONFIG_UPROBE_EVENTS).
    pub uprobes: bool,
}

/// The arguments of `sched_switch(preempt, prev, next, ..)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SwitchShape {
    /// The state of the leaving thread is the last argument (5.19, and later releases of 5.18).
    StateLast,
    /// It comes before the threads (first releases of 5.18).
    StateSecond,
    /// It is not passed: it stands in the thread, at this offset (before 5.18).
    StateInTask(u32),
}

/// Whether loopguard can do without a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// It does something else instead.
    Fallback,
    /// It cannot work.
    Required,
}

/// One feature, as people are told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub name: &'static str,
    /// It is there, or why it is needed and what is done without it.
    pub answer: Result<String, (Need, String)>,
}

impl Features {
    pub fn of_this_kernel() -> Result<Self> {
        let btf = btf::read_vmlinux().with_context(|| {
            format!("the kernel's type information is missing ({}): it needs CONFIG_DEBUG_INFO_BTF=y", btf::VMLINUX)
        })?;
        let types = KernelTypes::parse(btf).with_context(|| format!("{} is not understood", btf::VMLINUX))?;
        let uprobes = Path::new("/sys/bus/event_source/devices/uprobe/type").exists()
            || Path::new(TRACEFS).join("uprobe_events").exists();
        Ok(Self::read(&types, uprobes))
    }

    fn read(types: &KernelTypes, uprobes: bool) -> Self {
        let helper = |name| types.has_enumerator("bpf_func_id", name);
        Self {
            task_pid: types.field_offset("task_struct", "pid"),
            task_tgid: types.field_offset("task_struct", "tgid"),
            task_start: types.field_offset("task_struct", "start_boottime"),
            switch: switch_shape(types),
            run_queue: run_queue_fields(types),
            ring_buffer: helper("BPF_FUNC_ringbuf_output")
                && types.has_enumerator("bpf_map_type", "BPF_MAP_TYPE_RINGBUF"),
            task_registers: helper("BPF_FUNC_task_pt_regs") && helper("BPF_FUNC_get_current_task_btf"),
            attach_cookies: helper("BPF_FUNC_get_attach_cookie"),
            uprobes,
        }
    }

    /// What each feature is for, whether it is there, and what happens if not.
    pub fn findings(&self) -> Vec<Finding> {
        let finding = |name, is_there: bool, fine: &str, need, missing: &str| Finding {
            name,
            answer: if is_there { Ok(fine.to_owned()) } else { Err((need, missing.to_owned())) },
        };
        vec![
            finding(
                "ring buffer",
                self.ring_buffer,
                "records reach loopguard through it",
                Need::Required,
                "no BPF ring buffer: records cannot be delivered; Linux 5.8 is the first that has it",
            ),
            finding(
                "task registers",
                self.task_registers,
                "a waiting thread's system call and its first argument are read from them",
                Need::Required,
                "no bpf_task_pt_regs: what a thread waits for cannot be read; Linux 5.15 is the first that has it",
            ),
            finding(
                "attach cookies",
                self.attach_cookies,
                "a step probe knows its loop",
                Need::Required,
                "no attach cookies: step probes cannot say which loop they belong to; Linux 5.15 is the first that has \
                 them",
            ),
            self.switch_finding(),
            finding(
                "run queue",
                self.run_queue.is_some(),
                "time without a CPU is told apart from waiting",
                Need::Fallback,
                "the kernel does not say how long a thread that was woken had no CPU (CONFIG_TASK_DELAY_ACCT or \
                 CONFIG_SCHEDSTATS): that time counts as waiting",
            ),
            finding(
                "uprobes",
                self.uprobes,
                "steps of tasks can be marked exactly",
                Need::Fallback,
                "no uprobes (CONFIG_UPROBE_EVENTS): ticks with several owners are cut by captures (inferred)",
            ),
        ]
    }

    fn switch_finding(&self) -> Finding {
        let answer = match (self.switch, self.task_pid) {
            (None, _) | (_, None) => Err((
                Need::Required,
                "the scheduler's tracepoint sched_switch is not one that loopguard knows: where time goes cannot be \
                 told"
                    .to_owned(),
            )),
            (Some(SwitchShape::StateInTask(offset)), _) => Ok(format!(
                "they don't pass the state of the thread that leaves (Linux before 5.18): it is read from the thread, \
                 at {offset}"
            )),
            (Some(_), _) => Ok("they say whether a thread waits or was preempted".to_owned()),
        };
        Finding { name: "sched_switch", answer }
    }

    /// One sentence with all that is missing, if loopguard cannot work here.
    pub fn check(&self) -> Result<()> {
        let findings = self.findings();
        let missing = findings.iter().filter(|finding| matches!(finding.answer, Err((Need::Required, _))));
        let missing: Vec<_> = missing.map(|finding| finding.name).collect();
        if missing.is_empty() {
            return Ok(());
        }
        bail!(
            "this kernel lacks what loopguard needs (Linux 5.15 or newer has it): {}; `loopguard doctor` says more",
            missing.join(", ")
        )
    }
}

fn switch_shape(types: &KernelTypes) -> Option<SwitchShape> {
    use Argument::{Pointer, Value};
    match types.tracepoint("sched_switch")?.as_slice() {
        [Value, Pointer, Pointer, Value, ..] => Some(SwitchShape::StateLast),
        [Value, Value, Pointer, Pointer] => Some(SwitchShape::StateSecond),
        // It was renamed in 5.14.
        [Value, Pointer, Pointer] => types
            .field_offset("task_struct", "__state")
            .or_else(|| types.field_offset("task_struct", "state"))
            .map(SwitchShape::StateInTask),
        _ => None,
    }
}

fn run_queue_fields(types: &KernelTypes) -> Option<RunQueueFields> {
    let in_task = |member: &str, of: &str, field: &str| {
        Some(types.field_offset("task_struct", member)? + types.field_offset(of, field)?)
    };
    Some(RunQueueFields {
        run_delay: in_task("sched_info", "sched_info", "run_delay")?,
        last_queued: in_task("sched_info", "sched_info", "last_queued")?,
        cfs_rq: in_task("se", "sched_entity", "cfs_rq")?,
        rq: types.field_offset("cfs_rq", "rq")?,
        clock: types.field_offset("rq", "clock")?,
    })
}

#[cfg(test)]
mod tests {
    use super::{super::btf::tests::Writer, *};

    /// A kernel with these helpers and this order of the switch's arguments: `p` a pointer, `v` a value.
    fn kernel(helpers: &[&str], switch: &str, state_field: &str) -> Features {
        let mut btf = Writer::default();
        let int = btf.int("int");
        let task = btf.structure("task_struct", &["flags", state_field, "pid"], int);
        let task = btf.pointer(task);
        btf.enumeration("bpf_func_id", helpers);
        btf.enumeration("bpf_map_type", &["BPF_MAP_TYPE_HASH", "BPF_MAP_TYPE_RINGBUF"]);
        let arguments: Vec<u32> = switch.chars().map(|kind| if kind == 'p' { task } else { int }).collect();
        btf.tracepoint("sched_switch", &arguments);
        Features::read(&KernelTypes::parse(btf.finish()).unwrap(), true)
    }

    const OLD: &[&str] = &["BPF_FUNC_ringbuf_output"];
    const NEW: &[&str] = &[
        "BPF_FUNC_ringbuf_output",
        "BPF_FUNC_task_pt_regs",
        "BPF_FUNC_get_current_task_btf",
        "BPF_FUNC_get_attach_cookie",
    ];

    #[test]
    fn the_order_of_a_switchs_arguments_is_read_and_not_guessed() {
        assert_eq!(kernel(NEW, "vppv", "__state").switch, Some(SwitchShape::StateLast));
        assert_eq!(kernel(NEW, "vvpp", "__state").switch, Some(SwitchShape::StateSecond));
        assert_eq!(kernel(NEW, "vpp", "__state").switch, Some(SwitchShape::StateInTask(4)));
        assert_eq!(kernel(NEW, "vpp", "state").switch, Some(SwitchShape::StateInTask(4)));
        assert_eq!(kernel(NEW, "vpp", "other").switch, None);
        assert_eq!(kernel(NEW, "pp", "state").switch, None);
    }

    #[test]
    fn a_kernel_that_lacks_something_is_refused_in_one_sentence() {
        kernel(NEW, "vppv", "__state").check().unwrap();
        let refusal = kernel(OLD, "vpp", "state").check().unwrap_err().to_string();
        assert_eq!(
            refusal,
            "this kernel lacks what loopguard needs (Linux 5.15 or newer has it): task registers, attach cookies; \
             `loopguard doctor` says more"
        );
        assert!(kernel(NEW, "pp", "state").check().unwrap_err().to_string().contains("sched_switch"));
    }

    #[test]
    fn without_uprobes_or_the_run_queue_loopguard_goes_on() {
        let features = Features { uprobes: false, run_queue: None, ..kernel(NEW, "vppv", "__state") };
        features.check().unwrap();
        for name in ["uprobes", "run queue"] {
            let told = features.findings().into_iter().find(|finding| finding.name == name).unwrap();
            assert!(matches!(told.answer, Err((Need::Fallback, _))), "{name}");
        }
    }

    #[test]
    fn the_run_queue_is_known_where_the_kernel_keeps_all_of_it() {
        let fields = |delay: &str| {
            let mut btf = Writer::default();
            let int = btf.int("int");
            btf.structure("sched_info", &["pcount", delay, "last_queued"], int);
            btf.structure("sched_entity", &["load", "cfs_rq"], int);
            btf.structure("cfs_rq", &["rq"], int);
            btf.structure("rq", &["lock", "clock"], int);
            btf.structure("task_struct", &["flags", "se", "pid", "sched_info"], int);
            run_queue_fields(&KernelTypes::parse(btf.finish()).unwrap())
        };
        let known = RunQueueFields { run_delay: 12 + 4, last_queued: 12 + 8, cfs_rq: 4 + 4, rq: 0, clock: 4 };
        assert_eq!(fields("run_delay"), Some(known));
        assert_eq!(fields("other"), None);
    }
}
