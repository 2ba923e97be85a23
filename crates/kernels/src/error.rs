//! What a kernel refuses.

/// An argument that a kernel can't work with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A slice has the wrong length for the shape.
    #[error("{what} has {found} elements, the shape needs {expected}")]
    Length {
        /// Which argument.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The length that the shape needs.
        expected: usize,
    },
    /// A row of a block type is not whole blocks.
    #[error("a row of {columns} values is not whole blocks of {block} ({type_name})")]
    Block {
        /// The type's name.
        type_name: &'static str,
        /// Values in a row.
        columns: usize,
        /// Values in a block.
        block: usize,
    },
    /// The thread pool could not be set up.
    #[error("thread pool: {reason}")]
    Threads {
        /// The pool's own words.
        reason: String,
    },
    /// A file could not be mapped.
    #[error("map {path}: {source}")]
    Map {
        /// The file.
        path: String,
        /// The system's reason.
        source: std::io::Error,
    },
}
