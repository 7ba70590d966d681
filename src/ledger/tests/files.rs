//! What is opened, and what is left alone.

use std::{error::Error as _, fs, os::unix::fs::PermissionsExt, thread};

use super::*;

fn open(path: &Path) -> Result<Ledger, Error> {
    Ledger::open(path, Clock::system())
}

fn system(folder: &tempfile::TempDir) -> (PathBuf, Ledger) {
    let path = folder.path().join("ledger.db");
    let ledger = open(&path).unwrap();
    (path, ledger)
}

#[tokio::test]
async fn a_new_ledger_is_for_this_user_only() {
    let folder = tempfile::tempdir().unwrap();
    let (_, ledger) = system(&folder);
    ledger.intend(vec![intent(1)]).await.unwrap();
    let mut files = 0;
    for file in fs::read_dir(folder.path()).unwrap() {
        let file = file.unwrap();
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", file.path());
        files += 1;
    }
    assert_eq!(files, 3, "the ledger, its log, and the log's index");
}

#[tokio::test]
async fn a_ledger_is_opened_again_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let (path, ledger) = system(&folder);
    ledger.intend(vec![intent(1)]).await.unwrap();
    ledger.conclude(conclusion(1, Outcome::Signed)).await.unwrap();
    drop(ledger);
    let ledger = open(&path).unwrap();
    assert_eq!(ledger.sums().await.unwrap(), Sums { signed: 1, ..Sums::default() });
    assert_eq!(signatures_of(&ledger, 1).await.len(), 1);
}

#[test]
fn an_empty_file_becomes_a_ledger() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    fs::write(&path, "").unwrap();
    open(&path).unwrap();
}

#[test]
fn another_programs_file_is_refused_and_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text");
    fs::write(&text, "this is no database, but it is long enough to be taken for one: ".repeat(100)).unwrap();
    let tables = folder.path().join("tables");
    Connection::open(&tables).unwrap().execute_batch("CREATE TABLE queue (id INTEGER)").unwrap();
    let marked = folder.path().join("marked");
    Connection::open(&marked).unwrap().execute_batch("PRAGMA application_id = 7; PRAGMA user_version = 1").unwrap();

    for path in [text, tables, marked] {
        let before = fs::read(&path).unwrap();
        let error = open(&path).unwrap_err();
        assert!(matches!(error, Error::Foreign { .. }), "{error:?}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        assert_eq!(fs::read(&path).unwrap(), before);
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "nothing was put beside them");
}

#[test]
fn a_newer_versions_ledger_is_refused_and_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (path, ledger) = system(&folder);
    drop(ledger);
    Connection::open(&path).unwrap().execute_batch("PRAGMA user_version = 3").unwrap();
    let error = open(&path).unwrap_err();
    assert!(matches!(error, Error::Newer { found: 3, known: 2, .. }), "{error:?}");
    assert!(error.to_string().ends_with("use a newer one"), "{error}");
}

#[tokio::test]
async fn an_older_versions_ledger_is_brought_up_with_what_is_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let (path, ledger) = system(&folder);
    ledger.conclude(conclusion(1, Outcome::Signed)).await.unwrap();
    drop(ledger);
    Connection::open(&path).unwrap().execute_batch("DROP TABLE certificate; PRAGMA user_version = 1").unwrap();
    let ledger = open(&path).unwrap();
    ledger.keep_certificate(certificate(1, "a")).await.unwrap();
    assert_eq!(ledger.certificates("release", "key").await.unwrap(), [certificate(1, "a")]);
    assert_eq!(ledger.sums().await.unwrap().signed, 1);
}

#[test]
fn what_cannot_be_created_or_opened_says_where_and_why() {
    let folder = tempfile::tempdir().unwrap();
    let missing = open(&folder.path().join("missing/ledger.db")).unwrap_err();
    assert!(matches!(missing, Error::Create { .. }), "{missing:?}");
    assert!(missing.source().unwrap().to_string().contains("No such file"), "{missing:?}");
    let directory = open(folder.path()).unwrap_err();
    assert!(matches!(directory, Error::Open { .. }), "{directory:?}");
}

#[test]
fn many_may_open_a_new_ledger_at_the_same_moment() {
    for _ in 0..10 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.db");
        thread::scope(|scope| {
            let opening: Vec<_> = (0..8).map(|_| scope.spawn(|| open(&path).map(drop))).collect();
            for one in opening {
                one.join().unwrap().unwrap();
            }
        });
    }
}
