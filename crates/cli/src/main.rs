//! The binary `demur`: its table of contents.
#![forbid(unsafe_code)]

mod architecture;
mod catalogue;
mod cmd;
mod exit;
mod fetch;
mod loaded;
mod progress;
mod report;
mod resident;
mod study;
mod training;
mod training_log;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Makes a chat model refuse what it should, and nothing else, without touching its weights.
///
/// The main job: `demur study` fetches a small chat model, finds the latents of a sparse
/// autoencoder that mediate its refusals, clamps them, measures what that buys and what it costs,
/// and leaves a report at runs/quickstart/report.html.
#[derive(Debug, Parser)]
#[command(name = "demur", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Less output: errors and results only.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// More output: settings, files, and every cause of an error on a line of its own.
    #[arg(short, long, global = true)]
    verbose: bool,
    /// Worker threads; all cores, if not given. Results do not depend on it.
    #[arg(long, global = true, env = "DEMUR_THREADS", value_name = "N")]
    threads: Option<usize>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a study: from a model to a report. The default is the built-in quickstart.
    Study(cmd::study::Args),
    /// Write report.html again from a run's record.json.
    Report(cmd::report::Args),
    /// Fetch a model of the catalogue into the cache.
    Pull(cmd::pull::Args),
    /// List the catalogue and what is cached.
    Models(cmd::models::Args),
    /// Show a checkpoint's architecture, tensors and memory.
    Inspect(cmd::inspect::Args),
    /// Talk to a model in the terminal, steered if asked, beside base if asked.
    Chat(cmd::chat::Args),
    /// Complete one prompt and exit.
    Generate(cmd::generate::Args),
    /// Write residual-stream activations of texts to a file.
    Harvest(cmd::harvest::Args),
    /// Train an SAE on harvested activations, or show one.
    Sae(cmd::sae::Args),
    /// List the features that a study found, or show one.
    Features(cmd::features::Args),
    /// Choose a study's plan on validation prompts; the test prompts stay untouched.
    Tune(cmd::tune::Args),
    /// Train a gate, or see what one makes of prompts.
    Gate(cmd::gate::Args),
    /// Ask suites of questions, under base and plans: capability, refusal, over-refusal.
    Eval(Box<cmd::eval::Args>),
    /// Check a steering plan, say in words what it does, or compare two.
    Plan(cmd::plan::Args),
    /// Measure speed on this machine.
    Bench(cmd::bench::Args),
    /// Print a shell completion script.
    Completions(cmd::completions::Args),
    /// Print a page of docs/reference.
    #[command(hide = true)]
    Reference(cmd::reference::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    progress::set_level(cli.quiet, cli.verbose);
    match run(cli.command, cli.threads) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => exit::report(&e, cli.verbose),
    }
}

fn run(command: Command, threads: Option<usize>) -> anyhow::Result<()> {
    loaded::set_threads(threads)?;
    progress::detail(format_args!(
        "demur {}, {}, {} threads",
        env!("CARGO_PKG_VERSION"),
        demur_kernels::dispatch::isa().name(),
        demur_kernels::threads()
    ));
    match command {
        Command::Study(args) => cmd::study::run(args),
        Command::Report(args) => cmd::report::run(args),
        Command::Pull(args) => cmd::pull::run(args),
        Command::Models(args) => cmd::models::run(args),
        Command::Inspect(args) => cmd::inspect::run(args),
        Command::Chat(args) => cmd::chat::run(args),
        Command::Generate(args) => cmd::generate::run(args),
        Command::Harvest(args) => cmd::harvest::run(args),
        Command::Sae(args) => cmd::sae::run(args),
        Command::Features(args) => cmd::features::run(args),
        Command::Tune(args) => cmd::tune::run(args),
        Command::Gate(args) => cmd::gate::run(args),
        Command::Eval(args) => cmd::eval::run(*args),
        Command::Plan(args) => cmd::plan::run(args),
        Command::Bench(args) => cmd::bench::run(args),
        Command::Completions(args) => {
            cmd::completions::run(args, &mut <Cli as clap::CommandFactory>::command())
        }
        Command::Reference(args) => {
            cmd::reference::run(args, &mut <Cli as clap::CommandFactory>::command())
        }
    }
}
