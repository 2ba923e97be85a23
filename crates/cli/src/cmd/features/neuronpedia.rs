//! Features in the layout that Neuronpedia's tools read: `batch-N.json`, as `NeuronpediaRunner` of
//! SAEDashboard writes them (`sae_dashboard/neuronpedia/neuronpedia_dashboard.py`, the classes
//! `NeuronpediaDashboardBatch`, `...Feature` and `...Activation`). Its `neuronpedia_export.py`, and
//! `convert-saedashboard-to-neuronpedia-export.py` of Neuronpedia, make the files of a bulk import of them.
//!
//! What a study does not measure is there and empty, as the readers want every key: aligned neurons,
//! correlated neurons and features, attention heads. The decoder's row (`vector`) is in the SAE's own
//! files, and there are no explanations: nobody wrote any.

use std::path::Path;

use anyhow::{Context, Result, bail};
use demur_eval::record::Record;
use demur_features::table::{Feature, Histogram, TokenLogit, TopActivation};
use demur_model::hooks::Site;
use serde::Serialize;

use crate::study::write_atomic;

/// Features of one file, as Neuronpedia takes them at once.
const BATCH: usize = 128;

#[derive(Debug, Serialize)]
struct Batch<'a> {
    model_id: String,
    layer: usize,
    sae_set: &'a str,
    sae_id_suffix: Option<&'a str>,
    features: Vec<Dashboard<'a>>,
}

/// Keys in the order of the original.
#[derive(Debug, Serialize)]
struct Dashboard<'a> {
    feature_index: u32,
    neuron_alignment_indices: [u32; 0],
    neuron_alignment_values: [f64; 0],
    neuron_alignment_l1: [f64; 0],
    correlated_neurons_indices: [u32; 0],
    correlated_neurons_l1: [f64; 0],
    correlated_neurons_pearson: [f64; 0],
    correlated_features_indices: [u32; 0],
    correlated_features_l1: [f64; 0],
    correlated_features_pearson: [f64; 0],
    neg_str: Vec<&'a str>,
    neg_values: Vec<f64>,
    pos_str: Vec<&'a str>,
    pos_values: Vec<f64>,
    /// Fraction of tokens on which it is active.
    frac_nonzero: f64,
    /// Middles of the bins, activations.
    freq_hist_data_bar_values: Vec<f64>,
    /// Tokens in each.
    freq_hist_data_bar_heights: Vec<u64>,
    /// Tokens of the vocabulary in each.
    logits_hist_data_bar_heights: Vec<u64>,
    /// Middles of the bins, logits.
    logits_hist_data_bar_values: Vec<f64>,
    /// 0: texts of a study have no one length.
    n_prompts_total: usize,
    n_tokens_in_prompt: usize,
    dataset: &'a str,
    decoder_weights_dist: [f64; 0],
    activations: Vec<Activation<'a>>,
    vector: [f32; 0],
}

#[derive(Debug, Serialize)]
struct Activation<'a> {
    /// -1, the largest activation and -1: the original's mark for the top activations, which are of no
    /// interval.
    bin_min: f64,
    bin_max: f64,
    bin_contains: f64,
    tokens: Vec<&'a str>,
    values: Vec<f64>,
    qualifying_token_index: usize,
}

/// Writes the features that have contexts into `out`; returns what was written, in words.
pub fn write(record: &Record, out: &Path) -> Result<String> {
    let (shown, left): (Vec<&Feature>, Vec<&Feature>) = record
        .discovery
        .table
        .features
        .iter()
        .partition(|f| !f.top_activations.is_empty());
    if shown.is_empty() {
        bail!(
            "no feature of this run has contexts: run the study with discovery.report_features of at least 1"
        );
    }
    std::fs::create_dir_all(out).with_context(|| format!("create {}", out.display()))?;
    let batches = batches(record, shown)?;
    for (i, batch) in batches.iter().enumerate() {
        let path = out.join(format!("batch-{i}.json"));
        write_atomic(&path, &serde_json::to_vec(batch)?)?;
    }
    let n: usize = batches.iter().map(|b| b.features.len()).sum();
    let mut words = format!("{n} features in {}", out.display());
    if !left.is_empty() {
        words.push_str(&format!(
            "; {} without contexts were left out (discovery.report_features says how many have some)",
            left.len()
        ));
    }
    Ok(words)
}

fn batches<'a>(record: &'a Record, mut features: Vec<&'a Feature>) -> Result<Vec<Batch<'a>>> {
    features.sort_by_key(|f| f.latent);
    let site: Site = record.sae.site.parse()?;
    // A model that was named by its path is known by the path's last part.
    let name = Path::new(&record.model.name).file_stem();
    let model_id = match record.model.name.contains(['/', '\\']) {
        true => name.unwrap_or_default().to_string_lossy().into_owned(),
        false => record.model.name.clone(),
    };
    let of_batch = |features: &[&'a Feature]| Batch {
        model_id: model_id.clone(),
        layer: site.canonical().layer,
        sae_set: &record.study,
        sae_id_suffix: None,
        features: features.iter().map(|f| dashboard(f)).collect(),
    };
    Ok(features.chunks(BATCH).map(of_batch).collect())
}

fn dashboard(f: &Feature) -> Dashboard<'_> {
    let (pos_str, pos_values) = tokens(&f.promotes);
    let (neg_str, neg_values) = tokens(&f.suppresses);
    let (activation_middles, activation_counts) = histogram(f.activations.as_ref());
    let (logit_middles, logit_counts) = histogram(f.logits.as_ref());
    let largest = f.top_activations.iter().map(|a| a.value);
    let largest = rounded(largest.fold(0.0, f64::max));
    Dashboard {
        feature_index: f.latent,
        neuron_alignment_indices: [],
        neuron_alignment_values: [],
        neuron_alignment_l1: [],
        correlated_neurons_indices: [],
        correlated_neurons_l1: [],
        correlated_neurons_pearson: [],
        correlated_features_indices: [],
        correlated_features_l1: [],
        correlated_features_pearson: [],
        neg_str,
        neg_values,
        pos_str,
        pos_values,
        frac_nonzero: f.evidence.density.unwrap_or(0.0),
        freq_hist_data_bar_values: activation_middles,
        freq_hist_data_bar_heights: activation_counts,
        logits_hist_data_bar_heights: logit_counts,
        logits_hist_data_bar_values: logit_middles,
        n_prompts_total: 0,
        n_tokens_in_prompt: 0,
        dataset: "",
        decoder_weights_dist: [],
        activations: f
            .top_activations
            .iter()
            .map(|a| activation(a, largest))
            .collect(),
        vector: [],
    }
}

fn activation(a: &TopActivation, largest: f64) -> Activation<'_> {
    Activation {
        bin_min: -1.0,
        bin_max: largest,
        bin_contains: -1.0,
        tokens: a.tokens.iter().map(String::as_str).collect(),
        values: a.acts.iter().map(|v| rounded(f64::from(*v))).collect(),
        qualifying_token_index: a.peak,
    }
}

fn tokens(tokens: &[TokenLogit]) -> (Vec<&str>, Vec<f64>) {
    let both = tokens.iter().map(|t| (t.token.as_str(), rounded(t.logit)));
    both.unzip()
}

fn histogram(h: Option<&Histogram>) -> (Vec<f64>, Vec<u64>) {
    h.map_or_else(Default::default, |h| {
        let middles = h.middles().into_iter().map(rounded);
        (middles.collect(), h.counts.clone())
    })
}

/// Three decimals, as in the original.
fn rounded(v: f64) -> f64 {
    (1000.0 * v).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample_record;

    /// `testdata/neuronpedia/batch-0.json` has the keys of SAEDashboard's classes, in their order, and values
    /// worked out by hand from the sample.
    #[test]
    fn a_batch_is_as_it_was() {
        let mut record = sample_record();
        record.discovery.table.features.truncate(1);
        let features = record.discovery.table.features.iter().collect();
        let batch = &batches(&record, features).unwrap()[0];
        let found = serde_json::to_string_pretty(batch).unwrap();
        let golden = include_str!("../../../../../testdata/neuronpedia/batch-0.json");
        assert_eq!(found.trim(), golden.replace("\r\n", "\n").trim());
    }

    #[test]
    fn batches_are_of_128_in_the_order_of_latents() {
        let mut record = sample_record();
        let feature = record.discovery.table.features[0].clone();
        record.discovery.table.features = (0..300u32)
            .map(|i| Feature {
                latent: 299 - i,
                ..feature.clone()
            })
            .collect();
        record.discovery.table.features[0].top_activations.clear();
        record.model.name = "models/some-model.gguf".to_owned();
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a/b");
        let words = write(&record, &out).unwrap();
        assert!(
            words.starts_with("299 features") && words.contains("; 1 without"),
            "{words}"
        );
        let sizes = [0, 1, 2].map(|i| {
            let text = std::fs::read(out.join(format!("batch-{i}.json"))).unwrap();
            let batch: serde_json::Value = serde_json::from_slice(&text).unwrap();
            assert_eq!(batch["model_id"], "some-model");
            let features = batch["features"].as_array().unwrap();
            assert_eq!(features[0]["feature_index"], i * BATCH);
            features.len()
        });
        assert_eq!(sizes, [128, 128, 43]);
        record.discovery.table.features.truncate(1);
        let e = write(&record, &out).unwrap_err();
        assert!(e.to_string().contains("report_features"), "{e}");
    }
}
