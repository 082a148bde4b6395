//! Turns the symbols around a task's functions into the name of the future that the task runs.
//!
//! With v0 mangling the type is in the name of the poll function itself. Legacy names leave type parameters out, but
//! for drop glue: the functions that free a task call it, and its name holds the type in full.

/// Where a task's future stands in the names of drop glue and poll functions.
const HOLDERS: [&str; 4] =
    ["::task::core::Cell<", "::task::core::CoreStage<", "::task::core::Stage<", "::task::raw::poll::<"];
const MAX_NAME: usize = 400;

/// The future's type by the demangled names of a task's own functions and those they call; `None` if they do not say
/// or disagree.
pub fn future(names: &[String]) -> Option<String> {
    let mut found: Option<&str> = None;
    for name in names {
        let Some(future) = HOLDERS.iter().find_map(|holder| first_parameter(name, holder)) else { continue };
        match found {
            Some(known) if known != future => return None,
            _ => found = Some(future),
        }
    }
    found.map(shorten)
}

/// The first type parameter behind `holder` in `name`.
fn first_parameter<'a>(name: &'a str, holder: &str) -> Option<&'a str> {
    let start = name.find(holder)? + holder.len();
    let rest = &name[start..];
    let mut depth = 0;
    for (at, char) in rest.char_indices() {
        match char {
            '<' | '(' | '[' => depth += 1,
            // The arrow of a function type is no bracket.
            '>' if rest[..at].ends_with('-') => {}
            '>' | ')' | ']' if depth == 0 => return Some(&rest[..at]),
            '>' | ')' | ']' => depth -= 1,
            ',' if depth == 0 => return Some(&rest[..at]),
            _ => {}
        }
    }
    None
}

/// `app::work::{{closure}}` is what `async fn work` became; the compiler's wrapping says nothing to a reader.
fn shorten(future: &str) -> String {
    let mut name = future.trim();
    for ending in ["::{{closure}}", "::{closure#0}"] {
        while let Some(shorter) = name.strip_suffix(ending) {
            name = shorter;
        }
    }
    name.chars().take(MAX_NAME).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(names: &[&str], expected: Option<&str>) {
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        assert_eq!(future(&names).as_deref(), expected);
    }

    #[test]
    fn drop_glue_says_what_is_dropped() {
        check(
            &[
                "tokio::runtime::task::raw::poll",
                "core::ptr::drop_in_place<alloc::boxed::Box<tokio::runtime::task::core::Cell<axum::serve::handle_connection<tokio::net::tcp::listener::TcpListener,axum::routing::Router>::{{closure}}::{{closure}},alloc::sync::Arc<tokio::runtime::scheduler::multi_thread::handle::Handle>>>>",
                "core::ptr::drop_in_place<tokio::runtime::task::core::CoreStage<axum::serve::handle_connection<tokio::net::tcp::listener::TcpListener,axum::routing::Router>::{{closure}}::{{closure}}>>",
            ],
            Some("axum::serve::handle_connection<tokio::net::tcp::listener::TcpListener,axum::routing::Router>"),
        );
        check(
            &["core::ptr::drop_in_place<tokio::runtime::task::core::Stage<app::background::{{closure}}>>"],
            Some("app::background"),
        );
    }

    #[test]
    fn v0_names_say_it_themselves() {
        check(
            &[
                "tokio::runtime::task::raw::poll::<app::background::{closure#0}, alloc::sync::Arc<tokio::runtime::scheduler::current_thread::Handle>>",
            ],
            Some("app::background"),
        );
        check(
            &[
                "tokio::runtime::task::raw::poll::<core::pin::Pin<alloc::boxed::Box<dyn core::future::future::Future<Output = ()> + core::marker::Send>>, S>",
            ],
            Some(
                "core::pin::Pin<alloc::boxed::Box<dyn core::future::future::Future<Output = ()> + core::marker::Send>>",
            ),
        );
        check(&["tokio::runtime::task::raw::poll::<app::Wrap<fn(u8) -> u8>, S>"], Some("app::Wrap<fn(u8) -> u8>"));
    }

    #[test]
    fn no_name_is_better_than_a_wrong_one() {
        check(&["tokio::runtime::task::raw::poll", "core::panicking::panic"], None);
        check(
            &[
                "core::ptr::drop_in_place<tokio::runtime::task::core::Stage<app::a::{{closure}}>>",
                "core::ptr::drop_in_place<tokio::runtime::task::core::Stage<app::b::{{closure}}>>",
            ],
            None,
        );
        check(&["x::task::core::Stage<app::a", ""], None);
    }
}
