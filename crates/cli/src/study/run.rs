//! A run's folder: stages as files, content-hashed, written whole or not at all.
//!
//! Each stage leaves `runs/<study>/<stage>.json` with the hash of everything that it depends on:
//! the part of the config that it reads, the output of the stage before, and the stage's version.
//! A stage whose file has the right hash is not run again; change what it depends on, and it and
//! all after it are.
//!
//! One process works in a folder at a time (`.lock`). So what a killed one left behind under a
//! temporary name is nobody's, and is swept away when the folder is opened.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Instant, UNIX_EPOCH};

use anyhow::{Context, Result};
use demur_eval::files::write_whole;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::exit::Hinted;
use crate::fetch::hex;
use crate::progress::note;

/// The stages, in order.
pub const STAGES: [&str; 9] = [
    "pull",
    "harvest",
    "train",
    "discover",
    "tune",
    "gate",
    "calibrate",
    "evaluate",
    "report",
];

/// Raised when a stage's output changes for the same input within a version of demur.
const STAGE_VERSION: u32 = 5;

/// The file that a process locks while it works in the folder.
const LOCK: &str = ".lock";
/// The file in a folder that says for which inputs it was made.
const MARKER: &str = "inputs.sha256";
/// How files and folders are called until they are whole.
const UNFINISHED: [&str; 2] = [".tmp", ".sae-"];

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
    /// Hash of the inputs and outputs of the stages that the next one depends on.
    chain: String,
    /// Name, seconds and whether it was cached, for the record.
    pub stages: Vec<(&'static str, f64, bool)>,
    /// Held as long as the run.
    _lock: File,
}

impl Run {
    /// Opens `dir`, creating it; stages from index `from` on are run anew.
    ///
    /// Fails if another process works in it.
    pub fn open(dir: PathBuf, from: Option<usize>) -> Result<Self> {
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let lock = lock(&dir)?;
        sweep(&dir).with_context(|| format!("tidy {}", dir.display()))?;
        Ok(Self {
            dir,
            from,
            chain: String::new(),
            stages: Vec::new(),
            _lock: lock,
        })
    }

    /// What the next stage depends on.
    pub fn link(&self) -> String {
        self.chain.clone()
    }

    /// Makes the next stage depend on what `link` stood for, and on nothing since.
    pub fn go_on_from(&mut self, link: &str) {
        link.clone_into(&mut self.chain);
    }

    /// A folder that `stage` keeps beside its own, with all that is in it, while its inputs stay what they are
    /// and the stage is not to be run anew.
    pub fn folder(&self, name: &str, stage: &str, inputs: &impl Serialize) -> Result<PathBuf> {
        let inputs_sha256 = self.inputs(name, inputs)?;
        let folder = self.dir.join(name);
        let done = self.dir.join(format!("{stage}.json")).exists();
        if !is_of(&folder, &inputs_sha256) || (self.redo(stage) && done) {
            empty(&folder, &inputs_sha256)?;
        }
        Ok(folder)
    }

    /// Whether a stage is to be run anew, whatever is there.
    fn redo(&self, stage: &str) -> bool {
        let index = STAGES.iter().position(|s| *s == stage);
        self.from
            .is_some_and(|from| index.is_none_or(|i| i >= from))
    }

    /// Hash of what something depends on.
    fn inputs(&self, name: &str, inputs: &impl Serialize) -> Result<String> {
        let version = (env!("CARGO_PKG_VERSION"), STAGE_VERSION);
        hash(&(version, name, &self.chain, inputs))
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
        let inputs_sha256 = self.inputs(name, inputs)?;
        let file = self.dir.join(format!("{name}.json"));
        let scratch = self.dir.join(name);
        let same_scratch = is_of(&scratch, &inputs_sha256);
        let redo = self.redo(name);
        // What later stages need of this one may lie in its folder: without it, it is not done.
        if !redo
            && same_scratch
            && let Some(done) = read_stage::<T>(&file, &inputs_sha256)
        {
            note(format_args!("{name:<12} done before"));
            self.chain = hash(&(&inputs_sha256, &done.output))?;
            self.stages.push((name, done.wall_s, true));
            return Ok(done.output);
        }
        if !same_scratch || (redo && file.exists()) {
            // The file first: while it is there, the folder counts as whole.
            remove(&file, |f| fs::remove_file(f))?;
            empty(&scratch, &inputs_sha256)?;
        }
        let started = Instant::now();
        let output = work(&scratch).with_context(|| format!("stage '{name}'"))?;
        let stage = StageFile {
            inputs_sha256,
            wall_s: started.elapsed().as_secs_f64(),
            output,
        };
        let bytes = serde_json::to_vec_pretty(&stage)?;
        // From the bytes, so that a resumed run continues from the very same numbers.
        let stage: StageFile<T> = serde_json::from_slice(&bytes).with_context(|| {
            format!("stage '{name}' ended with a figure that is not a finite number")
        })?;
        write_atomic(&file, &bytes)?;
        self.chain = hash(&(&stage.inputs_sha256, &stage.output))?;
        self.stages.push((name, stage.wall_s, false));
        Ok(stage.output)
    }
}

/// Whether a folder is what was made for these inputs.
fn is_of(folder: &Path, inputs_sha256: &str) -> bool {
    fs::read_to_string(folder.join(MARKER)).is_ok_and(|s| s == inputs_sha256)
}

/// Makes an empty folder for these inputs.
fn empty(folder: &Path, inputs_sha256: &str) -> Result<()> {
    // While the marker is there, what else is in the folder counts as made for its inputs.
    let marker = folder.join(MARKER);
    remove(&marker, |f| fs::remove_file(f))?;
    remove(folder, |f| fs::remove_dir_all(f))?;
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    write_atomic(&marker, inputs_sha256.as_bytes())
}

/// Locks a run's folder for this process; the system lets go of it when the process ends, however
/// it ends.
fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK);
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Hinted::new(
            format!("another demur is at work in {}", dir.display()),
            "wait until it has ended, or give this run a folder of its own with --runs DIR",
        )
        .into()),
        // Some network file systems have no locks; a study is not refused for that.
        Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => Ok(file),
        Err(TryLockError::Error(e)) => Err(e).with_context(|| format!("lock {}", path.display())),
    }
}

/// Removes what a killed process left unfinished, in the run's folder and in those of its stages and SAEs.
fn sweep(dir: &Path) -> Result<()> {
    let stages = STAGES.iter().map(|s| dir.join(s));
    let saes = fs::read_dir(dir.join("train/saes")).into_iter().flatten();
    let saes = saes.flatten().map(|e| e.path());
    let within = stages.chain(saes).filter(|d| d.is_dir());
    for folder in std::iter::once(dir.to_owned()).chain(within) {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let name = entry.file_name();
            if !UNFINISHED
                .iter()
                .any(|u| name.to_string_lossy().starts_with(u))
            {
                continue;
            }
            if entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
    }
    Ok(())
}

/// Removes what may be absent.
fn remove(path: &Path, how: impl FnOnce(&Path) -> std::io::Result<()>) -> Result<()> {
    match how(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// What tells whether a file, or any file of a folder, has changed: names, sizes and times. Empty
/// for what is not there.
pub fn stamp(path: &Path) -> Vec<(String, u64, u128)> {
    let of = |path: &Path| {
        let meta = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
        let modified = meta.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        let name = path.file_name().unwrap_or_default();
        Some((
            name.to_string_lossy().into_owned(),
            meta.len(),
            modified.as_nanos(),
        ))
    };
    if path.is_dir() {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        let mut stamps: Vec<_> = entries.filter_map(|e| of(&e.path())).collect();
        stamps.sort();
        return stamps;
    }
    of(path).into_iter().collect()
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
    Ok(write_whole(path, bytes)?)
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
    fn a_folder_is_kept_until_its_inputs_change_or_its_stage_is_run_anew() {
        let dir = tempfile::tempdir().unwrap();
        let folder = |from, input: u32| {
            let run = Run::open(dir.path().to_owned(), from).unwrap();
            run.folder("read", "gate", &input).unwrap()
        };
        let kept = folder(None, 1).join("rows");
        fs::write(&kept, "x").unwrap();
        folder(None, 1);
        let gate = STAGES.iter().position(|s| *s == "gate");
        folder(gate, 1);
        assert!(
            kept.is_file(),
            "the stage has not been done: this is its killed run"
        );
        fs::write(dir.path().join("gate.json"), "{}").unwrap();
        folder(gate.map(|g| g + 1), 1);
        assert!(kept.is_file());
        folder(gate, 1);
        assert!(!kept.exists());
        fs::write(&kept, "x").unwrap();
        folder(None, 2);
        assert!(!kept.exists());
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
    fn one_process_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        let first = Run::open(dir.path().to_owned(), None).unwrap();
        let Err(e) = Run::open(dir.path().to_owned(), None) else {
            panic!("two at work in one folder");
        };
        assert!(e.to_string().contains(&*dir.path().to_string_lossy()));
        drop(first);
        assert!(Run::open(dir.path().to_owned(), None).is_ok());
    }

    #[test]
    fn what_was_left_unfinished_is_swept_and_the_rest_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut ran = Vec::new();
        run(dir.path(), None, 1, &mut ran);
        let train = dir.path().join("train");
        fs::create_dir_all(train.join(".sae-old-7")).unwrap();
        fs::create_dir_all(train.join("sae")).unwrap();
        fs::create_dir_all(train.join("saes/a/.sae-8")).unwrap();
        fs::write(train.join(".sae-old-7").join("cfg.json"), "{}").unwrap();
        fs::write(dir.path().join(".tmpAbC123"), "half").unwrap();
        fs::write(dir.path().join("notes.txt"), "mine").unwrap();
        run(dir.path(), None, 1, &mut ran);
        assert!(!train.join("saes/a/.sae-8").exists() && train.join("saes/a").is_dir());
        assert!(!train.join(".sae-old-7").exists() && !dir.path().join(".tmpAbC123").exists());
        assert!(train.join("sae").is_dir() && dir.path().join("notes.txt").is_file());
        assert_eq!(ran, ["pull", "harvest"]);
    }

    #[test]
    fn a_stage_without_its_folder_is_not_done() {
        let dir = tempfile::tempdir().unwrap();
        let mut ran = Vec::new();
        run(dir.path(), None, 1, &mut ran);
        fs::remove_dir_all(dir.path().join("pull")).unwrap();
        run(dir.path(), None, 1, &mut ran);
        assert_eq!(ran, ["pull", "harvest", "pull"]);
    }

    #[test]
    fn a_figure_that_is_no_number_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut run = Run::open(dir.path().to_owned(), None).unwrap();
        let e = run.stage("pull", &(), |_| Ok(f64::NAN)).unwrap_err();
        assert!(e.to_string().contains("'pull'"), "{e}");
        assert!(!dir.path().join("pull.json").exists());
    }

    #[test]
    fn a_stamp_changes_with_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("prompts.jsonl");
        assert_eq!(stamp(&file), []);
        fs::write(&file, "a").unwrap();
        let (one, folder) = (stamp(&file), stamp(dir.path()));
        assert_eq!(one, folder);
        fs::write(&file, "ab").unwrap();
        assert_ne!(stamp(&file), one);
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
