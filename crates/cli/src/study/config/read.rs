//! Reads a study, applies what the command line changes, and checks what a type can't.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use demur_model::hooks::Site;
use serde::Serialize;

use super::{Arm, Method, SaeSource, Study};
use crate::architecture::ArchitectureConfig;
use crate::exit::Hinted;

/// Studies that are built in, by name.
const BUILT_IN: [(&str, &str); 4] = [
    (
        "quickstart",
        include_str!("../../../../../studies/quickstart.toml"),
    ),
    (
        "quickstart-sae",
        include_str!("../../../../../studies/quickstart-sae.toml"),
    ),
    (
        "refusal",
        include_str!("../../../../../studies/refusal.toml"),
    ),
    (
        "phi3-refusal",
        include_str!("../../../../../studies/phi3-refusal.toml"),
    ),
];

/// Fewest prompts of an attribution: of fewer no test says anything.
const MIN_ATTRIBUTION: usize = 4;
/// Most steps of its integrated form.
const MAX_STEPS: usize = 64;
/// Most draws of the prompts.
const MAX_RESAMPLES: usize = 10_000;
/// Latents of the largest set that can be asked for.
const MAX_SET: usize = 16;
/// Most latents that are searched for sets.
const MAX_POOL: usize = 64;

/// An SAE to train, with what it does not give itself taken from the study.
#[derive(Debug, Clone, PartialEq)]
pub struct SaeToTrain {
    /// Empty for the study's own.
    pub name: String,
    pub site: Site,
    pub k: usize,
    pub architecture: ArchitectureConfig,
    d_sae: Option<usize>,
    expansion: f64,
    pub lr: Option<f64>,
    pub auxk_alpha: Option<f64>,
    pub seed: u64,
}

impl SaeToTrain {
    /// What errors call it.
    pub fn place(&self) -> String {
        match &self.name[..] {
            "" => "train".to_owned(),
            name => format!("train.saes '{name}'"),
        }
    }

    /// The number of latents, on a residual stream of width `d_model`.
    pub fn d_sae(&self, d_model: usize) -> usize {
        self.d_sae
            .unwrap_or((d_model as f64 * self.expansion) as usize)
    }

    /// Checks what can be checked without a model.
    fn validate(&self) -> Result<()> {
        if self.k == 0 {
            bail!("k = 0: it must be at least 1");
        }
        let numbers = [
            ("expansion", self.expansion, false),
            ("lr", self.lr.unwrap_or(1.0), false),
            ("auxk_alpha", self.auxk_alpha.unwrap_or(0.0), true),
        ];
        for (key, value, zero) in numbers {
            must_be_positive(key, value, zero)?;
        }
        // Sizes that are not given are those of the model, which is not known here.
        let d_sae = self.d_sae.unwrap_or(usize::MAX);
        self.architecture
            .resolve(self.k, d_sae)
            .context("architecture")?;
        Ok(())
    }
}

/// Refuses a number that is not positive, or not even 0 where `zero` will do.
fn must_be_positive(key: &str, value: f64, zero: bool) -> Result<()> {
    if !(value.is_finite() && (value > 0.0 || zero && value == 0.0)) {
        bail!("{key} = {value}: it must be a positive number");
    }
    Ok(())
}

/// Whether something may name a folder.
fn names_a_folder(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !name.is_empty() && name.chars().all(fits) && !name.starts_with('.')
}

impl Study {
    /// Loads a study from a file, or a built-in one by name, with `key=value` overrides applied.
    pub fn load(name_or_path: &str, overrides: &[String]) -> Result<Self> {
        let path = Path::new(name_or_path);
        let built_in = BUILT_IN.iter().find(|(name, _)| *name == name_or_path);
        let (text, folder) = match built_in {
            Some((_, text)) => ((*text).to_owned(), PathBuf::new()),
            None => {
                let names: Vec<_> = BUILT_IN.iter().map(|b| b.0).collect();
                let text = std::fs::read_to_string(path).with_context(|| {
                    Hinted::new(
                        format!("can't read the study '{name_or_path}'"),
                        format!(
                            "give a TOML file, or a built-in study: {}",
                            names.join(", ")
                        ),
                    )
                })?;
                (text, path.parent().unwrap_or(Path::new("")).to_owned())
            }
        };
        let mut table: toml::Table = text
            .parse()
            .with_context(|| format!("the study '{name_or_path}' is not TOML"))?;
        for set in overrides {
            apply_override(&mut table, set)?;
        }
        let mut study: Self = table
            .try_into()
            .with_context(|| format!("the study '{name_or_path}' has a wrong key or value"))?;
        let own = study
            .prompts
            .file
            .iter_mut()
            .chain(&mut study.gate.files)
            .chain(&mut study.gate.wrappers)
            .chain(&mut study.gate.held_out);
        for file in study.corpus.files.iter_mut().chain(own) {
            if file.is_relative() {
                *file = folder.join(&*file);
            }
        }
        study.validate()?;
        Ok(study)
    }

    /// Checks what the types can't.
    pub fn validate(&self) -> Result<()> {
        let names = self.train.saes.iter().map(|s| ("train.saes.name", &s.name));
        for (key, name) in std::iter::once(("name", &self.name)).chain(names) {
            if !names_a_folder(name) {
                bail!("{key} = '{name}': use letters, digits, '-', '_' and '.' only");
            }
        }
        let names: Vec<_> = self.train.saes.iter().map(|s| &s.name).collect();
        only_once("train.saes.name", &names)?;
        for sae in self.saes()? {
            sae.validate().with_context(|| sae.place())?;
        }
        if self.sae.source == SaeSource::Path && self.sae.name.is_empty() {
            bail!("sae.name: give the SAE's folder, as sae.source is \"path\"");
        }
        let positive = [
            ("model.max_batch", self.model.max_batch),
            ("model.batch_tokens", self.model.batch_tokens),
            ("train.batch", self.train.batch),
            ("train.checkpoint_every", self.train.checkpoint_every),
            ("train.checkpoints", self.train.checkpoints),
            ("discovery.candidates", self.discovery.candidates),
            ("discovery.reply_tokens", self.discovery.reply_tokens),
            ("tune.max_new_tokens", self.tune.max_new_tokens),
            ("evaluate.max_new_tokens", self.evaluate.max_new_tokens),
            ("corpus.context", self.corpus.context),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, v)| *v == 0) {
            bail!("{key} = 0: it must be at least 1");
        }
        let (t, d, corpus) = (&self.train, &self.discovery, &self.corpus);
        // The key, its value, and whether 0 will do.
        let numbers = [
            ("train.epochs", t.epochs, false),
            ("corpus.temperature", f64::from(corpus.temperature), true),
            ("discovery.max_density", d.max_density, false),
        ];
        let weights = corpus.weights.iter();
        let weights = weights.map(|weight| ("corpus.weights", *weight, false));
        for (key, value, zero) in numbers.into_iter().chain(weights) {
            must_be_positive(key, value, zero)?;
        }
        if ![0, corpus.files.len()].contains(&corpus.weights.len()) {
            bail!(
                "corpus.weights: {} for {} files; give one for each, or none",
                corpus.weights.len(),
                corpus.files.len()
            );
        }
        if corpus.roles.is_empty() {
            bail!("corpus.roles: give at least one");
        }
        if t.buffer < t.batch {
            bail!(
                "train.buffer = {}: it must hold a batch, {}",
                t.buffer,
                t.batch
            );
        }
        if !d.clamp.is_finite() {
            bail!("discovery.clamp = {}: it must be finite", d.clamp);
        }
        if self.tune.values.is_empty() || self.tune.values.iter().any(|v| !v.is_finite()) {
            bail!("tune.values: give at least one finite clamp value");
        }
        if self.tune.set_sizes.is_empty() || self.tune.set_sizes.contains(&0) {
            bail!("tune.set_sizes: give at least one size, each at least 1");
        }
        if !(0.0..=1.0).contains(&self.tune.aim_refusal_unsafe) {
            bail!("tune.aim_refusal_unsafe: give a fraction between 0 and 1");
        }
        let g = &self.gate;
        if g.reads.is_empty() || (1..g.reads.len()).any(|i| g.reads[..i].contains(&g.reads[i])) {
            bail!("gate.reads: give latents, residual or both, each once");
        }
        if g.sizes.is_empty() || g.sizes.contains(&0) {
            bail!("gate.sizes: give at least one size, each at least 1");
        }
        if g.l2.is_empty() || !g.l2.iter().all(|l| l.is_finite() && *l > 0.0) {
            bail!("gate.l2: give at least one penalty, each a positive number");
        }
        if !(g.recall > 0.0 && g.recall <= 1.0) {
            bail!("gate.recall: give a fraction above 0, at most 1");
        }
        let a = &g.attention;
        if !(a.heads > 0 && a.epochs > 0 && a.rate > 0.0 && a.rate < 1.0) {
            bail!(
                "gate.attention: give heads and epochs of at least 1, and a rate between 0 and 1"
            );
        }
        if !(0.0..=1.0).contains(&g.wrapped) {
            bail!("gate.wrapped: give a fraction between 0 and 1");
        }
        let k = &self.calibrate;
        if k.clamp.is_empty() || !k.clamp.iter().all(|c| c.is_finite() && *c > 0.0) {
            bail!("calibrate.clamp: give at least one finite factor, all above 0");
        }
        if k.damp.is_empty() || !k.damp.iter().all(|d| d.is_finite() && *d >= 0.0) {
            bail!("calibrate.damp: give at least one finite factor, none negative");
        }
        if !(0.0..=1.0).contains(&k.aim_refusal_unsafe) {
            bail!("calibrate.aim_refusal_unsafe: give a fraction between 0 and 1");
        }
        if k.max_chat_kl.is_nan() || k.max_chat_kl < 0.0 {
            bail!("calibrate.max_chat_kl: give a number that is not negative");
        }
        if k.max_new_tokens == 0 {
            bail!("calibrate.max_new_tokens: give at least 1");
        }
        if self.discovery.methods.is_empty() {
            bail!("discovery.methods: give at least one");
        }
        let a = &d.attribution;
        if (1..MIN_ATTRIBUTION).contains(&a.prompts) {
            bail!(
                "discovery.attribution.prompts = {}: give at least {MIN_ATTRIBUTION}, or 0 for none; fewer show nothing",
                a.prompts
            );
        }
        if a.steps > MAX_STEPS {
            bail!(
                "discovery.attribution.steps = {}: it must be at most {MAX_STEPS}",
                a.steps
            );
        }
        if a.prompts == 0 && a.steps > 0 {
            bail!(
                "discovery.attribution.steps = {}: give discovery.attribution.prompts as well",
                a.steps
            );
        }
        if a.prompts == 0 && d.methods.contains(&Method::Attribution) {
            bail!("discovery.methods: \"attribution\" needs discovery.attribution.prompts");
        }
        only_once("corpus.roles", &self.corpus.roles)?;
        if d.resamples > MAX_RESAMPLES {
            bail!(
                "discovery.resamples = {}: it must be at most {MAX_RESAMPLES}",
                d.resamples
            );
        }
        let s = &d.sets;
        if s.size > MAX_SET || s.pool > MAX_POOL {
            bail!(
                "discovery.sets: give a size of at most {MAX_SET} and a pool of at most {MAX_POOL}; all pairs of the pool are measured"
            );
        }
        if s.size > s.pool {
            bail!(
                "discovery.sets.size = {}: discovery.sets.pool = {} has fewer latents",
                s.size,
                s.pool
            );
        }
        if !s.value.is_finite() {
            bail!("discovery.sets.value = {}: it must be finite", s.value);
        }
        if s.max_kl.is_nan() || s.max_kl < 0.0 {
            bail!(
                "discovery.sets.max_kl = {}: it must not be negative",
                s.max_kl
            );
        }
        only_once("tune.values", &self.tune.values)?;
        only_once("tune.set_sizes", &self.tune.set_sizes)?;
        only_once("calibrate.clamp", &self.calibrate.clamp)?;
        only_once("calibrate.damp", &self.calibrate.damp)?;
        only_once("discovery.methods", &self.discovery.methods)?;
        only_once("evaluate.arms", &self.evaluate.arms)?;
        let e = &self.evaluate;
        only_once("evaluate.strengths", &e.strengths)?;
        let other = |s: &f64| s.is_finite() && *s != 0.0 && *s != 1.0;
        if !e.strengths.iter().all(other) {
            bail!(
                "evaluate.strengths: give finite factors other than 0, which is base, and 1, which is the arm itself"
            );
        }
        if self.evaluate.arms.first() != Some(&Arm::Base) {
            bail!("evaluate.arms: the first arm must be \"base\", all others are compared with it");
        }
        Ok(())
    }

    /// Whether an arm damps, by a calibrated gate.
    pub fn wants_calibration(&self) -> bool {
        self.evaluate.arms.contains(&Arm::GatedClampDamped)
    }

    /// Whether an arm needs a trained gate.
    pub fn wants_gate(&self) -> bool {
        self.evaluate.arms.iter().any(|a| a.is_gated())
    }

    /// The SAEs that are trained: the study's own, and then those beside it.
    pub fn saes(&self) -> Result<Vec<SaeToTrain>> {
        let t = &self.train;
        let own = SaeToTrain {
            name: String::new(),
            site: self.site()?,
            k: t.k,
            architecture: t.architecture.clone(),
            d_sae: t.d_sae,
            expansion: t.expansion,
            lr: t.lr,
            auxk_alpha: t.auxk_alpha,
            seed: self.seed,
        };
        let beside = t.saes.iter().map(|s| {
            let site = match &s.site {
                Some(site) => site
                    .parse::<Site>()
                    .with_context(|| format!("train.saes.site = '{site}'"))?,
                None => own.site,
            };
            Ok(SaeToTrain {
                name: s.name.clone(),
                site,
                k: s.k.unwrap_or(own.k),
                architecture: s.architecture.as_ref().unwrap_or(&own.architecture).clone(),
                // Its own expansion goes before the study's number of latents.
                d_sae: s.d_sae.or(own.d_sae.filter(|_| s.expansion.is_none())),
                expansion: s.expansion.unwrap_or(own.expansion),
                lr: s.lr.or(own.lr),
                auxk_alpha: s.auxk_alpha.or(own.auxk_alpha),
                seed: s.seed.unwrap_or(own.seed),
            })
        });
        let beside: Vec<_> = beside.collect::<Result<_>>()?;
        Ok(std::iter::once(own).chain(beside).collect())
    }

    /// The hook site.
    pub fn site(&self) -> Result<Site> {
        self.sae
            .site
            .parse()
            .with_context(|| format!("sae.site = '{}'", self.sae.site))
    }
}

/// Refuses a list in which an entry comes twice: it would be run twice under one name.
fn only_once<T: PartialEq + Serialize>(key: &str, list: &[T]) -> Result<()> {
    match (1..list.len()).find(|&i| list[..i].contains(&list[i])) {
        Some(i) => bail!("{key}: {} is there twice", serde_json::to_string(&list[i])?),
        None => Ok(()),
    }
}

/// Applies `a.b.c=value`; the value is TOML, or else a string.
fn apply_override(table: &mut toml::Table, set: &str) -> Result<()> {
    let (key, value) = set
        .split_once('=')
        .with_context(|| format!("--set {set}: write it as key=value, for instance seed=3"))?;
    let value: toml::Value = format!("v = {value}")
        .parse::<toml::Table>()
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| toml::Value::String(value.to_owned()));
    let mut parts: Vec<&str> = key.split('.').collect();
    let last = parts.pop().unwrap_or_default();
    let mut place = table;
    for part in parts {
        place = place
            .entry(part)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()))
            .as_table_mut()
            .with_context(|| format!("--set {set}: '{part}' is not a table"))?;
    }
    place.insert(last.to_owned(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_studies_are_valid() {
        for (name, _) in BUILT_IN {
            let study = Study::load(name, &[]).unwrap_or_else(|e| panic!("{name}: {e:#}"));
            assert_eq!(study.name, name);
        }
    }

    #[test]
    fn overrides_reach_every_level() {
        let sets = [
            "seed=3",
            "model.name=some/path",
            "tune.values=[2.0]",
            "prompts.test=5",
        ];
        let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
        let study = Study::load("quickstart", &sets).unwrap();
        assert_eq!((study.seed, study.prompts.test), (3, 5));
        assert_eq!(study.model.name, "some/path");
        assert_eq!(study.tune.values, [2.0]);
    }

    #[test]
    fn saes_take_what_they_do_not_give_from_the_study() {
        let beside = r#"train.saes=[
            {name="a"}, {name="b", site="layers.3", k=64, seed=9}, {name="c", expansion=2.0, lr=0.1},
        ]"#;
        let study = Study::load("quickstart-sae", &[beside.replace('\n', "")]).unwrap();
        let saes = study.saes().unwrap();
        let own = &saes[0];
        assert_eq!((own.d_sae(896), own.k, own.seed), (2048, 32, study.seed));
        assert_eq!(
            SaeToTrain {
                name: String::new(),
                ..saes[1].clone()
            },
            *own
        );
        assert_eq!(saes[2].site.to_string(), "blocks.3.hook_resid_post");
        assert_eq!((saes[2].k, saes[2].seed, saes[2].lr), (64, 9, own.lr));
        assert_eq!((saes[3].d_sae(896), saes[3].lr), (1792, Some(0.1)));
    }

    #[track_caller]
    fn refused(set: &str, expect: &str) {
        let e = Study::load("quickstart", &[set.to_owned()]).unwrap_err();
        assert!(format!("{e:#}").contains(expect), "{e:#}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        refused("sede=3", "sede");
        refused("tune.valeus=[1]", "valeus");
        refused("tune.values=[]", "tune.values");
        refused("gate.reads=[]", "gate.reads");
        refused(r#"gate.reads=["latents", "latents"]"#, "gate.reads");
        refused("gate.sizes=[0]", "gate.sizes");
        refused("gate.l2=[0.0]", "gate.l2");
        refused("gate.recall=1.5", "gate.recall");
        refused("gate.attention={heads=0}", "gate.attention");
        refused("gate.attention={rate=nan}", "gate.attention");
        refused("discovery.attribution.prompts=2", "attribution.prompts");
        refused("discovery.attribution.steps=4", "attribution.prompts");
        refused("discovery.attribution={prompts=8, steps=65}", "at most 64");
        refused("discovery.attribution.step=4", "step");
        refused(
            r#"discovery.methods=["attribution"]"#,
            "attribution.prompts",
        );
        refused("discovery.resamples=10001", "discovery.resamples");
        refused("discovery.sets={size=3, pool=2}", "discovery.sets.pool");
        refused("discovery.sets={size=17, pool=20}", "at most 16");
        refused("discovery.sets.value=inf", "discovery.sets.value");
        refused("discovery.sets.max_kl=-0.1", "discovery.sets.max_kl");
        refused("discovery.sets.maxkl=1", "maxkl");
        refused("model.max_batch=0", "model.max_batch");
        refused("name=../evil", "name");
        refused("train.saes=[{k=8}]", "name");
        refused(r#"train.saes=[{name="a/b"}]"#, "train.saes.name");
        refused(
            r#"train.saes=[{name="a"}, {name="a"}]"#,
            "\"a\" is there twice",
        );
        refused(r#"train.saes=[{name="a", k=0}]"#, "train.saes 'a': k = 0");
        refused(
            r#"train.saes=[{name="a", site="b"}]"#,
            "train.saes.site = 'b'",
        );
        refused("train.k=0", "train: k = 0");
        refused("train.buffer=7", "train.buffer");
        refused("corpus.weights=[1.0]", "corpus.weights");
        refused("corpus.roles=[]", "corpus.roles");
        refused(r#"corpus.roles=["bos"]"#, "bos");
        refused("sae.site=layer.3", "sae.site");
        refused("seed", "key=value");
        refused("evaluate.arms=[\"clamp\"]", "base");
        refused("evaluate.arms=[\"base\", \"clmap\"]", "clmap");
    }
}
