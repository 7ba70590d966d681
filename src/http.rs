//! HTTP, served: the listener with its limits, problem documents, and the probes.

mod body;
mod problem;

pub use self::{body::collect, problem::Problem};
