//! The binary `demur`.
#![forbid(unsafe_code)]

fn main() {}
