//! Which suites are asked, and which of their items.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use demur_eval::folder::{Cut, Skipped};
use demur_eval::prompts::Label;
use demur_eval::suites::{Ask, Item, Pick, SUITES, safety, spelled, suite};
use demur_eval::wrap;
use serde::Deserialize;

use crate::exit::Usage;
use crate::progress::note;

/// A file that names suites: what `demur eval FILE.toml` reads.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SuiteFile {
    suite: Vec<Chosen>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Chosen {
    name: String,
    /// A file of prompts beside this one, which `name` stands for.
    prompts: Option<PathBuf>,
    /// What its prompts are that have no label.
    label: Option<Label>,
    /// A jailbreak wrapper around each request; the suite is then called `NAME+WRAPPER`.
    wrap: Option<String>,
    /// At most this many items; 0 takes all.
    #[serde(default)]
    limit: usize,
    /// Whether the others are asked without it where its file is not there.
    #[serde(default)]
    optional: bool,
}

/// Suites and limits: those of a file, or the names with one limit.
fn chosen(names: &[String], limit: usize) -> Result<Vec<Chosen>> {
    let mut all = Vec::new();
    for name in names {
        if name.ends_with(".toml") {
            if limit != 0 {
                bail!(
                    anyhow::anyhow!(
                        "{name} has limits of its own: write them there, without --limit"
                    )
                    .context(Usage)
                );
            }
            let text = std::fs::read_to_string(name).with_context(|| format!("read {name}"))?;
            let file: SuiteFile = toml::from_str(&text).with_context(|| format!("read {name}"))?;
            let beside = Path::new(name).parent().unwrap_or(Path::new(""));
            all.extend(file.suite.into_iter().map(|chosen| Chosen {
                prompts: chosen.prompts.map(|p| beside.join(p)),
                ..chosen
            }));
        } else {
            all.push(Chosen {
                name: name.clone(),
                prompts: None,
                label: None,
                wrap: None,
                limit,
                optional: false,
            });
        }
    }
    Ok(all)
}

/// Puts the wrapper around every message of a user.
pub fn under(items: &mut [Item], wrapper: &str) -> Result<()> {
    for item in items {
        if let Ask::Chat { turns, .. } = &mut item.ask {
            for turn in turns {
                let wrapped = wrap::wrap(wrapper, turn);
                *turn = wrapped.map_err(|e| anyhow::Error::new(e).context(Usage))?;
            }
        }
    }
    Ok(())
}

/// What is asked.
#[derive(Debug, Default)]
pub struct Wanted {
    /// The suites.
    pub suites: Vec<String>,
    /// Their items.
    pub items: Vec<Item>,
    /// Suites of which a part is asked.
    pub cut: Vec<Cut>,
    /// Suites that are not asked.
    pub skipped: Vec<Skipped>,
}

impl Wanted {
    /// The suites called `names`, or those of files, from the folders `data`.
    pub fn new(names: &[String], limit: usize, pick: Pick, data: &[PathBuf]) -> Result<Self> {
        let mut wanted = Self::default();
        for chosen in chosen(names, limit)? {
            let Some(mut items) = wanted.load(&chosen, data)? else {
                continue;
            };
            let mut name = chosen.name;
            if let Some(wrapper) = &chosen.wrap {
                if !items.iter().any(|i| matches!(i.ask, Ask::Chat { .. })) {
                    bail!(
                        anyhow::anyhow!("{name}: no request to put under '{wrapper}'")
                            .context(Usage)
                    );
                }
                under(&mut items, wrapper)?;
                let wrapped = format!("{name}+{wrapper}");
                for item in &mut items {
                    item.suite.clone_from(&wrapped);
                    for part in &mut item.parts {
                        *part = part.replacen(&name, &wrapped, 1);
                    }
                }
                name = wrapped;
            }
            if wanted.suites.contains(&name) {
                bail!(anyhow::anyhow!("the suite '{name}' is named twice").context(Usage));
            }
            wanted.add(name, items, chosen.limit, pick);
        }
        Ok(wanted)
    }

    /// A suite's items; none if it may be skipped and its file is not there.
    fn load(&mut self, chosen: &Chosen, data: &[PathBuf]) -> Result<Option<Vec<Item>>> {
        let name = &chosen.name;
        if let Some(file) = &chosen.prompts {
            if SUITES.iter().any(|s| s.name == name) {
                bail!("{}: '{name}' is the name of a suite", file.display());
            }
            return Ok(Some(safety::prompts(name, file, chosen.label)?));
        }
        let known = suite(name).map_err(|e| anyhow::Error::new(e).context(Usage))?;
        match known.absent(data) {
            Some(names) if chosen.optional => {
                // Where it was looked for differs from machine to machine, and shards must agree.
                let skipped = Skipped {
                    suite: name.clone(),
                    reason: format!("no file {}", spelled(names)),
                };
                note(&skipped);
                self.skipped.push(skipped);
                Ok(None)
            }
            _ => Ok(Some(known.load(data)?)),
        }
    }

    /// At most `limit` of a suite's items.
    pub fn add(&mut self, suite: String, items: Vec<Item>, limit: usize, pick: Pick) {
        let of = items.len();
        let items = pick.take(items, limit);
        if items.len() < of {
            self.cut.push(Cut {
                suite: suite.clone(),
                items: items.len(),
                of,
                pick,
            });
        }
        self.items.extend(items);
        self.suites.push(suite);
    }
}
