//! Checkpoints of a training run: whole, summed, and bit-exact on resume.
//!
//! A file is the sha256 of what follows, the lengths, then all numbers little-endian. It is written
//! beside its place, synced and renamed: a killed process leaves the last whole one.

use std::fs;
use std::io::Write;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::{Param, Params, Timing, TrainConfig, Trainer};
use crate::error::SaeError;

impl Trainer {
    /// Writes the state to `path`.
    ///
    /// # Errors
    /// [`SaeError::Io`]; what was there before stays.
    pub fn save(&self, path: &Path) -> Result<(), SaeError> {
        let io = |source| SaeError::Io {
            path: path.display().to_string(),
            source,
        };
        let mut body = serde_json::to_vec(&self.cfg).map_err(|e| SaeError::Format {
            path: path.display().to_string(),
            reason: e.to_string(),
        })?;
        let mut bytes = (body.len() as u64).to_le_bytes().to_vec();
        bytes.append(&mut body);
        bytes.extend((self.step as u64).to_le_bytes());
        bytes.extend(self.scale.to_le_bytes());
        bytes.extend(self.threshold.to_le_bytes());
        for p in self.params.all() {
            for v in [&p.w, &p.m, &p.v] {
                bytes.extend(v.iter().flat_map(|x| x.to_le_bytes()));
            }
        }
        bytes.extend(self.idle.iter().flat_map(|x| x.to_le_bytes()));
        let folder = path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(io)?;
        file.write_all(&Sha256::digest(&bytes)).map_err(io)?;
        file.write_all(&bytes).map_err(io)?;
        file.as_file().sync_all().map_err(io)?;
        file.persist(path).map_err(|e| io(e.error))?;
        Ok(())
    }

    /// Reads a state that was saved with the same config.
    ///
    /// # Errors
    /// [`SaeError::Io`]; [`SaeError::Checksum`] or [`SaeError::Format`] if it is broken or of
    /// another run.
    pub fn resume(path: &Path, cfg: &TrainConfig) -> Result<Self, SaeError> {
        let place = path.display().to_string();
        let format = |reason: &str| SaeError::Format {
            path: place.clone(),
            reason: reason.to_owned(),
        };
        let all = fs::read(path).map_err(|source| SaeError::Io {
            path: place.clone(),
            source,
        })?;
        let (sum, bytes) = all
            .split_at_checked(32)
            .ok_or_else(|| format("it is cut short"))?;
        if Sha256::digest(bytes)[..] != *sum {
            let hex = |b: &[u8]| b.iter().map(|b| format!("{b:02x}")).collect();
            return Err(SaeError::Checksum {
                path: place.clone(),
                found: hex(&Sha256::digest(bytes)),
                expected: hex(sum),
            });
        }
        let mut rest = bytes;
        let mut take = |n: usize| -> Result<&[u8], SaeError> {
            let (front, back) = rest
                .split_at_checked(n)
                .ok_or_else(|| format("it is cut short"))?;
            rest = back;
            Ok(front)
        };
        let u64_of = |b: &[u8]| u64::from_le_bytes(b.try_into().unwrap_or_default());
        let length = u64_of(take(8)?) as usize;
        let saved: TrainConfig =
            serde_json::from_slice(take(length)?).map_err(|e| format(&e.to_string()))?;
        if saved != *cfg {
            return Err(format("it is of a run with another config"));
        }
        let step = u64_of(take(8)?) as usize;
        let mut number =
            || Ok::<_, SaeError>(f32::from_le_bytes(take(4)?.try_into().unwrap_or_default()));
        let (scale, threshold) = (number()?, number()?);
        let (d, m) = (cfg.sae.d_model, cfg.sae.d_sae);
        let mut vector = |n: usize| -> Result<Vec<f32>, SaeError> {
            let (values, _) = take(n * 4)?.as_chunks::<4>();
            Ok(values.iter().map(|b| f32::from_le_bytes(*b)).collect())
        };
        let mut param = |n: usize| {
            Ok::<_, SaeError>(Param {
                w: vector(n)?,
                m: vector(n)?,
                v: vector(n)?,
            })
        };
        let (w_enc, w_dec, b_enc, b_dec) = (param(m * d)?, param(m * d)?, param(m)?, param(d)?);
        let extra = (0..cfg.architecture.n_extra())
            .map(|_| param(m))
            .collect::<Result<_, _>>()?;
        let (idle, _) = take(m * 8)?.as_chunks::<8>();
        let idle = idle.iter().map(|b| u64::from_le_bytes(*b)).collect();
        Ok(Self {
            cfg: saved,
            scale,
            step,
            params: Params {
                w_enc,
                w_dec,
                b_enc,
                b_dec,
                extra,
            },
            idle,
            threshold,
            engine: None,
            timing: Timing::default(),
        })
    }
}
