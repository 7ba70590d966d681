//! A small installation: registry, queue, ledger, and keys that answer as they are told to.

use super::*;

pub(crate) type KeyAnswer = Result<RawSignature, kms::Error>;

/// A key that answers as it is told to, and honestly after that.
#[derive(Debug)]
pub(crate) struct Key {
    pub(super) honest: Arc<dyn SigningKey>,
    pub(super) script: Mutex<VecDeque<KeyAnswer>>,
    pub(super) always_denied: bool,
    pub(super) slow: Mutex<Duration>,
    pub(super) away: AtomicBool,
    pub(crate) calls: AtomicU32,
}

#[async_trait]
impl SigningKey for Key {
    fn uri(&self) -> &KeyUri {
        self.honest.uri()
    }
    fn resolved(&self) -> &str {
        self.honest.resolved()
    }
    fn public_key(&self) -> &PublicKey {
        self.honest.public_key()
    }
    async fn sign(&self, algorithm: Algorithm, digest: &[u8; 32]) -> KeyAnswer {
        self.calls.fetch_add(1, SeqCst);
        let slow = *self.slow.lock().unwrap();
        if !slow.is_zero() {
            tokio::time::sleep(slow).await;
        }
        if self.away.load(SeqCst) {
            return Err(kms::Error::Unreachable { key: key_uri(), at: "kms.test".into(), source: "no answer".into() });
        }
        let scripted = self.script.lock().unwrap().pop_front();
        match scripted {
            Some(answer) => answer,
            None if self.always_denied => Err(denied()),
            None => self.honest.sign(algorithm, digest).await,
        }
    }
}

pub(crate) fn key_uri() -> Arc<KeyUri> {
    Arc::new("awskms:///alias/release".parse().unwrap())
}

pub(crate) fn denied() -> kms::Error {
    kms::Error::Denied { key: key_uri(), what: "kms:Sign is not allowed".into() }
}

/// A registry, a queue, a ledger, and witnesses: `release`, `other`, and `denied` whose KMS never lets us.
pub(crate) struct House {
    pub(super) folder: TempDir,
    pub(crate) registry: Fake,
    pub(crate) queue: Arc<Embedded>,
    pub(crate) ledger: Ledger,
    pub(crate) key: Arc<Key>,
    pub(super) witnesses: HashMap<String, Arc<Witness>>,
}

impl House {
    pub(crate) async fn new() -> Self {
        Self::with_rate(None).await
    }

    pub(crate) async fn with_rate(rate: Option<Rate>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clock = Clock::system();
        let now = clock.clone();
        let queue = Embedded::open(&folder.path().join("state"), Options::new(move || now.now())).unwrap();
        let ledger = Ledger::open(&ledger_path(&folder), clock.clone()).unwrap();
        let mut witnesses = HashMap::new();
        let mut open = async |name: &str, always_denied| {
            let path = folder.path().join(format!("{name}.pem"));
            kms::generate(KeySpec::EcP256, &path).unwrap();
            let uri = KeyUri::File(path);
            let honest = kms::open(&uri, None, clock.clone()).await.unwrap();
            let key = Arc::new(Key {
                honest,
                script: Mutex::default(),
                always_denied,
                slow: Mutex::default(),
                away: AtomicBool::new(false),
                calls: AtomicU32::new(0),
            });
            let settings = WitnessSettings {
                name: name.into(),
                description: String::new(),
                key: uri,
                login: None,
                verify: vec![],
                rate,
                pin: None,
            };
            let witness = Witness::from_key(&settings, key.clone(), clock.clone()).unwrap();
            witnesses.insert(name.to_owned(), Arc::new(witness));
            key
        };
        let key = open("release", false).await;
        open("denied", true).await;
        open("other", false).await;
        Self { registry: Fake::start().await, queue: Arc::new(queue), ledger, key, witnesses, folder }
    }

    pub(crate) fn pipeline(&self, rules: Vec<Rule>) -> Pipeline {
        let setup = Setup {
            registries: HashMap::from([(NAME.parse().unwrap(), self.registry.client())]),
            witnesses: self.witnesses.clone(),
            rules: Rules::new(rules).unwrap(),
            ..Setup::default()
        };
        let patience =
            Patience { first: Duration::from_millis(1), longest: Duration::from_millis(20), give_up: Duration::from_secs(60) };
        Pipeline::new(setup, self.ledger.clone(), Metrics::new(), Clock::system(), patience)
    }

    /// Puts an image of this name there under `1.0`.
    pub(crate) fn image(&self, name: &str) -> Digest {
        self.registry.store().put("team/app", Some("1.0"), media_type::OCI_MANIFEST, &image(name))
    }

    /// Puts so many images into a repository, and queues the events of their pushes.
    pub(crate) async fn push_many(&self, repository: &str, count: u32) {
        for number in 0..count {
            let (tag, content) = (format!("1.{number}"), image(&format!("{repository} {number}")));
            let digest = self.registry.store().put(repository, Some(&tag), media_type::OCI_MANIFEST, &content);
            self.push_to(repository, Some(&tag), &digest, Duration::from_secs(60)).await;
        }
    }

    /// Queues the event of a push, which came a while ago.
    pub(crate) async fn push(&self, tag: Option<&str>, digest: &Digest) -> String {
        self.push_received(tag, digest, Duration::from_secs(60)).await
    }

    pub(crate) async fn push_received(&self, tag: Option<&str>, digest: &Digest, ago: Duration) -> String {
        self.push_to("team/app", tag, digest, ago).await
    }

    pub(crate) async fn push_to(&self, repository: &str, tag: Option<&str>, digest: &Digest, ago: Duration) -> String {
        let event = pushed(repository, tag, digest, ago);
        self.enqueue(event::CONTENT_TYPE, &event.partition_key(), event.to_cloud_event()).await
    }

    pub(crate) async fn enqueue(&self, content_type: &str, key: &str, body: Vec<u8>) -> String {
        let message = message(content_type, key, body);
        let id = message.id.clone();
        self.queue.push(vec![message]).await.unwrap();
        id
    }

    pub(crate) async fn handle_next(&self, pipeline: &Pipeline) {
        Self::handle_one(&self.queue, pipeline).await;
    }

    pub(crate) async fn handle_one(queue: &Embedded, pipeline: &Pipeline) {
        let deliveries = tokio::time::timeout(Duration::from_secs(60), queue.pull_together()).await;
        let handled = pipeline.handle(deliveries.expect("a delivery is due").unwrap()).await.unwrap();
        pipeline.settle(handled).await.unwrap();
    }

    pub(crate) async fn settle_queue(queue: &Embedded, pipeline: &Pipeline) {
        while queue.stats().await.unwrap().queued() > 0 {
            Self::handle_one(queue, pipeline).await;
        }
    }

    /// Handles what is queued, retries included, until nothing is, and sees that the sums add up.
    pub(crate) async fn settle(&self, pipeline: &Pipeline) {
        Self::settle_queue(&self.queue, pipeline).await;
        let (stats, sums) = (self.queue.stats().await.unwrap(), self.ledger.sums().await.unwrap());
        assert_eq!(stats.pushed_total, sums.concluded(), "{sums:?}");
        assert_eq!(stats.dead + stats.discarded_total, sums.dead, "{sums:?}");
    }

    /// What the witness `release` signed for this digest, sorted, each as often as it stands there. All must be readable.
    pub(crate) fn signed(&self, digest: &Digest) -> Vec<String> {
        let tag = format!("sha256-{}.sig", digest.encoded());
        let Some((kind, content)) = self.registry.store().manifest("team/app", &tag) else { return vec![] };
        let manifest = SignatureManifest::read(&kind, &content).unwrap();
        let key = self.key.public_key();
        let ours = |hash: &[u8; 32], signature: &[u8]| key.verify(Algorithm::EcdsaSha256, hash, signature).is_ok();
        let mut references: Vec<_> = manifest
            .layers()
            .iter()
            .filter(|layer| ours(&layer.payload_sha256().unwrap(), layer.signature()))
            .map(|layer| {
                let payload = self.registry.store().blob(layer.payload().as_str()).expect("a payload is missing");
                let statement = Statement::read(&payload).unwrap();
                assert_eq!(statement.digest, *digest);
                statement.reference
            })
            .collect();
        references.sort();
        references
    }

    pub(crate) async fn dead(&self) -> Vec<DeadLetter> {
        self.queue.dead_letters(None, 100).await.unwrap()
    }

    pub(crate) async fn outcome(&self, digest: &Digest) -> (Outcome, Vec<(String, Outcome)>) {
        let query = ledger::StoryQuery {
            registry: NAME.parse().unwrap(),
            repository: app(),
            tag: None,
            digest: Some(digest.clone()),
            limit: 1,
        };
        let record = self.ledger.story(query).await.unwrap().remove(0);
        (record.outcome, record.rules.into_iter().map(|rule| (rule.rule, rule.outcome)).collect())
    }

    pub(crate) fn calls(&self) -> u32 {
        self.key.calls.load(SeqCst)
    }

    /// Does something to the ledger's file behind its back.
    pub(crate) fn meddle(&self, sql: &str) {
        rusqlite::Connection::open(ledger_path(&self.folder)).unwrap().execute_batch(sql).unwrap();
    }
}

/// The event of a push, which came a while ago.
pub(crate) fn pushed(repository: &str, tag: Option<&str>, digest: &Digest, ago: Duration) -> PushEvent {
    let now = Clock::system().now() - ago;
    PushEvent {
        id: "sender's".into(),
        source: "main".into(),
        registry: NAME.parse().unwrap(),
        repository: repository.parse().unwrap(),
        tag: tag.map(|tag| tag.parse().unwrap()),
        digest: digest.clone(),
        pushed_at: now,
        received_at: now,
        actor: None,
    }
}

pub(crate) fn message(content_type: &str, key: &str, body: Vec<u8>) -> Message {
    Message {
        id: uuid::Uuid::now_v7().to_string(),
        content_type: content_type.into(),
        key: PartitionKey(key.to_owned()),
        body: body.into(),
        replay_of: None,
    }
}

pub(crate) fn ledger_path(folder: &TempDir) -> PathBuf {
    folder.path().join("ledger.db")
}

pub(crate) fn app() -> Repository {
    "team/app".parse().unwrap()
}

pub(crate) fn tagged(tag: &str) -> String {
    format!("{NAME}/team/app:{tag}")
}

pub(crate) fn pinned(digest: &Digest) -> String {
    format!("{NAME}/team/app@{digest}")
}

pub(crate) fn rule(name: &str, witness: &str) -> Rule {
    Rule {
        name: name.into(),
        registry: None,
        scope: Scope::parse("team").unwrap(),
        exclude: vec![],
        tags: None,
        created: None,
        witness: witness.into(),
        algorithm: Algorithm::EcdsaSha256,
        signature_type: SignatureType::Default,
        trigger: Trigger::Automatic,
        formats: vec![Format::Cosign],
        expiry: None,
        untagged: false,
        enabled: true,
    }
}

pub(crate) fn release() -> Vec<Rule> {
    vec![rule("team", "release")]
}

pub(crate) fn sig(digest: &Digest) -> String {
    Tag::cosign_signatures(digest).unwrap().to_string()
}
