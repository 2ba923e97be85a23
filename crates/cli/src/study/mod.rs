//! The main job: a study from a model to a report.
//!
//! `pull -> harvest -> train -> discover -> tune -> gate -> calibrate -> evaluate -> report`, one file a stage;
//! `gate` (which learns from what `read` pools) and `calibrate` only if an arm wants them. Each stage is a
//! function of the study's config and of what the stages that it builds on left; [`run`] keeps their outputs,
//! so that a killed study goes on where it was.

mod calibrate;
pub mod config;
mod corpus;
mod discover;
mod evaluate;
mod gate;
mod matched;
mod read;
mod record;
mod refuses;
mod run;
mod shipped;
mod stream;
mod train;
mod tune;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use demur_eval::arms::{self, Arm, Item, Reply};
use demur_eval::judge;
use demur_eval::prompts::{self, Label, Prompt, Split};
use demur_eval::record::Record;
use demur_features::harvest::Sequence;
use demur_model::generate::EngineConfig;
use demur_model::hooks::Site;
use demur_model::tokenizer::Special;
use demur_sae::Sae;
use demur_steering::{CompiledPlan, SaeEntry, SaeSet, SteeringPlan, absolute, compile};

use crate::exit::Hinted;
use crate::fetch::{self, Source};
use crate::loaded::{Loaded, conversation};
use crate::progress::{Progress, note, say};
use config::{Reads, SaeSource, SaeToTrain, ShippedPairs, Study};
pub use gate::{GATE_NAME, Trained as TrainedGate, scores as gate_scores};
pub use refuses::REFUSES_NAME;
use run::stamp;
pub use run::{STAGES, write_atomic};
pub use shipped::plan as default_plan;
pub use train::folder as sae_folder;

/// The name that plans of a study give its SAE.
pub const SAE_NAME: &str = "main";

/// Options of a run that are not part of the study.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Folder of all runs.
    pub runs: PathBuf,
    /// Run this stage and all after it anew.
    pub from: Option<String>,
}

/// What every stage after `pull` needs.
pub struct StudyContext {
    pub study: Study,
    pub loaded: Loaded,
    pub site: Site,
    /// First tokens of refusals.
    pub openers: Vec<u32>,
    pub prompts: Vec<Prompt>,
}

/// The SAE at work, with what is known of its latents.
pub struct Working {
    pub sae: Arc<Sae>,
    pub sha256: String,
    pub max_activation: Arc<[f32]>,
    pub resid_norm: f32,
}

impl Working {
    /// The SAE under the name that plans use.
    fn set(&self) -> SaeSet {
        let entry = SaeEntry {
            sae: Arc::clone(&self.sae),
            sha256: self.sha256.clone(),
            max_activation: Some(Arc::clone(&self.max_activation)),
            resid_norm: Some(self.resid_norm),
        };
        BTreeMap::from([(SAE_NAME.to_owned(), entry)])
    }
}

/// Runs a study and returns its record.
pub fn run_study(study: Study, options: &Options) -> Result<Record> {
    let from = match &options.from {
        None => None,
        Some(name) => match STAGES.iter().position(|s| s == name) {
            Some(at) => Some(at),
            None => bail!("--from {name}: the stages are {}", STAGES.join(", ")),
        },
    };
    let mut run = run::Run::open(options.runs.join(&study.name), from)?;
    let (model_sha256, context) = pull(&mut run, study)?;
    let c = &context;
    let p = plan(&mut run, c)?;
    let chosen = p.calibrated.as_ref().map(|c| &c.chosen);
    // Another demur may ship another plan.
    let asks_shipped = c.study.evaluate.arms.contains(&config::Arm::DefaultPlan);
    let shipped = asks_shipped.then(shipped::plan).transpose()?;
    let inputs = (&c.study.evaluate, chosen, shipped.map(|p| p.sha256()));
    let evaluated = run.stage("evaluate", &inputs, |scratch| evaluate::run(c, &p, scratch))?;
    let record = record::assemble(c, &run, &model_sha256, &p, &evaluated)?;
    record.write(&run.dir.join("record.json"))?;
    let html = crate::report::render(&record)?;
    write_atomic(&run.dir.join("report.html"), html.as_bytes())?;
    note(format_args!(
        "{:<12} {}",
        "report",
        run.dir.join("report.html").display()
    ));
    Ok(record)
}

/// What a study knows before its test.
pub struct Planned {
    trained: train::Trained,
    working: Working,
    gate: Option<gate::Trained>,
    found: discover::Found,
    pub tuned: tune::Tuned,
    pub calibrated: Option<calibrate::Calibrated>,
    /// `plan.toml` of the run.
    pub file: PathBuf,
}

/// Runs the stages up to `calibrate`, and leaves the plan that they chose.
pub fn plan_only(study: Study, options: &Options) -> Result<Planned> {
    let mut run = run::Run::open(options.runs.join(&study.name), None)?;
    let (_, context) = pull(&mut run, study)?;
    plan(&mut run, &context)
}

/// The stages after `pull` up to `calibrate`; leaves `plan.toml`.
fn plan(run: &mut run::Run, c: &StudyContext) -> Result<Planned> {
    let trained = corpus_and_sae(run, c)?;
    let harvest_dir = run.dir.join("harvest");
    let sae = train::load(c, &run.dir.join("train"))?;
    if c.study.evaluate.arms.contains(&config::Arm::DefaultPlan) {
        fits_default_plan(c, &sae, &trained.sha256)?;
    }
    // A gate learns from the model and the SAE alone: a change of one of the two branches leaves the other.
    let before = run.link();
    let found = run.stage(
        "discover",
        &(&c.study.discovery, &c.study.prompts),
        |scratch| discover::run(c, &sae, &harvest_dir, scratch),
    )?;
    let working = Working {
        sha256: trained.sha256.clone(),
        max_activation: found.max_activation.clone().into(),
        resid_norm: found.resid_norm,
        sae,
    };
    let tuned = run.stage("tune", &c.study.tune, |scratch| {
        tune::run(c, &working, &found, scratch)
    })?;
    let mut gate = None;
    let mut calibrated = None;
    if c.study.wants_gate() {
        let clamp = run.link();
        run.go_on_from(&before);
        let (prompts, trained) = train_gate(run, c, &working.sae, &working.sha256)?;
        if c.study.wants_calibration() {
            let cfg = &c.study.calibrate;
            let inputs = (
                &cfg.clamp,
                &cfg.damp,
                cfg.max_new_tokens,
                cfg.prompts,
                &clamp,
            );
            let measured = run.stage("calibrate", &inputs, |scratch| {
                calibrate::measure(c, &working, (&prompts, &trained), &tuned, scratch)
            })?;
            calibrated = Some(calibrate::choose(&measured, cfg));
        }
        run.go_on_from(&format!("{clamp} {}", run.link()));
        gate = Some(trained);
    }
    let planned = Planned {
        trained,
        working,
        gate,
        found,
        tuned,
        calibrated,
        file: run.dir.join("plan.toml"),
    };
    // For `demur chat --plan`: it needs nothing but the SAE.
    let plan = evaluate::chosen_plan(c, &planned)?;
    let plan = absolute(&plan, &planned.working.set())?.to_toml()?;
    write_atomic(&planned.file, plan.as_bytes())?;
    Ok(planned)
}

/// Says before the long stages that the shipped plan is not for this model or this SAE.
fn fits_default_plan(c: &StudyContext, sae: &Arc<Sae>, sha256: &str) -> Result<()> {
    let working = Working {
        sae: Arc::clone(sae),
        sha256: sha256.to_owned(),
        max_activation: Arc::default(), // the plan's values are absolute
        resid_norm: 0.0,
    };
    c.compile(&default_plan()?, &working).with_context(|| {
        Hinted::new(
            "the arm default_plan does not fit this study",
            "take it out of evaluate.arms: the plan is for the default model and its shipped SAE",
        )
    })?;
    Ok(())
}

/// Runs the stages up to `train`; returns that stage's folder and its figures.
pub fn train_only(study: Study, options: &Options) -> Result<(PathBuf, train::Trained)> {
    let mut run = run::Run::open(options.runs.join(&study.name), None)?;
    let (_, context) = pull(&mut run, study)?;
    let trained = corpus_and_sae(&mut run, &context)?;
    Ok((run.dir.join("train"), trained))
}

/// Runs the stages up to `gate`; returns the file of the plan with the gate, and its figures.
pub fn gate_only(study: Study, options: &Options) -> Result<(PathBuf, gate::Trained)> {
    let mut run = run::Run::open(options.runs.join(&study.name), None)?;
    let (_, context) = pull(&mut run, study)?;
    let trained = corpus_and_sae(&mut run, &context)?;
    let sae = train::load(&context, &run.dir.join("train"))?;
    let (_, gate) = train_gate(&mut run, &context, &sae, &trained.sha256)?;
    Ok((run.dir.join("gate.toml"), gate))
}

/// The stage `gate`; leaves `gate.toml`, a plan that has the gate and no intervention. Returns the prompts that
/// it learnt from and was tried on, and the gate.
fn train_gate(
    run: &mut run::Run,
    c: &StudyContext,
    sae: &Sae,
    sae_sha256: &str,
) -> Result<(Vec<Prompt>, gate::Trained)> {
    let prompts = read::prompts(c)?;
    let g = &c.study.gate;
    let reads = |what| g.reads.contains(&what);
    let kept = (reads(Reads::Latents), reads(Reads::Attention));
    let what = (&c.study.prompts.system, kept, &g.sites);
    let folder = run.folder("read", "gate", &what)?;
    let to_base = (&c.study.prompts.system, &c.study.model);
    let asked = (g.asked > 0).then(|| run.folder("asked", "gate", &to_base));
    let asked = asked.transpose()?;
    let inputs = (
        (what, &g.reads),
        &prompts,
        &g.sizes,
        &g.l2,
        (g.recall, g.asked),
        g.attention,
    );
    let work = |_: &Path| {
        let read = read::rows(c, sae, &prompts, &folder)?;
        gate::run(c, sae, &prompts, read, asked.as_deref())
    };
    let judge = c.study.prompts.judge;
    let trained = match asked.is_some() && !judge.is_default() {
        true => run.stage("gate", &(inputs, judge), work)?,
        false => run.stage("gate", &inputs, work)?,
    };
    let plan = trained.plan(sae_sha256).to_toml()?;
    write_atomic(&run.dir.join("gate.toml"), plan.as_bytes())?;
    Ok((prompts, trained))
}

/// The shipped SAE of the default study, and the sha256 of its weights.
pub fn shipped_sae() -> Result<(Sae, String)> {
    let study = Study::load("quickstart", &[])?;
    let (sae, sha256, _) = shipped::load(&study.sae.name)?;
    Ok((sae, sha256))
}

fn pull(run: &mut run::Run, study: Study) -> Result<(String, StudyContext)> {
    let name = &study.model.name;
    let pulled: Pulled = run.stage("pull", &(name, stamp(Path::new(name))), |_| {
        let path = fetch::model_path(name, Source::Any)?;
        let checkpoint = demur_model::checkpoint::Checkpoint::open(&path)?;
        Ok(Pulled {
            sha256: checkpoint.sha256(),
            path,
        })
    })?;
    // The cache may have moved since.
    let path = fetch::model_path(name, Source::Any)?;
    Ok((pulled.sha256, StudyContext::new(study, &path)?))
}

fn corpus_and_sae(run: &mut run::Run, c: &StudyContext) -> Result<train::Trained> {
    let s = &c.study;
    // A file's content is an input as much as its name: its prompts are part of the corpus.
    let files: Vec<_> = s.corpus.files.iter().chain(&s.prompts.file).collect();
    let stamps: Vec<_> = files.iter().map(|f| stamp(f)).collect();
    let corpus = run.stage(
        "harvest",
        &(
            (&s.corpus, &s.model, &s.sae, s.seed),
            (files, stamps, &s.prompts.system),
        ),
        |scratch| corpus::run(c, scratch),
    )?;
    let harvest = run.dir.join("harvest");
    let sae_files = match s.sae.source {
        SaeSource::Path => stamp(Path::new(&s.sae.name)),
        SaeSource::Train | SaeSource::Shipped => Vec::new(),
    };
    let inputs = (&s.sae, s.train.inputs(), s.seed, sae_files);
    run.stage("train", &inputs, |scratch| {
        train::run(c, &corpus, &harvest, scratch)
    })
}

/// What `pull` leaves.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Pulled {
    path: PathBuf,
    sha256: String,
}

impl StudyContext {
    fn new(study: Study, path: &Path) -> Result<Self> {
        let name = path.to_str().context("the model's path is not UTF-8")?;
        let loaded = Loaded::open(name, study.model.precision)?.keeping(study.model.kv_cache);
        let site = study.site()?.check(loaded.model.spec().n_layers)?;
        let openers = judge::opener_tokens(|text| {
            loaded
                .tokenizer
                .encode(text, Special::AsText)
                .unwrap_or_default()
        });
        let prompts = match &study.prompts.file {
            Some(file) => own_prompts(file)?,
            None => shipped_pairs(study.prompts.shipped)?,
        };
        let context = Self {
            study,
            loaded,
            site,
            openers,
            prompts,
        };
        for split in [Split::Discovery, Split::Validation, Split::Test] {
            for label in [Label::Unsafe, Label::Safe] {
                if context.prompts(split, label).is_empty() {
                    bail!("there is no {label:?} prompt in the {split:?} split of the prompts");
                }
            }
        }
        Ok(context)
    }

    /// Prompts of a split, at most as many as the study asks for.
    pub fn prompts(&self, split: Split, label: Label) -> Vec<&Prompt> {
        let p = &self.study.prompts;
        let most = match split {
            Split::Discovery => p.discovery,
            Split::Validation => p.validation,
            Split::Test => p.test,
            Split::Corpus => 0,
        };
        let all = self
            .prompts
            .iter()
            .filter(|p| p.split == Some(split) && p.label == Some(label));
        all.take(if most == 0 { usize::MAX } else { most })
            .collect()
    }

    /// A prompt as this model is asked it.
    pub fn item(&self, prompt: &Prompt, system: Option<&str>) -> Result<Item> {
        let system = system.or(self.study.prompts.system.as_deref());
        let messages = conversation(system, &prompt.prompt);
        let rendered = self
            .loaded
            .chat()?
            .encode(&self.loaded.tokenizer, &messages, true)
            .with_context(|| format!("prompt '{}'", prompt.id))?;
        Ok(Item {
            id: prompt.id.clone(),
            tokens: rendered.ids,
            roles: rendered.roles,
        })
    }

    /// Many prompts.
    pub fn items(&self, prompts: &[&Prompt]) -> Result<Vec<Item>> {
        prompts.iter().map(|p| self.item(p, None)).collect()
    }

    pub fn engine(&self) -> demur_model::generate::Engine<'_> {
        let config = EngineConfig {
            max_batch: self.study.model.max_batch,
            max_batch_tokens: self.study.model.batch_tokens,
        };
        demur_model::generate::Engine::new(&self.loaded.model, &self.loaded.tokenizer, config)
    }

    /// Replies of all arms, with a progress bar, kept in the stage's `scratch` folder as they come.
    fn replies(
        &self,
        stage: &'static str,
        arms: &[Arm<'_>],
        max_new_tokens: usize,
        scratch: &Path,
    ) -> Result<Vec<Reply>> {
        let total: usize = arms.iter().map(|a| a.items.len()).sum();
        let bar = Progress::new(stage, "replies", total as u64);
        let mut replies = arms::run(
            &mut self.engine(),
            arms,
            max_new_tokens,
            &self.openers,
            &scratch.join("replies.jsonl"),
            |n| bar.resume(n as u64),
            |_| bar.advance(1),
        )?;
        bar.finish();
        let judge = self.study.prompts.judge.judge();
        replies.iter_mut().for_each(|r| r.verdict = judge(&r.text));
        Ok(replies)
    }

    /// Compiles a plan against the study's SAE.
    pub fn compile(&self, plan: &SteeringPlan, sae: &Working) -> Result<Arc<CompiledPlan>> {
        let spec = self.loaded.model.spec();
        Ok(Arc::new(compile(
            plan,
            &sae.set(),
            spec.n_layers,
            spec.d_model,
        )?))
    }
}

/// `n` of what there is (0: all) at equal distances.
fn evenly<T: Copy>(all: Vec<T>, n: usize) -> Vec<T> {
    if n == 0 || n >= all.len() {
        return all;
    }
    (0..n).map(|i| all[i * all.len() / n]).collect()
}

/// The shipped pairs that a study asks for.
fn shipped_pairs(which: ShippedPairs) -> Result<Vec<Prompt>> {
    Ok(match which {
        ShippedPairs::Plain => prompts::shipped_pairs()?,
        ShippedPairs::Styled => prompts::shipped_styled()?,
        ShippedPairs::All => [prompts::shipped_pairs()?, prompts::shipped_styled()?].concat(),
    })
}

/// A user's prompts: none is one of those that the SAE is trained or that a clamp is priced on.
fn own_prompts(file: &Path) -> Result<Vec<Prompt>> {
    let own = prompts::read(file)?;
    let benign = prompts::shipped_benign()?;
    prompts::disjoint(&file.display().to_string(), own.iter().chain(&benign))?;
    let unused = own
        .iter()
        .filter(|p| p.label.is_none() || p.split.is_none());
    let n = unused.count();
    if n > 0 {
        note(format_args!(
            "{:<12} {n} of {} in {} have no label or no split and are not used",
            "prompts",
            own.len(),
            file.display()
        ));
    }
    Ok(own)
}

/// A prompt followed by a reply, as one sequence.
pub fn with_reply(item: &Item, reply: &[u32]) -> Sequence {
    use demur_model::hooks::Role;
    Sequence {
        source: item.id.clone(),
        tokens: item.tokens.iter().chain(reply).copied().collect(),
        roles: item
            .roles
            .iter()
            .copied()
            .chain(std::iter::repeat_n(Role::Assistant, reply.len()))
            .collect(),
    }
}

/// Prints what a study would do.
pub fn dry_run(study: &Study, runs: &Path) -> Result<()> {
    let sae = match study.sae.source {
        SaeSource::Shipped => format!("load the shipped SAE '{}'", study.sae.name),
        SaeSource::Path => format!("load the SAE in {}", study.sae.name),
        SaeSource::Train => {
            let saes = study.saes()?;
            let of = |s: &SaeToTrain| {
                let (name, k) = (s.architecture.name, s.k);
                format!("a {name:?} SAE at {}, k = {k}", s.site)
            };
            format!(
                "train {}",
                saes.iter().map(of).collect::<Vec<_>>().join("; ")
            )
        }
    };
    let arms: Vec<_> = study.evaluate.arms.iter().map(|a| a.name()).collect();
    let folder = runs.join(&study.name);
    let lines = [
        ("study", format!("{} (seed {})", study.name, study.seed)),
        ("run folder", folder.display().to_string()),
        ("pull", study.model.name.clone()),
        ("harvest", study.sae.site.clone()),
        ("train", sae),
        (
            "discover",
            format!(
                "{:?}, short list of {}",
                study.discovery.methods, study.discovery.candidates
            ),
        ),
        (
            "tune",
            format!(
                "values {:?}, sets of {:?}",
                study.tune.values, study.tune.set_sizes
            ),
        ),
        (
            "gate",
            match study.wants_gate() {
                true => format!("{:?}, recall {}", study.gate.reads, study.gate.recall),
                false => "none".to_owned(),
            },
        ),
        (
            "calibrate",
            match study.wants_calibration() {
                true => format!(
                    "clamp {:?}, damping {:?}",
                    study.calibrate.clamp, study.calibrate.damp
                ),
                false => "none: no arm damps".to_owned(),
            },
        ),
        ("evaluate", arms.join(", ")),
        ("report", folder.join("report.html").display().to_string()),
    ];
    for (what, how) in lines {
        say(format_args!("{what:<10} {how}"))?;
    }
    Ok(())
}
