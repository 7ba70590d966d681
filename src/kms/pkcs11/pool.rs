use std::{
    collections::HashMap,
    fmt, io, mem,
    sync::{
        Arc, LazyLock, Mutex, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::timeout,
};

use super::module::locked;
use crate::kms::{Error, KeyUri};

/// Threads that wait for a module in the place of the async ones, each at work with a state `S` of its own: a session. They are
/// made when they are needed, at most [`THREADS`] for one key in this process, whatever becomes of them: a module that never
/// answers keeps its threads, and no others are made for them.
pub(super) struct Pool<S> {
    uri: Arc<KeyUri>,
    idle: Mutex<Vec<Idle<S>>>,
    free: Arc<Semaphore>,
    /// Threads whose callers have given them up.
    stuck: AtomicUsize,
}

/// Sessions are cheap, but tokens count them.
pub(super) const THREADS: usize = 8;
/// For loading a module, logging in and the slowest smart card's largest key; then the caller is told.
const ANSWER: Duration = Duration::from_secs(10);

struct Idle<S> {
    thread: Sender<Job<S>>,
    state: S,
}

struct Job<S> {
    work: Box<dyn FnOnce(&mut S) -> Tell + Send>,
    /// Who does it, and is idle again afterwards.
    by: Idle<S>,
    pool: Arc<Pool<S>>,
    turn: OwnedSemaphorePermit,
    given_up: Arc<AtomicBool>,
}

type Tell = Box<dyn FnOnce() + Send>;

impl<S: Default + Send + 'static> Pool<S> {
    /// The one pool of a key. It is there as long as something uses it, a thread that hangs included: opening a key again and
    /// again makes no more threads.
    pub(super) fn of(uri: &Arc<KeyUri>, all: &'static LazyLock<Pools<S>>) -> Arc<Self> {
        let mut pools = locked(all);
        pools.retain(|_, pool| pool.strong_count() > 0);
        if let Some(pool) = pools.get(uri.as_ref()).and_then(Weak::upgrade) {
            return pool;
        }
        let free = Arc::new(Semaphore::new(THREADS));
        let pool = Arc::new(Self { uri: Arc::clone(uri), idle: Mutex::default(), free, stuck: AtomicUsize::new(0) });
        pools.insert(uri.as_ref().clone(), Arc::downgrade(&pool));
        pool
    }

    /// Those that there are.
    pub(super) fn all(all: &'static LazyLock<Pools<S>>) -> Vec<Arc<Self>> {
        locked(all).values().filter_map(Weak::upgrade).collect()
    }

    pub(super) fn uri(&self) -> &KeyUri {
        &self.uri
    }

    /// Has this done on one of the threads. After [`ANSWER`] the caller is told that the module does not answer, and the thread
    /// is left to it.
    pub(super) async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&mut S) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let turn = self.turn().await?;
        let (tell, told) = oneshot::channel();
        let given_up = Arc::new(AtomicBool::new(false));
        let work = Box::new(move |state: &mut S| {
            let result = work(state);
            Box::new(move || drop(tell.send(result))) as Tell
        });
        let idle = locked(&self.idle).pop();
        let by = idle.map_or_else(start, Ok).map_err(|error| self.unreachable(format!("no thread to ask it by: {error}")))?;
        let (pool, given) = (Arc::clone(self), Arc::clone(&given_up));
        // It fails, and drops the job, if the thread has died; then nobody tells.
        let _ = by.thread.clone().send(Job { work, by, pool, turn, given_up: given });
        match timeout(ANSWER, told).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(self.unreachable("the thread that asked it died".to_owned())),
            Err(_) => {
                if !given_up.swap(true, Ordering::AcqRel) {
                    self.stuck.fetch_add(1, Ordering::AcqRel);
                }
                let what = format!("none after {ANSWER:?}; {} of its {THREADS} sessions hang", self.stuck());
                tracing::warn!(key = %self.uri, stuck = self.stuck(), of = THREADS, "the module does not answer");
                Err(self.unreachable(what))
            }
        }
    }

    /// Takes their states from those who do nothing now. Dropping them may call the module.
    pub(super) fn idle_states(&self) -> Vec<S> {
        locked(&self.idle).iter_mut().map(|idle| mem::take(&mut idle.state)).collect()
    }

    /// Waits while all threads are at work, but not while all hang.
    async fn turn(&self) -> Result<OwnedSemaphorePermit, Error> {
        loop {
            if self.stuck() == THREADS {
                return Err(self.unreachable(format!("all its {THREADS} sessions hang: restart countersign if that lasts")));
            }
            if let Ok(turn) = timeout(ANSWER, Arc::clone(&self.free).acquire_owned()).await {
                return Ok(turn.expect("the semaphore is never closed"));
            }
        }
    }

    pub(super) fn stuck(&self) -> usize {
        self.stuck.load(Ordering::Acquire)
    }

    fn unreachable(&self, what: String) -> Error {
        let at = "its PKCS#11 module".to_owned();
        Error::Unreachable { key: Arc::clone(&self.uri), at, source: io::Error::other(what).into() }
    }
}

/// By the key's URI.
pub(super) type Pools<S> = Mutex<HashMap<KeyUri, Weak<Pool<S>>>>;

impl<S> fmt::Debug for Pool<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("free", &self.free.available_permits()).field("stuck", &self.stuck).finish_non_exhaustive()
    }
}

fn start<S: Default + Send + 'static>() -> io::Result<Idle<S>> {
    let (thread, jobs) = channel();
    thread::Builder::new().name("pkcs11".to_owned()).spawn(move || work(&jobs))?;
    Ok(Idle { thread, state: S::default() })
}

/// Until the pool is gone, and with it all that could send something.
fn work<S>(jobs: &Receiver<Job<S>>) {
    while let Ok(Job { work, mut by, pool, turn, given_up }) = jobs.recv() {
        let tell = work(&mut by.state);
        if given_up.swap(true, Ordering::AcqRel) {
            pool.stuck.fetch_sub(1, Ordering::AcqRel);
        }
        // Before the caller knows, so that the next one takes this thread and needs no other.
        locked(&pool.idle).push(by);
        drop(turn);
        drop(pool);
        tell();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Condvar;

    use super::*;

    fn pool(name: &str, all: &'static LazyLock<Pools<usize>>) -> Arc<Pool<usize>> {
        Pool::of(&Arc::new(format!("pkcs11:token={name};object=b?module-path=/m.so").parse().unwrap()), all)
    }

    static POOLS: LazyLock<Pools<usize>> = LazyLock::new(Mutex::default);

    #[tokio::test]
    async fn one_after_the_other_needs_one_thread_and_it_keeps_its_state() {
        let pool = pool("sequence", &POOLS);
        for before in 0..20 {
            let counted = pool.run(move |state| {
                *state += 1;
                Ok(*state)
            });
            assert_eq!(counted.await.unwrap(), before + 1);
        }
        assert_eq!(pool.idle_states(), [20]);
        assert_eq!(pool.run(|state| Ok(*state)).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn what_hangs_is_given_up_counted_and_bounded_and_comes_back() {
        let gate = Arc::new((Mutex::new(false), Condvar::new()));
        let hang = || {
            let gate = Arc::clone(&gate);
            move |_: &mut usize| {
                let open = gate.0.lock().unwrap();
                drop(gate.1.wait_while(open, |open| !*open).unwrap());
                Ok(())
            }
        };
        // Time passes while the threads hang.
        tokio::time::pause();
        for hanging in 1..=THREADS {
            // Whoever opens the key again gets the same threads.
            let error = pool("hanging", &POOLS).run(hang()).await.unwrap_err();
            assert!(matches!(error, Error::Unreachable { .. }), "{error}");
            let source = std::error::Error::source(&error).unwrap().to_string();
            assert!(source.contains(&format!("{hanging} of its 8 sessions hang")), "{source}");
        }
        let pool = pool("hanging", &POOLS);
        let error = pool.run(hang()).await.unwrap_err();
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("all its 8"), "{error:?}");
        tokio::time::resume();
        *gate.0.lock().unwrap() = true;
        gate.1.notify_all();
        let all = Arc::clone(&pool.free).acquire_many_owned(u32::try_from(THREADS).unwrap()).await.unwrap();
        assert_eq!(pool.stuck(), 0);
        drop(all);
        pool.run(|_| Ok(())).await.unwrap();
        assert_eq!(locked(&pool.idle).len(), THREADS);
    }

    #[tokio::test]
    async fn a_thread_that_dies_is_replaced() {
        let pool = pool("dying", &POOLS);
        let died = pool.run::<()>(|_| panic!("the module crashed")).await;
        assert!(matches!(died, Err(Error::Unreachable { .. })), "{died:?}");
        pool.run(|_| Ok(())).await.unwrap();
        // The dead one's turn is over, too, as soon as it has been taken apart.
        drop(pool.free.acquire_many(u32::try_from(THREADS).unwrap()).await.unwrap());
    }

    #[tokio::test]
    async fn a_caller_that_leaves_costs_nothing() {
        let pool = pool("leaving", &POOLS);
        drop(futures::poll!(Box::pin(pool.run(|_| Ok(())))));
        let all = Arc::clone(&pool.free).acquire_many_owned(u32::try_from(THREADS).unwrap()).await;
        drop(all.unwrap());
        pool.run(|_| Ok(())).await.unwrap();
    }
}
