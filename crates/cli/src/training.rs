//! The loop of training: SAEs side by side over the parts of their rows, with their logs and states.
//! `demur sae fit` runs it on the rows of a file, the stage `train` of a study on those of a model.
//!
//! SAEs at one site read the same batches. What becomes of an SAE does not depend on those beside it.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use demur_sae::train::{
    Checkpoints, Input, Resumed, Rows, ScaledRows, Schedule, StepStats, TrainConfig, Trainer,
};
use serde_json::Value;

use crate::exit::Hinted;
use crate::progress::{Progress, note};
use crate::training_log::TrainingLog;

/// FVUs that there is room for beside a bar.
const SHOWN: usize = 6;

/// An SAE to train.
pub struct Job {
    pub cfg: TrainConfig,
    /// Which of the sites it reads.
    pub site: usize,
    /// Where its logs go.
    pub folder: PathBuf,
}

/// What a run knows of the rows of a site.
pub struct SiteRows {
    pub input: Input,
    pub schedule: Schedule,
    /// Rows a step.
    pub batch: usize,
}

/// The rows of all sites, a part at a time.
pub struct Parts<'a> {
    n: usize,
    d_model: usize,
    fill: Fill<'a>,
    /// The part in memory, and its rows of each site, `[n, d_model]`.
    held: Option<(usize, Vec<Vec<f32>>)>,
}

/// Makes the rows of a part; while another bar is drawn, tells it how far it is.
type Fill<'a> = Box<dyn FnMut(usize, Option<&Progress>) -> Result<Vec<Vec<f32>>> + 'a>;

impl<'a> Parts<'a> {
    /// `n` parts of rows of width `d_model`, which `fill` makes: for each site `[rows, d_model]`.
    pub fn new(n: usize, d_model: usize, fill: Fill<'a>) -> Self {
        Self {
            n,
            d_model,
            fill,
            held: None,
        }
    }

    /// The rows of a part, of each site.
    pub fn get(&mut self, part: usize, bar: Option<&Progress>) -> Result<Vec<Rows<'_>>> {
        if self.held.as_ref().is_none_or(|h| h.0 != part) {
            self.held = None; // there is memory for one
            self.held = Some((part, (self.fill)(part, bar)?));
        }
        let d_model = self.d_model;
        let of_site = |data| Rows { data, d_model };
        let sites = self.held.iter().flat_map(|h| &h.1);
        Ok(sites.map(|rows| of_site(&rows[..])).collect())
    }
}

/// A run.
pub struct Training<'a> {
    pub jobs: &'a [Job],
    pub sites: &'a [SiteRows],
    /// Of the order of rows.
    pub seed: u64,
    pub states: &'a Checkpoints,
    pub checkpoint_every: usize,
}

/// What is left of a run at its end.
pub struct Ended {
    /// In the order of the jobs.
    pub trainers: Vec<Trainer>,
    /// The last metrics of each.
    pub last: Vec<Value>,
    /// Steps that this process has done, and how long that took.
    pub steps: usize,
    pub seconds: f64,
}

impl Training<'_> {
    /// Trains from the beginning, or from the newest state that is whole, to the end.
    pub fn run(&self, parts: &mut Parts<'_>) -> Result<Ended> {
        let mut trainers = match self.resume()? {
            Some(trainers) => trainers,
            None => {
                let rows = self.scaled(&parts.get(0, None)?);
                let new = |job: &Job| Trainer::new(job.cfg.clone(), &rows[job.site]);
                self.jobs.iter().map(new).collect::<Result<_, _>>()?
            }
        };
        let (mut logs, mut last) = (Vec::new(), Vec::new());
        for (job, trainer) in self.jobs.iter().zip(&trainers) {
            std::fs::create_dir_all(&job.folder)
                .with_context(|| format!("make {}", job.folder.display()))?;
            let log = TrainingLog::open(&job.folder, trainer.steps_done(), &job.cfg.sae)?;
            logs.push(log.0);
            last.push(log.1);
        }
        let passes = self.sites.iter().map(|s| s.schedule.passes()).max();
        let places: Vec<(usize, usize)> = (0..passes.unwrap_or(0))
            .flat_map(|pass| (0..parts.n).map(move |part| (pass, part)))
            .collect();
        let (all, left) = places.iter().fold((0, 0), |(all, left), &(pass, part)| {
            let rounds = self.rounds(pass, part, &trainers);
            (all + rounds.end, left + rounds.len())
        });
        let started = Instant::now();
        let bar = Progress::new("train", "steps", all as u64);
        bar.resume((all - left) as u64);
        let (mut steps, mut x) = (0usize, Vec::new());
        let mut fvus = vec![f64::NAN; self.jobs.len()];
        for (pass, part) in places {
            let rounds = self.rounds(pass, part, &trainers);
            if rounds.is_empty() {
                continue;
            }
            let mut rows = self.scaled(&parts.get(part, Some(&bar))?);
            self.check(part, &rows)?;
            for at in rounds {
                let mut dead = 0.0;
                for (site, known) in self.sites.iter().enumerate() {
                    let due = known.schedule.of_part(pass, part).nth(at);
                    let is_due = |i: &usize| {
                        self.jobs[*i].site == site && due == Some(trainers[*i].steps_done())
                    };
                    let jobs: Vec<usize> = (0..self.jobs.len()).filter(is_due).collect();
                    if jobs.is_empty() {
                        continue;
                    }
                    rows[site].batch(pass, at, known.batch, &mut x);
                    for i in jobs {
                        let clock = Instant::now();
                        let s: StepStats = trainers[i].step(&x);
                        let rate = known.batch as f64 / clock.elapsed().as_secs_f64();
                        last[i] = logs[i].add(&s, rate)?;
                        fvus[i] = s.fvu;
                        dead = s.dead.max(dead);
                    }
                }
                steps += 1;
                bar.message(message(&fvus, dead));
                bar.advance(1);
                if steps == left || steps.is_multiple_of(self.checkpoint_every.max(1)) {
                    logs.iter().try_for_each(TrainingLog::sync)?;
                    self.states.save(&trainers)?;
                }
            }
        }
        bar.finish();
        Ok(Ended {
            trainers,
            last,
            steps,
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    /// The trainers of a run that was stopped, if there are any, with a note on each state that is damaged.
    fn resume(&self) -> Result<Option<Vec<Trainer>>> {
        let cfgs: Vec<TrainConfig> = self.jobs.iter().map(|j| j.cfg.clone()).collect();
        let Resumed { trainers, damaged } = self.states.resume(&cfgs)?;
        for e in &damaged {
            note(format_args!("{:<12} {e}", "train"));
        }
        if !damaged.is_empty() {
            let steps = trainers.iter().flatten().map(Trainer::steps_done).max();
            note(match steps {
                Some(steps) => {
                    format!(
                        "{:<12} goes on from the state before, at step {steps}",
                        "train"
                    )
                }
                None => format!("{:<12} there is no state before: it begins anew", "train"),
            });
        }
        Ok(trainers)
    }

    /// The batches of a part that an SAE has still to read: up to the most that a site has of it.
    fn rounds(&self, pass: usize, part: usize, trainers: &[Trainer]) -> std::ops::Range<usize> {
        let of = |site: usize| self.sites[site].schedule.of_part(pass, part);
        let all = (0..self.sites.len())
            .map(|s| of(s).len())
            .max()
            .unwrap_or(0);
        let begins = self.jobs.iter().zip(trainers).filter_map(|(job, t)| {
            let steps = of(job.site);
            let next = t.steps_done().max(steps.start);
            (next < steps.end).then(|| next - steps.start)
        });
        begins.min().unwrap_or(all)..all
    }

    /// The rows of each site, as training sees them.
    fn scaled<'r>(&self, rows: &[Rows<'r>]) -> Vec<ScaledRows<'r>> {
        let sites = rows.iter().zip(self.sites);
        sites
            .map(|(rows, site)| ScaledRows::new(*rows, &site.input, self.seed))
            .collect()
    }

    /// Whether there are rows to train on.
    fn check(&self, part: usize, rows: &[ScaledRows<'_>]) -> Result<()> {
        match (0..rows.len()).find(|&site| rows[site].is_empty()) {
            None => Ok(()),
            Some(site) => {
                let hook = self.jobs.iter().find(|j| j.site == site);
                let hook = hook.map_or("", |j| &j.cfg.sae.hook_name);
                Err(Hinted::new(
                    format!(
                        "{hook}: every row of part {part} is an outlier beside those of the first"
                    ),
                    "train on a corpus of one kind, or hold more of it in memory: train.buffer",
                )
                .into())
            }
        }
    }
}

/// How it goes, beside a bar.
fn message(fvus: &[f64], dead: f64) -> String {
    let some: Vec<String> = fvus.iter().take(SHOWN).map(|f| format!("{f:.3}")).collect();
    format!("fvu {}  dead {:.0} %", some.join(" "), 100.0 * dead)
}
