//! The demo: a server that blocks its event loop on purpose, load on it, and loopguard naming who did it.

use std::env;
use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use xtask::workspace::{Workspace, cargo};

use crate::companion::{self, Companion};
use crate::pythons::{self, Venv};
use crate::setup;
use crate::step::{self, say};

const APP: &str = "examples/fastapi_blocking";
const TRACE: &str = "15s";
/// To look around in; `q` ends it before.
const TRACE_ON_SCREEN: &str = "60s";
const THRESHOLD: &str = "20ms";
/// The load stops by itself some time after the trace, even if nobody stops it.
const LOAD_SECONDS: &str = "75";
const SERVER_START: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);

/// What loopguard shows while it traces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Screen {
    Text,
    Tui,
}

pub fn run(screen: Screen) -> Result<()> {
    let privilege = Privilege::of_this_user()?;
    let shop = Shop::open(&Workspace::locate()?)?;
    attach(&shop.loopguard, privilege, shop.pid(), screen)?;
    say_what_next(&shop.loopguard, &shop.venv, privilege);
    Ok(())
}

/// The demo's server with load on it, and what is to watch it.
pub struct Shop {
    pub loopguard: PathBuf,
    venv: Venv,
    server: Companion,
    _load: Companion,
}

impl Shop {
    pub fn open(workspace: &Workspace) -> Result<Self> {
        setup::run(workspace)?;
        let loopguard = build_loopguard(workspace)?;
        let folder = workspace.target.join("demo");
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let venv = prepare_venv(workspace, folder.join("venv"))?;
        companion::outlive_interrupts();
        let ports = Ports::free()?;
        let server = start_server(workspace, &venv, &ports, &folder.join("server.log"))?;
        let load = start_load(workspace, &venv, &ports, &folder.join("load.log"))?;
        Ok(Self { loopguard, venv, server, _load: load })
    }

    pub fn pid(&self) -> u32 {
        self.server.pid()
    }
}

/// How loopguard gets the right to load kernel programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Privilege {
    Root,
    Sudo,
}

impl Privilege {
    fn of_this_user() -> Result<Self> {
        if setup::is_root() {
            return Ok(Self::Root);
        }
        let path = env::var_os("PATH").unwrap_or_default();
        ensure!(
            env::split_paths(&path).any(|folder| folder.join("sudo").is_file()),
            "attaching to a process needs root, and there is no sudo here: run `cargo xtask demo` as root"
        );
        Ok(Self::Sudo)
    }

    fn command(self, program: &Path) -> Command {
        match self {
            Self::Root => Command::new(program),
            Self::Sudo => {
                let mut sudo = Command::new("sudo");
                sudo.arg(program);
                sudo
            }
        }
    }
}

pub fn build_loopguard(workspace: &Workspace) -> Result<PathBuf> {
    say("building loopguard");
    let status = cargo()
        .args(["build", "--release", "--package=loopguard"])
        .current_dir(&workspace.root)
        .status()
        .context("run cargo")?;
    ensure!(status.success(), "loopguard does not build");
    Ok(workspace.target.join("release/loopguard"))
}

/// With the newest Python for which the packages can be installed.
fn prepare_venv(workspace: &Workspace, folder: PathBuf) -> Result<Venv> {
    let requirements = workspace.root.join(APP).join("requirements.txt");
    for python in pythons::find().iter().rev() {
        match Venv::prepare(python, folder.clone(), &requirements) {
            Ok(venv) => return Ok(venv),
            Err(error) => say(&format!("not with Python {python}: {error:#}")),
        }
    }
    bail!("no Python here can run the demo server: the lines above say why")
}

/// Where the server and the load's own payment service listen.
struct Ports {
    server: u16,
    payments: u16,
}

impl Ports {
    fn free() -> Result<Self> {
        // Both at once, so that they differ.
        let listeners = [listen()?, listen()?];
        let port = |listener: &TcpListener| Ok::<_, anyhow::Error>(listener.local_addr()?.port());
        Ok(Self { server: port(&listeners[0])?, payments: port(&listeners[1])? })
    }
}

fn listen() -> Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port on 127.0.0.1")
}

fn start_server(workspace: &Workspace, venv: &Venv, ports: &Ports, log: &Path) -> Result<Companion> {
    // The command line is on the screen: without where this checkout is.
    let python = venv.python();
    let mut uvicorn = Command::new(python.strip_prefix(&workspace.root).unwrap_or(&python));
    uvicorn
        .current_dir(&workspace.root)
        .args(["-m", "uvicorn", "app:app", "--log-level=warning", "--host=127.0.0.1"])
        .arg(format!("--port={}", ports.server))
        .arg("--app-dir")
        .arg(workspace.root.join(APP))
        // A temporary folder in memory would make the uploads' fsync free.
        .env("TMPDIR", log.parent().context("the log has a folder")?)
        .env("PAYMENTS_URL", format!("http://127.0.0.1:{}", ports.payments));
    let mut server = Companion::start(to_log(&mut uvicorn, log)?)?;
    let started = Instant::now();
    while !companion::listens(ports.server) {
        ensure!(!companion::interrupted(), "interrupted");
        if server.ended().is_some() || started.elapsed() > SERVER_START {
            eprintln!("{}", step::tail(log));
            bail!("the demo server did not start; its output is in {}", log.display());
        }
        thread::sleep(POLL);
    }
    say(&format!("demo server: pid {}, http://127.0.0.1:{}", server.pid(), ports.server));
    Ok(server)
}

fn start_load(workspace: &Workspace, venv: &Venv, ports: &Ports, log: &Path) -> Result<Companion> {
    let mut load = Command::new(venv.python());
    load.arg(workspace.root.join(APP).join("load.py"))
        .arg(format!("--port={}", ports.server))
        .arg(format!("--payments-port={}", ports.payments))
        .arg(format!("--seconds={LOAD_SECONDS}"));
    Companion::start(to_log(&mut load, log)?)
}

fn to_log<'a>(command: &'a mut Command, log: &Path) -> Result<&'a mut Command> {
    let output = File::create(log).with_context(|| format!("create {}", log.display()))?;
    Ok(command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output))
}

/// In the foreground: the report is the demo.
fn attach(loopguard: &Path, privilege: Privilege, pid: u32, screen: Screen) -> Result<()> {
    let (format, duration) = match screen {
        Screen::Text => ("text", TRACE),
        Screen::Tui => ("tui", TRACE_ON_SCREEN),
    };
    if screen == Screen::Tui {
        say("in the live view: arrows and Enter lead from a route to its stack, ? shows the keys, q leaves");
    }
    let arguments =
        ["attach", "--pid", &pid.to_string(), "--duration", duration, "--threshold", THRESHOLD, "--format", format];
    say(&format!("loopguard {}\n", arguments.join(" ")));
    let mut command = privilege.command(loopguard);
    let status = companion::ends_with_us(command.args(arguments)).status().context("run loopguard")?;
    ensure!(status.success(), "loopguard could not do its job ({status}): it says why above");
    Ok(())
}

fn say_what_next(loopguard: &Path, venv: &Venv, privilege: Privilege) {
    let sudo = if privilege == Privilege::Sudo { "sudo " } else { "" };
    let loopguard = format!("{sudo}{}", loopguard.display());
    println!(
        "
What to try next
  look at a server of yours:    {loopguard} attach --pid PID
  keep every block as JSON:     {loopguard} attach --pid PID --format jsonl --output blocks.jsonl
  see what works on it:         {loopguard} doctor --pid PID
  run the demo server yourself: {} -m uvicorn app:app --app-dir {APP}
  read what it does wrong:      {APP}/app.py",
        venv.python().display()
    );
}
