//! A run's folder: stages as files, content-hashed, written whole or not at all.
//!
//! Each stage leaves `runs/<study>/<stage>.json` with the hash of everything that it depends on:
//! the part of the config that it reads, the output of the stage before, and the stage's version.
//! A stage whose file has the right hash is not run again; change what it depends on, and it and
//! all after it are.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::fetch::hex;
use crate::progress::note;

/// The stages, in order.
pub const STAGES: [&str; 7] = [
    "pull", "harvest", "train", "discover", "tune", "evaluate", "report",
];

/// Raised when a stage's output changes for the same input.
const STAGE_VERSION: u32 = 1;

/// What a stage's file holds.
#[derive(Debug, Serialize, Deserialize)]
struct StageFile<T> {
    inputs_sha256: String,
    wall_s: f64,
    output: T,
}

/// A run in its folder.
pub struct Run {
    /// `runs/<study>`.
    pub dir: PathBuf,
    /// Stages from this index on are run anew, whatever is there.
    from: Option<usize>,
    /// Hash of the last stage's inputs and output.
    chain: String,
    /// Name, seconds and whether it was cached, for the record.
    pub stages: Vec<(&'static str, f64, bool)>,
}

impl Run {
    /// Opens `dir`, creating it; stages from index `from` on are run anew.
    pub fn open(dir: PathBuf, from: Option<usize>) -> Result<Self> {
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(Self {
            dir,
            from,
            chain: String::new(),
            stages: Vec::new(),
        })
    }

    /// Runs `work`, unless the stage's file already has its output for the same inputs.
    ///
    /// `work` gets a scratch folder of the stage's own, kept until the inputs change: what it finds
    /// there is from a killed run with the same inputs.
    pub fn stage<T: Serialize + DeserializeOwned>(
        &mut self,
        name: &'static str,
        inputs: &impl Serialize,
        work: impl FnOnce(&Path) -> Result<T>,
    ) -> Result<T> {
        let index = STAGES
            .iter()
            .position(|s| *s == name)
            .unwrap_or(STAGES.len());
        let inputs_sha256 = hash(&(STAGE_VERSION, name, &self.chain, inputs))?;
        let file = self.dir.join(format!("{name}.json"));
        let scratch = self.dir.join(name);
        let marker = scratch.join("inputs.sha256");
        let same_scratch = fs::read_to_string(&marker).is_ok_and(|s| s == inputs_sha256);
        let redo = self.from.is_some_and(|from| index >= from);
        if !redo && let Some(done) = read_stage::<T>(&file, &inputs_sha256) {
            note(format_args!("{name:<12} done before"));
            self.chain = hash(&(&inputs_sha256, &done.output))?;
            self.stages.push((name, done.wall_s, true));
            return Ok(done.output);
        }
        if !same_scratch || (redo && file.exists()) {
            if scratch.exists() {
                fs::remove_dir_all(&scratch)
                    .with_context(|| format!("clear {}", scratch.display()))?;
            }
            let _ = fs::remove_file(&file);
            fs::create_dir_all(&scratch)
                .with_context(|| format!("create {}", scratch.display()))?;
            write_atomic(&marker, inputs_sha256.as_bytes())?;
        }
        let started = Instant::now();
        let output = work(&scratch).with_context(|| format!("stage '{name}'"))?;
        let wall_s = started.elapsed().as_secs_f64();
        let stage = StageFile {
            inputs_sha256,
            wall_s,
            output,
        };
        write_atomic(&file, &serde_json::to_vec_pretty(&stage)?)?;
        // From the file, so that a resumed run continues from the very same numbers.
        let stage: StageFile<T> = serde_json::from_slice(&fs::read(&file)?)?;
        self.chain = hash(&(&stage.inputs_sha256, &stage.output))?;
        self.stages.push((name, wall_s, false));
        Ok(stage.output)
    }
}

fn read_stage<T: DeserializeOwned>(file: &Path, inputs: &str) -> Option<StageFile<T>> {
    let stage: StageFile<T> = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    (stage.inputs_sha256 == inputs).then_some(stage)
}

fn hash(value: &impl Serialize) -> Result<String> {
    Ok(hex(&Sha256::digest(serde_json::to_vec(value)?)))
}

/// Writes to a temporary file in the same folder, syncs, renames: whole or not at all.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder)
        .with_context(|| format!("write into {}", folder.display()))?;
    file.write_all(bytes)
        .with_context(|| format!("write {}", path.display()))?;
    file.as_file().sync_all()?;
    file.persist(path)
        .with_context(|| format!("write {}", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(dir: &Path, from: Option<usize>, input: u32, ran: &mut Vec<&'static str>) -> (u32, u32) {
        let mut run = Run::open(dir.to_owned(), from).unwrap();
        let a = run
            .stage("pull", &input, |_| {
                ran.push("pull");
                Ok(input + 1)
            })
            .unwrap();
        let b = run
            .stage("harvest", &(), |_| {
                ran.push("harvest");
                Ok(a * 10)
            })
            .unwrap();
        (a, b)
    }

    #[test]
    fn stages_run_once_and_again_when_an_input_changes() {
        let dir = tempfile::tempdir().unwrap();
        let mut ran = Vec::new();
        assert_eq!(run(dir.path(), None, 1, &mut ran), (2, 20));
        assert_eq!(run(dir.path(), None, 1, &mut ran), (2, 20));
        assert_eq!(ran, ["pull", "harvest"]);
        assert_eq!(run(dir.path(), None, 2, &mut ran), (3, 30));
        assert_eq!(ran, ["pull", "harvest", "pull", "harvest"]);
    }

    #[test]
    fn from_runs_a_stage_anew_and_keeps_those_before() {
        let dir = tempfile::tempdir().unwrap();
        let mut ran = Vec::new();
        run(dir.path(), None, 1, &mut ran);
        run(dir.path(), Some(1), 1, &mut ran);
        assert_eq!(ran, ["pull", "harvest", "harvest"]);
    }

    #[test]
    fn a_broken_stage_file_is_not_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let mut ran = Vec::new();
        run(dir.path(), None, 1, &mut ran);
        let file = dir.path().join("harvest.json");
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, &text[..text.len() / 2]).unwrap();
        assert_eq!(run(dir.path(), None, 1, &mut ran), (2, 20));
        assert_eq!(ran, ["pull", "harvest", "harvest"]);
    }
}
