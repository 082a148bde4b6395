//! Prints what a probe costs while no tracer is attached: the time of a call, and of the same call of an empty function.
//!
//!     cargo run --release --package loopguard-emit --example cost

use std::{hint::black_box, time::Instant};

/// So few that many rounds are not interrupted, even on a busy machine.
const CALLS: u64 = 500_000;
const ROUNDS: usize = 400;

#[inline(never)]
fn nothing(id: u64) {
    black_box(id);
}

fn start(id: u64) {
    loopguard_emit::start(id, b"GET", b"/items/7", b"6f1c9b0e");
}

fn route(id: u64) {
    loopguard_emit::route(id, b"/items/{id}");
}

fn end(id: u64) {
    loopguard_emit::end(id, 200);
}

/// Nanoseconds a call, in the quarter of the rounds that was disturbed least.
fn measure(call: impl Fn(u64)) -> f64 {
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let began = Instant::now();
            (0..CALLS).for_each(|id| call(black_box(id)));
            began.elapsed().as_nanos() as f64 / CALLS as f64
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    rounds[ROUNDS / 4]
}

fn main() {
    let empty = measure(nothing);
    println!("empty function    {empty:.2} ns");
    let probes = [
        ("request__enter", measure(loopguard_emit::enter)),
        ("request__exit", measure(loopguard_emit::exit)),
        ("request__start", measure(start)),
        ("request__route", measure(route)),
        ("request__end", measure(end)),
    ];
    for (name, ns) in probes {
        println!("{name:16}  {ns:.2} ns, {:+.2} ns", ns - empty);
    }
}
