//! Thrift's compact protocol, as far as Parquet's metadata needs it: bytes become a tree, and fields
//! are asked for by number. Fields that nobody asks for are newer than this reader, or of no use to it.

use super::Fault;

/// Deepest nesting; Parquet's own is 8.
const MAX_DEPTH: usize = 32;

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub enum Item<'a> {
    /// A truth value or a whole number.
    Int(i64),
    /// A number that is not whole.
    Double,
    /// Text or bytes.
    Bytes(&'a [u8]),
    /// A list or set.
    List(Vec<Item<'a>>),
    /// Fields by their numbers.
    Struct(Vec<(i64, Item<'a>)>),
}

impl<'a> Item<'a> {
    /// A field of a struct.
    pub fn get(&self, field: i64) -> Option<&Self> {
        match self {
            Self::Struct(fields) => fields.iter().find(|f| f.0 == field).map(|f| &f.1),
            _ => None,
        }
    }

    /// A field that is a number.
    pub fn int(&self, field: i64) -> Option<i64> {
        match self.get(field) {
            Some(Self::Int(n)) => Some(*n),
            _ => None,
        }
    }

    /// A field that is a length, an offset or a count.
    pub fn size(&self, field: i64, name: &str) -> Result<usize, Fault> {
        let found = self.int(field).and_then(|n| usize::try_from(n).ok());
        found.ok_or_else(|| format!("{name} is missing or negative"))
    }

    /// A field that is text.
    pub fn text(&self, field: i64) -> Option<&'a str> {
        match self.get(field) {
            Some(Self::Bytes(bytes)) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// A field that is a list; nothing if it is not there.
    pub fn list(&self, field: i64) -> &[Self] {
        match self.get(field) {
            Some(Self::List(items)) => items,
            _ => &[],
        }
    }
}

/// The struct at the beginning of `bytes`, and how long it is.
pub fn read(bytes: &[u8]) -> Result<(Item<'_>, usize), Fault> {
    let mut reader = Reader { bytes, at: 0 };
    let item = reader.fields(0)?;
    Ok((item, reader.at))
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], Fault> {
        let rest = &self.bytes[self.at..];
        let taken = rest.get(..n).ok_or("the metadata is cut off")?;
        self.at += n;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, Fault> {
        Ok(self.take(1)?[0])
    }

    fn varint(&mut self) -> Result<u64, Fault> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("a number in the metadata has no end".to_owned())
    }

    fn int(&mut self) -> Result<i64, Fault> {
        let n = self.varint()?;
        Ok((n >> 1) as i64 ^ -((n & 1) as i64))
    }

    fn fields(&mut self, depth: usize) -> Result<Item<'a>, Fault> {
        let mut fields = Vec::new();
        let mut id = 0i64;
        loop {
            let head = self.byte()?;
            if head == 0 {
                return Ok(Item::Struct(fields));
            }
            id = match head >> 4 {
                0 => self.int()?,
                step => id.saturating_add(i64::from(step)),
            };
            // A truth value is in the head of its field.
            let item = match head & 0x0f {
                1 => Item::Int(1),
                2 => Item::Int(0),
                kind => self.item(kind, depth + 1)?,
            };
            fields.push((id, item));
        }
    }

    fn item(&mut self, kind: u8, depth: usize) -> Result<Item<'a>, Fault> {
        if depth > MAX_DEPTH {
            return Err("the metadata is nested too deeply".to_owned());
        }
        Ok(match kind {
            1..=3 => Item::Int(i64::from(self.byte()?)),
            4..=6 => Item::Int(self.int()?),
            7 => {
                self.take(8)?;
                Item::Double
            }
            8 => {
                let n = self.varint()?;
                Item::Bytes(self.take(usize::try_from(n).unwrap_or(usize::MAX))?)
            }
            9 | 10 => {
                let head = self.byte()?;
                let n = match head >> 4 {
                    15 => self.varint()?,
                    n => u64::from(n),
                };
                // Not reserved: each item takes a byte at least, and there may not be so many.
                let mut items = Vec::new();
                for _ in 0..n {
                    items.push(self.item(head & 0x0f, depth + 1)?);
                }
                Item::List(items)
            }
            12 => self.fields(depth)?,
            other => {
                return Err(format!(
                    "the metadata has a field of the unknown kind {other}"
                ));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_struct_by_hand() {
        // 1: i32 -3; 2: "ab"; 4: [i32 1, 2]; 5: true; 25 (by its number): { 1: byte 7 }
        let bytes = [
            0x15, 5, 0x18, 2, b'a', b'b', 0x29, 0x25, 2, 4, 0x11, 0x0c, 50, 0x13, 7, 0, 0, 99,
        ];
        let (found, n) = read(&bytes).unwrap();
        assert_eq!(n, 17);
        assert_eq!((found.int(1), found.text(2)), (Some(-3), Some("ab")));
        assert_eq!(found.list(4), [Item::Int(1), Item::Int(2)]);
        assert_eq!((found.int(5), found.int(3)), (Some(1), None));
        assert_eq!(found.get(25).unwrap().int(1), Some(7));
        assert!(
            found
                .size(1, "it")
                .unwrap_err()
                .contains("it is missing or negative")
        );
        for n in 0..17 {
            assert!(read(&bytes[..n]).is_err(), "{n}");
        }
    }

    #[test]
    fn no_end_no_bottom_and_no_such_kind() {
        assert!(read(&[0x1c; 1000]).unwrap_err().contains("deeply"));
        assert!(read(&[0x19; 1000]).unwrap_err().contains("deeply"));
        assert!(read(&[0x16; 12][..1]).is_err());
        let endless = [[0x16].as_slice(), &[0xff; 20]].concat();
        assert!(read(&endless).unwrap_err().contains("no end"));
        assert!(read(&[0x1e, 0]).unwrap_err().contains("kind 14"));
        // A list of 2^63 texts, and a text of 2^63 bytes, in a few bytes.
        let long = [&[0x19, 0xf8][..], &[0xff; 9], &[0x01]].concat();
        assert!(read(&long).unwrap_err().contains("cut off"));
        let long = [&[0x18][..], &[0xff; 9], &[0x01]].concat();
        assert!(read(&long).unwrap_err().contains("cut off"));
    }
}
