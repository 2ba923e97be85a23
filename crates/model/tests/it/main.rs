//! Integration tests on the tiny checkpoints of `testdata/models`.

mod batching;
mod generation;
mod golden;
mod gradients;
mod hostile;
mod parity;
mod scoring;
mod support;
mod tokenizers;
