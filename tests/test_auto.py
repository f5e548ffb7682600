"""Which task inputs belong to, where nobody says."""

import json

import pytest
import torch

import tiny
import unolora_cli
from test_export import trained
from unolora import runs, scoring
from unolora.auto import Picker
from unolora.data import Collator
from unolora.errors import InputError
from unolora.tasks.rows import load


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_the_task_whose_rows_inputs_look_like(family):
    """The three tasks draw their words from one list, so a few texts tell little; a split of each tells all."""
    run = runs.load_run(trained("task", family))
    picker = Picker(run)
    assert picker.tasks.shape == (3, 32)
    for row, task in enumerate(run.tasks):
        texts = load(task, root=tiny.data()).splits["train"].texts
        assert picker.pick(texts) == task.name
        assert picker.cosines(picker.tasks[row : row + 1]).argmax() == row


def test_the_adapter_is_off_while_it_looks_and_on_again_after():
    run = runs.load_run(trained("task"))
    rows = scoring.read_split(run, 0, "test")
    batch = Collator(run.tokenizer)([(0, rows, i) for i in range(3)])
    batch.pop("labels")
    with torch.no_grad():
        before = run.model(**batch)["logits"]
        Picker(run)
        assert torch.equal(run.model(**batch)["logits"], before)


def test_what_cannot_be_told():
    picker = Picker(runs.load_run(trained("task")))
    with pytest.raises(InputError, match="needs at least one input"):
        picker.pick([])
    with pytest.raises(InputError, match="takes 3 texts; name one with --task"):
        picker.pick([("a", "b", "c")])
    with pytest.raises(InputError, match="task 'auto' is for runs of 'unolora'"):
        Picker(runs.load_run(tiny.trained("lora-shared")))


def test_the_command(capsys, tmp_path):
    run = runs.load_run(trained("task"))
    texts = [text for (text,) in load(run.tasks[1], root=tiny.data()).splits["train"].texts]
    assert unolora_cli.main(["predict", str(run.folder), "--task", "auto", *texts]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {answer["task"] for answer in answers} == {"topic"}
    assert len(answers) == len(texts)
    table = tiny.write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    assert unolora_cli.main(["predict", str(run.folder), "--task", "auto", "--file", str(table)]) == 2
    assert "--task auto takes texts, not a table" in capsys.readouterr().err
