//! Which suites are asked, and which of their items.

use std::path::PathBuf;

use anyhow::{Context, Result};
use demur_eval::folder::{Cut, Skipped};
use demur_eval::suites::{Item, Pick, spelled, suite};
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
            let text = std::fs::read_to_string(name).with_context(|| format!("read {name}"))?;
            let file: SuiteFile = toml::from_str(&text).with_context(|| format!("read {name}"))?;
            all.extend(file.suite);
        } else {
            all.push(Chosen {
                name: name.clone(),
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
}

impl Wanted {
    /// The suites called `names`, or those of files, from the folders `data`.
    pub fn new(names: &[String], limit: usize, pick: Pick, data: &[PathBuf]) -> Result<Self> {
        let mut wanted = Self::default();
        for Chosen {
            name,
            limit,
            optional,
        } in chosen(names, limit)?
        {
            let known = suite(&name).map_err(|e| anyhow::Error::new(e).context(Usage))?;
            match known.absent(data) {
                Some(names) if optional => {
                    // Where it was looked for differs from machine to machine, and shards must agree.
                    let skipped = Skipped {
                        suite: name,
                        reason: format!("no file {}", spelled(names)),
                    };
                    note(&skipped);
                    wanted.skipped.push(skipped);
                }
                _ => wanted.add(name, known.load(data)?, limit, pick),
            }
        }
        Ok(wanted)
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
