//! A plan in words, for a person to read before it runs.

use std::fmt::Write as _;

use crate::gate::Aggregate;
use crate::plan::{
    DirectionOp, ErrorTerm, InterventionSpec, LatentEdit, Op, Span, SteeringPlan, Unit,
};

/// Says in plain English what `plan` does, a sentence an intervention.
pub fn explain(plan: &SteeringPlan) -> String {
    if plan.interventions.is_empty() {
        return "Nothing is changed: the model runs as it is.".to_owned();
    }
    plan.interventions
        .iter()
        .map(sentence)
        .collect::<Vec<_>>()
        .join("\n")
}

fn sentence(spec: &InterventionSpec) -> String {
    let mut text = format!("At {}, {}", spec.site, span(&spec.span));
    if let Some(gate) = &spec.gate {
        let how = match gate.aggregate {
            Aggregate::Max => "largest",
            Aggregate::Mean => "mean",
            Aggregate::Last => "newest",
        };
        let _ = write!(
            text,
            ", when the {how} gate score of {} latent{} reaches {}{}",
            gate.weights.len(),
            if gate.weights.len() == 1 { "" } else { "s" },
            gate.threshold,
            if gate.latch {
                " (and from then on)"
            } else {
                ""
            }
        );
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
        let roles: Vec<String> = span
            .roles
            .iter()
            .map(|r| format!("{r:?}").to_lowercase())
            .collect();
        let _ = write!(text, " of role {}", roles.join(" or "));
    }
    if span.skip_first {
        text.push_str(" but the first");
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
}
