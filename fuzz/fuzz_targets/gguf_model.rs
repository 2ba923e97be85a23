//! A GGUF file as a model: spec, tokenizer, chat template, weights, and one forward pass.
#![no_main]

mod folder;

use std::sync::Arc;

use demur_kernels::linear::Precision;
use demur_model::chat::{ChatTemplate, Message};
use demur_model::checkpoint::Checkpoint;
use demur_model::decoder::{LogitsAt, Model, SeqInput, Workspace};
use demur_model::hooks::Role;
use demur_model::tokenizer::{Special, Tokenizer};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let path = folder::file("model.gguf", bytes);
    let Ok(checkpoint) = Checkpoint::open(&path) else {
        return;
    };
    let checkpoint = Arc::new(checkpoint);
    if let Ok(model) = Model::load(&checkpoint, Precision::Fast) {
        forward(&model);
    }
    let Ok(tokenizer) = Tokenizer::from_checkpoint(&checkpoint) else {
        return;
    };
    if let Ok(ids) = tokenizer.encode("How do I whittle a spoon? äöü 🥄", Special::Parse) {
        let _ = tokenizer.decode(&ids);
    }
    let Ok(chat) = ChatTemplate::from_checkpoint(&checkpoint) else {
        return;
    };
    let message = Message {
        role: "user".to_owned(),
        content: "hello".to_owned(),
    };
    let _ = chat.encode(&tokenizer, &[message], true);
});

/// Two tokens through the model, if it is small enough to do that many times a second.
fn forward(model: &Model) {
    if model.memory().weights > 1 << 20 {
        return;
    }
    let mut cache = model.new_cache();
    let mut input = [SeqInput {
        tokens: &[0, 1],
        roles: &[Role::User; 2],
        generated: false,
        cache: &mut cache,
        hook: None,
        hook_sites: &[],
        logits: LogitsAt::All,
    }];
    let _ = model.forward(&mut input, None, &mut Workspace::default());
}
