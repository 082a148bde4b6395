//! Takes probes away on a thread of its own: the kernel waits until no processor can be in a probe any more, a tenth of a
//! second where many are busy, and what happens meanwhile must not wait for that.

use std::{any::Any, io, sync::mpsc, thread};

/// Links that are being closed, in the order in which they came.
pub struct Closing {
    links: mpsc::Sender<Box<dyn Any + Send>>,
}

impl Closing {
    pub fn start() -> io::Result<Self> {
        let (links, to_close) = mpsc::channel::<Box<dyn Any + Send>>();
        // It ends with the sender. Whoever ends before it leaves nothing behind: descriptors go with their process.
        thread::Builder::new().name("loopguard-close".to_owned()).spawn(move || to_close.iter().for_each(drop))?;
        Ok(Self { links })
    }

    pub fn close(&self, link: impl Any + Send) {
        // Without the thread it is dropped, and so closed, here.
        let _ = self.links.send(Box::new(link));
    }
}
