//! The harness of the black-box tests: it uses what an administrator has (the `countersign` binary, its configuration
//! and its ports) beside real components, all of them on 127.0.0.1 and in folders of their own.
//!
//! - [`registry`] starts Debian's docker-registry, or ferro-oci-server, and talks to it; [`image`] builds what is pushed there,
//!   [`issuer`] gives the tokens that one may ask for, and [`endless`] is a registry that has any number of signed images.
//! - [`daemon`] runs `countersign`; [`house`] is a whole small installation of it: registry, key, rules, daemon.
//! - [`fleet`] is several replicas of it on one broker and one database, and [`namespace`] a network between them that can be cut.
//! - [`verifier`] asks the judges, stock cosign, stock notation and stock skopeo; [`attest`] is what else cosign writes, [`authority`] certifies keys for
//!   notation; [`signature`] reads what is stored, and counts; [`formats`] is
//!   about all formats, in registries with and without the referrers API; [`oras`] lists what is attached to an image, and attaches more.
//! - [`webhook`] is `countersign admission`, called as a cluster calls it; [`kubernetes`] is a cluster that does, with kubectl.
//!   [`api_server`] is a fake of its API that fails.
//! - [`postgres`] is a database server, [`rabbitmq`] Debian's RabbitMQ, with [`certificates`] where it wants some, [`openbao`] OpenBao with Transit keys, policies and logins.
//! - [`ministack`] is AWS's KMS, IAM and STS, which checks its callers; [`alibaba`], [`azure`] and [`google`] are fakes of those clouds'
//!   that do, of what [`fake`] has. [`softhsm`] is a PKCS#11 module with tokens, and a proxy before it that fails when a test wants it to.
//! - [`keys`] are theirs, and [`gate`] stands before a KMS and throttles or lies; [`proxy`] makes a network that is slow or broken;
//!   [`recorder`] keeps what was said.
//!
//! Whatever a test started is killed and reaped when the test lets go of it, and its log is printed then: `cargo test` shows
//! that for tests that fail. `make tools` installs what is run here.

pub mod alibaba;
pub mod api_server;
pub mod attest;
pub mod authority;
pub mod azure;
pub mod certificates;
pub mod daemon;
pub mod endless;
pub mod fake;
pub mod fleet;
pub mod formats;
pub mod gate;
pub mod google;
pub mod house;
pub mod image;
pub mod issuer;
pub mod keys;
pub mod kubernetes;
pub mod ministack;
pub mod namespace;
pub mod openbao;
pub mod oras;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod rabbitmq;
pub mod recorder;
pub mod registry;
pub mod signature;
pub mod softhsm;
pub mod verifier;
pub mod webhook;
