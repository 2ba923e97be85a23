//! The pages of a column: unpacked, levels and values decoded.

use std::borrow::Cow;
use std::io::Read;

use serde_json::Value;

use super::thrift::{self, Item};
use super::{Budget, Fault, Leaf};

/// What a decoded value takes beside its text.
const PER_VALUE: usize = 32;

/// A column's entries.
#[derive(Default)]
pub struct Column {
    /// Repetition and definition.
    pub levels: Vec<(u8, u8)>,
    /// Values of the entries that have one.
    pub values: Vec<Value>,
}

/// Encodings, by the format's numbers.
const PLAIN: i64 = 0;
const OLD_DICTIONARY: i64 = 2;
const RLE: i64 = 3;
const DICTIONARY: i64 = 8;

/// Physical types, by the format's numbers.
const BOOLEAN: i64 = 0;
const INT32: i64 = 1;
const INT64: i64 = 2;
const FLOAT: i64 = 4;
const DOUBLE: i64 = 5;
const BYTE_ARRAY: i64 = 6;

/// Decodes a chunk of `file`.
pub fn column(
    file: &[u8],
    chunk: &Item<'_>,
    leaf: &Leaf,
    budget: &mut Budget,
) -> Result<Column, Fault> {
    if chunk.get(1).is_some() {
        return Err("its data is in another file".to_owned());
    }
    let meta = chunk.get(3).ok_or("it has no metadata, or is encrypted")?;
    if meta.int(1) != Some(leaf.kind) {
        return Err("its type is not the schema's".to_owned());
    }
    let codec = meta.int(4).unwrap_or_default();
    let entries = meta.size(5, "num_values")?;
    let data = meta.size(9, "data_page_offset")?;
    let dictionary = meta.int(11).and_then(|n| usize::try_from(n).ok());
    let start = dictionary.filter(|n| *n > 0).map_or(data, |n| n.min(data));
    let end = start.checked_add(meta.size(7, "total_compressed_size")?);
    let mut bytes = end
        .and_then(|end| file.get(start..end))
        .ok_or("its pages are not in the file")?;
    let mut column = Column::default();
    let mut known: Vec<Value> = Vec::new();
    while column.levels.len() < entries {
        let (header, n) = thrift::read(bytes)?;
        let size = header.size(2, "uncompressed_page_size")?;
        let packed = header.size(3, "compressed_page_size")?;
        let rest = &bytes[n..];
        let body = rest.get(..packed).ok_or("a page is cut off")?;
        bytes = &rest[packed..];
        budget.spend(size)?;
        let part = |field| header.get(field).ok_or("a page's header is not whole");
        let left = entries - column.levels.len();
        match header.int(1) {
            Some(0) => {
                let body = unpack(codec, body, size)?;
                let page = Page::first(part(5)?, &body, leaf, left, budget)?;
                column.add(page, &known, leaf, budget)?;
            }
            Some(2) => {
                let body = unpack(codec, body, size)?;
                let n = part(7)?.size(1, "num_values")?;
                known = plain(&body, leaf, n, budget)?;
            }
            Some(3) => {
                let header = part(8)?;
                let packed = header.int(7) != Some(0);
                let (levels, body) = split_levels(header, body)?;
                let size = size.checked_sub(levels.len());
                let size = size.ok_or("a page is smaller than its levels")?;
                let codec = if packed { codec } else { 0 };
                let body = unpack(codec, body, size)?;
                let page = Page::second(header, levels, &body, leaf, left, budget)?;
                column.add(page, &known, leaf, budget)?;
            }
            // An index: nothing to decode.
            _ => {}
        }
    }
    Ok(column)
}

/// A page's levels, and its values, which are still encoded.
struct Page<'b> {
    levels: Vec<(u8, u8)>,
    encoding: Option<i64>,
    values: &'b [u8],
}

/// The levels of a page of the second version, which are not packed, and the rest of it.
fn split_levels<'b>(header: &Item<'_>, body: &'b [u8]) -> Result<(&'b [u8], &'b [u8]), Fault> {
    let rep = header.size(6, "repetition_levels_byte_length")?;
    let def = header.size(5, "definition_levels_byte_length")?;
    let both = rep.checked_add(def);
    let split = both.and_then(|n| body.split_at_checked(n));
    split.ok_or_else(|| "a page is smaller than its levels".to_owned())
}

impl<'b> Page<'b> {
    /// A page of the first version: levels, each after its length, then values.
    fn first(
        header: &Item<'_>,
        mut body: &'b [u8],
        leaf: &Leaf,
        left: usize,
        budget: &mut Budget,
    ) -> Result<Self, Fault> {
        let n = count(header, left)?;
        let mut streams = [&[][..]; 2];
        for (stream, (most, encoding)) in streams.iter_mut().zip([(leaf.rep, 4), (leaf.def, 3)]) {
            if most > 0 {
                if header.int(encoding) != Some(RLE) {
                    return Err("levels are encoded as old files have them".to_owned());
                }
                (*stream, body) = prefixed(body)?;
            }
        }
        Ok(Self {
            levels: levels(streams[0], streams[1], leaf, n, budget)?,
            encoding: header.int(2),
            values: body,
        })
    }

    /// A page of the second version; `both` are its levels.
    fn second(
        header: &Item<'_>,
        both: &[u8],
        body: &'b [u8],
        leaf: &Leaf,
        left: usize,
        budget: &mut Budget,
    ) -> Result<Self, Fault> {
        let n = count(header, left)?;
        let (rep, def) = both.split_at(header.size(6, "repetition_levels_byte_length")?);
        Ok(Self {
            levels: levels(rep, def, leaf, n, budget)?,
            encoding: header.int(4),
            values: body,
        })
    }
}

/// A page's number of entries.
fn count(header: &Item<'_>, left: usize) -> Result<usize, Fault> {
    let n = header.size(1, "num_values")?;
    if n > left {
        return Err("its pages have more values than it says".to_owned());
    }
    Ok(n)
}

fn levels(
    rep: &[u8],
    def: &[u8],
    leaf: &Leaf,
    n: usize,
    budget: &mut Budget,
) -> Result<Vec<(u8, u8)>, Fault> {
    let mut one = |stream, most: u8| -> Result<Vec<u8>, Fault> {
        if most == 0 {
            budget.spend(n)?;
            return Ok(vec![0; n]);
        }
        let width = (u8::BITS - most.leading_zeros()) as usize;
        let decoded = hybrid(stream, width, n, budget)?;
        let small = |l: u32| u8::try_from(l).ok().filter(|l| *l <= most);
        let all: Option<Vec<u8>> = decoded.into_iter().map(small).collect();
        all.ok_or_else(|| "a level is larger than the schema's".to_owned())
    };
    let (rep, def) = (one(rep, leaf.rep)?, one(def, leaf.def)?);
    Ok(rep.into_iter().zip(def).collect())
}

impl Column {
    /// Decodes a page's values.
    fn add(
        &mut self,
        page: Page<'_>,
        known: &[Value],
        leaf: &Leaf,
        budget: &mut Budget,
    ) -> Result<(), Fault> {
        let n = page.levels.iter().filter(|l| l.1 == leaf.def).count();
        match page.encoding {
            Some(PLAIN) => self.values.extend(plain(page.values, leaf, n, budget)?),
            Some(RLE) if leaf.kind == BOOLEAN => {
                let (stream, _) = prefixed(page.values)?;
                let bits = hybrid(stream, 1, n, budget)?;
                self.values
                    .extend(bits.into_iter().map(|b| Value::Bool(b == 1)));
            }
            // Without a value a page may have no byte, not even the width.
            Some(OLD_DICTIONARY | DICTIONARY) if n > 0 => {
                let (width, stream) = page.values.split_first().ok_or("a page is cut off")?;
                for at in hybrid(stream, usize::from(*width), n, budget)? {
                    let value = known.get(at as usize);
                    let value = value.ok_or("a value is not in the dictionary")?;
                    budget.spend(PER_VALUE + value.as_str().map_or(0, str::len))?;
                    self.values.push(value.clone());
                }
            }
            Some(OLD_DICTIONARY | DICTIONARY) => {}
            other => {
                let number = other.map_or_else(|| "none".to_owned(), |n| n.to_string());
                return Err(format!(
                    "its encoding, number {number} of the format, is not read; plain values and \
                     dictionaries are"
                ));
            }
        }
        self.levels.extend(page.levels);
        Ok(())
    }
}

/// Unpacks a page to `size` bytes.
fn unpack(codec: i64, bytes: &[u8], size: usize) -> Result<Cow<'_, [u8]>, Fault> {
    let broken = |e: &dyn std::fmt::Display| format!("a page can't be unpacked: {e}");
    let whole = |reader: &mut dyn Read| -> Result<Vec<u8>, Fault> {
        let mut out = Vec::new();
        let read = reader.take(size as u64 + 1).read_to_end(&mut out);
        read.map_err(|e| broken(&e))?;
        Ok(out)
    };
    let unpacked = match codec {
        _ if size == 0 => Cow::Borrowed(&[][..]),
        0 => Cow::Borrowed(bytes),
        1 => {
            // Checked first, as so much is reserved.
            let length = snap::raw::decompress_len(bytes).map_err(|e| broken(&e))?;
            if length != size {
                return Err("a page is not as long as it says".to_owned());
            }
            let out = snap::raw::Decoder::new().decompress_vec(bytes);
            Cow::Owned(out.map_err(|e| broken(&e))?)
        }
        2 => Cow::Owned(whole(&mut flate2::read::MultiGzDecoder::new(bytes))?),
        6 => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(bytes);
            Cow::Owned(whole(&mut decoder.map_err(|e| broken(&e))?)?)
        }
        other => {
            return Err(format!(
                "its compression, number {other} of the format, is not read; snappy, gzip, zstd and \
                 none are"
            ));
        }
    };
    if unpacked.len() != size {
        return Err("a page is not as long as it says".to_owned());
    }
    Ok(unpacked)
}

/// What stands behind its length in four bytes, and the rest.
fn prefixed(bytes: &[u8]) -> Result<(&[u8], &[u8]), Fault> {
    let both = bytes.split_first_chunk::<4>();
    let both = both.and_then(|(n, rest)| rest.split_at_checked(u32::from_le_bytes(*n) as usize));
    both.ok_or_else(|| "a page is cut off".to_owned())
}

/// `count` numbers of `width` bits: runs of one number, and runs of packed ones.
fn hybrid(
    mut bytes: &[u8],
    width: usize,
    count: usize,
    budget: &mut Budget,
) -> Result<Vec<u32>, Fault> {
    const CUT: &str = "a page is cut off";
    if width > 32 {
        return Err(format!("numbers of {width} bits"));
    }
    budget.spend(count.saturating_mul(4))?;
    let mut out = Vec::new();
    while out.len() < count {
        let left = count - out.len();
        let mut head = 0u64;
        let mut shift = 0;
        loop {
            let (byte, rest) = bytes.split_first().ok_or(CUT)?;
            bytes = rest;
            head |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if *byte < 0x80 {
                break;
            }
            if shift > 56 {
                return Err("a run's length has no end".to_owned());
            }
        }
        let n = usize::try_from(head >> 1).unwrap_or(usize::MAX);
        let size = match head & 1 {
            0 => width.div_ceil(8),
            _ => n.checked_mul(width).ok_or(CUT)?,
        };
        let (run, rest) = bytes.split_at_checked(size).ok_or(CUT)?;
        bytes = rest;
        if head & 1 == 0 {
            out.extend(std::iter::repeat_n(bits(run, 0, width), n.min(left)));
        } else {
            let n = n.saturating_mul(8).min(left);
            out.extend((0..n).map(|i| bits(run, i * width, width)));
        }
    }
    Ok(out)
}

/// The number of `width` bits, 32 at most, that begins at a bit; the lowest bit is first.
fn bits(bytes: &[u8], at: usize, width: usize) -> u32 {
    let bytes = bytes.iter().skip(at / 8).take(5).enumerate();
    let word = bytes.fold(0u64, |word, (i, b)| word | u64::from(*b) << (8 * i));
    ((word >> (at % 8)) & ((1 << width) - 1)) as u32
}

/// `count` values one after the other.
fn plain(
    bytes: &[u8],
    leaf: &Leaf,
    count: usize,
    budget: &mut Budget,
) -> Result<Vec<Value>, Fault> {
    budget.spend(count.saturating_mul(PER_VALUE))?;
    let all = match leaf.kind {
        BOOLEAN if bytes.len() >= count.div_ceil(8) => {
            let bit = |i| Value::Bool(bits(bytes, i, 1) == 1);
            Some((0..count).map(bit).collect())
        }
        INT32 => fixed(bytes, count, |b| match leaf.unsigned {
            true => u32::from_le_bytes(b).into(),
            false => i32::from_le_bytes(b).into(),
        }),
        INT64 => fixed(bytes, count, |b| match leaf.unsigned {
            true => u64::from_le_bytes(b).into(),
            false => i64::from_le_bytes(b).into(),
        }),
        FLOAT => fixed(bytes, count, |b| f32::from_le_bytes(b).into()),
        DOUBLE => fixed(bytes, count, |b| f64::from_le_bytes(b).into()),
        BYTE_ARRAY => return texts(bytes, count, budget),
        BOOLEAN => None,
        other => {
            return Err(format!(
                "its type, number {other} of the format, is not read; truth values, numbers and texts \
                 are"
            ));
        }
    };
    all.ok_or_else(|| "a page is cut off".to_owned())
}

fn fixed<const N: usize>(
    bytes: &[u8],
    count: usize,
    value: impl Fn([u8; N]) -> Value,
) -> Option<Vec<Value>> {
    let (chunks, _) = bytes.as_chunks::<N>();
    Some(chunks.get(..count)?.iter().map(|c| value(*c)).collect())
}

fn texts(mut bytes: &[u8], count: usize, budget: &mut Budget) -> Result<Vec<Value>, Fault> {
    let mut all = Vec::new();
    for _ in 0..count {
        let (text, rest) = prefixed(bytes)?;
        bytes = rest;
        budget.spend(text.len())?;
        let text = std::str::from_utf8(text).map_err(|_| "a value is not text in UTF-8")?;
        all.push(Value::String(text.to_owned()));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_by_hand() {
        let read = |bytes: &[u8], width, n| hybrid(bytes, width, n, &mut Budget(1000));
        // Three times 5, then eight numbers of 3 bits: 0 to 7, as the format's own example packs them.
        let bytes = [6, 5, 3, 0b1000_1000, 0b1100_0110, 0b1111_1010];
        let expected = [5, 5, 5, 0, 1, 2, 3, 4, 5, 6, 7];
        assert_eq!(read(&bytes, 3, 11).unwrap(), expected);
        assert_eq!(read(&bytes, 3, 4).unwrap(), expected[..4]);
        assert!(read(&bytes, 3, 12).unwrap_err().contains("cut off"));
        // A number of 20 bits takes three bytes.
        assert_eq!(read(&[4, 1, 2, 3], 20, 2).unwrap(), [0x3_0201; 2]);
        assert_eq!(read(&[8], 0, 4).unwrap(), [0; 4]);
        // Runs of nothing end with the bytes; what is large is not reserved.
        assert!(read(&[0; 50], 0, 1).is_err());
        assert!(read(&[4], 0, 1 << 40).unwrap_err().contains("limit"));
        assert!(read(&[0xff; 20], 1, 1).is_err());
        assert!(read(&[4, 0], 33, 1).unwrap_err().contains("33 bits"));
    }

    #[test]
    fn plain_values_of_each_kind() {
        let read = |kind, unsigned, bytes: &[u8], n| {
            let leaf = Leaf {
                path: "c".to_owned(),
                kind,
                unsigned,
                rep: 0,
                def: 0,
            };
            plain(bytes, &leaf, n, &mut Budget(1000)).map(Value::Array)
        };
        use serde_json::json;
        assert_eq!(
            read(BOOLEAN, false, &[0b101], 3).unwrap(),
            json!([true, false, true])
        );
        assert_eq!(read(INT32, false, &[0xff; 4], 1).unwrap(), json!([-1]));
        assert_eq!(
            read(INT32, true, &[0xff; 4], 1).unwrap(),
            json!([4_294_967_295u32])
        );
        assert_eq!(read(INT64, true, &[0xff; 8], 1).unwrap(), json!([u64::MAX]));
        assert_eq!(
            read(FLOAT, false, &1.5f32.to_le_bytes(), 1).unwrap(),
            json!([1.5])
        );
        assert_eq!(
            read(DOUBLE, false, &f64::NAN.to_le_bytes(), 1).unwrap(),
            json!([null])
        );
        assert_eq!(
            read(BYTE_ARRAY, false, &[1, 0, 0, 0, b'a'], 1).unwrap(),
            json!(["a"])
        );
        for (kind, bytes) in [
            (BOOLEAN, 0),
            (INT32, 3),
            (INT64, 7),
            (DOUBLE, 7),
            (BYTE_ARRAY, 3),
        ] {
            let e = read(kind, false, &vec![0; bytes], 1).unwrap_err();
            assert!(e.contains("cut off"), "{kind}: {e}");
        }
        assert!(
            read(BYTE_ARRAY, false, &[1, 0, 0, 0, 0xff], 1)
                .unwrap_err()
                .contains("UTF-8")
        );
        assert!(
            read(3, false, &[0; 12], 1)
                .unwrap_err()
                .contains("number 3")
        );
    }

    #[test]
    fn what_packs_is_named() {
        assert_eq!(unpack(0, b"ab", 2).unwrap(), &b"ab"[..]);
        assert!(unpack(0, b"ab", 3).unwrap_err().contains("not as long"));
        assert!(unpack(5, b"ab", 2).unwrap_err().contains("number 5"));
        for codec in [1, 2, 6] {
            assert!(unpack(codec, b"ab", 2).is_err(), "{codec}");
            assert!(unpack(codec, b"", 2).is_err(), "{codec}");
            assert!(unpack(codec, b"", 0).unwrap().is_empty());
        }
        // A bomb is not unpacked beyond what the page says.
        let bomb = snap::raw::Encoder::new()
            .compress_vec(&[0; 1 << 20])
            .unwrap();
        assert!(unpack(1, &bomb, 10).unwrap_err().contains("not as long"));
    }
}
