//! Turns the command line, `LOOPGUARD_*` variables and a configuration file into the arguments, in this order of
//! precedence, and remembers where each value came from.
//!
//! The definition of the command line is the only list of options. A file's keys and the variables' names are made from
//! it, and their values go through its parsers, so the three cannot drift apart.

use std::{
    ffi::{OsStr, OsString},
    fmt, fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::{
    Arg, ArgAction, ArgMatches, Command, CommandFactory as _, FromArgMatches as _,
    error::{ContextKind, ContextValue, Error, ErrorKind},
    parser::ValueSource,
};
use toml::de::{DeTable, DeValue};

use crate::args::Args;
use crate::sink::escape::printable;

/// Options that say where the others are, or belong to one run only.
const NOT_CONFIGURED: [&str; 3] = ["config", "help", "version"];
/// Subcommands whose options can be configured.
const CONFIGURED: [&str; 3] = ["attach", "run", "config"];

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Default,
    File { path: PathBuf, line: usize },
    Variable(String),
    CommandLine,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => write!(f, "default"),
            Self::File { path, line } => write!(f, "{}:{line}", printable(&path.to_string_lossy())),
            Self::Variable(name) => write!(f, "{name}"),
            Self::CommandLine => write!(f, "command line"),
        }
    }
}

/// What an option's value is, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effective {
    pub name: String,
    pub values: Vec<String>,
    /// It may be given several times.
    pub is_list: bool,
    pub origin: Origin,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Configured {
    pub arguments: Args,
    /// In the order of the help.
    pub effective: Vec<Effective>,
}

/// What the caller's surroundings say.
pub trait Environment {
    fn variable(&self, name: &str) -> Option<OsString>;
}

/// The process's own.
pub struct ProcessEnvironment;

impl Environment for ProcessEnvironment {
    fn variable(&self, name: &str) -> Option<OsString> {
        std::env::var_os(name)
    }
}

/// A wrong command line: clap prints it, with the advice it has. Or a wrong file or variable: one sentence.
#[derive(Debug)]
pub enum Wrong {
    Usage(Error),
    Value(anyhow::Error),
}

/// Values for the command line, from elsewhere.
struct Given {
    arguments: Vec<OsString>,
    origins: Vec<(String, Origin)>,
}

pub fn parse(line: Vec<OsString>, environment: &impl Environment) -> Result<Configured, Wrong> {
    let command = command();
    let Some((subcommand, seen)) = look_ahead(&command, &line) else {
        let matches = command.clone().try_get_matches_from(line).map_err(Wrong::Usage)?;
        return Ok(Configured { arguments: arguments(&matches)?, effective: Vec::new() });
    };
    let given = from_elsewhere(&subcommand, &seen, environment).map_err(Wrong::Value)?;
    // What came from elsewhere stands before what was typed.
    let at = line.iter().position(|word| *word == *subcommand.get_name()).map_or(line.len(), |index| index + 1);
    let mut whole = line[..at].to_vec();
    whole.extend(given.arguments);
    whole.extend_from_slice(&line[at..]);
    let matches = command.clone().try_get_matches_from(whole).map_err(Wrong::Usage)?;
    let effective = match matches.subcommand() {
        Some((_, options)) => effective(&subcommand, options, &given.origins),
        None => Vec::new(),
    };
    Ok(Configured { arguments: arguments(&matches)?, effective })
}

/// `loopguard run` starts its process itself, and `loopguard config` needs none.
fn command() -> Command {
    let mut command = Args::command();
    for name in ["run", "config"] {
        for selected in ["pids", "names", "cgroups", "containers"] {
            command = command.mut_subcommand(name, |subcommand| subcommand.mut_arg(selected, |arg| arg.hide(true)));
        }
    }
    command.build();
    command
}

fn arguments(matches: &ArgMatches) -> Result<Args, Wrong> {
    Args::from_arg_matches(matches).map_err(Wrong::Usage)
}

/// The subcommand that is meant and the options typed for it, whether the line is right or not. `None`: it is one that
/// is not configured, or none.
fn look_ahead(command: &Command, line: &[OsString]) -> Option<(Command, ArgMatches)> {
    let matches = command.clone().ignore_errors(true).try_get_matches_from(line).ok()?;
    let (name, options) = matches.subcommand()?;
    let subcommand = command.find_subcommand(name).filter(|_| CONFIGURED.contains(&name))?;
    Some((subcommand.clone(), options.clone()))
}

fn is_configured(argument: &Arg) -> bool {
    argument.get_long().is_some_and(|name| !NOT_CONFIGURED.contains(&name))
}

fn long_name(argument: &Arg) -> &str {
    argument.get_long().unwrap_or_default()
}

/// `--route-threshold` is `LOOPGUARD_ROUTE_THRESHOLD`.
fn variable_name(option: &str) -> String {
    format!("LOOPGUARD_{}", option.to_uppercase().replace('-', "_"))
}

fn from_elsewhere(subcommand: &Command, seen: &ArgMatches, environment: &impl Environment) -> Result<Given> {
    let typed = |argument: &Arg| seen.value_source(argument.get_id().as_str()) == Some(ValueSource::CommandLine);
    let named = seen.try_get_one::<PathBuf>("config").ok().flatten().cloned();
    let file = named.or_else(|| environment.variable("LOOPGUARD_CONFIG").map(PathBuf::from));
    let file = file.map(|path| ConfigFile::read(&path, subcommand)).transpose()?;
    let mut given = Given { arguments: Vec::new(), origins: Vec::new() };
    for argument in subcommand.get_arguments().filter(|argument| is_configured(argument)) {
        let name = long_name(argument);
        // Checked even where something stronger is given: a wrong file is wrong.
        let in_file = file.as_ref().and_then(|file| file.entry(name)).map(|entry| entry.words(argument)).transpose()?;
        let variable = variable_name(name);
        let in_environment = environment.variable(&variable).map(|value| words_of_variable(argument, &value));
        let in_environment = in_environment.transpose().with_context(|| variable.clone())?;
        if typed(argument) {
            continue;
        }
        let (words, origin) = match (in_environment, in_file) {
            (Some(words), _) => (words, Origin::Variable(variable)),
            (None, Some((words, origin))) => (words, origin),
            (None, None) => continue,
        };
        given.arguments.extend(words);
        given.origins.push((name.to_owned(), origin));
    }
    Ok(given)
}

/// A list is separated by commas. An empty value is none at all.
fn words_of_variable(argument: &Arg, value: &OsStr) -> Result<Vec<OsString>> {
    let text = value.to_str().context("it is not UTF-8")?;
    let values: Vec<&str> = match argument.get_action() {
        ArgAction::Append => text.split(',').map(str::trim).filter(|value| !value.is_empty()).collect(),
        _ => Some(text).filter(|text| !text.is_empty()).into_iter().collect(),
    };
    let mut words = Vec::new();
    for value in values {
        words.extend(checked_word(argument, value)?);
    }
    Ok(words)
}

/// The word on the command line that gives an option this value; none for a flag that is not set.
fn checked_word(argument: &Arg, value: &str) -> Result<Option<OsString>> {
    let name = long_name(argument);
    if matches!(argument.get_action(), ArgAction::SetTrue) {
        return match value {
            "true" | "1" | "yes" | "on" => Ok(Some(format!("--{name}").into())),
            "false" | "0" | "no" | "off" => Ok(None),
            _ => bail!("it is true or false"),
        };
    }
    let word = OsString::from(format!("--{name}={value}"));
    let alone = Command::new("loopguard").arg(argument.clone().required(false));
    match alone.try_get_matches_from([OsString::from("loopguard"), word.clone()]) {
        Ok(_) => Ok(Some(word)),
        Err(error) => Err(anyhow!("{}", reason(&error))),
    }
}

/// What is wrong with a value, without the option's name.
fn reason(error: &Error) -> String {
    if error.kind() == ErrorKind::ValueValidation
        && let Some(source) = std::error::Error::source(error)
    {
        return source.to_string();
    }
    if let Some(ContextValue::Strings(valid)) = error.get(ContextKind::ValidValue) {
        return format!("it is one of {}", valid.join(", "));
    }
    let text = error.to_string();
    text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
}

/// A configuration file: its text is kept for line numbers.
struct ConfigFile {
    path: PathBuf,
    entries: Vec<Entry>,
}

struct Entry {
    key: String,
    /// What stands there, one for each time the option is given.
    values: Result<Vec<String>, &'static str>,
    origin: Origin,
}

impl ConfigFile {
    fn read(path: &Path, subcommand: &Command) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read the configuration file {}", path.display()))?;
        let line_of = |offset: usize| text[..offset.min(text.len())].matches('\n').count() + 1;
        let table = DeTable::parse(&text).map_err(|error| {
            let line = error.span().map_or(1, |span| line_of(span.start));
            anyhow!("{}:{line}: {}", path.display(), error.message())
        })?;
        let mut entries = Vec::new();
        for (key, value) in table.get_ref() {
            let origin = Origin::File { path: path.to_owned(), line: line_of(key.span().start) };
            let key = key.get_ref().replace('_', "-");
            if !subcommand.get_arguments().any(|argument| is_configured(argument) && long_name(argument) == key) {
                bail!("{origin}: unknown key `{}`{}", printable(&key), similar(&key, subcommand));
            }
            entries.push(Entry { key, values: values(value.get_ref()), origin });
        }
        Ok(Self { path: path.to_owned(), entries })
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        debug_assert!(!self.path.as_os_str().is_empty());
        self.entries.iter().find(|entry| entry.key == name)
    }
}

impl Entry {
    fn words(&self, argument: &Arg) -> Result<(Vec<OsString>, Origin)> {
        let context = || format!("{}: {}", self.origin, self.key);
        let values = self.values.as_ref().map_err(|reason| anyhow!("{reason}")).with_context(context)?;
        if values.len() != 1 && !matches!(argument.get_action(), ArgAction::Append) {
            return Err(anyhow!("it has one value, not {}", values.len())).with_context(context);
        }
        let mut words = Vec::new();
        for value in values {
            words.extend(checked_word(argument, value).with_context(context)?);
        }
        Ok((words, self.origin.clone()))
    }
}

/// A list is an array, or a table where the option has the form KEY=VALUE.
fn values(value: &DeValue) -> Result<Vec<String>, &'static str> {
    const FORM: &str = "it is text, a number, true or false, or a list of these";
    let single = |value: &DeValue| match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => Some(number.to_string()),
        DeValue::Float(number) => Some(number.to_string()),
        DeValue::Boolean(flag) => Some(flag.to_string()),
        DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => None,
    };
    match value {
        DeValue::Array(list) => list.iter().map(|item| single(item.get_ref()).ok_or(FORM)).collect(),
        DeValue::Table(table) => {
            let pair = |(key, value): (&toml::Spanned<toml::de::DeString>, &toml::Spanned<DeValue>)| {
                single(value.get_ref()).map(|value| format!("{}={value}", key.get_ref())).ok_or(FORM)
            };
            table.iter().map(pair).collect()
        }
        value => single(value).map(|value| vec![value]).ok_or(FORM),
    }
}

/// The option whose name is nearest, if one is near.
fn similar(key: &str, subcommand: &Command) -> String {
    let names = subcommand.get_arguments().filter(|argument| is_configured(argument)).map(long_name);
    let nearest = names.map(|name| (distance(key, name), name)).min();
    match nearest {
        Some((distance, name)) if distance <= 3 => format!("; is it `{name}`?"),
        _ => "; the keys are the long options, without the dashes (loopguard attach --help)".to_owned(),
    }
}

/// Letters to insert, remove or change (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, letter) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, other) in b.iter().enumerate() {
            let changed = diagonal + usize::from(letter != *other);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

fn effective(subcommand: &Command, options: &ArgMatches, origins: &[(String, Origin)]) -> Vec<Effective> {
    let arguments = subcommand.get_arguments().filter(|argument| is_configured(argument));
    arguments
        .map(|argument| {
            let (name, id) = (long_name(argument).to_owned(), argument.get_id().as_str());
            let raw = options.try_get_raw(id).ok().flatten().into_iter().flatten();
            let elsewhere = origins.iter().find(|(known, _)| *known == name).map(|(_, origin)| origin.clone());
            let origin = match (elsewhere, options.value_source(id)) {
                (Some(origin), _) => origin,
                (None, Some(ValueSource::CommandLine)) => Origin::CommandLine,
                (None, _) => Origin::Default,
            };
            let is_list = matches!(argument.get_action(), ArgAction::Append);
            Effective { name, values: raw.map(|value| value.to_string_lossy().into_owned()).collect(), is_list, origin }
        })
        .collect()
}

/// `loopguard config`: a configuration file that says the same, each line with where its value came from.
pub fn print(effective: &[Effective]) -> Result<()> {
    let quoted = |value: &String| match value.as_str() {
        "true" | "false" => value.clone(),
        _ => toml::Value::String(value.clone()).to_string(),
    };
    let lines: Vec<(String, String)> = effective
        .iter()
        .map(|option| {
            let name = &option.name;
            let line = match option.values.as_slice() {
                [] => format!("# {name} is not set"),
                values if option.is_list => {
                    format!("{name} = [{}]", values.iter().map(quoted).collect::<Vec<_>>().join(", "))
                }
                values => format!("{name} = {}", quoted(&values[0])),
            };
            (line, if option.values.is_empty() { String::new() } else { format!("  # {}", option.origin) })
        })
        .collect();
    let width = lines.iter().map(|(line, _)| line.chars().count()).filter(|width| *width < 60).max().unwrap_or(0);
    let mut out = io::stdout().lock();
    for (line, origin) in lines {
        writeln!(out, "{}", format!("{:<width$}{origin}", printable(&line).to_string()).trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Variables that a test sets.
    #[derive(Default)]
    struct Variables(HashMap<String, OsString>);

    impl Environment for Variables {
        fn variable(&self, name: &str) -> Option<OsString> {
            self.0.get(name).cloned()
        }
    }

    fn variables(given: &[(&str, &str)]) -> Variables {
        Variables(given.iter().map(|(name, value)| ((*name).to_owned(), OsString::from(value))).collect())
    }

    /// A configuration file that is gone when the test is over.
    struct TemporaryFile(PathBuf);

    impl TemporaryFile {
        fn with(text: &str) -> Self {
            static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
            let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("loopguard-config-{}-{number}.toml", std::process::id()));
            fs::write(&path, text).unwrap();
            Self(path)
        }
    }

    impl Drop for TemporaryFile {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    fn parsed(line: &str, environment: &Variables) -> Result<Configured, String> {
        let words = line.split(' ').map(OsString::from).collect();
        parse(words, environment).map_err(|wrong| match wrong {
            Wrong::Usage(error) => error.to_string(),
            Wrong::Value(error) => format!("{error:#}"),
        })
    }

    fn option(configured: &Configured, name: &str) -> Effective {
        configured.effective.iter().find(|option| option.name == name).cloned().unwrap()
    }

    /// A value other than the default for each option, in the form the command line has it.
    fn another_value(argument: &Arg) -> &'static str {
        match long_name(argument) {
            "pid" => "12",
            "threshold" => "77ms",
            "threshold-percentile" => "0.9",
            "threshold-multiplier" => "7",
            "threshold-floor" => "11ms",
            "threshold-cap" => "222ms",
            "route-threshold" => "/slow/{id}=300ms",
            "exclude-route" => "/up",
            "cumulative-threshold" => "150ms",
            "cumulative-window" => "2s",
            "cumulative-floor" => "3ms",
            "capture-after" => "9ms",
            "sample-every" => "4ms",
            "budget" => "3%",
            "label-cap" => "50",
            "container" => "0123456789ab",
            "stack-size" => "16KiB",
            "prometheus" => "127.0.0.1:9464",
            "duration" => "90s",
            "steps" => "off",
            "format" => "jsonl",
            "fail-on-blocking" => "100ms",
            name if matches!(argument.get_action(), ArgAction::SetTrue) => {
                assert!(!name.is_empty());
                "true"
            }
            // Files.
            _ => "/tmp/a file",
        }
    }

    #[test]
    fn each_option_is_reached_by_flag_file_and_variable() {
        let command = command();
        let attach = command.find_subcommand("attach").unwrap();
        let options: Vec<&Arg> = attach.get_arguments().filter(|argument| is_configured(argument)).collect();
        assert!(options.len() >= 24, "{}", options.len());
        for argument in options {
            let (name, value) = (long_name(argument), another_value(argument));
            let is_flag = matches!(argument.get_action(), ArgAction::SetTrue);
            let pid = if name == "pid" { vec![] } else { vec![OsString::from("--pid=1")] };
            let with = |more: Vec<OsString>, environment: &Variables| {
                let words = ["loopguard", "attach"].into_iter().map(OsString::from).chain(pid.clone()).chain(more);
                match parse(words.collect(), environment) {
                    Ok(configured) => configured,
                    Err(wrong) => panic!("{name}: {wrong:?}"),
                }
            };
            let flag = if is_flag { format!("--{name}") } else { format!("--{name}={value}") };
            let by_flag = with(vec![flag.into()], &Variables::default());
            let by_variable = with(vec![], &variables(&[(&variable_name(name), value)]));
            let quoted = if is_flag { value.to_owned() } else { format!("{value:?}") };
            let file = TemporaryFile::with(&format!("# one option\n{name} = {quoted}\n"));
            let config = OsString::from("--config");
            let by_file = with(vec![config.clone(), file.0.clone().into()], &Variables::default());
            let mut without_config = by_file.arguments.clone();
            if let crate::args::Command::Attach(attach) = &mut without_config.command {
                attach.config = None;
            }
            assert_eq!(by_flag.arguments, by_variable.arguments, "{name}");
            assert_eq!(by_flag.arguments, without_config, "{name}");
            assert_eq!(option(&by_flag, name).origin, Origin::CommandLine, "{name}");
            assert_eq!(option(&by_variable, name).origin, Origin::Variable(variable_name(name)), "{name}");
            assert_eq!(option(&by_file, name).origin, Origin::File { path: file.0.clone(), line: 2 }, "{name}");
            for configured in [&by_flag, &by_variable, &by_file] {
                assert_eq!(option(configured, name).values, [value], "{name}");
            }
            // The stronger one wins.
            let all = variables(&[(&variable_name(name), value)]);
            let both = with(vec![config, file.0.clone().into()], &all);
            assert_eq!(option(&both, name).origin, Origin::Variable(variable_name(name)), "{name}");
        }
    }

    #[test]
    fn lists_and_tables() {
        let file = TemporaryFile::with(
            "pid = [7, 8]\nexclude_route = [\"/a\", \"/b\"]\n\n[route-threshold]\n\"/x\" = \"20ms\"\n\"/y/{id}\" = \"1s\"\n",
        );
        let line = format!("loopguard attach --config {}", file.0.display());
        let configured = parsed(&line, &Variables::default()).unwrap();
        assert_eq!(option(&configured, "pid").values, ["7", "8"]);
        assert_eq!(option(&configured, "exclude-route").values, ["/a", "/b"]);
        assert_eq!(option(&configured, "route-threshold").values, ["/x=20ms", "/y/{id}=1s"]);
        let environment = variables(&[("LOOPGUARD_EXCLUDE_ROUTE", "/c, /d"), ("LOOPGUARD_FAIL_ON_BLOCKING", "true")]);
        let configured = parsed(&line, &environment).unwrap();
        assert_eq!(option(&configured, "exclude-route").values, ["/c", "/d"]);
        // What is typed stands alone: it does not add to what is configured.
        let configured = parsed(&format!("{line} --exclude-route /e"), &environment).unwrap();
        assert_eq!(option(&configured, "exclude-route").values, ["/e"]);
        assert_eq!(option(&configured, "fail-on-blocking").values, ["true"]);
    }

    #[test]
    fn the_file_can_be_named_by_a_variable_and_serves_run_too() {
        let file = TemporaryFile::with("threshold = \"auto\"\n");
        let environment = variables(&[("LOOPGUARD_CONFIG", file.0.to_str().unwrap())]);
        let configured = parsed("loopguard run --duration 5s -- python attach", &environment).unwrap();
        assert_eq!(option(&configured, "threshold").values, ["auto"]);
        assert_eq!(option(&configured, "duration").origin, Origin::CommandLine);
        let crate::args::Command::Run(run) = configured.arguments.command else { panic!("run") };
        assert_eq!(run.command, ["python", "attach"]);
    }

    #[test]
    fn wrong_values_name_the_key_the_file_and_the_line() {
        let error = |text: &str| {
            let file = TemporaryFile::with(text);
            let line = format!("loopguard attach --pid 1 --config {}", file.0.display());
            let error = parsed(&line, &Variables::default()).unwrap_err();
            error.replace(file.0.to_str().unwrap(), "loopguard.toml")
        };
        let wrong_variable = parsed("loopguard attach --pid 1", &variables(&[("LOOPGUARD_STEPS", "maybe")]));
        let errors = [
            error("\ntreshold = \"20ms\""),
            error("zzzzzzzzzz = 1"),
            error("threshold = \"50\""),
            error("threshold = 50"),
            error("duration = \"5s\"\nsteps = \"maybe\""),
            error("debug-bpf = \"perhaps\""),
            error("threshold = [\"5ms\", \"6ms\"]"),
            error("threshold = { a = { b = 1 } }"),
            error("duration = \"5s\"\nthreshold = "),
            error("config = \"other.toml\""),
            error("route-threshold = [\"/x\"]"),
            parsed("loopguard attach --pid 1 --config /nowhere.toml", &Variables::default()).unwrap_err(),
            wrong_variable.unwrap_err(),
        ];
        insta::assert_snapshot!(errors.join("\n"), @r"
        loopguard.toml:2: unknown key `treshold`; is it `threshold`?
        loopguard.toml:1: unknown key `zzzzzzzzzz`; the keys are the long options, without the dashes (loopguard attach --help)
        loopguard.toml:1: threshold: a unit is missing: is it 50ms or 50s?
        loopguard.toml:1: threshold: a unit is missing: is it 50ms or 50s?
        loopguard.toml:2: steps: it is one of auto, off
        loopguard.toml:1: debug-bpf: it is true or false
        loopguard.toml:1: threshold: it has one value, not 2
        loopguard.toml:1: threshold: it is text, a number, true or false, or a list of these
        loopguard.toml:2: string values must be quoted, expected literal string
        loopguard.toml:1: unknown key `config`; the keys are the long options, without the dashes (loopguard attach --help)
        loopguard.toml:1: route-threshold: it has the form ROUTE=TIME, like /reports/{id}=200ms
        cannot read the configuration file /nowhere.toml: No such file or directory (os error 2)
        LOOPGUARD_STEPS: it is one of auto, off
        ");
    }

    #[test]
    fn other_subcommands_are_left_alone() {
        let environment = variables(&[("LOOPGUARD_PID", "7"), ("LOOPGUARD_CONFIG", "/nowhere.toml")]);
        assert!(parsed("loopguard doctor", &environment).unwrap().effective.is_empty());
        assert!(parsed("loopguard watch", &environment).unwrap_err().contains("unrecognized subcommand"));
    }
}
