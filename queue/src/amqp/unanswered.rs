//! Pushes that the broker has answered with neither yes nor no, because it or the connection died over them.
//!
//! Whoever pushed was told that it failed, and pushes again, as another message. But each copy of the first one, that in its
//! partition and that in the past, is there or is not, as chance has it: it may be handled and not counted, or counted and
//! never handled. So as soon as there is a connection, what is missing is sent again under the id that it had, and then it is
//! in both, once in the past. A second copy in its partition is what any redelivery is.
//!
//! When a connection ends they are kept in a file as well, for a process that is killed before the broker is back.

use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt as _, TryStreamExt as _, future::join_all, stream};
use jiff::Timestamp;
use rusqlite::{Connection, params};
use tokio::{sync::oneshot, task::spawn_blocking, time::sleep};

use super::{
    Core,
    envelope::Envelope,
    lock,
    session::{Session, Word},
    stats::BEAT,
};
use crate::{Error, Message, PartitionKey};

/// Those that are remembered, at most: so many are hardly ever under way at once.
const REMEMBERED: usize = 10_000;
/// How long the broker may take to be done with what came by an earlier connection.
const MARGIN: Duration = Duration::from_secs(3);
/// The longest pause while they cannot be sent again.
const LONGEST: Duration = Duration::from_secs(60);
/// Sent again at once.
const AT_ONCE: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Unanswered {
    pushes: Mutex<HashMap<u64, Push>>,
    next: AtomicU64,
    file: Option<PathBuf>,
    /// Something is in the file.
    is_filed: AtomicBool,
}

#[derive(Clone, Debug)]
struct Push {
    envelope: Arc<Envelope>,
    /// The connection that it was sent by.
    session: u64,
    /// Its answer may still come.
    is_awaited: bool,
}

impl Unanswered {
    /// With what an earlier process left in this file.
    pub async fn open(file: Option<PathBuf>) -> Self {
        let unanswered = Self { file, ..Self::default() };
        let Some(path) = unanswered.file.clone().filter(|path| path.exists()) else { return unanswered };
        match on_file(path, read).await {
            Ok(left) => {
                unanswered.next.store(left.len() as u64, Ordering::Relaxed);
                unanswered.is_filed.store(true, Ordering::Relaxed);
                let left = left.into_iter().map(|envelope| Push { envelope: envelope.into(), session: 0, is_awaited: false });
                *lock(&unanswered.pushes) = (0..).zip(left).collect();
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "what was pushed last before the broker went away cannot be read: the totals may be wrong by as many"
            ),
        }
        unanswered
    }

    /// Writes down those whose answers will not come any more, with this session if there is one.
    pub async fn keep(&self, session: Option<&Session>) {
        let Some(path) = self.file.clone() else { return };
        let left: Vec<_> = self.left(session).into_values().collect();
        let is_filed = !left.is_empty();
        if !self.is_filed.swap(is_filed, Ordering::Relaxed) && !is_filed {
            return;
        }
        if let Err(error) = on_file(path, move |path| write(path, &left)).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "what the broker has not answered cannot be written down: if this process ends before the broker is back, the \
                 totals may be wrong by as many"
            );
        }
    }

    fn begin(&self, envelope: &Arc<Envelope>, session: &Session) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut pushes = lock(&self.pushes);
        if pushes.len() < REMEMBERED {
            pushes.insert(number, Push { envelope: Arc::clone(envelope), session: session.number, is_awaited: true });
        }
        number
    }

    fn forget(&self, number: u64) {
        lock(&self.pushes).remove(&number);
    }

    fn not_taken(&self, number: u64) {
        if let Some(push) = lock(&self.pushes).get_mut(&number) {
            push.is_awaited = false;
        }
    }

    fn left(&self, session: Option<&Session>) -> HashMap<u64, Arc<Envelope>> {
        let (pushes, session) = (lock(&self.pushes), session.map(|session| session.number));
        let left = pushes.iter().filter(|(_, push)| !push.is_awaited || Some(push.session) != session);
        left.map(|(number, push)| (*number, Arc::clone(&push.envelope))).collect()
    }
}

/// Has messages kept, and counted. What becomes of them is found out even if the caller goes away.
pub(super) async fn push(core: &Arc<Core>, session: &Arc<Session>, envelopes: Vec<Envelope>) -> Result<(), Error> {
    // What would have to wait is not sent.
    session.takes()?;
    send(core, session, envelopes).await
}

async fn send(core: &Arc<Core>, session: &Arc<Session>, envelopes: Vec<Envelope>) -> Result<(), Error> {
    let exchange = core.topology.accept();
    let (mut sending, mut keeping) = (Vec::with_capacity(envelopes.len()), Vec::with_capacity(envelopes.len()));
    for envelope in envelopes {
        let route = core.topology.layout().route(&envelope.message.key);
        let (tell, told) = oneshot::channel();
        sending.push(send_one(Arc::clone(core), Arc::clone(session), route.clone(), envelope, tell));
        let exchange = &exchange;
        keeping.push(async move {
            let answer = async {
                match told.await {
                    Ok(answer) => answer,
                    // The session is over.
                    Err(_) => std::future::pending().await,
                }
            };
            session.kept(exchange, &route, answer).await
        });
    }
    core.tracker.spawn(join_all(sending));
    join_all(keeping).await.into_iter().collect()
}

async fn send_one(
    core: Arc<Core>,
    session: Arc<Session>,
    route: String,
    envelope: Envelope,
    tell: oneshot::Sender<lapin::Result<Word>>,
) {
    let envelope = Arc::new(envelope);
    let number = core.unanswered.begin(&envelope, &session);
    let (exchange, sent) = (core.topology.accept(), core.past.pushed.sending(&session));
    let sending = session.send(&exchange, &route, sent.stamp(envelope.properties()), &envelope.message.body);
    let answer = tokio::select! {
        biased;
        answer = sending => answer,
        () = session.failed() => return,
    };
    if matches!(answer, Ok(Word::Kept)) {
        core.past.pushed.confirmed(sent);
        core.unanswered.forget(number);
    } else {
        core.unanswered.not_taken(number);
    }
    // They may have gone away.
    let _ = tell.send(answer);
}

/// Sees to what is left, for ever.
pub(super) async fn watch(core: &Arc<Core>, session: &Arc<Session>) {
    sleep(MARGIN).await;
    let mut pause = BEAT;
    loop {
        let left = core.unanswered.left(Some(session));
        if left.is_empty() {
            pause = BEAT;
        } else if let Err(error) = send_again(core, session, left).await {
            let error = &error as &dyn std::error::Error;
            tracing::debug!(error, "what the broker has not answered is seen to again later");
            // Looking costs more each time.
            pause = LONGEST.min(2 * pause);
        }
        sleep(pause).await;
    }
}

async fn send_again(core: &Arc<Core>, session: &Arc<Session>, left: HashMap<u64, Arc<Envelope>>) -> Result<(), Error> {
    session.takes()?;
    let first = left.values().map(|envelope| envelope.pushed_at).min().unwrap_or(Timestamp::MAX);
    let counted: HashSet<String> = core.past.ids_since(core, session, first).await?;
    let many = left.len();
    let sending = left.into_iter().map(async |(number, envelope)| {
        let copy = Envelope::clone(&envelope);
        if counted.contains(&copy.message.id) {
            core.put_off(session, copy, Duration::ZERO).await?;
            core.unanswered.forget(number);
            return Ok(());
        }
        // From here on this is another push. The past is in the order of time.
        core.unanswered.forget(number);
        send(core, session, vec![Envelope { pushed_at: core.now(), ..copy }]).await
    });
    stream::iter(sending).buffer_unordered(AT_ONCE).try_collect::<Vec<()>>().await?;
    tracing::info!(many, "what the broker had not answered is with it now");
    core.unanswered.keep(Some(session)).await;
    Ok(())
}

async fn on_file<T: Send + 'static>(
    path: PathBuf,
    work: impl FnOnce(&Path) -> rusqlite::Result<T> + Send + 'static,
) -> io::Result<T> {
    let shown = path.display().to_string();
    let done = spawn_blocking(move || work(&path)).await?;
    done.map_err(|error| io::Error::other(format!("{shown}: {error}")))
}

fn open(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.execute_batch(
        "CREATE TABLE IF NOT EXISTS message (
            id TEXT NOT NULL,
            content_type TEXT NOT NULL,
            partition_key TEXT NOT NULL,
            replay_of TEXT,
            pushed_at INTEGER NOT NULL, -- nanoseconds since 1970
            body BLOB NOT NULL
        ) STRICT",
    )?;
    Ok(connection)
}

fn write(path: &Path, envelopes: &[Arc<Envelope>]) -> rusqlite::Result<()> {
    let mut connection = open(path)?;
    let transaction = connection.transaction()?;
    transaction.execute("DELETE FROM message", [])?;
    for Envelope { message, pushed_at, .. } in envelopes.iter().map(AsRef::as_ref) {
        let pushed_at = i64::try_from(pushed_at.as_nanosecond()).unwrap_or(i64::MAX);
        transaction.execute(
            "INSERT INTO message VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            params![message.id, message.content_type, message.key.0, message.replay_of, pushed_at, &message.body[..]],
        )?;
    }
    transaction.commit()
}

fn read(path: &Path) -> rusqlite::Result<Vec<Envelope>> {
    let connection = open(path)?;
    let mut rows = connection.prepare("SELECT id, content_type, partition_key, replay_of, pushed_at, body FROM message")?;
    let envelopes = rows.query_map([], |row| {
        let message = Message {
            id: row.get(0)?,
            content_type: row.get(1)?,
            key: PartitionKey(row.get(2)?),
            replay_of: row.get(3)?,
            body: row.get::<_, Vec<u8>>(5)?.into(),
        };
        let pushed_at = Timestamp::from_nanosecond(row.get::<_, i64>(4)?.into()).unwrap_or(Timestamp::MIN);
        Ok(Envelope::new(message, pushed_at))
    })?;
    envelopes.collect()
}
