use std::{
    process::Command,
    sync::{Arc, Mutex},
    thread,
};

use tracing::{field, info, info_span, warn};

use super::*;

const TIME: &str = "2026-11-21T09:00:00.123456789Z";

#[derive(Debug, thiserror::Error)]
#[error("the manifest cannot be written")]
struct Outer(#[source] Inner);

#[derive(Debug, thiserror::Error)]
#[error("the registry said: \"no\"\nlevel=info forged")]
struct Inner;

/// What `body` logs, a line each.
fn logged(style: Style, body: impl FnOnce()) -> Vec<String> {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let to = Arc::clone(&lines);
    let (clock, _hand) = Clock::manual(TIME.parse().unwrap());
    let layer = Lines { style, clock, out: move |line: &str| to.lock().unwrap().push(line.to_owned()) };
    let subscriber = Registry::default().with(EnvFilter::new("info")).with(layer);
    tracing::subscriber::with_default(subscriber, body);
    let mut lines = lines.lock().unwrap();
    std::mem::take(&mut *lines)
}

fn an_event() {
    let event = info_span!("pipeline.event", event.id = "1", attempt = 2, outcome = field::Empty);
    let _entered = event.enter();
    event.record("outcome", "retrying");
    let inner = info_span!("registry.write", image.repository = %"team/app");
    let _entered = inner.enter();
    let error = Outer(Inner);
    warn!(error = &error as &dyn StdError, attempt = 3, ratio = 0.5, ok = false, "handed back");
    tracing::debug!("not wanted");
}

#[test]
fn json_lines_are_one_object_with_the_fields_of_all_spans() {
    let lines = logged(Style::Json, an_event);
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0].matches('\n').count(), 1);
    let object: serde_json::Map<String, Value> = serde_json::from_str(&lines[0]).unwrap();
    let expected = serde_json::json!({
        "time": "2026-11-21T09:00:00.123456Z",
        "level": "warn",
        "message": "handed back",
        "target": "countersign::telemetry::log::tests",
        "span": "registry.write",
        "event.id": "1",
        "attempt": 3,
        "outcome": "retrying",
        "image.repository": "team/app",
        "error": "the manifest cannot be written: the registry said: \"no\"\nlevel=info forged",
        "ratio": 0.5,
        "ok": false,
    });
    assert_eq!(Value::Object(object), expected);
}

#[test]
fn human_lines_stay_one_line_whatever_a_field_says() {
    let lines = logged(Style::Human { colour: false }, an_event);
    let expected = "2026-11-21T09:00:00.123Z WARN  handed back event.id=1 attempt=3 outcome=retrying \
                    image.repository=team/app error=\"the manifest cannot be written: the registry said: \\\"no\\\"\\n\
                    level=info forged\" ratio=0.5 ok=false\n";
    assert_eq!(lines, [expected]);

    let hostile = "x\n\r\u{1b}[2J\u{202e}\u{0}";
    let lines = logged(Style::Human { colour: false }, || {
        info!(empty = "", hostile, "message {hostile}");
    });
    assert_eq!(lines.len(), 1);
    assert!(lines[0].trim_end_matches('\n').chars().all(is_plain), "{:?}", lines[0]);
    assert!(lines[0].contains(" empty=\"\" "), "{:?}", lines[0]);
}

#[test]
fn colour_is_only_for_terminals_and_the_journal_gets_priorities() {
    let coloured = logged(Style::Human { colour: true }, || info!(rule = "production", "signed"));
    assert!(coloured[0].contains("\u{1b}[32mINFO \u{1b}[0m"), "{:?}", coloured[0]);
    let journal = logged(Style::Journal, || info!(rule = "production", "signed"));
    assert_eq!(journal, ["<6>signed rule=production\n"]);
}

#[test]
fn a_misspelt_filter_is_refused() {
    for good in ["info", "WARN", "off", "info,countersign::registry=debug", "warn, countersign=trace"] {
        assert!(filter(good).is_ok(), "{good}");
    }
    for bad in ["", "inof", "info,countersign", "info,countersign=loud"] {
        let error = filter(bad).unwrap_err();
        assert!(error.to_string().contains("is no log filter"), "{bad}: {error}");
    }
}

/// In a process of its own, since a log is installed once.
#[test]
fn all_that_an_installed_log_writes_is_json_panics_included() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "telemetry::log::tests::child", "--ignored", "--nocapture", "-q"])
        .env("LOG_TEST_CHILD", "")
        .env("RUST_BACKTRACE", "1")
        .output()
        .unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let messages: Vec<_> = lines.iter().map(|line| line["message"].as_str().unwrap()).collect();
    assert_eq!(messages, ["seen", "a thread panicked, which is a bug in countersign", "seen after the filter was changed"]);
    assert_eq!((&lines[1]["panic"], &lines[1]["thread"]), (&"out of\norder".into(), &"worker".into()));
    assert!(lines[1]["location"].as_str().unwrap().contains("src/telemetry/log/tests.rs:"), "{}", lines[1]);
    assert!(lines[1]["backtrace"].is_string());
}

#[test]
#[ignore = "is what the test above starts"]
fn child() {
    if std::env::var_os("LOG_TEST_CHILD").is_none() {
        return;
    }
    let settings = LogSettings { format: LogFormat::Json, filter: "info".into() };
    let log = install(&settings).unwrap();
    assert!(matches!(install(&settings), Err(Error::Installed(_))));
    info!("seen");
    tracing::debug!("not seen");
    let worker = thread::Builder::new().name("worker".into()).spawn(|| panic!("out of\n{}", "order")).unwrap();
    assert!(worker.join().is_err());
    assert!(log.set_filter("loud").is_err());
    log.set_filter("debug").unwrap();
    tracing::debug!("seen after the filter was changed");
}
