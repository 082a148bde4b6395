//! Turns the raw objects of an ASGI scope into the facts of a request.

use std::collections::HashMap;
use std::net::Ipv6Addr;

use loopguard_common::records::RequestSnapshot;

use super::{Fault, Interpreter};
use crate::core::event::RequestFacts;

/// Route objects kept at a time.
const MAX_ROUTES: usize = 2048;
const MAX_ROUTE: usize = 512;

/// The templates of the route objects seen so far, by their address and their type's.
#[derive(Debug, Default)]
pub(super) struct Routes {
    known: HashMap<(u64, u64), Option<String>>,
}

impl Routes {
    /// `route.path`: what Starlette and FastAPI call the template, `/items/{id}`. A string is the template itself.
    fn template(&mut self, interpreter: &Interpreter, route: u64) -> Option<String> {
        let key = (route, interpreter.type_of(route).ok()?);
        if key.1 == interpreter.anchors.str_type {
            return interpreter.str(route, MAX_ROUTE).ok().filter(|template| !template.is_empty());
        }
        if let Some(template) = self.known.get(&key) {
            return template.clone();
        }
        let template = match interpreter.attribute(route, "path") {
            Ok(Some(path)) => interpreter.str(path, MAX_ROUTE).ok(),
            Ok(None) => None,
            // It may be readable next time.
            Err(_) => return None,
        };
        if self.known.len() >= MAX_ROUTES {
            self.known.clear();
        }
        self.known.insert(key, template.clone());
        template
    }

    /// The request behind a snapshot; `None`: there was no scope, or it has no readable path.
    ///
    /// Without an `x-request-id` header the id is `lg-` and 16 hexadecimal digits made of the process, the address of
    /// the scope object, and the path, method and client in it. It names the scope object: the same in every capture of one
    /// request, but two requests can share it when the second one is alike in all of these and its scope was put where
    /// the first one's had been.
    pub fn request(&mut self, interpreter: &Interpreter, snapshot: &RequestSnapshot) -> Option<RequestFacts> {
        if snapshot.scope == 0 {
            return None;
        }
        let text = interpreter.text();
        let path = text.decode_str(&snapshot.path)?;
        let method = text.decode_str(&snapshot.method);
        let client = text.decode_str(&snapshot.client_host).map(|host| peer(&host, snapshot.client_port));
        let given = text.decode_bytes(&snapshot.request_id).map(|id| id.trim().to_owned()).filter(|id| !id.is_empty());
        let trace_id = text.decode_bytes(&snapshot.traceparent).and_then(|header| trace_id(&header));
        let id = given.unwrap_or_else(|| {
            let parts = [
                &interpreter.pid.to_le_bytes()[..],
                &snapshot.scope.to_le_bytes(),
                path.as_bytes(),
                client.as_deref().unwrap_or_default().as_bytes(),
                method.as_deref().unwrap_or_default().as_bytes(),
            ];
            format!("lg-{:016x}", hash(&parts))
        });
        let route = if snapshot.route == 0 { None } else { self.template(interpreter, snapshot.route) };
        Some(RequestFacts { id, method, path, route, client, trace_id })
    }
}

impl Interpreter {
    /// The dict behind `object`, looking through a cell; `None`: something else.
    pub(super) fn scope_dict(&self, object: u64) -> Result<Option<u64>, Fault> {
        if object < 4096 {
            return Ok(None);
        }
        let mut object = object;
        if self.type_of(object)? == self.anchors.cell_type {
            object = self.cell(object);
            if object < 4096 {
                return Ok(None);
            }
        }
        Ok((self.type_of(object)? == self.anchors.dict_type).then_some(object))
    }
}

/// The host alone where what was copied as the port is none: some servers keep a string there.
fn peer(host: &str, port: u32) -> String {
    let Some(port) = u16::try_from(port).ok().filter(|port| *port != 0) else { return host.to_owned() };
    if host.parse::<Ipv6Addr>().is_ok() { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// The trace id of a `traceparent` header (W3C Trace Context: `version-trace_id-parent_id-flags`).
pub fn trace_id(header: &str) -> Option<String> {
    let mut fields = header.trim().split('-');
    let mut hex = |length: usize| {
        fields.next().filter(|field| field.len() == length && field.bytes().all(|byte| byte.is_ascii_hexdigit()))
    };
    let (version, trace, _parent, _flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
    let valid = !version.eq_ignore_ascii_case("ff") && trace.bytes().any(|byte| byte != b'0');
    valid.then(|| trace.to_ascii_lowercase())
}

/// FNV-1a, so that an id is the same in every run; each part is told from the next.
fn hash(parts: &[&[u8]]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for part in parts {
        for byte in part.iter().chain(&[0xff]) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn trace_ids() {
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        assert_eq!(trace_id(&format!("00-{id}-00f067aa0ba902b7-01")).as_deref(), Some(id));
        assert_eq!(trace_id(&format!(" 00-{}-00f067aa0ba902b7-01 ", id.to_uppercase())).as_deref(), Some(id));
        // A later version may add fields.
        assert_eq!(trace_id(&format!("01-{id}-00f067aa0ba902b7-01-more")).as_deref(), Some(id));
        for header in [
            "",
            "00",
            id,
            &format!("00-{id}"),
            &format!("ff-{id}-00f067aa0ba902b7-01"),
            &format!("00-{id}0-00f067aa0ba902b7-01"),
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01",
        ] {
            assert_eq!(trace_id(header), None, "{header}");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_harmless(header: String) {
            trace_id(&header);
        }
    }

    #[test]
    fn peers() {
        assert_eq!(peer("127.0.0.1", 80), "127.0.0.1:80");
        assert_eq!(peer("::1", 80), "[::1]:80");
        assert_eq!(peer("127.0.0.1", u32::MAX), "127.0.0.1");
        assert_eq!(peer("::1", 0), "::1");
    }

    #[test]
    fn ids_tell_parts_apart() {
        assert_ne!(hash(&[b"a", b"bc"]), hash(&[b"ab", b"c"]));
    }
}
