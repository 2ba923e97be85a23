//! Plans that are not what they should be: a plan or an error, never a panic.

mod state;

use demur_steering::{SteeringPlan, explain};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

const PLAN: &str = r#"
version = 1
name = "clamp"
[saes]
main = "0123"
[[interventions]]
site = "blocks.6.hook_resid_post"
sae = "main"
error_term = "kept"
edits = [{ latent = 7, op = "set", value = 2.5, unit = "rel_max" }]
[interventions.span]
prompt = true
roles = ["user"]
"#;

fn flip(bytes: &mut [u8], flips: &[(Index, u8)]) {
    for (at, bit) in flips {
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << (bit % 8);
    }
}

/// Reads a text both ways; what is taken for a plan can be told, written and read again.
fn read(text: &str) -> Result<(), TestCaseError> {
    let read = [SteeringPlan::from_toml(text), SteeringPlan::from_json(text)];
    for plan in read.into_iter().flatten() {
        prop_assert!(!explain(&plan).is_empty());
        let again = SteeringPlan::from_toml(&plan.to_toml().unwrap()).unwrap();
        prop_assert_eq!(again.sha256(), plan.sha256());
    }
    Ok(())
}

#[test]
fn what_is_broken_here_was_whole() {
    SteeringPlan::from_toml(PLAN).unwrap();
}

#[test]
fn nested_without_end() {
    for text in ["[", "{\"a\":", "a = [", "a = {a = "] {
        let deep = text.repeat(100_000);
        assert!(SteeringPlan::from_toml(&deep).is_err());
        assert!(SteeringPlan::from_json(&deep).is_err());
        assert!(SteeringPlan::from_toml(&format!("x = {deep}")).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flips_and_cuts(flips in vec((any::<Index>(), any::<u8>()), 0..4), part in 0.0..1.5f64) {
        let json = serde_json::to_string(&SteeringPlan::from_toml(PLAN).unwrap()).unwrap();
        for text in [PLAN, &json] {
            let mut bytes = text.as_bytes().to_vec();
            flip(&mut bytes, &flips);
            bytes.truncate((bytes.len() as f64 * part) as usize);
            read(&String::from_utf8_lossy(&bytes))?;
        }
    }

    #[test]
    fn numbers(value in prop_oneof![
        Just("nan"), Just("inf"), Just("-inf"), Just("1e400"), Just("-0.0"), Just("true"), Just("[]"),
        Just("99999999999999999999"), Just("-1"), Just("\"\""), Just("1e-320"),
    ], key in prop_oneof![Just("latent = 7"), Just("value = 2.5"), Just("version = 1")]) {
        let name = key.split(' ').next().unwrap_or_default();
        read(&PLAN.replace(key, &format!("{name} = {value}")))?;
    }
}
