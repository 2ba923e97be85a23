//! A plan in words, for a person to read before it runs.

use std::fmt::Write as _;

use demur_model::hooks::Role;

use crate::gate::{Aggregate, Condition, Gate, Scope};
use crate::plan::{
    DirectionOp, ErrorTerm, InterventionSpec, LatentEdit, Op, Span, SteeringPlan, Unit,
};

/// Says in plain English what `plan` does: a sentence a gate, a sentence an intervention.
pub fn explain(plan: &SteeringPlan) -> String {
    if plan.interventions.is_empty() {
        return "Nothing is changed: the model runs as it is.".to_owned();
    }
    let gates = plan.gates.iter().map(|(name, g)| explain_gate(name, g));
    gates
        .chain(plan.interventions.iter().map(sentence))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Says in plain English when a gate is open.
pub fn explain_gate(name: &str, gate: &Gate) -> String {
    let what = match (gate.weights.len(), gate.aggregate) {
        (_, Aggregate::Attention) => {
            let read = gate
                .heads
                .iter()
                .flat_map(|h| h.query.iter().chain(&h.value));
            let mut sites: Vec<&str> = Vec::new();
            for probe in read {
                if !sites.contains(&probe.site.as_str()) {
                    sites.push(&probe.site);
                }
            }
            format!(
                "the sum of what {} head{} of attention take{} from the residual at {}",
                gate.heads.len(),
                if gate.heads.len() == 1 { "" } else { "s" },
                if gate.heads.len() == 1 { "s" } else { "" },
                sites.join(", ")
            )
        }
        (0, how) if !gate.probes.is_empty() => {
            let sites: Vec<&str> = gate.probes.iter().map(|p| p.site.as_str()).collect();
            format!(
                "the {} score of linear probes of the residual at {}",
                aggregate(how),
                sites.join(", ")
            )
        }
        (0, how) => format!("the {} cosine with its direction", aggregate(how)),
        (n, Aggregate::LatentMax) => {
            format!("the weighted sum of {n} latents' largest activations")
        }
        (n, how) => format!(
            "the {} score of {n} latent{}",
            aggregate(how),
            if n == 1 { "" } else { "s" }
        ),
    };
    let mut text = format!(
        "Gate '{name}' is open when, at {}, {what} reaches {}",
        gate.site, gate.threshold
    );
    if gate.hysteresis > 0.0 {
        let _ = write!(
            text,
            ", until it falls below {}",
            gate.threshold - gate.hysteresis
        );
    }
    if let Some(clear) = gate.clear {
        let _ = write!(text, ", and clear below {clear}");
    }
    if gate.latch {
        text.push_str(", and from then on");
    }
    text.push_str(match gate.scope {
        Scope::Conversation => "",
        Scope::Turn => "; each turn is judged anew",
    });
    let readers = match gate.roles.is_empty() {
        true => "user or template".to_owned(),
        false => roles(&gate.roles),
    };
    let _ = write!(text, ". It reads tokens of role {readers}");
    if gate.during_generation {
        text.push_str(" and the reply's");
    }
    text.push('.');
    text
}

fn aggregate(how: Aggregate) -> &'static str {
    match how {
        Aggregate::Max | Aggregate::LatentMax => "largest",
        Aggregate::Mean => "mean",
        Aggregate::Last => "newest",
        Aggregate::Attention => "attended",
    }
}

fn roles(roles: &[Role]) -> String {
    let names = roles.iter().map(|r| format!("{r:?}").to_lowercase());
    names.collect::<Vec<_>>().join(" or ")
}

fn condition(when: &Condition) -> String {
    let list = |list: &[Condition], word: &str| {
        let parts: Vec<String> = list.iter().map(condition).collect();
        match parts.len() {
            1 => parts.concat(),
            _ => format!("({})", parts.join(word)),
        }
    };
    match when {
        Condition::Gate(name) => format!("'{name}' is open"),
        Condition::Clear { clear } => format!("'{clear}' is clear"),
        Condition::All { all } => list(all, " and "),
        Condition::Any { any } => list(any, " or "),
        Condition::Not { not } => match &**not {
            Condition::Gate(name) => format!("'{name}' is not open"),
            Condition::Clear { clear } => format!("'{clear}' is not clear"),
            other => {
                let inner = condition(other);
                match inner.starts_with('(') {
                    true => format!("not {inner}"),
                    false => format!("not ({inner})"),
                }
            }
        },
    }
}

fn sentence(spec: &InterventionSpec) -> String {
    let mut text = format!("At {}, {}", spec.site, span(&spec.span));
    if let Some(when) = &spec.when {
        let _ = write!(text, ", when {}", condition(when));
    }
    text.push_str(": ");
    let mut parts: Vec<String> = spec.edits.iter().map(edit).collect();
    if let Some(d) = &spec.direction {
        parts.push(match d.op {
            DirectionOp::Add => format!("add {} along {}", d.value, d.name),
            DirectionOp::Ablate => format!("remove what lies along {}", d.name),
        });
    }
    text.push_str(&match (spec.error_term, parts.is_empty()) {
        (ErrorTerm::Dropped, true) => {
            "the residual is replaced by the SAE's reconstruction".to_owned()
        }
        (ErrorTerm::Dropped, false) => {
            format!("{}; the reconstruction error is dropped", parts.join(", "))
        }
        (ErrorTerm::Kept, _) => parts.join(", "),
    });
    if let Some(cap) = spec.max_edit_norm {
        let _ = write!(text, "; the change is at most {cap} of the residual's norm");
    }
    text.push('.');
    text
}

fn span(span: &Span) -> String {
    let mut text = match (span.prompt, span.generation) {
        (true, true) => "on every token of prompt and reply",
        (true, false) => "on the prompt's tokens",
        (false, _) => "on the reply's tokens",
    }
    .to_owned();
    if !span.roles.is_empty() {
        let _ = write!(text, " of role {}", roles(&span.roles));
    }
    if span.skip_first {
        text.push_str(" but the first");
    }
    match (span.from, span.to) {
        (0, None) => {}
        (from, None) => {
            let _ = write!(text, ", from position {from}");
        }
        (from, Some(to)) => {
            let _ = write!(text, ", from position {from} to before {to}");
        }
    }
    if let (true, Some(n)) = (span.generation, span.reply_tokens) {
        let _ = write!(text, ", only the first {n} of the reply");
    }
    text
}

fn edit(edit: &LatentEdit) -> String {
    let value = match edit.unit {
        Unit::Abs => format!("{}", edit.value),
        Unit::RelMax => format!("{} times its largest activation", edit.value),
        Unit::ResidNorm => format!("{} times the mean residual norm", edit.value),
    };
    let j = edit.latent;
    match edit.op {
        Op::Set => format!("latent {j} is set to {value}"),
        Op::Floor => format!("latent {j} is raised to at least {value}"),
        Op::Ceiling => format!("latent {j} is held to at most {value}"),
        Op::Scale => format!("latent {j} is multiplied by {}", edit.value),
        Op::Ablate => format!("latent {j} is set to zero"),
        Op::Add => format!("{value} of latent {j}'s direction is added"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clamp_reads_as_a_sentence() {
        let mut spec = InterventionSpec::at("blocks.3.hook_resid_post");
        spec.sae = Some("main".to_owned());
        spec.edits = vec![LatentEdit {
            latent: 5,
            op: Op::Set,
            value: 2.0,
            unit: Unit::RelMax,
        }];
        assert_eq!(
            explain(&SteeringPlan::single("c", spec)),
            "At blocks.3.hook_resid_post, on every token of prompt and reply but the first: \
             latent 5 is set to 2 times its largest activation."
        );
    }

    #[test]
    fn heads_read_as_a_sentence() {
        let gate = |heads: &str| -> Gate {
            let text = format!(
                "site = 'layers.3'\naggregate = 'attention'\nthreshold = 0.5\nroles = ['user']\nheads = [{heads}]"
            );
            toml::from_str(&text).unwrap()
        };
        let probes =
            "[{ site = 'layers.1', direction = [1.0] }, { site = 'layers.3', direction = [1.0] }]";
        let head = format!("{{ query = {probes}, value = {probes} }}");
        assert_eq!(
            explain_gate("g", &gate(&head)),
            "Gate 'g' is open when, at layers.3, the sum of what 1 head of attention takes from the \
             residual at layers.1, layers.3 reaches 0.5. It reads tokens of role user."
        );
        let two = explain_gate("g", &gate(&format!("{head}, {head}")));
        assert!(two.contains("2 heads of attention take from"), "{two}");
    }

    #[test]
    fn gates_and_conditions_read_as_sentences() {
        let plan = SteeringPlan::from_toml(
            r#"
            version = 1
            name = "gated"
            [gates.unsafe]
            site = "layers.3"
            sae = "main"
            weights = [{ latent = 1, weight = 2.0 }]
            aggregate = "mean"
            threshold = 0.5
            hysteresis = 0.25
            clear = 0.125
            roles = ["user"]
            scope = "turn"
            [[interventions]]
            site = "layers.3"
            sae = "main"
            edits = [{ latent = 5, op = "scale", value = 0.5 }]
            when = { all = ["unsafe", { not = { any = ["unsafe", { clear = "unsafe" }] } }] }
            span = { from = 2, to = 9, reply_tokens = 4 }
            "#,
        );
        assert_eq!(
            explain(&plan.unwrap()),
            "Gate 'unsafe' is open when, at layers.3, the mean score of 1 latent reaches 0.5, until it falls below 0.25, and clear below 0.125; each turn is judged anew. It reads tokens of role user.\n\
             At layers.3, on every token of prompt and reply but the first, from position 2 to \
             before 9, only the first 4 of the reply, when ('unsafe' is open and not ('unsafe' is \
             open or 'unsafe' is clear)): latent 5 is multiplied by 0.5."
        );
    }
}
