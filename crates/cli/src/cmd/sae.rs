//! `demur sae`: train one, or show one.

use std::path::{Path, PathBuf};

use anyhow::Result;
use demur_sae::saelens;
use serde_json::json;

use crate::study::config::{SaeSource, Study};
use crate::study::{Options, train_only};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Train the SAE of a study: its stages pull, harvest and train.
    Train {
        /// A TOML file, or a built-in study.
        #[arg(default_value = "quickstart-sae")]
        study: String,
        /// Change a value; may be repeated.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        sets: Vec<String>,
        /// Folder for runs.
        #[arg(long, default_value = "runs", value_name = "DIR")]
        runs: PathBuf,
    },
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
        Action::Train { study, sets, runs } => {
            let mut study = Study::load(&study, &sets)?;
            study.sae.source = SaeSource::Train;
            let (folder, trained) = train_only(study, &Options { runs, from: None })?;
            println!(
                "{}\n  {} latents, k = {}; held out: FVU {:.3} on chats, {:.3} on text",
                folder.display(),
                trained.d_sae,
                trained.k,
                trained.chat.quality.fvu,
                trained.text.quality.fvu
            );
            Ok(())
        }
        Action::Info { folder, json } => info(&folder, json),
    }
}

fn info(folder: &Path, as_json: bool) -> Result<()> {
    let sae = saelens::load(folder)?;
    let sha256 = saelens::weights_sha256(folder)?;
    let cfg = sae.cfg();
    if as_json {
        println!("{}", json!({ "cfg": cfg, "sha256": sha256 }));
    } else {
        println!("TopK, k = {}: {} -> {}", cfg.k, cfg.d_model, cfg.d_sae);
        println!("model   {}", cfg.model_name);
        println!("site    {}", cfg.hook_name);
        println!("sha256  {sha256}");
    }
    Ok(())
}
