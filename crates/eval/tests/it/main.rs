//! Prompts that are not what they should be: rows or an error that names the line, never a panic.

use demur_eval::EvalError;
use demur_eval::prompts::{Prompt, disjoint, parse};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

const LINES: &str = "\u{feff}{\"id\": \"a\", \"prompt\": \"How do I sew?\", \"label\": \"safe\", \"split\": \"test\"}\r\n\
    \r\n\
    {\"id\": \"b\", \"prompt\": \"Wie n\u{e4}he ich?\", \"label\": \"harmful\", \"pair\": 7, \"more\": [1]}\n";

fn read(bytes: &[u8]) -> Result<Vec<Prompt>, EvalError> {
    let rows = parse("f.jsonl", bytes, |p: &Prompt| &p.id)?;
    disjoint("f.jsonl", &rows)?;
    Ok(rows)
}

#[test]
fn what_is_broken_here_was_whole() {
    assert_eq!(read(LINES.as_bytes()).unwrap().len(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flips_and_cuts(
        flips in vec((any::<Index>(), any::<u8>()), 0..4), part in 0.0..1.5f64,
    ) {
        let mut bytes = LINES.as_bytes().to_vec();
        for (at, bit) in &flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << (bit % 8);
        }
        bytes.truncate((bytes.len() as f64 * part) as usize);
        match read(&bytes) {
            Ok(rows) => prop_assert!(rows.len() <= 2),
            Err(e) => prop_assert!(e.to_string().starts_with("f.jsonl"), "{}", e),
        }
    }

    #[test]
    fn anything(bytes in vec(any::<u8>(), 0..200)) {
        if let Err(e) = read(&bytes) {
            prop_assert!(e.to_string().starts_with("f.jsonl:"), "{}", e);
        }
    }
}
