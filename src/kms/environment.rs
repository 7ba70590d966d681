use std::{fmt, sync::Arc};

/// The environment variables that a provider takes its settings and credentials from; tests say what they are.
#[derive(Clone)]
pub struct Environment(Arc<Lookup>);

type Lookup = dyn Fn(&str) -> Option<String> + Send + Sync;

impl Environment {
    /// This process's own.
    #[must_use]
    pub fn system() -> Self {
        Self(Arc::new(|name| std::env::var(name).ok()))
    }

    /// These and no others.
    #[must_use]
    pub fn of<const N: usize>(variables: [(&str, &str); N]) -> Self {
        Self::of_all(variables)
    }

    /// The same.
    pub fn of_all<'a>(variables: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let variables: Vec<_> = variables.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Self(Arc::new(move |asked| variables.iter().find(|(name, _)| name == asked).map(|(_, value)| value.clone())))
    }

    /// An empty variable counts as none, as in AWS's own tools.
    pub(in crate::kms) fn get(&self, name: &str) -> Option<String> {
        (self.0)(name).filter(|value| !value.is_empty())
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Some of it is secret.
        f.write_str("Environment")
    }
}
