//! `demur sae`: train one, or show one.

use std::path::{Path, PathBuf};

use anyhow::Result;
use demur_sae::saelens;
use serde_json::json;

use crate::cmd::study::load;
use crate::exit;
use crate::progress::say;
use crate::study::config::SaeSource;
use crate::study::{Options, train_only};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

const EXAMPLES: &str = "\
Examples:
  demur sae train                                the SAE that demur ships, trained again
  demur sae train my.toml --set train.k=64       that of a study of your own
  demur sae info runs/quickstart-sae/train/sae   what it is, its sums checked

Training that was stopped goes on where it was: run the same command again.";

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Train the SAE of a study: its stages pull, harvest and train.
    #[command(after_help = EXAMPLES)]
    Train {
        /// A TOML file, or a built-in study: quickstart, quickstart-sae, refusal, phi3-refusal.
        #[arg(default_value = "quickstart-sae")]
        study: String,
        /// Change a value, for instance `--set train.k=64`; may be repeated.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        sets: Vec<String>,
        /// Folder for runs.
        #[arg(long, default_value = "runs", value_name = "DIR")]
        runs: PathBuf,
        /// Print one JSON object: folder, sha256, sizes, and quality on held-out chats and text.
        #[arg(long)]
        json: bool,
    },
    /// Train an SAE on activations that `demur harvest` wrote.
    ///
    /// Training that was stopped goes on where it was: run the same command again.
    Fit(super::sae_fit::Args),
    /// Show an SAE in the SAELens layout, its sums checked.
    Info {
        /// Its folder.
        folder: PathBuf,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

pub fn run(args: Args) -> Result<()> {
    match args.action {
        Action::Train {
            study,
            sets,
            runs,
            json,
        } => train(&study, &sets, runs, json),
        Action::Fit(args) => super::sae_fit::run(&args),
        Action::Info { folder, json } => info(&folder, json),
    }
}

fn train(name: &str, sets: &[String], runs: PathBuf, as_json: bool) -> Result<()> {
    let mut study = load(name, sets)?;
    study.sae.source = SaeSource::Train;
    exit::say_how_to_go_on();
    let (folder, trained) = train_only(study, &Options { runs, from: None })?;
    if as_json {
        return say(json!({
            "folder": folder, "sha256": trained.sha256, "d_sae": trained.d_sae, "k": trained.k,
            "trained_on_tokens": trained.trained_on_tokens,
            "chat": trained.chat, "text": trained.text,
        }));
    }
    say(folder.display())?;
    say(format_args!(
        "  {} latents, k = {}; held out: FVU {:.3} on chats, {:.3} on text",
        trained.d_sae, trained.k, trained.chat.fvu.value, trained.text.fvu.value
    ))
}

fn info(folder: &Path, as_json: bool) -> Result<()> {
    let sae = saelens::load(folder)?;
    let sha256 = saelens::weights_sha256(folder)?;
    let cfg = sae.cfg();
    if as_json {
        return say(json!({ "folder": folder, "cfg": cfg, "sha256": sha256 }));
    }
    say(format_args!(
        "TopK, k = {}: {} -> {} latents",
        cfg.k, cfg.d_model, cfg.d_sae
    ))?;
    say(format_args!("model   {}", cfg.model_name))?;
    say(format_args!("site    {}", cfg.hook_name))?;
    say(format_args!("sha256  {sha256}"))
}
