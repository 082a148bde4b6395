//! Tells whose code a native function is: the user's, a library's, or the language's own.

use crate::core::event::Origin;

/// The file a function is in.
#[derive(Clone, Copy, Debug)]
pub struct Module<'a> {
    /// As the target names it.
    pub path: &'a str,
    /// What the process was started from.
    pub is_executable: bool,
}

impl Module<'_> {
    /// Whether it is CPython itself. Modules that come in files of their own are not in it.
    pub fn is_interpreter(&self) -> bool {
        is_interpreter(file_name(self.path))
    }

    /// Whether all functions in the file are the language's own, or the event loop's.
    pub fn is_runtime(&self) -> bool {
        by_module(self.path) == Some(Origin::Runtime)
    }
}

/// Crates that are the language or the event loop.
const RUNTIME_CRATES: [&str; 9] = [
    "std",
    "core",
    "alloc",
    "compiler_builtins",
    "std_detect",
    "panic_unwind",
    "rustc_std_workspace_core",
    "tokio",
    "mio",
];
/// Libraries that are the C language's own.
const RUNTIME_LIBRARIES: [&str; 10] =
    ["libc.", "libc-", "ld-linux", "ld-musl", "libpthread", "libm.", "libdl.", "librt.", "libgcc_s", "libstdc++"];
const SYSTEM_FOLDERS: [&str; 6] = ["/lib/", "/lib64/", "/usr/lib/", "/usr/lib64/", "/usr/libexec/", "/usr/local/lib/"];

/// `function` when its name is known, `file` when its source is.
pub fn origin(module: &Module, function: Option<&str>, file: Option<&str>) -> Origin {
    if let Some(origin) = by_module(module.path) {
        return origin;
    }
    if let Some(origin) = file.and_then(by_source) {
        return origin;
    }
    let Some(function) = function else { return Origin::User };
    if is_start_up(function) {
        return Origin::Runtime;
    }
    let Some(name) = crate_of(function) else { return Origin::User };
    if RUNTIME_CRATES.contains(&name) {
        Origin::Runtime
    } else if file.is_some() || is_own_crate(name, module) {
        // The source lies with neither the toolchain's nor the registry's.
        Origin::User
    } else {
        Origin::Library
    }
}

/// What the place of the file alone tells.
fn by_module(path: &str) -> Option<Origin> {
    let name = file_name(path);
    if path == "[vdso]" || is_interpreter(name) {
        return Some(Origin::Runtime);
    }
    if RUNTIME_LIBRARIES.iter().any(|library| name.starts_with(library)) || path.contains("/lib-dynload/") {
        return Some(Origin::Runtime);
    }
    if path.contains("/site-packages/") || path.contains("/dist-packages/") {
        return Some(if path.contains("/uvloop/") { Origin::Runtime } else { Origin::Library });
    }
    SYSTEM_FOLDERS.iter().any(|folder| path.starts_with(folder)).then_some(Origin::Library)
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// `libpython3.12.so.1.0` or `python3.12`, and no program that only begins with that word.
fn is_interpreter(name: &str) -> bool {
    let is_python = |rest: &str| rest.chars().all(|char| char.is_ascii_digit() || char == '.');
    name.starts_with("libpython") || name.strip_prefix("python").is_some_and(is_python)
}

/// Where Rust's sources lie: the toolchain's are remapped to `/rustc/HASH`, cargo's are in its own folders.
fn by_source(file: &str) -> Option<Origin> {
    if file.starts_with("/rustc/") || file.contains("/rustlib/src/rust/library/") {
        return Some(Origin::Runtime);
    }
    let mut parts = file.split('/');
    while let Some(part) = parts.next() {
        let package = match (part, parts.clone().next()) {
            // registry/src/INDEX/PACKAGE-VERSION
            ("registry", Some("src")) => parts.clone().nth(2),
            // git/checkouts/PACKAGE-HASH
            ("git", Some("checkouts")) => parts.clone().nth(1),
            ("vendor", Some(package)) => Some(package),
            _ => continue,
        };
        let name = package.and_then(|package| package.rsplit_once('-')).map(|(name, _)| name).or(package);
        let is_runtime = name.is_some_and(|name| RUNTIME_CRATES.contains(&name));
        return Some(if is_runtime { Origin::Runtime } else { Origin::Library });
    }
    None
}

/// `app` of `app::handler` and of `<app::Store as core::clone::Clone>::clone`; `None`: no path of Rust or C++.
fn crate_of(function: &str) -> Option<&str> {
    let name = function.trim_start_matches(['<', '&', '*', '(', '[']);
    let name = name.strip_prefix("dyn ").or(name.strip_prefix("mut ")).unwrap_or(name);
    let end = name.find("::")?;
    let name = &name[..end];
    name.chars().all(|char| char.is_alphanumeric() || char == '_').then_some(name)
}

fn is_own_crate(name: &str, module: &Module) -> bool {
    let file = file_name(module.path);
    module.is_executable && file.replace('-', "_") == name
}

/// What runs before `main` and between it and the language.
fn is_start_up(function: &str) -> bool {
    matches!(function, "_start" | "__libc_start_main" | "main" | "__rust_begin_short_backtrace")
        || function.starts_with("__rust")
        || function.starts_with("rust_")
}

#[cfg(test)]
mod tests {
    use super::*;
    use Origin::{Library, Runtime, User};

    #[test]
    fn whose_code_a_function_is() {
        let crates = "/home/dev/.cargo/registry/src/index-0123456789abcdef";
        let in_crates = |rest: &str| Some(format!("{crates}/{rest}"));
        for (path, function, file, expected) in [
            ("/srv/shop", Some("shop::handler::{{closure}}"), Some("/build/shop/src/main.rs".to_owned()), User),
            ("/srv/shop", Some("shop::handler::{{closure}}"), None, User),
            ("/srv/shop", Some("<shop::Store as core::clone::Clone>::clone"), None, User),
            ("/srv/shop", Some("serde_json::de::from_str"), None, Library),
            ("/srv/shop", Some("serde_json::de::from_str"), in_crates("serde_json-1.0.140/src/de.rs"), Library),
            ("/srv/shop", Some("tokio::runtime::task::raw::poll"), in_crates("tokio-1.52.0/src/x.rs"), Runtime),
            ("/srv/shop", Some("tokio::runtime::task::raw::poll"), None, Runtime),
            ("/srv/shop", Some("h::f"), in_crates("tokio-util-0.7.1/src/x.rs"), Library),
            ("/srv/shop", Some("std::thread::sleep"), Some("/rustc/abc/library/std/src/thread.rs".to_owned()), Runtime),
            ("/srv/shop", Some("core::ops::function::FnOnce::call_once"), None, Runtime),
            ("/srv/shop", Some("main"), None, Runtime),
            ("/srv/shop", Some("handle_request"), None, User),
            ("/srv/shop", None, None, User),
            ("/usr/lib/x86_64-linux-gnu/libc.so.6", Some("clock_nanosleep"), None, Runtime),
            ("/usr/lib/x86_64-linux-gnu/libsqlite3.so.0.8.6", None, None, Library),
            ("/opt/py/lib/libpython3.12.so.1.0", Some("time_sleep"), None, Runtime),
            ("/usr/bin/python3.14", None, None, Runtime),
            ("/srv/python-shop", Some("f"), None, User),
            ("/v/lib/python3.12/lib-dynload/_hashlib.cpython-312.so", Some("EVP_hash"), None, Runtime),
            ("/v/lib/python3.12/site-packages/uvloop/loop.so", None, None, Runtime),
            ("/v/lib/python3.12/site-packages/numpy/_core/_multiarray_umath.so", None, None, Library),
            ("/srv/shop/fast.cpython-312.so", Some("crunch"), None, User),
            ("[vdso]", Some("__vdso_clock_gettime"), None, Runtime),
        ] {
            let module = Module { path, is_executable: path == "/srv/shop" };
            assert_eq!(origin(&module, function, file.as_deref()), expected, "{path} {function:?} {file:?}");
        }
    }
}
