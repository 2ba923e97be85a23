//! Stage `train`: the study's SAE, trained or loaded, those trained beside it, and how well each
//! reconstructs what it has not seen.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use demur_eval::record::{CurvePoint, HeldOut};
use demur_eval::stats::{Estimate, ratio};
use demur_features::harvest::{Products, Sequence, harvest_sites};
use demur_model::hooks::Site;
use demur_sae::metrics::QualityMeter;
use demur_sae::saelens::{self, WeightType};
use demur_sae::train::{Checkpoints, Input, Precision, Rows, Schedule, TrainConfig};
use demur_sae::{Sae, SaeConfig};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::config::{SaeSource, SaeToTrain};
use super::corpus::{Corpus, read_sequences};
use super::stream::Stream;
use super::{StudyContext, shipped, write_atomic};
use crate::architecture::auxk_alpha;
use crate::training::{Job, Parts, SiteRows, Training};
use crate::training_log::curve;

/// Rows whose norm exceeds this many medians are attention sinks.
pub const OUTLIER: f32 = 10.0;
/// What was found out of the first part's rows, of each site, in the stage's folder.
const INPUT: &str = "input.json";

/// What the stage leaves; the SAEs are in its folder if they were trained.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Trained {
    pub sha256: String,
    pub d_sae: usize,
    pub k: usize,
    pub trained_on_tokens: Option<u64>,
    pub chat: HeldOut,
    pub text: HeldOut,
    pub curve: Vec<CurvePoint>,
    /// Those trained beside it.
    pub saes: Vec<TrainedBeside>,
}

/// An SAE that was trained beside the study's own.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TrainedBeside {
    pub name: String,
    pub site: String,
    pub sha256: String,
    pub d_sae: usize,
    pub k: usize,
    pub chat: HeldOut,
    pub text: HeldOut,
}

pub fn run(c: &StudyContext, corpus: &Corpus, harvest: &Path, scratch: &Path) -> Result<Trained> {
    let mut tokens = Some(corpus.train_rows as u64);
    let (mut course, mut beside) = (Vec::new(), Vec::new());
    if c.study.sae.source == SaeSource::Train {
        course = train(c, corpus, harvest, scratch)?;
        beside = c.study.saes()?;
        beside.remove(0); // the study's own
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
    let (d_sae, k) = (sae.d_sae(), sae.cfg().k);
    let mut all = vec![(c.site, sae)];
    for s in &beside {
        let sae = saelens::load(&folder(scratch, &s.name).join("sae"))?;
        all.push((site(c, s)?, Arc::new(sae)));
    }
    let mut chat = quality(c, &all, &read_sequences(&harvest.join("chat.jsonl"))?)?.into_iter();
    let mut text = quality(c, &all, &read_sequences(&harvest.join("text.jsonl"))?)?.into_iter();
    let mut held_out = || {
        chat.next()
            .zip(text.next())
            .context("an SAE was not measured")
    };
    let own = held_out()?;
    let measured = |(s, (site, sae)): (&SaeToTrain, &(Site, Arc<Sae>))| {
        let (chat, text) = held_out()?;
        Ok(TrainedBeside {
            name: s.name.clone(),
            site: site.to_string(),
            sha256: saelens::weights_sha256(&folder(scratch, &s.name).join("sae"))?,
            d_sae: sae.d_sae(),
            k: sae.cfg().k,
            chat,
            text,
        })
    };
    let saes = beside.iter().zip(&all[1..]).map(measured);
    let saes = saes.collect::<Result<_>>()?;
    // Only now: a run that is killed before this line does not train again.
    Checkpoints::new(scratch, 1).clear()?;
    Ok(Trained {
        sha256,
        d_sae,
        k,
        trained_on_tokens: tokens,
        chat: own.0,
        text: own.1,
        curve: course,
        saes,
    })
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

/// Where an SAE and its logs go; the study's own has no name.
pub fn folder(scratch: &Path, name: &str) -> PathBuf {
    match name {
        "" => scratch.to_owned(),
        name => scratch.join("saes").join(name),
    }
}

/// The site of an SAE, in this model.
fn site(c: &StudyContext, sae: &SaeToTrain) -> Result<Site> {
    let site = sae.site.check(c.loaded.model.spec().n_layers);
    site.with_context(|| sae.place())
}

/// Trains the study's own SAE and those beside it; returns the course of its own.
fn train(
    c: &StudyContext,
    corpus: &Corpus,
    harvest: &Path,
    scratch: &Path,
) -> Result<Vec<CurvePoint>> {
    let t = &c.study.train;
    let d = c.loaded.model.spec().d_model;
    let saes = c.study.saes()?;
    let places: Vec<Site> = saes.iter().map(|s| site(c, s)).collect::<Result<_>>()?;
    let mut sites = places.clone();
    sites.sort_unstable();
    sites.dedup();
    let stream = Stream::open(c, &sites, corpus, harvest)?;
    let rows = stream.rows();
    let mut parts = Parts::new(rows.len(), d, Box::new(|part, bar| stream.fill(part, bar)));
    let sites_rows: Vec<SiteRows> = inputs(&mut parts, &sites, scratch)?
        .into_iter()
        .map(|input| {
            let batch = t.batch.min(input.kept.max(1));
            SiteRows {
                input,
                schedule: Schedule::new(&rows, &input, batch, t.epochs),
                batch,
            }
        })
        .collect();
    let mut jobs = Vec::new();
    for (s, place) in saes.iter().zip(&places) {
        let site = sites.iter().position(|site| site == place).unwrap_or(0);
        let of_site = &sites_rows[site];
        let (steps, d_sae) = (of_site.schedule.steps(), s.d_sae(d));
        let architecture = s
            .architecture
            .resolve(s.k, d_sae)
            .with_context(|| s.place())?;
        let cfg = TrainConfig {
            sae: SaeConfig {
                d_model: d,
                d_sae,
                k: s.k,
                hook_name: place.to_string(),
                model_name: c.study.model.name.clone(),
            },
            batch: of_site.batch,
            steps,
            lr: s.lr,
            warmup_steps: t.warmup_steps.min(steps / 5 + 1),
            decay: 0.25,
            auxk_alpha: auxk_alpha(s.auxk_alpha, &architecture),
            architecture,
            dead_after: t.dead_after.unwrap_or(of_site.input.kept as u64),
            outlier: OUTLIER,
            seed: s.seed,
            precision: Precision::default(),
            clip: None,
        };
        jobs.push(Job {
            cfg,
            site,
            folder: folder(scratch, &s.name),
        });
    }
    let ended = Training {
        jobs: &jobs,
        sites: &sites_rows,
        seed: c.study.seed,
        states: &Checkpoints::new(scratch, t.checkpoints),
        checkpoint_every: t.checkpoint_every,
    }
    .run(&mut parts)?;
    for ((job, trainer), s) in jobs.iter().zip(&ended.trainers).zip(&saes) {
        let training = json!({
            "tokens": corpus.train_rows,
            "steps": job.cfg.steps,
            "batch": job.cfg.batch,
            "epochs": t.epochs,
            "seed": job.cfg.seed,
            "study": c.study.name,
            "final_fvu": curve(&job.folder, job.cfg.steps)?.last().map(|p| p.fvu),
            "demur": env!("CARGO_PKG_VERSION"),
        });
        let sae = trainer.finish().with_context(|| s.place())?;
        saelens::save(&sae, &job.folder.join("sae"), WeightType::F16, &training)?;
    }
    curve(scratch, jobs[0].cfg.steps)
}

/// What training has to know of the rows of each site: by the first part, unless that was done before.
fn inputs(parts: &mut Parts<'_>, sites: &[Site], scratch: &Path) -> Result<Vec<Input>> {
    let file = scratch.join(INPUT);
    let before = std::fs::read(&file).ok();
    let before = before.and_then(|b| serde_json::from_slice::<Vec<(String, Input)>>(&b).ok());
    let names = || sites.iter().map(Site::to_string);
    // What is broken is found out again, which gives the same.
    if let Some(before) = before
        && before.iter().map(|(name, _)| name.clone()).eq(names())
    {
        return Ok(before.into_iter().map(|(_, input)| input).collect());
    }
    let rows = parts.get(0, None)?;
    let inputs: Vec<Input> = rows.iter().map(|r| Input::of(*r, OUTLIER)).collect();
    let named: Vec<_> = names().zip(&inputs).collect();
    write_atomic(&file, &serde_json::to_vec_pretty(&named)?)?;
    Ok(inputs)
}

/// The quality of SAEs on sequences, without attention sinks: the first token of each and rows of abnormal
/// norm.
fn quality(
    c: &StudyContext,
    saes: &[(Site, Arc<Sae>)],
    sequences: &[Sequence],
) -> Result<Vec<HeldOut>> {
    let d = c.loaded.model.spec().d_model;
    let mut sites: Vec<Site> = saes.iter().map(|s| s.0).collect();
    sites.sort_unstable();
    sites.dedup();
    let mut rows: Vec<Vec<f32>> = vec![Vec::new(); sites.len()];
    let mut owner = Vec::new();
    harvest_sites(
        &c.loaded.model,
        &sites,
        sequences,
        c.study.model.batch_tokens,
        Products::Int8,
        |i, x| {
            for (rows, x) in rows.iter_mut().zip(x) {
                rows.extend_from_slice(&x[d.min(x.len())..]);
            }
            owner.resize(rows[0].len() / d, i);
            Ok(())
        },
    )?;
    let of = |(site, sae): &(Site, Arc<Sae>)| {
        let at = sites.iter().position(|s| s == site).unwrap_or(0);
        quality_of(sae, &rows[at], &owner)
    };
    Ok(saes.iter().map(of).collect())
}

/// The quality of one on rows at its site; `owner` says of which sequence each is.
fn quality_of(sae: &Sae, data: &[f32], owner: &[usize]) -> HeldOut {
    let d = sae.d_model();
    let rows = Rows { data, d_model: d };
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
    HeldOut {
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
    }
}
