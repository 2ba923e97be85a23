//! A chat template, which is a program of the checkpoint's author: parsed and rendered.
#![no_main]

use demur_model::chat::{ChatTemplate, Message};

libfuzzer_sys::fuzz_target!(|source: &str| {
    let Ok(template) = ChatTemplate::new(source, "<s>".to_owned(), "</s>".to_owned()) else {
        return;
    };
    let message = |role: &str, content: &str| Message {
        role: role.to_owned(),
        content: content.to_owned(),
    };
    let messages = [message("user", "hello"), message("assistant", "Good day.")];
    for prompt in [true, false] {
        let _ = template.render(&messages, prompt);
    }
});
