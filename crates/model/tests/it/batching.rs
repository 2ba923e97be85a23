//! Batch equals single, cached equals uncached, and a hook touches its own sequence only: bit for
//! bit, in the fast precision.

use demur_kernels::cache::CacheFormat;
use demur_kernels::linear::Precision;
use demur_model::ModelError;
use demur_model::decoder::{Capture, KvCache, LogitsAt, Model, SeqInput, Workspace};
use demur_model::hooks::{Intervention, Point, Role, Site};

use crate::support::{Push, forward, model};

const CHECKPOINTS: [&str; 10] = [
    "llama/model.gguf",
    "mistral",
    "qwen2/model.gguf",
    "qwen3",
    "phi3",
    "phi3-longrope",
    "phi3-longrope/model.gguf",
    "gemma2",
    "gemma3/model.gguf",
    "chat/model.gguf",
];

fn tokens(n: usize, seed: u32) -> Vec<u32> {
    (0..n as u32)
        .map(|i| 3 + (i * 31 + seed * 17) % 90)
        .collect()
}

fn expecting(model: &Model, length: usize) -> KvCache {
    let mut cache = model.new_cache();
    cache.expect(length);
    cache
}

#[test]
fn cached_equals_uncached() {
    for name in CHECKPOINTS {
        let mut model = model(name, Precision::Fast);
        let tokens = tokens(23, 1);
        for format in [CacheFormat::F32, CacheFormat::Bf16, CacheFormat::Int8] {
            model.set_cache_format(format);
            let whole = forward(&model, &tokens, &mut model.new_cache(), None, None);
            for piece in [1, 5, 22] {
                let mut cache = expecting(&model, tokens.len());
                let pieces = tokens.chunks(piece);
                let rows: Vec<f32> = pieces
                    .flat_map(|t| forward(&model, t, &mut cache, None, None))
                    .collect();
                assert!(rows == whole, "{name} in pieces of {piece}, {format:?}");
                assert_eq!(cache.len(), tokens.len());
            }
        }
    }
}

#[test]
fn a_rounded_cache_is_smaller_and_near() {
    let mut model = model("qwen2/model.gguf", Precision::F32);
    let tokens = tokens(23, 1);
    let mut run = |format| {
        model.set_cache_format(format);
        let per_token = model.memory().cache_per_token;
        (
            forward(&model, &tokens, &mut model.new_cache(), None, None),
            per_token,
        )
    };
    let (exact, bytes) = run(CacheFormat::F32);
    for (format, share, bound) in [
        (CacheFormat::Bf16, 0.5, 0.02),
        (CacheFormat::Int8, 0.375, 0.05),
    ] {
        let (rows, rounded) = run(format);
        assert!(
            rounded as f64 <= share * bytes as f64,
            "{format:?}: {rounded} of {bytes}"
        );
        let scale = exact.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let off = exact.iter().zip(&rows).map(|(a, b)| (a - b).abs());
        let off = off.fold(0.0f32, f32::max);
        assert!(
            off > 0.0 && off <= bound * scale,
            "{format:?}: {off} of {scale}"
        );
    }
}

#[test]
fn batch_equals_single() {
    for name in CHECKPOINTS {
        let model = model(name, Precision::Fast);
        // (tokens in the cache, new tokens)
        let shapes = [(0, 20), (7, 1), (0, 1), (19, 3), (2, 9)];
        let all: Vec<Vec<u32>> = (0..)
            .zip(shapes)
            .map(|(i, s)| tokens(s.0 + s.1, i))
            .collect();
        let prefilled = || -> Vec<KvCache> {
            let caches = all.iter().zip(shapes).map(|(t, (old, _))| {
                let mut cache = expecting(&model, t.len());
                if old > 0 {
                    forward(&model, &t[..old], &mut cache, None, None);
                }
                cache
            });
            caches.collect()
        };
        let mut alone = Vec::new();
        for ((cache, t), (old, _)) in prefilled().iter_mut().zip(&all).zip(shapes) {
            alone.extend(forward(&model, &t[old..], cache, None, None));
        }
        let roles = [Role::User; 20];
        let mut caches = prefilled();
        let mut seqs: Vec<SeqInput<'_>> = caches
            .iter_mut()
            .zip(&all)
            .zip(shapes)
            .map(|((cache, t), (old, new))| SeqInput {
                tokens: &t[old..],
                roles: &roles[..new],
                generated: false,
                cache,
                hook: None,
                hook_sites: &[],
                logits: LogitsAt::All,
            })
            .collect();
        let mut ws = Workspace::default();
        let together = model.forward(&mut seqs, None, &mut ws).unwrap();
        let together: Vec<f32> = together.rows().flatten().copied().collect();
        assert!(together == alone, "{name}");
    }
}

#[test]
fn only_rows_that_ask_get_logits() {
    let model = model("qwen3", Precision::Fast);
    let (t, roles) = (tokens(6, 1), [Role::User; 6]);
    let all = forward(&model, &t, &mut model.new_cache(), None, None);
    let d_vocab = model.spec().d_vocab;
    let mut caches = [model.new_cache(), model.new_cache(), model.new_cache()];
    let wanted = [LogitsAt::None, LogitsAt::Last, LogitsAt::All];
    let mut seqs: Vec<SeqInput<'_>> = caches
        .iter_mut()
        .zip(wanted)
        .map(|(cache, logits)| SeqInput {
            tokens: &t,
            roles: &roles,
            generated: false,
            cache,
            hook: None,
            hook_sites: &[],
            logits,
        })
        .collect();
    let mut ws = Workspace::default();
    let rows: Vec<&[f32]> = model
        .forward(&mut seqs, None, &mut ws)
        .unwrap()
        .rows()
        .collect();
    assert_eq!(rows.len(), 7);
    assert_eq!(rows[0], &all[5 * d_vocab..]);
    assert_eq!(rows[1..].concat(), all);
}

#[test]
fn a_hook_edits_its_own_sequence() {
    let model = model("gemma2", Precision::Fast);
    let t = tokens(9, 2);
    let base = forward(&model, &t, &mut model.new_cache(), None, None);
    let site = Site::post(1);
    let hooked = |by: f32, site: Site| {
        let push = Push::new(site, by);
        let mut state = push.start();
        let hook = Some((state.as_mut(), push.sites()));
        forward(&model, &t, &mut model.new_cache(), hook, None)
    };
    assert!(hooked(0.0, site) == base, "adding zero");
    assert!(hooked(2.0, site) != base, "adding two");
    let elsewhere = Site {
        layer: 1,
        point: Point::Mid,
    };
    assert!(
        hooked(2.0, elsewhere) != hooked(2.0, site),
        "the site matters"
    );

    // Beside two others, the hooked one is as alone, and they are as without it.
    let push = Push::new(site, 2.0);
    let mut state = push.start();
    let roles = [Role::User; 9];
    let mut caches = [model.new_cache(), model.new_cache(), model.new_cache()];
    let mut states = [None, Some(state.as_mut()), None].into_iter();
    let mut seqs: Vec<SeqInput<'_>> = caches
        .iter_mut()
        .map(|cache| SeqInput {
            tokens: &t,
            roles: &roles,
            generated: false,
            cache,
            hook: states.next().flatten(),
            hook_sites: push.sites(),
            logits: LogitsAt::All,
        })
        .collect();
    let mut ws = Workspace::default();
    let together = model.forward(&mut seqs, None, &mut ws).unwrap();
    let together: Vec<f32> = together.rows().flatten().copied().collect();
    assert!(together == [base.clone(), hooked(2.0, site), base].concat());
}

#[test]
fn capture_sees_what_later_layers_see() {
    let model = model("qwen2", Precision::Fast);
    let (t, d) = (tokens(5, 3), model.spec().d_model);
    let sites = vec![
        "blocks.1.hook_resid_pre".parse().unwrap(),
        Site {
            layer: 0,
            point: Point::Mid,
        },
        Site::post(0),
    ];
    let run = |stop_after_last, by| {
        let push = Push::new(Site::post(0), by);
        let mut state = push.start();
        let mut capture = Capture {
            sites: sites.clone(),
            stop_after_last,
            ..Capture::default()
        };
        let mut cache = model.new_cache();
        let hook = Some((state.as_mut(), push.sites()));
        let logits = forward(&model, &t, &mut cache, hook, Some(&mut capture));
        (capture.rows, logits, cache)
    };
    let (plain, logits, _) = run(false, 0.0);
    let (pushed, ..) = run(false, 1.5);
    assert!(
        plain[0] == plain[2],
        "resid_pre of a block is resid_post of the one before"
    );
    assert!(pushed[1] == plain[1], "before the edit");
    assert!(
        pushed[2].iter().zip(&plain[2]).all(|(a, b)| *a == b + 1.5),
        "after the edit"
    );
    let last = {
        let mut capture = Capture {
            sites: vec![Site::post(1)],
            ..Capture::default()
        };
        forward(&model, &t, &mut model.new_cache(), None, Some(&mut capture));
        capture.rows.remove(0)
    };
    let lens: Vec<f32> = last
        .chunks(d)
        .flat_map(|row| model.unembed_row(row))
        .collect();
    assert!(
        lens == logits,
        "the logit lens of the last site is the output"
    );

    // Stopping early captures the same and computes no logits.
    let (early, none, _) = run(true, 1.5);
    assert!(early == pushed && none.is_empty());

    // What goes on from such a cache to the same site is as in one pass; further it can't.
    let mut cache = model.new_cache();
    let mut parts = vec![Vec::new(); sites.len()];
    for part in [&t[..2], &t[2..]] {
        let mut capture = Capture {
            sites: sites.clone(),
            stop_after_last: true,
            ..Capture::default()
        };
        forward(&model, part, &mut cache, None, Some(&mut capture));
        for (all, rows) in parts.iter_mut().zip(capture.rows) {
            all.extend(rows);
        }
    }
    assert!(parts == plain && cache.len() == t.len());
    let input = SeqInput {
        tokens: &t[..1],
        roles: &[Role::User],
        generated: false,
        cache: &mut cache,
        hook: None,
        hook_sites: &[],
        logits: LogitsAt::Last,
    };
    let mut ws = Workspace::default();
    let further = model.forward(&mut [input], None, &mut ws);
    let e = further.unwrap_err().to_string();
    assert!(e.contains("the first 1 of"), "{e}");
    cache.clear();
    let after = forward(&model, &t, &mut cache, None, None);
    assert!(after == logits, "cleared, it is as new");
}

#[test]
fn what_cannot_run_is_refused() {
    let model = model("llama", Precision::Fast);
    let other = crate::support::model("gemma3", Precision::Fast);
    let refuse = |tokens: &[u32], roles: &[Role], mut cache: KvCache, sites: Vec<Site>| {
        let mut seqs = [SeqInput {
            tokens,
            roles,
            generated: false,
            cache: &mut cache,
            hook: None,
            hook_sites: &[],
            logits: LogitsAt::Last,
        }];
        let mut capture = Capture {
            sites,
            ..Capture::default()
        };
        let mut ws = Workspace::default();
        let result = model.forward(&mut seqs, Some(&mut capture), &mut ws);
        result.map(|_| ()).unwrap_err()
    };
    let context = model.spec().context;
    let new = || model.new_cache();
    let user = |n| vec![Role::User; n];
    assert!(matches!(
        refuse(&[], &[], new(), vec![]),
        ModelError::Request { .. }
    ));
    assert!(matches!(
        refuse(&[1, 2], &user(1), new(), vec![]),
        ModelError::Request { .. }
    ));
    assert!(matches!(
        refuse(&[1, 96], &user(2), new(), vec![]),
        ModelError::TokenId {
            id: 96,
            d_vocab: 96
        }
    ));
    let long = refuse(&vec![1; context + 1], &user(context + 1), new(), vec![]);
    assert!(matches!(long, ModelError::TooLong { tokens, context: c } if tokens == c + 1));
    assert!(matches!(
        refuse(&[1], &user(1), new(), vec![Site::post(2)]),
        ModelError::SiteLayer { last: 1, .. }
    ));
    assert!(matches!(
        refuse(&[1], &user(1), other.new_cache(), vec![]),
        ModelError::Request { .. }
    ));
}

#[test]
fn memory_is_accounted_for() {
    let model = model("chat/model.gguf", Precision::Fast);
    let report = model.memory();
    assert!(report.weights as f64 <= 1.5 * report.checkpoint as f64);
    let mut cache = model.new_cache();
    forward(&model, &tokens(40, 1), &mut cache, None, None);
    let used = 40 * report.cache_per_token;
    assert!(
        (used..=2 * used).contains(&cache.bytes()),
        "{}",
        cache.bytes()
    );
}
