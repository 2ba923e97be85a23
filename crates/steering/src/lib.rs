//! Steering plans: data, validated, compiled to interventions on the residual stream.
#![forbid(unsafe_code)]
