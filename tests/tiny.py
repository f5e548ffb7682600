"""A tiny random BERT with a tokenizer of a few words, three tasks that those words decide, and runs trained on them.

All of it is made once a session, in a folder that goes with it. What is cached is for reading: a test that changes a
run copies it first.
"""

import functools
import gc
import itertools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers as tf
import yaml
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import TrainerCallback

from unolora import analysis, training
from unolora.report import write_report
from unolora.settings import Settings, from_dict
from unolora.trainer import MultiTaskTrainer

FILLERS = ["the", "a", "it", "was", "we", "saw", "this", "very", "then", "and", "so", "on", "in", "day", "there"]
MOODS = {"bad": ["bad", "sad", "poor", "dull"], "good": ["good", "glad", "rich", "fine"]}
TOPICS = {"animal": ["cat", "dog", "cow"], "plant": ["oak", "rose", "fern"], "tool": ["saw", "axe", "nail"]}
HEAT = {-1: ["cold", "ice"], 1: ["hot", "fire"]}
WORDS = [
    *FILLERS,
    *itertools.chain(*MOODS.values()),
    *(word for words in TOPICS.values() for word in words if word != "saw"),
    *itertools.chain(*HEAT.values()),
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NAMES = ["mood", "topic", "heat"]
ROWS = 80
METHODS = (
    "c-poly",
    "full",
    "full-per-task",
    "heads-only",
    "hyperformer",
    "ia3",
    "lora-matched",
    "lora-per-task",
    "lora-shared",
    "mtl-lora",
    "poly",
    "prompt-tuning",
    "unolora",
)
tf.logging.disable_progress_bar()
gc.freeze()  # the Trainer collects garbage at each start, and all that is imported would be looked through
_folders = tempfile.TemporaryDirectory(prefix="unolora-tests-")


def folder() -> Path:
    """A new folder that lives as long as the session."""
    return Path(tempfile.mkdtemp(dir=_folders.name))


def tokenizer(**settings):
    """WordPiece over the words of the tasks; single letters spell what it does not know."""
    letters = [f"{before}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" for before in ("", "##") if letter != "a"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*SPECIAL, *WORDS, *letters, "##a"]))}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{**special, **settings},
    )


@functools.cache
def backbone(dropout: float = 0.1) -> Path:
    """Folder of the tiny BERT: 2 layers, width 32, 48 positions, dropout inside."""
    words = tokenizer()
    config = tf.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=48,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.1,
        pad_token_id=0,
    )
    path = folder() / "tiny-bert"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tf.BertModel(config).save_pretrained(path)
    words.save_pretrained(path)
    return path


def rows(name: str, count: int = ROWS) -> list[dict]:
    """Rows of a task: fillers, and the words that decide."""
    random = np.random.default_rng(sum(map(ord, name)))

    def sentence(*words: str) -> str:
        picked = [*random.choice(FILLERS, random.integers(1, 9)), *words]
        random.shuffle(picked)
        return " ".join(picked)

    if name == "heat":
        signs = random.choice([-1, 1], (count, 3))
        return [
            {
                "first": sentence(*(str(random.choice(HEAT[s])) for s in row[:2])),
                "second": sentence(str(random.choice(HEAT[row[2]]))),
                "degrees": 20.0 + 10.0 * float(row.sum()),
            }
            for row in signs
        ]
    classes = MOODS if name == "mood" else TOPICS
    labels = [str(label) for label in random.choice(list(classes), count)]
    return [{"text": sentence(*random.choice(classes[label], 2)), "label": label} for label in labels]


@functools.cache
def data() -> Path:
    """Folder with the tables: `mood` and `topic` are cut by the library, `heat` comes in three files."""
    path = folder()
    for name in NAMES[:2]:
        write_rows(path / f"{name}.jsonl", rows(name))
    for split, start in {"train": 0, "validation": 60, "test": 70}.items():
        write_rows(path / f"heat-{split}.jsonl", rows("heat")[start : 60 if split == "train" else start + 10])
    return path


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tasks(*names: str) -> list[dict]:
    """Tasks as a YAML file spells them: 2 classes, 3 classes, and a regression on pairs."""
    sentence = {"kind": "classification", "template": "{text}", "target": "label"}
    known = {
        "mood": {**sentence, "source": {"train": "mood.jsonl"}},
        "topic": {**sentence, "labels": ["plant", "animal", "tool"], "source": {"train": "topic.jsonl"}},
        "heat": {
            "kind": "regression",
            "template": ["{first}", "{second}"],
            "target": "degrees",
            "source": {split: f"heat-{split}.jsonl" for split in ("train", "validation", "test")},
        },
    }
    return [{"name": name, **known[name]} for name in names or NAMES]


def spelled(output: Path | str | None = None, **changes) -> dict:
    """Settings as a YAML file spells them. A mapping among the changes goes into that section; others replace."""
    found = {
        "backbone": str(backbone()),
        "tasks": tasks(),
        "data": {"root": str(data()), "max_length": 32},
        "adapter": {"r": 4, "dropout": 0.1},
        "rivals": {"hyperformer_dim": 4, "hyperformer_embedding_dim": 8, "prompt_tokens": 6},
        "training": {
            "steps": 12,
            "batch_size": 8,
            "learning_rate": 0.01,
            "gradient_accumulation": 2,
            "evaluate_every": 6,
            "checkpoint_every": 4,
            "log_every": 5,
        },
        "output": None if output is None else str(output),
    }
    for name, value in changes.items():
        found[name] = {**found.get(name, {}), **value} if isinstance(value, dict) else value
    return found


def settings(output: Path | str | None = None, **changes) -> Settings:
    """A run of a second."""
    return from_dict(spelled(output, **changes))


def write_yaml(path: Path, output: Path | str | None = None, **changes) -> Path:
    path.write_text(yaml.safe_dump(spelled(output, **changes)), encoding="utf-8")
    return path


TRAINERS: dict[str, MultiTaskTrainer] = {}


@functools.cache
def trained(method: str = "unolora") -> Path:
    """A finished run of a method, uninterrupted, whose trainer is in TRAINERS. For reading only."""
    run = training.train(settings(folder() / "run", method=method), progress=watched(TRAINERS, method))
    if method in analysis.WITH_PAIRS and not (run / "analysis").exists():  # the first test that asked may do without
        analysis.write(analysis.analyze([run]), run / "analysis")
    if not (run / "report.html").exists():
        write_report(run)
    return run


class Watch(TrainerCallback):
    """Calls do(step) after each step; may be told to do something at the end."""

    def __init__(self, do=None, at_end=None) -> None:
        self.do, self.at_end = do, at_end

    def on_step_end(self, args, state, control, **kwargs):
        if self.do is not None:
            self.do(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if self.at_end is not None:
            self.at_end()


def watched(trainers: dict, key=None):
    """A `progress` that keeps the trainer, under the method's label by default."""

    def progress(label, trainer):
        trainers[key or label] = trainer
        return Watch()

    return progress


def parts(run: Path) -> dict[str, object]:
    """All of a finished run that does not depend on when it was stopped: no times, memory, versions, no place."""
    found: dict[str, object] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found[name] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
        elif path.name == "results.json":
            found[name] = {k: v for k, v in results(path.parent).items() if k not in ("time", "memory")}
        elif path.name == "config.yaml":
            found[name] = {**yaml.safe_load(path.read_text(encoding="utf-8")), "output": None}
        elif path.name == "adapter_config.json":  # the order of a set differs between processes
            config = json.loads(path.read_text(encoding="utf-8"))
            found[name] = {k: sorted(v) if k == "target_modules" else v for k, v in config.items()}
        elif path.name == "tasks.json":
            rows = json.loads(path.read_text(encoding="utf-8"))
            found[name] = [{k: v for k, v in row.items() if k != "since"} for row in rows]
        elif "analysis" in path.relative_to(run).parts:  # follows from the rest, and some tests leave it out
            continue
        elif path.is_file() and path.name not in ("report.html", "environment.json"):
            found[name] = path.read_bytes()
    return found


def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of a run that a test may spoil."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def lines(run: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def leftovers(*folders: Path) -> list[str]:
    """Temporary files that a failed write left behind."""
    return sorted(str(path) for folder in folders for path in folder.rglob(".*"))
