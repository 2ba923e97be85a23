use std::fs;
use std::slice::from_ref;

use super::*;

/// Rows that are trained on, and the settings of every architecture.
fn runs() -> (Vec<f32>, Vec<TrainConfig>) {
    let (d, m) = (12, 20);
    let (x, _) = planted(1024, d, m, 2);
    let base = TrainConfig {
        dead_after: 300,
        ..config(d, m, 2, 64, 60)
    };
    (x, architectures(&base))
}

/// The names of the states in a folder, oldest first.
fn names(folder: &std::path::Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_resumed_run_has_the_same_bits() {
    let (x, cfgs) = runs();
    for cfg in &cfgs {
        let folder = tempfile::tempdir().unwrap();
        let states = Checkpoints::new(folder.path(), 2);
        let (whole, _) = train(cfg, &x, 60, None);
        let (half, _) = train(cfg, &x, 23, None);
        states.save(&[half]).unwrap();
        let resumed = states.resume(from_ref(cfg)).unwrap();
        assert!(resumed.damaged.is_empty());
        let trainer = resumed.trainers.unwrap().pop();
        let (resumed, _) = train(cfg, &x, 60, trainer);
        assert_eq!(resumed.params, whole.params, "{:?}", cfg.architecture);
        assert_eq!(resumed.finish().unwrap(), whole.finish().unwrap());
    }
}

/// SAEs of all architectures in one state.
#[test]
fn all_saes_of_a_run_are_of_one_moment() {
    let (x, cfgs) = runs();
    let folder = tempfile::tempdir().unwrap();
    let states = Checkpoints::new(folder.path(), 1);
    let of = |steps: usize| -> Vec<Trainer> {
        let each = cfgs.iter().enumerate();
        each.map(|(i, cfg)| train(cfg, &x, steps + i, None).0)
            .collect()
    };
    let trainers = of(5);
    states.save(&trainers).unwrap();
    let read = states.resume(&cfgs).unwrap().trainers.unwrap();
    assert_eq!(read.len(), cfgs.len());
    for (read, saved) in read.iter().zip(&trainers) {
        assert_eq!(read.params, saved.params);
        assert_eq!(read.idle, saved.idle);
        assert_eq!(read.steps_done(), saved.steps_done());
        assert_eq!((read.scale, read.threshold), (saved.scale, saved.threshold));
    }
    // Others than those that were saved, or in another order, are another run.
    assert!(states.resume(&cfgs[1..]).is_err());
    let other: Vec<_> = cfgs.iter().rev().cloned().collect();
    let e = states.resume(&other).unwrap_err();
    assert!(e.to_string().contains("other settings"), "{e}");
    assert_eq!(names(folder.path()).len(), 1, "it must not be lost");
}

/// The newest states are damaged in turn: the one before serves, and the weights are those of a run that
/// nothing happened to.
#[test]
fn a_damaged_state_gives_way_to_the_one_before() {
    type Damage = fn(&mut Vec<u8>);
    let flips: Damage = |bytes| bytes[500] ^= 1;
    let cuts: Damage = |bytes| bytes.truncate(bytes.len() - 1);
    let empties: Damage = |bytes| bytes.clear();
    let (x, cfgs) = runs();
    let cfg = &cfgs[0];
    let (whole, _) = train(cfg, &x, 60, None);
    for damage in [flips, cuts, empties] {
        let folder = tempfile::tempdir().unwrap();
        let states = Checkpoints::new(folder.path(), 3);
        let mut trainer = None;
        for step in [10, 20, 30, 40, 50] {
            let (t, _) = train(cfg, &x, step, trainer.take());
            states.save(from_ref(&t)).unwrap();
            trainer = Some(t);
        }
        let kept = ["30", "40", "50"].map(|s| format!("state-0000000{s}.bin"));
        assert_eq!(names(folder.path()), kept);
        for (newest, before) in [(50, Some(40)), (40, Some(30)), (30, None)] {
            let path = folder.path().join(format!("state-{newest:09}.bin"));
            let mut bytes = fs::read(&path).unwrap();
            damage(&mut bytes);
            fs::write(&path, bytes).unwrap();
            let resumed = states.resume(from_ref(cfg)).unwrap();
            let said: Vec<String> = resumed.damaged.iter().map(ToString::to_string).collect();
            assert_eq!(said.len(), 1, "{said:?}");
            assert!(said[0].contains(&format!("{newest:09}.bin")), "{said:?}");
            let trainer = resumed.trainers.map(|mut t| t.remove(0));
            assert_eq!(trainer.as_ref().map(Trainer::steps_done), before);
            let (end, _) = train(cfg, &x, 60, trainer);
            assert_eq!(end.params, whole.params);
        }
        assert!(names(folder.path()).is_empty());
    }
}

#[test]
fn what_was_left_half_written_is_no_state() {
    let (x, cfgs) = runs();
    let folder = tempfile::tempdir().unwrap();
    let states = Checkpoints::new(folder.path(), 2);
    states.save(&[train(&cfgs[0], &x, 3, None).0]).unwrap();
    let half = fs::read(folder.path().join("state-000000003.bin")).unwrap();
    fs::write(folder.path().join(".tmp-state-AbC123"), &half[..999]).unwrap();
    fs::write(folder.path().join("state-of-mind.bin"), "mine").unwrap();
    let read = states.resume(&cfgs[..1]).unwrap();
    assert_eq!(read.trainers.unwrap()[0].steps_done(), 3);
    let left = ["state-000000003.bin", "state-of-mind.bin"];
    assert_eq!(names(folder.path()), left);
    states.clear().unwrap();
    assert_eq!(names(folder.path()), left[1..]);
    // A folder that is gone is named.
    let gone = Checkpoints::new(&folder.path().join("gone"), 2);
    let e = gone.save(&[]).unwrap_err().to_string();
    assert!(e.contains("gone"), "{e}");
}
