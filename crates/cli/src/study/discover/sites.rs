//! All sites of the model compared: one pass over the discovery and the validation prompts reads them, and
//! one pass each over validation prompts adds the direction of refusal there.

use anyhow::Result;
use demur_eval::prompts::{Label, Prompt, Split};
use demur_features::harvest::Sequence;
use demur_features::sites::{SiteRows, difference_of_means, read, separation};
use demur_features::stats;
use demur_features::table::{DirectionEvidence, SiteEvidence};
use demur_model::hooks::Site;
use demur_steering::{Direction, DirectionOp, InterventionSpec, SteeringPlan};

use super::super::with_reply;
use super::causal::Bench;
use crate::progress::Progress;

/// Compares the stream after every block. `discovery` are prompts, of which base refused some.
pub fn compare(
    bench: &Bench<'_>,
    discovery: &[&Prompt],
    refused: &[bool],
) -> Result<Vec<SiteEvidence>> {
    let c = bench.c;
    let mut prompts = discovery.to_vec();
    for label in [Label::Unsafe, Label::Safe] {
        prompts.extend(c.prompts(Split::Validation, label));
    }
    let labels: Vec<bool> = prompts
        .iter()
        .map(|p| p.label == Some(Label::Unsafe))
        .collect();
    let items = c.items(&prompts)?;
    let sequences: Vec<Sequence> = items.iter().map(|i| with_reply(i, &[])).collect();
    let sites: Vec<Site> = (0..c.loaded.model.spec().n_layers)
        .map(Site::post)
        .collect();
    let bar = Progress::new("discover", "prompts", sequences.len() as u64);
    let tokens = c.study.model.batch_tokens;
    let read = read(&c.loaded.model, &sites, &sequences, tokens, || {
        bar.advance(1)
    })?;
    bar.finish();
    let bar = Progress::new("discover", "sites", sites.len() as u64);
    let found = read.iter().map(|rows| {
        let train = 0..discovery.len();
        let evidence = SiteEvidence {
            site: rows.site.to_string(),
            last: separation(&rows.last, &labels, train.clone()),
            mean: separation(&rows.mean, &labels, train),
            refusal: acts(bench, rows, refused)?,
        };
        bar.advance(1);
        Ok(evidence)
    });
    let found = found.collect();
    bar.finish();
    found
}

/// Adds the mean of the refused prompts less that of the others, as long as it is.
fn acts(bench: &Bench<'_>, rows: &SiteRows, refused: &[bool]) -> Result<Option<DirectionEvidence>> {
    if refused.iter().all(|r| *r) || !refused.contains(&true) {
        return Ok(None);
    }
    let length = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let vector = difference_of_means(&rows.last[..refused.len()], refused);
    let n = rows.last.len().max(1) as f64;
    let mean_length = rows.last.iter().map(|r| length(r)).sum::<f64>() / n;
    let norm = length(&vector);
    let mut spec = InterventionSpec::at(rows.site.to_string());
    spec.direction = Some(Direction {
        name: "refused minus complied".to_owned(),
        vector,
        op: DirectionOp::Add,
        value: norm as f32,
    });
    let effect = bench.effect(&SteeringPlan::single("site", spec))?;
    Ok(Some(DirectionEvidence {
        relative_norm: norm / mean_length,
        refusal_logodds_delta_unsafe: stats::mean(&effect.on_unsafe),
        refusal_logodds_delta_safe: stats::mean(&effect.on_safe),
        kl_benign: effect.kl_benign,
    }))
}
