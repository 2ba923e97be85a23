//! Checkpoints of a training run: the last few states in a folder, and bit-exact on resume.
//!
//! ```text
//! state-<steps>.bin = n u64, JSON [n], for each SAE: step u64, scale f32, threshold f32,
//!                     each parameter with its moments f32, idle u64 [d_sae],
//!                     and the sha256 of all that
//! ```
//!
//! Numbers are little-endian; the JSON is the settings of all SAEs of the run, `<steps>` the sum of
//! their steps. One file has them all, so that they never are of different moments.
//!
//! A file is written beside its place, synced and renamed, and only then are older ones removed: a
//! killed process or a full disk leaves the last whole one. What a disk damages after that, the sum
//! tells, and the state before is used. A state of other settings is an error: training anew in its
//! place would overwrite it.

use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{Param, Params, Timing, TrainConfig, Trainer};
use crate::error::SaeError;

/// Bytes of a sum.
const SUM: usize = 32;
/// How a state is called until it is whole.
const UNFINISHED: &str = ".tmp-state-";

/// The last states of a run.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
}

/// What [`Checkpoints::resume`] found.
#[derive(Debug)]
pub struct Resumed {
    /// The trainers, in the order of their settings; `None` if there is no whole state.
    pub trainers: Option<Vec<Trainer>>,
    /// Newer states that are damaged, a [`SaeError::Damaged`] each. They are removed.
    pub damaged: Vec<SaeError>,
}

impl Checkpoints {
    /// States in `folder`, which must be there; the last `keep`, at least one.
    pub fn new(folder: &Path, keep: usize) -> Self {
        Self {
            folder: folder.to_owned(),
            keep: keep.max(1),
        }
    }

    /// Writes the state of all SAEs of a run, and removes all but the last states.
    ///
    /// # Errors
    /// [`SaeError::Io`]; the states from before stay.
    pub fn save(&self, trainers: &[Trainer]) -> Result<(), SaeError> {
        let steps: usize = trainers.iter().map(Trainer::steps_done).sum();
        let path = self.folder.join(format!("state-{steps:09}.bin"));
        let io = |source| SaeError::Io {
            path: path.display().to_string(),
            source,
        };
        let mut file = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempfile_in(&self.folder)
            .map_err(io)?;
        write(file.as_file_mut(), trainers).map_err(io)?;
        file.as_file().sync_all().map_err(io)?;
        file.persist(&path).map_err(|e| io(e.error))?;
        // The name must outlive a power cut before older ones go; not every system syncs a folder.
        if let Ok(folder) = File::open(&self.folder) {
            let _ = folder.sync_all();
        }
        let all = self.list()?;
        all[..all.len().saturating_sub(self.keep)]
            .iter()
            .try_for_each(|(_, path)| remove(path))
    }

    /// Reads the newest whole state of a run with these settings, and removes what a killed process left
    /// half-written: only one process may train in a folder.
    ///
    /// # Errors
    /// [`SaeError::Io`]; [`SaeError::Format`] if the state is of a run with other settings.
    pub fn resume(&self, cfgs: &[TrainConfig]) -> Result<Resumed, SaeError> {
        self.named(|name| name.starts_with(UNFINISHED).then_some(()))?
            .iter()
            .try_for_each(|(_, path)| remove(path))?;
        let mut damaged = Vec::new();
        let mut trainers = None;
        for (_, path) in self.list()?.into_iter().rev() {
            match read(&path, cfgs) {
                Ok(whole) => {
                    trainers = Some(whole);
                    break;
                }
                Err(e @ SaeError::Damaged { .. }) => {
                    // While it is there it counts as one of the last.
                    remove(&path)?;
                    damaged.push(e);
                }
                Err(e) => return Err(e),
            }
        }
        Ok(Resumed { trainers, damaged })
    }

    /// Removes all states: the run has ended.
    ///
    /// # Errors
    /// [`SaeError::Io`].
    pub fn clear(&self) -> Result<(), SaeError> {
        self.list()?.iter().try_for_each(|(_, path)| remove(path))
    }

    /// The states that are there, oldest first, by their steps.
    fn list(&self) -> Result<Vec<(u64, PathBuf)>, SaeError> {
        let steps = |name: &str| {
            let steps = name.strip_prefix("state-")?.strip_suffix(".bin")?;
            steps.parse().ok()
        };
        let mut all = self.named(steps)?;
        all.sort();
        Ok(all)
    }

    /// The files of the folder with a name of which `known` says something.
    fn named<T>(&self, known: impl Fn(&str) -> Option<T>) -> Result<Vec<(T, PathBuf)>, SaeError> {
        let io = |source| SaeError::Io {
            path: self.folder.display().to_string(),
            source,
        };
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(io)? {
            let entry = entry.map_err(io)?;
            if let Some(said) = entry.file_name().to_str().and_then(&known) {
                all.push((said, entry.path()));
            }
        }
        Ok(all)
    }
}

/// Removes a file that may have gone.
fn remove(path: &Path) -> Result<(), SaeError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != ErrorKind::NotFound => Err(SaeError::Io {
            path: path.display().to_string(),
            source,
        }),
        _ => Ok(()),
    }
}

/// Sums what it passes on.
struct Summed<W> {
    to: W,
    sum: Sha256,
}

impl<W: Write> Write for Summed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.to.write(bytes)?;
        self.sum.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

fn write(to: &mut File, trainers: &[Trainer]) -> io::Result<()> {
    let mut to = Summed {
        to: BufWriter::with_capacity(1 << 20, to),
        sum: Sha256::new(),
    };
    let settings: Vec<&TrainConfig> = trainers.iter().map(|t| &t.cfg).collect();
    let settings = serde_json::to_vec(&settings)?;
    to.write_all(&(settings.len() as u64).to_le_bytes())?;
    to.write_all(&settings)?;
    let mut bytes = Vec::new();
    for t in trainers {
        to.write_all(&(t.step as u64).to_le_bytes())?;
        to.write_all(&t.scale.to_le_bytes())?;
        to.write_all(&t.threshold.to_le_bytes())?;
        for values in t.params.all().flat_map(|p| [&p.w, &p.m, &p.v]) {
            for some in values.chunks(1 << 16) {
                bytes.clear();
                bytes.extend(some.iter().flat_map(|x| x.to_le_bytes()));
                to.write_all(&bytes)?;
            }
        }
        for idle in &t.idle {
            to.write_all(&idle.to_le_bytes())?;
        }
    }
    let sum = to.sum.finalize();
    to.to.write_all(&sum)?;
    to.to.flush()
}

/// What is left to read of a state.
struct Reader<'a> {
    path: &'a Path,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn wrong(&self, reason: impl ToString) -> SaeError {
        SaeError::Format {
            path: self.path.display().to_string(),
            reason: reason.to_string(),
        }
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], SaeError> {
        let (front, back) = self
            .rest
            .split_at_checked(n)
            .ok_or_else(|| self.wrong("it holds less than its settings say"))?;
        self.rest = back;
        Ok(front)
    }

    fn u64(&mut self) -> Result<u64, SaeError> {
        Ok(u64::from_le_bytes(
            self.take(8)?.try_into().unwrap_or_default(),
        ))
    }

    fn f32s(&mut self, n: usize) -> Result<Vec<f32>, SaeError> {
        let (values, _) = self.take(n.saturating_mul(4))?.as_chunks::<4>();
        Ok(values.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    fn param(&mut self, n: usize) -> Result<Param, SaeError> {
        Ok(Param {
            w: self.f32s(n)?,
            m: self.f32s(n)?,
            v: self.f32s(n)?,
        })
    }

    fn trainer(&mut self, cfg: TrainConfig) -> Result<Trainer, SaeError> {
        let step = self.u64()? as usize;
        let numbers = self.f32s(2)?;
        let (d, m) = (cfg.sae.d_model, cfg.sae.d_sae);
        let params = Params {
            w_enc: self.param(m.saturating_mul(d))?,
            w_dec: self.param(m.saturating_mul(d))?,
            b_enc: self.param(m)?,
            b_dec: self.param(d)?,
            extra: (0..cfg.architecture.n_extra())
                .map(|_| self.param(m))
                .collect::<Result<_, _>>()?,
        };
        let (idle, _) = self.take(m.saturating_mul(8))?.as_chunks::<8>();
        Ok(Trainer {
            scale: numbers[0],
            step,
            params,
            idle: idle.iter().map(|b| u64::from_le_bytes(*b)).collect(),
            threshold: numbers[1],
            cfg,
            engine: None,
            timing: Timing::default(),
        })
    }
}

fn read(path: &Path, cfgs: &[TrainConfig]) -> Result<Vec<Trainer>, SaeError> {
    let damaged = |reason: String| SaeError::Damaged {
        path: path.display().to_string(),
        reason,
    };
    let all = fs::read(path).map_err(|source| SaeError::Io {
        path: path.display().to_string(),
        source,
    })?;
    let (bytes, sum) = all
        .len()
        .checked_sub(SUM)
        .map(|at| all.split_at(at))
        .ok_or_else(|| damaged(format!("it is cut short, to {} bytes", all.len())))?;
    let found = Sha256::digest(bytes);
    if found[..] != *sum {
        let hex = |b: &[u8]| b.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let (found, said) = (hex(&found), hex(sum));
        return Err(damaged(format!(
            "its sha256 is {found}, where it says {said}"
        )));
    }
    let mut from = Reader { path, rest: bytes };
    let length = from.u64()? as usize;
    let saved: Vec<TrainConfig> =
        serde_json::from_slice(from.take(length)?).map_err(|e| from.wrong(e))?;
    if saved != cfgs {
        return Err(from.wrong(
            "it is the state of a run with other settings; give those, or train in another folder",
        ));
    }
    let trainers: Vec<Trainer> = saved
        .into_iter()
        .map(|cfg| from.trainer(cfg))
        .collect::<Result<_, _>>()?;
    if !from.rest.is_empty() {
        return Err(from.wrong("it holds more than its settings say"));
    }
    Ok(trainers)
}
