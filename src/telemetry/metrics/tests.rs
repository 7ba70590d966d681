#![expect(clippy::float_cmp, reason = "these are small multiples of one half, which are exact")]

use std::collections::BTreeMap;

use super::*;

/// A family as exposed: its type, and its samples by (name, labels).
#[derive(Debug, Default)]
struct Exposed {
    kind: String,
    samples: BTreeMap<(String, Vec<(String, String)>), f64>,
}

/// Strict: `OpenMetrics` 1.0 as far as it is used here. Families are whole and occur once, HELP and TYPE come first, sample names
/// fit the type, no series occurs twice, histograms are cumulative, and `# EOF` ends it.
fn parse(text: &str) -> BTreeMap<String, Exposed> {
    let body = text.strip_suffix("# EOF\n").expect("ends with # EOF and a line end");
    let mut families: BTreeMap<String, Exposed> = BTreeMap::new();
    let mut current = String::new();
    let mut helped = String::new();
    for line in body.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(is_name(name) && help.len() > 5 && help.ends_with('.') && !help.ends_with(".."), "{line}");
            helped = name.to_owned();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert_eq!(name, helped, "TYPE follows its HELP");
            assert!(["counter", "gauge", "histogram", "info"].contains(&kind), "{line}");
            let new = Exposed { kind: kind.to_owned(), ..Exposed::default() };
            assert!(families.insert(name.to_owned(), new).is_none(), "{name} occurs twice");
            current = name.to_owned();
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = parse_series(series);
            let family = families.get_mut(&current).unwrap();
            let suffix = name.strip_prefix(&current).unwrap_or_else(|| panic!("{name} stands under {current}"));
            let fits: &[&str] = match family.kind.as_str() {
                "counter" => &["_total"],
                "gauge" => &[""],
                "info" => &["_info"],
                _ => &["_sum", "_count", "_bucket"],
            };
            assert!(fits.contains(&suffix), "{line}");
            assert!(family.samples.insert((name, labels), value.parse().unwrap()).is_none(), "{line} occurs twice");
        }
    }
    families.iter().filter(|(_, family)| family.kind == "histogram").for_each(|(name, family)| check_histogram(name, family));
    families
}

fn parse_series(series: &str) -> (String, Vec<(String, String)>) {
    let Some((name, rest)) = series.split_once('{') else {
        assert!(is_name(series), "{series}");
        return (series.to_owned(), Vec::new());
    };
    assert!(is_name(name), "{series}");
    let mut rest = rest.strip_suffix('}').unwrap();
    let mut labels = Vec::new();
    while !rest.is_empty() {
        let (key, after) = rest.split_once("=\"").unwrap();
        assert!(is_name(key), "{series}");
        let mut value = String::new();
        let mut characters = after.char_indices();
        let end = loop {
            match characters.next().expect("a label's value ends with a quote") {
                (end, '"') => break end,
                (_, '\\') => match characters.next().unwrap().1 {
                    'n' => value.push('\n'),
                    escaped @ ('"' | '\\') => value.push(escaped),
                    other => panic!("unknown escape {other:?} in {series}"),
                },
                (_, other) => value.push(other),
            }
        };
        labels.push((key.to_owned(), value));
        rest = &after[end + 1..];
        if let Some(next) = rest.strip_prefix(',') {
            assert!(!next.is_empty(), "{series}");
            rest = next;
        } else {
            assert!(rest.is_empty(), "{series}");
        }
    }
    labels.sort();
    assert!(labels.windows(2).all(|pair| pair[0].0 != pair[1].0), "{series}");
    (name.to_owned(), labels)
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
}

fn check_histogram(name: &str, family: &Exposed) {
    let counts = family.samples.iter().filter(|((sample, _), _)| *sample == format!("{name}_count"));
    for ((_, labels), count) in counts {
        let mut buckets: Vec<(f64, f64)> = Vec::new();
        for ((sample, of), value) in &family.samples {
            let rest: Vec<_> = of.iter().filter(|(key, _)| key != "le").cloned().collect();
            if *sample == format!("{name}_bucket") && rest == *labels {
                let bound = &of.iter().find(|(key, _)| key == "le").expect("a bucket has its bound").1;
                buckets.push((if bound == "+Inf" { f64::INFINITY } else { bound.parse().unwrap() }, *value));
            }
        }
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        assert!(buckets.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{name} is not cumulative");
        assert_eq!(buckets.last().copied(), Some((f64::INFINITY, *count)), "{name}");
    }
}

fn snapshot() -> Snapshot {
    let queue = queue::Stats {
        partitions: vec![],
        pushed_total: 24,
        discarded_total: 1,
        ready: 3,
        waiting: 2,
        in_flight: 1,
        dead: 3,
        oldest: Some("2026-11-21T09:00:00Z".parse().unwrap()),
        history: None,
    };
    let ledger =
        Sums { signed: 7, already_signed: 2, skipped: 5, dead: 4, skip_reasons: [(Skip::NoRule, 3), (Skip::Untagged, 2)].into() };
    Snapshot { queue: Some(queue), ledger: Some(ledger), now: "2026-11-21T09:01:30.5Z".parse().unwrap() }
}

fn value(families: &BTreeMap<String, Exposed>, family: &str, sample: &str, labels: &[(&str, &str)]) -> f64 {
    let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let samples = &families.get(family).unwrap_or_else(|| panic!("no {family}")).samples;
    *samples.get(&(sample.to_owned(), labels)).unwrap_or_else(|| panic!("no {sample} among {samples:?}"))
}

fn exercised() -> Metrics {
    let metrics = Metrics::new();
    metrics.rule_concluded("production", &Outcome::Signed);
    metrics.rule_concluded("production", &Outcome::Skipped(Skip::TagNotMatched));
    metrics.rule_concluded("a \"rule\"\\\n", &Outcome::Dead);
    metrics.signature_written("release", "cosign");
    metrics.signature_found("release", "cosign");
    metrics.kms_asked("release", "ok", Duration::from_millis(3));
    metrics.kms_asked("release", "throttled", Duration::from_secs(100));
    metrics.throttled("release", Duration::from_millis(3));
    metrics.registry_asked("registry.example.com:5000", "get_manifest", "ok", Duration::from_micros(700));
    metrics.event_handled(Duration::from_millis(10));
    metrics.pushed_to_signed(Duration::from_secs(3));
    metrics.config_reloaded(false);
    metrics.attach(INTAKE_FAMILIES, || {
        let labels = |source: &str| vec![("source", source.to_owned())];
        vec![
            Sample { name: "intake_taken", labels: labels("main"), value: 9 },
            Sample { name: "intake_requests", labels: labels("main"), value: 8 },
            Sample { name: "intake_taken", labels: labels("other"), value: 1 },
        ]
    });
    metrics
}

#[test]
fn every_metric_is_well_formed_and_says_what_it_is() {
    let families = parse(&exercised().render(snapshot()));
    for expected in [
        "build",
        "events_received",
        "events",
        "events_queued",
        "rule_outcomes",
        "intake_requests",
        "intake_taken",
        "queue_messages",
        "queue_oldest_seconds",
        "kms_sign_seconds",
        "kms_signs",
        "registry_request_seconds",
        "push_to_signed_seconds",
        "event_handling_seconds",
        "signatures",
        "config_reloads",
        "config_last_reload_success",
        "witness_throttle_wait_seconds",
    ] {
        assert!(families.contains_key(&format!("countersign_{expected}")), "{expected}");
    }
    assert!(families.keys().all(|name| name.starts_with("countersign_")));
    // A scrape counts nothing, and a second one repeats no family.
    let metrics = exercised();
    assert_eq!(parse(&metrics.render(snapshot())).len(), parse(&metrics.render(snapshot())).len());
    // Nothing has happened yet.
    parse(&Metrics::new().render(Snapshot {
        queue: Some(queue::Stats::default()),
        ledger: Some(Sums::default()),
        now: Timestamp::UNIX_EPOCH,
    }));
}

#[test]
fn received_is_the_sum_of_the_outcomes_and_what_is_queued() {
    let families = parse(&exercised().render(snapshot()));
    let outcome = |name| value(&families, "countersign_events", "countersign_events", &[("outcome", name)]);
    let ended: f64 = ["signed", "already_signed", "skipped", "dead"].into_iter().map(outcome).sum();
    assert_eq!(outcome("signed"), 7.0);
    let queued = value(&families, "countersign_events_queued", "countersign_events_queued", &[]);
    assert_eq!(queued, 6.0);
    let received = value(&families, "countersign_events_received", "countersign_events_received_total", &[]);
    assert_eq!(received, ended + queued);
    let reasons: f64 = families["countersign_events_skipped"].samples.values().sum();
    assert_eq!(reasons, outcome("skipped"));
    assert_eq!(value(&families, "countersign_queue_oldest_seconds", "countersign_queue_oldest_seconds", &[]), 90.5);
}

#[test]
fn what_is_away_is_said_to_be_and_the_rest_is_told() {
    let up = |families: &BTreeMap<String, Exposed>| {
        ["queue", "ledger"].map(|part| value(families, "countersign_up", "countersign_up", &[("part", part)]))
    };
    let families = parse(&exercised().render(snapshot()));
    assert_eq!(up(&families), [1.0, 1.0]);
    let families = parse(&exercised().render(Snapshot { ledger: None, ..snapshot() }));
    assert_eq!(up(&families), [1.0, 0.0]);
    assert!(families.contains_key("countersign_events_queued") && families.contains_key("countersign_kms_signs"));
    assert!(!families.contains_key("countersign_events"), "no zeros that are none");
    let families = parse(&exercised().render(Snapshot { queue: None, ..snapshot() }));
    assert_eq!(up(&families), [0.0, 1.0]);
    assert!(families.contains_key("countersign_events") && !families.contains_key("countersign_events_received"));
}

#[test]
fn what_is_counted_stands_under_its_labels() {
    let families = parse(&exercised().render(snapshot()));
    let rule = [("outcome", "dead"), ("reason", ""), ("rule", "a \"rule\"\\\n")];
    assert_eq!(value(&families, "countersign_rule_outcomes", "countersign_rule_outcomes_total", &rule), 1.0);
    let taken = [("source", "other")];
    assert_eq!(value(&families, "countersign_intake_taken", "countersign_intake_taken_total", &taken), 1.0);
    let bucket = [("le", "0.004"), ("result", "ok"), ("witness", "release")];
    assert_eq!(value(&families, "countersign_kms_sign_seconds", "countersign_kms_sign_seconds_bucket", &bucket), 1.0);
    let reload = "countersign_config_last_reload_success";
    assert_eq!(value(&families, reload, reload, &[]), 0.0);
    let failed = [("result", "failed")];
    assert_eq!(value(&families, "countersign_config_reloads", "countersign_config_reloads_total", &failed), 1.0);
}

#[test]
fn a_clock_that_went_back_gives_no_negative_age() {
    let mut snapshot = snapshot();
    snapshot.now = "2026-11-21T08:00:00Z".parse().unwrap();
    let families = parse(&Metrics::new().render(snapshot));
    assert_eq!(value(&families, "countersign_queue_oldest_seconds", "countersign_queue_oldest_seconds", &[]), 0.0);
}

#[test]
fn partitions_have_depth_age_and_holder() {
    let mut snapshot = snapshot();
    let held = queue::Partition {
        name: "8.1".to_owned(),
        holder: Some("one-12".to_owned()),
        ready: 4,
        in_flight: 1,
        oldest: snapshot.queue.as_ref().unwrap().oldest,
    };
    snapshot.queue.as_mut().unwrap().partitions =
        vec![queue::Partition { name: "8.0".to_owned(), ..queue::Partition::default() }, held];
    let families = parse(&Metrics::new().render(snapshot));
    let of = |family: &str, labels: &[(&str, &str)]| {
        let name = format!("countersign_queue_partition_{family}");
        value(&families, &name, &name, labels)
    };
    let messages = |partition, state| of("messages", &[("partition", partition), ("state", state)]);
    assert_eq!((messages("8.1", "ready"), messages("8.1", "in_flight"), messages("8.0", "ready")), (4.0, 1.0, 0.0));
    assert_eq!((of("oldest_seconds", &[("partition", "8.1")]), of("oldest_seconds", &[("partition", "8.0")])), (90.5, 0.0));
    assert_eq!(of("holder", &[("partition", "8.1"), ("replica", "one-12")]), 1.0);
    assert_eq!(families["countersign_queue_partition_holder"].samples.len(), 1);
}
