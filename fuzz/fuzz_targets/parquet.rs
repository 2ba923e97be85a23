//! A Parquet file of rows.
#![no_main]

use demur_eval::rows::parquet;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = parquet("fuzz.parquet", bytes);
});
