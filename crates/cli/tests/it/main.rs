//! The binary as a user meets it, offline: a tiny random checkpoint stands in for the model.

mod commands;
mod evals;
mod fit;
mod gates;
mod hostile;
mod hub;
mod judges;
mod resume;
mod streams;
mod study;
mod support;
