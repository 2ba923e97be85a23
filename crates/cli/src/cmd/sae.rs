//! `demur sae`: train one, show, measure, compare or convert.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use demur_eval::record::HeldOut;
use demur_sae::formats::{self, sparsify};
use demur_sae::saelens::{self, WeightType};
use serde_json::json;

use crate::cmd::study::load;
use crate::exit;
use crate::progress::say;
use crate::study::config::SaeSource;
use crate::study::{Options, sae_folder, train_only};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

const EXAMPLES: &str = "\
Examples:
  demur sae train                                the SAE that demur ships, trained again
  demur sae train my.toml --set train.k=64       that of a study of your own
  demur sae train my.toml --set train.saes='[{name=\"k64\", k=64}, {name=\"l6\", site=\"layers.6\"}]'
                                                 and two more from the same pass over the model
  demur sae info runs/quickstart-sae/train/sae   what it is, its sums checked
  demur sae info params.npz                      of any format that is read
  demur sae convert ae.pt my-sae                 to the SAELens layout
  demur sae fit a.safetensors --architecture batchtopk
  demur sae eval my-sae --activations b.safetensors --model MODEL

Training that was stopped goes on where it was: run the same command again.";

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Train the SAE of a study, and those in its list `train.saes`: its stages pull, harvest and train.
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
        /// Print one JSON object: folder, sha256, sizes, and quality on held-out chats and text, and in
        /// `saes` the same of each that was trained beside it.
        #[arg(long)]
        json: bool,
    },
    /// Train an SAE on activations that `demur harvest` wrote.
    ///
    /// Training that was stopped goes on where it was: run the same command again.
    Fit(super::sae_fit::Args),
    /// Measure an SAE on held-out activations, and what it costs a model that reads its reconstructions.
    ///
    /// FVU, FVE, L0, dead latents, densities and the mean cosine; with a model, cross-entropy and KL
    /// divergence with the reconstruction patched in at the SAE's site, beside the model as it is and an
    /// ablation, on text and on chats apart.
    Eval(super::sae_eval::EvalArgs),
    /// Compare two SAEs: settings, and which decoder rows of one the other has.
    Diff(super::sae_eval::DiffArgs),
    /// Show an SAE of any format, its sums checked if it has a manifest.
    Info {
        /// Its folder, or its file.
        path: PathBuf,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Write an SAE of any format in another.
    ///
    /// Read are SAELens (6 and the flat one before), sparsify, dictionary_learning, openai, Gemma Scope,
    /// Llama Scope, and the gated SAEs of Phi-3. Constants of normalisation are folded into the weights.
    Convert {
        /// A folder, or a file (`.npz`, `.safetensors`, `.pt`).
        from: PathBuf,
        /// The folder to write, which must not exist.
        to: PathBuf,
        /// The format to write.
        #[arg(long, value_enum, default_value_t = Target::Saelens)]
        format: Target,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Target {
    Saelens,
    Sparsify,
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
        Action::Eval(args) => super::sae_eval::run(&args),
        Action::Diff(args) => super::sae_eval::diff(&args),
        Action::Info { path, json } => info(&path, json),
        Action::Convert {
            from,
            to,
            format,
            json,
        } => convert(&from, &to, format, json),
    }
}

fn train(name: &str, sets: &[String], runs: PathBuf, as_json: bool) -> Result<()> {
    let mut study = load(name, sets)?;
    study.sae.source = SaeSource::Train;
    exit::say_how_to_go_on();
    let (stage, trained) = train_only(study, &Options { runs, from: None })?;
    let folder = |name: &str| sae_folder(&stage, name).join("sae");
    if as_json {
        let beside = trained.saes.iter().map(|s| {
            json!({
                "name": s.name, "folder": folder(&s.name), "site": s.site, "sha256": s.sha256,
                "d_sae": s.d_sae, "k": s.k, "chat": s.chat, "text": s.text,
            })
        });
        return say(json!({
            "folder": folder(""), "sha256": trained.sha256, "d_sae": trained.d_sae, "k": trained.k,
            "trained_on_tokens": trained.trained_on_tokens,
            "chat": trained.chat, "text": trained.text, "saes": beside.collect::<Vec<_>>(),
        }));
    }
    let line = |name: &str, d_sae: usize, k: usize, chat: &HeldOut, text: &HeldOut| {
        say(folder(name).display())?;
        say(format_args!(
            "  {d_sae} latents, k = {k}; held out: FVU {:.3} on chats, {:.3} on text",
            chat.fvu.value, text.fvu.value
        ))
    };
    let t = &trained;
    line("", t.d_sae, t.k, &t.chat, &t.text)?;
    let mut saes = t.saes.iter();
    saes.try_for_each(|s| line(&s.name, s.d_sae, s.k, &s.chat, &s.text))
}

fn info(path: &Path, as_json: bool) -> Result<()> {
    let (sae, format) = formats::load(path)?;
    let sha256 = match format {
        formats::Format::Saelens => Some(saelens::weights_sha256(path)?),
        _ => None,
    };
    let (cfg, wiring) = (sae.cfg(), sae.wiring());
    if as_json {
        return say(json!({
            "folder": path, "format": format, "architecture": sae.architecture(),
            "activation": sae.activation(), "input_norm": wiring.input_norm,
            "centred": wiring.centre, "d_out": sae.d_out(), "cfg": cfg, "sha256": sha256,
        }));
    }
    say(format_args!(
        "{}, at most {} active: {} -> {} latents",
        sae.architecture(),
        cfg.k,
        cfg.d_model,
        cfg.d_sae
    ))?;
    say(format_args!("input   {}", wiring.input_norm.name()))?;
    say(format_args!("model   {}", cfg.model_name))?;
    say(format_args!("site    {}", cfg.hook_name))?;
    match sha256 {
        Some(sum) => say(format_args!("sha256  {sum}")),
        None => Ok(()),
    }
}

fn convert(from: &Path, to: &Path, target: Target, as_json: bool) -> Result<()> {
    if to.exists() {
        bail!(
            "{} is there already; name a folder that is not",
            to.display()
        );
    }
    let (sae, format) = formats::load(from)?;
    match target {
        Target::Saelens => {
            let training = json!({ "converted_from": format });
            saelens::save(&sae, to, WeightType::F32, &training)?;
        }
        Target::Sparsify => sparsify::save(&sae, to)?,
    }
    if as_json {
        return say(json!({ "folder": to, "architecture": sae.architecture(), "from": format }));
    }
    say(to.display())
}
