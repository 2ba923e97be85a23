//! What changed between two plans, place by place, for a person who reviews one.

use serde_json::Value;

use crate::plan::SteeringPlan;

/// One place at which two plans differ.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Where, for instance `interventions[0].edits[1].value`.
    pub place: String,
    /// What the first plan has there; nothing, if the second added it.
    pub before: Option<Value>,
    /// What the second plan has there; nothing, if it was taken out.
    pub after: Option<Value>,
}

/// The places at which `first` and `second` differ, in the order of the format. Defaults count as
/// written out, so a plan that states one equals a plan that leaves it out.
pub fn diff(first: &SteeringPlan, second: &SteeringPlan) -> Vec<Change> {
    let json = |plan| serde_json::to_value(plan).unwrap_or_default();
    let mut changes = Vec::new();
    compare("", Some(&json(first)), Some(&json(second)), &mut changes);
    changes
}

fn compare(place: &str, before: Option<&Value>, after: Option<&Value>, out: &mut Vec<Change>) {
    match (before, after) {
        (Some(a), Some(b)) if a == b => {}
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            let added = b.keys().filter(|k| !a.contains_key(*k));
            for key in a.keys().chain(added) {
                let dot = if place.is_empty() { "" } else { "." };
                compare(&format!("{place}{dot}{key}"), a.get(key), b.get(key), out);
            }
        }
        // A vector is one thing; a list of tables is compared entry by entry.
        (Some(Value::Array(a)), Some(Value::Array(b)))
            if a.iter().chain(b).all(Value::is_object) =>
        {
            for i in 0..a.len().max(b.len()) {
                compare(&format!("{place}[{i}]"), a.get(i), b.get(i), out);
            }
        }
        (before, after) => out.push(Change {
            place: place.to_owned(),
            before: before.cloned(),
            after: after.cloned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: &str = r#"
        version = 1
        name = "clamp"
        [gates.unsafe]
        site = "layers.1"
        sae = "main"
        weights = [{ latent = 3, weight = 1.0 }]
        threshold = 0.5
        [[interventions]]
        site = "layers.1"
        sae = "main"
        edits = [{ latent = 7, op = "set", value = 2.0 }, { latent = 8, op = "ablate" }]
        when = "unsafe"
    "#;

    #[track_caller]
    fn check(from: &str, to: &str, expected: &[(&str, &str, &str)]) {
        let second = PLAN.replace(from, to);
        let plans = [PLAN, &second].map(|text| SteeringPlan::from_toml(text).unwrap());
        let value = |text: &str| (text != "-").then(|| serde_json::from_str(text).unwrap());
        let expected: Vec<Change> = expected
            .iter()
            .map(|(place, before, after)| Change {
                place: (*place).to_owned(),
                before: value(before),
                after: value(after),
            })
            .collect();
        assert_eq!(diff(&plans[0], &plans[1]), expected);
    }

    #[test]
    fn places_are_named() {
        check("x", "x", &[]);
        check("value = 2.0", "value = 2.0, unit = \"abs\"", &[]);
        check(
            "value = 2.0",
            "value = 2.5",
            &[("interventions[0].edits[0].value", "2.0", "2.5")],
        );
        check(
            "when = \"unsafe\"",
            "when = { not = \"unsafe\" }",
            &[("interventions[0].when", "\"unsafe\"", r#"{"not":"unsafe"}"#)],
        );
        let edit = r#"{"latent":8,"op":"ablate","unit":"abs","value":0.0}"#;
        check(
            ", { latent = 8, op = \"ablate\" }",
            "",
            &[("interventions[0].edits[1]", edit, "-")],
        );
        check(
            "when = \"unsafe\"",
            "max_edit_norm = 0.5",
            &[
                ("interventions[0].when", "\"unsafe\"", "-"),
                ("interventions[0].max_edit_norm", "-", "0.5"),
            ],
        );
    }
}
