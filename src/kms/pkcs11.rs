//! Keys in hardware security modules and other tokens, through a vendor's PKCS#11 module (OASIS PKCS #11 2.40).

mod reference;

#[cfg(feature = "pkcs11")]
mod fault;
#[cfg(feature = "pkcs11")]
mod key;
#[cfg(feature = "pkcs11")]
mod module;
#[cfg(feature = "pkcs11")]
mod object;
#[cfg(feature = "pkcs11")]
mod pool;

use std::sync::Arc;

use super::{Environment, Error, KeyUri, Login, SigningKey};
pub use reference::Pkcs11Reference;

#[cfg(feature = "pkcs11")]
pub(super) async fn open(uri: &KeyUri, login: Option<&Login>, environment: &Environment) -> Result<Arc<dyn SigningKey>, Error> {
    Ok(Arc::new(key::Pkcs11Key::open(uri, login, environment).await?))
}

#[cfg(not(feature = "pkcs11"))]
#[expect(clippy::unused_async, reason = "the other build waits for the module")]
pub(super) async fn open(uri: &KeyUri, _login: Option<&Login>, _environment: &Environment) -> Result<Arc<dyn SigningKey>, Error> {
    let what = "this countersign was built without PKCS#11, as the one in the container image is, because a static program cannot load a \
                module: run one that was built with `cargo build --release` on a machine that has the module";
    Err(Error::Misconfigured { key: Arc::new(uri.clone()), what: what.to_owned() })
}
