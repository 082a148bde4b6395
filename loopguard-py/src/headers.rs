//! Finds what a client or a proxy calls a request in the headers of its ASGI scope.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};

#[derive(Default)]
pub struct Names<'py> {
    /// `x-request-id`.
    pub request_id: Option<Bound<'py, PyBytes>>,
    pub traceparent: Option<Bound<'py, PyBytes>>,
}

impl<'py> Names<'py> {
    /// Of several headers of a name the first counts. What is not a list of pairs of bytes holds no names.
    pub fn find(headers: &Bound<'py, PyAny>) -> Self {
        let mut names = Self::default();
        let Ok(headers) = headers.cast::<PyList>() else { return names };
        for header in headers.iter() {
            let Some(name) = part(&header, 0) else { continue };
            let slot = match name.as_bytes() {
                b"x-request-id" => &mut names.request_id,
                b"traceparent" => &mut names.traceparent,
                _ => continue,
            };
            if slot.is_none() {
                *slot = part(&header, 1);
            }
        }
        names
    }
}

fn part<'py>(header: &Bound<'py, PyAny>, index: usize) -> Option<Bound<'py, PyBytes>> {
    let part = match header.cast::<PyTuple>() {
        Ok(header) => header.get_item(index),
        // Some servers and most test clients use lists.
        Err(_) => header.get_item(index),
    };
    part.ok()?.cast_into().ok()
}
