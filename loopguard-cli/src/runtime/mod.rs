//! What marks each kind of event loop, and how to read its target.

