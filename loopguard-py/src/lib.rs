//! Turns the steps of an ASGI application's coroutines into the probes of `loopguard-emit`, and into what the
//! middleware needs to know of them itself.

mod clock;
mod coroutine;
mod gate;
mod headers;
mod probe;
mod request;
mod tasks;

use pyo3::prelude::*;

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<gate::Gate>()?;
    module.add_class::<request::Request>()?;
    module.add_class::<tasks::ChildSteps>()?;
    module.add_class::<tasks::TaskFactory>()?;
    module.add_function(wrap_pyfunction!(request::current_request, module)?)?;
    module.add_function(wrap_pyfunction!(probe::is_traced, module)?)?;
    module.add_function(wrap_pyfunction!(probe::record, module)?)?;
    module.add_function(wrap_pyfunction!(probe::recorded, module)?)
}
