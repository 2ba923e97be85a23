//! A run's folder: its settings, the logs of its shards, and putting shards together.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::EvalError;
use crate::files::{entries, resume, write_whole};
use crate::results::Results;
use crate::run::Answer;
use crate::suites::Pick;

/// What a run was: equal for all of its shards.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Version of demur.
    pub demur: String,
    /// The model's name and the hash of its files.
    pub model: String,
    /// Its sha256.
    pub model_sha256: String,
    /// How products are computed.
    pub precision: String,
    /// The suites and, for files of prompts, the file.
    pub suites: Vec<String>,
    /// Items of each suite at most; 0: all. A file of suites has its own.
    pub limit: usize,
    /// Whether suites of capability went through the chat template.
    #[serde(default)]
    pub chat: bool,
    /// The jailbreak wrapper, if one was used.
    pub wrap: Option<String>,
    /// The judges, the one that counts first.
    pub judges: Vec<String>,
    /// Longest reply in a conversation.
    pub max_new_tokens: usize,
    /// Seed of the sampling.
    pub seed: u64,
    /// The arms with the hashes of their plans.
    pub arms: Vec<(String, Option<String>)>,
    /// Items in all.
    pub items: usize,
    /// Hash of all items.
    pub items_sha256: String,
    /// Suites of which a part was asked.
    #[serde(default)]
    pub cut: Vec<Cut>,
    /// Suites that were left out.
    #[serde(default)]
    pub skipped: Vec<Skipped>,
}

/// A suite of which a part was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    /// Its name.
    pub suite: String,
    /// Items that were asked.
    pub items: usize,
    /// Items that it has.
    pub of: usize,
    /// Which.
    pub pick: Pick,
}

/// A suite that was wanted and not asked: it has no figure, which is not a good one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Its name.
    pub suite: String,
    /// Why.
    pub reason: String,
}

impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            suite, items, of, ..
        } = self;
        match self.pick {
            Pick::First => write!(f, "{suite}: the first {items} of {of} items"),
            Pick::Spread { seed } => {
                write!(f, "{suite}: {items} of {of} items, spread by seed {seed}")
            }
        }
    }
}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: SKIPPED, not measured: {}", self.suite, self.reason)
    }
}

/// Names of a run's files in its folder.
pub const SETTINGS: &str = "settings.json";
/// The results.
pub const RESULTS: &str = "results.json";

/// The log of a shard: `answers.jsonl`, or `answers.I-of-N.jsonl`.
pub fn log_name(shard: Option<(usize, usize)>) -> String {
    match shard {
        None => "answers.jsonl".to_owned(),
        Some((i, n)) => format!("answers.{i}-of-{n}.jsonl"),
    }
}

/// Writes the settings of a run into its folder, or checks that those there are the same.
///
/// # Errors
/// [`EvalError::OtherRun`] naming what differs; [`EvalError::Io`].
pub fn settle(folder: &Path, settings: &Settings) -> Result<(), EvalError> {
    let path = folder.join(SETTINGS);
    if path.exists() {
        return same(&path, &read_settings(&path)?, settings);
    }
    std::fs::create_dir_all(folder).map_err(|source| EvalError::Io {
        path: folder.display().to_string(),
        source,
    })?;
    let bytes = serde_json::to_vec_pretty(settings).map_err(|e| EvalError::Record {
        path: path.display().to_string(),
        reason: e.to_string(),
    })?;
    write_whole(&path, &bytes)
}

fn read_settings(path: &Path) -> Result<Settings, EvalError> {
    let bytes = std::fs::read(path).map_err(|source| EvalError::Io {
        path: path.display().to_string(),
        source,
    })?;
    serde_json::from_slice(&bytes).map_err(|e| EvalError::Record {
        path: path.display().to_string(),
        reason: e.to_string(),
    })
}

fn same(path: &Path, there: &Settings, here: &Settings) -> Result<(), EvalError> {
    let value = |s: &Settings| serde_json::to_value(s).unwrap_or_default();
    let (a, b) = (value(there), value(here));
    for (key, old) in a.as_object().into_iter().flatten() {
        if *old != b[key] {
            return Err(EvalError::OtherRun {
                path: path.display().to_string(),
                key: key.clone(),
                there: old.to_string(),
                here: b[key].to_string(),
            });
        }
    }
    Ok(())
}

/// The answers of the former run in `folder` that hold for the run of `settings` too: those of arms
/// which are the same in both. Nothing in `folder` is touched; a torn last line of a log is passed over.
///
/// # Errors
/// [`EvalError::OtherRun`] if the model, how it computes, or demur's version differs; [`EvalError::Io`];
/// [`EvalError::Line`] for a log that is not ours.
pub fn former(folder: &Path, settings: &Settings) -> Result<Vec<Answer>, EvalError> {
    let path = folder.join(SETTINGS);
    let there = read_settings(&path)?;
    let computed = |s: &Settings| Settings {
        demur: s.demur.clone(),
        model_sha256: s.model_sha256.clone(),
        precision: s.precision.clone(),
        ..Settings::default()
    };
    same(&path, &computed(&there), &computed(settings))?;
    let mut answers = Vec::new();
    for log in logs(folder)? {
        for answer in entries::<Answer>(&log)? {
            let of_both = |(name, plan): &&(String, Option<String>)| {
                *name == answer.arm && there.arms.contains(&(name.clone(), plan.clone()))
            };
            if settings.arms.iter().any(|a| of_both(&a)) {
                answers.push(answer);
            }
        }
    }
    Ok(answers)
}

/// The logs in a folder.
fn logs(folder: &Path) -> Result<Vec<PathBuf>, EvalError> {
    let io = |source| EvalError::Io {
        path: folder.display().to_string(),
        source,
    };
    let entries = std::fs::read_dir(folder).map_err(io)?;
    let mut logs = entries
        .map(|e| e.map(|e| e.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(io)?;
    logs.retain(|p| {
        let name = p.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("answers.") && name.ends_with(".jsonl")
    });
    logs.sort();
    Ok(logs)
}

/// The results and answers of shards: of all logs in `folders`, which must be of one run.
///
/// # Errors
/// [`EvalError::OtherRun`]; [`EvalError::Unpaired`] if an answer is missing; as [`Results::new`].
pub fn merge(folders: &[impl AsRef<Path>]) -> Result<(Results, Vec<Answer>), EvalError> {
    let mut settings: Option<Settings> = None;
    let mut answers = Vec::new();
    for folder in folders {
        let folder = folder.as_ref();
        let path = folder.join(SETTINGS);
        let mine = read_settings(&path)?;
        if let Some(first) = &settings {
            same(&path, &mine, first)?;
        }
        settings.get_or_insert(mine);
        for log in logs(folder)? {
            answers.extend(resume::<Answer>(&log)?.1);
        }
    }
    let settings = settings.ok_or_else(|| EvalError::Record {
        path: SETTINGS.to_owned(),
        reason: "no folder was given".to_owned(),
    })?;
    answers.sort_by_key(|a| a.at);
    Ok((Results::new(settings, &answers)?, answers))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::{settings, two_arms};

    #[test]
    fn shards_merge_to_the_whole() {
        let folder = tempfile::tempdir().unwrap();
        let all = two_arms();
        let s = settings(&["base", "plan"], 40);
        settle(folder.path(), &s).unwrap();
        for i in 1..=3 {
            let range = crate::run::shard(40, i, 3);
            let mine = all.iter().rev().filter(|a| range.contains(&a.at));
            let lines: String = mine
                .map(|a| serde_json::to_string(a).unwrap() + "\n")
                .collect();
            std::fs::write(folder.path().join(log_name(Some((i, 3)))), lines).unwrap();
            // Until the last is there, it is not whole.
            assert_eq!(merge(&[folder.path()]).is_ok(), i == 3);
        }
        assert_eq!(
            merge(&[folder.path()]).unwrap().0,
            Results::new(s.clone(), &all).unwrap()
        );
        let other = Settings { seed: 7, ..s };
        let e = settle(folder.path(), &other).unwrap_err().to_string();
        assert!(e.contains("`seed`") && e.contains('7'), "{e}");
    }
}
