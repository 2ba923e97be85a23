//! Suites, judges, statistics and arms; the JSON record is the truth.
#![forbid(unsafe_code)]
