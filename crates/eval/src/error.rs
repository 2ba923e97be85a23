//! What can go wrong in an evaluation.

/// An error of a data set, a run or a record.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// A file can't be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A line of a data set is not what it should be.
    #[error("{path}:{line}: {reason}")]
    Line {
        /// The file.
        path: String,
        /// Line number, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A file is beyond a limit.
    #[error("{path}: larger than the limit of {limit} bytes")]
    TooLarge {
        /// The file.
        path: String,
        /// The limit.
        limit: u64,
    },
    /// Two replies would have the same place.
    #[error(
        "prompt '{id}' is there twice for the arm '{arm}': names of arms and ids must be unique"
    )]
    Twice {
        /// The arm.
        arm: String,
        /// The prompt.
        id: String,
    },
    /// Two splits share a prompt.
    #[error(
        "{path}: prompts '{first}' and '{second}' are the same text in two splits; no prompt may be in two"
    )]
    TwoSplits {
        /// The file.
        path: String,
        /// The one prompt's id.
        first: String,
        /// The other's.
        second: String,
    },
    /// A record is not one.
    #[error("{path}: not a record: {reason}")]
    Record {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The model refused its input.
    #[error(transparent)]
    Model(#[from] demur_model::ModelError),
    /// A harvest or discovery failed.
    #[error(transparent)]
    Feature(#[from] demur_features::FeatureError),
}
