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
    /// Attribution follows decoder rows at the site that was read.
    #[error(
        "a transcoder writes another site than it reads; attribution needs an SAE that reconstructs its site"
    )]
    Transcoder,
    /// An SAE of another width than the model's residual stream.
    #[error("the SAE reads rows of {sae} values, the model's residual stream has {model}")]
    SaeWidth {
        /// Width of what the SAE reads.
        sae: usize,
        /// Width of the residual stream.
        model: usize,
    },
    /// The consumer of a harvest asked to stop, for instance because it was interrupted.
    #[error("interrupted")]
    Interrupted,
}
