//! `.npz`: a ZIP archive of `.npy` arrays.

use std::collections::BTreeMap;

use super::tensors::{Element, Tensor};
use super::zip;

/// The arrays of an archive.
pub(crate) fn arrays(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>, String> {
    let mut out = BTreeMap::new();
    for (name, data) in zip::entries(bytes)? {
        let Some(stem) = name.strip_suffix(".npy") else {
            return Err(format!("entry '{name}' is not an array"));
        };
        let array = array(data).map_err(|e| format!("array '{stem}': {e}"))?;
        out.insert(stem.to_owned(), array);
    }
    Ok(out)
}

/// `\x93NUMPY`, a version, the length of a header that is the text of a Python dictionary, the data.
fn array(bytes: &[u8]) -> Result<Tensor, String> {
    let rest = bytes
        .strip_prefix(b"\x93NUMPY")
        .ok_or("not a NumPy array")?;
    let cut = || "cut short".to_owned();
    let (version, rest) = rest.split_at_checked(2).ok_or_else(cut)?;
    let (length, rest) = match version[0] {
        1 => {
            let (n, rest) = rest.split_at_checked(2).ok_or_else(cut)?;
            (usize::from(u16::from_le_bytes([n[0], n[1]])), rest)
        }
        2 => {
            let (n, rest) = rest.split_at_checked(4).ok_or_else(cut)?;
            (u32::from_le_bytes([n[0], n[1], n[2], n[3]]) as usize, rest)
        }
        v => return Err(format!("version {v} is not known")),
    };
    let (header, data) = rest.split_at_checked(length).ok_or_else(cut)?;
    let header = std::str::from_utf8(header).map_err(|_| "its header is not text")?;
    let field = |key: &str| {
        let (_, after) = header.split_once(&format!("'{key}':"))?;
        Some(after.trim_start())
    };
    let descr = field("descr").and_then(|s| s.split('\'').nth(1));
    let element = match descr {
        Some("<f4") => Element::F32,
        Some("<f8") => Element::F64,
        Some("<f2") => Element::F16,
        Some("<i4") => Element::I32,
        Some("<i8") => Element::I64,
        other => return Err(format!("type {other:?} is not known")),
    };
    if !field("fortran_order").is_some_and(|s| s.starts_with("False")) {
        return Err("Fortran order is not read".to_owned());
    }
    let shape: Vec<usize> = field("shape")
        .and_then(|s| s.strip_prefix('('))
        .and_then(|s| s.split_once(')'))
        .map(|(s, _)| s.split(',').map(str::trim).filter(|s| !s.is_empty()))
        .and_then(|sizes| sizes.map(|s| s.parse().ok()).collect())
        .ok_or("its shape can't be read")?;
    let n = shape
        .iter()
        .try_fold(element.size(), |n, s| n.checked_mul(*s));
    if n != Some(data.len()) {
        return Err(format!(
            "shape {shape:?} and {} bytes don't fit",
            data.len()
        ));
    }
    Ok(Tensor {
        shape,
        data: element.decode(data),
    })
}
