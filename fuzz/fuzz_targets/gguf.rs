//! Metadata and tensor table of a GGUF file.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = demur_model::gguf::parse("fuzz.gguf", bytes);
});
