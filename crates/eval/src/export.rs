//! Results for other programs: CSV, and the JSON that lm-evaluation-harness writes.

use serde_json::{Map, Value, json};

use crate::results::Results;

/// All rows as CSV: `arm,suite,metric,value,lo,hi,n`.
pub fn csv(results: &Results) -> String {
    let mut text = String::from("arm,suite,metric,value,lo,hi,n\n");
    for r in &results.rows {
        let e = r.estimate;
        let names = [&r.arm, &r.suite, &r.metric].map(|s| quoted(s));
        text += &format!(
            "{},{},{},{},{}\n",
            names.join(","),
            e.value,
            e.lo,
            e.hi,
            e.n
        );
    }
    text
}

/// A field, in quotes if it needs them (RFC 4180).
fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

/// One arm's figures as lm-evaluation-harness writes them: `results` by task and `metric,filter`,
/// with standard errors, and `n-samples`.
pub fn lm_eval(results: &Results, arm: &str) -> Value {
    let (mut tasks, mut samples) = (Map::new(), Map::new());
    for r in results.rows.iter().filter(|r| r.arm == arm) {
        let (metric, filter) = match r.metric.as_str() {
            "mc1" | "mc2" => ("acc", "none"),
            "exact_match" => ("exact_match", "strict-match"),
            "exact_match_flexible" => ("exact_match", "flexible-extract"),
            other => (other, "none"),
        };
        let e = r.estimate;
        // Of a mean: what its interval was made of. Wilson's interval of a rate is not symmetric.
        let spread = if (e.lo + e.hi - 2.0 * e.value).abs() < 1e-9 {
            (e.hi - e.lo) / 2.0 / 1.959_963_984_540_054
        } else {
            (e.value * (1.0 - e.value) / (e.n as f64 - 1.0).max(1.0)).sqrt()
        };
        let task = tasks
            .entry(r.suite.clone())
            .or_insert_with(|| json!({ "alias": r.suite }));
        task[format!("{metric},{filter}")] = json!(e.value);
        task[format!("{metric}_stderr,{filter}")] = json!(spread);
        let cut = results.settings.cut.iter().find(|c| c.suite == r.suite);
        let original = cut.map_or(e.n, |c| c.of);
        samples.insert(
            r.suite.clone(),
            json!({ "original": original, "effective": e.n }),
        );
    }
    let s = &results.settings;
    json!({
        "results": tasks,
        "n-samples": samples,
        "config": { "model": "demur", "model_args": s.model, "limit": s.limit, "arm": arm },
        "demur_version": s.demur,
    })
}

#[cfg(test)]
mod tests {
    use demur_features::stats::{mean, wilson};

    use super::*;
    use crate::folder::{Cut, Settings};
    use crate::results::Row;
    use crate::suites::Pick;

    #[test]
    fn rows_for_others() {
        let row = |suite: &str, metric: &str, estimate| Row {
            arm: "a, b".to_owned(),
            suite: suite.to_owned(),
            metric: metric.to_owned(),
            estimate,
        };
        let rows = vec![
            row("gsm8k", "exact_match", wilson(1, 5)),
            row("truthfulqa_mc2", "mc2", mean(&[0.25, 0.75])),
        ];
        let results = Results {
            settings: Settings {
                cut: vec![Cut {
                    suite: "gsm8k".to_owned(),
                    items: 5,
                    of: 1319,
                    pick: Pick::First,
                }],
                ..Settings::default()
            },
            rows,
            versus_base: Vec::new(),
            losses: Vec::new(),
            agreement: Vec::new(),
        };
        let text = csv(&results);
        assert!(text.contains("\n\"a, b\",gsm8k,exact_match,0.2,"), "{text}");
        let found = lm_eval(&results, "a, b");
        let of = |task: &str, key: &str| found["results"][task][key].as_f64().unwrap();
        assert_eq!(of("gsm8k", "exact_match,strict-match"), 0.2);
        // sqrt(0.2 * 0.8 / 4), and sd / sqrt(n) = 0.3535.. / 1.4142..
        assert!((of("gsm8k", "exact_match_stderr,strict-match") - 0.2).abs() < 1e-12);
        assert!((of("truthfulqa_mc2", "acc_stderr,none") - 0.25).abs() < 1e-6);
        let samples = &found["n-samples"];
        assert_eq!(
            samples["gsm8k"],
            json!({ "original": 1319, "effective": 5 })
        );
        assert_eq!(samples["truthfulqa_mc2"]["original"], 2);
    }
}
