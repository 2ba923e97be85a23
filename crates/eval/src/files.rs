//! Files that others wrote, line by line and within limits; and files of our own, whole or not there.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::EvalError;

/// Longest line, bytes.
const MAX_LINE: u64 = 64 << 20;
/// What some editors put in front of a text file.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Opens a file, unpacking `.gz`.
///
/// # Errors
/// [`EvalError::Io`].
pub fn open(path: &Path) -> Result<Box<dyn Read>, EvalError> {
    let file = File::open(path).map_err(|source| EvalError::Io {
        path: path.display().to_string(),
        source,
    })?;
    Ok(if path.extension().is_some_and(|e| e == "gz") {
        Box::new(flate2::read::MultiGzDecoder::new(file))
    } else {
        Box::new(file)
    })
}

/// The lines of a text that are not blank, with their numbers.
///
/// Line ends may be those of Windows, and a byte-order mark is passed over.
pub struct Lines<R> {
    path: String,
    reader: BufReader<R>,
    number: usize,
    left: u64,
    limit: u64,
}

impl<R: Read> Lines<R> {
    /// Reads at most `limit` bytes; `path` is for messages.
    pub fn new(path: impl Into<String>, bytes: R, limit: u64) -> Self {
        Self {
            path: path.into(),
            reader: BufReader::new(bytes),
            number: 0,
            left: limit,
            limit,
        }
    }

    /// The next line and its number, from 1.
    ///
    /// # Errors
    /// [`EvalError::Io`], or [`EvalError::TooLarge`] for a line or a text beyond its limit.
    pub fn next_line(&mut self) -> Result<Option<(usize, Vec<u8>)>, EvalError> {
        loop {
            let mut line = Vec::new();
            let most = MAX_LINE.min(self.left);
            let read = self
                .reader
                .by_ref()
                .take(most + 1)
                .read_until(b'\n', &mut line);
            let n = read.map_err(|source| EvalError::Io {
                path: self.path.clone(),
                source,
            })? as u64;
            if n == 0 {
                return Ok(None);
            }
            self.number += 1;
            if n > most {
                let (path, limit) = if n > self.left {
                    (self.path.clone(), self.limit)
                } else {
                    (format!("{}:{}", self.path, self.number), MAX_LINE)
                };
                return Err(EvalError::TooLarge { path, limit });
            }
            self.left -= n;
            if self.number == 1 && line.starts_with(BYTE_ORDER_MARK) {
                line.drain(..BYTE_ORDER_MARK.len());
            }
            if !line.trim_ascii().is_empty() {
                return Ok(Some((self.number, line)));
            }
        }
    }

    /// What is wrong with line `number`.
    pub fn wrong(&self, number: usize, reason: impl ToString) -> EvalError {
        EvalError::Line {
            path: self.path.clone(),
            line: number,
            reason: reason.to_string(),
        }
    }
}

/// Opens an append-only log of JSONL, reads its whole lines, and cuts a torn last one off.
///
/// # Errors
/// [`EvalError::Io`], or [`EvalError::Line`] for a log that is not ours.
pub fn resume<T: DeserializeOwned>(log: &Path) -> Result<(File, Vec<T>), EvalError> {
    let io = |source| EvalError::Io {
        path: log.display().to_string(),
        source,
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(log)
        .map_err(io)?;
    let (entries, whole) = whole_lines(log, &file)?;
    file.set_len(whole).map_err(io)?;
    file.seek(SeekFrom::End(0)).map_err(io)?;
    Ok((file, entries))
}

/// The whole lines of a log of JSONL that is only read; a torn last one is passed over.
///
/// # Errors
/// As [`resume`].
pub fn entries<T: DeserializeOwned>(log: &Path) -> Result<Vec<T>, EvalError> {
    let file = File::open(log).map_err(|source| EvalError::Io {
        path: log.display().to_string(),
        source,
    })?;
    Ok(whole_lines(log, &file)?.0)
}

/// The whole lines of `file`, and how many bytes they are.
fn whole_lines<T: DeserializeOwned>(log: &Path, file: &File) -> Result<(Vec<T>, u64), EvalError> {
    let io = |source| EvalError::Io {
        path: log.display().to_string(),
        source,
    };
    let mut entries = Vec::new();
    let mut whole = 0u64;
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).map_err(io)? > 0 {
        if line.last() != Some(&b'\n') {
            break;
        }
        let number = entries.len() + 1;
        let entry = serde_json::from_slice(&line).map_err(|e| EvalError::Line {
            path: log.display().to_string(),
            line: number,
            reason: format!("{e}; delete the file to start again"),
        })?;
        entries.push(entry);
        whole += line.len() as u64;
        line.clear();
    }
    Ok((entries, whole))
}

/// Writes `path`: to a temporary file beside it, synced, then renamed.
///
/// # Errors
/// [`EvalError::Io`]; what was there before is left as it was.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), EvalError> {
    let io = |source| EvalError::Io {
        path: path.display().to_string(),
        source,
    };
    let folder = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // As any other file, less the umask: what is a private temporary file now will not stay one.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut file = builder.tempfile_in(folder).map_err(io)?;
    file.write_all(bytes).map_err(io)?;
    file.as_file().sync_all().map_err(io)?;
    file.persist(path).map_err(|e| io(e.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8], limit: u64) -> Result<Vec<(usize, String)>, EvalError> {
        let mut lines = Lines::new("f", bytes, limit);
        let mut out = Vec::new();
        while let Some((number, line)) = lines.next_line()? {
            out.push((number, String::from_utf8(line).unwrap().trim().to_owned()));
        }
        Ok(out)
    }

    #[test]
    fn lines_as_editors_write_them() {
        let bytes = b"\xef\xbb\xbf{}\r\n\r\n  \n[]\n\"last\"";
        let expected = [(1, "{}"), (4, "[]"), (5, "\"last\"")];
        assert_eq!(
            all(bytes, 100).unwrap(),
            expected.map(|(n, l)| (n, l.to_owned()))
        );
        assert!(all(b"", 100).unwrap().is_empty());
        assert!(all(b"\xef\xbb\xbf", 100).unwrap().is_empty());
    }

    #[test]
    fn a_limit_is_a_limit() {
        assert_eq!(all(b"ab\ncd\n", 6).unwrap().len(), 2);
        let e = all(b"ab\ncd\n", 5).unwrap_err();
        assert!(matches!(e, EvalError::TooLarge { limit: 5, .. }), "{e}");
        // a text without an end
        let mut endless = Lines::new("f", std::io::repeat(b'x'), u64::MAX);
        let e = endless.next_line().unwrap_err().to_string();
        assert!(e.contains("f:1"), "{e}");
    }

    #[test]
    fn a_packed_file_that_is_cut_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.jsonl.gz");
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        for i in 0..1000 {
            writeln!(gz, "{{\"id\": \"{}\"}}", i * 7919).unwrap();
        }
        let bytes = gz.finish().unwrap();
        for n in [0, 5, 17, bytes.len() / 2, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..n]).unwrap();
            let mut lines = Lines::new("p", open(&path).unwrap(), u64::MAX);
            let end = loop {
                match lines.next_line() {
                    Ok(Some(_)) => {}
                    other => break other,
                }
            };
            assert!(end.is_err(), "{n} of {} bytes", bytes.len());
        }
    }
}
