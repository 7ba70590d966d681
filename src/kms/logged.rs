use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
};

use tracing::instrument::WithSubscriber;

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

/// Everything that is logged while this runs, by all who log, down to traces.
pub(super) async fn logged(run: impl Future<Output = ()>) -> String {
    let log = Log::default();
    let sink = log.clone();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || sink.clone()).finish();
    async {
        // Another test may have met an event's place first, and that nobody listened would be remembered of it.
        tracing::callsite::rebuild_interest_cache();
        run.await;
    }
    .with_subscriber(subscriber)
    .await;
    String::from_utf8_lossy(&log.0.lock().unwrap()).into_owned()
}
