//! GGUF v2 and v3: metadata and the table of tensors.
//!
//! The bytes are untrusted. Every length is checked against what is left of the file before
//! anything is allocated for it, counts have limits, names are unique, and tensors lie inside the
//! file without overlap.

use std::collections::BTreeMap;

use demur_kernels::quant::{GgmlType, type_name_of_id};

use crate::checkpoint::TensorInfo;
use crate::error::ModelError;

/// Most metadata keys and most tensors of a file.
const MAX_ENTRIES: u64 = 1 << 16;
/// Longest string, bytes.
const MAX_STRING: u64 = 1 << 24;
/// Most elements of a metadata array.
const MAX_ARRAY: u64 = 1 << 24;
/// Most dimensions of a tensor.
const MAX_DIMS: u32 = 4;

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    Int(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Ints(Vec<i64>),
    Floats(Vec<f64>),
    Bools(Vec<bool>),
    Strings(Vec<String>),
}

/// The metadata of a GGUF file: keys and typed values.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufMetadata(BTreeMap<String, Value>);

macro_rules! getter {
    ($(#[$doc:meta])* $name:ident -> $ty:ty, $what:literal, $pattern:pat => $value:expr) => {
        $(#[$doc])*
        ///
        /// # Errors
        /// [`ModelError::Metadata`] if the key has another type.
        pub fn $name(&self, key: &str) -> Result<Option<$ty>, ModelError> {
            match self.0.get(key) {
                None => Ok(None),
                Some($pattern) => Ok(Some($value)),
                Some(_) => Err(ModelError::Metadata {
                    key: key.to_owned(),
                    reason: concat!("is not ", $what).to_owned(),
                }),
            }
        }
    };
}

impl GgufMetadata {
    getter!(/// A string.
        str -> &str, "a string", Value::String(s) => s);
    getter!(/// An integer.
        int -> i64, "an integer", Value::Int(i) => *i);
    getter!(/// A truth value.
        bool -> bool, "a boolean", Value::Bool(b) => *b);
    getter!(/// Strings.
        strings -> &[String], "an array of strings", Value::Strings(v) => v);
    getter!(/// Integers.
        ints -> &[i64], "an array of integers", Value::Ints(v) => v);
    getter!(/// Numbers.
        floats -> &[f64], "an array of floats", Value::Floats(v) => v);
    getter!(/// Truth values.
        bools -> &[bool], "an array of booleans", Value::Bools(v) => v);

    /// A float; an integer will do.
    ///
    /// # Errors
    /// [`ModelError::Metadata`] if the key has another type.
    pub fn float(&self, key: &str) -> Result<Option<f64>, ModelError> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Float(f)) => Ok(Some(*f)),
            Some(Value::Int(i)) => Ok(Some(*i as f64)),
            Some(_) => Err(ModelError::Metadata {
                key: key.to_owned(),
                reason: "is not a number".to_owned(),
            }),
        }
    }

    /// A size: an integer that is not negative. A per-layer array with equal entries counts as one.
    ///
    /// # Errors
    /// [`ModelError::Metadata`] if it is negative or has another type.
    pub fn size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let value = match self.0.get(key) {
            Some(Value::Ints(v)) if !v.is_empty() && v.iter().all(|x| *x == v[0]) => Some(v[0]),
            _ => self.int(key)?,
        };
        value
            .map(|v| {
                usize::try_from(v).map_err(|_| ModelError::Metadata {
                    key: key.to_owned(),
                    reason: format!("{v} is negative"),
                })
            })
            .transpose()
    }

    /// All keys and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v))
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: u64, what: &str) -> Result<&'a [u8], String> {
        let left = (self.bytes.len() - self.at) as u64;
        if n > left {
            return Err(format!(
                "{what} at byte {} needs {n} bytes, {left} are left",
                self.at
            ));
        }
        let out = &self.bytes[self.at..self.at + n as usize];
        self.at += n as usize;
        Ok(out)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, what: &str) -> Result<String, String> {
        let n = self.u64(what)?;
        if n > MAX_STRING {
            return Err(format!("{what}: a string of {n} bytes is beyond the limit"));
        }
        let bytes = self.take(n, what)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| format!("{what}: a string is not UTF-8"))
    }

    fn scalar(&mut self, kind: u32, key: &str) -> Result<Value, String> {
        Ok(match kind {
            0 => Value::Int(i64::from(self.array::<1>(key)?[0])),
            1 => Value::Int(i64::from(i8::from_le_bytes(self.array(key)?))),
            2 => Value::Int(i64::from(u16::from_le_bytes(self.array(key)?))),
            3 => Value::Int(i64::from(i16::from_le_bytes(self.array(key)?))),
            4 => Value::Int(i64::from(self.u32(key)?)),
            5 => Value::Int(i64::from(i32::from_le_bytes(self.array(key)?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array(key)?))),
            7 => Value::Bool(self.array::<1>(key)?[0] != 0),
            8 => Value::String(self.string(key)?),
            10 => {
                let v = self.u64(key)?;
                Value::Int(i64::try_from(v).map_err(|_| format!("{key}: {v} is too large"))?)
            }
            11 => Value::Int(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            _ => return Err(format!("{key}: value type {kind} is unknown")),
        })
    }

    fn value(&mut self, key: &str) -> Result<Value, String> {
        let kind = self.u32(key)?;
        if kind != 9 {
            return self.scalar(kind, key);
        }
        let kind = self.u32(key)?;
        let n = self.u64(key)?;
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            _ => {
                return Err(format!(
                    "{key}: an array of value type {kind} is not supported"
                ));
            }
        };
        let left = (self.bytes.len() - self.at) as u64;
        if n > MAX_ARRAY || n * least > left {
            return Err(format!(
                "{key}: an array of {n} elements does not fit in the file"
            ));
        }
        let n = n as usize;
        macro_rules! collect {
            ($variant:ident, $pattern:pat => $value:expr) => {{
                let mut out = Vec::with_capacity(n);
                for _ in 0..n {
                    match self.scalar(kind, key)? {
                        $pattern => out.push($value),
                        _ => return Err(format!("{key}: mixed array")),
                    }
                }
                Value::$variant(out)
            }};
        }
        Ok(match kind {
            6 | 12 => collect!(Floats, Value::Float(v) => v),
            7 => collect!(Bools, Value::Bool(v) => v),
            8 => collect!(Strings, Value::String(v) => v),
            _ => collect!(Ints, Value::Int(v) => v),
        })
    }
}

/// Parses a file's metadata and tensor table.
///
/// # Errors
/// [`ModelError::Format`] naming the place, [`ModelError::TensorType`] naming the tensor.
pub fn parse(path: &str, bytes: &[u8]) -> Result<(GgufMetadata, Vec<TensorInfo>), ModelError> {
    let format = |reason| ModelError::Format {
        path: path.to_owned(),
        format: "GGUF",
        reason,
    };
    let mut r = Reader { bytes, at: 0 };
    if &r.array::<4>("magic").map_err(format)? != b"GGUF" {
        return Err(format("it does not begin with 'GGUF'".to_owned()));
    }
    let version = r.u32("version").map_err(format)?;
    if !(2..=3).contains(&version) {
        return Err(format(format!("version {version}; 2 and 3 are supported")));
    }
    let n_tensors = r.u64("tensor count").map_err(format)?;
    let n_keys = r.u64("metadata count").map_err(format)?;
    if n_tensors > MAX_ENTRIES || n_keys > MAX_ENTRIES {
        return Err(format(format!(
            "{n_tensors} tensors and {n_keys} keys are beyond the limit"
        )));
    }
    let mut metadata = BTreeMap::new();
    for _ in 0..n_keys {
        let key = r.string("metadata key").map_err(format)?;
        let value = r.value(&key).map_err(format)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format(format!("key '{key}' is there twice")));
        }
    }
    let metadata = GgufMetadata(metadata);
    let alignment = metadata.size("general.alignment")?.unwrap_or(32);
    if !alignment.is_power_of_two() || alignment > 1 << 16 {
        return Err(format(format!(
            "alignment {alignment} is not a sane power of two"
        )));
    }
    let mut tensors = Vec::new();
    for _ in 0..n_tensors {
        tensors.push(tensor(&mut r, path)?);
    }
    let data = r.at.next_multiple_of(alignment);
    for t in &mut tensors {
        let end = data
            .checked_add(t.offset)
            .and_then(|s| s.checked_add(t.bytes))
            .filter(|&end| end <= bytes.len() && t.offset % alignment == 0);
        if end.is_none() {
            return Err(format(format!(
                "tensor '{}' ({} bytes at {}) is outside the file or not aligned; the file may be cut short",
                t.name, t.bytes, t.offset
            )));
        }
        t.offset += data;
    }
    check_overlap(&tensors).map_err(format)?;
    Ok((metadata, tensors))
}

fn tensor(r: &mut Reader<'_>, path: &str) -> Result<TensorInfo, ModelError> {
    let format = |reason| ModelError::Format {
        path: path.to_owned(),
        format: "GGUF",
        reason,
    };
    let name = r.string("tensor name").map_err(format)?;
    let n_dims = r.u32(&name).map_err(format)?;
    if n_dims > MAX_DIMS {
        return Err(format(format!("tensor '{name}' has {n_dims} dimensions")));
    }
    let mut shape = Vec::new();
    for _ in 0..n_dims {
        let dim = r.u64(&name).map_err(format)?;
        shape.push(
            usize::try_from(dim)
                .ok()
                .filter(|d| *d > 0 && *d <= 1 << 40)
                .ok_or_else(|| format(format!("tensor '{name}' has a dimension of {dim}")))?,
        );
    }
    let id = r.u32(&name).map_err(format)?;
    let offset = r.u64(&name).map_err(format)?;
    let ty = GgmlType::from_id(id).ok_or_else(|| ModelError::TensorType {
        tensor: name.clone(),
        type_name: type_name_of_id(id).to_owned(),
        id,
    })?;
    let row = shape.first().copied().unwrap_or(1);
    let bytes = ty
        .row_bytes(row)
        .and_then(|b| shape.iter().skip(1).try_fold(b, |b, d| b.checked_mul(*d)))
        .ok_or_else(|| {
            format(format!(
                "tensor '{name}' of shape {shape:?} is not whole {} blocks",
                ty.name()
            ))
        })?;
    shape.reverse();
    let offset = usize::try_from(offset)
        .map_err(|_| format(format!("tensor '{name}' has offset {offset}")))?;
    Ok(TensorInfo {
        name,
        ty,
        shape,
        file: 0,
        offset,
        bytes,
    })
}

/// Names are unique and no two tensors share bytes.
pub(crate) fn check_overlap(tensors: &[TensorInfo]) -> Result<(), String> {
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(w) = order.windows(2).find(|w| w[0].name == w[1].name) {
        return Err(format!("tensor '{}' is there twice", w[0].name));
    }
    order.sort_by_key(|t| (t.file, t.offset));
    let overlap = order
        .windows(2)
        .find(|w| w[0].file == w[1].file && w[0].offset + w[0].bytes > w[1].offset);
    match overlap {
        Some(w) => Err(format!(
            "tensors '{}' and '{}' overlap",
            w[0].name, w[1].name
        )),
        None => Ok(()),
    }
}
