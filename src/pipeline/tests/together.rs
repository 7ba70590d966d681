//! Pushes of one digest under several tags, which wait for each other in the queue and are handled together.

use super::*;

const LONG_AGO: Duration = Duration::from_secs(60);

impl House {
    /// Queues the events of pushes of one digest at once, so that they come together.
    async fn push_together(&self, digest: &Digest, tags: &[(&str, Duration)]) {
        let events = tags.iter().map(|(tag, ago)| pushed("team/app", Some(tag), digest, *ago));
        self.queue.push(events.map(|event| queued(&event)).collect()).await.unwrap();
    }

    /// Puts an image there under all of these tags.
    fn tagged_image(&self, name: &str, tags: &[&str]) -> Digest {
        let put = |tag: &&str| self.registry.store().put("team/app", Some(tag), media_type::OCI_MANIFEST, &image(name));
        tags.iter().map(put).collect::<Vec<_>>().remove(0)
    }

    /// How many requests began so.
    fn asked(&self, request: &str) -> usize {
        self.registry.store().asked.iter().filter(|asked| asked.starts_with(request)).count()
    }

    async fn outcome_of(&self, tag: &str) -> Outcome {
        let query = ledger::StoryQuery {
            registry: NAME.parse().unwrap(),
            repository: app(),
            tag: Some(tag.parse().unwrap()),
            digest: None,
            limit: 1,
        };
        self.ledger.story(query).await.unwrap().remove(0).outcome
    }
}

fn queued(event: &PushEvent) -> Message {
    message(event::CONTENT_TYPE, &event.partition_key(), event.to_cloud_event())
}

#[tokio::test]
async fn tags_that_wait_together_are_signed_in_one_write_and_each_thing_is_asked_once() {
    let house = House::new().await;
    let tags = ["1", "1.0", "1.0.0", "latest"];
    let platform = house.registry.store().put("team/app", None, media_type::OCI_MANIFEST, &image("amd64"));
    let content = index([platform.as_str()]);
    let put = |tag: &&str| house.registry.store().put("team/app", Some(tag), media_type::OCI_INDEX, &content);
    let digest = tags.iter().map(put).collect::<Vec<_>>().remove(0);
    let pushes: Vec<_> = tags.iter().chain(&["1"]).map(|tag| (*tag, LONG_AGO)).collect();
    house.push_together(&digest, &pushes).await;
    let pipeline = house.pipeline(vec![rule("team", "release"), rule("other", "other")]);
    house.handle_next(&pipeline).await;

    for subject in [&digest, &platform] {
        assert_eq!(house.signed(subject), tags.map(tagged));
        let path = format!("team/app/manifests/{}", sig(subject));
        assert_eq!((house.asked(&format!("PUT {path}")), house.asked(&format!("GET {path}"))), (1, 3), "{path}");
        assert_eq!(house.registry.signatures(&app(), subject).unwrap()["layers"].as_array().unwrap().len(), 8);
    }
    // The image with its first tag, its platform, and the other tags.
    assert_eq!(house.asked("GET team/app/manifests/") - 6, 2);
    assert_eq!(house.asked("HEAD team/app/manifests/"), 3);
    // One payload for both witnesses, and the config once.
    assert_eq!(house.asked("PUT team/app/blobs/"), 2 * 4 + 1);
    assert_eq!(house.calls(), 8);
    let sums = house.ledger.sums().await.unwrap();
    assert_eq!((sums.signed, sums.already_signed), (4, 1), "the tag that was pushed twice");
    assert_eq!(house.queue.stats().await.unwrap().queued(), 0);
}

#[tokio::test]
async fn what_names_no_tag_is_signed_once_for_all_of_them() {
    let house = House::new().await;
    let digest = house.tagged_image("bundled", &["1.0", "latest"]);
    house.push_together(&digest, &[("1.0", LONG_AGO), ("latest", Duration::from_secs(30))]).await;
    house.handle_next(&house.pipeline(vec![Rule { formats: vec![Format::Bundle], ..rule("team", "release") }])).await;
    assert_eq!((house.calls(), house.registry.fallback(&app(), &digest).len()), (1, 1));
    assert_eq!([house.outcome_of("1.0").await, house.outcome_of("latest").await], [Outcome::Signed, Outcome::AlreadySigned]);
    let record = house.ledger.signatures(&NAME.parse().unwrap(), &app(), &digest).await.unwrap();
    assert_eq!(record.len(), 1, "{record:?}");
}

#[tokio::test]
async fn each_of_them_has_an_outcome_of_its_own() {
    let house = House::new().await;
    let for_tags =
        |name: &str, witness: &str, tags: &str| Rule { tags: Some(TagFilter::parse(&[tags]).unwrap()), ..rule(name, witness) };
    let rules =
        vec![for_tags("released", "release", "1.*"), for_tags("forbidden", "denied", "denied"), for_tags("away", "shut", "away")];
    let digest = house.tagged_image("several", &["1.0", "denied", "away", "unmatched"]);
    house.tagged_image("another", &["1.moved"]);
    let tags = ["1.moved", "1.0", "1.gone", "denied", "away", "unmatched"].map(|tag| (tag, LONG_AGO));
    house.push_together(&digest, &tags).await;
    // One that is on its way holds up none of those that are there.
    house.push_together(&digest, &[("1.late", Duration::ZERO), ("1.1", LONG_AGO)]).await;
    house.registry.store().put("team/app", Some("1.1"), media_type::OCI_MANIFEST, &image("several"));
    let pipeline = house.pipeline(rules);
    for _ in 0..2 {
        house.handle_next(&pipeline).await;
    }
    assert_eq!(house.signed(&digest), [tagged("1.0"), tagged("1.1")]);
    for (tag, outcome) in [
        ("1.0", Outcome::Signed),
        ("1.1", Outcome::Signed),
        ("1.moved", Outcome::Skipped(Skip::Superseded)),
        ("1.gone", Outcome::Skipped(Skip::Superseded)),
        ("1.late", Outcome::Retrying),
        ("denied", Outcome::Dead),
        ("away", Outcome::Retrying),
        ("unmatched", Outcome::Skipped(Skip::TagNotMatched)),
    ] {
        assert_eq!(house.outcome_of(tag).await, outcome, "{tag}");
    }
    assert_eq!(house.dead().await.len(), 1);
}

#[tokio::test]
async fn of_tags_that_are_signed_together_one_may_move_meanwhile() {
    let house = House::new().await;
    let digest = house.tagged_image("old", &["1.0", "latest"]);
    *house.key.slow.lock().unwrap() = Duration::from_millis(2100);
    house.push_together(&digest, &[("latest", LONG_AGO), ("1.0", LONG_AGO)]).await;
    let pipeline = house.pipeline(release());
    let moving = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        house.tagged_image("new", &["latest"]);
        *house.key.slow.lock().unwrap() = Duration::ZERO;
    };
    tokio::join!(house.handle_next(&pipeline), moving);
    assert_eq!(house.signed(&digest), [tagged("1.0")]);
    assert_eq!([house.outcome_of("1.0").await, house.outcome_of("latest").await], [Outcome::Signed, Outcome::Retrying]);
    house.settle(&pipeline).await;
    assert_eq!(house.signed(&digest), [tagged("1.0"), pinned(&digest)]);
}

#[tokio::test]
async fn a_tag_that_cannot_be_read_any_more_keeps_the_others_neither_from_being_found_nor_from_being_written() {
    let refused = |asked: &str| asked.ends_with("GET team/app/manifests/bad") || asked.ends_with("HEAD team/app/manifests/bad");
    for at_first in [true, false] {
        let house = House::new().await;
        let digest = house.tagged_image("several", &["bad", "1.0", "1.1"]);
        house.push_together(&digest, &["bad", "1.0", "1.1"].map(|tag| (tag, LONG_AGO))).await;
        let slow = if at_first { Duration::ZERO } else { Duration::from_millis(2100) };
        *house.key.slow.lock().unwrap() = slow;
        let since = std::time::Instant::now();
        house.registry.on_request(
            move |asked, _| {
                if refused(asked) && since.elapsed() >= slow / 2 { Act::Refuse(400) } else { Act::Serve }
            },
        );
        house.handle_next(&house.pipeline(release())).await;
        assert_eq!(house.signed(&digest), [tagged("1.0"), tagged("1.1")], "{at_first}");
        assert_eq!(
            [house.outcome_of("1.0").await, house.outcome_of("bad").await],
            [Outcome::Signed, Outcome::Dead],
            "{at_first}"
        );
    }
}

#[tokio::test]
async fn a_key_that_hangs_keeps_what_another_has_signed_from_being_written_for_a_moment_only() {
    let house = House::new().await;
    let digest = house.tagged_image("two keys", &["1.0", "dev"]);
    *house.key.slow.lock().unwrap() = Duration::from_secs(3600);
    house.push_together(&digest, &[("1.0", LONG_AGO), ("dev", LONG_AGO)]).await;
    let for_tags = |witness: &str, tags: &str| Rule { tags: Some(TagFilter::parse(&[tags]).unwrap()), ..rule(tags, witness) };
    let pipeline = house.pipeline(vec![for_tags("release", "1.*"), for_tags("other", "dev")]);
    let written = async {
        while house.registry.signatures(&app(), &digest).is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = house.handle_next(&pipeline) => panic!("a key that hangs has signed"),
        written = tokio::time::timeout(Duration::from_secs(30), written) => written.expect("it is written"),
    }
    assert!(house.signed(&digest).is_empty());
    *house.key.slow.lock().unwrap() = Duration::ZERO;
    house.settle(&pipeline).await;
    assert_eq!(house.signed(&digest), [tagged("1.0")]);
    assert_eq!(house.registry.signatures(&app(), &digest).unwrap()["layers"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_witness_that_cannot_be_asked_turns_away_those_alone_that_want_it() {
    let house = House::new().await;
    let digest = house.tagged_image("turned away", &["1.0", "dev"]);
    house.key.away.store(true, SeqCst);
    let witness = &house.witnesses["release"];
    while witness.look().is_ok() {
        witness.sign(Algorithm::EcdsaSha256, &[0; 32]).await.unwrap_err();
    }
    house.push_together(&digest, &[("1.0", LONG_AGO), ("dev", LONG_AGO)]).await;
    let for_tags = |witness: &str, tags: &str| Rule { tags: Some(TagFilter::parse(&[tags]).unwrap()), ..rule(tags, witness) };
    let pipeline = house.pipeline(vec![for_tags("release", "1.*"), for_tags("other", "dev")]);
    house.handle_next(&pipeline).await;
    assert_eq!([house.outcome_of("1.0").await, house.outcome_of("dev").await], [Outcome::Retrying, Outcome::Signed]);
    assert_eq!(house.asked("GET team/app/manifests/1.0"), 0);
    house.key.away.store(false, SeqCst);
    house.settle(&pipeline).await;
    assert_eq!(house.signed(&digest), [tagged("1.0")]);
}

#[tokio::test]
async fn a_signature_that_failed_for_all_of_them_is_on_record_as_failed_for_none_when_it_is_made() {
    let house = House::new().await;
    let pipeline = house.pipeline(vec![Rule { formats: vec![Format::Bundle], ..rule("team", "release") }]);
    // Which of them comes first again differs.
    for round in 0..8 {
        let digest = house.tagged_image(&format!("failed {round}"), &["1.0", "latest"]);
        let passing = kms::Error::Transient { key: key_uri(), what: "having a moment".into() };
        house.key.script.lock().unwrap().push_back(Err(passing));
        house.push_together(&digest, &[("1.0", LONG_AGO), ("latest", LONG_AGO)]).await;
        house.settle(&pipeline).await;
        assert_eq!(house.registry.fallback(&app(), &digest).len(), 1);
    }
    let ledger = rusqlite::Connection::open(ledger_path(&house.folder)).unwrap();
    let states = "SELECT count(*), count(*) FILTER (WHERE state = 'written') FROM signature WHERE state <> 'found'";
    let states: (u32, u32) = ledger.query_row(states, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    assert_eq!(states, (8, 8));
}

#[tokio::test]
async fn of_pushes_of_one_tag_the_last_is_the_one_that_is_waited_for() {
    let house = House::new().await;
    let digest = house.tagged_image("again", &["1.0"]);
    house.tagged_image("before", &["latest"]);
    house.push_together(&digest, &[("1.0", LONG_AGO), ("latest", LONG_AGO), ("latest", Duration::ZERO)]).await;
    let pipeline = house.pipeline(release());
    let coming = async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        house.tagged_image("again", &["latest"]);
    };
    tokio::join!(house.handle_next(&pipeline), coming);
    assert_eq!(house.signed(&digest), [tagged("1.0"), tagged("latest")]);
}

#[tokio::test]
async fn what_one_push_wants_of_a_signature_another_does_not_change() {
    let house = House::with_certificate().await;
    let digest = house.tagged_image("planned", &["1.0"]);
    let setup = house.pipeline(release()).setup();
    let (registry, tag) = (&setup.registries[&NAME.parse().unwrap()], "1.0".parse().unwrap());
    let located = subject::locate(registry, &app(), Some(&tag), &digest, subject::Children::Signed).await;
    let Ok(Located::Image(image)) = located else { panic!("{located:?}") };
    let all = vec![Format::Bundle, Format::Notation];
    let expiring = |days: u64| Some(Duration::from_secs(days * 24 * 3600));
    let one = [Arc::new(Rule { formats: all.clone(), ..rule("one", "release") })];
    let other = [
        Arc::new(Rule { formats: all.clone(), expiry: expiring(90), ..rule("other", "release") }),
        Arc::new(Rule { formats: all, expiry: expiring(7), ..rule("another", "release") }),
    ];
    let (second, hour) = (Timestamp::from_second(1).unwrap(), Timestamp::from_second(3600).unwrap());
    let request = |rules, pushed_at| plan::Request { message_id: "1", pushed_at, tag: &image.tag, rules };
    let planned = |requests: &[plan::Request<'_>]| {
        let mut plan = plan::plan(&image, requests, &house.witnesses, hour);
        assert_eq!(plan.targets.len(), 1);
        plan.targets.remove(0).wanted.into_iter().map(|wanted| wanted.prepared).collect::<Vec<_>>()
    };
    // The first of them decides for how long, as if they had come one after the other; and each is as old as the older.
    let (alone, second_alone) = (planned(&[request(&one, second)]), planned(&[request(&other, second)]));
    assert_ne!(alone, second_alone);
    assert_eq!(planned(&[request(&one, hour), request(&other, second)]), alone);
    assert_eq!(planned(&[request(&other, hour), request(&one, second)]), second_alone);
}

#[tokio::test]
async fn a_registry_that_is_away_is_not_asked_for_each_of_them() {
    let house = House::new().await;
    let tags: Vec<String> = (0..20).map(|n| format!("1.{n}")).collect();
    let tags: Vec<&str> = tags.iter().map(String::as_str).collect();
    let digest = house.tagged_image("unreachable", &tags);
    house.push_together(&digest, &tags.iter().map(|tag| (*tag, LONG_AGO)).collect::<Vec<_>>()).await;
    let pipeline = house.pipeline(release());
    house.registry.on_request(|_, _| Act::Refuse(429));
    house.handle_next(&pipeline).await;
    let tries = house.registry.store().asked.len();
    assert!(tries < 8, "{tries} requests");
    assert_eq!(house.queue.stats().await.unwrap().queued(), 20);
    house.registry.on_request(|_, _| Act::Serve);
    house.settle(&pipeline).await;
    assert_eq!(house.signed(&digest).len(), 20);
}

#[tokio::test]
async fn events_that_were_given_one_key_and_name_several_digests_are_signed_each_for_its_own() {
    let house = House::new().await;
    let (one, other) = (house.tagged_image("one", &["1.0"]), house.tagged_image("other", &["2.0"]));
    let of =
        |tag, digest| Message { key: PartitionKey("key".into()), ..queued(&pushed("team/app", Some(tag), digest, LONG_AGO)) };
    // One of them claims the other's digest for a tag that does not name it.
    let messages = vec![of("1.0", &one), of("2.0", &other), of("2.0", &one), message("text/plain", "key", b"no event".to_vec())];
    house.queue.push(messages).await.unwrap();
    house.handle_next(&house.pipeline(release())).await;
    assert_eq!(house.signed(&one), [tagged("1.0"), pinned(&one)]);
    assert_eq!(house.signed(&other), [tagged("2.0")]);
    assert_eq!(house.dead().await[0].burial.kind, "poison");
    assert_eq!(house.queue.stats().await.unwrap().queued(), 0);
}

#[tokio::test]
async fn cut_short_at_any_await_each_tag_is_signed_once() {
    let house = House::new().await;
    let tags = [("1.0", LONG_AGO), ("1.1", LONG_AGO), ("latest", LONG_AGO)];
    let rules = vec![Rule { formats: vec![Format::Cosign, Format::Bundle], ..rule("team", "release") }];
    let (mut polls, mut survived) = (0, 0);
    while survived < 2 {
        polls += 1;
        assert!(polls < 5000, "no event ever got through");
        let digest = house.tagged_image(&format!("crash {polls}"), &tags.map(|(tag, _)| tag));
        house.push_together(&digest, &tags).await;
        let first = house.pipeline(rules.clone());
        let deliveries = house.queue.pull_together().await.unwrap();
        assert_eq!(deliveries.len(), 3);
        let whole = async { first.settle(first.handle(deliveries).await.unwrap()).await };
        survived += u32::from(dropped_after(polls, whole).await.is_some());
        house.settle(&house.pipeline(rules.clone())).await;
        assert_eq!(house.signed(&digest), tags.map(|(tag, _)| tagged(tag)), "dropped after {polls} polls");
        assert_eq!(house.registry.fallback(&app(), &digest).len(), 1, "dropped after {polls} polls");
    }
    assert!(polls > 12, "only {polls} polls: the drops did not reach every stage");
    assert!(house.dead().await.is_empty());
}
