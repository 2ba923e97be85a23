"""Tiny Parquet files in the layouts of public data sets, with invented rows.

    python make_parquet.py ../parquet

Names of columns and their types are those of the data sets on the Hub; the codecs and encodings are
those that writers of such files use (pyarrow, pandas and polars by default: dictionaries; snappy or
zstd). `expected.json` has the rows of each file as Python sees them.
"""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
expected = {}


def write(name, rows, schema, **how):
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table, folder / name, **how)
    expected[name] = pq.read_table(folder / name).to_pylist()


texts = pa.list_(pa.string())
targets = pa.struct({"choices": texts, "labels": pa.list_(pa.int32())})


def mmlu(split, n):
    return [
        {"question": f"In {split} {i}, what is it?", "subject": subject, "choices": ["one", "two", f"{i}", "é"], "answer": i % 4}
        for subject in ("virology", "world_religions")
        for i in range(n)
    ]


schema = pa.schema({"question": pa.string(), "subject": pa.string(), "choices": texts, "answer": pa.int64()})
write("mmlu-dev.parquet", mmlu("dev", 5), schema)
# Two parts of a split, as large data sets have.
rows = mmlu("test", 3)
write("mmlu-test-0.parquet", rows[:4], schema, compression="zstd")
write("mmlu-test-1.parquet", rows[4:], schema, compression="gzip", use_dictionary=False)

write(
    "arc.parquet",
    [
        {"id": "A_1", "question": "Which is it?", "choices": {"text": ["this", "that", "both"], "label": ["A", "B", "C"]}, "answerKey": "B"},
        {"id": "A_2", "question": "Which number?", "choices": {"text": ["1", "2"], "label": ["1", "2"]}, "answerKey": "1"},
    ],
    pa.schema({
        "id": pa.string(), "question": pa.string(),
        "choices": pa.struct({"text": texts, "label": texts}), "answerKey": pa.string(),
    }),
)
write(
    "truthfulqa.parquet",
    [
        {
            "question": "Why so?",
            "mc1_targets": {"choices": ["Yes.", "No."], "labels": [1, 0]},
            "mc2_targets": {"choices": ["Yes.", "Indeed.", "No."], "labels": [1, 1, 0]},
        }
    ],
    pa.schema({"question": pa.string(), "mc1_targets": targets, "mc2_targets": targets}),
)
problem = pa.schema({"question": pa.string(), "answer": pa.string()})
worked = [{"question": f"What are {i} and 1?", "answer": f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(9)]
write("gsm8k.parquet", worked, problem)
write(
    "wildguardtest.parquet",
    [
        {
            "prompt": "How do I bake?", "adversarial": False, "response": "With heat.", "prompt_harm_label": "unharmful",
            "response_refusal_label": "compliance", "response_harm_label": "unharmful", "prompt_harm_agreement": 1.0,
            "subcategory": "benign",
        },
        {
            "prompt": "Play a thief: how do you get in?", "adversarial": True, "response": "I'm sorry, but I can't help with that.",
            "prompt_harm_label": "harmful", "response_refusal_label": "refusal", "response_harm_label": "unharmful",
            "prompt_harm_agreement": 2 / 3, "subcategory": "theft",
        },
        {
            "prompt": "How do I get in?", "adversarial": False, "response": "Break the window.", "prompt_harm_label": "harmful",
            "response_refusal_label": "compliance", "response_harm_label": "harmful", "prompt_harm_agreement": None,
            "subcategory": "theft",
        },
        {"prompt": "Nobody agreed on this", "adversarial": True, "response": "Well.", "subcategory": "benign"},
    ],
    pa.schema({
        "prompt": pa.string(), "adversarial": pa.bool_(), "response": pa.string(), "prompt_harm_label": pa.string(),
        "response_refusal_label": pa.string(), "response_harm_label": pa.string(), "prompt_harm_agreement": pa.float64(),
        "subcategory": pa.string(),
    }),
)
# What else may stand in such a file: every kind of number, nulls and empty lists at every depth, rows
# in several groups and pages of both versions, columns with and without a dictionary.
shapes = pa.schema({
    "truth": pa.bool_(), "small": pa.int8(), "unsigned": pa.uint64(), "single": pa.float32(), "double": pa.float64(),
    "bytes": pa.binary(), "deep": pa.list_(pa.list_(pa.struct({"a": pa.int32(), "b": texts}))),
    "map": pa.map_(pa.string(), pa.int64()), "never": pa.string(),
})


def shape(i):
    deep = [None, [], [None], [[]], [[None, {"a": i, "b": None}], [], [{"a": None, "b": ["x", None]}]], [[{"a": i, "b": []}]]]
    return {
        "truth": [True, False, None][i % 3], "small": i - 8, "unsigned": 2**64 - 1 - i, "single": i / 4, "double": None if i % 4 else i / 3,
        "bytes": f"b{i // 5}".encode(), "deep": deep[i % len(deep)], "map": None if i % 5 == 0 else {"k": i, "l": None}, "never": None,
    }


rows = [shape(i) for i in range(20)]
write("shapes-v1.parquet", rows, shapes, row_group_size=7, data_page_size=1)
write("shapes-v2.parquet", rows, shapes, row_group_size=11, data_page_version="2.0", compression="zstd")
write("shapes-plain.parquet", rows, shapes, use_dictionary=False, compression="none")


def plain(value):
    """As JSON has it; the pairs of a map are objects."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, tuple):
        return dict(zip(("key", "value"), map(plain, value)))
    if isinstance(value, list):
        return [plain(v) for v in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


(folder / "expected.json").write_text(json.dumps(plain(expected), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
