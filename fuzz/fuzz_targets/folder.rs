//! A folder for readers that take paths, one a process.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tempfile::TempDir;

/// Writes `bytes` as `name` and returns its path; the file is replaced, as it may be mapped.
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let memory = Path::new("/dev/shm");
        let made = if memory.is_dir() {
            tempfile::tempdir_in(memory)
        } else {
            tempfile::tempdir()
        };
        made.expect("a temporary folder")
    });
    let path = folder.path().join(name);
    let _ = std::fs::remove_file(&path);
    std::fs::write(&path, bytes).expect("room in the temporary folder");
    path
}
