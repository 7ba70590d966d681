//! Killed, shared and out of space: each with a real process, which is this test program again.

use std::{
    env,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Instant,
};

use futures::{StreamExt, future::join_all, stream};

use super::*;

on_each_backend!(what_was_promised_is_there_and_adds_up_however_often_it_is_killed, two_processes_write_one_ledger,);

const ROLE: &str = "LEDGER_TEST_ROLE";
const NAME: &str = "LEDGER_TEST_NAME";
const FIRST: &str = "LEDGER_TEST_FIRST";

/// Runs `role` below on the ledger at `place`. `shell` is what bash does first.
fn start(role: &str, place: &Place, first: u32, shell: &str) -> Child {
    let program = env::current_exe().unwrap();
    Command::new("bash")
        .args(["-c", &format!("{shell} exec \"$0\" --exact ledger::tests::processes::child --ignored --nocapture -q")])
        .arg(program)
        .env(ROLE, role)
        .env(NAME, place.name())
        .env(FIRST, first.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The lines that a child says, as it says them.
fn listen(child: &mut Child) -> mpsc::Receiver<String> {
    let (to, lines) = mpsc::channel();
    let out = BufReader::new(child.stdout.take().unwrap());
    thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|line| to.send(line)));
    lines
}

#[tokio::test]
#[ignore = "is what the tests here start"]
async fn child() {
    let Ok(role) = env::var(ROLE) else { return };
    let ledger = open(&env::var(NAME).unwrap(), Clock::system()).unwrap();
    let first = env::var(FIRST).unwrap().parse().unwrap();
    match role.as_str() {
        "sign until killed" => sign_until_killed(&ledger, first).await,
        "sign three hundred" => sign(&ledger, first..first + 300).await,
        "fill the disk" => fill_the_disk(&ledger).await,
        other => panic!("{other}"),
    }
}

fn outcome_of(n: u32) -> Outcome {
    match n % 6 {
        0 => Outcome::Signed,
        1 => Outcome::AlreadySigned,
        2 => Outcome::Skipped(Skip::NoRule),
        3 => Outcome::Skipped(Skip::Superseded),
        4 => Outcome::Retrying,
        _ => Outcome::Dead,
    }
}

async fn sign(ledger: &Ledger, events: impl Iterator<Item = u32>) {
    let one = async |n| {
        ledger.intend(vec![intent(n)]).await.unwrap();
        ledger.conclude(conclusion(n, outcome_of(n))).await.unwrap();
    };
    join_all(events.map(one)).await;
}

/// Eight at a time; says `intended N` and `concluded N OUTCOME` once it has been promised.
async fn sign_until_killed(ledger: &Ledger, first: u32) {
    let lane = async |lane: u32| {
        for n in (first + lane..).step_by(8) {
            ledger.intend(vec![intent(n)]).await.unwrap();
            println!("intended {n}");
            ledger.conclude(conclusion(n, outcome_of(n))).await.unwrap();
            println!("concluded {n} {}", outcome_of(n).name());
            if n % 3 == 0 {
                ledger.conclude(conclusion(n, outcome_of(n + 1))).await.unwrap();
                println!("concluded {n} {}", outcome_of(n + 1).name());
            }
        }
    };
    join_all((0..8).map(lane)).await;
}

async fn what_was_promised_is_there_and_adds_up_however_often_it_is_killed(place: &Place) {
    let mut promised = 0;
    for round in 0..20 {
        let first = round * 100_000;
        let mut child = start("sign until killed", place, first, "");
        let lines = listen(&mut child);
        // Killed while it goes on, after more and more of what it says.
        let heard = (0..10 + 20 * round).map(|_| lines.recv_timeout(Duration::from_secs(60)).expect("it goes on"));
        let heard: Vec<String> = heard.collect();
        child.kill().unwrap();
        child.wait().unwrap();

        let ledger = place.system();
        let mut concluded: BTreeMap<u32, Vec<String>> = BTreeMap::new();
        // The last line may be torn.
        let said: Vec<String> = heard.into_iter().chain(lines).collect();
        for line in &said[..said.len() - 1] {
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["intended", n] => {
                    let signatures = signatures_of(&ledger, n.parse().unwrap()).await;
                    assert!(signatures.iter().any(|signature| signature.asked.is_some()), "round {round}: {line} was lost");
                    promised += 1;
                }
                ["concluded", n, outcome] => concluded.entry(n.parse().unwrap()).or_default().push(outcome.to_owned()),
                // The test harness speaks too.
                _ => {}
            }
        }
        for (n, outcomes) in concluded {
            let story = ledger.story(story_of(n)).await.unwrap();
            // A later word may have been recorded and not been said.
            let later = n % 3 == 0 && story[0].outcome == outcome_of(n + 1);
            assert!(later || story[0].outcome.name() == outcomes.last().unwrap(), "round {round}: {n} {outcomes:?}");
        }
        assert_eq!(ledger.sums().await.unwrap(), place.recount(), "round {round}");
    }
    assert!(promised > 500, "only {promised} intents were tested");
}

async fn two_processes_write_one_ledger(place: &Place) {
    let ledger = place.system();
    // A hundred of the events are concluded by both.
    let mut child = start("sign three hundred", place, 200, "");
    let lines = listen(&mut child);
    sign(&ledger, 0..300).await;
    assert!(child.wait().unwrap().success(), "{:?}", lines.iter().collect::<Vec<_>>());

    let sums = ledger.sums().await.unwrap();
    assert_eq!(sums, place.recount());
    let ended = (0..500).filter(|n| outcome_of(*n) != Outcome::Retrying).count();
    assert_eq!(sums.concluded(), ended as u64);
    assert_eq!(signatures_of(&ledger, 250).await[0].asked.as_ref().unwrap().times, 2);
}

/// Says `full` when it is, and goes on once there is space again.
async fn fill_the_disk(ledger: &Ledger) {
    let mut n = 0;
    let error = loop {
        n += 1;
        if let Err(error) = ledger.intend(vec![intent(n)]).await {
            break error;
        }
        if n % 2 == 0 && ledger.conclude(conclusion(n, outcome_of(n))).await.is_err() {
            // What cannot be concluded is retried, and by then it may be possible.
            continue;
        }
        assert!(n < 100_000, "the limit holds nothing");
    };
    assert_eq!(error.verdict(), Verdict::TRANSIENT, "{error:?}");
    // A probe is smaller than an intent, and a few may still fit.
    let ready = async |_| ledger.check().await.is_ok();
    assert!(!stream::iter(0..1000).all(ready).await, "the ledger says that it can be written");
    assert_eq!(signatures_of(ledger, n).await, [], "what was refused is not on record");
    assert_eq!(signatures_of(ledger, n - 1).await.len(), 1, "what was promised is");
    println!("full");

    let waiting = Instant::now();
    while ledger.intend(vec![intent(n)]).await.is_err() {
        assert!(waiting.elapsed() < Duration::from_secs(60), "it has not recovered");
        thread::sleep(Duration::from_millis(10));
    }
    ledger.conclude(conclusion(n, Outcome::Signed)).await.unwrap();
    ledger.check().await.unwrap();
    assert_eq!(signatures_of(ledger, n).await[0].state, Some(SignatureState::Written));
}

#[tokio::test]
async fn a_full_disk_refuses_intents_and_passes() {
    let place = Place::sqlite();
    // No file may grow beyond 256 KiB: writes fail as on a full disk. Only the soft limit, so that it can be lifted.
    let mut child = start("fill the disk", &place, 0, "trap '' XFSZ; ulimit -S -f 256;");
    let lines = listen(&mut child);
    while lines.recv_timeout(Duration::from_secs(60)).expect("the child says that the disk is full") != "full" {}
    let lift = Command::new("prlimit").args(["--fsize=unlimited:", "--pid", &child.id().to_string()]).status();
    assert!(lift.unwrap().success());
    assert!(child.wait().unwrap().success(), "{:?}", lines.iter().collect::<Vec<_>>());
    let ledger = place.system();
    assert_eq!(ledger.sums().await.unwrap(), place.recount());
}
