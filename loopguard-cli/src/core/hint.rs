//! Turns what stood in a block's stack into one line that says what to write instead.
//!
//! The table is data. A rule matches a call that stands between the user's line and the innermost frame, or the system
//! call most of the time went to: never one that was not in the stack. Where the code could not run, what it would have
//! done is not the point.

use super::event::{Frame, FrameKind};
use super::incident::{Blame, Split, Verdict, WaitTotal, user_line_index};

/// How a blocking call shows.
enum Mark {
    /// A Python function: how its file's path ends, or contains where it ends with `/`, and its name. `*`: any name.
    Python(&'static str, &'static str),
    /// A native function whose name begins so, or contains it after `::`.
    Native(&'static str),
    /// Any native function of a library whose file name begins so.
    Library(&'static str),
    /// The system call that most of the block was spent in, right below the user's line.
    Syscall(&'static str),
}

use Mark::{Library, Native, Python, Syscall};

struct Rule {
    marks: &'static [Mark],
    hint: &'static str,
}

const GIL: &str = "another thread held the GIL: run CPU-bound Python code in a process pool instead of in threads";
const HOST: &str = "no processor was free: too many programs run here, or the container is at its CPU limit";

/// The first rule that matches a frame counts.
const RULES: &[Rule] = &[
    Rule {
        marks: &[Native("time_sleep"), Native("pysleep")],
        hint: "time.sleep stops the whole loop: use `await asyncio.sleep(...)`",
    },
    Rule {
        marks: &[Native("std::thread::sleep"), Native("std::thread::functions::sleep")],
        hint: "std::thread::sleep stops the worker: use `tokio::time::sleep(...).await`",
    },
    Rule {
        marks: &[Python("/requests/", "*")],
        hint: "requests is synchronous: use httpx.AsyncClient or aiohttp, or `await asyncio.to_thread(...)`",
    },
    Rule {
        marks: &[Python("/httpx/_client.py", "Client.*"), Python("/httpx/_api.py", "*")],
        hint: "this is httpx's synchronous client: use `httpx.AsyncClient`",
    },
    Rule {
        marks: &[Python("/urllib/request.py", "*"), Python("/urllib3/", "*"), Python("/http/client.py", "*")],
        hint: "this HTTP client is synchronous: use httpx.AsyncClient or aiohttp, or `await asyncio.to_thread(...)`",
    },
    Rule {
        marks: &[Native("reqwest::blocking"), Native("ureq::")],
        hint: "this HTTP client is synchronous: use reqwest's asynchronous Client, or `tokio::task::spawn_blocking`",
    },
    Rule {
        marks: &[Python("/boto3/", "*"), Python("/botocore/", "*")],
        hint: "boto3 is synchronous: use aioboto3 or aiobotocore, or `await asyncio.to_thread(...)`",
    },
    Rule {
        marks: &[Python("/subprocess.py", "*")],
        hint: "subprocess waits for the child: use `await asyncio.create_subprocess_exec(...)`",
    },
    Rule {
        marks: &[Native("std::process::Command"), Native("std::process::Child::wait")],
        hint: "std::process waits for the child: use `tokio::process::Command`",
    },
    Rule {
        marks: &[Python("/socket.py", "getaddrinfo"), Native("getaddrinfo"), Native("gethostbyname")],
        hint: "this resolves a name synchronously: use `await loop.getaddrinfo(...)`, or an asynchronous client",
    },
    Rule {
        marks: &[Python("/socket.py", "create_connection")],
        hint: "this connects synchronously: use `await asyncio.open_connection(...)`",
    },
    Rule {
        marks: &[
            Python("/psycopg2/", "*"),
            Python("/psycopg/connection.py", "*"),
            Python("/psycopg/cursor.py", "*"),
            Library("_psycopg."),
        ],
        hint: "this PostgreSQL driver is synchronous: use psycopg's AsyncConnection or asyncpg",
    },
    Rule {
        marks: &[Python("/pymysql/", "*"), Python("/MySQLdb/", "*"), Library("_mysql.")],
        hint: "this MySQL driver is synchronous: use asyncmy or aiomysql",
    },
    Rule {
        marks: &[Python("/sqlite3/", "*"), Native("sqlite3_step"), Native("pysqlite_"), Library("_sqlite3.")],
        hint: "sqlite3 is synchronous: use aiosqlite, or `await asyncio.to_thread(...)`",
    },
    Rule { marks: &[Python("/pymongo/asynchronous/", "*")], hint: "" },
    Rule {
        marks: &[Python("/pymongo/", "*")],
        hint: "this MongoDB driver is synchronous: use pymongo's AsyncMongoClient",
    },
    // Asynchronous already: what blocks is not the driver's fault.
    Rule { marks: &[Python("/redis/asyncio/", "*")], hint: "" },
    Rule {
        marks: &[Python("/redis/", "*"), Python("/pymemcache/", "*"), Python("/memcache.py", "*")],
        hint: "this cache client is synchronous: use redis.asyncio or aiomcache",
    },
    Rule { marks: &[Python("/sqlalchemy/ext/asyncio/", "*")], hint: "" },
    Rule {
        marks: &[Python("/sqlalchemy/", "*"), Python("/django/db/", "*")],
        hint: "this database session is synchronous: use sqlalchemy.ext.asyncio or a worker thread",
    },
    Rule {
        marks: &[
            Python("/passlib/", "*"),
            Python("/bcrypt/", "*"),
            Python("/argon2/", "*"),
            Python("/werkzeug/security.py", "*"),
            Native("PKCS5_PBKDF2_HMAC"),
            Native("EVP_PBE_scrypt"),
            Native("argon2"),
            Native("bcrypt"),
            Library("_bcrypt."),
        ],
        hint: "hashing a password takes long by design: use `await asyncio.to_thread(...)` or a process pool",
    },
    Rule {
        marks: &[
            Python("/json/__init__.py", "*"),
            Python("/json/encoder.py", "*"),
            Python("/json/decoder.py", "*"),
            Python("/fastapi/encoders.py", "*"),
            Library("orjson."),
            Library("_json."),
        ],
        hint: "a big JSON document is converted on the loop: make it smaller, stream it, or use a worker thread",
    },
    Rule {
        marks: &[Native("serde_json::")],
        hint: "a big JSON document is converted on the worker: make it smaller, or use `tokio::task::spawn_blocking`",
    },
    Rule {
        marks: &[
            Python("/tiktoken/", "*"),
            Python("/transformers/tokenization", "*"),
            Python("/tokenizers/", "*"),
            Library("tokenizers."),
            Library("_tiktoken."),
        ],
        hint: "tokenizing is CPU work: use `await asyncio.to_thread(...)` or a process pool",
    },
    Rule {
        marks: &[Python("/pandas/", "*"), Python("/numpy/", "*"), Python("/PIL/", "*"), Python("/sklearn/", "*")],
        hint: "this is CPU work: use `await asyncio.to_thread(...)` or a process pool",
    },
    Rule {
        marks: &[
            Python("/pathlib.py", "*"),
            Python("/pathlib/__init__.py", "*"),
            Python("/pathlib/_local.py", "*"),
            Python("/shutil.py", "*"),
            Python("/tempfile.py", "*"),
        ],
        hint: "file access blocks the loop: use `await asyncio.to_thread(...)` or anyio's Path",
    },
    Rule {
        marks: &[Native("std::fs::"), Native("std::sys::fs::")],
        hint: "std::fs blocks the worker: use `tokio::fs`, or `tokio::task::spawn_blocking`",
    },
    Rule {
        marks: &[
            Native("std::sync::mutex::Mutex"),
            Native("std::sync::poison::mutex::Mutex"),
            Native("std::sys::sync::mutex::"),
        ],
        hint: "a std Mutex held elsewhere stops the worker: hold it shorter, or use `tokio::sync::Mutex`",
    },
    Rule {
        marks: &[Python("/threading.py", "Thread.join"), Python("/concurrent/futures/_base.py", "Future.result")],
        hint: "this waits for a thread: await it, with `asyncio.wrap_future` or `asyncio.to_thread`",
    },
    Rule {
        marks: &[Python("/threading.py", "Thread.start")],
        hint: "a thread was started, which waits until it runs: others hold the GIL or the processors",
    },
    Rule {
        marks: &[Python("/threading.py", "*"), Python("/queue.py", "*")],
        hint: "this waits for another thread: use asyncio's Lock, Event or Queue, or wait in a worker thread",
    },
    Rule {
        marks: &[Python("<frozen importlib._bootstrap>", "*")],
        hint: "a module is imported on the loop: import it when the program starts",
    },
    Rule {
        marks: &[Native("gc_collect_main")],
        hint: "the garbage collector looks at all objects: use `gc.freeze()` after the start, or keep fewer objects",
    },
    Rule {
        marks: &[Syscall("clock_nanosleep"), Syscall("nanosleep")],
        hint: "a sleep stops the whole loop: use the loop's own (`await asyncio.sleep(...)`, `tokio::time::sleep`)",
    },
    Rule {
        marks: &[
            Syscall("fsync"),
            Syscall("fdatasync"),
            Syscall("sync_file_range"),
            Syscall("openat"),
            Syscall("open"),
            Syscall("pread64"),
            Syscall("pwrite64"),
            Syscall("unlink"),
            Syscall("rename"),
        ],
        hint: "file access blocks the loop: use a worker thread (`asyncio.to_thread`, `tokio::fs`)",
    },
    Rule {
        marks: &[Syscall("connect"), Syscall("recvfrom"), Syscall("recvmsg"), Syscall("accept4")],
        hint: "this socket blocks: use an asynchronous client, or a worker thread",
    },
    Rule {
        marks: &[Syscall("wait4"), Syscall("waitid")],
        hint: "this waits for a child process: use asyncio's or tokio's own process functions",
    },
];

/// What to write instead, if the call that blocked is a well-known one.
pub fn hint(blame: &Blame, split: &Split, waits: &[WaitTotal]) -> Option<&'static str> {
    match split.verdict() {
        Verdict::Gil => return Some(GIL),
        Verdict::Host => return Some(HOST),
        Verdict::Code | Verdict::Unknown => {}
    }
    let frames = &blame.stack.frames;
    let user = user_line_index(&blame.stack);
    // What the user's line called; the call nearest to the line says most about what to change.
    let called = &frames[..user.unwrap_or(frames.len())];
    let by_frame = called.iter().rev().find_map(|frame| rule(|mark| mark.is_frame(frame)));
    let by_wait = || {
        let longest = waits.first()?;
        // Right below the user's line: a library in between might have its reasons.
        let is_direct = user.is_some() && called.iter().all(|frame| frame.kind == FrameKind::Native);
        let is_most = longest.ns.saturating_mul(2) > split.total_ns();
        (is_direct && is_most).then(|| rule(|mark| mark.is_syscall(&longest.syscall)))?
    };
    by_frame.or_else(by_wait).filter(|hint| !hint.is_empty())
}

fn rule(matches: impl Fn(&Mark) -> bool) -> Option<&'static str> {
    RULES.iter().find(|rule| rule.marks.iter().any(&matches)).map(|rule| rule.hint)
}

impl Mark {
    fn is_frame(&self, frame: &Frame) -> bool {
        match (self, frame.kind) {
            (Python(file, function), FrameKind::Python) => {
                let path = frame.file.as_deref().unwrap_or_default();
                let in_file =
                    if file.ends_with('/') || !file.contains('.') { path.contains(file) } else { path.ends_with(file) };
                in_file && is_function(function, &frame.function)
            }
            (Native(name), FrameKind::Native) => {
                let function = frame.function.trim_start_matches('<');
                function.starts_with(name) || function.match_indices(name).any(|(at, _)| function[..at].ends_with(' '))
            }
            (Library(name), FrameKind::Native) => {
                let file = frame.module.as_deref().unwrap_or_default();
                file.rsplit('/').next().unwrap_or_default().starts_with(name)
            }
            _ => false,
        }
    }

    fn is_syscall(&self, syscall: &str) -> bool {
        matches!(self, Syscall(name) if *name == syscall)
    }
}

/// `*` stands for any end of the name.
fn is_function(pattern: &str, function: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => function.starts_with(start),
        None => pattern == function,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::event::{Origin, Owner, Stack};
    use super::super::incident::Attribution;
    use super::*;

    fn frame(text: &str) -> Arc<Frame> {
        let (function, file) = text.split_once('@').unwrap_or((text, ""));
        let is_native = !file.ends_with(".py") && !file.starts_with("<frozen");
        let origin = match file {
            "/srv/app.py" | "app" => Origin::User,
            _ => Origin::Library,
        };
        Arc::new(Frame {
            kind: if is_native { FrameKind::Native } else { FrameKind::Python },
            origin,
            function: function.into(),
            file: (!is_native).then(|| file.into()),
            line: None,
            module: is_native.then(|| file.into()),
        })
    }

    /// A stack, innermost first, `function@file` each, and a wait of all the time.
    fn hint_of(stack: &str, syscall: Option<&str>) -> Option<&'static str> {
        hint_in(stack, syscall, Split { waiting_ns: 100, ..Split::default() })
    }

    fn hint_in(stack: &str, syscall: Option<&str>, split: Split) -> Option<&'static str> {
        let frames = stack.split(" < ").map(frame).collect();
        let blame = Blame {
            owner: Owner::NoRequest { task: None },
            attribution: Attribution::Exact,
            stack: Arc::new(Stack { frames, incomplete: None }),
        };
        let waits: Vec<WaitTotal> =
            syscall.iter().map(|name| WaitTotal { syscall: (*name).to_owned(), on: None, ns: 90 }).collect();
        hint(&blame, &split, &waits)
    }

    #[track_caller]
    fn check(stack: &str, syscall: Option<&str>, expected: Option<&str>) {
        let found = hint_of(stack, syscall);
        match expected {
            Some(part) => assert!(found.is_some_and(|hint| hint.contains(part)), "{stack}: {found:?}"),
            None => assert_eq!(found, None, "{stack}"),
        }
    }

    #[test]
    fn well_known_calls_have_a_hint() {
        let user = "handler@/srv/app.py";
        for (called, part) in [
            ("Session.get@/venv/site-packages/requests/sessions.py", "httpx.AsyncClient"),
            ("urlopen@/usr/lib/python3.12/urllib/request.py", "aiohttp"),
            ("run@/usr/lib/python3.12/subprocess.py", "create_subprocess_exec"),
            ("getaddrinfo@/usr/lib/python3.12/socket.py", "loop.getaddrinfo"),
            ("Cursor.execute@/venv/site-packages/psycopg/cursor.py", "asyncpg"),
            ("dumps@/usr/lib/python3.12/json/__init__.py", "JSON"),
            ("hashpw@/venv/site-packages/passlib/handlers/bcrypt.py", "password"),
            ("Encoding.encode@/venv/site-packages/tiktoken/core.py", "tokenizing"),
            ("Path.read_text@/usr/lib/python3.12/pathlib.py", "file access"),
            ("Client.get@/venv/site-packages/httpx/_client.py", "httpx.AsyncClient"),
            ("Thread.join@/usr/lib/python3.12/threading.py", "waits for a thread"),
            ("Thread.start@/usr/lib/python3.12/threading.py", "until it runs"),
            ("Redis.get@/venv/site-packages/redis/client.py", "redis.asyncio"),
            ("_find_and_load@<frozen importlib._bootstrap>", "when the program starts"),
            ("Session.execute@/venv/site-packages/sqlalchemy/orm/session.py", "sqlalchemy.ext.asyncio"),
        ] {
            check(&format!("inner@/usr/lib/python3.12/x.py < {called} < {user}"), None, Some(part));
        }
        for (called, part) in [
            ("std::thread::sleep@app.so", "tokio::time::sleep"),
            ("std::fs::read_to_string@app.so", "tokio::fs"),
            ("<std::sync::poison::mutex::Mutex<T>>::lock@app.so", "tokio::sync::Mutex"),
            ("reqwest::blocking::get@app.so", "spawn_blocking"),
            ("time_sleep@libpython3.12.so", "asyncio.sleep"),
            ("PKCS5_PBKDF2_HMAC@libcrypto.so.3", "password"),
            ("gc_collect_main@libpython3.12.so", "gc.freeze"),
        ] {
            check(&format!("inner@libc.so.6 < {called} < server::handler@app"), None, Some(part));
        }
    }

    #[test]
    fn the_call_nearest_to_the_users_line_counts() {
        check(
            "read@/usr/lib/python3.12/socket.py < urlopen@/v/site-packages/urllib3/connectionpool.py < \
             get@/v/site-packages/requests/api.py < handler@/srv/app.py",
            None,
            Some("requests is synchronous"),
        );
    }

    #[test]
    fn a_system_call_counts_right_below_the_users_line_only() {
        check("handler@/srv/app.py", Some("clock_nanosleep"), Some("asyncio.sleep"));
        check("handler@/srv/app.py", Some("fsync"), Some("file access"));
        check("__recv@libc.so.6 < handler@/srv/app.py", Some("recvfrom"), Some("socket blocks"));
        check("wait@/v/site-packages/lib/x.py < handler@/srv/app.py", Some("clock_nanosleep"), None);
        check("inner@/v/site-packages/lib/x.py", Some("clock_nanosleep"), None);
        check("handler@/srv/app.py", Some("futex"), None);
    }

    #[test]
    fn code_that_could_not_run_is_not_told_what_to_do() {
        let joins = "Thread.join@/usr/lib/python3.12/threading.py < handler@/srv/app.py";
        let split = |gil_ns, run_queue_ns| Split { on_cpu_ns: 10, gil_ns, run_queue_ns, ..Split::default() };
        assert_eq!(hint_in(joins, Some("futex"), split(20, 15)), Some(GIL));
        assert_eq!(hint_in(joins, Some("futex"), split(15, 20)), Some(HOST));
        assert!(hint_in(joins, Some("futex"), split(5, 5)).is_some_and(|hint| hint.contains("waits for a thread")));
    }

    #[test]
    fn nothing_is_said_of_what_was_not_in_the_stack() {
        check("handler@/srv/app.py", None, None);
        check("compute@/v/site-packages/lib/x.py < handler@/srv/app.py", None, None);
        // Above the user's line: it called the user's code, it is not what blocks.
        check("handler@/srv/app.py < run@/usr/lib/python3.12/subprocess.py", None, None);
        // The user's own names mean nothing.
        check("sleep@/srv/app.py < handler@/srv/app.py", None, None);
        // An asynchronous driver is the right choice already.
        check("get@/v/site-packages/redis/asyncio/client.py < handler@/srv/app.py", None, None);
    }

    #[test]
    fn every_rule_is_reached_before_another_takes_it() {
        for (index, rule) in RULES.iter().enumerate() {
            assert!(!rule.marks.is_empty() && rule.hint.len() < 120, "rule {index}");
            assert!(!rule.hint.contains('\n'), "one line: {}", rule.hint);
        }
    }
}
