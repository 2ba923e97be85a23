//! What pyarrow wrote is what pyarrow reads; what was damaged is an error, or rows.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

/// Written by `testdata/oracle/make_parquet.py`.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/parquet")
}

fn files() -> Map<String, Value> {
    let text = std::fs::read_to_string(folder().join("expected.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn bytes(name: &str) -> Vec<u8> {
    std::fs::read(folder().join(name)).unwrap()
}

/// All of them.
static FILES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| files().keys().map(|n| bytes(n)).collect());

fn read(file: &[u8]) -> Result<Vec<Map<String, Value>>, Fault> {
    rows(file, Budget(64 << 20))
}

#[test]
fn rows_are_those_that_python_reads() {
    let files = files();
    assert_eq!(files.len(), 10);
    for (name, expected) in files {
        let found = read(&bytes(&name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let found: Vec<Value> = found.into_iter().map(Value::Object).collect();
        for (i, (a, b)) in found.iter().zip(expected.as_array().unwrap()).enumerate() {
            assert_eq!(a, b, "row {i} of {name}");
        }
        assert_eq!(Value::Array(found), expected, "{name}");
    }
}

#[test]
fn no_file_is_read_that_is_cut_anywhere() {
    for name in ["truthfulqa.parquet", "mmlu-test-0.parquet"] {
        let whole = bytes(name);
        for n in 0..whole.len() {
            assert!(read(&whole[..n]).is_err(), "{n} bytes of {name}");
        }
    }
}

#[test]
fn a_file_that_unfolds_is_stopped_and_its_column_named() {
    let file = bytes("wildguardtest.parquet");
    let e = rows(&file, Budget(200)).unwrap_err();
    assert!(e.contains("column prompt") && e.contains("limit"), "{e}");
    let e = read(b"PAR1\x10\0\0\0PAR1").unwrap_err();
    assert!(e.contains("cut off"), "{e}");
    let mut huge = file.clone();
    let at = huge.len() - 8;
    huge[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(read(&huge).unwrap_err().contains("metadata"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16 * ProptestConfig::default().cases, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damage_is_no_panic(
        file in any::<Index>(),
        flips in vec((any::<Index>(), any::<u8>()), 1..4),
        part in prop_oneof![4 => Just(1.0), 1 => 0.0..1.0f64],
    ) {
        let mut bytes = file.get(&FILES).clone();
        for (at, bit) in &flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << (bit % 8);
        }
        bytes.truncate((bytes.len() as f64 * part) as usize);
        if let Err(e) = read(&bytes) {
            prop_assert!(!e.is_empty());
        }
    }

    #[test]
    fn anything_between_the_marks(body in vec(any::<u8>(), 0..300)) {
        let length = (body.len() as u32).to_le_bytes();
        let file = [MAGIC, &body, &length, MAGIC].concat();
        prop_assert!(read(&file).map_or(true, |rows| rows.is_empty()));
    }
}
