//! Rows of Parquet files, as objects of JSON.
//!
//! A file is its row groups and, at its end, their metadata. A row group has a chunk of pages for each
//! column, and a column is a leaf of the schema. A leaf's entries are a value or none and two levels
//! (Dremel, Melnik et al. 2010): the definition level says how many of the optional and repeated fields
//! on the way to the leaf are there, the repetition level which of the repeated ones begins anew. From
//! these, [`Node::read`] puts rows together again, as deeply nested as they were.
//!
//! What writers of data sets write is read: all nestings, plain values and dictionaries, pages of both
//! versions, snappy, gzip and zstd. Anything else is an error that names it, with its column.
//!
//! Every length, offset and level is checked, and what is unpacked is counted against a limit. That is why
//! the crate of this name is not used: damaged files make it panic.

mod pages;
mod thrift;

use serde_json::{Map, Value};
use thrift::Item;

/// What is wrong with a file, in words.
pub type Fault = String;

/// Begins and ends a file.
const MAGIC: &[u8] = b"PAR1";
/// Deepest nesting of columns.
const MAX_DEPTH: usize = 32;
/// Largest metadata, bytes.
const MAX_METADATA: usize = 16 << 20;

/// What may still be unpacked and decoded: a few bytes of a file can stand for very many.
pub struct Budget(pub u64);

impl Budget {
    fn spend(&mut self, bytes: usize) -> Result<(), Fault> {
        let left = self.0.checked_sub(bytes as u64);
        self.0 = left.ok_or("there is more in it than the limit, unpacked")?;
        Ok(())
    }
}

/// A column: a leaf of the schema.
#[derive(Debug)]
struct Leaf {
    /// Names from the root, with points between.
    path: String,
    /// The physical type, by the format's number.
    kind: i64,
    /// Whether a whole number has no sign.
    unsigned: bool,
    /// Largest repetition level.
    rep: u8,
    /// Largest definition level.
    def: u8,
}

/// A field of the schema.
#[derive(Debug)]
struct Node {
    name: String,
    optional: bool,
    repeated: bool,
    /// Levels of an entry in which this field is there.
    rep: u8,
    def: u8,
    /// Its columns, which are neighbours.
    leaves: std::ops::Range<usize>,
    /// Its fields; none, if it is a leaf.
    children: Vec<Node>,
    /// Its only field stands for it: lists are written as groups in groups.
    bare: bool,
}

/// A column's entries, and how far they are read.
struct Cursor {
    /// Repetition and definition.
    levels: std::vec::IntoIter<(u8, u8)>,
    values: std::vec::IntoIter<Value>,
}

impl Cursor {
    fn peek(&self) -> Option<(u8, u8)> {
        self.levels.as_slice().first().copied()
    }
}

/// All rows of a file.
pub fn rows(file: &[u8], mut budget: Budget) -> Result<Vec<Map<String, Value>>, Fault> {
    let metadata = metadata(file)?;
    let (meta, _) = thrift::read(metadata)?;
    let elements = meta.list(2);
    let mut leaves = Vec::new();
    let (root, used) = Node::new(elements, &mut leaves, None, 0)?;
    if used != elements.len() || root.children.is_empty() {
        return Err("the schema is no tree of columns".to_owned());
    }
    let mut all = Vec::new();
    for group in meta.list(4) {
        let chunks = group.list(1);
        if chunks.len() != leaves.len() {
            return Err(format!(
                "{} columns where the schema has {}",
                chunks.len(),
                leaves.len()
            ));
        }
        let mut cursors = Vec::with_capacity(leaves.len());
        for (chunk, leaf) in chunks.iter().zip(&leaves) {
            let column = pages::column(file, chunk, leaf, &mut budget);
            let column = column.map_err(|e| format!("column {}: {e}", leaf.path))?;
            cursors.push(Cursor {
                levels: column.levels.into_iter(),
                values: column.values.into_iter(),
            });
        }
        for _ in 0..group.size(3, "num_rows")? {
            let mut row = Map::new();
            for child in &root.children {
                row.insert(child.name.clone(), child.read(&mut cursors, 0, &leaves)?);
            }
            all.push(row);
        }
        for (cursor, leaf) in cursors.iter().zip(&leaves) {
            if cursor.peek().is_some() {
                return Err(format!(
                    "column {} has more rows than the others",
                    leaf.path
                ));
            }
        }
    }
    Ok(all)
}

/// The bytes of the metadata.
fn metadata(file: &[u8]) -> Result<&[u8], Fault> {
    let cut = || "it is cut off, or something else".to_owned();
    let body = file.strip_prefix(MAGIC).ok_or_else(cut)?;
    let body = body.strip_suffix(MAGIC).ok_or_else(cut)?;
    let (body, length) = body.split_last_chunk::<4>().ok_or_else(cut)?;
    let length = u32::from_le_bytes(*length) as usize;
    if length > MAX_METADATA {
        return Err(format!("its metadata is larger than {MAX_METADATA} bytes"));
    }
    let start = body.len().checked_sub(length).ok_or_else(cut)?;
    Ok(&body[start..])
}

impl Node {
    /// The field that `elements` begin with, inside of `parent`, and how many of them it takes.
    fn new(
        elements: &[Item<'_>],
        leaves: &mut Vec<Leaf>,
        parent: Option<(&Node, &str)>,
        depth: usize,
    ) -> Result<(Self, usize), Fault> {
        let element = elements.first().ok_or("the schema is cut off")?;
        if depth > MAX_DEPTH {
            return Err("the schema is nested too deeply".to_owned());
        }
        let name = element.text(4).ok_or("a column has no name")?;
        let (rep, def, path) = match parent {
            None => (0, 0, String::new()),
            Some((p, "")) => (p.rep, p.def, name.to_owned()),
            Some((p, path)) => (p.rep, p.def, format!("{path}.{name}")),
        };
        let repetition = if parent.is_some() {
            element.int(3)
        } else {
            Some(0)
        };
        let (optional, repeated) = match repetition {
            Some(0) => (false, false),
            Some(1) => (true, false),
            Some(2) => (false, true),
            other => return Err(format!("column {path} has the repetition {other:?}")),
        };
        let mut node = Self {
            name: name.to_owned(),
            optional,
            repeated,
            rep: rep + u8::from(repeated),
            def: def + u8::from(optional || repeated),
            leaves: leaves.len()..leaves.len(),
            children: Vec::new(),
            bare: false,
        };
        let converted = element.int(6);
        let mut used = 1;
        match element.int(5) {
            None | Some(0) => leaves.push(Leaf {
                kind: element
                    .int(1)
                    .ok_or_else(|| format!("column {path} has no type"))?,
                unsigned: converted.is_some_and(|c| (11..=14).contains(&c)),
                rep: node.rep,
                def: node.def,
                path,
            }),
            Some(n) => {
                for _ in 0..n {
                    let rest = elements.get(used..).unwrap_or_default();
                    let (child, more) = Self::new(rest, leaves, Some((&node, &path)), depth + 1)?;
                    if node.children.iter().any(|c| c.name == child.name) {
                        return Err(format!("{path} has two columns called {}", child.name));
                    }
                    node.children.push(child);
                    used += more;
                }
                // A map is a list of pairs; what is neither by its old mark may be by its new one.
                let new = element.get(10);
                let is_list = converted == Some(3) || new.is_some_and(|n| n.get(3).is_some());
                let is_map =
                    matches!(converted, Some(1 | 2)) || new.is_some_and(|n| n.get(2).is_some());
                node.as_list(is_list, is_map);
            }
        }
        node.leaves.end = leaves.len();
        Ok((node, used))
    }

    /// Takes the groups of a list's notation away, by the rules of the format for old writers.
    fn as_list(&mut self, is_list: bool, is_map: bool) {
        let tuple = format!("{}_tuple", self.name);
        if let [inner] = &mut self.children[..]
            && inner.repeated
            && (is_list || is_map)
        {
            self.bare = true;
            let is_element = inner.name == "array" || inner.name == tuple;
            inner.bare = is_list && inner.children.len() == 1 && !is_element;
        }
    }

    /// The field's value in the entries that come next, of which the first repeats at `rep`.
    fn read(&self, cursors: &mut [Cursor], rep: u8, leaves: &[Leaf]) -> Result<Value, Fault> {
        let first = self.leaves.start;
        let next = |cursors: &[Cursor]| cursors[first].peek();
        let (_, def) = next(cursors).ok_or_else(|| ends(&leaves[first]))?;
        if (self.optional || self.repeated) && def < self.def {
            for at in self.leaves.clone() {
                match cursors[at].levels.next() {
                    Some((r, d)) if r == rep && d < self.def => {}
                    _ => return Err(unfit(&leaves[at])),
                }
            }
            return Ok(match self.repeated {
                true => Value::Array(Vec::new()),
                false => Value::Null,
            });
        }
        if !self.repeated {
            return self.one(cursors, rep, leaves);
        }
        let mut items = vec![self.one(cursors, rep, leaves)?];
        while next(cursors).is_some_and(|(r, _)| r == self.rep) {
            items.push(self.one(cursors, self.rep, leaves)?);
        }
        Ok(Value::Array(items))
    }

    /// One value of the field, which is there.
    fn one(&self, cursors: &mut [Cursor], rep: u8, leaves: &[Leaf]) -> Result<Value, Fault> {
        if self.children.is_empty() {
            let at = self.leaves.start;
            if cursors[at].levels.next() != Some((rep, self.def)) {
                return Err(unfit(&leaves[at]));
            }
            return cursors[at].values.next().ok_or_else(|| ends(&leaves[at]));
        }
        if self.bare {
            return self.children[0].read(cursors, rep, leaves);
        }
        let mut object = Map::new();
        for child in &self.children {
            object.insert(child.name.clone(), child.read(cursors, rep, leaves)?);
        }
        Ok(Value::Object(object))
    }
}

fn ends(leaf: &Leaf) -> Fault {
    format!("column {} has fewer rows than the others", leaf.path)
}

fn unfit(leaf: &Leaf) -> Fault {
    format!(
        "column {}: its levels are not those of its neighbours",
        leaf.path
    )
}

#[cfg(test)]
mod tests;
