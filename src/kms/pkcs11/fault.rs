use std::sync::Arc;

use cryptoki::error::{Error as ModuleError, RvError};

use crate::kms::{Error, KeyUri};

/// Why a module did not do something.
pub(super) enum Fault {
    /// The module said so.
    Module(ModuleError),
    /// The token is in no slot that the module sees.
    NoToken(String),
    /// It is said already.
    Told(Error),
}

impl From<ModuleError> for Fault {
    fn from(error: ModuleError) -> Self {
        Self::Module(error)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Told(error)
    }
}

impl Fault {
    /// Whether a new session, a new login and a new look for the key may help: the token may have been taken out and put back,
    /// and not every module has an honest word for it.
    pub(super) fn may_pass(&self) -> bool {
        let code = match self {
            Self::Module(ModuleError::Pkcs11(code, _)) => code,
            Self::NoToken(_) => return true,
            Self::Module(_) | Self::Told(_) => return false,
        };
        matches!(
            code,
            RvError::SessionHandleInvalid
                | RvError::SessionClosed
                | RvError::DeviceRemoved
                | RvError::DeviceError
                | RvError::TokenNotPresent
                | RvError::TokenNotRecognized
                | RvError::UserNotLoggedIn
                | RvError::KeyHandleInvalid
                | RvError::ObjectHandleInvalid
                | RvError::OperationActive
                | RvError::GeneralError
                | RvError::FunctionFailed
                | RvError::CryptokiNotInitialized
        )
    }

    pub(super) fn into_error(self, key: &Arc<KeyUri>) -> Error {
        let error = match self {
            Self::Told(error) => return error,
            Self::NoToken(what) => return Error::Transient { key: Arc::clone(key), what },
            Self::Module(error) => error,
        };
        let key = Arc::clone(key);
        let ModuleError::Pkcs11(code, function) = error else {
            return match error {
                ModuleError::LibraryLoading(error) => {
                    Error::Misconfigured { key, what: format!("its module cannot be loaded: {error}") }
                }
                error => Error::BadResponse { key, what: error.to_string() },
            };
        };
        let what = format!("the module answers {} to C_{function:?}", name(code));
        match code {
            RvError::PinIncorrect
            | RvError::PinInvalid
            | RvError::PinLenRange
            | RvError::PinExpired
            | RvError::PinLocked
            | RvError::UserPinNotInitialized
            | RvError::UserAnotherAlreadyLoggedIn
            | RvError::UserTooManyTypes
            | RvError::UserTypeInvalid => Error::Credentials { key, what },
            RvError::KeyFunctionNotPermitted => {
                Error::KeyUnusable { key, what: format!("{what}: the key may not sign, CKA_SIGN is not set") }
            }
            RvError::MechanismInvalid | RvError::MechanismParamInvalid => {
                Error::KeyUnusable { key, what: format!("{what}: the token does not sign with this algorithm") }
            }
            RvError::KeyTypeInconsistent
            | RvError::KeySizeRange
            | RvError::CurveNotSupported
            | RvError::ActionProhibited
            | RvError::FunctionRejected => Error::KeyUnusable { key, what },
            RvError::CantLock
            | RvError::NeedToCreateThreads
            | RvError::FunctionNotSupported
            | RvError::ArgumentsBad
            | RvError::DataInvalid
            | RvError::DataLenRange
            | RvError::SlotIdInvalid => Error::Misconfigured { key, what },
            // A token that is not there, that has no session or memory left, or that is ill, may be well again.
            _ => Error::Transient { key, what },
        }
    }
}

/// As the standard writes it: `CKR_PIN_INCORRECT`.
fn name(code: RvError) -> String {
    format!("{code:?}").chars().fold("CKR".to_owned(), |name, c| {
        let mark = if c.is_ascii_uppercase() { "_" } else { "" };
        format!("{name}{mark}{}", c.to_ascii_uppercase())
    })
}

#[cfg(test)]
mod tests {
    use cryptoki::context::Function;

    use super::*;
    use crate::outcome::{Classify, Verdict};

    #[test]
    fn codes_are_called_by_their_names_and_end_as_they_should() {
        let key = Arc::new("pkcs11:token=a;object=b?module-path=/m.so".parse().unwrap());
        for (code, part, retry, again) in [
            (RvError::PinIncorrect, "CKR_PIN_INCORRECT to C_Sign", false, false),
            (RvError::PinLocked, "CKR_PIN_LOCKED", false, false),
            (RvError::SessionHandleInvalid, "CKR_SESSION_HANDLE_INVALID", true, true),
            (RvError::TokenNotPresent, "CKR_TOKEN_NOT_PRESENT", true, true),
            (RvError::DeviceRemoved, "CKR_DEVICE_REMOVED", true, true),
            (RvError::UserNotLoggedIn, "CKR_USER_NOT_LOGGED_IN", true, true),
            (RvError::SessionCount, "CKR_SESSION_COUNT", true, false),
            (RvError::MechanismInvalid, "CKR_MECHANISM_INVALID", false, false),
            (RvError::KeyFunctionNotPermitted, "CKA_SIGN", false, false),
        ] {
            let fault = Fault::Module(ModuleError::Pkcs11(code, Function::Sign));
            assert_eq!(fault.may_pass(), again, "{code:?}");
            let error = fault.into_error(&key);
            assert!(error.to_string().contains(part), "{error}");
            assert_eq!(matches!(error.verdict(), Verdict::Retry { .. }), retry, "{error}");
        }
    }
}
