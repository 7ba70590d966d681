use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
};

use cryptoki::{
    context::{CInitializeArgs, CInitializeFlags, Pkcs11},
    error::{Error as ModuleError, RvError},
    session::{Session, SessionState, UserType},
    slot::{Slot, TokenInfo},
};
use secrecy::{ExposeSecret, SecretString};

use super::{
    fault::Fault,
    reference::{Pkcs11Reference, Place},
};
use crate::kms::{Environment, Error, KeyUri, SecretSource};

/// Which token, and who asks it.
pub(super) struct Door {
    pub(super) uri: Arc<KeyUri>,
    pub(super) reference: Pkcs11Reference,
    pub(super) pin: Option<SecretSource>,
    pub(super) environment: Environment,
}

/// A session in which the user is logged in, if its token wants that; and what its token is called.
pub(super) struct Entered {
    // Closed before the module may be finalised.
    pub(super) session: Session,
    pub(super) token: TokenInfo,
    _module: Arc<Module>,
}

impl Door {
    /// Loads the module if this process has not yet, finds the token, opens a session and logs in if nobody has.
    pub(super) fn enter(&self) -> Result<Entered, Fault> {
        let module = self.module()?;
        let (slot, token) = self.token(&module.library)?;
        let session = module.library.open_ro_session(slot)?;
        self.log_in(&module, &session, slot, &token)?;
        Ok(Entered { session, token, _module: module })
    }

    /// Finalises the module and initialises it again, which not a few of them want before they see a token that was put back, or
    /// a server that was gone. Does nothing, and says false, while this process uses the module in any way.
    pub(super) fn renew(&self) -> Result<bool, Fault> {
        let place = shelf(&self.path()?);
        let held = locked(&place);
        // Nobody gets another from the shelf now.
        let Some(module) = held.as_ref().filter(|module| Arc::strong_count(module) == 1) else { return Ok(false) };
        tracing::info!(key = %self.uri, "initialising the module anew");
        // It may have been finalised by another path to the same library.
        let _ = module.library.clone().finalize();
        initialize(&module.library)?;
        Ok(true)
    }

    fn misconfigured(&self, what: impl Into<String>) -> Error {
        Error::Misconfigured { key: Arc::clone(&self.uri), what: what.into() }
    }

    fn credentials(&self, what: impl Into<String>) -> Error {
        Error::Credentials { key: Arc::clone(&self.uri), what: what.into() }
    }

    fn module(&self) -> Result<Arc<Module>, Fault> {
        let path = self.path()?;
        let place = shelf(&path);
        let mut held = locked(&place);
        if let Some(module) = &*held {
            return Ok(Arc::clone(module));
        }
        let library = Pkcs11::new(&path)?;
        initialize(&library)?;
        if let Ok(info) = library.get_library_info() {
            tracing::info!(module = %path.display(), maker = info.manufacturer_id(), version = %info.library_version(), "module loaded");
        }
        Ok(Arc::clone(held.insert(Arc::new(Module { library, refused: Mutex::default() }))))
    }

    fn path(&self) -> Result<PathBuf, Error> {
        let path = match &self.reference.module {
            Place::Path(path) => path.clone(),
            Place::Name(name) => {
                let files = FOLDERS.iter().flat_map(|folder| [format!("{folder}/lib{name}.so"), format!("{folder}/{name}.so")]);
                let found = files.map(PathBuf::from).find(|path| path.is_file());
                found.ok_or_else(|| {
                    let folders = FOLDERS.join(", ");
                    self.misconfigured(format!("there is no lib{name}.so or {name}.so in {folders}: say where with module-path="))
                })?
            }
        };
        path.canonicalize().map_err(|error| self.misconfigured(format!("its module {} cannot be used: {error}", path.display())))
    }

    fn token(&self, library: &Pkcs11) -> Result<(Slot, TokenInfo), Fault> {
        let wanted = &self.reference;
        let is = |wanted: &Option<String>, found: &str| wanted.as_ref().is_none_or(|wanted| wanted == found);
        let (mut found, mut others) = (Vec::new(), Vec::new());
        for slot in library.get_slots_with_token()? {
            let info = match library.get_token_info(slot) {
                // Taken out just now.
                Err(ModuleError::Pkcs11(RvError::TokenNotPresent | RvError::DeviceRemoved, _)) => continue,
                info => info?,
            };
            let fits = is(&wanted.token, info.label())
                && is(&wanted.manufacturer, info.manufacturer_id())
                && is(&wanted.model, info.model())
                && is(&wanted.serial, info.serial_number())
                && wanted.slot.is_none_or(|wanted| wanted == slot.id());
            if fits && info.token_initialized() {
                found.push((slot, info));
            } else if info.token_initialized() {
                others.push(format!("{:?} (serial {}, slot {})", info.label(), info.serial_number(), slot.id()));
            }
        }
        if found.len() > 1 {
            let what = format!("{} tokens fit: add serial= to the reference, which tells them apart", found.len());
            return Err(self.misconfigured(what).into());
        }
        found.pop().ok_or_else(|| {
            let others = if others.is_empty() { "none".to_owned() } else { others.join(", ") };
            Fault::NoToken(format!("no token that fits is in a slot; its module sees {others}"))
        })
    }

    /// A PIN that was refused once is never tried again: after some wrong ones, tokens lock for good.
    fn log_in(&self, module: &Module, session: &Session, slot: Slot, token: &TokenInfo) -> Result<(), Fault> {
        // One at a time, or several sessions would try the same wrong PIN at once.
        let mut refused = locked(&module.refused);
        if matches!(session.get_session_info()?.session_state(), SessionState::RoUser | SessionState::RwUser) {
            return Ok(());
        }
        let Some(pin) = &self.pin else {
            if token.login_required() {
                let what = "its token wants a PIN: give the witness `pin = { file = \"/run/secrets/pin\" }`";
                return Err(self.credentials(what).into());
            }
            return Ok(());
        };
        let secret = pin.read_line(&self.environment).map_err(|what| self.credentials(format!("the PIN: {what}")))?;
        let name = format!("{} {}", token.serial_number(), token.label());
        if refused.get(&name).is_some_and(|refused| refused.expose_secret() == secret.expose_secret()) {
            let what = format!(
                "the PIN in {pin} was refused by the token before and is not tried again, because tokens lock: correct it"
            );
            return Err(self.credentials(what).into());
        }
        // As it is now: somebody may have tried since.
        let token = module.library.get_token_info(slot)?;
        if token.user_pin_locked() {
            return Err(self.credentials("its token's PIN is locked: unlock it with the security officer's PIN").into());
        }
        if token.user_pin_final_try() {
            let what = "one more wrong PIN would lock its token, so none is tried: log in once with the right one by another program \
                        (`pkcs11-tool --login --list-objects`), which clears the token's counter";
            return Err(self.credentials(what).into());
        }
        match session.login(UserType::User, Some(&secret)) {
            Ok(()) => {
                tracing::info!(key = %self.uri, token = token.label(), serial = token.serial_number(), "logged in");
                refused.remove(&name);
                Ok(())
            }
            Err(ModuleError::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => Ok(()),
            Err(error) => {
                if let ModuleError::Pkcs11(RvError::PinIncorrect | RvError::PinLenRange | RvError::PinInvalid, _) = &error {
                    refused.insert(name, secret);
                    let what = format!("its token refuses the PIN in {pin}, which is not tried again until it is another one");
                    return Err(self.credentials(what).into());
                }
                // Whatever it is, not at once again: it might count as a wrong PIN.
                Err(Fault::Module(error).into_error(&self.uri).into())
            }
        }
    }
}

/// What stands in [`Place::Name`]'s stead, where distributions and vendors put modules.
const FOLDERS: [&str; 8] = [
    "/usr/lib/x86_64-linux-gnu/pkcs11",
    "/usr/lib/aarch64-linux-gnu/pkcs11",
    "/usr/lib64/pkcs11",
    "/usr/lib/pkcs11",
    "/usr/local/lib/pkcs11",
    "/usr/lib/softhsm",
    "/usr/lib64/softhsm",
    "/usr/local/lib/softhsm",
];

/// Where a module is once it is loaded. Each has its own lock, so that one which hangs while it is loaded keeps nobody from the
/// others.
type Shelf = Arc<Mutex<Option<Arc<Module>>>>;

fn shelf(path: &Path) -> Shelf {
    static SHELVES: LazyLock<Mutex<HashMap<PathBuf, Shelf>>> = LazyLock::new(Mutex::default);
    Arc::clone(locked(&SHELVES).entry(path.to_owned()).or_default())
}

fn initialize(library: &Pkcs11) -> Result<(), ModuleError> {
    match library.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
        // By another path to the same library.
        Err(ModuleError::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => Ok(()),
        result => result,
    }
}

/// A shared library that this process has loaded and initialised, once for all its keys. It stays loaded.
struct Module {
    library: Pkcs11,
    /// The last PIN that each token refused, by the token's serial number and label.
    refused: Mutex<HashMap<String, SecretString>>,
}

/// Nothing is left half done under these locks if a thread panics with one.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
