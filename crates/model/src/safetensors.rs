//! Safetensors: one file, or shards named by an index.
//!
//! The header is parsed here rather than by a crate, because what is needed is small and the checks
//! are ours to state: header length, every offset, whole coverage of each tensor by its shape and
//! type, shards that stay in their folder.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use demur_kernels::quant::GgmlType;
use serde_json::Value;

use crate::checkpoint::{TensorInfo, read_json};
use crate::error::ModelError;

/// Longest header, bytes: as in the reference implementation.
const MAX_HEADER: u64 = 100 << 20;

/// The weight files of a folder: `model.safetensors`, or those that the index names.
pub(crate) fn shards(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let single = folder.join("model.safetensors");
    let index = folder.join("model.safetensors.index.json");
    if !index.is_file() {
        if single.is_file() {
            return Ok(vec![single]);
        }
        return Err(ModelError::NotACheckpoint {
            path: folder.display().to_string(),
        });
    }
    let format = |reason| ModelError::Format {
        path: index.display().to_string(),
        format: "safetensors index",
        reason,
    };
    let json = read_json(&index)?;
    let map = json
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| format("it has no 'weight_map'".to_owned()))?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        let file = file
            .as_str()
            .ok_or_else(|| format(format!("'{tensor}' names no file")))?;
        let mut parts = Path::new(file).components();
        let plain = matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(_)), None)
        );
        if !plain {
            return Err(format(format!("shard '{file}' is outside the folder")));
        }
        names.insert(file.to_owned());
    }
    if names.is_empty() {
        return Err(format("'weight_map' is empty".to_owned()));
    }
    Ok(names.into_iter().map(|n| folder.join(n)).collect())
}

/// Adds the tensors of one file to `tensors`.
///
/// # Errors
/// [`ModelError::Format`] naming the place, [`ModelError::TensorType`] naming the tensor.
pub(crate) fn parse(
    path: &str,
    bytes: &[u8],
    file: usize,
    tensors: &mut Vec<TensorInfo>,
) -> Result<(), ModelError> {
    let format = |reason: String| ModelError::Format {
        path: path.to_owned(),
        format: "safetensors",
        reason,
    };
    let length = bytes
        .first_chunk::<8>()
        .map(|b| u64::from_le_bytes(*b))
        .ok_or_else(|| format("it is shorter than 8 bytes".to_owned()))?;
    if length > MAX_HEADER || length > bytes.len() as u64 - 8 {
        return Err(format(format!(
            "a header of {length} bytes does not fit in the file"
        )));
    }
    let data = 8 + length as usize;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..data])
        .map_err(|e| format(format!("the header is not JSON: {e}")))?;
    for (name, entry) in &header {
        if name == "__metadata__" {
            continue;
        }
        let wrong = |what: &str| format(format!("tensor '{name}' has no proper '{what}'"));
        let dtype = entry
            .get("dtype")
            .and_then(Value::as_str)
            .ok_or_else(|| wrong("dtype"))?;
        let sizes = |key: &str| -> Option<Vec<usize>> {
            entry
                .get(key)?
                .as_array()?
                .iter()
                .map(|v| v.as_u64().and_then(|v| usize::try_from(v).ok()))
                .collect()
        };
        let shape = sizes("shape")
            .filter(|s| s.len() <= 8)
            .ok_or_else(|| wrong("shape"))?;
        let offsets = sizes("data_offsets").ok_or_else(|| wrong("data_offsets"))?;
        let &[start, end] = offsets.as_slice() else {
            return Err(wrong("data_offsets"));
        };
        let ty = match dtype {
            "F32" => GgmlType::F32,
            "F16" => GgmlType::F16,
            "BF16" => GgmlType::BF16,
            other => {
                // Integer buffers (position ids and the like) are of no use and may stay unread.
                if ["I64", "I32", "U8", "BOOL"].contains(&other) {
                    continue;
                }
                return Err(ModelError::TensorType {
                    tensor: name.clone(),
                    type_name: other.to_owned(),
                    id: 0,
                });
            }
        };
        let expected = shape
            .iter()
            .try_fold(ty.block_bytes(), |b, d| b.checked_mul(*d))
            .ok_or_else(|| wrong("shape"))?;
        let inside = end.checked_add(data).is_some_and(|e| e <= bytes.len());
        if start > end || !inside || end - start != expected {
            return Err(format(format!(
                "tensor '{name}' of {expected} bytes has offsets {start}..{end}; the file may be cut short"
            )));
        }
        tensors.push(TensorInfo {
            name: name.clone(),
            ty,
            shape,
            file,
            offset: data + start,
            bytes: expected,
        });
    }
    Ok(())
}
