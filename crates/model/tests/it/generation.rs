//! The engine: replies do not depend on the schedule, text never shows a stop string, bad requests
//! are refused with a reason.

use std::sync::Arc;

use demur_kernels::linear::Precision;
use demur_kernels::ops::log_softmax_at;
use demur_model::ModelError;
use demur_model::checkpoint::Checkpoint;
use demur_model::decoder::Model;
use demur_model::generate::{Engine, EngineConfig, Event, Finish, Output, Request, Sampling};
use demur_model::hooks::{Intervention, Role, Site};
use demur_model::tokenizer::{Special, Tokenizer};

use crate::support::{self, Push, RowWise, forward};

struct Chat {
    model: Model,
    tokenizer: Tokenizer,
}

impl Chat {
    /// A tiny model; all share the tokenizer of `chat`, of which the others use the lower ids.
    fn of(name: &str) -> Self {
        let checkpoint = Checkpoint::open(&support::path("chat/model.gguf")).unwrap();
        Self {
            model: support::model(name, Precision::Fast),
            tokenizer: Tokenizer::from_checkpoint(&checkpoint).unwrap(),
        }
    }

    fn new() -> Self {
        Self::of("chat/model.gguf")
    }

    fn request(&self, prompt: &str, max_new_tokens: usize) -> Request {
        let tokens = self.tokenizer.encode(prompt, Special::AsText).unwrap();
        let roles = vec![Role::User; tokens.len()];
        Request::new(tokens, roles, max_new_tokens)
    }

    fn engine(&self, max_batch: usize, max_batch_tokens: usize) -> Engine<'_> {
        let config = EngineConfig {
            max_batch,
            max_batch_tokens,
        };
        Engine::new(&self.model, &self.tokenizer, config)
    }

    fn reply(&self, request: Request) -> Output {
        let mut engine = self.engine(1, 512);
        engine.run(vec![request], |_, _| {}).unwrap().remove(0)
    }
}

fn sampled(seed: u64) -> Sampling {
    Sampling {
        temperature: 0.8,
        top_k: 40,
        top_p: 0.95,
        repetition_penalty: 1.1,
        seed,
        ..Sampling::default()
    }
}

/// Requests of all kinds and lengths.
fn mixed(chat: &Chat) -> Vec<Request> {
    let prompts = [
        "one",
        "the other thing and another",
        "é 漢字 🙂",
        "a long prompt that goes on and on, in order to be cut into pieces by a small budget",
        "x",
        "again",
        "in the end",
    ];
    let requests = prompts.iter().enumerate().map(|(i, prompt)| {
        let mut request = chat.request(prompt, 4 + 5 * i);
        if i % 2 == 1 {
            request.sampling = sampled(i as u64);
        }
        if i % 3 == 0 {
            request.hook = Some(Arc::new(Push::new(Site::post(i % 2), 0.5)));
        }
        request.logprobs = (i == 2).then_some(3);
        request.first_logits = i == 5;
        request
    });
    requests.collect()
}

#[track_caller]
fn same(found: &Output, expected: &Output) {
    assert_eq!(found.tokens, expected.tokens);
    assert_eq!(found.text, expected.text);
    assert_eq!(found.finish, expected.finish);
    assert_eq!(found.logprobs, expected.logprobs);
    assert_eq!(found.first_logits, expected.first_logits);
    assert_eq!(found.audit, expected.audit);
}

#[test]
fn replies_do_not_depend_on_the_schedule() {
    let chat = Chat::new();
    let alone: Vec<Output> = mixed(&chat).into_iter().map(|r| chat.reply(r)).collect();
    for (max_batch, max_batch_tokens) in [(1, 512), (3, 512), (16, 512), (3, 7), (16, 1)] {
        let mut done = Vec::new();
        let mut engine = chat.engine(max_batch, max_batch_tokens);
        let outputs = engine
            .run(mixed(&chat), |at, output| {
                done.push((at, output.tokens.len()))
            })
            .unwrap();
        assert_eq!(outputs.len(), alone.len());
        for (found, expected) in outputs.iter().zip(&alone) {
            same(found, expected);
        }
        done.sort_unstable();
        let lengths: Vec<_> = outputs.iter().map(|o| o.tokens.len()).enumerate().collect();
        assert_eq!(done, lengths, "on_done sees each reply once");
    }
}

#[test]
fn sequences_join_and_leave_at_any_step() {
    let chat = Chat::new();
    let requests = mixed(&chat);
    let mut engine = chat.engine(4, 16);
    let mut waiting = requests.clone().into_iter();
    let mut text = vec![String::new(); requests.len()];
    let mut outputs = Vec::new();
    let cancelled = 1;
    for step in 0.. {
        // One joins every second step.
        if step % 2 == 0
            && let Some(request) = waiting.next()
        {
            engine.submit(request).unwrap();
        }
        if step == 5 {
            assert!(engine.cancel(cancelled) && !engine.cancel(cancelled));
        }
        for event in engine.step().unwrap() {
            match event {
                Event::Text(id, more) => text[id].push_str(&more),
                Event::Done(id, output) => outputs.push((id, *output)),
            }
        }
        if waiting.len() == 0 && engine.is_idle() {
            break;
        }
    }
    assert_eq!(outputs.len(), requests.len() - 1);
    for (id, output) in outputs {
        assert_ne!(id, cancelled);
        assert_eq!(text[id], output.text, "streamed text is the reply's text");
        same(&output, &chat.reply(requests[id].clone()));
    }
}

#[test]
fn a_reply_is_what_repeated_whole_passes_give() {
    // The prompt is within LongRoPE's original context of 16, the reply leads beyond it.
    for name in ["chat/model.gguf", "phi3-longrope", "gemma3"] {
        let chat = Chat::of(name);
        let prompt: Vec<u32> = (20..31).collect();
        let mut expected = prompt.clone();
        let d_vocab = chat.model.spec().d_vocab;
        for _ in 0..12 {
            let logits = forward(
                &chat.model,
                &expected,
                &mut chat.model.new_cache(),
                None,
                None,
            );
            let last = &logits[logits.len() - d_vocab..];
            let best = (0..d_vocab).max_by(|&a, &b| last[a].total_cmp(&last[b]));
            expected.push(best.unwrap() as u32);
        }
        let mut request = Request::new(prompt, vec![Role::User; 11], 12);
        request.hook = Some(Arc::new(Push::new(Site::post(0), 0.0)));
        let output = chat.reply(request);
        assert_eq!(output.tokens, expected[11..], "{name}");
        assert_eq!(output.finish, Finish::Length);
    }
}

#[test]
fn a_hook_sees_its_prompt_whole() {
    let chat = Chat::new();
    let mut hooked = chat.request("a prompt of more than four tokens", 3);
    hooked.hook = Some(Arc::new(Push::new(Site::post(0), 0.1)));
    let n = hooked.tokens.len();
    assert!(n > 4);
    let other = chat.request("others decode all the while", 30);
    let mut engine = chat.engine(4, 4);
    let outputs = engine.run(vec![other, hooked], |_, _| {}).unwrap();
    let seen = serde_json::json!([[0, n, false], [n, 1, true], [n + 1, 1, true]]);
    assert_eq!(outputs[1].audit, Some(seen));
}

#[test]
fn stop_strings_end_the_reply_across_token_borders() {
    let chat = Chat::new();
    let whole = chat.reply(chat.request("tell me", 40));
    assert_eq!(whole.text, chat.tokenizer.decode(&whole.tokens));
    let chars: Vec<char> = whole.text.chars().collect();
    assert!(chars.len() > 20);
    for (from, length) in [(0, 1), (3, 2), (9, 5), (12, 8)] {
        let stop: String = chars[from..from + length].iter().collect();
        let first = whole.text.find(&stop).unwrap();
        let mut request = chat.request("tell me", 40);
        request.stop = vec!["never to be seen".to_owned(), stop.clone()];
        let mut engine = chat.engine(1, 512);
        engine.submit(request).unwrap();
        let mut streamed = String::new();
        let mut output = None;
        while !engine.is_idle() {
            for event in engine.step().unwrap() {
                match event {
                    Event::Text(_, text) => streamed.push_str(&text),
                    Event::Done(_, done) => output = Some(done),
                }
            }
            assert!(
                whole.text[..first].starts_with(&streamed),
                "nothing of {stop:?} shows"
            );
        }
        let output = output.unwrap();
        assert_eq!(output.text, whole.text[..first]);
        assert_eq!(streamed, output.text);
        assert_eq!(output.finish, Finish::StopString);
        assert!(output.tokens.len() < 40);
    }
}

#[test]
fn the_models_own_end_is_not_part_of_the_reply() {
    let chat = Chat::new();
    let ends = chat.tokenizer.eos_ids().to_vec();
    let mut ended = 0;
    for seed in 0..20 {
        let mut request = chat.request("tell me", 100);
        request.sampling = Sampling {
            temperature: 1.5,
            seed,
            ..Sampling::default()
        };
        let output = chat.reply(request);
        assert!(output.tokens.iter().all(|t| !ends.contains(t)));
        match output.finish {
            Finish::Stop => ended += 1,
            _ => assert_eq!(output.tokens.len(), 100),
        }
    }
    assert!(ended > 2, "{ended}");
}

#[test]
fn seeds_decide() {
    let chat = Chat::new();
    let draw = |seed| {
        let mut request = chat.request("tell me", 20);
        request.sampling = sampled(seed);
        chat.reply(request).tokens
    };
    assert_eq!(draw(7), draw(7));
    assert_ne!(draw(7), draw(8));
}

#[test]
fn log_probabilities_are_those_of_the_model() {
    let chat = Chat::new();
    let mut request = chat.request("tell me", 6);
    request.logprobs = Some(4);
    request.first_logits = true;
    let output = chat.reply(request.clone());
    let mut tokens = request.tokens.clone();
    tokens.extend(&output.tokens);
    let logits = forward(
        &chat.model,
        &tokens,
        &mut chat.model.new_cache(),
        None,
        None,
    );
    let rows: Vec<&[f32]> = logits.chunks(chat.model.spec().d_vocab).collect();
    let first = request.tokens.len() - 1;
    assert_eq!(output.first_logits.as_deref(), Some(rows[first]));
    assert_eq!(output.logprobs.len(), output.tokens.len());
    for (i, (found, &id)) in output.logprobs.iter().zip(&output.tokens).enumerate() {
        let expected = log_softmax_at(rows[first + i], id as usize);
        assert_eq!(found.chosen, expected);
        assert_eq!(
            found.top[0],
            (id, expected),
            "greedy takes the most probable"
        );
        assert_eq!(found.top.len(), 4);
        assert!(found.top.is_sorted_by(|a, b| a.1 >= b.1));
    }
}

#[test]
fn bad_requests_are_refused() {
    let chat = Chat::new();
    let context = chat.model.spec().context;
    let good = chat.request("fine", 5);
    let bad = |change: &dyn Fn(&mut Request)| {
        let mut request = good.clone();
        change(&mut request);
        let mut engine = chat.engine(1, 512);
        let error = engine.submit(request.clone()).unwrap_err();
        // `run` refuses before anything has run.
        let mut done = 0;
        assert!(
            engine
                .run(vec![good.clone(), request], |_, _| done += 1)
                .is_err()
        );
        assert!(done == 0 && engine.is_idle());
        error
    };
    let reason = |change: &dyn Fn(&mut Request)| match bad(change) {
        ModelError::Request { reason } => reason,
        other => panic!("{other}"),
    };
    assert!(reason(&|r| (r.tokens, r.roles) = (vec![], vec![])).contains("empty"));
    assert!(reason(&|r| r.roles.truncate(1)).contains("roles"));
    assert!(reason(&|r| r.max_new_tokens = 0).contains("max_new_tokens"));
    assert!(reason(&|r| r.stop = vec![String::new()]).contains("stop"));
    assert!(reason(&|r| r.sampling.top_p = 1.5).contains("top_p"));
    let long = |n: usize| bad(&move |r| (r.tokens, r.roles) = (vec![5; n], vec![Role::User; n]));
    assert!(matches!(long(context), ModelError::TooLong { .. }));
    assert!(matches!(
        bad(&|r| r.tokens[0] = 9999),
        ModelError::TokenId { id: 9999, .. }
    ));
    let hook = Arc::new(Push::new(Site::post(9), 1.0));
    assert!(matches!(
        bad(&|r| r.hook = Some(hook.clone())),
        ModelError::SiteLayer { .. }
    ));
}

#[test]
fn a_reply_ends_with_the_context() {
    let chat = Chat::new();
    let context = chat.model.spec().context;
    let n = context - 3;
    let output = chat.reply(Request::new(vec![70; n], vec![Role::User; n], 50));
    assert_eq!((output.tokens.len(), output.finish), (3, Finish::Length));
}

/// The replies of prompts with a common beginning, with and without a hook, are those of each alone;
/// the beginning is run once for each plan.
#[test]
fn common_beginnings_are_run_once_and_change_nothing() {
    let chat = Chat::new();
    let common = "a system prompt that all of them begin with, whatever they ask";
    let requests = || -> Vec<Request> {
        let hooks: [Option<Arc<dyn Intervention>>; 3] = [
            None,
            Some(Arc::new(RowWise(Push::new(Site::post(0), 0.25)))),
            // Must see its prompt whole.
            Some(Arc::new(Push::new(Site::post(0), 0.5))),
        ];
        let each = hooks.iter().flat_map(|hook| {
            ["one", "two and more", "3", "fourth"].map(|rest| {
                let mut request = chat.request(&format!("{common} {rest}"), 6);
                request.hook = hook.clone();
                request
            })
        });
        each.collect()
    };
    let n = chat.request(common, 1).tokens.len() as u64;
    let alone: Vec<Output> = requests().into_iter().map(|r| chat.reply(r)).collect();
    assert_ne!(alone[0].tokens, alone[4].tokens, "the hook does something");
    for (max_batch, max_batch_tokens) in [(16, 512), (2, 512), (16, 9)] {
        let mut engine = chat.engine(max_batch, max_batch_tokens);
        let found = engine.run(requests(), |_, _| {}).unwrap();
        for (i, (f, a)) in found.iter().zip(&alone).enumerate() {
            assert_eq!(f.tokens, a.tokens, "{i} of a batch of {max_batch}");
            if i >= 8 {
                assert_eq!(f.audit, a.audit, "a prompt that must be whole");
            }
        }
        // Of two plans, three prompts each go on from the beginning that the first has run.
        let shared = engine.shared_tokens();
        assert!(
            (6 * n..6 * (n + 2)).contains(&shared),
            "{shared} of 6 x {n}"
        );
    }
}
