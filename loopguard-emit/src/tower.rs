//! Turns a request that passes through a tower service into probes: its start, every poll of it, its end.
//!
//! ```ignore
//! let app = axum::Router::new().route("/items/{id}", get(item)).layer(loopguard_emit::tower::RequestProbes);
//! ```
//!
//! With the feature `axum` the route template is told too, if the layer is added by `Router::layer` or `route_layer`:
//! around a whole `Router`, by `ServiceBuilder` for example, the route is not known yet.
//!
//! A request lasts until its response's body has been sent or dropped, so a stream counts to its last piece. If its
//! future is dropped first, because the client went away or because it panicked, it ends with
//! [`NO_RESPONSE`](crate::NO_RESPONSE). Tasks that a handler spawns are not part of it: that includes what runs on an
//! upgraded connection (a websocket), whose request ends with status 101.
//!
//! What a request is called is told if a tracer listens as it begins. To one that comes later it is a request that was
//! open before.

use core::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use crate::{NO_RESPONSE, end, enter, exit, is_traced, next_id, start};

/// The layer. It has no settings.
#[derive(Clone, Copy, Debug, Default)]
pub struct RequestProbes;

impl<S> Layer<S> for RequestProbes {
    type Service = Probed<S>;

    fn layer(&self, inner: S) -> Probed<S> {
        Probed { inner }
    }
}

/// A service whose requests are told to tracers.
#[derive(Clone, Copy, Debug)]
pub struct Probed<S> {
    inner: S,
}

/// Stands in a request's extensions once a layer tells of it; it takes no memory there. A second one further in leaves
/// that to the first.
#[derive(Clone, Copy, Debug)]
struct Passed;

/// Its id, where a tracer listened as it began: the second layer may know the route, which the first did not.
#[derive(Clone, Copy, Debug)]
struct Told(u64);

impl<S, RequestBody, ResponseBody> Service<Request<RequestBody>> for Probed<S>
where
    S: Service<Request<RequestBody>, Response = Response<ResponseBody>>,
{
    type Response = Response<ProbedBody<ResponseBody>>;
    type Error = S::Error;
    type Future = ProbedFuture<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<RequestBody>) -> Self::Future {
        if request.extensions_mut().insert(Passed).is_some() {
            if let Some(&Told(id)) = request.extensions().get() {
                tell_route(id, &request);
            }
            return ProbedFuture { inner: Some(self.inner.call(request)), open: None };
        }
        let open = Open { id: next_id(), status: NO_RESPONSE };
        // What a request is called is not looked up for nobody.
        if is_traced() {
            open.tell(&mut request);
        }
        let inner = open.run(|| self.inner.call(request));
        ProbedFuture { inner: Some(inner), open: Some(open) }
    }
}

/// A request that has begun and not ended; it ends when this is dropped.
#[derive(Debug)]
struct Open {
    id: u64,
    status: u64,
}

impl Open {
    #[inline(never)]
    fn tell<B>(&self, request: &mut Request<B>) {
        let path = request.uri().path();
        start(self.id, request.method().as_str().as_bytes(), path.as_bytes(), named(request.headers()));
        tell_route(self.id, request);
        request.extensions_mut().insert(Told(self.id));
    }

    /// Runs a piece of the request's code.
    fn run<T>(&self, code: impl FnOnce() -> T) -> T {
        /// Leaves also when the code panics.
        struct Running(u64);
        impl Drop for Running {
            fn drop(&mut self) {
                exit(self.0);
            }
        }
        enter(self.id);
        let _running = Running(self.id);
        code()
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        end(self.id, self.status);
    }
}

#[cfg(feature = "axum")]
fn tell_route<B>(id: u64, request: &Request<B>) {
    if let Some(matched) = request.extensions().get::<axum::extract::MatchedPath>() {
        crate::route(id, matched.as_str().as_bytes());
    }
}

#[cfg(not(feature = "axum"))]
fn tell_route<B>(_id: u64, _request: &Request<B>) {}

/// What the client, or a proxy before us, calls the request.
fn named(headers: &HeaderMap) -> &[u8] {
    headers.get("x-request-id").or_else(|| headers.get("traceparent")).map_or(b"", |value| value.as_bytes())
}

/// Runs `code` as part of the request, or just runs it if another layer tells of the request.
fn within<T>(open: &Option<Open>, code: impl FnOnce() -> T) -> T {
    match open {
        Some(open) => open.run(code),
        None => code(),
    }
}

pin_project! {
    /// A request on its way to a response.
    #[derive(Debug)]
    pub struct ProbedFuture<F> {
        // Absent only while it is dropped.
        #[pin]
        inner: Option<F>,
        open: Option<Open>,
    }

    impl<F> PinnedDrop for ProbedFuture<F> {
        fn drop(this: Pin<&mut Self>) {
            // What it holds is the request's too, and may take its time to go.
            let mut this = this.project();
            within(this.open, || this.inner.set(None));
        }
    }
}

impl<F, B, E> Future for ProbedFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<ProbedBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let polled = within(this.open, || {
            let polled = this.inner.as_mut().as_pin_mut().expect("not polled after it is done").poll(context);
            if polled.is_ready() {
                this.inner.set(None);
            }
            polled
        });
        let Poll::Ready(result) = polled else { return Poll::Pending };
        // From here on the body keeps the request open.
        let open = this.open.take();
        Poll::Ready(result.map(|response| {
            let open = open.map(|mut open| {
                open.status = response.status().as_u16().into();
                open
            });
            response.map(|body| ProbedBody { inner: Some(body), open })
        }))
    }
}

pin_project! {
    /// The body of a response; its request ends with it.
    #[derive(Debug)]
    pub struct ProbedBody<B> {
        // Absent only while it is dropped.
        #[pin]
        inner: Option<B>,
        open: Option<Open>,
    }

    impl<B> PinnedDrop for ProbedBody<B> {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            within(this.open, || this.inner.set(None));
        }
    }
}

impl<B: Body> Body for ProbedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = self.project();
        let inner = this.inner.as_pin_mut().expect("not polled after it is done");
        within(this.open, || inner.poll_frame(context))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or_else(SizeHint::default, Body::size_hint)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        boxed::Box,
        panic::{AssertUnwindSafe, catch_unwind},
        string::{String, ToString},
        vec::Vec,
    };

    use super::*;
    use crate::fired;

    type Answer = Pin<Box<dyn Future<Output = Result<Response<Pieces>, String>>>>;

    /// A body of that many pieces, each of which takes two polls.
    struct Pieces(u32, bool);

    impl Body for Pieces {
        type Data = &'static [u8];
        type Error = String;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Self::Data>, String>>> {
            self.1 = !self.1;
            match (self.0, self.1) {
                (0, _) => Poll::Ready(None),
                (_, true) => Poll::Pending,
                _ => {
                    self.0 -= 1;
                    Poll::Ready(Some(Ok(Frame::data(b"x"))))
                }
            }
        }

        fn is_end_stream(&self) -> bool {
            self.0 == 0
        }
    }

    /// A service made of a function, which says what it does like a probe.
    struct Handler<F>(F);

    impl<F: FnMut(&str) -> Answer> Service<Request<()>> for Handler<F> {
        type Response = Response<Pieces>;
        type Error = String;
        type Future = Answer;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), String>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: Request<()>) -> Answer {
            fired::note("called".into());
            (self.0)(request.uri().path())
        }
    }

    /// Awaits this often before it answers.
    struct Awaits(u32);

    impl Future for Awaits {
        type Output = ();

        fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
            fired::note("polled".into());
            match self.0 {
                0 => Poll::Ready(()),
                _ => {
                    self.0 -= 1;
                    Poll::Pending
                }
            }
        }
    }

    impl Drop for Awaits {
        fn drop(&mut self) {
            fired::note("dropped".into());
        }
    }

    fn answers(status: u16, pieces: u32) -> Result<Response<Pieces>, String> {
        Ok(Response::builder().status(status).body(Pieces(pieces, false)).unwrap())
    }

    fn request(headers: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::builder().method("PUT").uri("/items/7?q=1");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(core::task::Waker::noop()))
    }

    fn check(expected: &[&str]) {
        assert_eq!(fired::take(), expected);
    }

    #[test]
    fn every_stretch_of_code_is_bracketed() {
        let mut service = RequestProbes.layer(Handler(|_: &str| -> Answer {
            Box::pin(async {
                Awaits(1).await;
                answers(201, 0)
            })
        }));
        let mut future = Box::pin(service.call(request(&[("x-request-id", "r1"), ("traceparent", "no")])));
        check(&["start PUT /items/7 r1", "enter", "called", "exit"]);
        assert!(poll(future.as_mut()).is_pending());
        check(&["enter", "polled", "exit"]);
        let Poll::Ready(Ok(response)) = poll(future.as_mut()) else { panic!() };
        check(&["enter", "polled", "dropped", "exit"]);
        drop(future);
        check(&[]);
        assert!(response.body().is_end_stream());
        drop(response);
        check(&["enter", "exit", "end 201"]);
    }

    #[test]
    fn a_stream_is_the_requests_up_to_its_end() {
        let mut service = RequestProbes.layer(Handler(|_: &str| -> Answer { Box::pin(async { answers(200, 1) }) }));
        let Poll::Ready(Ok(response)) = poll(Box::pin(service.call(request(&[]))).as_mut()) else { panic!() };
        fired::take();
        let mut body = Box::pin(response.into_body());
        let mut context = Context::from_waker(core::task::Waker::noop());
        assert!(body.as_mut().poll_frame(&mut context).is_pending());
        assert!(matches!(body.as_mut().poll_frame(&mut context), Poll::Ready(Some(Ok(_)))));
        check(&["enter", "exit", "enter", "exit"]);
        drop(body);
        check(&["enter", "exit", "end 200"]);
    }

    #[test]
    fn a_dropped_request_ends_without_a_response() {
        let mut service = RequestProbes.layer(Handler(|_: &str| -> Answer {
            Box::pin(async {
                Awaits(9).await;
                answers(200, 0)
            })
        }));
        let mut future = Box::pin(service.call(request(&[("traceparent", "00-1-2-01")])));
        assert!(poll(future.as_mut()).is_pending());
        drop(future);
        check(&[
            "start PUT /items/7 00-1-2-01",
            "enter",
            "called",
            "exit",
            "enter",
            "polled",
            "exit",
            "enter",
            "dropped",
            "exit",
            "end 0",
        ]);
    }

    #[test]
    fn a_request_that_panics_or_fails_ends_too() {
        let mut panics =
            RequestProbes.layer(Handler(|_: &str| -> Answer { Box::pin(async { panic!("as it should") }) }));
        let mut future = Box::pin(panics.call(request(&[])));
        fired::take();
        assert!(catch_unwind(AssertUnwindSafe(|| poll(future.as_mut()))).is_err());
        check(&["enter", "exit"]);
        drop(future);
        check(&["enter", "exit", "end 0"]);

        let mut panics_at_once = RequestProbes.layer(Handler(|_: &str| -> Answer { panic!("as it should") }));
        assert!(catch_unwind(AssertUnwindSafe(|| drop(panics_at_once.call(request(&[]))))).is_err());
        check(&["start PUT /items/7 ", "enter", "called", "exit", "end 0"]);

        let mut fails = RequestProbes.layer(Handler(|path: &str| -> Answer {
            let path = path.to_string();
            Box::pin(async { Err(path) })
        }));
        assert!(
            matches!(poll(Box::pin(fails.call(request(&[]))).as_mut()), Poll::Ready(Err(path)) if path == "/items/7")
        );
        assert_eq!(fired::take().iter().filter(|told| told.starts_with("end")).collect::<Vec<_>>(), ["end 0"]);
    }

    #[test]
    fn nobody_is_told_what_a_request_is_called_if_nobody_listens() {
        let inner = RequestProbes.layer(Handler(|_: &str| -> Answer { Box::pin(async { answers(200, 0) }) }));
        let mut service = RequestProbes.layer(inner);
        fired::listen(false);
        let mut future = Box::pin(service.call(request(&[("x-request-id", "r1")])));
        // A tracer that comes now finds it open, once.
        fired::listen(true);
        let Poll::Ready(Ok(response)) = poll(future.as_mut()) else { panic!() };
        drop(response);
        check(&["enter", "called", "exit", "enter", "exit", "enter", "exit", "end 200"]);
    }

    #[test]
    fn two_layers_tell_it_once() {
        let inner = RequestProbes.layer(Handler(|_: &str| -> Answer { Box::pin(async { answers(200, 0) }) }));
        let mut service = RequestProbes.layer(inner);
        let Poll::Ready(Ok(response)) = poll(Box::pin(service.call(request(&[]))).as_mut()) else { panic!() };
        drop(response);
        let told = fired::take();
        let count = |what: &str| told.iter().filter(|told| told.starts_with(what)).count();
        assert_eq!((count("start"), count("end")), (1, 1));
        assert_eq!(count("enter"), count("exit"));
    }
}
