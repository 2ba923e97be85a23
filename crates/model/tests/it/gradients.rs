//! The gradient at a site against finite differences of the ordinary forward pass, for every family.

use std::path::Path;
use std::sync::Arc;

use demur_kernels::linear::Precision;
use demur_model::ModelError;
use demur_model::checkpoint::Checkpoint;
use demur_model::decoder::{Capture, Gradient, Model};
use demur_model::hooks::{InterventionState, Point, Rows, Site};

use crate::support::{Golden, close, forward, model};

/// Adds a direction to one row of the stream.
#[derive(Clone)]
struct Shift {
    row: usize,
    by: Vec<f32>,
}

impl InterventionState for Shift {
    fn edit(&mut self, _: Site, _: &Rows<'_>, resid: &mut [f32]) {
        let d = self.by.len();
        let row = &mut resid[self.row * d..(self.row + 1) * d];
        row.iter_mut().zip(&self.by).for_each(|(x, by)| *x += by);
    }
    fn fork(&self) -> Box<dyn InterventionState> {
        Box::new(self.clone())
    }
}

/// `ln(P / (1 - P))` of the first tokens of the vocabulary, in f64.
fn log_odds(logits: &[f32]) -> f64 {
    let sum = |part: &[f32]| part.iter().map(|l| f64::from(*l).exp()).sum::<f64>();
    let (inside, outside) = logits.split_at(logits.len() / 8);
    (sum(inside) / sum(outside)).ln()
}

fn log_odds_slope(logits: &[f32]) -> Vec<f32> {
    let (inside, outside) = logits.split_at(logits.len() / 8);
    let part = |part: &[f32], sign: f64| -> Vec<f32> {
        let sum: f64 = part.iter().map(|l| f64::from(*l).exp()).sum();
        let of = |l: &f32| (sign * f64::from(*l).exp() / sum) as f32;
        part.iter().map(of).collect()
    };
    [part(inside, 1.0), part(outside, -1.0)].concat()
}

/// Logits of the last token with `by` added to a row at the site.
fn shifted(model: &Model, tokens: &[u32], site: Site, row: usize, by: &[f32]) -> Vec<f32> {
    let mut shift = Shift {
        row,
        by: by.to_vec(),
    };
    let hook = (
        &mut shift as &mut (dyn InterventionState + 'static),
        &[site][..],
    );
    let logits = forward(model, tokens, &mut model.new_cache(), Some(hook), None);
    logits[(tokens.len() - 1) * model.spec().d_vocab..].to_vec()
}

fn resid(model: &Model, tokens: &[u32], site: Site) -> Vec<f32> {
    let mut capture = Capture {
        sites: vec![site],
        ..Capture::default()
    };
    forward(
        model,
        tokens,
        &mut model.new_cache(),
        None,
        Some(&mut capture),
    );
    capture.rows.remove(0)
}

fn gradient(model: &Model, site: Site, resid: &[f32]) -> Gradient {
    model.gradient(site, resid, log_odds_slope).unwrap()
}

fn sites(model: &Model) -> Vec<Site> {
    let last = model.spec().n_layers - 1;
    [
        (0, Point::Pre),
        (0, Point::Mid),
        (0, Point::Post),
        (last, Point::Mid),
        (last, Point::Post),
    ]
    .map(|(layer, point)| Site { layer, point })
    .to_vec()
}

/// A direction of length 1 that looks random.
fn direction(d: usize, seed: usize) -> Vec<f32> {
    let mut state = (seed as u32).wrapping_mul(2_654_435_769) + 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let v: Vec<f32> = (0..d).map(|_| next()).collect();
    let norm = v.iter().map(|v| v * v).sum::<f32>().sqrt();
    v.iter().map(|v| v / norm).collect()
}

/// Every row of the gradient, along a random direction and along itself, in units of the residual's
/// length, against `(4 D(h) - D(2 h)) / 3` with `D(h)` the central difference: its error is `h^4`, so
/// that steps can be large. Logits in f32 are off by some 1e-6 each, of which a step of `h` makes
/// 1e-6 / h; what remains of the fifth derivative is smaller.
fn check(name: &str) {
    const H: f32 = 0.005;
    const TOLERANCE: f64 = 3e-4;
    let model = model(name, Precision::F32);
    let golden = name.strip_suffix("/model.gguf").unwrap_or(name);
    let tokens = Golden::read(&format!("{golden}/golden.safetensors")).tokens();
    let (n, d) = (tokens.len(), model.spec().d_model);
    for site in sites(&model) {
        let x = resid(&model, &tokens, site);
        let found = gradient(&model, site, &x);
        let plain = shifted(&model, &tokens, site, 0, &vec![0.0; d]);
        assert_eq!(found.logits, plain, "{name} {site}: logits");
        assert_eq!(found.rows.len(), n * d);
        let after_all = site == Site::post(model.spec().n_layers - 1);
        let mut largest = 0.0f64;
        for (t, g) in found.rows.chunks_exact(d).enumerate() {
            if after_all && t + 1 < n {
                assert!(g.iter().all(|v| *v == 0.0), "{name} {site}: row {t}");
                continue;
            }
            let norm = |v: &[f32]| v.iter().map(|v| v * v).sum::<f32>().sqrt();
            let length = norm(&x[t * d..(t + 1) * d]);
            let along: Vec<f32> = g.iter().map(|v| v / norm(g).max(1e-9)).collect();
            for mut u in [direction(d, t), along] {
                u.iter_mut().for_each(|u| *u *= length);
                let difference = |h: f32| {
                    let at = |h: f32| {
                        let by: Vec<f32> = u.iter().map(|u| h * u).collect();
                        log_odds(&shifted(&model, &tokens, site, t, &by))
                    };
                    (at(h) - at(-h)) / (2.0 * f64::from(h))
                };
                let expected = (4.0 * difference(H) - difference(2.0 * H)) / 3.0;
                let slope: f64 = g.iter().zip(&u).map(|(g, u)| f64::from(g * u)).sum();
                largest = largest.max(slope.abs());
                let off = (slope - expected).abs();
                assert!(
                    off <= TOLERANCE * (1.0 + expected.abs()),
                    "{name} {site} row {t}: {slope} against {expected}"
                );
            }
        }
        assert!(
            largest > 100.0 * TOLERANCE,
            "{name} {site}: {largest} shows nothing"
        );
    }
}

#[test]
fn gradients_of_llama() {
    check("llama");
    check("llama/model.gguf");
}

#[test]
fn gradients_of_mistral_with_its_window() {
    check("mistral");
}

#[test]
fn gradients_of_qwen2_with_its_biases() {
    check("qwen2");
}

#[test]
fn gradients_of_qwen3_with_its_head_norms() {
    check("qwen3");
}

#[test]
fn gradients_of_phi3_with_its_window() {
    check("phi3");
}

#[test]
fn gradients_of_phi3_longrope() {
    check("phi3-longrope");
}

#[test]
fn gradients_of_gemma2_with_its_caps_and_norms() {
    check("gemma2");
    check("gemma2/model.gguf");
}

#[test]
fn gradients_of_gemma3_with_its_two_ropes() {
    check("gemma3");
}

/// Packed weights give the gradient of the same weights in f32, on the same rows.
#[test]
fn gradients_of_packed_weights() {
    for name in ["chat/model.gguf", "k-quants/model.gguf", "llama-sharded"] {
        let [fast, exact] = [Precision::Fast, Precision::F32].map(|p| model(name, p));
        let golden = name.strip_suffix("/model.gguf").unwrap_or(name);
        let tokens = Golden::read(&format!("{golden}/golden.safetensors")).tokens();
        for site in sites(&exact) {
            let x = resid(&exact, &tokens, site);
            let (found, expected) = (gradient(&fast, site, &x), gradient(&exact, site, &x));
            close(
                &format!("{name} {site} logits"),
                &found.logits,
                &expected.logits,
                1e-4,
            );
            close(
                &format!("{name} {site} rows"),
                &found.rows,
                &expected.rows,
                1e-4,
            );
        }
    }
}

#[test]
fn what_can_not_be_differentiated_is_an_error() {
    let model = model("llama", Precision::F32);
    let d = model.spec().d_model;
    let run = |site, rows: usize, outputs: usize| {
        let gradient = model.gradient(site, &vec![0.1; rows], |_| vec![0.0; outputs]);
        gradient.map(|g| g.rows.len())
    };
    let vocab = model.spec().d_vocab;
    assert_eq!(run(Site::post(0), 2 * d, vocab).unwrap(), 2 * d);
    for (rows, outputs) in [(0, vocab), (d + 1, vocab), (d, vocab - 1)] {
        let error = run(Site::post(0), rows, outputs).unwrap_err();
        assert!(matches!(error, ModelError::Request { .. }), "{error}");
    }
    let beyond = run(Site::post(model.spec().n_layers), d, vocab).unwrap_err();
    assert!(matches!(beyond, ModelError::SiteLayer { .. }), "{beyond}");
    let long = run(Site::post(0), (model.spec().context + 1) * d, vocab).unwrap_err();
    assert!(matches!(long, ModelError::TooLong { .. }), "{long}");
}

/// On real weights: the time of a gradient, and its slope along random directions of all rows against
/// a finite difference of the same f32 pass.
///
/// ```text
/// DEMUR_MODELS=folder-of-gguf-files cargo test --release -p demur-model --test it \
///     -- --ignored --nocapture gradients_of_real_weights
/// ```
#[test]
#[ignore = "needs a real checkpoint: DEMUR_MODELS"]
fn gradients_of_real_weights() {
    const FILE: &str = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf";
    let folder = std::env::var_os("DEMUR_MODELS").expect("set DEMUR_MODELS");
    let checkpoint = Checkpoint::open(&Path::new(&folder).join(FILE)).unwrap();
    let model = Model::load(&Arc::new(checkpoint), Precision::Fast).unwrap();
    let tokens: Vec<u32> = (0..60).map(|i| 1000 + 37 * i).collect();
    let site = Site::post(12);
    let x = resid(&model, &tokens, site);
    let started = std::time::Instant::now();
    let found = gradient(&model, site, &x);
    println!("60 tokens: {:.2} s", started.elapsed().as_secs_f64());
    let d = model.spec().d_model;
    for seed in 0..4 {
        // Each row moves by a hundredth of its length, in a direction of its own.
        let mut u = Vec::new();
        for (t, row) in x.chunks_exact(d).enumerate() {
            let length = row.iter().map(|v| v * v).sum::<f32>().sqrt();
            u.extend(direction(d, 1000 * seed + t).iter().map(|v| v * length));
        }
        let difference = |h: f32| {
            let at = |h: f32| {
                let moved: Vec<f32> = x.iter().zip(&u).map(|(x, u)| x + h * u).collect();
                log_odds(&gradient(&model, site, &moved).logits)
            };
            (at(h) - at(-h)) / (2.0 * f64::from(h))
        };
        let expected = (4.0 * difference(0.01) - difference(0.02)) / 3.0;
        let slope: f64 = found
            .rows
            .iter()
            .zip(&u)
            .map(|(g, u)| f64::from(g * u))
            .sum();
        println!("direction {seed}: slope {slope:.5}, difference {expected:.5}");
        assert!((slope - expected).abs() < 0.01 * (0.1 + expected.abs()));
    }
}
