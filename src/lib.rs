//! countersign stands beside a container registry, signs what is pushed, and verifies it before it runs.
//!
//! One push, one direction:
//!
//! ```text
//! intake > event > queue.push                                                  answers 202
//! queue.pull > pipeline > rule > subject > signature.prepare > witness > kms.sign
//!            > signature.assemble > verify > registry.write > ledger > ack
//! ```
//!
//! Each stage takes the type the last one made, and each type has one constructor, so that no road leads to a key
//! that does not start at bytes which the configured registry served and which we hashed.

pub mod admin;
pub mod admission;
pub mod app;
pub mod attachment;
pub mod certificate;
pub mod cli;
pub mod clock;
pub mod config;
pub mod copy;
pub mod event;
pub mod http;
pub mod intake;
pub mod kms;
pub mod kubernetes;
pub mod ledger;
pub mod lifecycle;
pub mod oci;
pub mod outcome;
pub mod pipeline;
pub mod policy;
pub mod registry;
pub mod rule;
pub mod signature;
pub mod subject;
pub mod telemetry;
pub mod verify;
pub mod witness;
