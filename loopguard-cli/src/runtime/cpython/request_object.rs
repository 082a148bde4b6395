//! Turns the request objects of servers without an ASGI scope (aiohttp, Sanic, Tornado) into the facts of a request.
//!
//! Their handlers get an object. Whose it is says its class; its fields are called what these servers' sources call them,
//! and what is not found there is left out.

use std::collections::HashMap;

use super::{Fault, Interpreter};
use crate::runtime::http::{self, trace_id};
use crate::runtime::memory::TargetMemory;

/// Classes that are remembered.
const MAX_CLASSES: usize = 256;
const MAX_BASES: usize = 8;
const MAX_NAME: usize = 64;
const MAX_METHOD: usize = 16;
const MAX_TEXT: usize = 256;
const MAX_HEADERS: usize = 64;
/// Of what Sanic keeps of a request's head.
const MAX_HEAD: usize = 4096;

/// The first field after an object's header.
const FIRST_FIELD: u64 = 16;

/// Who made a request object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Server {
    Aiohttp,
    Sanic,
    Tornado,
}

/// Class, module, and whose that is.
const CLASSES: [(&str, &str, Server); 5] = [
    ("Request", "aiohttp.web_request", Server::Aiohttp),
    ("BaseRequest", "aiohttp.web_request", Server::Aiohttp),
    ("Request", "sanic.request.types", Server::Sanic),
    // Before 22.12.
    ("Request", "sanic.request", Server::Sanic),
    ("HTTPServerRequest", "tornado.httputil", Server::Tornado),
];

/// Which classes are those of requests, by their addresses.
#[derive(Debug, Default)]
pub(super) struct Classes {
    known: HashMap<u64, Option<Server>>,
}

impl Classes {
    /// Whose request `object` is; `None`: it is none.
    pub fn server_of(&mut self, interpreter: &Interpreter, object: u64) -> Result<Option<Server>, Fault> {
        let class = interpreter.type_of(object)?;
        if let Some(known) = self.known.get(&class) {
            return Ok(*known);
        }
        let server = interpreter.server_of_class(class)?;
        if self.known.len() >= MAX_CLASSES {
            self.known.clear();
        }
        self.known.insert(class, server);
        Ok(server)
    }
}

/// What a request object says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    pub method: Option<String>,
    /// Without the query, as it was sent.
    pub path: String,
    pub host: Option<String>,
    pub port: u32,
    /// `x-request-id`.
    pub request_id: Option<String>,
    /// From `traceparent`.
    pub trace_id: Option<String>,
    /// Address of what says the route's template.
    pub route: Option<u64>,
}

impl Server {
    /// The attributes of a route that may hold its template.
    pub fn template_attributes(self) -> &'static [&'static str] {
        match self {
            // Of a resource with parameters, and of one without.
            Self::Aiohttp => &["_formatter", "_path"],
            Self::Sanic => &["path"],
            Self::Tornado => &[],
        }
    }

    /// A template as it is written elsewhere.
    pub fn template(self, text: String) -> String {
        match self {
            // Sanic keeps it without the first slash.
            Self::Sanic if !text.starts_with('/') => format!("/{text}"),
            _ => text,
        }
    }
}

impl Interpreter {
    fn server_of_class(&self, mut class: u64) -> Result<Option<Server>, Fault> {
        for _ in 0..MAX_BASES {
            if class == 0 {
                break;
            }
            // A class that has no dict, or none that Python code filled, is not one of them.
            if let Ok((name, module)) = self.class_name(class, MAX_NAME)
                && let Some((_, _, server)) = CLASSES.iter().find(|(of, from, _)| *of == name && *from == module)
            {
                return Ok(Some(*server));
            }
            class = self.base(class)?;
        }
        Ok(None)
    }

    pub(super) fn request_object(&self, object: u64, server: Server) -> Result<Told, Fault> {
        match server {
            Server::Aiohttp => self.aiohttp_request(object),
            Server::Sanic => self.sanic_request(object),
            Server::Tornado => self.tornado_request(object),
        }
    }

    /// `aiohttp/web_request.py`.
    fn aiohttp_request(&self, object: u64) -> Result<Told, Fault> {
        let message = self.needed(object, "_message")?;
        // `RawRequestMessage`: a class of Cython's, or where that was not built a named tuple. Both begin with these.
        let fields = if self.is_tuple(message)? {
            self.tuple(message, 5)?
        } else {
            self.memory.words(message.wrapping_add(FIRST_FIELD), 5)?
        };
        let &[method, target, _version, _headers, raw_headers] = fields.as_slice() else {
            return Err(Fault::Unexpected { address: message, expected: "a message of aiohttp" });
        };
        let mut told = Told { method: self.str(method, MAX_METHOD).ok(), path: self.path(target)?, ..Told::default() };
        for pair in self.tuple(raw_headers, MAX_HEADERS).unwrap_or_default() {
            let &[name, value] = self.tuple(pair, 2)?.as_slice() else { continue };
            told.header(&self.bytes(name, MAX_NAME)?, || self.text_of_bytes(value))?;
        }
        if let Some(peer) = self.attribute(object, "_transport_peername")?
            && self.is_tuple(peer)?
            && let &[host, port] = self.tuple(peer, 2)?.as_slice()
        {
            self.tell_client(&mut told, Some(host), Some(port));
        }
        told.route = self.attribute_of_attributes(object, &["_match_info", "_route", "_resource"])?;
        Ok(told)
    }

    /// `sanic/request/types.py`.
    fn sanic_request(&self, object: u64) -> Result<Told, Fault> {
        let mut head = self.bytes(self.needed(object, "head")?, MAX_HEAD)?;
        if head.len() < MAX_HEAD {
            // What was cut off by Sanic: where it ends.
            head.extend_from_slice(b"\r\n\r\n");
        }
        let unexpected = Fault::Unexpected { address: object, expected: "a request's head" };
        let head = http::head(&head).ok_or(unexpected)?;
        let mut told = Told {
            method: Some(head.method),
            path: head.path,
            request_id: head.request_id,
            trace_id: head.trace_id,
            route: self.attribute(object, "route")?,
            ..Told::default()
        };
        if let Some(connection) = self.attribute(object, "conn_info")? {
            let [host, port] = ["client_ip", "client_port"].map(|name| self.attribute(connection, name));
            self.tell_client(&mut told, host?, port?);
        }
        Ok(told)
    }

    /// `tornado/httputil.py`. It knows no client's port, and its handlers know no route.
    fn tornado_request(&self, object: u64) -> Result<Told, Fault> {
        let mut told = Told { path: self.path(self.needed(object, "uri")?)?, ..Told::default() };
        if let Some(method) = self.attribute(object, "method")? {
            told.method = self.str(method, MAX_METHOD).ok();
        }
        self.tell_client(&mut told, self.attribute(object, "remote_ip")?, None);
        let Some(lists) = self.attribute_of_attributes(object, &["headers", "_as_list"])? else { return Ok(told) };
        for (name, values) in self.dict_entries(lists)?.into_iter().take(MAX_HEADERS) {
            let first = || self.memory.u64(self.memory.field(values, self.offsets.layout.list_items)?);
            told.header(self.str(name, MAX_NAME)?.as_bytes(), || self.str(first()?, MAX_TEXT))?;
        }
        Ok(told)
    }

    fn needed(&self, object: u64, name: &'static str) -> Result<u64, Fault> {
        self.attribute(object, name)?.ok_or(Fault::Unexpected { address: object, expected: name })
    }

    /// The path in what a request's first line asks for; the name of a host (CONNECT) stays as it is.
    fn path(&self, target: u64) -> Result<String, Fault> {
        let target = self.str(target, MAX_TEXT)?;
        Ok(http::path_of(target.as_bytes()).unwrap_or(target))
    }

    fn text_of_bytes(&self, object: u64) -> Result<String, Fault> {
        Ok(String::from_utf8_lossy(&self.bytes(object, MAX_TEXT)?).into_owned())
    }

    /// `object.a.b` for `["a", "b"]`.
    fn attribute_of_attributes(&self, object: u64, names: &[&str]) -> Result<Option<u64>, Fault> {
        names.iter().try_fold(Some(object), |of, name| of.map_or(Ok(None), |of| self.attribute(of, name)))
    }

    /// Takes a client's host and port, where they are a text and a number.
    fn tell_client(&self, told: &mut Told, host: Option<u64>, port: Option<u64>) {
        told.host = host.and_then(|host| self.str(host, MAX_TEXT).ok()).filter(|host| !host.is_empty());
        if let Some(port) = port
            && self.type_name(port).is_ok_and(|name| name == "int")
        {
            told.port = self.memory.u32(port.wrapping_add(self.offsets.layout.long_digit.into())).unwrap_or_default();
        }
    }
}

impl Told {
    /// Takes a header if it is one of those that are told; `value` is only read then.
    fn header(&mut self, name: &[u8], value: impl FnOnce() -> Result<String, Fault>) -> Result<(), Fault> {
        if name.eq_ignore_ascii_case(b"x-request-id") {
            self.request_id = Some(value()?.trim().to_owned()).filter(|id| !id.is_empty());
        } else if name.eq_ignore_ascii_case(b"traceparent") {
            self.trace_id = trace_id(&value()?);
        }
        Ok(())
    }
}
