//! What can go wrong in an evaluation.

/// An error of a data set, a run or a record.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// A file can't be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A line of a data set is not what it should be.
    #[error("{path}:{line}: {reason}")]
    Line {
        /// The file.
        path: String,
        /// Line number, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A field of a row is not what it should be.
    #[error("{path}:{line}: the field `{field}` {reason}")]
    Field {
        /// The file.
        path: String,
        /// Line number, from 1; in a list of JSON, the row's number.
        line: usize,
        /// The field, by the names that it may have.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No suite has this name.
    #[error("there is no suite '{name}'; there are {known}")]
    UnknownSuite {
        /// The name.
        name: String,
        /// Those that there are.
        known: String,
    },
    /// No jailbreak wrapper has this name.
    #[error("there is no wrapper '{name}'; there are {known}")]
    UnknownWrapper {
        /// The name.
        name: String,
        /// Those that there are.
        known: String,
    },
    /// A wrapper of a file has no place for the request, several, or an unknown disguise for it.
    #[error(
        "{path}: the template of wrapper '{id}' needs {{request}} exactly once, or {{request:NAME}} with one of {}",
        crate::wrap::DISGUISES.map(|d| d.0).join(", ")
    )]
    Wrapper {
        /// The file.
        path: String,
        /// The wrapper.
        id: String,
    },
    /// No judge has this name.
    #[error("there is no judge '{name}'; there are {known}")]
    UnknownJudge {
        /// The name.
        name: String,
        /// Those that there are.
        known: String,
    },
    /// A suite's file is not there.
    #[error(
        "{suite} needs one of {names} in {folder}; --data DIR names another folder{}",
        .hub.map_or_else(String::new, |h| format!(", and `demur eval fetch {suite}` gets it from {h}"))
    )]
    NoData {
        /// The suite.
        suite: String,
        /// Where it was looked for.
        folder: String,
        /// Names that it may have.
        names: String,
        /// The Hub's repository that has it.
        hub: Option<&'static str>,
    },
    /// A file that comes in parts is not whole.
    #[error("{path}: of {need} parts there are {have}")]
    Parts {
        /// The first part that is there.
        path: String,
        /// Parts there.
        have: usize,
        /// Parts that its name tells of.
        need: usize,
    },
    /// A folder or a pattern has no file.
    #[error("{path}: no file whose name ends in {formats}")]
    NoFile {
        /// The folder.
        path: String,
        /// What is read.
        formats: String,
    },
    /// A Parquet file is not what it should be.
    #[error("{path}: no Parquet file that can be read: {reason}")]
    Parquet {
        /// The file.
        path: String,
        /// What is wrong, with the column where there is one.
        reason: String,
    },
    /// The file with TruthfulQA's answered questions is not there, or is another.
    #[error(
        "{path}: {reason}; the file must hold the {need} answered questions that stand before each of \
         TruthfulQA, a line `Q: ...` and a line `A: ...` each, with empty lines between (the \
         `prompt_qa` of lm-evaluation-harness's truthfulqa_mc1.yaml)"
    )]
    Primer {
        /// The file.
        path: String,
        /// How many.
        need: usize,
        /// What is wrong.
        reason: String,
    },
    /// There are too few examples for the prompts.
    #[error("{suite} needs {need} examples before a question; its file has {have}")]
    Shots {
        /// The suite.
        suite: String,
        /// Examples there.
        have: usize,
        /// Examples needed.
        need: usize,
    },
    /// A judge sorts replies wrongly whose sort is known.
    #[error("the judge '{judge}' says {found:?} of a reply that is {expected:?}: {reply}")]
    Judge {
        /// The judge.
        judge: String,
        /// What it says.
        found: crate::judge::Verdict,
        /// What it should say.
        expected: crate::judge::Verdict,
        /// The reply.
        reply: String,
    },
    /// Labels look swapped.
    #[error(
        "{suite}: base refuses {on_safe} of the safe prompts and {on_unsafe} of the unsafe ones, and the \
         intervals do not overlap: are the labels swapped?"
    )]
    Swapped {
        /// The suite.
        suite: String,
        /// Share of safe prompts refused, in words.
        on_safe: String,
        /// Share of unsafe prompts refused.
        on_unsafe: String,
    },
    /// A prompt of the test was tuned on.
    #[error("'{id}' of {suite} is also '{other}' of {tuned}, on which the plan was tuned")]
    Leak {
        /// The suite.
        suite: String,
        /// The item.
        id: String,
        /// Where the plan was tuned.
        tuned: String,
        /// The prompt there.
        other: String,
    },
    /// Arms were not asked the same.
    #[error("'{id}' of {suite}: the arm '{arm}' {reason}; arms compare only on the same questions")]
    Unpaired {
        /// The suite.
        suite: String,
        /// The item.
        id: String,
        /// The arm.
        arm: String,
        /// What differs.
        reason: String,
    },
    /// A folder holds another run.
    #[error("{path} holds a run with another `{key}`: {there} there, {here} here")]
    OtherRun {
        /// The file.
        path: String,
        /// What differs.
        key: String,
        /// Its value there.
        there: String,
        /// And here.
        here: String,
    },
    /// A file is beyond a limit.
    #[error("{path}: larger than the limit of {limit} bytes")]
    TooLarge {
        /// The file.
        path: String,
        /// The limit.
        limit: u64,
    },
    /// Two replies would have the same place.
    #[error(
        "prompt '{id}' is there twice for the arm '{arm}': names of arms and ids must be unique"
    )]
    Twice {
        /// The arm.
        arm: String,
        /// The prompt.
        id: String,
    },
    /// Two splits share a prompt.
    #[error(
        "{path}: prompts '{first}' and '{second}' are the same text in two splits; no prompt may be in two"
    )]
    TwoSplits {
        /// The file.
        path: String,
        /// The one prompt's id.
        first: String,
        /// The other's.
        second: String,
    },
    /// A record is not one.
    #[error("{path}: not a record: {reason}")]
    Record {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An attacker or a judge could not be asked.
    #[error(transparent)]
    Talk(#[from] crate::talk::TalkError),
    /// Attacks need an attacker and a scorer.
    #[error("{suite} needs an attacker and a scorer: --attacker and --scorer name them")]
    NoAttacker {
        /// The suite.
        suite: String,
    },
    /// The model refused its input.
    #[error(transparent)]
    Model(#[from] demur_model::ModelError),
    /// A harvest or discovery failed.
    #[error(transparent)]
    Feature(#[from] demur_features::FeatureError),
}
