//! `demur sae eval`: how good an SAE is on what it has not seen; `demur sae diff`: two SAEs side by side.
//!
//! With a model, the SAE's reconstruction is patched into the residual stream at its site, at all
//! positions but the first (an attention sink), on plain text and on chats apart. Beside it run two
//! baselines: the model as it is (identity), and an ablation that puts the mean of the rows (or zeros)
//! in the reconstruction's place. All three are steering plans; the ablation is the passthrough of an
//! SAE that always reconstructs the same.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use demur_eval::prompts::{self, Passage};
use demur_eval::text::{self, PassageScore};
use demur_features::harvest::{Products, Sequence, harvest};
use demur_model::chat::Message;
use demur_model::decoder::Workspace;
use demur_model::hooks::{Role, Site};
use demur_model::tokenizer::Special;
use demur_sae::compare::{Found, max_cosines};
use demur_sae::metrics::{QualityMeter, recovered};
use demur_sae::train::Rows;
use demur_sae::{Sae, SaeConfig, activations, formats};
use demur_steering::{
    CompiledPlan, ErrorTerm, InterventionSpec, SaeEntry, SaeSet, SteeringPlan, compile,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::loaded::{Loaded, conversation};
use crate::progress::{Progress, say};
use crate::study::config::Precision;

/// Rows that are coded together.
const ROWS: usize = 1024;
/// Tokens of a pass of the harvest.
const BATCH_TOKENS: usize = 1024;

#[derive(Debug, clap::Args)]
pub struct EvalArgs {
    /// The SAE, of any format.
    sae: PathBuf,
    /// Safetensors files with `activations [n, d_model]`, as `demur harvest` writes them.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    activations: Vec<PathBuf>,
    /// A catalogue name or a path: patch the reconstruction into this model.
    #[arg(long, short)]
    model: Option<String>,
    /// JSONL of plain text, a line `{"id": .., "text": ..}`; the passages that demur ships, if not given.
    #[arg(long, value_name = "FILE", requires = "model")]
    text: Option<PathBuf>,
    /// JSONL of chats, a line `{"id": .., "prompt": .., "reply": ..}` of which the reply may be absent;
    /// the ordinary requests that demur ships, if not given.
    #[arg(long, value_name = "FILE", requires = "model")]
    chats: Option<PathBuf>,
    /// At most this many texts, and as many chats.
    #[arg(long, default_value_t = 32)]
    limit: usize,
    /// Longest sequence, tokens; longer ones are cut.
    #[arg(long, default_value_t = 256)]
    context: usize,
    /// What takes the reconstruction's place in the ablation.
    #[arg(long, value_enum, default_value_t = Ablation::Mean)]
    ablation: Ablation,
    /// Rows with a norm above this many medians are left out of the quality of reconstructions.
    #[arg(long, default_value_t = 10.0)]
    outlier: f32,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Ablation {
    Mean,
    Zero,
}

#[derive(Debug, clap::Args)]
pub struct DiffArgs {
    /// An SAE, of any format.
    first: PathBuf,
    /// Another.
    second: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// A chat of `--chats`.
#[derive(Debug, Deserialize)]
struct Chat {
    id: String,
    prompt: String,
    #[serde(default)]
    reply: Option<String>,
}

pub fn run(args: &EvalArgs) -> Result<()> {
    if args.activations.is_empty() && args.model.is_none() {
        bail!("give --activations FILE, or --model NAME, or both: there is nothing to measure on");
    }
    let (sae, _) = formats::load(&args.sae)?;
    if sae.wiring().transcoder {
        bail!(
            "a transcoder predicts another site than it reads; there is nothing to patch it into"
        );
    }
    let sae = Arc::new(sae);
    let mut out = json!({ "sae": args.sae, "architecture": sae.architecture() });
    if !args.activations.is_empty() {
        let mut data = Vec::new();
        for path in &args.activations {
            let file = activations::load(path)?;
            if file.d_model != sae.d_model() {
                let (found, wanted) = (file.d_model, sae.d_model());
                bail!("{}: rows of {found}, not {wanted}", path.display());
            }
            data.extend(file.data);
        }
        out["activations"] = quality(&sae, &data, args.outlier)?;
    }
    if let Some(name) = &args.model {
        let loaded = Loaded::open(name, Precision::Fast)?;
        let spec = loaded.model.spec();
        let site: Site = sae.cfg().hook_name.parse().with_context(|| {
            format!("the SAE's site '{}' can't be patched", sae.cfg().hook_name)
        })?;
        let site = site.check(spec.n_layers)?;
        if spec.d_model != sae.d_model() {
            let (reads, has) = (sae.d_model(), spec.d_model);
            bail!("the SAE reads rows of {reads}, the model's residual stream has {has}");
        }
        out["site"] = json!(site.to_string());
        out["ablation"] = json!(args.ablation);
        out["text"] = patched(args, &loaded, &sae, site, &texts(args, &loaded)?)?;
        if loaded.chat.is_ok() || args.chats.is_some() {
            out["chat"] = patched(args, &loaded, &sae, site, &chats(args, &loaded)?)?;
        }
    }
    if args.json {
        return say(out);
    }
    for key in ["activations", "text", "chat"] {
        if let Some(figures) = out.get(key).and_then(Value::as_object) {
            say(key)?;
            for (name, value) in figures.iter().filter(|f| !f.1.is_array()) {
                say(format_args!("  {name:<16} {value}"))?;
            }
        }
    }
    Ok(())
}

/// Quality on rows, outliers left out.
fn quality(sae: &Sae, data: &[f32], outlier: f32) -> Result<Value> {
    let d = sae.d_model();
    let kept = Rows { data, d_model: d }.inliers(outlier);
    if kept.is_empty() {
        bail!("there is no row to measure on");
    }
    let mut meter = QualityMeter::new(d, sae.d_sae());
    for some in kept.chunks(ROWS) {
        let rows = some
            .iter()
            .flat_map(|&i| &data[i as usize * d..(i as usize + 1) * d]);
        meter.add_rows(sae, &rows.copied().collect::<Vec<_>>());
    }
    let q = meter.quality();
    Ok(json!({
        "n_tokens": q.n_tokens, "fvu": q.fvu, "fve": 1.0 - q.fvu, "l0": q.l0, "dead": q.dead,
        "cosine": q.cosine, "density_histogram": meter.histogram(),
    }))
}

/// Quality on the sequences' rows, and what patching costs the model.
fn patched(
    args: &EvalArgs,
    loaded: &Loaded,
    sae: &Arc<Sae>,
    site: Site,
    sequences: &[Sequence],
) -> Result<Value> {
    let d = sae.d_model();
    let mut data = Vec::new();
    harvest(
        &loaded.model,
        site,
        sequences,
        BATCH_TOKENS,
        Products::Int8,
        |_, x| {
            data.extend_from_slice(&x[d.min(x.len())..]);
            Ok(())
        },
    )?;
    let mut out = quality(sae, &data, args.outlier)?;
    let constant = match args.ablation {
        Ablation::Zero => vec![0.0; d],
        Ablation::Mean => mean(&data, d),
    };
    let plans = [
        passthrough(loaded, sae, site)?,
        passthrough(loaded, &Arc::new(always(constant)?), site)?,
    ];
    let model = &loaded.model;
    let d_vocab = model.spec().d_vocab;
    let mut workspace = Workspace::default();
    let mut sums = [PassageScore {
        n: 0,
        nll: 0.0,
        kl: 0.0,
    }; 3];
    let bar = Progress::new("eval", "sequences", sequences.len() as u64);
    for s in sequences {
        let base = text::logits(model, &s.tokens, &s.roles, None, &mut workspace)?;
        let mut add = |at: usize, logits: &[f32]| {
            let score = text::score(&s.tokens, &base, logits, d_vocab);
            let sum: &mut PassageScore = &mut sums[at];
            sum.n += score.n;
            sum.nll += score.nll;
            sum.kl += score.kl;
        };
        add(0, &base);
        for (i, plan) in plans.iter().enumerate() {
            let logits = text::logits(model, &s.tokens, &s.roles, Some(plan), &mut workspace)?;
            add(i + 1, &logits);
        }
        bar.advance(1);
    }
    bar.finish();
    let n = sums[0].n.max(1) as f64;
    let [clean, patched, ablated] = sums.map(|s| (s.nll / n, s.kl / n));
    for (key, value) in [
        ("ce", clean.0),
        ("ce_sae", patched.0),
        ("ce_ablated", ablated.0),
        ("ce_loss_score", recovered(clean.0, patched.0, ablated.0)),
        ("kl", patched.1),
        ("kl_ablated", ablated.1),
        ("kl_div_score", recovered(0.0, patched.1, ablated.1)),
    ] {
        out[key] = json!(value);
    }
    Ok(out)
}

fn mean(data: &[f32], d: usize) -> Vec<f32> {
    let n = (data.len() / d).max(1) as f64;
    let mut sum = vec![0.0f64; d];
    for row in data.chunks_exact(d) {
        sum.iter_mut()
            .zip(row)
            .for_each(|(s, v)| *s += f64::from(*v));
    }
    sum.iter().map(|s| (s / n) as f32).collect()
}

/// An SAE whose reconstruction is always `x_hat`.
fn always(x_hat: Vec<f32>) -> Result<Sae> {
    let d = x_hat.len();
    let cfg = SaeConfig {
        d_model: d,
        d_sae: 1,
        k: 1,
        hook_name: String::new(),
        model_name: String::new(),
    };
    Ok(Sae::new(cfg, vec![0.0; d], vec![0.0], vec![0.0; d], x_hat)?)
}

/// The plan that puts `sae`'s reconstruction in the place of the residual.
fn passthrough(loaded: &Loaded, sae: &Arc<Sae>, site: Site) -> Result<CompiledPlan> {
    const NAME: &str = "sae";
    let mut spec = InterventionSpec::at(site.to_string());
    spec.sae = Some(NAME.to_owned());
    spec.error_term = ErrorTerm::Dropped;
    let entry = SaeEntry {
        sae: Arc::clone(sae),
        sha256: String::new(),
        max_activation: None,
        resid_norm: None,
    };
    let saes: SaeSet = std::iter::once((NAME.to_owned(), entry)).collect();
    let model = loaded.model.spec();
    let plan = SteeringPlan::single("passthrough", spec);
    Ok(compile(&plan, &saes, model.n_layers, model.d_model)?)
}

fn texts(args: &EvalArgs, loaded: &Loaded) -> Result<Vec<Sequence>> {
    let passages = match &args.text {
        None => prompts::shipped_passages()?,
        Some(path) => lines(path, |p: &Passage| &p.id)?,
    };
    let t = &loaded.tokenizer;
    let bos = t.bos().filter(|_| t.add_bos());
    let sequence = |p: &Passage| {
        let mut tokens: Vec<u32> = bos.into_iter().collect();
        tokens.extend(t.encode(&p.text, Special::AsText)?);
        let roles = vec![Role::User; tokens.len()];
        anyhow::Ok((p.id.clone(), tokens, roles))
    };
    cut(args, passages.iter().take(args.limit).map(sequence))
}

fn chats(args: &EvalArgs, loaded: &Loaded) -> Result<Vec<Sequence>> {
    let chats = match &args.chats {
        Some(path) => lines(path, |c: &Chat| &c.id)?,
        None => prompts::shipped_benign()?
            .into_iter()
            .map(|p| Chat {
                id: p.id,
                prompt: p.prompt,
                reply: None,
            })
            .collect(),
    };
    let template = loaded.chat()?;
    let sequence = |c: &Chat| {
        let mut messages = conversation(None, &c.prompt);
        messages.extend(c.reply.iter().map(|reply| Message {
            role: "assistant".to_owned(),
            content: reply.clone(),
        }));
        let open = c.reply.is_none();
        let r = template.encode(&loaded.tokenizer, &messages, open)?;
        Ok((c.id.clone(), r.ids, r.roles))
    };
    cut(args, chats.iter().take(args.limit).map(sequence))
}

fn lines<T: for<'a> Deserialize<'a>>(path: &Path, id: impl Fn(&T) -> &String) -> Result<Vec<T>> {
    let place = path.display().to_string();
    Ok(prompts::parse(&place, demur_eval::files::open(path)?, id)?)
}

/// Sequences of at most `--context` tokens; those that have nothing to predict are left out.
fn cut(
    args: &EvalArgs,
    all: impl Iterator<Item = Result<(String, Vec<u32>, Vec<Role>)>>,
) -> Result<Vec<Sequence>> {
    let mut sequences = Vec::new();
    for one in all {
        let (source, mut tokens, mut roles) = one?;
        tokens.truncate(args.context);
        roles.truncate(args.context);
        if tokens.len() > 1 {
            sequences.push(Sequence {
                source,
                tokens,
                roles,
            });
        }
    }
    if sequences.is_empty() {
        bail!("there is no sequence of two tokens to measure on");
    }
    Ok(sequences)
}

pub fn diff(args: &DiffArgs) -> Result<()> {
    let ((a, _), (b, _)) = (formats::load(&args.first)?, formats::load(&args.second)?);
    let found = |x: &Sae, y: &Sae| -> Result<Found> {
        let best: Vec<f32> = max_cosines(x, y)?.iter().map(|e| e.0).collect();
        Ok(Found::new(&best))
    };
    let (first, second) = (found(&a, &b)?, found(&b, &a)?);
    let said = |s: &Sae| -> Vec<(&str, Value)> {
        let (cfg, wiring) = (s.cfg(), s.wiring());
        vec![
            ("architecture", json!(s.architecture())),
            ("d_model", json!(cfg.d_model)),
            ("d_sae", json!(cfg.d_sae)),
            ("k", json!(cfg.k)),
            ("model", json!(cfg.model_name)),
            ("site", json!(cfg.hook_name)),
            ("input", json!(wiring.input_norm.name())),
            ("centred", json!(wiring.centre)),
        ]
    };
    let changes: Vec<(&str, Value, Value)> = said(&a)
        .into_iter()
        .zip(said(&b))
        .filter(|(a, b)| a.1 != b.1)
        .map(|(a, b)| (a.0, a.1, b.1))
        .collect();
    if args.json {
        let config: serde_json::Map<String, Value> = changes
            .into_iter()
            .map(|(key, a, b)| (key.to_owned(), json!([a, b])))
            .collect();
        return say(json!({
            "config": config, "first_in_second": first, "second_in_first": second,
        }));
    }
    for (key, a, b) in &changes {
        say(format_args!("{key:<14} {a} -> {b}"))?;
    }
    for (name, f) in [("first in second", first), ("second in first", second)] {
        say(format_args!(
            "{name}: mean max cosine {:.4}; above 0.7 {:.1} %, above 0.9 {:.1} %; unmatched {}",
            f.mean_max_cosine,
            100.0 * f.above_07,
            100.0 * f.above_09,
            f.unmatched.len()
        ))?;
    }
    Ok(())
}
