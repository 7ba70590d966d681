//! What can be seen of a running countersign: its log on stderr, and its metrics.

mod log;
mod metrics;

pub use log::{Error, LogFormat, LogHandle, LogSettings, install};
pub use metrics::{CONTENT_TYPE, INTAKE_FAMILIES, Metrics, Sample, Snapshot};
