//! What can go wrong while looking for features.

/// An error of a harvest or a discovery.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FeatureError {
    /// The model refused its input.
    #[error(transparent)]
    Model(#[from] demur_model::ModelError),
    /// A plan could not be compiled.
    #[error(transparent)]
    Steering(#[from] demur_steering::SteeringError),
    /// A contrast needs members on both sides.
    #[error(
        "the contrast '{contrast}' has {positive} prompts on one side and {negative} on the other; it needs at least {needed} on each: give more discovery prompts"
    )]
    TooFew {
        /// The contrast's name.
        contrast: &'static str,
        /// Size of the first group.
        positive: usize,
        /// Size of the second group.
        negative: usize,
        /// What is needed of each.
        needed: usize,
    },
    /// The consumer of a harvest asked to stop, for instance because it was interrupted.
    #[error("interrupted")]
    Interrupted,
}
