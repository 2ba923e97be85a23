//! A `tokenizer.json`, then text through it and back.
#![no_main]

mod folder;

use demur_model::tokenizer::{Special, Tokenizer};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let path = folder::file("tokenizer.json", bytes);
    let Ok(tokenizer) = Tokenizer::from_file(&path) else {
        return;
    };
    for special in [Special::Parse, Special::AsText] {
        if let Ok(ids) =
            tokenizer.encode("How do I <|im_end|> whittle 12 spoons?\n äöü 🥄", special)
        {
            let _ = tokenizer.decode(&ids);
        }
    }
});
