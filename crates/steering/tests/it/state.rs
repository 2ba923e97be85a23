//! What a compiled plan does to rows, by hand: two latents that are the two coordinates.

use std::collections::BTreeMap;
use std::sync::Arc;

use demur_model::hooks::{Intervention, InterventionState, Role, Rows, Site};
use demur_sae::arch::{Activation, InputNorm, Wiring};
use demur_sae::{Sae, SaeConfig};
use demur_steering::{CompiledPlan, SaeEntry, SaeSet, SteeringError, SteeringPlan, compile};

/// An SAE whose latents are the coordinates, both in the top k.
fn saes() -> SaeSet {
    let cfg = SaeConfig {
        d_model: 2,
        d_sae: 2,
        k: 2,
        hook_name: "blocks.1.hook_resid_post".to_owned(),
        model_name: "none".to_owned(),
    };
    let eye = vec![1.0, 0.0, 0.0, 1.0];
    let sae = Sae::new(cfg, eye.clone(), vec![0.0; 2], eye, vec![0.0; 2]).unwrap();
    let entry = SaeEntry {
        sae: Arc::new(sae),
        sha256: String::new(),
        max_activation: None,
        resid_norm: None,
    };
    BTreeMap::from([("main".to_owned(), entry)])
}

/// Latent 0 says what a token is; above 1 it is unsafe. Latent 1 is the refusal.
const PLAN: &str = r#"
version = 1
name = "clamp what is unsafe, damp the rest"
[gates.unsafe]
site = "layers.0"
sae = "main"
weights = [{ latent = 0, weight = 1.0 }]
threshold = 1.0
roles = ["user"]
[[interventions]]
site = "layers.1"
sae = "main"
edits = [{ latent = 1, op = "floor", value = 4.0 }]
when = "unsafe"
[[interventions]]
site = "layers.1"
sae = "main"
edits = [{ latent = 1, op = "scale", value = 0.5 }]
when = { not = "unsafe" }
"#;

fn plan(change: impl Fn(&mut SteeringPlan)) -> Result<CompiledPlan, SteeringError> {
    let mut plan = SteeringPlan::from_toml(PLAN)?;
    change(&mut plan);
    compile(&plan, &saes(), 3, 2)
}

/// A conversation as its state sees it, pass by pass.
struct Talk {
    state: Box<dyn InterventionState>,
    pos: usize,
}

impl Talk {
    fn new(plan: &CompiledPlan) -> Self {
        let state = plan.start();
        Self { state, pos: 0 }
    }

    /// Runs rows of `(role, latent 0, latent 1)` through both layers; gives latent 1 after them.
    fn pass(&mut self, generated: bool, tokens: &[(Role, f32, f32)]) -> Vec<f32> {
        let roles: Vec<Role> = tokens.iter().map(|t| t.0).collect();
        let rows = Rows {
            start_pos: self.pos,
            tokens: &vec![0; tokens.len()],
            roles: &roles,
            generated,
        };
        let mut resid: Vec<f32> = tokens.iter().flat_map(|t| [t.1, t.2]).collect();
        self.state.edit(Site::post(0), &rows, &mut resid);
        self.state.edit(Site::post(1), &rows, &mut resid);
        self.pos += tokens.len();
        resid.chunks(2).map(|x| x[1]).collect()
    }
}

const BOS: (Role, f32, f32) = (Role::Template, 9.0, 2.0);

#[test]
fn one_gate_clamps_and_damps() {
    let plan = plan(|_| {}).unwrap();
    assert_eq!(plan.sites(), [Site::post(0), Site::post(1)]);
    // The sink at position 0 is neither read nor edited; the template is not read but edited.
    let mut safe = Talk::new(&plan);
    let prompt = [BOS, (Role::User, 0.5, 2.0), (Role::Template, 3.0, 6.0)];
    assert_eq!(safe.pass(false, &prompt), [2.0, 1.0, 3.0]);
    assert_eq!(safe.pass(true, &[(Role::Assistant, 5.0, 8.0)]), [4.0]);
    let mut not_safe = Talk::new(&plan);
    let prompt = [BOS, (Role::User, 0.5, 2.0), (Role::User, 1.5, 6.0)];
    assert_eq!(not_safe.pass(false, &prompt), [2.0, 4.0, 6.0]);
    assert_eq!(not_safe.pass(true, &[(Role::Assistant, 0.0, 8.0)]), [8.0]);
    let audit = not_safe.state.audit().unwrap();
    let gate = &audit["gates"][0];
    assert_eq!(
        (gate["score"].as_f64(), gate["fired"].as_bool()),
        (Some(1.5), Some(true))
    );
    assert_eq!(gate["changes"][0]["pos"], 2);
    let clamp = &audit["interventions"][0];
    assert_eq!(
        (&clamp["on"], &clamp["tokens_edited"]),
        (&true.into(), &3.into())
    );
    let latent = &clamp["latents"][0];
    let mean = |key: &str| latent[key].as_f64().unwrap();
    assert!((mean("mean_before") - 16.0 / 3.0).abs() < 1e-9, "{latent}");
    assert!((mean("mean_after") - 18.0 / 3.0).abs() < 1e-9, "{latent}");
    assert_eq!(audit["interventions"][1]["tokens_edited"], 0);
}

/// A safe turn after an unsafe one, each as a pass of its own.
fn second_turn(change: impl Fn(&mut demur_steering::Gate)) -> f32 {
    let plan = plan(|p| change(p.gates.get_mut("unsafe").unwrap())).unwrap();
    let mut talk = Talk::new(&plan);
    talk.pass(false, &[BOS, (Role::User, 2.0, 2.0)]);
    talk.pass(true, &[(Role::Assistant, 0.0, 2.0)]);
    talk.pass(false, &[(Role::Template, 0.0, 2.0), (Role::User, 0.0, 2.0)])[1]
}

#[test]
fn turns_are_judged_anew_if_asked() {
    use demur_steering::Scope::Turn;
    assert_eq!(second_turn(|_| {}), 4.0, "the conversation's maximum stays");
    assert_eq!(second_turn(|g| g.scope = Turn), 1.0);
    assert_eq!(second_turn(|g| (g.scope, g.latch) = (Turn, true)), 4.0);
    // The same in one pass: the first turn latches though the last is safe.
    for (latch, expected) in [(false, 1.0), (true, 4.0)] {
        let change = |p: &mut SteeringPlan| {
            let gate = p.gates.get_mut("unsafe").unwrap();
            (gate.scope, gate.latch) = (Turn, latch);
        };
        let mut talk = Talk::new(&plan(change).unwrap());
        let turns = [
            BOS,
            (Role::User, 2.0, 2.0),
            (Role::Assistant, 0.0, 2.0),
            (Role::User, 0.0, 2.0),
        ];
        assert_eq!(talk.pass(false, &turns)[3], expected);
    }
}

#[test]
fn a_reply_can_open_a_gate_in_the_middle() {
    let change = |p: &mut SteeringPlan| {
        p.gates.get_mut("unsafe").unwrap().during_generation = true;
        p.interventions[0].span.reply_tokens = Some(2);
    };
    let mut talk = Talk::new(&plan(change).unwrap());
    talk.pass(false, &[BOS, (Role::User, 0.0, 2.0)]);
    let mut reply = |f: f32| talk.pass(true, &[(Role::Assistant, f, 2.0)])[0];
    assert_eq!(reply(0.0), 1.0, "closed: damped");
    assert_eq!(reply(1.0), 4.0, "open: clamped");
    assert_eq!(
        reply(0.0),
        2.0,
        "open, but beyond the first two tokens of the reply"
    );
}

#[test]
fn between_open_and_clear_nothing_is_edited() {
    let clear = |p: &mut SteeringPlan| {
        p.gates.get_mut("unsafe").unwrap().clear = Some(0.5);
        p.interventions[1].when = Some(demur_steering::Condition::Clear {
            clear: "unsafe".to_owned(),
        });
    };
    let compiled = plan(clear).unwrap();
    for (score, expected) in [(0.25, 1.0), (0.5, 2.0), (0.75, 2.0), (1.0, 4.0)] {
        let mut talk = Talk::new(&compiled);
        let found = talk.pass(false, &[BOS, (Role::User, score, 2.0)])[1];
        assert_eq!(found, expected, "at {score}");
        let gate = &talk.state.audit().unwrap()["gates"][0];
        assert_eq!(gate["clear"], score < 0.5);
    }
    let never = plan(|p| {
        clear(p);
        p.gates.get_mut("unsafe").unwrap().clear = None;
    });
    assert!(never.unwrap_err().to_string().contains("never clear"));
}

#[test]
fn a_direction_can_be_a_gate() {
    let change = |threshold: f32| {
        move |p: &mut SteeringPlan| {
            let gate = p.gates.get_mut("unsafe").unwrap();
            (gate.weights, gate.direction) = (Vec::new(), vec![3.0, 4.0]);
            gate.threshold = threshold;
        }
    };
    // cos((1, 0), (3, 4)) = 0.6
    for (threshold, expected) in [(0.59, 4.0), (0.61, 0.0)] {
        let mut talk = Talk::new(&plan(change(threshold)).unwrap());
        assert_eq!(
            talk.pass(false, &[BOS, (Role::User, 1.0, 0.0)])[1],
            expected
        );
    }
}

#[test]
fn probes_at_several_sites_are_one_score() {
    use demur_steering::{Aggregate, Probe};
    let probe = |site: &str, direction: [f32; 2]| Probe {
        site: site.to_owned(),
        direction: direction.to_vec(),
    };
    let change = |threshold: f32, second: &'static str| {
        move |p: &mut SteeringPlan| {
            let gate = p.gates.get_mut("unsafe").unwrap();
            gate.weights.clear();
            gate.probes = vec![probe("layers.0", [1.0, 0.0]), probe(second, [0.0, 0.5])];
            (gate.site, gate.aggregate) = ("layers.1".to_owned(), Aggregate::Mean);
            gate.threshold = threshold;
        }
    };
    // The first token gives 0.5 + 1, the second 1.5 + 3: 3 on the mean. The template is not read.
    let prompt = [
        BOS,
        (Role::User, 0.5, 2.0),
        (Role::User, 1.5, 6.0),
        (Role::Template, 9.0, 9.0),
    ];
    for second in ["layers.0", "layers.1"] {
        for (threshold, open) in [(2.99, true), (3.01, false)] {
            let compiled = plan(change(threshold, second)).unwrap();
            let mut talk = Talk::new(&compiled);
            talk.pass(false, &prompt);
            // The reply is not read, and the next turn's rows are its own.
            talk.pass(true, &[(Role::Assistant, 50.0, 50.0)]);
            talk.pass(false, &[(Role::User, 0.5, 5.0)]);
            let gate = &talk.state.audit().unwrap()["gates"][0];
            assert_eq!(gate["open"], open);
            assert!(
                (gate["score"].as_f64().unwrap() - 3.0).abs() < 1e-6,
                "{gate}"
            );
        }
    }
    let e = plan(change(0.0, "layers.2")).unwrap_err().to_string();
    assert!(e.contains("probes[1]") && e.contains("blocks.2"), "{e}");
    let both = plan(|p| {
        let gate = p.gates.get_mut("unsafe").unwrap();
        gate.probes = vec![probe("layers.0", [1.0, 0.0])];
    });
    assert!(both.unwrap_err().to_string().contains("one of the four"));
    let infinite = plan(|p| {
        change(0.0, "layers.1")(p);
        p.gates.get_mut("unsafe").unwrap().probes[0].direction[1] = f32::INFINITY;
    });
    assert!(infinite.unwrap_err().to_string().contains("probes"));
}

#[test]
fn heads_at_several_sites_are_one_score() {
    use demur_steering::{Aggregate, Head, Probe};
    let probe = |site: &str, direction: [f32; 2]| Probe {
        site: site.to_owned(),
        direction: direction.to_vec(),
    };
    let attend = |late: &'static str| {
        move |p: &mut SteeringPlan| {
            let gate = p.gates.get_mut("unsafe").unwrap();
            gate.weights.clear();
            // Of the first site the query and half of the value, of the second the other half.
            gate.heads = vec![
                Head {
                    query: vec![probe("layers.0", [2f32.ln(), 0.0])],
                    value: vec![probe("layers.0", [0.0, 0.5]), probe(late, [0.0, 0.5])],
                },
                Head {
                    query: vec![],
                    value: vec![probe("layers.1", [1.0, 0.0])],
                },
            ];
            (gate.site, gate.aggregate) = ("layers.1".to_owned(), Aggregate::Attention);
            gate.threshold = 6.0;
        }
    };
    let compiled = plan(attend("layers.1")).unwrap();
    let mut talk = Talk::new(&compiled);
    // Weights 2 : 8 of 3 and 6, and the mean of 1 and 3.
    let prompt = [
        BOS,
        (Role::User, 1.0, 3.0),
        (Role::User, 3.0, 6.0),
        (Role::Template, 9.0, 9.0),
    ];
    talk.pass(false, &prompt);
    let gate = &talk.state.audit().unwrap()["gates"][0];
    let expected = (2.0 * 3.0 + 8.0 * 6.0) / 10.0 + 2.0;
    assert!(
        (gate["score"].as_f64().unwrap() - expected).abs() < 1e-5,
        "{gate}"
    );
    assert_eq!(gate["open"], true);
    let e = plan(attend("layers.2")).unwrap_err().to_string();
    assert!(
        e.contains("heads[0].value[1]") && e.contains("blocks.2"),
        "{e}"
    );
    let mean = plan(|p| {
        attend("layers.1")(p);
        p.gates.get_mut("unsafe").unwrap().aggregate = Aggregate::Mean;
    });
    assert!(mean.unwrap_err().to_string().contains("attention"));
}

/// Without gates a prompt may come in pieces: rows and audit are as if it came whole.
#[test]
fn a_plan_without_gates_does_not_see_the_cuts() {
    let plan = plan(|p| {
        p.gates.clear();
        p.interventions.iter_mut().for_each(|i| i.when = None);
    })
    .unwrap();
    assert!(plan.row_wise());
    let prompt = [BOS, (Role::User, 0.5, 2.3), (Role::User, 1.7, 0.9)];
    let mut whole = Talk::new(&plan);
    let expected = whole.pass(false, &prompt);
    for cut in 1..prompt.len() {
        let mut pieces = Talk::new(&plan);
        let mut found = pieces.pass(false, &prompt[..cut]);
        let mut copy = Talk {
            state: pieces.state.fork(),
            pos: pieces.pos,
        };
        found.extend(copy.pass(false, &prompt[cut..]));
        assert_eq!(found, expected);
        assert_eq!(copy.state.audit(), whole.state.audit());
    }
}

#[test]
fn a_copy_goes_its_own_way() {
    let mut talk = Talk::new(&plan(|_| {}).unwrap());
    talk.pass(false, &[BOS, (Role::User, 0.0, 2.0)]);
    let mut copy = Talk {
        state: talk.state.fork(),
        pos: talk.pos,
    };
    let more = [(Role::User, 2.0, 2.0)];
    assert_eq!(copy.pass(false, &more), [4.0]);
    assert_eq!(talk.pass(true, &[(Role::Assistant, 2.0, 2.0)]), [1.0]);
}

#[test]
fn what_does_not_fit_is_named() {
    let refused = |change: fn(&mut SteeringPlan), expect: &str| {
        let e = plan(change).unwrap_err().to_string();
        assert!(e.contains(expect), "{e}");
    };
    refused(
        |p| p.gates.get_mut("unsafe").unwrap().site = "layers.2".to_owned(),
        "reads blocks.2.hook_resid_post, after",
    );
    refused(
        |p| p.gates.get_mut("unsafe").unwrap().weights[0].latent = 2,
        "gates.unsafe: latent 2",
    );
    refused(
        |p| p.gates.get_mut("unsafe").unwrap().sae = Some("other".to_owned()),
        "SAE 'other'",
    );
    refused(|p| p.gates.clear(), "gate 'unsafe'");
    refused(
        |p| {
            let gate = p.gates.get_mut("unsafe").unwrap();
            (gate.weights, gate.direction) = (Vec::new(), vec![1.0; 3]);
        },
        "width 3",
    );
}

#[test]
fn an_sae_that_normalises_is_edited_in_the_rows_own_scale() {
    // Rows are brought to a norm of sqrt(2); (3, 4) becomes (3, 4) sqrt(2) / 5, its unit 5 / sqrt(2).
    let cfg = SaeConfig {
        d_model: 2,
        d_sae: 2,
        k: 2,
        hook_name: "blocks.1.hook_resid_post".to_owned(),
        model_name: "none".to_owned(),
    };
    let eye = vec![1.0, 0.0, 0.0, 1.0];
    let wiring = Wiring {
        input_norm: InputNorm::ConstantNormRescale,
        ..Wiring::default()
    };
    let (activation, zeros) = (Activation::TopK { k: 2 }, vec![0.0; 2]);
    let sae = Sae::of(
        cfg,
        activation,
        wiring,
        eye.clone(),
        zeros.clone(),
        eye,
        zeros,
    )
    .unwrap();
    let mut saes = saes();
    saes.get_mut("main").unwrap().sae = Arc::new(sae);
    let plan = SteeringPlan::from_toml(
        r#"
version = 1
name = "set"
[[interventions]]
site = "layers.1"
sae = "main"
edits = [{ latent = 0, op = "set", value = 2.0 }]
span = { prompt = true, skip_first = false }
"#,
    )
    .unwrap();
    let plan = compile(&plan, &saes, 3, 2).unwrap();
    let mut state = plan.start();
    let rows = Rows {
        start_pos: 1,
        tokens: &[7],
        roles: &[Role::User],
        generated: false,
    };
    let mut x = [3.0, 4.0];
    state.edit(Site::post(1), &rows, &mut x);
    let unit = 5.0 / 2f32.sqrt();
    assert!((x[0] - 2.0 * unit).abs() < 1e-5, "{x:?}");
    assert_eq!(x[1], 4.0);
    // The audit speaks of activations, whatever the row's scale.
    let latent = &state.audit().unwrap()["interventions"][0]["latents"][0];
    let close = |key: &str, expected: f64| {
        let found = latent[key].as_f64().unwrap();
        assert!((found - expected).abs() < 1e-5, "{key}: {found}");
    };
    close("mean_before", 3.0 * 2f64.sqrt() / 5.0);
    close("mean_after", 2.0);
}
