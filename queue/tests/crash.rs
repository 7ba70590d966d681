//! The embedded queue and what machines do to it: processes that are killed, logs that end torn, disks that are full or fail.

#[path = "crash/child.rs"]
mod child;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::mpsc,
    thread,
    time::Duration,
};

use child::{message, random, said, start};
use countersign_queue::{Embedded, Error, Options, Queue};
use jiff::Timestamp;
use tempfile::{TempDir, tempdir};

/// What a child said of a message: each word once is enough.
type Story = HashMap<String, HashSet<String>>;

#[tokio::test]
async fn killed_at_any_point_nothing_confirmed_is_lost_and_the_sums_are_right() {
    let folder = tempdir().unwrap();
    let count = |story: &Story, word: &str| story.values().filter(|words| words.contains(word)).count();
    // On a busy machine a child has hardly begun when it is killed.
    let is_enough = |story: &Story| count(story, "acked") > 100 && count(story, "buried") > 10;
    let (story, queue) = kill_again_and_again("load", folder.path(), 40, is_enough).await;
    check_history(&queue, &story).await;
    check_each(&queue, &story).await;
    drop(queue);
    check_bytes(folder.path());
}

#[tokio::test]
async fn killed_while_it_forgets_it_forgets_nothing_that_is_queued_or_dead() {
    let folder = tempdir().unwrap();
    let (story, queue) = kill_again_and_again("load in little room", folder.path(), 20, |_| true).await;
    check_each(&queue, &story).await;
    drop(queue);
    check_bytes(folder.path());
}

/// So many rounds, and more until the children have said enough. Gives what they said, and the queue that they left.
async fn kill_again_and_again(role: &str, folder: &Path, rounds: usize, is_enough: impl Fn(&Story) -> bool) -> (Story, Embedded) {
    let mut story = Story::new();
    for round in 0.. {
        if round >= rounds && is_enough(&story) {
            break;
        }
        assert!(round < 20 * rounds, "the rounds were too short to say anything");
        let mut child = start(role, folder, round, &[]);
        let output = BufReader::new(child.stdout.take().unwrap());
        let reader = thread::spawn(move || output.split(b'\n').map(Result::unwrap).collect::<Vec<_>>());
        // From before it is open to well into its work.
        thread::sleep(Duration::from_micros(random(160_000)));
        kill(&mut child);
        for line in reader.join().unwrap() {
            if let Some(words) = said(&String::from_utf8(line).unwrap()) {
                for id in &words[1..] {
                    story.entry((*id).to_owned()).or_default().insert(words[0].to_owned());
                }
            }
        }
        // Not every time: opened by a child again, its log is still what the last one left.
        if round % 5 == 4 {
            check_sums(&open(folder), &story).await;
        }
    }
    let queue = open(folder);
    check_sums(&queue, &story).await;
    (story, queue)
}

/// All that was pushed is there once, and nothing else.
async fn check_history(queue: &Embedded, story: &Story) {
    let mut kept = HashSet::new();
    let mut after = None;
    loop {
        let page = queue.history(Timestamp::MIN, Timestamp::MAX, after.as_deref(), 100).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.cursor.clone());
        for one in page {
            assert_eq!(one.message.body, message(&one.message.id, 0).body);
            assert!(story[&one.message.id].contains("pushing"), "something nobody pushed");
            assert!(kept.insert(one.message.id), "there twice");
        }
    }
    for (id, words) in story {
        assert!(kept.contains(id) || !words.contains("pushed"), "{id} is forgotten: {words:?}");
    }
}

/// The room that is taken is counted right.
fn check_bytes(folder: &Path) {
    let connection = rusqlite::Connection::open(folder.join("queue.db")).unwrap();
    let sql = "SELECT bytes = (SELECT coalesce(sum(length(body) + 512), 0) FROM message) FROM totals";
    assert!(connection.query_row(sql, [], |row| row.get::<_, bool>(0)).unwrap());
}

/// pushed = acked + queued + dead + discarded, as far as the children lived to say what they did.
async fn check_sums(queue: &Embedded, story: &Story) {
    let stats = queue.stats().await.unwrap();
    let count = |word| story.values().filter(|words| words.contains(word)).count() as u64;
    let within = |done, doing, number| assert!((count(done)..=count(doing)).contains(&number), "{done}: {number} in {stats:?}");
    within("pushed", "pushing", stats.pushed_total);
    within("discarded", "discarding", stats.discarded_total);
    within("acked", "acking", stats.pushed_total - stats.queued() - stats.dead - stats.discarded_total);
    assert_eq!(stats.in_flight, 0);
}

async fn check_each(queue: &Embedded, story: &Story) {
    let mut dead = HashSet::new();
    loop {
        let letters = queue.dead_letters(None, 100).await.unwrap();
        if letters.is_empty() {
            break;
        }
        for letter in letters {
            let id = letter.message.id;
            assert_eq!(letter.message.body, message(&id, 0).body);
            queue.discard(&id).await.unwrap();
            dead.insert(id);
        }
    }
    let queued = drain(queue).await;
    assert!(dead.is_disjoint(&queued));
    for (id, words) in story {
        let did = |word| words.contains(word);
        let is_there = queued.contains(id) || dead.contains(id);
        if did("pushed") && !did("acking") && !did("discarding") {
            assert!(is_there, "{id} is lost: {words:?}");
        }
        if did("acked") || did("discarded") {
            assert!(!is_there, "{id} is back: {words:?}");
        }
        if did("buried") && !did("replaying") && !did("discarding") {
            assert!(dead.contains(id), "{id} is not buried any more: {words:?}");
        }
    }
    assert!(queued.union(&dead).all(|id| story.contains_key(id)), "something nobody pushed");
}

#[tokio::test]
async fn log_that_ends_anywhere_opens_with_all_that_was_confirmed_before() {
    let folder = tempdir().unwrap();
    let confirmed = killed_after_a_sequence(folder.path());
    let length = confirmed.last().unwrap().1;
    for round in 0..60 {
        let end = if round == 0 { 0 } else { random(length) };
        let copy = copy(folder.path());
        fs::File::options().write(true).open(copy.path().join("queue.db-wal")).unwrap().set_len(end).unwrap();
        check_prefix(copy.path(), &confirmed, end).await;
    }
}

#[tokio::test]
async fn log_with_a_garbled_end_opens_with_all_that_was_confirmed_before() {
    let folder = tempdir().unwrap();
    let confirmed = killed_after_a_sequence(folder.path());
    let length = confirmed.last().unwrap().1;
    for round in 0..60_u64 {
        let copy = copy(folder.path());
        let path = copy.path().join("queue.db-wal");
        let mut log = fs::read(&path).unwrap();
        // From there on nothing arrived, or something else, or only some of the sectors.
        let begin = random(length);
        for (n, byte) in log.iter_mut().enumerate().skip(usize::try_from(begin).unwrap()) {
            match round % 3 {
                0 => *byte = 0,
                1 => *byte = !*byte,
                _ if n / 512 % 2 == 0 => *byte ^= 1,
                _ => {}
            }
        }
        fs::write(&path, log).unwrap();
        // With the last variant the first sector that differs may be the next one.
        check_prefix(copy.path(), &confirmed, begin).await;
    }
}

/// Messages in the order of their pushes, each with the length of the log when it was confirmed.
fn killed_after_a_sequence(folder: &Path) -> Vec<(String, u64)> {
    let mut child = start("sequence", folder, 0, &[]);
    let mut confirmed = Vec::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        match said(&line.unwrap()).as_deref() {
            Some(["pushed", id, length]) => confirmed.push(((*id).to_owned(), length.parse().unwrap())),
            Some(["done"]) => break,
            _ => {}
        }
    }
    kill(&mut child);
    assert_eq!(confirmed.len(), 120);
    confirmed
}

/// The queue opens, with a prefix of the messages that holds all that were confirmed when the log was this long.
async fn check_prefix(folder: &Path, confirmed: &[(String, u64)], length: u64) {
    let queue = open(folder);
    let found = usize::try_from(queue.stats().await.unwrap().pushed_total).unwrap();
    let expected = confirmed.iter().filter(|(_, end)| *end <= length).count();
    assert!(found >= expected, "{found} messages, but {expected} were confirmed when the log had {length} bytes");
    let there: HashSet<_> = confirmed[..found].iter().map(|(id, _)| id.clone()).collect();
    assert_eq!(drain(&queue).await, there);
    queue.push(vec![message("afterwards", 1)]).await.unwrap();
}

#[test]
fn second_process_is_refused_and_told_who_has_the_folder() {
    let folder = tempdir().unwrap();
    let mut child = start("hold", folder.path(), 0, &[]);
    wait_for(&mut BufReader::new(child.stdout.take().unwrap()), "open");
    let error = try_open(folder.path()).unwrap_err();
    assert!(matches!(error, Error::InUse { holder: Some(pid), .. } if pid == child.id()), "{error:?}");
    kill(&mut child);
    open(folder.path());
}

#[tokio::test]
async fn full_disk_refuses_loses_nothing_and_recovers_by_itself() {
    let parent = tempdir().unwrap();
    let Some(disk) = Mount::tmpfs(parent.path(), "4m") else {
        eprintln!("NOT TESTED: a full file system, because mounting a tmpfs is refused here (it takes root).");
        eprintln!("The test with a limit on the size of files, which takes no privilege, covers the same code.");
        return;
    };
    let refusals = starve(&disk.0.join("queue"), &[], |_| disk.resize("64m")).await;
    assert!(refusals[0].contains("is full: make room there"), "{refusals:?}");
}

#[tokio::test]
async fn limit_on_the_size_of_files_refuses_loses_nothing_and_recovers_by_itself() {
    let folder = tempdir().unwrap();
    let limited = ["bash", "-c", r#"trap "" XFSZ; ulimit -S -f 2000; exec "$0" "$@""#];
    let refusals = starve(&folder.path().join("queue"), &limited, |pid| {
        let raised = Command::new("prlimit").args(["--pid", &pid.to_string(), "--fsize=unlimited"]).status().unwrap();
        assert!(raised.success());
    })
    .await;
    assert!(refusals[0].contains("the disk of"), "{refusals:?}");
}

#[tokio::test]
async fn failing_syncs_refuse_lose_nothing_and_are_recovered_from() {
    if Command::new("strace").arg("-V").output().is_err() {
        eprintln!("NOT TESTED: failing syncs, because strace is not installed.");
        return;
    }
    for failing in ["30", "60..63", "20..50+3"] {
        let folder = tempdir().unwrap();
        let inject = format!("inject=fdatasync,fsync:error=EIO:when={failing}");
        let faulty = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync,fsync", "-e", &inject];
        starve(&folder.path().join("queue"), &faulty, |_| {}).await;
    }
}

/// Runs a child on a disk that refuses, `cure`s the disk (given the child's pid) once it has refused ten pushes, and checks
/// that in the end exactly what was confirmed and not handled is in the queue. Gives what the refusals said.
async fn starve(folder: &Path, wrapper: &[&str], cure: impl FnOnce(u32)) -> Vec<String> {
    let mut child = start("stubborn", folder, 0, wrapper);
    let mut cure = Some(cure);
    let (mut pushed, mut handled, mut refused) = (HashSet::new(), BTreeSet::new(), Vec::new());
    let (sender, lines) = mpsc::channel();
    let output = BufReader::new(child.stdout.take().unwrap());
    let reader = thread::spawn(move || output.lines().for_each(|line| drop(sender.send(line.unwrap()))));
    let queued: usize = loop {
        let line = lines.recv_timeout(Duration::from_secs(60)).expect("the child ended or hangs");
        match said(&line).as_deref() {
            Some(["pushed", id]) => assert!(pushed.insert((*id).to_owned())),
            Some(["acked" | "unwritten", id]) => assert!(handled.insert((*id).to_owned()), "{id} was delivered again"),
            Some(["refused", _, why @ ..]) => refused.push(why.join(" ")),
            Some(["done", queued]) => break queued.parse().unwrap(),
            _ => {}
        }
        if refused.len() == 10
            && let Some(cure) = cure.take()
        {
            cure(child.id());
        }
    };
    kill_with_children(&mut child);
    reader.join().unwrap();
    let left: HashSet<_> = pushed.into_iter().filter(|id| !handled.contains(id)).collect();
    assert_eq!(queued, left.len());
    assert_eq!(drain(&open(folder)).await, left);
    assert!(!refused.is_empty(), "the disk never refused");
    refused
}

/// Takes everything out, checks it, and acks it.
async fn drain(queue: &Embedded) -> HashSet<String> {
    let mut drained = HashSet::new();
    while queue.stats().await.unwrap().queued() > 0 {
        let delivery = tokio::time::timeout(Duration::from_secs(60), queue.pull()).await.unwrap().unwrap().unwrap();
        let id = delivery.message().id.clone();
        assert_eq!(delivery.message().body, message(&id, 0).body);
        delivery.ack().await.unwrap();
        assert!(drained.insert(id), "delivered twice");
    }
    drained
}

fn open(folder: &Path) -> Embedded {
    try_open(folder).unwrap()
}

fn try_open(folder: &Path) -> Result<Embedded, Error> {
    #[expect(clippy::disallowed_methods, reason = "its peers are other processes, in real time")]
    Embedded::open(folder, Options::new(Timestamp::now))
}

fn copy(folder: &Path) -> TempDir {
    let copy = tempdir().unwrap();
    for name in ["queue.db", "queue.db-wal"] {
        fs::copy(folder.join(name), copy.path().join(name)).unwrap();
    }
    copy
}

fn wait_for(output: &mut impl std::io::BufRead, word: &str) {
    let mut lines = output.lines().map(Result::unwrap);
    assert!(lines.any(|line| said(&line).is_some_and(|words| words == [word])), "it never said {word}");
}

/// With signal 9, and only this process.
fn kill(child: &mut Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

/// As [`kill`], for one that runs below a tracer, which would let go of it and leave it running.
fn kill_with_children(child: &mut Child) {
    let pid = child.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    for pid in children.split_whitespace() {
        Command::new("kill").args(["-9", pid]).status().unwrap();
    }
    kill(child);
}

/// A small file system, for as long as this lives.
struct Mount(PathBuf);

impl Mount {
    fn tmpfs(at: &Path, size: &str) -> Option<Self> {
        let options = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).status();
        mounted.is_ok_and(|status| status.success()).then(|| Self(at.to_path_buf()))
    }

    fn resize(&self, size: &str) {
        let resized = Command::new("mount").args(["-o", &format!("remount,size={size}")]).arg(&self.0).status();
        assert!(resized.unwrap().success());
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
