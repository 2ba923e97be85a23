//! A steering plan, TOML or JSON; what is accepted is written and read again unchanged.
#![no_main]

use demur_steering::{SteeringPlan, explain};

libfuzzer_sys::fuzz_target!(|text: &str| {
    for plan in [SteeringPlan::from_toml(text), SteeringPlan::from_json(text)] {
        let Ok(plan) = plan else { continue };
        let _ = explain(&plan);
        let written = plan.to_toml().expect("a valid plan can be written");
        let again = SteeringPlan::from_toml(&written).expect("what was written can be read");
        assert_eq!(again, plan);
    }
});
