//! Turns the command line into plain values; nothing here touches the system.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

use crate::options::{Detection, Gate, Monitoring};
use crate::source::select::check_container_id;

/// Says what blocks a live event loop: which request did it, on which line, and where the time went.
///
/// loopguard watches from outside, through the kernel: no restart, no change to the code, and the target is never
/// stopped. It needs root, or CAP_BPF, CAP_PERFMON and CAP_SYS_PTRACE.
#[derive(Clone, Debug, PartialEq, Parser)]
#[command(name = "loopguard", version, about, arg_required_else_help = true, after_help = EXIT_CODES)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Clone, Debug, PartialEq, Subcommand)]
pub enum Command {
    Attach(Attach),
    Run(Run),
    Config(Config),
    Doctor(Doctor),
}

/// Watches running processes and tells every block of their event loops.
///
/// A block is one uninterrupted stretch in which one owner kept the event loop from running, at least as long as the
/// threshold. Each one comes with the request (method, path, route, id, client), the line of your code nearest to
/// where the time went, and the time itself: on the CPU, waiting, waiting for the GIL, or ready to run without a CPU.
/// How the request is known is said too: exactly, inferred, or not at all.
///
/// Ctrl-C, --duration and the end of the target all end with the same summary.
#[derive(Clone, Debug, PartialEq, ClapArgs)]
#[command(after_help = EXIT_CODES)]
pub struct Attach {
    /// Process to watch, with all its descendants; give it several times for several processes
    #[arg(long = "pid", value_name = "PID", value_parser = pid)]
    pub pids: Vec<u32>,

    /// Watch the processes of this name: a program, or the script or module that Python runs
    #[arg(long = "name", value_name = "NAME")]
    pub names: Vec<String>,

    /// Watch the processes in this control group: a folder below /sys/fs/cgroup
    #[arg(long = "cgroup", value_name = "PATH")]
    pub cgroups: Vec<String>,

    /// Watch the processes in this container: its id, or the beginning of it
    #[arg(long = "container", value_name = "ID", value_parser = container)]
    pub containers: Vec<String>,

    /// Stop after this time, 100ms to 30d [default: until Ctrl-C or the end of the target]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub duration: Option<Duration>,

    /// How the steps of tasks are told apart
    #[arg(long, value_enum, default_value_t = Steps::Auto)]
    pub steps: Steps,

    /// What the output looks like [default: tui on a terminal, else text]
    #[arg(long, value_enum)]
    pub format: Option<Format>,

    /// Write to this file instead of standard output
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,

    /// How much of the native stack is copied for each look into a block, 4KiB to 64KiB [default: as needed]
    #[arg(long, value_name = "SIZE", value_parser = stack_size)]
    pub stack_size: Option<usize>,

    /// Draw the live view with ASCII characters only [default: if the locale is not UTF-8]
    #[arg(long)]
    pub ascii: bool,

    /// Print the log of the kernel programs to standard error
    #[arg(long)]
    pub debug_bpf: bool,

    /// Read options from this TOML file; its keys are the long options without dashes
    ///
    /// A value on the command line goes before one in the variable LOOPGUARD_OPTION (LOOPGUARD_ROUTE_THRESHOLD, say),
    /// and that before one in the file. `loopguard config` prints what comes out.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    #[command(flatten)]
    pub detection: Detection,

    #[command(flatten)]
    pub monitoring: Monitoring,

    #[command(flatten)]
    pub gate: Gate,
}

/// Starts a command and watches it from before its first tick.
///
/// loopguard ends when the command does. Signals are passed on to it.
#[derive(Clone, Debug, PartialEq, ClapArgs)]
#[command(after_help = RUN_EXIT_CODES)]
pub struct Run {
    #[command(flatten)]
    pub attach: Attach,

    /// The command, and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Prints what the options are and where each comes from, as a configuration file.
#[derive(Clone, Debug, PartialEq, ClapArgs)]
pub struct Config {
    #[command(flatten)]
    pub attach: Attach,
}

/// Says what works on this machine and for one process, what does not, and what to do about it.
#[derive(Clone, Debug, PartialEq, ClapArgs)]
pub struct Doctor {
    /// Process to look at; without it, only the machine is checked
    #[arg(long, value_name = "PID", value_parser = pid)]
    pub pid: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Steps {
    /// Mark steps with a probe where that is possible, from the first late one on: owners are exact
    Auto,
    /// No probes: a tick with several owners is cut where captures see the owner change, and owners are inferred
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A live view on the terminal; the summary follows when it is left
    Tui,
    /// A few lines per block, for people
    Text,
    /// One JSON object per line, for programs
    Jsonl,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  nothing to complain about
  1  a block was found, and --fail-on-blocking was given
  2  loopguard could not do its job (it saw no event loop, for one)";

const RUN_EXIT_CODES: &str = "\
Exit codes:
  0  the command succeeded, and there is nothing to complain about
  1  a block was found, and --fail-on-blocking was given
  2  loopguard could not do its job (it saw no event loop, for one)
  else the command's own, if it failed";

/// Linux never gives out a higher one.
const MAX_PID: u32 = 1 << 22;
const MIN_DURATION: Duration = Duration::from_millis(100);
const MAX_DURATION: Duration = Duration::from_secs(30 * 24 * 3600);

fn pid(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(pid @ 1..=MAX_PID) => Ok(pid),
        _ => Err(format!("a process id is a number from 1 to {MAX_PID}")),
    }
}

fn container(text: &str) -> Result<String, String> {
    check_container_id(text).map(|()| text.to_ascii_lowercase())
}

fn duration(text: &str) -> Result<Duration, String> {
    match time(text)? {
        time if (MIN_DURATION..=MAX_DURATION).contains(&time) => Ok(time),
        _ => Err("a duration is between 100ms and 30d".to_owned()),
    }
}

/// Whole KiB, in bytes.
fn stack_size(text: &str) -> Result<usize, String> {
    let number = text.strip_suffix("KiB").ok_or("a size is a number and KiB, like 32KiB")?;
    match number.trim().parse() {
        Ok(kib @ 4..=64) => Ok(kib << 10),
        _ => Err("a stack size is between 4KiB and 64KiB".to_owned()),
    }
}

/// A number, with decimals or without, and its unit.
pub(crate) fn time(text: &str) -> Result<Duration, String> {
    const FORM: &str = "a time is a number and a unit (us, ms, s, m, h, d), like 50ms";
    let unit_at = text.find(|char: char| !char.is_ascii_digit() && char != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let unit_ns: u64 = match unit.trim() {
        "ns" => 1,
        "us" | "µs" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" | "min" => 60 * 1_000_000_000,
        "h" => 3600 * 1_000_000_000,
        "d" => 24 * 3600 * 1_000_000_000,
        "" if !number.is_empty() => return Err(format!("a unit is missing: is it {number}ms or {number}s?")),
        _ => return Err(FORM.to_owned()),
    };
    let (whole, decimals) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(decimals) || number.ends_with('.') {
        return Err(FORM.to_owned());
    }
    // More than 20 digits are beyond any bound, and decimals beyond the ninth below a nanosecond of any unit in use.
    let whole_ns = whole.parse::<u64>().ok().and_then(|whole| whole.checked_mul(unit_ns));
    let decimals_ns: u128 = decimals
        .bytes()
        .take(18)
        .enumerate()
        .map(|(place, digit)| u128::from(digit - b'0') * u128::from(unit_ns) / 10u128.pow(place as u32 + 1))
        .sum();
    let whole_ns = whole_ns.ok_or_else(|| "that is too long".to_owned())?;
    Ok(Duration::from_nanos(whole_ns.saturating_add(decimals_ns as u64)))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::options::{FailOn, Threshold};

    fn parse(line: &str) -> Result<Command, clap::Error> {
        Args::try_parse_from(line.split(' ')).map(|args| args.command)
    }

    /// The error without the advice below it; it must also be a matter of usage: exit code 2.
    fn error(line: &str) -> String {
        let error = parse(line).expect_err(line);
        assert_eq!(error.exit_code(), 2);
        error.to_string().split("\n\n").next().unwrap_or_default().to_owned()
    }

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn attach_with_nothing_but_a_process() {
        let expected = Attach {
            pids: vec![12],
            names: vec![],
            cgroups: vec![],
            containers: vec![],
            duration: None,
            steps: Steps::Auto,
            format: None,
            output: None,
            stack_size: None,
            ascii: false,
            debug_bpf: false,
            config: None,
            detection: Detection::default(),
            monitoring: Monitoring::default(),
            gate: Gate::default(),
        };
        assert_eq!(parse("loopguard attach --pid 12").unwrap(), Command::Attach(expected));
    }

    #[test]
    fn attach_with_everything() {
        let line = "loopguard attach --pid 12 --pid 13 --name gunicorn --cgroup /system.slice/app.service \
                    --container 0123456789AB --threshold 10ms --duration 1.5m --steps off --format jsonl \
                    --output out.jsonl --ascii --fail-on-blocking --debug-bpf --exclude-route /up --route-threshold /slow=1s \
                    --prometheus 127.0.0.1:9464 --junit junit.xml";
        let expected = Attach {
            pids: vec![12, 13],
            names: vec!["gunicorn".to_owned()],
            cgroups: vec!["/system.slice/app.service".to_owned()],
            containers: vec!["0123456789ab".to_owned()],
            duration: Some(Duration::from_secs(90)),
            steps: Steps::Off,
            format: Some(Format::Jsonl),
            output: Some(PathBuf::from("out.jsonl")),
            stack_size: None,
            ascii: true,
            debug_bpf: true,
            config: None,
            detection: Detection {
                threshold: Threshold::Fixed(Duration::from_millis(10)),
                excluded_routes: vec!["/up".to_owned()],
                route_thresholds: vec![("/slow".to_owned(), Duration::from_secs(1))],
                ..Detection::default()
            },
            monitoring: Monitoring { prometheus: "127.0.0.1:9464".parse().ok(), ..Monitoring::default() },
            gate: Gate { fail_on_blocking: FailOn::Any, junit: Some("junit.xml".into()), ..Gate::default() },
        };
        assert_eq!(parse(line).unwrap(), Command::Attach(expected));
    }

    #[test]
    fn doctor_with_and_without_a_process() {
        assert_eq!(parse("loopguard doctor").unwrap(), Command::Doctor(Doctor { pid: None }));
        assert_eq!(parse("loopguard doctor --pid 1").unwrap(), Command::Doctor(Doctor { pid: Some(1) }));
    }

    #[test]
    fn wrong_values_are_one_clear_sentence() {
        let errors = [
            error("loopguard attach --pid 0"),
            error("loopguard attach --pid uvicorn"),
            error("loopguard attach --pid 99999999999999999999"),
            error("loopguard attach --pid 1 --threshold 50"),
            error("loopguard attach --pid 1 --threshold-percentile 95"),
            error("loopguard attach --pid 1 --exclude-route health"),
            error("loopguard attach --pid 1 --route-threshold /slow"),
            error("loopguard attach --pid 1 --prometheus 9464"),
            error("loopguard attach --pid 1 --fail-on-blocking=often"),
            error("loopguard attach --pid 1 --threshold 999us"),
            error("loopguard attach --pid 1 --threshold 61s"),
            error("loopguard attach --pid 1 --threshold -5ms"),
            error("loopguard attach --pid 1 --threshold --duration 5s"),
            error("loopguard attach --pid 1 --duration soon"),
            error("loopguard attach --pid 1 --duration 31d"),
            error("loopguard attach --pid 1 --format gui"),
            error("loopguard watch"),
        ];
        insta::assert_snapshot!(errors.join("\n"), @r"
        error: invalid value '0' for '--pid <PID>': a process id is a number from 1 to 4194304
        error: invalid value 'uvicorn' for '--pid <PID>': a process id is a number from 1 to 4194304
        error: invalid value '99999999999999999999' for '--pid <PID>': a process id is a number from 1 to 4194304
        error: invalid value '50' for '--threshold <TIME|auto>': a unit is missing: is it 50ms or 50s?
        error: invalid value '95' for '--threshold-percentile <PART>': it is a number from 0.5 to 0.999
        error: invalid value 'health' for '--exclude-route <ROUTE>': a route begins with /, like /items/{id}
        error: invalid value '/slow' for '--route-threshold <ROUTE=TIME>': it has the form ROUTE=TIME, like /reports/{id}=200ms
        error: invalid value '9464' for '--prometheus <ADDRESS>': an address is an IP address and a port, like 127.0.0.1:9464
        error: invalid value 'often' for '--fail-on-blocking[=<TIME>]': a time is a number and a unit (us, ms, s, m, h, d), like 50ms
        error: invalid value '999us' for '--threshold <TIME|auto>': a threshold is between 1ms and 60s
        error: invalid value '61s' for '--threshold <TIME|auto>': a threshold is between 1ms and 60s
        error: unexpected argument '-5' found
        error: a value is required for '--threshold <TIME|auto>' but none was supplied
        error: invalid value 'soon' for '--duration <TIME>': a time is a number and a unit (us, ms, s, m, h, d), like 50ms
        error: invalid value '31d' for '--duration <TIME>': a duration is between 100ms and 30d
        error: invalid value 'gui' for '--format <FORMAT>'
          [possible values: tui, text, jsonl]
        error: unrecognized subcommand 'watch'
        ");
    }

    #[test]
    fn times() {
        let ok = |text, ns| assert_eq!(time(text), Ok(Duration::from_nanos(ns)), "{text}");
        ok("50ms", 50_000_000);
        ok("50 ms", 50_000_000);
        ok("1.5s", 1_500_000_000);
        ok("0.25us", 250);
        ok("7ns", 7);
        ok("2m", 120_000_000_000);
        ok("1h", 3_600_000_000_000);
        ok("1.000000000000000000000000000000s", 1_000_000_000);
        for wrong in
            ["", "ms", ".5s", "5.s", "1.2.3s", "-1s", "1e3s", "5 parsecs", "5ms5", "٣s", "99999999999999999999s"]
        {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn help() {
        let help = |name: &str| {
            let mut command = Args::command();
            command.build();
            let help = command.find_subcommand_mut(name).unwrap().render_long_help().to_string();
            help.lines().map(|line| format!("{}\n", line.trim_end())).collect::<String>()
        };
        insta::assert_snapshot!(help("attach"), @r"
        Watches running processes and tells every block of their event loops.

        A block is one uninterrupted stretch in which one owner kept the event loop from running, at least as long as the threshold. Each one comes with the request (method, path, route, id, client), the line of your code nearest to where the time went, and the time itself: on the CPU, waiting, waiting for the GIL, or ready to run without a CPU. How the request is known is said too: exactly, inferred, or not at all.

        Ctrl-C, --duration and the end of the target all end with the same summary.

        Usage: loopguard attach [OPTIONS]

        Options:
              --pid <PID>
                  Process to watch, with all its descendants; give it several times for several processes

              --name <NAME>
                  Watch the processes of this name: a program, or the script or module that Python runs

              --cgroup <PATH>
                  Watch the processes in this control group: a folder below /sys/fs/cgroup

              --container <ID>
                  Watch the processes in this container: its id, or the beginning of it

              --duration <TIME>
                  Stop after this time, 100ms to 30d [default: until Ctrl-C or the end of the target]

              --steps <STEPS>
                  How the steps of tasks are told apart

                  Possible values:
                  - auto: Mark steps with a probe where that is possible, from the first late one on: owners are exact
                  - off:  No probes: a tick with several owners is cut where captures see the owner change, and owners are inferred

                  [default: auto]

              --format <FORMAT>
                  What the output looks like [default: tui on a terminal, else text]

                  Possible values:
                  - tui:   A live view on the terminal; the summary follows when it is left
                  - text:  A few lines per block, for people
                  - jsonl: One JSON object per line, for programs

              --output <FILE>
                  Write to this file instead of standard output

              --stack-size <SIZE>
                  How much of the native stack is copied for each look into a block, 4KiB to 64KiB [default: as needed]

              --ascii
                  Draw the live view with ASCII characters only [default: if the locale is not UTF-8]

              --debug-bpf
                  Print the log of the kernel programs to standard error

              --config <FILE>
                  Read options from this TOML file; its keys are the long options without dashes

                  A value on the command line goes before one in the variable LOOPGUARD_OPTION (LOOPGUARD_ROUTE_THRESHOLD, say), and that before one in the file. `loopguard config` prints what comes out.

          -h, --help
                  Print help (see a summary with '-h')

        What is a block:
              --threshold <TIME|auto>
                  How long one owner must hold the loop to be reported, 1ms to 60s; `auto`: by the loop's own ticks

                  [default: 50ms]

              --threshold-percentile <PART>
                  With `--threshold auto`: which part of the loop's ticks is shorter than its baseline

                  [default: 0.95]

              --threshold-multiplier <TIMES>
                  With `--threshold auto`: how many times its baseline a block is

                  [default: 5]

              --threshold-floor <TIME>
                  With `--threshold auto`: never below this

                  [default: 10ms]

              --threshold-cap <TIME>
                  With `--threshold auto`: never above this

                  [default: 200ms]

              --route-threshold <ROUTE=TIME>
                  Threshold of one route, like /reports/{id}=200ms; may be given several times

              --exclude-route <ROUTE>
                  Route whose blocks are not told, as template or path, with * for any end; may be given several times

                  [default: /health /healthz /ready /metrics]

              --cumulative-threshold <TIME>
                  How much shorter steps must sum up to within the window to be a cumulative block

                  [default: 200ms]

              --cumulative-window <TIME>
                  The window in which shorter steps sum up, 100ms to 60s

                  [default: 1s]

              --cumulative-floor <TIME>
                  Steps shorter than this don't count

                  [default: 5ms]

              --capture-after <TIME>
                  How old a step must be to be looked into [default: half the threshold]

              --sample-every <TIME>
                  How far apart looks into a step on the CPU are, 1ms to 1s [default: a 16th of the threshold, 1ms to 5ms]

              --budget <PERCENT>
                  What watching may cost, of the targets' CPU time, whatever is missed for it [default: beyond 2% fewer samples]

        Monitoring:
              --prometheus <ADDRESS>
                  Serve metrics for Prometheus at http://ADDRESS/metrics, like 127.0.0.1:9464

              --log <FILE>
                  Append one JSON line per block to this file, `-`: standard error; SIGHUP opens the file anew

              --label-cap <NUMBER>
                  Routes, and lines, that are told apart in metrics and summary; the rest is `other`

                  [default: 200]

        Continuous integration:
              --fail-on-blocking[=<TIME>]
                  Exit with 1 when a block was found that is not allowed; with a time: one at least that long. Time for which there was no CPU does not count

              --allow <FILE>
                  File of lines that may block, each with a reason: `app/store.py:41 until the driver is replaced`

              --junit <FILE>
                  Write a JUnit report to this file

              --markdown <FILE>
                  Write a Markdown report to this file

        Exit codes:
          0  nothing to complain about
          1  a block was found, and --fail-on-blocking was given
          2  loopguard could not do its job (it saw no event loop, for one)
        ");
        insta::assert_snapshot!(help("doctor"), @r"
        Says what works on this machine and for one process, what does not, and what to do about it

        Usage: loopguard doctor [OPTIONS]

        Options:
              --pid <PID>
                  Process to look at; without it, only the machine is checked

          -h, --help
                  Print help
        ");
    }
}
