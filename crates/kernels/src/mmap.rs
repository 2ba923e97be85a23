//! Read-only memory maps of checkpoint files.

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use crate::error::KernelError;

/// A file's bytes, mapped.
#[derive(Debug)]
pub struct Mapped(memmap2::Mmap);

impl Mapped {
    /// Maps `path` read-only.
    ///
    /// A file that another process truncates while it is mapped ends this one with a signal
    /// (SIGBUS); checkpoints are files that nobody writes to, as for every other user of maps.
    ///
    /// # Errors
    /// [`KernelError::Map`] if the file can't be opened or mapped.
    pub fn open(path: &Path) -> Result<Self, KernelError> {
        let error = |source| KernelError::Map {
            path: path.display().to_string(),
            source,
        };
        let file = File::open(path).map_err(error)?;
        // SAFETY: the map is private to this process and read-only; the documentation above states
        // that the file must not be truncated meanwhile, which no safe API can rule out.
        unsafe { memmap2::Mmap::map(&file) }
            .map(Self)
            .map_err(error)
    }
}

impl Mapped {
    /// Gives the memory of the pages read so far back to the system; what is read again comes from
    /// the file again.
    pub fn release(&self) {
        #[cfg(unix)]
        // SAFETY: for a read-only map of a file, dropped pages are read from the file again with
        // the same contents. A failure leaves everything as it was.
        let _ = unsafe { self.0.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
