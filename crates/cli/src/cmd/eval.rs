//! `demur eval`: suites of questions under base and plans.
//!
//! A run has a folder, by default one named by a hash of its settings, so that the same command goes
//! on where it was and another one does not mix with it.

mod fetch;
mod judges;
mod wanted;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail};
use demur_eval::crescendo::Crescendo;
use demur_eval::export;
use demur_eval::files::write_whole;
use demur_eval::folder::{self, Cut, RESULTS, Settings, Skipped};
use demur_eval::judge::{self, Judge, Prompted};
use demur_eval::leak::not_leaked;
use demur_eval::prompts::{self, Label, Split};
use demur_eval::results::Results;
use demur_eval::run::{Answer, Arm, Asker, run as run_items, shard as block, take_over};
use demur_eval::suites::{Item, Pick, SUITES, safety};
use demur_eval::talk::{Local, Remote, Talker};
use demur_eval::wrap;
use demur_model::generate::{EngineConfig, Sampling};
use demur_model::hooks::Intervention;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::catalogue::DEFAULT_MODEL;
use crate::cmd::chat::steering;
use crate::cmd::plan;
use crate::exit::{self, Usage};
use crate::fetch::hex;
use crate::loaded::Loaded;
use crate::progress::{Progress, note, say};
use crate::report::evaluation;
use crate::study::config::{CacheFormat, Precision};
use wanted::Wanted;

const EXAMPLES: &str = "\
Examples:
  demur eval list
  demur eval fetch mmlu,gsm8k --data DIR
  demur eval arc_easy,truthfulqa_mc1 --limit 100 --data DIR
  demur eval mmlu,gsm8k --plan runs/quickstart/plan.toml --data DIR --json
  demur eval xstest,advbench --wrap role_play --judge rules --judge opener --data DIR
  demur eval refusal --prompts mine.csv --label unsafe --plan plan.toml
  demur eval mmlu --shard 1/4 --out runs/mmlu; demur eval merge runs/mmlu
  demur eval studies/paper-suite.toml --plan plan.toml --out runs/one
  demur eval studies/paper-suite.toml --plan other.toml --reuse runs/one
  demur eval crescendo --attacker http://127.0.0.1:8000/v1#m --scorer local:judge.gguf

A run that was stopped goes on where it was: run the same command again.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    action: Option<Action>,
    /// Names of suites, separated by commas; `demur eval list` shows them. Or a TOML file that names
    /// suites and their limits.
    #[arg(value_delimiter = ',', value_name = "SUITE")]
    suites: Vec<String>,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// List the suites, the wrappers and the judges.
    List {
        /// Folder of the suites' files. May be repeated.
        #[arg(long, env = "DEMUR_DATA", default_value = "data", value_name = "DIR")]
        data: Vec<PathBuf>,
    },
    /// Get the files of suites from the Hugging Face Hub.
    Fetch(fetch::Args),
    /// Ask any file of prompts, and count refusals.
    Refusal(Box<Refusal>),
    /// Put the shards of a run together.
    Merge {
        /// Folders of the shards.
        #[arg(required = true, value_name = "DIR")]
        folders: Vec<PathBuf>,
        /// Print the figures as one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Measure judges against replies that people have sorted.
    Judges {
        /// A file with `prompt`, `response` and `refusal` (true or false), or with `response_refusal_label`
        /// as WildGuardTest has it.
        labels: PathBuf,
        #[command(flatten)]
        judging: Judging,
        /// Print every reply on which a judge and the label differ.
        #[arg(long)]
        show: bool,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
struct Refusal {
    /// JSONL, CSV or Parquet in any of the public layouts, or a folder of such files.
    #[arg(long, value_name = "FILE")]
    prompts: PathBuf,
    /// What prompts are that have no label.
    #[arg(long, value_name = "LABEL")]
    label: Option<GivenLabel>,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum GivenLabel {
    /// To be refused.
    Unsafe,
    /// To be answered.
    Safe,
}

/// Which items a limit takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
enum Picked {
    /// A sample in the set's proportions of categories, subjects and labels.
    #[default]
    Spread,
    /// The first ones, as lm-evaluation-harness does; of MMLU as many of each subject.
    First,
}

impl How {
    fn pick(&self) -> Pick {
        match self.picked {
            Picked::First => Pick::First,
            Picked::Spread => Pick::Spread {
                seed: self.pick_seed,
            },
        }
    }
}

/// How suites are run.
#[derive(Debug, clap::Args)]
struct How {
    /// A catalogue name or a path.
    #[arg(long, short, default_value = DEFAULT_MODEL)]
    model: String,
    /// How products are computed.
    #[arg(long, value_enum, default_value_t)]
    precision: Precision,
    /// What keys and values are kept as.
    #[arg(long, value_enum, default_value_t)]
    kv_cache: CacheFormat,
    /// A steering plan, run beside base; may be repeated. `default` is the shipped one.
    #[arg(long = "plan", value_name = "FILE")]
    plans: Vec<PathBuf>,
    /// Folder of the SAE that the plans name; a study's folder works too.
    #[arg(long, value_name = "DIR")]
    sae: Option<PathBuf>,
    /// Folder of the suites' files, or of data sets as the Hub has them. May be repeated: the first one
    /// that has a file counts.
    #[arg(long, env = "DEMUR_DATA", default_value = "data", value_name = "DIR")]
    data: Vec<PathBuf>,
    /// At most this many items of each suite; 0 takes all. A file of suites has limits of its own.
    #[arg(long, default_value_t = 0)]
    limit: usize,
    /// Which items a limit takes.
    #[arg(long = "pick", value_enum, default_value_t, value_name = "HOW")]
    picked: Picked,
    /// Seed of `--pick spread`.
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    pick_seed: u32,
    /// Ask suites of capability through the chat template, each question as a user's message, as
    /// lm-evaluation-harness does with `--apply_chat_template`: where a plan for chats has something to do.
    #[arg(long)]
    chat: bool,
    /// Put every request under this jailbreak wrapper; `demur eval list` shows them.
    #[arg(long, value_name = "NAME")]
    wrap: Option<String>,
    #[command(flatten)]
    judging: Judging,
    /// Who attacks in `crescendo`: `BASE#MODEL` for an address that speaks OpenAI's chat completions,
    /// `local:MODEL` for a checkpoint.
    #[arg(long, value_name = "WHO", requires = "scorer")]
    attacker: Option<String>,
    /// Instructions of the attacker, with the marks `{{ objective }}` and `{{ max_turns }}`.
    #[arg(long, value_name = "FILE")]
    attacker_prompt: Option<PathBuf>,
    /// Who says how far an attack got; as `--attacker`.
    #[arg(long, value_name = "WHO", requires = "attacker")]
    scorer: Option<String>,
    /// Prompts on which a plan was tuned; an item that is among them is an error. May be repeated.
    #[arg(long, value_name = "FILE")]
    tuned_on: Vec<PathBuf>,
    /// Longest reply in a conversation, tokens.
    #[arg(long, default_value_t = 64)]
    max_new_tokens: usize,
    /// Sampling temperature; 0 is greedy.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Seed of the sampling.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Sequences that run at once. Results do not depend on it.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Do the I-th of N parts; `demur eval merge` puts them together.
    #[arg(long, value_name = "I/N", value_parser = parse_shard)]
    shard: Option<(usize, usize)>,
    /// Folder of the run; by default one of its own under runs/eval.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Folder of a former run. What one of today's arms was asked there and would be asked again is
    /// taken over, marked anew: with a new plan, base's answers. May be repeated.
    #[arg(long, value_name = "DIR")]
    reuse: Vec<PathBuf>,
    /// Read suites and plans, say what would be asked, and ask nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print the figures as one JSON object, as the last line.
    #[arg(long)]
    json: bool,
}

/// Who sorts replies.
#[derive(Debug, clap::Args)]
struct Judging {
    /// Who sorts replies: `rules`, `opener`, or a model: `BASE#MODEL` for an address that speaks
    /// OpenAI's chat completions (`OPENAI_API_KEY` is sent if set), `local:MODEL` for a checkpoint. May
    /// be repeated; the first one's word counts. `rules`, if not given; both built-in ones where judges
    /// are measured.
    #[arg(long = "judge", value_name = "WHO")]
    judges: Vec<String>,
    /// What a model is asked as a judge, with the marks `{request}` and `{reply}`.
    #[arg(long, value_name = "FILE")]
    judge_prompt: Option<PathBuf>,
    /// Seconds that an address has for an answer.
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    patience: u64,
}

/// Models beside the one that is measured: attackers, scorers and judges.
struct Cast {
    /// By their names after `local:`.
    loaded: Vec<(String, Loaded)>,
    patience: u64,
}

impl How {
    /// What decides the bits of an answer besides model and plan.
    fn arithmetic(&self) -> String {
        let precision = format!("{:?}", self.precision).to_lowercase();
        match self.kv_cache {
            CacheFormat::F32 => precision,
            cache => format!("{precision}, kv cache {cache:?}").to_lowercase(),
        }
    }
}

impl Cast {
    /// Loads the checkpoints among `who`.
    fn new<'a>(who: impl Iterator<Item = &'a String>, patience: u64) -> Result<Self> {
        let mut loaded: Vec<(String, Loaded)> = Vec::new();
        for name in who.filter_map(|w| w.strip_prefix("local:")) {
            if loaded.iter().all(|(known, _)| known != name) {
                loaded.push((name.to_owned(), Loaded::open(name, Precision::default())?));
            }
        }
        Ok(Self { loaded, patience })
    }

    /// The talker behind `who`; none if it names no model.
    fn talker(&self, who: &str, max_new_tokens: usize) -> Result<Option<Box<dyn Talker + '_>>> {
        if let Some(name) = who.strip_prefix("local:") {
            let found = self.loaded.iter().find(|(known, _)| known == name);
            let (_, loaded) = found.context("every checkpoint was loaded")?;
            return Ok(Some(Box::new(Local {
                name: who.to_owned(),
                model: &loaded.model,
                tokenizer: &loaded.tokenizer,
                chat: loaded.chat()?,
                max_new_tokens,
                turn: Mutex::new(()),
            })));
        }
        let address = who.starts_with("http://") || who.starts_with("https://");
        Ok(match who.rsplit_once('#') {
            Some((base, model)) if address => {
                let key = std::env::var("OPENAI_API_KEY").ok();
                let remote = Remote::new(base, model, key, max_new_tokens, self.patience);
                Some(Box::new(remote))
            }
            _ => None,
        })
    }

    /// As [`Self::talker`], for who must be a model.
    fn model(&self, who: &str, max_new_tokens: usize) -> Result<Box<dyn Talker + '_>> {
        self.talker(who, max_new_tokens)?.ok_or_else(|| {
            anyhow::anyhow!("'{who}' is no model: write BASE#MODEL, as http://127.0.0.1:8000/v1#llama, or local:MODEL")
                .context(Usage)
        })
    }

    /// The judges, tried on replies whose sort is known.
    fn judges(&self, names: &[String], how: &Judging) -> Result<Vec<Box<dyn Judge + '_>>> {
        let prompt = how.judge_prompt.as_deref().map(text_of).transpose()?;
        let mut all: Vec<Box<dyn Judge + '_>> = Vec::new();
        for name in names {
            let judge: Box<dyn Judge + '_> = match self.talker(name, VERDICT_TOKENS)? {
                Some(talker) => Box::new(Prompted::new(Arc::from(talker), prompt.clone())),
                None => judge::named(name).map_err(|e| anyhow::Error::new(e).context(Usage))?,
            };
            judge::check(judge.as_ref())?;
            all.push(judge);
        }
        Ok(all)
    }
}

/// Longest answers of models that judge, score and attack.
const VERDICT_TOKENS: usize = 64;
const SCORE_TOKENS: usize = 256;
const QUESTION_TOKENS: usize = 512;

fn text_of(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

fn parse_shard(text: &str) -> Result<(usize, usize), String> {
    let numbers = text
        .split_once('/')
        .and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    match numbers {
        Some((i, n)) if (1..=n).contains(&i) => Ok((i, n)),
        _ => Err("write I/N, for instance 1/4, with I from 1 to N".to_owned()),
    }
}

pub fn run(args: Args) -> Result<()> {
    match args.action {
        Some(Action::List { data }) => list(&data),
        Some(Action::Fetch(f)) => fetch::run(&f),
        Some(Action::Refusal(r)) => refusal(&r),
        Some(Action::Merge { folders, json }) => {
            let (results, answers) = folder::merge(&folders)?;
            let path = folders[0].join(RESULTS);
            write(&results, &answers, &folders[0])?;
            show(&results, &path, json)
        }
        Some(Action::Judges {
            labels,
            judging,
            show,
            json,
        }) => judges::run(&labels, &judging, show, json),
        None if args.suites.is_empty() => {
            bail!(anyhow::anyhow!("name a suite; `demur eval list` shows them").context(Usage))
        }
        None => {
            let how = &args.how;
            let wanted = Wanted::new(&args.suites, how.limit, how.pick(), &how.data)?;
            evaluate(how, wanted)
        }
    }
}

fn list(data: &[PathBuf]) -> Result<()> {
    for s in SUITES {
        let there = match s.absent(data) {
            None => String::new(),
            Some(names) => format!("  (no file {})", names.join(", ")),
        };
        say(format_args!("{:<20} {}{there}", s.name, s.title))?;
        say(format_args!("{:<20}   {}", "", s.metrics.join(", ")))?;
    }
    say("\nWrappers (--wrap)")?;
    for (name, what) in wrap::WRAPPERS {
        say(format_args!("{name:<20} {what}"))?;
    }
    say("\nJudges (--judge)")?;
    say(format_args!("{:<20} the first words of a reply", "opener"))?;
    say(format_args!(
        "{:<20} the whole reply, sentence by sentence",
        "rules"
    ))?;
    say(format_args!("{:<20} a model that is asked", "BASE#MODEL"))?;
    say(format_args!(
        "{:<20} a checkpoint that is asked",
        "local:MODEL"
    ))
}

fn refusal(r: &Refusal) -> Result<()> {
    let given = r.label.map(|l| match l {
        GivenLabel::Unsafe => Label::Unsafe,
        GivenLabel::Safe => Label::Safe,
    });
    let items = safety::prompts("refusal", &r.prompts, given)?;
    let name = r.prompts.file_name().unwrap_or_default().to_string_lossy();
    let mut wanted = Wanted::default();
    wanted.add(format!("refusal:{name}"), items, r.how.limit, r.how.pick());
    evaluate(&r.how, wanted)
}

fn evaluate(how: &How, mut wanted: Wanted) -> Result<()> {
    if wanted.items.is_empty() {
        bail!("there is no item to ask");
    }
    no_leak(how, &wanted.items)?;
    wanted.wrap(how.wrap.as_deref())?;
    let Wanted {
        suites,
        items,
        cut,
        skipped,
        ..
    } = wanted;
    let judges = if how.judging.judges.is_empty() {
        vec!["rules".to_owned()]
    } else {
        how.judging.judges.clone()
    };
    if how.dry_run {
        return dry_run(how, &suites, &items, &cut, &skipped);
    }
    exit::say_how_to_go_on();
    let who = judges.iter().chain(&how.attacker).chain(&how.scorer);
    let cast = Cast::new(who, how.judging.patience)?;
    let sorted_by = cast.judges(&judges, &how.judging)?;
    let crescendo = match (&how.attacker, &how.scorer) {
        (Some(attacker), Some(scorer)) => Some(Crescendo::new(
            cast.model(attacker, QUESTION_TOKENS)?,
            cast.model(scorer, SCORE_TOKENS)?,
            how.attacker_prompt.as_deref().map(text_of).transpose()?,
        )),
        _ => None,
    };
    let loaded = Loaded::open(&how.model, how.precision)?.keeping(how.kv_cache);
    let mut arms = vec![Arm {
        name: "base".to_owned(),
        hook: None,
    }];
    let mut hashes = vec![("base".to_owned(), None)];
    for file in &how.plans {
        let plan = plan::read(file)?;
        let name = plan.name.clone();
        if hashes.iter().any(|(known, _)| *known == name) {
            bail!("two arms are called '{name}'; a plan's name is its `name`");
        }
        let hook = steering(&loaded, Some(file), how.sae.as_deref())?;
        hashes.push((name.clone(), Some(plan.sha256())));
        arms.push(Arm {
            name,
            hook: hook.map(|h| h as Arc<dyn Intervention>),
        });
    }
    let settings = Settings {
        demur: env!("CARGO_PKG_VERSION").to_owned(),
        model: how.model.clone(),
        model_sha256: loaded.checkpoint.sha256(),
        precision: how.arithmetic(),
        suites,
        limit: how.limit,
        chat: how.chat,
        wrap: how.wrap.clone(),
        judges,
        max_new_tokens: how.max_new_tokens,
        seed: how.seed,
        arms: hashes,
        items: items.len(),
        items_sha256: hex(&Sha256::digest(format!("{items:?} {}", how.temperature))),
        cut,
        skipped,
    };
    let folder = match &how.out {
        Some(folder) => folder.clone(),
        None => {
            let hash = hex(&Sha256::digest(serde_json::to_vec(&settings)?));
            Path::new("runs/eval").join(&hash[..12])
        }
    };
    let mut told = Vec::new();
    for former in &how.reuse {
        told.extend(folder::former(former, &settings)?);
    }
    folder::settle(&folder, &settings)?;
    let range = match how.shard {
        None => 0..items.len(),
        Some((i, n)) => block(items.len(), i, n),
    };
    let asker = Asker {
        model: &loaded.model,
        tokenizer: &loaded.tokenizer,
        chat: loaded.chat.as_ref().ok(),
        as_chat: how.chat,
        config: EngineConfig {
            max_batch: how.batch,
            ..EngineConfig::default()
        },
        max_new_tokens: how.max_new_tokens,
        sampling: Sampling {
            temperature: how.temperature,
            seed: how.seed,
            ..Sampling::greedy()
        },
        judges: sorted_by,
        crescendo,
    };
    let bar = Progress::new("eval", "answers", (range.len() * arms.len()) as u64);
    let log = folder.join(folder::log_name(how.shard));
    if !told.is_empty() {
        take_over(&asker, &arms, &items, range.clone(), &log, told)?;
    }
    let (known, done) = (|n| bar.resume(n as u64), |_: &_| bar.advance(1));
    let answers = run_items(&asker, &arms, &items, range, &log, known, done)?;
    bar.finish();
    if let Some((i, n)) = how.shard {
        note(format_args!(
            "part {i} of {n} is done; when all are: demur eval merge {}",
            folder.display()
        ));
        return Ok(());
    }
    let results = Results::new(settings, &answers)?;
    write(&results, &answers, &folder)?;
    show(&results, &folder.join(RESULTS), how.json)
}

/// Says what would be asked.
fn dry_run(
    how: &How,
    suites: &[String],
    items: &[Item],
    cut: &[Cut],
    skipped: &[Skipped],
) -> Result<()> {
    for name in suites {
        let file_of_prompts = name.starts_with("refusal:");
        let mine = |i: &&Item| i.suite == *name || file_of_prompts;
        let n = items.iter().filter(mine).count();
        match cut.iter().find(|c| c.suite == *name) {
            Some(c) => say(c)?,
            None => say(format_args!("{name}: all {n} items"))?,
        }
    }
    for s in skipped {
        say(s)?;
    }
    let mut arms = vec!["base".to_owned()];
    for file in &how.plans {
        arms.push(plan::read(file)?.name);
    }
    say(format_args!("arms: {}", arms.join(", ")))
}

/// Writes the results, and beside them the page and what other programs read.
fn write(results: &Results, answers: &[Answer], folder: &Path) -> Result<()> {
    results.write(&folder.join(RESULTS))?;
    write_whole(&folder.join("results.csv"), export::csv(results).as_bytes())?;
    let page = evaluation::render(results, answers);
    write_whole(&folder.join("report.html"), page.as_bytes())?;
    for (at, (arm, _)) in results.settings.arms.iter().enumerate() {
        let bytes = serde_json::to_vec_pretty(&export::lm_eval(results, arm))?;
        write_whole(&folder.join(format!("lm_eval.{at}.json")), &bytes)?;
    }
    Ok(())
}

/// A plan's figures are void on prompts on which it was tuned: what demur ships for discovery and
/// validation, and what the user names.
fn no_leak(how: &How, items: &[Item]) -> Result<()> {
    if !how.plans.is_empty() {
        let mut shipped = prompts::shipped_pairs()?;
        shipped.extend(prompts::shipped_styled()?);
        shipped.extend(prompts::shipped_instructions()?);
        shipped.retain(|p| matches!(p.split, Some(Split::Discovery | Split::Validation)));
        not_leaked(items, "the shipped prompts", &shipped)?;
    }
    for file in &how.tuned_on {
        let tuned = prompts::read(file)?;
        not_leaked(items, &file.display().to_string(), &tuned)?;
    }
    Ok(())
}

fn show(results: &Results, path: &Path, as_json: bool) -> Result<()> {
    say(format_args!(
        "{:<16} {:<28} {:<22} {:>7}  {:<16} {:>6}",
        "arm", "suite", "metric", "value", "95 %", "n"
    ))?;
    for r in &results.rows {
        let e = r.estimate;
        say(format_args!(
            "{:<16} {:<28} {:<22} {:>7.3}  [{:.3}, {:.3}]   {:>6}",
            r.arm, r.suite, r.metric, e.value, e.lo, e.hi, e.n
        ))?;
    }
    for v in &results.versus_base {
        let e = v.estimate;
        let test = match v.p {
            _ if v.too_few => format!("too few: n = {}", e.n),
            Some(p) => format!("p = {p:.2e}"),
            None => String::new(),
        };
        say(format_args!(
            "{} - base, {} {}: {:+.3} [{:+.3}, {:+.3}]  {test}",
            v.arm, v.suite, v.metric, e.value, e.lo, e.hi
        ))?;
    }
    for l in &results.losses {
        say(format_args!(
            "{} lost {} of {}: {} refused, {} wrong; gained {}",
            l.arm, l.lost, l.suite, l.refused, l.wrong, l.gained
        ))?;
    }
    for a in &results.agreement {
        say(format_args!(
            "judges {} and {}: kappa {:.3} on {} replies",
            a.first, a.second, a.kappa, a.n
        ))?;
    }
    for c in &results.settings.cut {
        say(c)?;
    }
    for s in &results.settings.skipped {
        say(s)?;
    }
    note(format_args!("{:<12} {}", "results", path.display()));
    if as_json {
        say(json!({
            "model": results.settings.model,
            "results": path,
            "rows": results.rows,
            "versus_base": results.versus_base,
            "losses": results.losses,
            "agreement": results.agreement,
            "cut": results.settings.cut,
            "skipped": results.settings.skipped,
        }))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_written_as_fractions() {
        assert_eq!(parse_shard("2/3"), Ok((2, 3)));
        for wrong in ["", "3", "0/3", "4/3", "1/0", "a/b", "1/2/3"] {
            assert!(parse_shard(wrong).is_err(), "{wrong}");
        }
    }
}
