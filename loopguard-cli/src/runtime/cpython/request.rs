//! Turns the raw objects of an ASGI scope, or a server's own request object, into the facts of a request.

use std::collections::HashMap;
use std::net::Ipv6Addr;

use loopguard_common::records::RequestSnapshot;

use super::request_object::{Server, Told};
use super::{Fault, Interpreter};
use crate::core::event::RequestFacts;
use crate::runtime::http::trace_id;

/// Route objects kept at a time.
const MAX_ROUTES: usize = 2048;
const MAX_ROUTE: usize = 512;

/// The templates of the route objects seen so far, by their address and their type's.
#[derive(Debug, Default)]
pub(super) struct Routes {
    known: HashMap<(u64, u64), Option<String>>,
}

impl Routes {
    /// What the first of a route's `attributes` says, `/items/{id}`. A string is the template itself.
    fn template(&mut self, interpreter: &Interpreter, route: u64, attributes: &[&str]) -> Option<String> {
        let key = (route, interpreter.type_of(route).ok()?);
        if key.1 == interpreter.anchors.str_type {
            return interpreter.str(route, MAX_ROUTE).ok().filter(|template| !template.is_empty());
        }
        if let Some(template) = self.known.get(&key) {
            return template.clone();
        }
        let mut template = None;
        for name in attributes {
            // It may be readable next time.
            if let Some(text) = interpreter.attribute(route, name).ok()? {
                template = interpreter.str(text, MAX_ROUTE).ok();
                break;
            }
        }
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
        // What Starlette and FastAPI call it.
        let route = if snapshot.route == 0 { None } else { self.template(interpreter, snapshot.route, &["path"]) };
        let facts = RequestFacts { id: given.unwrap_or_default(), method, path, route, client, trace_id };
        Some(with_id(facts, interpreter.pid, snapshot.scope))
    }

    /// The request behind a server's own object; its id is made up in the same way if it was given none.
    pub fn request_of_object(
        &mut self,
        interpreter: &Interpreter,
        object: u64,
        server: Server,
    ) -> Result<RequestFacts, Fault> {
        let Told { method, path, host, port, request_id, trace_id, route } =
            interpreter.request_object(object, server)?;
        let client = host.map(|host| peer(&host, port));
        let route = route
            .and_then(|route| self.template(interpreter, route, server.template_attributes()))
            .map(|template| server.template(template));
        let facts = RequestFacts { id: request_id.unwrap_or_default(), method, path, route, client, trace_id };
        Ok(with_id(facts, interpreter.pid, object))
    }
}

/// Gives a request an id if it has none.
fn with_id(mut facts: RequestFacts, pid: u32, object: u64) -> RequestFacts {
    if facts.id.is_empty() {
        let parts = [
            &pid.to_le_bytes()[..],
            &object.to_le_bytes(),
            facts.path.as_bytes(),
            facts.client.as_deref().unwrap_or_default().as_bytes(),
            facts.method.as_deref().unwrap_or_default().as_bytes(),
        ];
        facts.id = format!("lg-{:016x}", hash(&parts));
    }
    facts
}

/// The host alone where what was copied as the port is none: some servers keep a string there.
fn peer(host: &str, port: u32) -> String {
    let Some(port) = u16::try_from(port).ok().filter(|port| *port != 0) else { return host.to_owned() };
    if host.parse::<Ipv6Addr>().is_ok() { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
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
