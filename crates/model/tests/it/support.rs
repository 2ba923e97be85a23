//! Tiny checkpoints, golden tensors and the one comparator.

use std::path::PathBuf;
use std::sync::Arc;

use demur_kernels::linear::Precision;
use demur_model::checkpoint::Checkpoint;
use demur_model::decoder::{Capture, KvCache, LogitsAt, Model, SeqInput, Workspace};
use demur_model::hooks::{Intervention, InterventionState, Role, Rows, Site};
use safetensors::{Dtype, SafeTensors};

pub fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../testdata/models")
        .join(name)
}

pub fn model(name: &str, precision: Precision) -> Model {
    let checkpoint = Arc::new(Checkpoint::open(&path(name)).unwrap());
    Model::load(&checkpoint, precision).unwrap()
}

/// A file of golden outputs.
pub struct Golden(Vec<u8>);

impl Golden {
    pub fn read(name: &str) -> Self {
        Self(std::fs::read(path(name)).unwrap())
    }

    pub fn floats(&self, tensor: &str) -> Vec<f32> {
        self.words(tensor, Dtype::F32)
            .map(f32::from_le_bytes)
            .collect()
    }

    pub fn tokens(&self) -> Vec<u32> {
        self.words("tokens", Dtype::I32)
            .map(u32::from_le_bytes)
            .collect()
    }

    fn words(&self, tensor: &str, dtype: Dtype) -> impl Iterator<Item = [u8; 4]> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let view = file.tensor(tensor).unwrap();
        assert_eq!(view.dtype(), dtype);
        let bytes = view.data().as_chunks::<4>().0.to_vec();
        bytes.into_iter()
    }
}

/// Fails at the worst element if any is off by more than `atol`; NaN is off.
#[track_caller]
pub fn close(what: &str, found: &[f32], expected: &[f32], atol: f32) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    let off = |i: usize| {
        let d = (found[i] - expected[i]).abs();
        if d.is_nan() { f32::INFINITY } else { d }
    };
    let worst = (0..found.len()).max_by(|&a, &b| off(a).total_cmp(&off(b)));
    if let Some(i) = worst {
        assert!(
            off(i) <= atol,
            "{what}: at {i}: {} against {}",
            found[i],
            expected[i]
        );
    }
}

/// One sequence's new tokens, all logits.
pub fn forward(
    model: &Model,
    tokens: &[u32],
    cache: &mut KvCache,
    hook: Option<(&mut (dyn InterventionState + 'static), &[Site])>,
    capture: Option<&mut Capture>,
) -> Vec<f32> {
    let roles = vec![Role::User; tokens.len()];
    let (hook, hook_sites) = match hook {
        Some((state, sites)) => (Some(state), sites),
        None => (None, &[][..]),
    };
    let mut seqs = [SeqInput {
        tokens,
        roles: &roles,
        generated: false,
        cache,
        hook,
        hook_sites,
        logits: LogitsAt::All,
    }];
    let mut ws = Workspace::default();
    let logits = model.forward(&mut seqs, capture, &mut ws).unwrap();
    logits.rows().flatten().copied().collect()
}

/// Adds a constant to every value of the stream; its audit is the rows that it saw, one entry a
/// call: `[start, tokens, generated]`.
#[derive(Debug, Clone)]
pub struct Push {
    sites: [Site; 1],
    by: f32,
    seen: Vec<(usize, usize, bool)>,
}

impl Push {
    pub fn new(site: Site, by: f32) -> Self {
        Self {
            sites: [site],
            by,
            seen: Vec::new(),
        }
    }
}

impl Intervention for Push {
    fn sites(&self) -> &[Site] {
        &self.sites
    }
    fn fingerprint(&self) -> [u8; 32] {
        [0; 32]
    }
    fn is_empty(&self) -> bool {
        false
    }
    fn start(&self) -> Box<dyn InterventionState> {
        Box::new(self.clone())
    }
}

impl InterventionState for Push {
    fn edit(&mut self, site: Site, rows: &Rows<'_>, resid: &mut [f32]) {
        assert_eq!(site, self.sites[0]);
        assert_eq!(rows.tokens.len(), rows.roles.len());
        self.seen
            .push((rows.start_pos, rows.tokens.len(), rows.generated));
        resid.iter_mut().for_each(|v| *v += self.by);
    }
    fn audit(&self) -> Option<serde_json::Value> {
        serde_json::to_value(&self.seen).ok()
    }
    fn fork(&self) -> Box<dyn InterventionState> {
        Box::new(self.clone())
    }
}

/// [`Push`], which does to each row what it does to every other.
#[derive(Debug)]
pub struct RowWise(pub Push);

impl Intervention for RowWise {
    fn sites(&self) -> &[Site] {
        self.0.sites()
    }
    fn fingerprint(&self) -> [u8; 32] {
        [1; 32]
    }
    fn is_empty(&self) -> bool {
        false
    }
    fn row_wise(&self) -> bool {
        true
    }
    fn start(&self) -> Box<dyn InterventionState> {
        self.0.start()
    }
}
