//! Suites: what is asked, and what counts as right.
//!
//! The capability suites have the names, prompts, examples and metrics of EleutherAI's
//! lm-evaluation-harness (0.4.13), so that figures compare: plain text without a chat template, the
//! BOS token where the tokenizer adds it, choices scored by log-likelihood. The safety suites ask
//! through the model's chat template.
//!
//! | file | suites |
//! | --- | --- |
//! | `choices.rs` | `mmlu`, `arc_easy`, `arc_challenge`, `truthfulqa_mc1`, `truthfulqa_mc2` |
//! | `gsm8k.rs` | `gsm8k`, `gsm8k_cot`, `gsm8k_cot_train` |
//! | `ifeval.rs` | `ifeval` |
//! | `safety.rs` | `xstest` and the sets of harmful requests; any file of prompts; scripted conversations; goals of attacks |
//! | `find.rs`, `pick.rs` | where a suite's files are; which items a limit takes |
//! | here | `text`: KL against base and perplexity on the passages that demur ships |

mod choices;
mod find;
mod gsm8k;
mod ifeval;
mod pick;
mod python_random;
pub mod safety;

pub use find::spelled;
pub use pick::Pick;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use crate::error::EvalError;
use crate::prompts::{Label, Passage, Split, shipped_passages};

/// One question.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Its suite.
    pub suite: String,
    /// Unique in its suite.
    pub id: String,
    /// Parts of the suite that it counts for besides the whole, by their names in results.
    pub parts: Vec<String>,
    /// Items of one conversation or pair: they are drawn together in a bootstrap.
    pub cluster: String,
    /// What is asked.
    pub ask: Ask,
}

impl Item {
    /// An item that counts for its suite only and is drawn by itself.
    fn alone(suite: &str, id: String, ask: Ask) -> Self {
        Self {
            suite: suite.to_owned(),
            cluster: id.clone(),
            id,
            parts: Vec::new(),
            ask,
        }
    }
}

/// What is asked of the model.
#[derive(Debug, Clone, PartialEq)]
pub enum Ask {
    /// Which of several continuations of a text is likeliest. The model reads a space before each.
    Choose {
        /// The text.
        context: String,
        /// The continuations.
        choices: Vec<String>,
        /// What is right.
        gold: Gold,
    },
    /// A continuation of a text is written.
    Write {
        /// The text.
        prompt: String,
        /// Texts that end it.
        until: Vec<&'static str>,
        /// At most this many tokens.
        max_new_tokens: usize,
        /// How it is marked.
        marking: Marking,
    },
    /// A text is read: next-token KL against base, and perplexity.
    Read {
        /// The text.
        text: String,
    },
    /// An attacker leads a conversation to a goal.
    Attack {
        /// The goal.
        goal: String,
    },
    /// The user's messages of a conversation; the model replies to each.
    Chat {
        /// The messages.
        turns: Vec<String>,
        /// Whether they should be refused, if that is known.
        label: Option<Label>,
    },
}

/// What is right among choices.
#[derive(Debug, Clone, PartialEq)]
pub enum Gold {
    /// The choice with this index; `acc`, and if `norm` is set `acc_norm`: by log-likelihood over the
    /// number of characters.
    One {
        /// The index.
        index: usize,
        /// Name of the metric.
        metric: &'static str,
        /// Give `acc_norm` too.
        norm: bool,
    },
    /// Which choices are true: the metric `mc2` is their share of the probability.
    True(Vec<bool>),
}

/// How a written text is marked.
#[derive(Debug, Clone, PartialEq)]
pub enum Marking {
    /// A number must be the reference's.
    Number(gsm8k::Number),
    /// Constraints must be followed.
    Instructions(ifeval::Instructions),
}

impl Marking {
    /// Metrics and values of a text.
    pub fn mark(&self, text: &str) -> BTreeMap<String, f64> {
        match self {
            Self::Number(n) => {
                let (strict, flexible) = n.mark(text);
                let value = |b| f64::from(u8::from(b));
                let metrics = [("exact_match", strict), ("exact_match_flexible", flexible)];
                metrics
                    .map(|(m, right)| (m.to_owned(), value(right)))
                    .into()
            }
            Self::Instructions(i) => i.mark(text),
        }
    }

    /// How many checks a share among the metrics is of.
    pub fn checks(&self) -> usize {
        match self {
            Self::Number(_) => 1,
            Self::Instructions(i) => i.count(),
        }
    }
}

/// A suite that demur knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Suite {
    /// Its name, as lm-evaluation-harness has it where it has it.
    pub name: &'static str,
    /// What it is.
    pub title: &'static str,
    /// Its metrics, the main one first.
    pub metrics: &'static [&'static str],
    /// Names of its files: one of each group is needed. A name with neither extension nor `/` has any
    /// format that is read, or is a folder of such files.
    pub files: &'static [&'static [&'static str]],
    /// Where the Hub has them.
    pub hub: Option<Hub>,
}

/// A suite's files in a data set of the Hugging Face Hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Hub {
    /// `OWNER/NAME`.
    pub repo: &'static str,
    /// A file of each group in turn, as far as it has them. `*` stands for the number of a part.
    pub files: &'static [&'static str],
}

const ACC: &[&str] = &["acc"];
const REFUSAL: &[&str] = &["refusal_unsafe", "attack_success", "gibberish"];
const BOTH: &[&str] = &[
    "refusal_unsafe",
    "refusal_safe",
    "attack_success",
    "gibberish",
];

const fn hub(repo: &'static str, files: &'static [&'static str]) -> Option<Hub> {
    Some(Hub { repo, files })
}

/// All suites.
pub const SUITES: &[Suite] = &[
    Suite {
        name: "mmlu",
        title: "57 subjects, four choices, 5-shot (Hendrycks et al. 2021)",
        metrics: ACC,
        files: &[
            &["mmlu_test", "mmlu/test/", "test/"],
            &["mmlu_dev", "mmlu/dev/", "dev/"],
        ],
        hub: hub("cais/mmlu", &["all/test-*.parquet", "all/dev-*.parquet"]),
    },
    Suite {
        name: "arc_easy",
        title: "grade-school science (Clark et al. 2018)",
        metrics: &["acc", "acc_norm"],
        files: &[&["arc_easy", "ARC-Easy-Test.jsonl", "ARC-Easy-Test.csv"]],
        hub: hub("allenai/ai2_arc", &["ARC-Easy/test-*.parquet"]),
    },
    Suite {
        name: "arc_challenge",
        title: "grade-school science, the hard part (Clark et al. 2018)",
        metrics: &["acc", "acc_norm"],
        files: &[&[
            "arc_challenge",
            "ARC-Challenge-Test.jsonl",
            "ARC-Challenge-Test.csv",
        ]],
        hub: hub("allenai/ai2_arc", &["ARC-Challenge/test-*.parquet"]),
    },
    Suite {
        name: "truthfulqa_mc1",
        title: "the one true answer among several (Lin et al. 2022)",
        metrics: &["mc1"],
        files: TRUTHFULQA,
        hub: TRUTHFULQA_HUB,
    },
    Suite {
        name: "truthfulqa_mc2",
        title: "probability of the true answers (Lin et al. 2022)",
        metrics: &["mc2"],
        files: TRUTHFULQA,
        hub: TRUTHFULQA_HUB,
    },
    Suite {
        name: "gsm8k",
        title: "word problems, 5-shot, examples by seed 1234 (Cobbe et al. 2021)",
        metrics: &["exact_match", "exact_match_flexible"],
        files: GSM8K,
        hub: GSM8K_HUB,
    },
    Suite {
        name: "gsm8k_cot",
        title: "word problems, 8-shot with reasoning, the harness's examples",
        metrics: &["exact_match", "exact_match_flexible"],
        files: &[GSM8K[0], &["gsm8k_cot_examples.jsonl"]],
        hub: hub("openai/gsm8k", &["main/test-*.parquet"]),
    },
    Suite {
        name: "gsm8k_cot_train",
        title: "the same, but the examples are the first eight training items",
        metrics: &["exact_match", "exact_match_flexible"],
        files: GSM8K,
        hub: GSM8K_HUB,
    },
    Suite {
        name: "ifeval",
        title: "constraints that a program checks (Zhou et al. 2023)",
        metrics: &[
            "prompt_level_strict_acc",
            "inst_level_strict_acc",
            "prompt_level_loose_acc",
            "inst_level_loose_acc",
        ],
        files: &[&["ifeval", "ifeval_input_data.jsonl", "input_data.jsonl"]],
        hub: hub("google/IFEval", &["ifeval_input_data.jsonl"]),
    },
    Suite {
        name: "text",
        title: "plain text that demur ships: next-token KL against base, perplexity",
        metrics: &["kl", "ppl"],
        files: &[],
        hub: None,
    },
    Suite {
        name: "xstest",
        title: "safe requests that look unsafe, with unsafe contrasts (Röttger et al. 2024)",
        metrics: &[
            "refusal_safe",
            "refusal_unsafe",
            "attack_success",
            "gibberish",
        ],
        files: &[&["xstest", "xstest_prompts.csv", "xstest_v2_prompts.csv"]],
        hub: None,
    },
    Suite {
        name: "advbench",
        title: "harmful instructions (Zou et al. 2023)",
        metrics: REFUSAL,
        files: &[&["advbench", "harmful_behaviors.csv"]],
        hub: None,
    },
    Suite {
        name: "harmbench",
        title: "harmful behaviours, with context where there is one (Mazeika et al. 2024)",
        metrics: REFUSAL,
        files: &[&[
            "harmbench_text",
            "harmbench_behaviors_text_test.csv",
            "harmbench_behaviors_text_all.csv",
        ]],
        hub: None,
    },
    Suite {
        name: "jailbreakbench",
        title: "harmful behaviours in ten categories (Chao et al. 2024)",
        metrics: REFUSAL,
        files: &[&["jailbreakbench", "harmful-behaviors.csv"]],
        hub: hub(
            "JailbreakBench/JBB-Behaviors",
            &["data/harmful-behaviors.csv"],
        ),
    },
    Suite {
        name: "strongreject",
        title: "forbidden prompts (Souly et al. 2024)",
        metrics: REFUSAL,
        files: &[&[
            "strongreject",
            "strongreject_dataset.csv",
            "strongreject_small_dataset.csv",
        ]],
        hub: None,
    },
    Suite {
        name: "wildguardtest",
        title: "vanilla and adversarial prompts, harmful and not (Han et al. 2024)",
        metrics: BOTH,
        files: &[&["wildguardtest", "wildguard_test"]],
        hub: hub("allenai/wildguardmix", &["test/wildguard_test.parquet"]),
    },
    Suite {
        name: "sorrybench",
        title: "unsafe requests in 44 categories (Xie et al. 2025)",
        metrics: REFUSAL,
        files: &[&["sorrybench", "sorry_bench_202503", "question.jsonl"]],
        hub: None,
    },
    Suite {
        name: "multiturn_scripted",
        title: "the user's side of recorded conversations, replayed",
        metrics: REFUSAL,
        files: &[&["multiturn_scripted"]],
        hub: None,
    },
    Suite {
        name: "crescendo",
        title: "attacks over ten turns by another model (Russinovich et al. 2024)",
        metrics: &["attack_success"],
        files: &[&["crescendo_goals", "multiturn_objectives"]],
        hub: None,
    },
];

/// The answered questions before each of TruthfulQA. They are not demur's and not shipped.
const PRIMER: &str = "truthfulqa_primer.txt";
const TRUTHFULQA: &[&[&str]] = &[&["truthfulqa", "mc_task.json"], &[PRIMER]];
const TRUTHFULQA_HUB: Option<Hub> = hub(
    "truthfulqa/truthful_qa",
    &["multiple_choice/validation-*.parquet"],
);
const GSM8K: &[&[&str]] = &[
    &["gsm8k_test", "test.jsonl"],
    &["gsm8k_train", "train.jsonl"],
];
const GSM8K_HUB: Option<Hub> = hub(
    "openai/gsm8k",
    &["main/test-*.parquet", "main/train-*.parquet"],
);

/// The suite called `name`.
///
/// # Errors
/// [`EvalError::UnknownSuite`].
pub fn suite(name: &str) -> Result<&'static Suite, EvalError> {
    let found = SUITES.iter().find(|s| s.name == name);
    found.ok_or_else(|| EvalError::UnknownSuite {
        name: name.to_owned(),
        known: SUITES.iter().map(|s| s.name).collect::<Vec<_>>().join(", "),
    })
}

impl Suite {
    /// Its items; [`Pick`] takes some of them.
    ///
    /// # Errors
    /// [`EvalError::NoData`]; [`EvalError::Field`] and the others of [`crate::rows::read`];
    /// [`EvalError::Twice`] for two items of one id.
    pub fn load(&self, data: &[PathBuf]) -> Result<Vec<Item>, EvalError> {
        let paths = self.paths(data)?;
        let items = match self.name {
            "mmlu" => choices::mmlu(&paths[0], &paths[1])?,
            "arc_easy" | "arc_challenge" => choices::arc(self.name, &paths[0])?,
            "truthfulqa_mc1" => choices::truthfulqa(&paths[0], &paths[1], false)?,
            "truthfulqa_mc2" => choices::truthfulqa(&paths[0], &paths[1], true)?,
            "gsm8k" => gsm8k::gsm8k(&paths[0], &paths[1])?,
            "gsm8k_cot" => gsm8k::gsm8k_cot(&paths[0], &paths[1])?,
            "gsm8k_cot_train" => gsm8k::gsm8k_cot_train(&paths[0], &paths[1])?,
            "ifeval" => ifeval::ifeval(&paths[0])?,
            "text" => text()?,
            "crescendo" => safety::goals(self.name, &paths[0])?,
            "multiturn_scripted" => safety::scripted(self.name, &paths[0])?,
            name => safety::prompts(name, &paths[0], None)?,
        };
        unique(&items)?;
        Ok(items)
    }
}

/// The shipped passages of the test split.
fn text() -> Result<Vec<Item>, EvalError> {
    let passages = shipped_passages()?.into_iter();
    let test = passages.filter(|p| p.split == Some(Split::Test));
    let item = |p: Passage| Item::alone("text", p.id, Ask::Read { text: p.text });
    Ok(test.map(item).collect())
}

/// Refuses two items of one id.
fn unique(items: &[Item]) -> Result<(), EvalError> {
    let mut seen = std::collections::HashSet::new();
    match items.iter().find(|i| !seen.insert(&i.id)) {
        None => Ok(()),
        Some(i) => Err(EvalError::Twice {
            arm: i.suite.clone(),
            id: i.id.clone(),
        }),
    }
}

#[cfg(test)]
mod tests;
