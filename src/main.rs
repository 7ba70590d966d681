use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser as _};
use countersign::{
    app,
    cli::{self, Cli, Command, Output, Usage},
    clock::Clock,
    config::{Config, Problems},
    telemetry::{self, LogFormat, LogSettings},
};

/// With the system's, a quarter of what taking in an event costs was spent on memory: much of it is got by one thread and given
/// back by another.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(workers()).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let output = cli.output;
    let result = runtime.block_on(start(cli));
    // What still blocks a thread has no say in when we end.
    runtime.shutdown_background();
    result.unwrap_or_else(|error| report(&error, output))
}

/// Nearly all that the runtime does is wait for others, so it gets half of the processors. On all of them its threads spend
/// more on waking each other than they gain; and the queue, the ledger and the registry beside want some too.
fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, |processors| processors.get().div_ceil(2))
}

async fn start(cli: Cli) -> anyhow::Result<ExitCode> {
    let clock = Clock::system();
    let (output, path) = (cli.output, cli.config);
    // Commands that need no configuration work where there is none.
    match &cli.command {
        Command::Check(args) if cli::check::print_reference(args) => return Ok(ExitCode::SUCCESS),
        Command::Check(args) => {
            log_to_stderr("warn")?;
            return cli::check::run(Config::load(&path), &clock, args, output).await;
        }
        Command::Key(command) => return cli::key::run(command, output),
        Command::Admission(args) if args.crds => return Ok(cli::admission::print_crds(output)),
        Command::Health(args) => return cli::health::run(&path, args, output).await,
        Command::Completions { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "countersign", &mut std::io::stdout());
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    let (config, warnings) = Config::load(&path)?;
    if let Command::Admission(cli::AdmissionArgs { ca_bundle: true, .. }) = cli.command {
        return cli::admission::print_ca_bundle(&config, &clock, output);
    }
    if let Command::Serve | Command::Admission(_) = cli.command {
        let format = match config.log.format {
            countersign::config::LogFormat::Human => LogFormat::Human,
            countersign::config::LogFormat::Json => LogFormat::Json,
        };
        let log = telemetry::install(&LogSettings { format, filter: config.log.level.to_string() })?;
        for warning in &warnings {
            tracing::warn!("{warning}");
        }
        return match cli.command {
            Command::Admission(_) => app::serve_admission(path, config, log).await,
            _ => app::serve(&path, config, log).await,
        };
    }
    log_to_stderr("error")?;
    match &cli.command {
        Command::Witness(command) => cli::witness::run(&config, &clock, command, output).await,
        Command::Verify(args) if !args.manifests.files.is_empty() => {
            cli::manifest::verify(&config, &clock, &args.manifests, output).await
        }
        Command::Resolve(args) => cli::manifest::resolve(&config, &clock, &args.manifests).await,
        Command::Verify(args) => cli::verify::run(&config, &clock, args, output).await,
        Command::CopySignatures(args) => cli::copy_signatures::run(&config, args, output).await,
        Command::Sign(args) => {
            let client = app::client(&config, &clock, !args.dry_run).await?;
            cli::sign::run(&config, &client, &clock, args, output).await
        }
        Command::Report(args) => cli::report::run(&config, &clock, args, output).await,
        Command::Explain(args) => {
            let client = app::client(&config, &clock, false).await?;
            cli::explain::run(&config, &client, &clock, &args.reference, output).await
        }
        Command::Queue(command) => {
            let client = app::client(&config, &clock, false).await?;
            cli::queue::run(&client, &clock, command, output).await
        }
        Command::Serve
        | Command::Admission(_)
        | Command::Check(_)
        | Command::Key(_)
        | Command::Health(_)
        | Command::Completions { .. } => {
            unreachable!("handled above")
        }
    }
}

fn log_to_stderr(filter: &str) -> anyhow::Result<()> {
    telemetry::install(&LogSettings { format: LogFormat::Human, filter: filter.to_owned() }).map(drop).context("cannot log")
}

/// Says what went wrong, and turns it into an exit code: 2 what was asked is wrong, 3 what was asked could not be reached.
fn report(error: &anyhow::Error, output: Output) -> ExitCode {
    let is_usage = error.chain().any(|cause| cause.is::<Usage>() || cause.is::<Problems>());
    match output {
        // Each of them says by itself what it is.
        Output::Text if error.is::<Problems>() => eprintln!("{error:#}"),
        Output::Text => eprintln!("error: {error:#}"),
        Output::Json => println!("{}", serde_json::json!({ "error": format!("{error:#}") })),
    }
    ExitCode::from(if is_usage { 2 } else { 3 })
}
