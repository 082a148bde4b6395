//! Turns a ring buffer entry's bytes into the record it holds.

use std::mem::{MaybeUninit, offset_of, size_of};

use loopguard_common::records::{
    CAPTURE_BASE, CaptureRecord, MAX_FRAMES, PollRecord, ProcessRecord, RawFrame, RecordKind, StackPage, StepRecord,
    TaskRecord, TaskReturnRecord, UnclearWaitRecord,
};
use loopguard_common::request::{RequestEndRecord, RequestRouteRecord, RequestStartRecord};

#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    Step(Box<StepRecord>),
    Capture(Box<CaptureRecord>),
    Poll(PollRecord),
    StackPage(Box<StackPage>),
    RequestStart(Box<RequestStartRecord>),
    RequestRoute(Box<RequestRouteRecord>),
    RequestEnd(Box<RequestEndRecord>),
    Task(Box<TaskRecord>),
    TaskReturn(TaskReturnRecord),
    UnclearWait(UnclearWaitRecord),
    Process(ProcessRecord),
}

/// Nothing this version of loopguard knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a record of kind {kind} with {length} bytes is none of ours")]
pub struct UnknownRecord {
    pub kind: u32,
    pub length: usize,
}

pub fn decode(bytes: &[u8]) -> Result<Record, UnknownRecord> {
    let kind = bytes.first_chunk::<4>().map_or(0, |word| u32::from_ne_bytes(*word));
    let unknown = UnknownRecord { kind, length: bytes.len() };
    if kind == RecordKind::Step as u32 {
        // SAFETY: integers through and through, so any bytes are a value.
        unsafe { whole::<StepRecord>(bytes) }.map(|record| Record::Step(Box::new(record))).ok_or(unknown)
    } else if kind == RecordKind::Poll as u32 {
        // SAFETY: as above.
        unsafe { whole::<PollRecord>(bytes) }.map(Record::Poll).ok_or(unknown)
    } else if kind == RecordKind::StackPage as u32 {
        // SAFETY: as above.
        unsafe { whole::<StackPage>(bytes) }.map(|page| Record::StackPage(Box::new(page))).ok_or(unknown)
    } else if kind == RecordKind::Task as u32 {
        // SAFETY: as above.
        unsafe { whole::<TaskRecord>(bytes) }.map(|record| Record::Task(Box::new(record))).ok_or(unknown)
    } else if kind == RecordKind::TaskReturn as u32 {
        // SAFETY: as above.
        unsafe { whole::<TaskReturnRecord>(bytes) }.map(Record::TaskReturn).ok_or(unknown)
    } else if kind == RecordKind::UnclearWait as u32 {
        // SAFETY: as above.
        unsafe { whole::<UnclearWaitRecord>(bytes) }.map(Record::UnclearWait).ok_or(unknown)
    } else if kind == RecordKind::Process as u32 {
        // SAFETY: as above.
        unsafe { whole::<ProcessRecord>(bytes) }.map(Record::Process).ok_or(unknown)
    } else if kind == RecordKind::Capture as u32 {
        capture(bytes).map(Record::Capture).ok_or(unknown)
    } else if kind == RecordKind::RequestStart as u32 {
        // SAFETY: as above.
        unsafe { whole(bytes) }.map(|record| Record::RequestStart(Box::new(record))).ok_or(unknown)
    } else if kind == RecordKind::RequestRoute as u32 {
        // SAFETY: as above.
        unsafe { whole(bytes) }.map(|record| Record::RequestRoute(Box::new(record))).ok_or(unknown)
    } else if kind == RecordKind::RequestEnd as u32 {
        // SAFETY: as above.
        unsafe { whole(bytes) }.map(|record| Record::RequestEnd(Box::new(record))).ok_or(unknown)
    } else {
        Err(unknown)
    }
}

/// # Safety
/// `T` must be made of integers only.
unsafe fn whole<T: Copy>(bytes: &[u8]) -> Option<T> {
    // SAFETY: enough bytes, read unaligned; the caller vouches for the type.
    (bytes.len() >= size_of::<T>()).then(|| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// A capture comes without the frames it does not have.
fn capture(bytes: &[u8]) -> Option<Box<CaptureRecord>> {
    let word = bytes.get(offset_of!(CaptureRecord, frame_count)..)?.first_chunk::<4>()?;
    let frames = u32::from_ne_bytes(*word) as usize;
    let length = CAPTURE_BASE + frames * size_of::<RawFrame>();
    if frames > MAX_FRAMES || bytes.len() < length {
        return None;
    }
    let mut record = Box::new(MaybeUninit::<CaptureRecord>::zeroed());
    // SAFETY: `length` bytes are there and fit; all zero, or any other bytes, are a valid record.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), record.as_mut_ptr().cast::<u8>(), length);
        Some(record.assume_init())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture_bytes(frame_count: u32, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        bytes[..4].copy_from_slice(&(RecordKind::Capture as u32).to_ne_bytes());
        let at = offset_of!(CaptureRecord, frame_count);
        if length > at + 4 {
            bytes[at..at + 4].copy_from_slice(&frame_count.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn a_capture_has_as_many_frames_as_it_says() {
        let mut bytes = capture_bytes(2, CAPTURE_BASE + 2 * size_of::<RawFrame>());
        bytes[CAPTURE_BASE..CAPTURE_BASE + 8].copy_from_slice(&77u64.to_ne_bytes());
        let Ok(Record::Capture(record)) = decode(&bytes) else { panic!("a capture") };
        assert_eq!((record.frame_count, record.frames[0].code), (2, 77));
    }

    #[test]
    fn short_and_foreign_bytes_are_refused() {
        for bytes in [
            vec![],
            vec![1, 0, 0, 0],
            vec![9; 64],
            [&[4, 0, 0, 0][..], &[0; 4000]].concat(),
            capture_bytes(3, CAPTURE_BASE + 2 * size_of::<RawFrame>()),
            capture_bytes(u32::MAX, CAPTURE_BASE),
            capture_bytes(0, CAPTURE_BASE - 1),
        ] {
            assert!(decode(&bytes).is_err(), "{} bytes", bytes.len());
        }
    }
}
