//! The part of ZIP that `torch.save` and `numpy.savez` write: a central directory, stored entries.
//!
//! Every offset and length is checked against the file. Compressed, encrypted and 64-bit entries are
//! refused by name.

use std::collections::BTreeMap;

/// Entries of an archive, by name.
pub(crate) fn entries(bytes: &[u8]) -> Result<BTreeMap<String, &[u8]>, String> {
    let u16_at = |at: usize| {
        let b = bytes.get(at..at.checked_add(2)?)?;
        Some(usize::from(u16::from_le_bytes([b[0], b[1]])))
    };
    let u32_at = |at: usize| {
        let b = bytes.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize)
    };
    let cut = || "not a ZIP archive, or cut short".to_owned();
    // The end record is the last thing in the file but for a comment of at most 64 KiB.
    let first = bytes.len().saturating_sub(22 + 0xffff);
    let end = (first..=bytes.len().saturating_sub(22))
        .rev()
        .find(|&at| bytes[at..].starts_with(b"PK\x05\x06"))
        .ok_or_else(cut)?;
    let count = u16_at(end + 10).ok_or_else(cut)?;
    let mut at = u32_at(end + 16).ok_or_else(cut)?;
    let mut out = BTreeMap::new();
    for _ in 0..count {
        let header = bytes.get(at..).ok_or_else(cut)?;
        if !header.starts_with(b"PK\x01\x02") {
            return Err(cut());
        }
        let field16 = |o: usize| u16_at(at + o).ok_or_else(cut);
        let field32 = |o: usize| u32_at(at + o).ok_or_else(cut);
        let (flags, method) = (field16(8)?, field16(10)?);
        let (packed, size, local) = (field32(20)?, field32(24)?, field32(42)?);
        let (name_len, extra, comment) = (field16(28)?, field16(30)?, field16(32)?);
        let name = header.get(46..46 + name_len).ok_or_else(cut)?;
        let name = String::from_utf8_lossy(name).into_owned();
        if method != 0 || flags & 1 != 0 || packed != size {
            return Err(format!(
                "entry '{name}' is compressed or encrypted; store it plainly"
            ));
        }
        if size == u32::MAX as usize || local == u32::MAX as usize {
            return Err(format!(
                "entry '{name}' is of the 64-bit kind, which is not read"
            ));
        }
        if !bytes
            .get(local..)
            .is_some_and(|b| b.starts_with(b"PK\x03\x04"))
        {
            return Err(format!("entry '{name}' has no data"));
        }
        let (n, e) = (
            u16_at(local + 26).ok_or_else(cut)?,
            u16_at(local + 28).ok_or_else(cut)?,
        );
        let start = local + 30 + n + e;
        let data = start
            .checked_add(size)
            .and_then(|stop| bytes.get(start..stop))
            .ok_or_else(|| format!("entry '{name}' is cut short"))?;
        out.insert(name, data);
        at += 46 + name_len + extra + comment;
    }
    Ok(out)
}
