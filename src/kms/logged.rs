use std::{
    io::{self, Write},
    sync::{Arc, LazyLock, Mutex},
};

use tracing::{Dispatch, instrument::WithSubscriber as _};

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A second one who listens. While there is just one, whoever meets an event's place first and has nobody listening on their own
/// thread, as another test has, makes it silent for all.
static SECOND: LazyLock<Dispatch> = LazyLock::new(|| Dispatch::new(tracing_subscriber::registry()));

/// Everything that is logged while this runs, by all who log, down to traces.
pub(super) async fn logged(run: impl Future<Output = ()>) -> String {
    LazyLock::force(&SECOND);
    let log = Log::default();
    let sink = log.clone();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || sink.clone()).finish();
    run.with_subscriber(subscriber).await;
    String::from_utf8_lossy(&log.0.lock().unwrap()).into_owned()
}
