//! What an administrator types. One file a subcommand.

pub mod admission;
pub mod check;
mod client;
pub mod copy_signatures;
pub mod explain;
pub mod health;
pub mod key;
pub mod manifest;
pub mod output;
pub mod queue;
pub mod report;
pub mod sign;
pub mod verify;
pub mod witness;

use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};

pub use self::{
    client::Client,
    queue::{DeadArgs, DiscardArgs, Move, QueueCommand, ReplayArgs, Selection},
};

/// Signs what is pushed to a container registry, and verifies it before it runs.
///
/// Start with `countersign key generate` and `countersign serve`, or read config/examples. Every command says with
/// --help what it does and what its exit codes mean.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, arg_required_else_help = true, after_help = EXIT_CODES)]
pub struct Cli {
    /// The configuration file.
    #[arg(
        long,
        short,
        global = true,
        env = "COUNTERSIGN_CONFIG",
        value_name = "FILE",
        default_value = "/etc/countersign/countersign.toml"
    )]
    pub config: PathBuf,

    /// How answers are printed.
    #[arg(long, short, global = true, value_enum, default_value_t = Output::Text)]
    pub output: Output,

    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done; 1 a negative answer (not attested, check failed); 2 wrong usage or \
                          configuration; 3 something could not be reached.";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// For programs: one JSON document.
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon: take push events in, sign, answer.
    ///
    /// SIGTERM finishes what is in hand and exits 0; a second one aborts. SIGHUP reads the configuration again: a bad
    /// file changes nothing and is reported in the log and in `countersign_config_last_reload_success`.
    Serve,
    /// Validate the configuration: all errors at once, each with file, line and column.
    Check(CheckArgs),
    /// Make a local key, for trying out and for small set-ups.
    #[command(subcommand)]
    Key(KeyCommand),
    /// Who signs.
    #[command(subcommand)]
    Witness(WitnessCommand),
    /// Sign images now: what rules with `trigger = "manual"` wait for, and what was pushed before a rule was there.
    ///
    /// A reference is an image (`host/repository:tag`, `host/repository@sha256:…`) or, with --recursive, a namespace
    /// (`host/namespace`) of which every tag is signed. The rules decide by whom and how.
    Sign(SignArgs),
    /// Say whether images are attested, by whom, and otherwise what is missing. Needs public keys only, or with --with-kms the KMS.
    ///
    /// With --filename it judges manifests as the admission webhook would, by the policies of the configuration and those that are
    /// given as resources (--policies): YAML with several documents, lists, or JSON. 0 if all would be admitted.
    Verify(VerifyArgs),
    /// Take an image's signatures along to where the image has been copied to, another registry or repository.
    ///
    /// Everybody's signatures of the image, and of each platform of an index: what is under the `.sig` tag, and the bundles and
    /// notation signatures that refer to it. None is changed, and what the destination has stays. The image must be there
    /// under the same digest. A signature of a digest alone (`signature_type = "simple"`, a bundle) counts there; one that names
    /// a tag approves that name only, as each line says.
    ///
    /// Exit codes: 0 all that there is to copy is there; 1 the image is not, or a registry refuses; 2 usage; 3 a registry could
    /// not be reached.
    CopySignatures(CopySignaturesArgs),
    /// Pin the tags in manifests to the digests that the policies approve, and print them; comments and all else stay.
    ///
    /// Policies count as they do for `countersign verify --filename`. An image on which there is none is pinned to what its tag
    /// names now, if its registry is in the configuration, and stays as it is if not.
    ///
    /// Exit codes: 0 all are printed; 1 an image would be denied whatever it is pinned to, and nothing is printed; 2 usage; 3 a
    /// registry could not be asked.
    Resolve(ResolveArgs),
    /// Run the admission webhook of a Kubernetes cluster: only images run that meet the policies of their namespace.
    ///
    /// It needs public keys only, never a KMS. POST /validate and /mutate are what the cluster calls; /livez, /readyz and
    /// /metrics are as the daemon's. SIGTERM stops it; SIGHUP reads the configuration again.
    Admission(AdmissionArgs),
    /// Say what runs in a cluster and would be denied now: a signature is gone, a key was revoked, a policy is new.
    ///
    /// It lists the pods and has their images verified again, as `recheck` in [admission] kubernetes has the webhook do, by the same
    /// policies. Nothing is changed. It needs the right to list pods.
    ///
    /// Exit codes: 0 all would be admitted; 1 not all; 2 usage; 3 the cluster's API could not be reached.
    Report(ReportArgs),
    /// The whole story of an image: rules that match or why they don't, signatures it has, what is queued or dead.
    Explain(ExplainArgs),
    /// The queue from outside. Works whether the daemon runs or not.
    #[command(subcommand)]
    Queue(Box<QueueCommand>),
    /// Ask the daemon that runs here whether it is alive: the health check of a container, or of whatever watches it.
    ///
    /// It asks /livez, or with --ready /readyz, of the address that the configuration listens on, by loopback where that is
    /// every address, and waits 4 s at most. Of the file it reads `[server]` alone: a daemon that keeps working after its
    /// file was spoilt is well.
    ///
    /// Exit codes: 0 it is; 1 it answers that it is not, and with --ready why; 2 the configuration does not say where it
    /// listens; 3 nobody answers there.
    Health(HealthArgs),
    /// Print completions for a shell: `countersign completions bash > /etc/bash_completion.d/countersign`.
    Completions { shell: clap_complete::Shell },
}

#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Also reach every registry, queue and key, and see by a dry run or a probe signature whether each witness may sign.
    #[arg(long)]
    pub online: bool,
    /// Print the JSON Schema of the configuration file, which editors use, and do nothing else.
    #[arg(long, conflicts_with = "online")]
    pub schema: bool,
    /// Print the defaults, every key with a sentence, and do nothing else.
    #[arg(long, conflicts_with_all = ["online", "schema"])]
    pub defaults: bool,
}

#[derive(Debug, Args)]
pub struct HealthArgs {
    /// Ask whether it can do its work: queue, keys and registries answer. One that is not ready needs no restart.
    #[arg(long)]
    pub ready: bool,
}

#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Write a new private key (PKCS#8 PEM, readable by you alone) and print its public half.
    Generate {
        /// `RSA_2048`, `RSA_3072`, `RSA_4096` or `EC_P256`.
        #[arg(long, default_value = "EC_P256")]
        spec: String,
        /// Where to write it. An existing file is never overwritten.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Encrypt it with the passphrase in this file, whose last line end is not part of it.
        #[arg(long, value_name = "FILE")]
        passphrase_file: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
pub enum WitnessCommand {
    /// List the witnesses: their keys and, of the daemon that runs here, whether they sign, how fast, and what went wrong last.
    List,
    /// Print a witness's public key in PEM, for `cosign verify --key` and policy.json.
    PublicKey { name: String },
    /// Print a witness's certificate in PEM, for the trust store of notation, Ratify or Kyverno.
    ///
    /// It is the last certificate of the witness's `certificate` in the configuration; without that, one that the witness's
    /// key signs for itself the first time that it is asked for. That is kept in the ledger, so every replica has the same one.
    /// With `--output json` it also says whom a trust policy names: `trusted_identity`.
    Certificate {
        name: String,
        /// Have the key sign another one, which signatures name from the daemon's next start on. Give it to those who verify
        /// first: the old one stays good for what names it.
        #[arg(long)]
        renew: bool,
    },
}

#[derive(Debug, Args)]
pub struct SignArgs {
    #[arg(required = true, value_name = "REFERENCE")]
    pub references: Vec<String>,
    /// Take each reference for a namespace, and sign every tag of every repository in it.
    #[arg(long, short)]
    pub recursive: bool,
    /// Only say what would be signed, and by which rules.
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Images: `host/repository:tag` or `host/repository@sha256:…`.
    #[arg(
        required_unless_present = "files",
        conflicts_with_all = ["files", "policies", "cluster", "namespace"],
        value_name = "REFERENCE"
    )]
    pub references: Vec<String>,
    /// Only signatures of this witness count; may be given more than once, and then each must have signed.
    #[arg(long, value_name = "NAME", conflicts_with = "files")]
    pub witness: Vec<String>,
    /// Have each signature verified by the KMS of its witness, too, where that can be asked. Needs what signing needs, and the right
    /// to verify (on AWS kms:Verify, on Alibaba Cloud kms:AsymmetricVerify, on Azure keys/verify, in a Vault `update` on the key's
    /// verify path).
    #[arg(long, conflicts_with = "files")]
    pub with_kms: bool,
    #[command(flatten)]
    pub manifests: ManifestArgs,
}

#[derive(Debug, Args)]
pub struct CopySignaturesArgs {
    /// The image whose signatures are copied: `host/repository:tag` or `host/repository@sha256:…`.
    #[arg(value_name = "SRC")]
    pub source: String,
    /// The same image elsewhere.
    #[arg(value_name = "DST")]
    pub destination: String,
    /// Only say what would be copied.
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("what").arg("files").required(true)))]
pub struct ResolveArgs {
    #[command(flatten)]
    pub manifests: ManifestArgs,
}

#[derive(Debug, Args)]
pub struct ManifestArgs {
    /// A manifest, or a folder of them (*.yaml, *.yml, *.json); `-` is standard input. May be given more than once.
    #[arg(id = "files", long = "filename", short = 'f', value_name = "FILE|DIR")]
    pub files: Vec<PathBuf>,
    /// Manifests of `SecurityPolicy` and `Witness` resources that count besides the configuration's policies, as they do in a
    /// cluster that has them; other objects in it are passed over. Those among the manifests that are judged count, too. May be
    /// given more than once.
    #[arg(long, value_name = "FILE|DIR", requires = "files")]
    pub policies: Vec<PathBuf>,
    /// The cluster whose policies count. As `cluster` in [admission] says, if absent.
    #[arg(long, value_name = "NAME", requires = "files")]
    pub cluster: Option<String>,
    /// The namespace that it would be applied to. As the manifest says, or `default`, if absent.
    #[arg(long, short, value_name = "NAME", requires = "files")]
    pub namespace: Option<String>,
}

#[derive(Debug, Args)]
pub struct AdmissionArgs {
    /// Print the authority that the API server has to trust, as it stands in `caBundle`, and do nothing else. Made if there is none.
    #[arg(long)]
    pub ca_bundle: bool,

    /// Print the definitions of the resources `SecurityPolicy` and `Witness`, for `kubectl apply`, and do nothing else.
    #[arg(long, conflicts_with = "ca_bundle")]
    pub crds: bool,
}

#[derive(Debug, Args)]
pub struct ReportArgs {
    /// How the cluster's API is reached. As `kubernetes` in [admission] says, if absent.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The cluster whose policies count. As `cluster` in [admission] says, if absent.
    #[arg(long, value_name = "NAME")]
    pub cluster: Option<String>,
    /// Only what runs in this namespace.
    #[arg(long, short, value_name = "NAME")]
    pub namespace: Option<String>,
}

#[derive(Debug, Args)]
pub struct ExplainArgs {
    #[arg(value_name = "REFERENCE")]
    pub reference: String,
}

/// What was asked cannot be meant: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);
