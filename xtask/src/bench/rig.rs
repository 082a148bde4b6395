//! What the benchmarks share: the server, loopguard watching it, and what the system says of both.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use xtask::workspace::{Workspace, cargo};

use crate::companion::{Companion, listens};
use crate::demo::build_loopguard;
use crate::pythons::{self, Python, Venv};
use crate::setup;
use crate::step::{self, say};
use crate::wheel::Wheel;

const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

pub struct Rig {
    pub loopguard: PathBuf,
    pub scripts: PathBuf,
    /// For logs and what the server writes.
    pub folder: PathBuf,
    workspace: Workspace,
    interpreter: Python,
    venv: Venv,
    /// With fastapi-loopguard; none where it does not install.
    pub in_process: Option<Venv>,
}

impl Rig {
    pub fn prepare() -> Result<Self> {
        let workspace = Workspace::locate()?;
        setup::run(&workspace)?;
        let loopguard = build_loopguard(&workspace)?;
        let (scripts, folder) = (workspace.root.join("bench"), workspace.target.join("bench"));
        fs::create_dir_all(&folder)?;
        for python in pythons::find().iter().rev() {
            let prepare = |name: &str, list: &str| Venv::prepare(python, folder.join(name), &scripts.join(list));
            let venv = match prepare("venv", "requirements.txt") {
                Ok(venv) => venv,
                Err(error) => {
                    say(&format!("not with Python {python}: {error:#}"));
                    continue;
                }
            };
            let in_process = prepare("venv-in-process", "requirements-in-process.txt");
            if let Err(error) = &in_process {
                say(&format!("going on without fastapi-loopguard: {error:#}"));
            }
            let interpreter = python.clone();
            return Ok(Self { loopguard, scripts, folder, workspace, interpreter, venv, in_process: in_process.ok() });
        }
        bail!("no Python here can run the benchmark's server: the lines above say why")
    }

    pub fn python(&self) -> PathBuf {
        self.venv.python()
    }

    pub fn script(&self, name: &str) -> Command {
        let mut command = Command::new(self.python());
        command.arg(self.scripts.join(name)).env("PYTHONDONTWRITEBYTECODE", "1").stdin(Stdio::null());
        command
    }

    /// Puts the Python package into the venv of the server.
    pub fn install_package(&self) -> Result<()> {
        Wheel::build(&self.workspace, &self.interpreter)?.install(&self.venv)
    }

    /// py-spy, in a venv of its own.
    pub fn py_spy(&self) -> Result<PathBuf> {
        let requirements = self.scripts.join("requirements-py-spy.txt");
        Ok(Venv::prepare(&self.interpreter, self.folder.join("venv-py-spy"), &requirements)?.program("py-spy"))
    }

    /// The app under uvicorn, once it answers.
    pub fn serve(&self, python: &Path, event_loop: &str, environment: &[(&str, &Path)]) -> Result<Server> {
        let slow_port = free_port()?;
        let slow = Companion::start(self.script("slow_server.py").arg(slow_port.to_string()))?;
        let (port, log) = (free_port()?, self.folder.join("server.log"));
        let output = File::create(&log)?;
        let mut uvicorn = on_cpu(0, python);
        uvicorn
            .args(["-m", "uvicorn", "app:app", "--log-level=warning", "--host=127.0.0.1", "--http=httptools"])
            .args([&format!("--port={port}"), &format!("--loop={event_loop}"), "--app-dir"])
            .arg(&self.scripts)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("BENCH_SLOW_PORT", slow_port.to_string())
            .env("BENCH_FOLDER", &self.folder)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let server = Server::start(&mut uvicorn, Some(slow), port, &log)?;
        let warmed = self.script("load.py").arg(format!("--port={port}")).arg("--warm-up").status()?;
        ensure!(warmed.success(), "the server does not answer");
        Ok(server)
    }

    /// An axum server with one worker, once it answers.
    pub fn serve_axum(&self, options: &[&str]) -> Result<Server> {
        let built = self.folder.join("build-axum-blocking.log");
        step::run("building axum-blocking", &mut self.cargo_build("axum-blocking", &["--release"]), &built)?;
        let (port, log) = (free_port()?, self.folder.join("server-axum.log"));
        let output = File::create(&log)?;
        let mut axum = on_cpu(0, &self.workspace.target.join("release/axum-blocking"));
        axum.args([&format!("--port={port}"), "--runtime=current-thread"])
            .args(options)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        Server::start(&mut axum, None, port, &log)
    }

    /// The server of `bench/axum` as `build` makes it, and its loads.
    pub fn build_tokio(&self, build: TokioBuild) -> Result<TokioPrograms> {
        let (profile, stripped) = match build {
            TokioBuild::Release => ("release", false),
            TokioBuild::Stripped => ("release", true),
            TokioBuild::FatLto => ("fat-lto", false),
            TokioBuild::FatLtoStripped => ("fat-lto", true),
            TokioBuild::FramePointers => ("release", false),
        };
        let mut folder = self.workspace.target.clone();
        let mut cargo = self.cargo_build("bench-axum", &["--profile", profile]);
        if matches!(build, TokioBuild::FramePointers) {
            folder = folder.join("frame-pointers");
            cargo.env("CARGO_TARGET_DIR", &folder);
            cargo.env("RUSTFLAGS", "-Cforce-frame-pointers=yes").env("CARGO_PROFILE_RELEASE_DEBUG", "2");
        }
        let log = self.folder.join("build-axum.log");
        step::run(&format!("building bench-axum, profile {profile}"), &mut cargo, &log)?;
        let program = |name: &str| folder.join(profile).join(name);
        let mut server = program("bench-axum");
        if stripped {
            let copy = self.folder.join("bench-axum-stripped");
            fs::copy(&server, &copy)?;
            ensure!(Command::new("strip").arg("--strip-all").arg(&copy).status()?.success(), "strip failed");
            server = copy;
        }
        Ok(TokioPrograms { server, load: program("bench-axum-load"), pace: program("bench-axum-pace") })
    }

    /// An example of loopguard's.
    pub fn build_example(&self, name: &str) -> Result<PathBuf> {
        let mut cargo = self.cargo_build("loopguard", &["--release", "--example", name]);
        let log = self.folder.join(format!("build-{name}.log"));
        step::run(&format!("building the example {name}"), &mut cargo, &log)?;
        Ok(self.workspace.target.join("release/examples").join(name))
    }

    fn cargo_build(&self, package: &str, what: &[&str]) -> Command {
        let mut cargo = cargo();
        cargo.args(["build", "--package", package]).args(what).current_dir(&self.workspace.root);
        cargo
    }

    /// loopguard, once it says that it watches a loop.
    pub fn attach(&self, pid: u32, options: &[&str]) -> Result<Watching> {
        let (events, messages) = (self.folder.join("events.jsonl"), self.folder.join("loopguard.log"));
        let mut command = on_cpu(1, &self.loopguard);
        command
            .args(["attach", "--pid", &pid.to_string(), "--format=jsonl", "--output"])
            .arg(&events)
            .args(options)
            .stdin(Stdio::null())
            .stderr(File::create(&messages)?);
        let mut process = Companion::start(&mut command)?;
        let started = Instant::now();
        while !fs::read_to_string(&messages)?.contains("watching process") {
            if process.ended().is_some() || started.elapsed() > PATIENCE {
                bail!("loopguard sees no loop:\n{}", step::tail(&messages));
            }
            thread::sleep(POLL);
        }
        Ok(Watching { process, events })
    }
}

#[derive(Clone, Copy)]
pub enum TokioBuild {
    Release,
    Stripped,
    FatLto,
    FatLtoStripped,
    /// With frame pointers and full debug information.
    FramePointers,
}

pub struct TokioPrograms {
    pub server: PathBuf,
    /// What blocks it.
    pub load: PathBuf,
    /// Harmless requests at a fixed rate.
    pub pace: PathBuf,
}

pub struct Server {
    pub process: Companion,
    _slow: Option<Companion>,
    pub port: u16,
}

impl Server {
    pub fn start(command: &mut Command, slow: Option<Companion>, port: u16, log: &Path) -> Result<Self> {
        let mut server = Self { process: Companion::start(command)?, _slow: slow, port };
        let started = Instant::now();
        while !listens(port) {
            if server.process.ended().is_some() || started.elapsed() > PATIENCE {
                bail!("the server did not start:\n{}", step::tail(log));
            }
            thread::sleep(POLL);
        }
        Ok(server)
    }
}

pub struct Watching {
    pub process: Companion,
    pub events: PathBuf,
}

impl Watching {
    /// Ends it as SIGTERM does and returns the summary.
    pub fn stop(self) -> Result<Value> {
        drop(self.process);
        let text = fs::read_to_string(&self.events)?;
        let last = text.lines().last().context("loopguard wrote nothing")?;
        Ok(serde_json::from_str(last)?)
    }
}

/// One CPU for what is measured and another for what measures, where there are two.
pub fn on_cpu(cpu: usize, program: &Path) -> Command {
    if thread::available_parallelism().is_ok_and(|cpus| cpus.get() < 2) {
        return Command::new(program);
    }
    let mut command = Command::new("taskset");
    command.args(["-c", &cpu.to_string()]).arg(program);
    command
}

/// CPU time of a process, all its threads.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let mut nanoseconds = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(thread?.path().join("schedstat"))?;
        nanoseconds += text.split(' ').next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(nanoseconds))
}

pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port on 127.0.0.1")?.local_addr()?.port())
}
