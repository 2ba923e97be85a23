//! Checkpoints, tokenizers and one decoder with hooks on the residual stream.
#![forbid(unsafe_code)]
