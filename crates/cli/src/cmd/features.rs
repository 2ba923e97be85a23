//! `demur features`: what a study found, in the terminal, or for Neuronpedia.

mod neuronpedia;
mod show;

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, bail};
use demur_features::table::{AttributionEvidence, Feature, FeatureTable};

use crate::cmd::report::read_record;
use crate::progress::say;

const EXAMPLES: &str = "\
Examples:
  demur features                     those of the quickstart, best first
  demur features --sort density      rarest last
  demur features 1234                everything about one latent
  demur features --show sets         small sets, if the study searched for them
  demur features --show sites        the layers compared, if the study did
  demur features --export neuronpedia --out np
  demur features --run runs/my --json";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A run's folder, or its record.json.
    #[arg(long, default_value = "runs/quickstart", value_name = "DIR")]
    run: PathBuf,
    /// Show everything about this latent.
    #[arg(conflicts_with_all = ["show", "export"])]
    latent: Option<u32>,
    /// What to show of the discovery.
    #[arg(long, value_enum, default_value_t, conflicts_with = "export")]
    show: Part,
    /// List by this, largest first; what has no such evidence comes last.
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// Write the features in another tool's layout, instead of showing them.
    #[arg(long, value_enum, requires = "out")]
    export: Option<Layout>,
    /// Folder for the export; it is made.
    #[arg(long, value_name = "DIR", requires = "export")]
    out: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A part of what discovery found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Latents with their evidence.
    #[default]
    Features,
    /// Small sets of latents, and how pairs of them interact.
    Sets,
    /// The sites of the model.
    Sites,
}

/// A layout to export to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Layout {
    /// Batches of features as SAEDashboard's NeuronpediaRunner writes them: batch-0.json and so on.
    Neuronpedia,
}

/// What features are sorted by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
enum Sort {
    /// The ranking of the study, best first.
    #[default]
    Rank,
    /// Rise of the refusal log-odds when clamped.
    Logodds,
    /// KL on benign prompts when clamped.
    Kl,
    /// Fraction of tokens on which it is active.
    Density,
    /// Largest activation.
    Max,
    /// AUROC, refused against complied.
    AurocRefused,
    /// AUROC, harmful against look-alike.
    AurocHarmful,
    /// Cosine with the refusal direction.
    Cosine,
    /// Attribution of the refusal log-odds, first order.
    Attribution,
    /// The same, integrated.
    AttributionIntegrated,
    /// How often it is on the short list if prompts are drawn again.
    Stability,
}

impl Sort {
    /// The figure to sort by, the largest first.
    fn key(self, f: &Feature) -> Option<f64> {
        let e = &f.evidence;
        let (causal, attribution) = (e.causal.as_ref(), e.attribution.as_ref());
        match self {
            Self::Rank => Some(-(f.rank as f64)),
            Self::Logodds => causal.map(|c| c.refusal_logodds_delta_unsafe),
            Self::Kl => causal.and_then(|c| c.kl_benign),
            Self::Density => e.density,
            Self::Max => e.max_activation,
            Self::AurocRefused => e.refused_vs_complied.as_ref().map(|c| c.auroc),
            Self::AurocHarmful => e.harmful_vs_lookalike.as_ref().map(|c| c.auroc),
            Self::Cosine => e.cosine_refusal_direction,
            Self::Attribution => attribution.map(|a| a.mean),
            Self::AttributionIntegrated => integrated(attribution),
            Self::Stability => e.stability.as_ref().map(|s| s.short_list),
        }
    }
}

fn integrated(attribution: Option<&AttributionEvidence>) -> Option<f64> {
    attribution
        .and_then(|a| a.integrated.as_ref())
        .map(|i| i.mean)
}

pub fn run(args: Args) -> Result<()> {
    let (_, record) = read_record(&args.run)?;
    if let (Some(Layout::Neuronpedia), Some(out)) = (args.export, &args.out) {
        return say(neuronpedia::write(&record, out)?);
    }
    let FeatureTable {
        mut features,
        sets,
        sites,
        ..
    } = record.discovery.table;
    let mut out = std::io::stdout().lock();
    match args.show {
        Part::Features => {}
        Part::Sets => return show::sets(&mut out, sets.as_ref(), args.json),
        Part::Sites => return show::sites(&mut out, &sites, args.json),
    }
    let key = |f: &Feature| args.sort.key(f).unwrap_or(f64::NEG_INFINITY);
    features.sort_by(|a, b| key(b).total_cmp(&key(a)).then(a.rank.cmp(&b.rank)));
    if let Some(latent) = args.latent {
        let Some(f) = features.iter().find(|f| f.latent == latent) else {
            bail!(
                "latent {latent} is not among the {} features of this run",
                features.len()
            );
        };
        if args.json {
            writeln!(out, "{}", serde_json::to_string_pretty(f)?)?;
        } else {
            show::feature(&mut out, f)?;
        }
        return Ok(());
    }
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&features)?)?;
        return Ok(());
    }
    writeln!(
        out,
        "rank  latent  chosen  d log-odds  KL benign  density  AUROC refused  harmful  cosine  attribution  integrated  listed  promotes"
    )?;
    for f in &features {
        let e = &f.evidence;
        let promotes: Vec<String> = f
            .promotes
            .iter()
            .take(4)
            .map(|t| format!("{:?}", t.token))
            .collect();
        writeln!(
            out,
            "{:>4}  {:>6}  {:^6}  {:>10}  {:>9}  {:>7}  {:>13}  {:>7}  {:>6}  {:>11}  {:>10}  {:>6}  {}",
            f.rank,
            f.latent,
            if f.chosen { "yes" } else { "" },
            number(e.causal.as_ref().map(|c| c.refusal_logodds_delta_unsafe), 2),
            number(e.causal.as_ref().and_then(|c| c.kl_benign), 3),
            number(e.density, 4),
            number(e.refused_vs_complied.as_ref().map(|c| c.auroc), 3),
            number(e.harmful_vs_lookalike.as_ref().map(|c| c.auroc), 3),
            number(e.cosine_refusal_direction, 2),
            number(e.attribution.as_ref().map(|a| a.mean), 3),
            number(integrated(e.attribution.as_ref()), 3),
            number(e.stability.as_ref().map(|s| s.short_list), 2),
            promotes.join(" ")
        )?;
    }
    Ok(())
}

fn number(v: Option<f64>, digits: usize) -> String {
    v.map_or("-".to_owned(), |v| format!("{v:.digits$}"))
}
