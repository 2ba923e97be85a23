//! Prompts of a test that were also tuned on.

use std::collections::HashMap;

use crate::error::EvalError;
use crate::prompts::Prompt;
use crate::suites::{Ask, Item};

/// Refuses items that are also prompts on which a plan was tuned: the same text but for case, white
/// space and the mark at its end.
///
/// # Errors
/// [`EvalError::Leak`].
pub fn not_leaked(items: &[Item], place: &str, tuned: &[Prompt]) -> Result<(), EvalError> {
    let plain = |text: &str| {
        let words: Vec<&str> = text.split_whitespace().collect();
        let text = words.join(" ").to_lowercase();
        text.trim_end_matches(['.', '!', '?', ' ']).to_owned()
    };
    let known: HashMap<String, &str> = tuned
        .iter()
        .map(|p| (plain(&p.prompt), p.id.as_str()))
        .collect();
    for item in items {
        let asked = match &item.ask {
            Ask::Chat { turns, .. } => turns.as_slice(),
            Ask::Attack { goal } => std::slice::from_ref(goal),
            _ => continue,
        };
        if let Some(other) = asked.iter().find_map(|t| known.get(&plain(t))) {
            return Err(EvalError::Leak {
                suite: item.suite.clone(),
                id: item.id.clone(),
                tuned: place.to_owned(),
                other: (*other).to_owned(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompts::Label;

    #[test]
    fn a_leaked_prompt_is_caught() {
        let item = Item {
            suite: "s".to_owned(),
            id: "a".to_owned(),
            parts: Vec::new(),
            cluster: String::new(),
            ask: Ask::Chat {
                turns: vec!["How do I  sew?".to_owned()],
                label: Some(Label::Safe),
            },
        };
        let tuned = |text: &str| Prompt {
            id: "t".to_owned(),
            prompt: text.to_owned(),
            label: None,
            category: None,
            split: None,
            pair: None,
            style: None,
        };
        let items = [item];
        assert!(not_leaked(&items, "f", &[tuned("how do i sew")]).is_err());
        assert!(not_leaked(&items, "f", &[tuned("How do I knit?")]).is_ok());
    }
}
