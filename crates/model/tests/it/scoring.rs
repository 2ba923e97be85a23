//! Scores of continuations equal those of one pass over context and continuation, bit for bit,
//! whatever is shared, batched or cut.

use std::sync::Arc;

use demur_kernels::linear::Precision;
use demur_kernels::ops::logsumexp;
use demur_model::ModelError;
use demur_model::decoder::Model;
use demur_model::generate::{ContinuationScore, EngineConfig, ScoreRequest, score};
use demur_model::hooks::{Intervention, Role, Site};

use crate::support::{Push, RowWise, forward, model};

fn tokens(n: usize, seed: u32) -> Vec<u32> {
    (0..n as u32)
        .map(|i| 3 + (i * 31 + seed * 17) % 90)
        .collect()
}

/// Questions of several lengths, most of which begin with the same 34 tokens.
fn requests(hook: Option<Arc<dyn Intervention>>) -> Vec<ScoreRequest> {
    let question = |i: u32| {
        let mut context = tokens(34, if i == 4 { 9 } else { 0 });
        context.extend(tokens(1 + 3 * i as usize, 20 + i));
        let lengths = [1, 4, 1, 7, 2];
        ScoreRequest {
            roles: vec![Role::User; context.len()],
            context,
            continuations: (0..1 + i as usize % 5)
                .map(|c| tokens(lengths[c], 40 + i + c as u32))
                .collect(),
            hook: hook.clone(),
        }
    };
    (0..7).map(question).collect()
}

fn run(
    model: &Model,
    requests: &[ScoreRequest],
    config: EngineConfig,
) -> Vec<Vec<ContinuationScore>> {
    let mut all = Vec::new();
    score(model, requests, config, |at, scored| {
        assert_eq!(at, all.len());
        all.push(scored.scores.clone());
    })
    .unwrap();
    all
}

/// One pass, nothing shared; the hook sees the context, then the continuation.
fn alone(model: &Model, r: &ScoreRequest) -> Vec<ContinuationScore> {
    let one = |c: &Vec<u32>| {
        let mut cache = model.new_cache();
        let longest = r.continuations.iter().map(Vec::len).max().unwrap();
        cache.expect(r.context.len() + longest);
        let mut state = r.hook.as_ref().map(|h| h.start());
        let sites = r.hook.as_ref().map_or(&[][..], |h| h.sites());
        let both = [&r.context[..], c].concat();
        let hook = state.as_deref_mut().map(|s| (s, sites));
        let rows = forward(model, &both, &mut cache, hook, None);
        let mut s = ContinuationScore {
            logprob: 0.0,
            greedy: true,
        };
        for (row, &next) in rows
            .chunks_exact(model.spec().d_vocab)
            .skip(r.context.len() - 1)
            .zip(c)
        {
            s.logprob += f64::from(row[next as usize]) - f64::from(logsumexp(row));
            let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            s.greedy &= row[next as usize] == most;
        }
        s
    };
    r.continuations.iter().map(one).collect()
}

const CONFIGS: [(usize, usize); 4] = [(16, 512), (1, 512), (3, 20), (16, 1)];

#[test]
fn shared_and_batched_equals_alone() {
    for name in [
        "qwen2/model.gguf",
        "phi3-longrope",
        "gemma2",
        "llama/model.gguf",
    ] {
        let model = model(name, Precision::Fast);
        for by in [None, Some(0.25)] {
            let site = Site::post(0);
            let hook = by.map(|by| Arc::new(RowWise(Push::new(site, by))) as Arc<dyn Intervention>);
            let requests = requests(hook);
            let expected: Vec<_> = requests.iter().map(|r| alone(&model, r)).collect();
            assert!(expected.iter().flatten().all(|s| s.logprob < 0.0));
            for (max_batch, max_batch_tokens) in CONFIGS {
                let config = EngineConfig {
                    max_batch,
                    max_batch_tokens,
                };
                assert_eq!(
                    run(&model, &requests, config),
                    expected,
                    "{name} {by:?} {config:?}"
                );
            }
            let mut turned = requests.clone();
            turned.reverse();
            let mut found = run(&model, &turned, EngineConfig::default());
            found.reverse();
            assert_eq!(found, expected, "{name} in another order");
        }
    }
}

#[test]
fn an_edit_changes_scores() {
    let model = model("qwen2/model.gguf", Precision::Fast);
    let push: Arc<dyn Intervention> = Arc::new(Push::new(Site::post(0), 0.25));
    let (base, pushed) = (requests(None), requests(Some(push)));
    let config = EngineConfig::default();
    assert_ne!(run(&model, &base, config), run(&model, &pushed, config));
}

#[test]
fn a_prompt_that_must_be_whole_is_whole() {
    let model = model("qwen2/model.gguf", Precision::Fast);
    let push: Arc<dyn Intervention> = Arc::new(Push::new(Site::post(0), 0.25));
    let requests = requests(Some(push));
    let expected: Vec<_> = requests.iter().map(|r| alone(&model, r)).collect();
    for (max_batch, max_batch_tokens) in CONFIGS {
        let config = EngineConfig {
            max_batch,
            max_batch_tokens,
        };
        let mut found = Vec::new();
        score(&model, &requests, config, |at, scored| {
            // One call, with all of the context.
            let seen = serde_json::json!([[0, requests[at].context.len(), false]]);
            assert_eq!(scored.audit, Some(seen));
            found.push(scored.scores.clone());
        })
        .unwrap();
        assert_eq!(found, expected);
    }
}

#[test]
fn what_can_not_run_is_refused_first() {
    let model = model("qwen2/model.gguf", Precision::Fast);
    let good = requests(None).remove(1);
    let bad = |change: &dyn Fn(&mut ScoreRequest)| {
        let mut r = good.clone();
        change(&mut r);
        let pair = [good.clone(), r];
        score(&model, &pair, EngineConfig::default(), |_, _| {
            panic!("it ran")
        })
        .unwrap_err()
    };
    assert!(matches!(
        bad(&|r| r.context.clear()),
        ModelError::Request { .. }
    ));
    assert!(matches!(
        bad(&|r| r.continuations.clear()),
        ModelError::Request { .. }
    ));
    assert!(matches!(
        bad(&|r| r.continuations[0].clear()),
        ModelError::Request { .. }
    ));
    assert!(matches!(
        bad(&|r| r.continuations[0][0] = 1 << 30),
        ModelError::TokenId { .. }
    ));
    let context = model.spec().context;
    assert!(matches!(
        bad(&|r| r.continuations[0] = vec![3; context]),
        ModelError::TooLong { .. }
    ));
}
