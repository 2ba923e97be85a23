//! Every family against `transformers`: logits, and the residual stream at every site.

use demur_kernels::linear::Precision;
use demur_model::checkpoint::Checkpoint;
use demur_model::decoder::Capture;
use demur_model::hooks::{Point, Site};
use demur_model::spec::ModelSpec;

use crate::support::{Golden, close, forward, model};

const TOLERANCE: f32 = 1e-4;

fn check(checkpoint: &str, golden: &str) {
    let model = model(checkpoint, Precision::F32);
    let golden = Golden::read(golden);
    let tokens = golden.tokens();
    let (n_layers, d) = (model.spec().n_layers, model.spec().d_model);
    let site = |layer, point| Site { layer, point };
    let mut capture = Capture {
        sites: [site(0, Point::Pre)]
            .into_iter()
            .chain((0..n_layers).map(|i| site(i, Point::Mid)))
            .chain((0..n_layers).map(|i| site(i, Point::Post)))
            .collect(),
        ..Capture::default()
    };
    let logits = forward(
        &model,
        &tokens,
        &mut model.new_cache(),
        None,
        Some(&mut capture),
    );
    let expected = ["resid_pre", "resid_mid", "resid_post"].map(|n| golden.floats(n));
    let rows = expected.iter().flat_map(|e| e.chunks(tokens.len() * d));
    assert_eq!(rows.clone().count(), capture.rows.len());
    for ((site, found), expected) in capture.sites.iter().zip(&capture.rows).zip(rows) {
        close(&format!("{checkpoint} {site}"), found, expected, TOLERANCE);
    }
    close(
        &format!("{checkpoint} logits"),
        &logits,
        &golden.floats("logits"),
        TOLERANCE,
    );
}

fn both_formats(family: &str) {
    let golden = format!("{family}/golden.safetensors");
    check(family, &golden);
    check(&format!("{family}/model.gguf"), &golden);
}

#[test]
fn llama_with_llama3_scaling() {
    both_formats("llama");
}

#[test]
fn mistral_with_its_window() {
    check("mistral", "mistral/golden.safetensors");
}

#[test]
fn qwen2() {
    both_formats("qwen2");
}

#[test]
fn qwen3() {
    both_formats("qwen3");
}

#[test]
fn phi3_with_its_window() {
    both_formats("phi3");
}

#[test]
fn phi3_longrope_beyond_and_within_the_original_context() {
    both_formats("phi3-longrope");
    for checkpoint in ["phi3-longrope", "phi3-longrope/model.gguf"] {
        check(checkpoint, "phi3-longrope/golden-short.safetensors");
    }
}

#[test]
fn gemma2() {
    both_formats("gemma2");
}

#[test]
fn gemma3() {
    both_formats("gemma3");
}

#[test]
fn quantised() {
    check("chat/model.gguf", "chat/golden.safetensors");
}

#[test]
fn k_quantised() {
    check("k-quants/model.gguf", "k-quants/golden.safetensors");
}

#[test]
fn f16_in_two_files_under_an_index() {
    check("llama-sharded", "llama-sharded/golden.safetensors");
}

#[test]
fn the_attention_scale_of_gemma_is_the_configs() {
    let folder = tempfile::tempdir().unwrap();
    let from = crate::support::path("gemma2");
    let weights = folder.path().join("model.safetensors");
    std::fs::copy(from.join("model.safetensors"), weights).unwrap();
    let config = std::fs::read_to_string(from.join("config.json")).unwrap();
    let with = |field: &str, to: &str| {
        let changed = config.replace(field, to);
        assert_ne!(changed, config);
        std::fs::write(folder.path().join("config.json"), changed).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        ModelSpec::from_checkpoint(&checkpoint)
            .unwrap()
            .0
            .attn_scale
    };
    let scalar = "\"query_pre_attn_scalar\": 16";
    assert_eq!(
        with(scalar, "\"query_pre_attn_scalar\": 24"),
        (1.0 / 24f64.sqrt()) as f32
    );
    assert_eq!(with(scalar, "\"query_pre_attn_scalar\": null"), 0.25);
}
