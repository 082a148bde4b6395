//! Tells tracers where a server's requests begin and end, and when a thread runs a request's code.
//!
//! Five USDT probes of the provider `loopguard`; any tracer that reads `.note.stapsdt` can use them:
//!
//! | probe | arguments |
//! |---|---|
//! | `request__start` | id, method and its length, path and its length, request id and its length |
//! | `request__route` | id, route template and its length |
//! | `request__enter` | id: this thread starts running this request's code |
//! | `request__exit` | id: it stops (suspended at an await) |
//! | `request__end` | id, status |
//!
//! All arguments are 64 bits wide. Strings are bytes, not ended by a zero, and valid only while the probe fires. As long
//! as no tracer is attached a probe is a call of a function that does nothing.
//!
//! A request is told in this order: [`start`] once; [`route`] when it is known; [`enter`] and [`exit`] around every
//! stretch of its code, in pairs on one thread; [`end`] once. The id is the server's own, unique among the requests
//! that are open in this process; [`next_id`] gives one. With the feature `tower` a layer does all of it.
//!
//! On other systems than Linux on x86_64 or aarch64 the functions are there and do nothing.

#![no_std]
#![deny(missing_docs)]

#[cfg(test)]
extern crate std;

#[macro_use]
mod site;
#[cfg(feature = "tower")]
pub mod tower;

use core::sync::atomic::{AtomicU64, Ordering};

/// The status for [`end`] of a request that got no response: its client went away, or its code panicked.
pub const NO_RESPONSE: u64 = 0;

/// A request begins. `path` is the path without the query; `request_id` is what its client or a proxy calls it (the
/// `x-request-id` header, or else the whole `traceparent`), empty if nobody does.
#[inline(never)]
pub fn start(id: u64, method: &[u8], path: &[u8], request_id: &[u8]) {
    site!(
        "request__start",
        "8@{id} 8@{method} 8@{method_length} 8@{path} 8@{path_length} 8@{name} 8@{name_length}",
        id = id,
        method = method.as_ptr(),
        method_length = method.len(),
        path = path.as_ptr(),
        path_length = path.len(),
        name = request_id.as_ptr(),
        name_length = request_id.len(),
    );
    #[cfg(test)]
    fired::note(std::format!("start {} {} {}", method.escape_ascii(), path.escape_ascii(), request_id.escape_ascii()));
}

/// The request's route template is known, `/items/{id}` for example.
#[inline(never)]
pub fn route(id: u64, route: &[u8]) {
    site!(
        "request__route",
        "8@{id} 8@{route} 8@{route_length}",
        id = id,
        route = route.as_ptr(),
        route_length = route.len(),
    );
    #[cfg(test)]
    fired::note(std::format!("route {}", route.escape_ascii()));
}

/// This thread starts running the request's code.
#[inline(never)]
pub fn enter(id: u64) {
    site!("request__enter", "8@{id}", id = id);
    #[cfg(test)]
    fired::note("enter".into());
}

/// This thread stops running the request's code: it is suspended at an await, or done.
#[inline(never)]
pub fn exit(id: u64) {
    site!("request__exit", "8@{id}", id = id);
    #[cfg(test)]
    fired::note("exit".into());
}

/// The request is over. `status` is that of its HTTP response, or [`NO_RESPONSE`].
#[inline(never)]
pub fn end(id: u64, status: u64) {
    site!("request__end", "8@{id} 8@{status}", id = id, status = status);
    #[cfg(test)]
    fired::note(std::format!("end {status}"));
}

/// Whether a tracer uses any of the probes now, so that it is worth while to find out what to tell. It reads five words
/// of code. Who tells only a part because of this is understood as if the tracer had come at that moment.
pub fn is_traced() -> bool {
    /// The labels are in these functions, so they must be there.
    #[used]
    static LABELLED: (Start, Route, Mark, Mark, End) = (start, route, enter, exit, end);
    type Start = fn(u64, &[u8], &[u8], &[u8]);
    type Route = fn(u64, &[u8]);
    type Mark = fn(u64);
    type End = fn(u64, u64);
    #[cfg(all(test, feature = "tower"))]
    if fired::is_heard() {
        return true;
    }
    is_patched!("request__start")
        || is_patched!("request__enter")
        || is_patched!("request__exit")
        || is_patched!("request__route")
        || is_patched!("request__end")
}

/// An id that no other request of this process has. Below 2^53, so that it survives JSON.
pub fn next_id() -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(1);
    /// An executable and the libraries it loads may each hold a copy of this crate, and of its counter: the page it
    /// lies on keeps their numbers apart.
    const PAGE_BITS: u32 = 20;
    const COUNT_BITS: u32 = 53 - PAGE_BITS;
    let page = (&raw const COUNT as u64 >> 12) & ((1 << PAGE_BITS) - 1);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    ((page << COUNT_BITS) + count) & ((1 << 53) - 1)
}

/// What the probes of the current thread have told: for tests, which have no tracer.
#[cfg(test)]
mod fired {
    use std::{cell::RefCell, string::String, vec::Vec};

    std::thread_local! {
        static TOLD: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
        #[cfg(feature = "tower")]
        static HEARD: core::cell::Cell<bool> = const { core::cell::Cell::new(true) };
    }

    /// As if a tracer had come, or gone.
    #[cfg(feature = "tower")]
    pub fn listen(listens: bool) {
        HEARD.set(listens);
    }

    #[cfg(feature = "tower")]
    pub fn is_heard() -> bool {
        HEARD.get()
    }

    pub fn note(what: String) {
        TOLD.with_borrow_mut(|told| told.push(what));
    }

    #[cfg(feature = "tower")]
    pub fn take() -> Vec<String> {
        TOLD.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_traces_the_tests() {
        #[cfg(feature = "tower")]
        fired::listen(false);
        assert!(!is_traced());
    }

    #[test]
    fn ids_differ_and_survive_json() {
        let ids: std::collections::BTreeSet<u64> = (0..1000).map(|_| next_id()).collect();
        assert_eq!(ids.len(), 1000);
        assert!(ids.iter().all(|id| *id != 0 && *id < 1 << 53));
    }
}
