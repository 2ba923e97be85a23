//! What can be wrong with a plan, each naming the place in the plan and the way out.

/// An error in a steering plan, or a mismatch between a plan and what it is compiled against.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SteeringError {
    /// The text is not a plan: bad TOML or JSON, an unknown key or an unknown value.
    #[error("not a steering plan: {reason}")]
    Syntax {
        /// The parser's message, with line and column.
        reason: String,
    },
    /// The plan was written for another version of the format.
    #[error("plan version {found} is not supported; this build reads version {supported}")]
    Version {
        /// The version in the plan.
        found: u32,
        /// The version that this build reads.
        supported: u32,
    },
    /// A number in the plan is out of its range.
    #[error("{place}: {field} = {value} {rule}")]
    Value {
        /// Where in the plan, for instance `interventions[0].edits[1]`.
        place: String,
        /// The field's name.
        field: &'static str,
        /// The value found.
        value: String,
        /// What is asked of it.
        rule: &'static str,
    },
    /// An intervention names an SAE that the plan or the caller does not have.
    #[error("{place}: SAE '{name}' is not loaded; loaded are: {known}")]
    UnknownSae {
        /// Where in the plan.
        place: String,
        /// The name asked for.
        name: String,
        /// The names there are, comma-separated.
        known: String,
    },
    /// An intervention names a gate that the plan does not have.
    #[error("{place}: gate '{name}' is not in the plan; it has: {known}")]
    UnknownGate {
        /// Where in the plan.
        place: String,
        /// The name asked for.
        name: String,
        /// The names there are, comma-separated.
        known: String,
    },
    /// An intervention waits for a gate to be clear that never is.
    #[error("{place}: gate '{name}' is never clear; give it a score to be clear below, `clear`")]
    NeverClear {
        /// Where in the plan.
        place: String,
        /// The gate.
        name: String,
    },
    /// A gate would decide after the edit that waits for it.
    #[error(
        "{place}: gate '{name}' reads {gate_site}, after the edit at {site}; a gate must read at or before the site that it turns on"
    )]
    LateGate {
        /// Where in the plan.
        place: String,
        /// The gate.
        name: String,
        /// The gate's site.
        gate_site: String,
        /// The intervention's site.
        site: String,
    },
    /// A latent index is beyond the SAE's dictionary.
    #[error("{place}: latent {latent} is out of range: SAE '{sae}' has {d_sae} latents")]
    LatentOutOfRange {
        /// Where in the plan.
        place: String,
        /// The index asked for.
        latent: u32,
        /// The SAE's name.
        sae: String,
        /// Its number of latents.
        d_sae: usize,
    },
    /// A value is relative to a figure that the caller did not give.
    #[error(
        "{place}: unit '{unit}' needs {what}, which is not known for SAE '{sae}'; harvest first or give the value with unit = \"abs\""
    )]
    MissingScale {
        /// Where in the plan.
        place: String,
        /// The unit asked for.
        unit: &'static str,
        /// The missing figure.
        what: &'static str,
        /// The SAE's name.
        sae: String,
    },
    /// A site's name is wrong or not in the model.
    #[error("{place}: {reason}")]
    Site {
        /// Where in the plan.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Widths disagree.
    #[error("{place}: {what} has width {found}, the model's residual stream {expected}")]
    Width {
        /// Where in the plan.
        place: String,
        /// The SAE or direction.
        what: String,
        /// Its width.
        found: usize,
        /// The model's `d_model`.
        expected: usize,
    },
    /// The SAE at hand is not the one that the plan was made with.
    #[error("SAE '{name}' has sha256 {found}, the plan was made with {expected}")]
    SaeMismatch {
        /// The SAE's name in the plan.
        name: String,
        /// The hash of the loaded SAE.
        found: String,
        /// The hash in the plan.
        expected: String,
    },
}
