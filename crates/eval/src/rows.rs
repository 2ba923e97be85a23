//! Rows of other people's data files: Parquet, JSONL, a JSON array, or CSV, the last three plain or
//! gzipped; one file, a folder of them, or the parts of one.
//!
//! A row knows where it stands, so that whatever is wrong with it is told by file, line and field.
//! Data sets name the same thing differently; a field is asked for by all of its names.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::EvalError;
use crate::files::{Lines, open};
use crate::parquet;

/// Largest file, unpacked.
const MAX_BYTES: u64 = 1 << 30;

/// One row and its place.
#[derive(Debug, Clone)]
pub struct Row {
    path: Arc<str>,
    line: usize,
    fields: Map<String, Value>,
}

impl Row {
    /// What is wrong with `field` of this row.
    pub fn wrong(&self, field: &str, reason: impl ToString) -> EvalError {
        EvalError::Field {
            path: self.path.to_string(),
            line: self.line,
            field: field.to_owned(),
            reason: reason.to_string(),
        }
    }

    /// The first of `names` that is there and not null.
    pub fn find(&self, names: &[&str]) -> Option<&Value> {
        let mut found = names.iter().filter_map(|n| self.fields.get(*n));
        found.find(|v| !v.is_null())
    }

    /// Whether there is a field called `name`, if only with nothing in it.
    pub fn has(&self, name: &str) -> bool {
        self.fields.contains_key(name)
    }

    fn get(&self, names: &[&str]) -> Result<&Value, EvalError> {
        self.find(names).ok_or_else(|| {
            let have: Vec<&str> = self.fields.keys().map(String::as_str).take(12).collect();
            let reason = format!("is missing; the row has {}", have.join(", "));
            self.wrong(&names.join("` or `"), reason)
        })
    }

    /// A text.
    ///
    /// # Errors
    /// [`EvalError::Field`] if it is missing or of another kind.
    pub fn text(&self, names: &[&str]) -> Result<&str, EvalError> {
        let value = self.get(names)?;
        let wrong = || {
            self.wrong(
                &names.join("` or `"),
                format!("is no text but {}", kind(value)),
            )
        };
        value.as_str().ok_or_else(wrong)
    }

    /// A text or number as text, if it is there.
    pub fn label(&self, names: &[&str]) -> Option<String> {
        match self.find(names)? {
            Value::String(s) if s.is_empty() => None,
            Value::String(s) => Some(s.clone()),
            Value::Number(n) => Some(n.to_string()),
            Value::Bool(b) => Some(b.to_string()),
            _ => None,
        }
    }

    /// A list of texts.
    ///
    /// # Errors
    /// As [`Self::text`].
    pub fn texts(&self, names: &[&str]) -> Result<Vec<String>, EvalError> {
        let value = self.get(names)?;
        let wrong = || {
            let reason = format!("is no list of texts but {}", kind(value));
            self.wrong(&names.join("` or `"), reason)
        };
        let list = value.as_array().ok_or_else(wrong)?;
        let texts = list.iter().map(|v| v.as_str().map(str::to_owned));
        texts.collect::<Option<_>>().ok_or_else(wrong)
    }

    /// A whole number from 0 up; digits in a text count.
    ///
    /// # Errors
    /// As [`Self::text`].
    pub fn index(&self, names: &[&str]) -> Result<usize, EvalError> {
        let value = self.get(names)?;
        let number = match value {
            Value::String(s) => s.trim().parse().ok(),
            value => value.as_u64().and_then(|n| usize::try_from(n).ok()),
        };
        let wrong = || {
            self.wrong(
                &names.join("` or `"),
                format!("is no index but {}", kind(value)),
            )
        };
        number.ok_or_else(wrong)
    }

    /// An object, in its order.
    ///
    /// # Errors
    /// As [`Self::text`].
    pub fn object(&self, names: &[&str]) -> Result<&Map<String, Value>, EvalError> {
        let value = self.get(names)?;
        let wrong = || {
            self.wrong(
                &names.join("` or `"),
                format!("is no object but {}", kind(value)),
            )
        };
        value.as_object().ok_or_else(wrong)
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Ends of the names of files that are read.
pub const FORMATS: [&str; 7] = [
    ".jsonl",
    ".jsonl.gz",
    ".csv",
    ".csv.gz",
    ".json",
    ".json.gz",
    ".parquet",
];

/// Whether there is something at `path`, in whose name `*` stands for the number of a part.
pub fn is_there(path: &Path) -> bool {
    match parts(path) {
        Ok(files) => files.iter().all(|f| f.is_file()),
        // Some of it is; reading tells what is missing.
        Err(e) => matches!(e, EvalError::Parts { .. }),
    }
}

/// The files behind a path, in the order of their names: itself; those of a folder; those whose names
/// are that of the path, with something for its `*`.
fn parts(path: &Path) -> Result<Vec<PathBuf>, EvalError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let (folder, begin, end) = match name.split_once('*') {
        _ if path.is_dir() => (path, "", ""),
        Some((begin, end)) if !path.exists() => {
            (path.parent().unwrap_or(Path::new("")), begin, end)
        }
        _ => return Ok(vec![path.to_owned()]),
    };
    let io = |source| EvalError::Io {
        path: folder.display().to_string(),
        source,
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let fits = name.len() >= begin.len() + end.len()
            && name.starts_with(begin)
            && name.ends_with(end)
            && FORMATS.iter().any(|f| name.ends_with(f));
        if fits && entry.path().is_file() {
            found.push(entry.path());
        }
    }
    found.sort();
    let Some(first) = found.first() else {
        return Err(EvalError::NoFile {
            path: path.display().to_string(),
            formats: FORMATS.join(", "),
        });
    };
    // `test-00000-of-00003.parquet` tells how many there are.
    let stem = first.file_stem().unwrap_or_default().to_string_lossy();
    let need = stem.rsplit_once("-of-").and_then(|(_, n)| n.parse().ok());
    match need {
        Some(need) if need != found.len() => Err(EvalError::Parts {
            path: first.display().to_string(),
            have: found.len(),
            need,
        }),
        _ => Ok(found),
    }
}

/// Reads a file by its extension: `.parquet`, `.csv` with a line of names, `.json` with a list of
/// objects, else JSONL; `.gz` after any but the first. Of a folder, or of a name with `*`, all files.
///
/// # Errors
/// [`EvalError::Line`] naming the line, [`EvalError::Parquet`], [`EvalError::Parts`],
/// [`EvalError::NoFile`], [`EvalError::Io`], [`EvalError::TooLarge`].
pub fn read(path: &Path) -> Result<Vec<Row>, EvalError> {
    let mut rows = Vec::new();
    for part in parts(path)? {
        rows.extend(read_file(&part)?);
    }
    Ok(rows)
}

fn read_file(path: &Path) -> Result<Vec<Row>, EvalError> {
    let place = path.display().to_string();
    let name = place.strip_suffix(".gz").unwrap_or(&place);
    if name.ends_with(".parquet") {
        parquet(&place, open(path)?)
    } else if name.ends_with(".csv") {
        csv(&place, open(path)?, None)
    } else if name.ends_with(".json") {
        json(&place, open(path)?)
    } else {
        jsonl(&place, open(path)?)
    }
}

/// Reads a CSV file without a line of names.
///
/// # Errors
/// As [`read`].
pub fn read_csv(path: &Path, names: &[&str]) -> Result<Vec<Row>, EvalError> {
    csv(&path.display().to_string(), open(path)?, Some(names))
}

/// Rows of JSONL; `path` is for messages.
///
/// # Errors
/// As [`read`].
pub fn jsonl(path: &str, bytes: impl Read) -> Result<Vec<Row>, EvalError> {
    let place: Arc<str> = path.into();
    let mut lines = Lines::new(path, bytes, MAX_BYTES);
    let mut rows = Vec::new();
    while let Some((line, text)) = lines.next_line()? {
        let fields = serde_json::from_slice(&text).map_err(|e| lines.wrong(line, e))?;
        let path = Arc::clone(&place);
        rows.push(Row { path, line, fields });
    }
    Ok(rows)
}

fn whole(path: &str, bytes: impl Read) -> Result<Vec<u8>, EvalError> {
    let mut all = Vec::new();
    let read = bytes.take(MAX_BYTES + 1).read_to_end(&mut all);
    read.map_err(|source| EvalError::Io {
        path: path.to_owned(),
        source,
    })?;
    if all.len() as u64 > MAX_BYTES {
        return Err(EvalError::TooLarge {
            path: path.to_owned(),
            limit: MAX_BYTES,
        });
    }
    Ok(all)
}

fn whole_text(path: &str, bytes: impl Read) -> Result<String, EvalError> {
    let bytes = whole(path, bytes)?;
    String::from_utf8(bytes).map_err(|e| {
        let before = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        EvalError::Line {
            path: path.to_owned(),
            line: 1 + before.iter().filter(|b| **b == b'\n').count(),
            reason: "is not UTF-8".to_owned(),
        }
    })
}

/// Rows of Parquet; a row's line is its number, from 1.
///
/// # Errors
/// As [`read`].
pub fn parquet(path: &str, bytes: impl Read) -> Result<Vec<Row>, EvalError> {
    let place: Arc<str> = path.into();
    let file = whole(path, bytes)?;
    let budget = parquet::Budget(MAX_BYTES);
    let rows = parquet::rows(&file, budget).map_err(|reason| EvalError::Parquet {
        path: path.to_owned(),
        reason,
    })?;
    let row = |(i, fields)| Row {
        path: Arc::clone(&place),
        line: i + 1,
        fields,
    };
    Ok(rows.into_iter().enumerate().map(row).collect())
}

/// Rows of a JSON list of objects; a row's line is its number in the list, from 1.
fn json(path: &str, bytes: impl Read) -> Result<Vec<Row>, EvalError> {
    let place: Arc<str> = path.into();
    let text = whole_text(path, bytes)?;
    let list: Vec<Map<String, Value>> = serde_json::from_str(text.trim_start_matches('\u{feff}'))
        .map_err(|e| EvalError::Line {
        path: path.to_owned(),
        line: e.line(),
        reason: e.to_string(),
    })?;
    let row = |(i, fields)| Row {
        path: Arc::clone(&place),
        line: i + 1,
        fields,
    };
    Ok(list.into_iter().enumerate().map(row).collect())
}

/// Rows of CSV (RFC 4180): fields may be quoted, quotes are doubled, line ends in quotes are text.
/// Names come from the first record if not given.
///
/// # Errors
/// As [`read`].
pub fn csv(path: &str, bytes: impl Read, names: Option<&[&str]>) -> Result<Vec<Row>, EvalError> {
    let place: Arc<str> = path.into();
    let text = whole_text(path, bytes)?;
    let wrong = |line, reason: String| EvalError::Line {
        path: path.to_owned(),
        line,
        reason,
    };
    let mut names: Option<Vec<String>> = names.map(|n| n.iter().map(|s| (*s).to_owned()).collect());
    let mut rows = Vec::new();
    let mut chars = text.trim_start_matches('\u{feff}').chars().peekable();
    let mut line = 1;
    while chars.peek().is_some() {
        let started = line;
        let mut record = vec![String::new()];
        let mut quoted = false;
        while let Some(c) = chars.next() {
            line += usize::from(c == '\n');
            let field = record.last_mut().map_or(0, |f| f.len());
            match c {
                '"' if quoted && chars.peek() == Some(&'"') => {
                    chars.next();
                    push(&mut record, '"');
                }
                '"' if quoted => quoted = false,
                '"' if field == 0 => quoted = true,
                ',' if !quoted => record.push(String::new()),
                '\r' if !quoted && chars.peek() == Some(&'\n') => {}
                '\n' if !quoted => break,
                c => push(&mut record, c),
            }
        }
        if quoted {
            return Err(wrong(started, "a quote is not closed".to_owned()));
        }
        if record.len() == 1 && record[0].trim().is_empty() {
            continue;
        }
        let Some(names) = &names else {
            names = Some(record);
            continue;
        };
        if record.len() != names.len() {
            let reason = format!("{} fields where {} were named", record.len(), names.len());
            return Err(wrong(started, reason));
        }
        let values = record.into_iter().map(Value::String);
        rows.push(Row {
            path: Arc::clone(&place),
            line: started,
            fields: names.iter().cloned().zip(values).collect(),
        });
    }
    Ok(rows)
}

fn push(record: &mut [String], c: char) {
    if let Some(field) = record.last_mut() {
        field.push(c);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn csv_as_spreadsheets_write_it() {
        let text =
            "\u{feff}id,prompt\r\n1,\"Say \"\"hi\"\",\nthen go\"\r\n\r\n2,plain \"text\"\n3,";
        let rows = csv("f.csv", text.as_bytes(), None).unwrap();
        let found: Vec<(usize, &str)> = rows
            .iter()
            .map(|r| (r.line, r.text(&["prompt"]).unwrap()))
            .collect();
        let expected = [(2, "Say \"hi\",\nthen go"), (5, "plain \"text\""), (6, "")];
        assert_eq!(found, expected);
        let plain = csv("f", "a,0\n".as_bytes(), Some(&["q", "n"])).unwrap();
        assert_eq!(plain[0].index(&["n"]).unwrap(), 0);
    }

    #[track_caller]
    fn refused(e: EvalError, words: &[&str]) {
        let e = e.to_string();
        assert!(words.iter().all(|w| e.contains(w)), "{e}");
    }

    #[test]
    fn what_is_wrong_is_named_by_file_line_and_field() {
        let csv = |text: &str| csv("f.csv", text.as_bytes(), None).unwrap_err();
        refused(csv("a,b\n1,2\n1\n"), &["f.csv:3", "1 fields where 2"]);
        refused(csv("a,b\n\"1,2\n1\n"), &["f.csv:2", "quote"]);
        let rows = jsonl(
            "f.jsonl",
            "\n{\"q\": 7, \"c\": [\"x\", 1], \"n\": -1}\n".as_bytes(),
        )
        .unwrap();
        let row = &rows[0];
        refused(
            row.text(&["q"]).unwrap_err(),
            &["f.jsonl:2", "`q`", "a number"],
        );
        refused(
            row.text(&["p", "prompt"]).unwrap_err(),
            &["`p` or `prompt`", "missing", "q, c"],
        );
        refused(row.texts(&["c"]).unwrap_err(), &["`c`", "a list"]);
        refused(row.index(&["n"]).unwrap_err(), &["`n`"]);
        refused(row.object(&["c"]).unwrap_err(), &["`c`"]);
        refused(jsonl("f", "[1]".as_bytes()).unwrap_err(), &["f:1"]);
        refused(json("f", "[{}, 1]".as_bytes()).unwrap_err(), &["f:1"]);
    }
}
