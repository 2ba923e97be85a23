//! `demur study`: the main job.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::builder::PossibleValuesParser;
use serde_json::json;

use crate::exit;
use crate::progress::say;
use crate::study::config::{SaeSource, Study};
use crate::study::{Options, STAGES, dry_run, run_study};

const EXAMPLES: &str = "\
Examples:
  demur study                                    the quickstart, into runs/quickstart
  demur study --set evaluate.max_new_tokens=48   the same with longer replies
  demur study my.toml --dry-run                  check a study of your own
  demur study my.toml --from tune                choose the clamp anew, and test again
  demur study --json | tail -1                   the figures for a program

A study that was stopped goes on where it was: run the same command again.";

/// Which study a command runs, and where.
#[derive(Debug, clap::Args)]
pub struct Which {
    /// A TOML file, or a built-in study: quickstart, quickstart-sae, refusal, phi3-refusal.
    #[arg(default_value = "quickstart")]
    study: String,
    /// Change a value, for instance `--set evaluate.max_new_tokens=16`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Folder for runs.
    #[arg(long, default_value = "runs", value_name = "DIR")]
    pub runs: PathBuf,
}

impl Which {
    /// The study with its changes.
    pub fn load(&self) -> Result<Study> {
        load(&self.study, &self.sets)
    }
}

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    which: Which,
    /// Run this stage and all after it anew.
    #[arg(long, value_name = "STAGE", value_parser = PossibleValuesParser::new(STAGES))]
    from: Option<String>,
    /// Check the study and say what it would do; nothing is written.
    #[arg(long)]
    dry_run: bool,
    /// Train the SAE anew instead of loading one.
    #[arg(long)]
    retrain: bool,
    /// Print the figures as one JSON object, as the last line; with --dry-run, the whole study.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let Which { sets, runs, .. } = &args.which;
    let mut study = args.which.load()?;
    if args.retrain && study.sae.source == SaeSource::Shipped {
        // The shipped SAE's own settings, and what is set for them here.
        let own = |s: &&String| s.starts_with("corpus.") || s.starts_with("train.");
        let sets: Vec<String> = sets.iter().filter(own).cloned().collect();
        let recipe = Study::load("quickstart-sae", &sets)?;
        study.corpus = recipe.corpus;
        study.train = recipe.train;
    }
    if args.retrain {
        study.sae.source = SaeSource::Train;
    }
    if args.dry_run && args.json {
        let folder = runs.join(&study.name);
        return say(json!({ "run": folder, "stages": STAGES, "study": study }));
    }
    if args.dry_run {
        return dry_run(&study, runs);
    }
    exit::say_how_to_go_on();
    let record = run_study(
        study,
        &Options {
            runs: runs.clone(),
            from: args.from,
        },
    )?;
    say(format_args!("\n{}", record.verdict.headline))?;
    for line in &record.verdict.lines {
        say(format_args!("  {line}"))?;
    }
    let report = runs.join(&record.study).join("report.html");
    say(format_args!("  report: {}", report.display()))?;
    if args.json {
        say(json!({
            "study": record.study,
            "model": record.model.name,
            "wall_s": record.wall_s,
            "rows": record.rows(),
        }))?;
    }
    Ok(())
}

/// Loads a study with overrides. A name that names nothing, and an override without which the study
/// would be right, are errors of the command line.
pub fn load(name: &str, sets: &[String]) -> Result<Study> {
    let loaded = Study::load(name, sets);
    let Err(e) = loaded else {
        return loaded;
    };
    let plain = Study::load(name, &[]);
    let unknown = plain.is_err() && !Path::new(name).exists();
    if plain.is_ok() || unknown {
        bail!(e.context(exit::Usage));
    }
    Err(e)
}
