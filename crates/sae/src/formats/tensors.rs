//! Named tensors of a file, as f32, taken out one by one: what is left over is refused by name.

use std::collections::BTreeMap;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors};

use crate::error::SaeError;

/// Largest number of latents or width that a reader takes.
pub(crate) const LIMIT: usize = 1 << 24;

/// Element types that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Element {
    F32,
    F64,
    F16,
    Bf16,
    I32,
    I64,
}

impl Element {
    pub(crate) fn size(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }

    /// All whole elements of `bytes`, little-endian.
    pub(crate) fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let two = || bytes.as_chunks::<2>().0.iter();
        let four = || bytes.as_chunks::<4>().0.iter();
        let eight = || bytes.as_chunks::<8>().0.iter();
        match self {
            Self::F32 => four().map(|b| f32::from_le_bytes(*b)).collect(),
            Self::F64 => eight().map(|b| f64::from_le_bytes(*b) as f32).collect(),
            Self::F16 => two().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            Self::Bf16 => two().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            Self::I32 => four().map(|b| i32::from_le_bytes(*b) as f32).collect(),
            Self::I64 => eight().map(|b| i64::from_le_bytes(*b) as f32).collect(),
        }
    }
}

/// A tensor in row-major order.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tensor {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

/// Tensors by name.
#[derive(Debug)]
pub(crate) struct Tensors {
    place: String,
    map: BTreeMap<String, Tensor>,
}

impl Tensors {
    pub(crate) fn new(place: &str, map: BTreeMap<String, Tensor>) -> Self {
        Self {
            place: place.to_owned(),
            map,
        }
    }

    /// Those of a safetensors file; `place` is for messages.
    pub(crate) fn safetensors(place: &str, bytes: &[u8]) -> Result<Self, SaeError> {
        let format = |reason: String| SaeError::Format {
            path: place.to_owned(),
            reason,
        };
        let file =
            SafeTensors::deserialize(bytes).map_err(|e| format(format!("not safetensors: {e}")))?;
        let mut map = BTreeMap::new();
        for (name, t) in file.tensors() {
            let element = match t.dtype() {
                Dtype::F32 => Element::F32,
                Dtype::F64 => Element::F64,
                Dtype::F16 => Element::F16,
                Dtype::BF16 => Element::Bf16,
                Dtype::I32 => Element::I32,
                Dtype::I64 => Element::I64,
                other => return Err(format(format!("tensor '{name}' has type {other:?}"))),
            };
            let tensor = Tensor {
                shape: t.shape().to_vec(),
                data: element.decode(t.data()),
            };
            map.insert(name, tensor);
        }
        Ok(Self::new(place, map))
    }

    pub(crate) fn error(&self, reason: impl Into<String>) -> SaeError {
        SaeError::Format {
            path: self.place.clone(),
            reason: reason.into(),
        }
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    pub(crate) fn is_vector(&self, name: &str, n: usize) -> bool {
        self.map.get(name).is_some_and(|t| t.shape == [n])
    }

    /// The two sizes of a matrix, each between 1 and [`LIMIT`].
    pub(crate) fn matrix(&self, name: &str) -> Result<(usize, usize), SaeError> {
        let missing = || self.error(format!("tensor '{name}' is missing"));
        let shape = &self.map.get(name).ok_or_else(missing)?.shape;
        match shape[..] {
            [a, b] if (1..=LIMIT).contains(&a) && (1..=LIMIT).contains(&b) => Ok((a, b)),
            _ => Err(self.error(format!(
                "tensor '{name}' has shape {shape:?}, which is not a matrix of sane size"
            ))),
        }
    }

    /// Takes a tensor out.
    pub(crate) fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, SaeError> {
        let Some(t) = self.map.remove(name) else {
            return Err(self.error(format!("tensor '{name}' is missing")));
        };
        if t.shape != shape {
            let reason = format!("tensor '{name}' has shape {:?}, not {shape:?}", t.shape);
            return Err(self.error(reason));
        }
        Ok(t.data)
    }

    /// Takes a `[rows, columns]` matrix out, transposed.
    pub(crate) fn take_transposed(
        &mut self,
        name: &str,
        rows: usize,
        columns: usize,
    ) -> Result<Vec<f32>, SaeError> {
        Ok(transpose(
            &self.take(name, &[rows, columns])?,
            rows,
            columns,
        ))
    }

    /// Takes a single number out, stored as `[]` or `[1]`.
    pub(crate) fn scalar(&mut self, name: &str) -> Result<f32, SaeError> {
        match self.map.remove(name) {
            Some(t) if t.data.len() == 1 => Ok(t.data[0]),
            Some(t) => Err(self.error(format!("'{name}' has shape {:?}, not one number", t.shape))),
            None => Err(self.error(format!("'{name}' is missing"))),
        }
    }

    /// Takes whole positive sizes out.
    pub(crate) fn sizes(&mut self, name: &str) -> Result<Vec<usize>, SaeError> {
        let Some(t) = self.map.remove(name) else {
            return Err(self.error(format!("'{name}' is missing")));
        };
        let sane = |v: &f32| v.fract() == 0.0 && *v >= 1.0 && *v <= LIMIT as f32;
        if t.data.is_empty() || !t.data.iter().all(sane) {
            return Err(self.error(format!("'{name}' is not made of sane sizes")));
        }
        Ok(t.data.iter().map(|v| *v as usize).collect())
    }

    /// Drops a tensor that inference does not need.
    pub(crate) fn ignore(&mut self, name: &str) {
        self.map.remove(name);
    }

    /// Refuses what was not taken.
    pub(crate) fn finish(self) -> Result<(), SaeError> {
        match self.map.keys().next() {
            None => Ok(()),
            Some(name) => Err(self.error(format!("tensor '{name}' is not known"))),
        }
    }
}

/// The transpose of a `[rows, columns]` matrix.
pub(crate) fn transpose(w: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; w.len()];
    for (r, row) in w.chunks_exact(columns.max(1)).enumerate() {
        for (c, v) in row.iter().enumerate() {
            out[c * rows + r] = *v;
        }
    }
    out
}
