//! Which suites are asked, and which of their items.

use std::ops::Range;
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
    /// Which items are to be put under which wrapper: not before it is known that no plan was tuned on them.
    wraps: Vec<(Range<usize>, String)>,
}

impl Wanted {
    /// The suites called `names`, or those of files, from the folders `data`.
    pub fn new(names: &[String], limit: usize, pick: Pick, data: &[PathBuf]) -> Result<Self> {
        let mut wanted = Self::default();
        for chosen in chosen(names, limit)? {
            let Some(mut items) = wanted.load(&chosen, data)? else {
                continue;
            };
            let Chosen {
                mut name,
                wrap,
                limit,
                ..
            } = chosen;
            if let Some(wrapper) = &wrap {
                if !items.iter().any(|i| matches!(i.ask, Ask::Chat { .. })) {
                    let what = anyhow::anyhow!("{name}: no request to put under '{wrapper}'");
                    bail!(what.context(Usage));
                }
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
            let first = wanted.items.len();
            wanted.add(name, items, limit, pick);
            let last = wanted.items.len();
            wanted.wraps.extend(wrap.map(|w| (first..last, w)));
        }
        Ok(wanted)
    }

    /// A suite's items; none if it may be skipped and its file is not there.
    fn load(&mut self, chosen: &Chosen, data: &[PathBuf]) -> Result<Option<Vec<Item>>> {
        let name = &chosen.name;
        let absent = match &chosen.prompts {
            Some(_) if SUITES.iter().any(|s| s.name == name) => {
                bail!(
                    anyhow::anyhow!("'{name}', with prompts of its own, is the name of a suite")
                        .context(Usage)
                );
            }
            Some(file) if chosen.optional && !file.exists() => {
                let name = file.file_name().unwrap_or_default();
                name.to_string_lossy().into_owned()
            }
            Some(file) => return Ok(Some(safety::prompts(name, file, chosen.label)?)),
            None if chosen.label.is_some() => {
                bail!(
                    anyhow::anyhow!("{name}: a label is for prompts of one's own, by `prompts`")
                        .context(Usage)
                );
            }
            None => {
                let known = suite(name).map_err(|e| anyhow::Error::new(e).context(Usage))?;
                match known.absent(data) {
                    Some(names) if chosen.optional => spelled(names),
                    _ => return Ok(Some(known.load(data)?)),
                }
            }
        };
        // Where it was looked for differs from machine to machine, and shards must agree.
        let skipped = Skipped {
            suite: name.clone(),
            reason: format!("no file {absent}"),
        };
        note(&skipped);
        self.skipped.push(skipped);
        Ok(None)
    }

    /// Puts what is to be asked under a wrapper under it; `all`: every request, in place of the suites' own.
    pub fn wrap(&mut self, all: Option<&str>) -> Result<()> {
        if let Some(wrapper) = all {
            if let Some((_, own)) = self.wraps.first() {
                let what = anyhow::anyhow!("--wrap {wrapper}: a suite is under '{own}' already");
                bail!(what.context(Usage));
            }
            self.wraps.push((0..self.items.len(), wrapper.to_owned()));
        }
        for (items, wrapper) in self.wraps.drain(..) {
            for item in &mut self.items[items] {
                let Ask::Chat { turns, .. } = &mut item.ask else {
                    continue;
                };
                for turn in turns {
                    let wrapped = wrap::wrap(&wrapper, turn);
                    *turn = wrapped.map_err(|e| anyhow::Error::new(e).context(Usage))?;
                }
            }
        }
        Ok(())
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
