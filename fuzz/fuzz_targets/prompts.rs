//! A JSONL file of prompts.
#![no_main]

use demur_eval::prompts::{Prompt, parse};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = parse("fuzz.jsonl", bytes, |p: &Prompt| &p.id);
});
