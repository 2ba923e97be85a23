//! Where a suite's files are: by the suite's own names for them, or as the Hub has them.

use std::path::{Path, PathBuf};

use super::{PRIMER, Suite, choices};
use crate::error::EvalError;
use crate::rows::{FORMATS, is_there};

/// Names as a message has them, with the formats behind those that may have any.
pub fn spelled(names: &[&str]) -> String {
    let (mut all, whole): (Vec<&str>, Vec<&str>) = names
        .iter()
        .copied()
        .partition(|n: &&str| !n.contains(['.', '/']));
    let formats = format!("({})", FORMATS.join(" "));
    let last = all.pop().map(|last| format!("{last} {formats}"));
    all.extend(last.as_deref());
    all.extend(whole);
    all.join(", ")
}

impl Suite {
    /// Where the file of a group may be in a folder: there, or in one named as the Hub's repository.
    fn places(&self, group: usize, folder: &Path) -> Vec<PathBuf> {
        let mut roots = vec![folder.to_owned()];
        let mut names: Vec<String> = Vec::new();
        for name in self.files[group] {
            match name.strip_suffix('/') {
                Some(folder) => names.push(folder.to_owned()),
                None if name.contains('.') => names.push((*name).to_owned()),
                None => {
                    names.extend(FORMATS.iter().map(|format| format!("{name}{format}")));
                    names.push((*name).to_owned());
                }
            }
        }
        if let Some(hub) = self.hub {
            names.extend(hub.files.get(group).map(|f| (*f).to_owned()));
            let short = hub.repo.rsplit('/').next().unwrap_or(hub.repo);
            roots.extend([hub.repo, short].map(|r| folder.join(r)));
        }
        let all = |root: &PathBuf| names.iter().map(|n| root.join(n)).collect::<Vec<_>>();
        roots.iter().flat_map(all).collect()
    }

    fn find(&self, group: usize, data: &[PathBuf]) -> Option<PathBuf> {
        let mut places = data.iter().flat_map(|folder| self.places(group, folder));
        places.find(|p| is_there(p))
    }

    /// Names of a file that it needs and that is in none of the folders `data`.
    pub fn absent(&self, data: &[PathBuf]) -> Option<&'static [&'static str]> {
        let group = (0..self.files.len()).find(|g| self.find(*g, data).is_none())?;
        Some(self.files[group])
    }

    /// Its files in the folders `data`, one of each group; the first folder that has it counts.
    ///
    /// # Errors
    /// [`EvalError::NoData`] naming what was looked for, [`EvalError::Primer`].
    pub fn paths(&self, data: &[PathBuf]) -> Result<Vec<PathBuf>, EvalError> {
        let folders = || {
            let all: Vec<String> = data.iter().map(|d| d.display().to_string()).collect();
            all.join(", ")
        };
        let none = |group: usize| match self.files[group] {
            [PRIMER] => EvalError::Primer {
                path: PRIMER.to_owned(),
                need: choices::PRIMED,
                reason: format!("is not in {}", folders()),
            },
            names => EvalError::NoData {
                suite: self.name.to_owned(),
                folder: folders(),
                names: spelled(names),
                hub: self.hub.filter(|h| h.files.len() > group).map(|h| h.repo),
            },
        };
        let one = |group| self.find(group, data).ok_or_else(|| none(group));
        (0..self.files.len()).map(one).collect()
    }
}
