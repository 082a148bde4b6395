//! Finds the tables of functions that tokio keeps for each type of task, by their form alone.
//!
//! `tokio::runtime::task::raw::Vtable` (1.x) is seven functions (poll, schedule, dealloc, try_read_output,
//! drop_join_handle_slow, drop_abort_handle, shutdown), then the offsets of the task's trailer, scheduler and id from
//! its header. No symbols are needed, so this works in stripped binaries as well.

const FUNCTIONS: usize = 7;
const WORDS: usize = FUNCTIONS + 3;
/// A task header has at least four words (`task/core.rs`).
const SMALLEST_HEADER: u64 = 24;
const LARGEST_HEADER: u64 = 256;
const LARGEST_SCHEDULER: u64 = 64;
const LARGEST_TASK: u64 = 1 << 24;

/// The functions of one type of task, by address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Vtable {
    pub poll: u64,
    /// The same for all tasks of one kind of scheduler.
    pub schedule: u64,
    pub dealloc: u64,
    pub shutdown: u64,
    /// From a task's header to its id, in bytes.
    pub id_offset: u16,
}

/// The tables among `words`; `is_function` tells whether a function starts at an address.
pub fn scan(words: &[u64], is_function: impl Fn(u64) -> bool) -> Vec<Vtable> {
    let mut found = Vec::new();
    let mut run = 0;
    for (at, &word) in words.iter().enumerate() {
        if is_function(word) {
            run += 1;
            continue;
        }
        if run >= FUNCTIONS
            && let Some(table) = words.get(at - FUNCTIONS..at - FUNCTIONS + WORDS)
        {
            found.extend(vtable(table));
        }
        run = 0;
    }
    found
}

fn vtable(words: &[u64]) -> Option<Vtable> {
    let [poll, schedule, dealloc, _, _, _, shutdown, trailer, scheduler, id] = *words.first_chunk::<WORDS>()?;
    let aligned = (trailer | scheduler | id) % 8 == 0;
    let plausible = (SMALLEST_HEADER..=LARGEST_HEADER).contains(&scheduler)
        && (scheduler..=scheduler + LARGEST_SCHEDULER).contains(&id)
        && (id + 8..LARGEST_TASK).contains(&trailer);
    (aligned && plausible).then_some(Vtable { poll, schedule, dealloc, shutdown, id_offset: id as u16 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: std::ops::Range<u64> = 0x1000..0x9000;

    fn found(words: &[u64]) -> Vec<u64> {
        scan(words, |word| TEXT.contains(&word)).iter().map(|table| table.poll).collect()
    }

    fn functions(first: u64) -> Vec<u64> {
        (0..7).map(|n| first + n * 16).collect()
    }

    #[test]
    fn tables_are_found_between_other_things() {
        let words = [
            // A trait object's table: drop, size, align, methods.
            &[0x1100, 24, 8, 0x1110, 0x1120][..],
            &functions(0x2000),
            &[1048, 32, 40],
            &functions(0x3000),
            &[88, 32, 48],
        ]
        .concat();
        assert_eq!(found(&words), [0x2000, 0x3000]);
        // Functions of something else right in front: the last seven are the table.
        assert_eq!(found(&[&[0x1100, 0x1110][..], &functions(0x2000), &[1048, 32, 40]].concat()), [0x2000]);
    }

    #[test]
    fn what_only_looks_like_one_is_not_taken() {
        for tail in [[1048, 32, 33], [40, 32, 40], [1048, 8, 16], [1 << 30, 32, 40], [0, 32, 40], [1048, 40, 32]] {
            assert_eq!(found(&[&functions(0x2000)[..], &tail].concat()), [0u64; 0], "{tail:?}");
        }
        assert_eq!(found(&[&functions(0x2000)[1..], &[1048, 32, 40]].concat()), [0u64; 0]);
        assert_eq!(found(&functions(0x2000)), [0u64; 0]);
    }

    proptest! {
        #[test]
        fn any_words_are_harmless(words in proptest::collection::vec(any::<u64>(), 0..200)) {
            let _ = scan(&words, |word| word % 3 != 0);
        }
    }
}
