//! What can go wrong with an SAE or its files.

/// An error of an SAE, its training or its files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaeError {
    /// A file can't be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {reason}")]
    Format {
        /// The file.
        path: String,
        /// What is wrong, naming the key or tensor.
        reason: String,
    },
    /// A file does not have the sum that the manifest says.
    #[error("{path}: sha256 is {found}, the manifest says {expected}; fetch or train it again")]
    Checksum {
        /// The file.
        path: String,
        /// Its sum.
        found: String,
        /// The sum expected.
        expected: String,
    },
    /// A state of a training run is not as it was written.
    #[error("{path}: this state of the training is damaged: {reason}")]
    Damaged {
        /// The file.
        path: String,
        /// How that is known.
        reason: String,
    },
    /// Numbers that don't fit together.
    #[error("{field} = {value}: {rule}")]
    Config {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is asked of it.
        rule: String,
    },
}
