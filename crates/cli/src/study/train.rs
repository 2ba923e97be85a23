//! Stage `train`: an SAE, trained or loaded, and how well it reconstructs what it has not seen.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use demur_eval::record::{CurvePoint, HeldOut};
use demur_eval::stats::{Estimate, ratio};
use demur_features::harvest::{Products, Sequence, harvest};
use demur_sae::metrics::QualityMeter;
use demur_sae::saelens::{self, WeightType};
use demur_sae::train::{Precision, Rows, ScaledRows, TrainConfig, Trainer};
use demur_sae::{Sae, SaeConfig};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::config::SaeSource;
use super::corpus::{Corpus, read_sequences};
use super::{StudyContext, shipped};
use crate::architecture::auxk_alpha;
use crate::progress::Progress;
use crate::training_log::TrainingLog;

/// Steps between checkpoints.
const CHECKPOINT_EVERY: usize = 100;
/// What training needs to go on, in the stage's folder.
const STATE: &str = "state.bin";
/// Rows whose norm exceeds this many medians are attention sinks.
pub const OUTLIER: f32 = 10.0;

/// What the stage leaves; the SAE is in its folder if it was trained.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Trained {
    pub sha256: String,
    pub d_sae: usize,
    pub k: usize,
    pub trained_on_tokens: Option<u64>,
    pub chat: HeldOut,
    pub text: HeldOut,
    pub curve: Vec<CurvePoint>,
}

pub fn run(c: &StudyContext, corpus: &Corpus, harvest: &Path, scratch: &Path) -> Result<Trained> {
    let mut curve = Vec::new();
    let mut tokens = Some(corpus.train_rows as u64);
    if c.study.sae.source == SaeSource::Train {
        curve = train(c, corpus, &harvest.join("activations.f32"), scratch)?;
    }
    let sae = load(c, scratch)?;
    if sae.d_model() != c.loaded.model.spec().d_model {
        bail!(
            "the SAE reads rows of {}, the model's residual stream has {}",
            sae.d_model(),
            c.loaded.model.spec().d_model
        );
    }
    let sha256 = match c.study.sae.source {
        SaeSource::Train => saelens::weights_sha256(&scratch.join("sae"))?,
        SaeSource::Path => saelens::weights_sha256(Path::new(&c.study.sae.name))?,
        SaeSource::Shipped => {
            let (_, sha256, manifest) = shipped::load(&c.study.sae.name)?;
            tokens = manifest["training"]["tokens"].as_u64();
            sha256
        }
    };
    if c.study.sae.source == SaeSource::Path {
        tokens = None;
    }
    let trained = Trained {
        sha256,
        d_sae: sae.d_sae(),
        k: sae.cfg().k,
        trained_on_tokens: tokens,
        chat: quality(c, &sae, &read_sequences(&harvest.join("chat.jsonl"))?)?,
        text: quality(c, &sae, &read_sequences(&harvest.join("text.jsonl"))?)?,
        curve,
    };
    // Only now: a run that is killed before this line does not train again.
    let _ = std::fs::remove_file(scratch.join(STATE));
    Ok(trained)
}

/// The SAE of this study.
pub fn load(c: &StudyContext, scratch: &Path) -> Result<Arc<Sae>> {
    let sae = match c.study.sae.source {
        SaeSource::Shipped => shipped::load(&c.study.sae.name)?.0,
        SaeSource::Path => saelens::load(Path::new(&c.study.sae.name))?,
        SaeSource::Train => saelens::load(&scratch.join("sae"))?,
    };
    Ok(Arc::new(sae))
}

fn train(
    c: &StudyContext,
    corpus: &Corpus,
    activations: &Path,
    scratch: &Path,
) -> Result<Vec<CurvePoint>> {
    let t = &c.study.train;
    let d = c.loaded.model.spec().d_model;
    let bytes =
        std::fs::read(activations).with_context(|| format!("read {}", activations.display()))?;
    if bytes.len() != corpus.train_rows * d * 4 {
        bail!(
            "{} has been cut; run with --from harvest",
            activations.display()
        );
    }
    let data: Vec<f32> = bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect();
    drop(bytes);
    let mut rows = ScaledRows::new(
        Rows {
            data: &data,
            d_model: d,
        },
        OUTLIER,
        c.study.seed,
    );
    let batch = t.batch.min(rows.len().max(1));
    let steps = ((rows.len() as f64 * t.epochs) / batch as f64)
        .ceil()
        .max(1.0) as usize;
    let d_sae = t.d_sae.unwrap_or((d as f64 * t.expansion) as usize);
    let architecture = t
        .architecture
        .resolve(t.k, d_sae)
        .context("train.architecture")?;
    let cfg = TrainConfig {
        sae: SaeConfig {
            d_model: d,
            d_sae,
            k: t.k,
            hook_name: c.site.to_string(),
            model_name: c.study.model.name.clone(),
        },
        batch,
        steps,
        lr: t.lr,
        warmup_steps: t.warmup_steps.min(steps / 5 + 1),
        decay: 0.25,
        auxk_alpha: auxk_alpha(t.auxk_alpha, &architecture),
        architecture,
        dead_after: rows.len() as u64,
        outlier: OUTLIER,
        seed: c.study.seed,
        precision: Precision::default(),
        clip: None,
    };
    let state = scratch.join(STATE);
    let curve_file = scratch.join("curve.json");
    let mut trainer = match Trainer::resume(&state, &cfg) {
        Ok(trainer) => trainer,
        Err(_) => Trainer::new(cfg.clone(), &rows)?,
    };
    let mut curve: Vec<CurvePoint> = std::fs::read(&curve_file)
        .ok()
        .and_then(|b| serde_json::from_slice(&b).ok())
        .unwrap_or_default();
    curve.retain(|p: &CurvePoint| p.step <= trainer.steps_done());
    let (mut log, _) = TrainingLog::open(scratch, trainer.steps_done(), &cfg.sae)?;
    let bar = Progress::new("train", "steps", steps as u64);
    bar.advance(trainer.steps_done() as u64);
    let mut x = Vec::new();
    while trainer.steps_done() < steps {
        rows.batch(trainer.steps_done(), batch, &mut x);
        let clock = Instant::now();
        let s = trainer.step(&x);
        log.add(&s, batch as f64 / clock.elapsed().as_secs_f64())?;
        bar.advance(1);
        bar.message(format!("fvu {:.3}  dead {:.0} %", s.fvu, 100.0 * s.dead));
        if s.step % (steps / 100).max(1) == 0 || s.step == steps {
            curve.push(CurvePoint {
                step: s.step,
                fvu: s.fvu,
                loss: s.loss,
                dead: s.dead,
                lr: s.lr,
            });
        }
        if s.step % CHECKPOINT_EVERY == 0 || s.step == steps {
            log.sync()?;
            super::write_atomic(&curve_file, &serde_json::to_vec(&curve)?)?;
            trainer.save(&state)?;
        }
    }
    bar.finish();
    let training = json!({
        "tokens": corpus.train_rows,
        "steps": steps,
        "batch": batch,
        "epochs": t.epochs,
        "seed": c.study.seed,
        "study": c.study.name,
        "final_fvu": curve.last().map(|p| p.fvu),
        "demur": env!("CARGO_PKG_VERSION"),
    });
    saelens::save(
        &trainer.finish()?,
        &scratch.join("sae"),
        WeightType::F16,
        &training,
    )?;
    Ok(curve)
}

/// Quality on sequences, without attention sinks: the first token of each and rows of abnormal norm.
fn quality(c: &StudyContext, sae: &Sae, sequences: &[Sequence]) -> Result<HeldOut> {
    let d = sae.d_model();
    let (mut data, mut owner) = (Vec::new(), Vec::new());
    let tokens = c.study.model.batch_tokens;
    harvest(
        &c.loaded.model,
        c.site,
        sequences,
        tokens,
        Products::Int8,
        |i, x| {
            data.extend_from_slice(&x[d.min(x.len())..]);
            owner.resize(data.len() / d, i);
            Ok(())
        },
    )?;
    let rows = Rows {
        data: &data,
        d_model: d,
    };
    let kept = rows.inliers(OUTLIER);
    let row = |at: u32| &data[at as usize * d..(at as usize + 1) * d];
    let mut mean = vec![0.0f64; d];
    for &at in &kept {
        for (m, v) in mean.iter_mut().zip(row(at)) {
            *m += f64::from(*v) / kept.len() as f64;
        }
    }
    let mut meter = QualityMeter::new(d, sae.d_sae());
    let (mut fvu, mut l0) = (Vec::new(), Vec::new());
    for of_sequence in kept.chunk_by(|a, b| owner[*a as usize] == owner[*b as usize]) {
        let x: Vec<f32> = of_sequence
            .iter()
            .flat_map(|&at| row(at))
            .copied()
            .collect();
        let codes = sae.encode(&x, of_sequence.len());
        let mut x_hat = vec![0.0; x.len()];
        sae.reconstruct(&x, &codes, &mut x_hat);
        meter.add(&x, &x_hat, &codes);
        let squares = |pairs: &mut dyn Iterator<Item = (f64, f64)>| -> f64 {
            pairs.map(|(a, b)| (a - b).powi(2)).sum()
        };
        let wide = x.iter().map(|v| f64::from(*v));
        let error = squares(&mut wide.clone().zip(x_hat.iter().map(|v| f64::from(*v))));
        let variance = squares(&mut wide.zip(mean.iter().copied().cycle()));
        fvu.push((error, variance));
        let active = codes.val.iter().filter(|v| **v > 0.0).count();
        l0.push((active as f64, of_sequence.len() as f64));
    }
    let whole = meter.quality();
    Ok(HeldOut {
        n_tokens: whole.n_tokens,
        fvu: Estimate {
            value: whole.fvu,
            ..ratio(&fvu)
        },
        l0: Estimate {
            value: whole.l0,
            ..ratio(&l0)
        },
        dead: whole.dead,
    })
}
