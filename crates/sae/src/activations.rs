//! Files of activations, as `demur harvest` writes them: a safetensors file with `activations`
//! `[n, d_model]` in f32, and a JSON beside it that says of which model and site.

use std::fs;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::error::SaeError;

/// Activations in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Activations {
    /// The rows, `[n, d_model]`.
    pub data: Vec<f32>,
    /// Width of a row.
    pub d_model: usize,
    /// The model, if a JSON beside the file says so.
    pub model: Option<String>,
    /// The site, in the same way.
    pub site: Option<String>,
}

/// Reads a file of activations.
///
/// # Errors
/// [`SaeError::Io`], or [`SaeError::Format`] if there is no f32 matrix `activations` or a number is not
/// finite.
pub fn load(path: &Path) -> Result<Activations, SaeError> {
    let place = path.display().to_string();
    let bytes = fs::read(path).map_err(|source| SaeError::Io {
        path: place.clone(),
        source,
    })?;
    let beside = fs::read(path.with_extension("json")).ok();
    parse(&place, &bytes, beside.as_deref())
}

/// As [`load`], from bytes; `place` is named in errors.
///
/// # Errors
/// [`SaeError::Format`].
pub fn parse(place: &str, bytes: &[u8], beside: Option<&[u8]>) -> Result<Activations, SaeError> {
    let format = |reason: String| SaeError::Format {
        path: place.to_owned(),
        reason,
    };
    let file = SafeTensors::deserialize(bytes).map_err(|e| format(e.to_string()))?;
    let tensor = file
        .tensor("activations")
        .map_err(|e| format(e.to_string()))?;
    let (&[n, d_model], Dtype::F32) = (tensor.shape(), tensor.dtype()) else {
        let (shape, dtype) = (tensor.shape(), tensor.dtype());
        let reason = format!("'activations' is {shape:?} of {dtype:?}, not a matrix of F32");
        return Err(format(reason));
    };
    let values = tensor.data().as_chunks::<4>().0.iter();
    let data: Vec<f32> = values.map(|b| f32::from_le_bytes(*b)).collect();
    if d_model == 0 || data.len() != n * d_model {
        return Err(format(format!(
            "'activations' has rows of {d_model} values"
        )));
    }
    if let Some(at) = data.iter().position(|v| !v.is_finite()) {
        return Err(format(format!(
            "row {} of 'activations' is not finite",
            at / d_model
        )));
    }
    let said: Value = match beside {
        Some(json) => {
            serde_json::from_slice(json).map_err(|e| format(format!("the JSON beside it: {e}")))?
        }
        None => Value::Null,
    };
    let word = |key: &str| said[key].as_str().map(str::to_owned);
    Ok(Activations {
        data,
        d_model,
        model: word("model"),
        site: word("site"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[f32]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data.iter().flat_map(|v| v.to_le_bytes()));
        bytes
    }

    #[test]
    fn what_is_written_is_read_and_the_rest_refused() {
        let header = r#"{"activations":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}"#;
        let data = [1.0, -2.0, 3.5, 0.0, 4.0, 5.0];
        let good = file(header, &data);
        let beside = br#"{"model": "m", "site": "blocks.1.hook_resid_post"}"#;
        let read = parse("a", &good, Some(beside)).unwrap();
        assert_eq!((&read.data[..], read.d_model), (&data[..], 3));
        assert_eq!(read.site.as_deref(), Some("blocks.1.hook_resid_post"));
        assert_eq!(parse("a", &good, None).unwrap().model, None);
        for end in 0..good.len() {
            assert!(parse("a", &good[..end], None).is_err(), "cut at {end}");
        }
        for (header, data) in [
            (header.replace("F32", "I32"), data),
            (header.replace("[2,3]", "[6]"), data),
            (header.replace("activations", "others"), data),
            (header.to_owned(), [1.0, f32::NAN, 0.0, 0.0, 0.0, 0.0]),
        ] {
            assert!(parse("a", &file(&header, &data), None).is_err(), "{header}");
        }
        assert!(parse("a", &good, Some(b"{")).is_err());
    }
}
