"""What stands in the README beside an export: what it is, how good it is, and a script that predicts with it.

The tests run the scripts in a process that can't import `unolora`.
"""

from __future__ import annotations

from unolora import runs
from unolora.runs import Run
from unolora.tasks import Task
from unolora.text import CUE, TextModel

CLASSES = {"heads": "AutoModel", "decoder": "AutoModelForCausalLM", "encoder-decoder": "AutoModelForSeq2SeqLM"}
WHAT = {
    "peft-lora": "a plain PEFT LoRA",
    "merged": "the backbone with this task merged in",
    "onnx": "an ONNX graph with this task merged in",
}


def readme(run: Run, task: Task, format: str, exactness: str) -> str:
    """Write the README of one task's export; `exactness` says how near it is to the run's model."""
    head = ""
    if format == "onnx":
        head = " The head is in the graph." if kind(run) == "heads" else ""
    elif kind(run) == "heads":
        head = " `heads.safetensors` holds its head: a linear map on the mean of the last states."
    return (
        f"# {task.name}, {WHAT[format]}\n\nMade from a run of `unolora`, which is not needed to use it. {exactness}\n"
        f"`tasks.json` says what the task is.{head}\n\n```python\n{script(run, task, format)}```\n"
    )


def kind(run: Run) -> str:
    """Return "heads", "decoder" or "encoder-decoder"."""
    if not isinstance(run.model, TextModel):
        return "heads"
    return "encoder-decoder" if run.model.encodes else "decoder"


def script(run: Run, task: Task, format: str) -> str:
    """Spell a Python script that predicts with an export of one task, from inside its folder."""
    lines = _onnx(run, task) if format == "onnx" else _torch(run, task, format)
    return "".join(f"{line}\n" for line in lines)


def _torch(run: Run, task: Task, format: str) -> list[str]:
    how = kind(run)
    auto = CLASSES[how]
    base = _base(run) if format == "peft-lora" else '"."'
    lines = ["import torch"]
    lines += ["from peft import PeftModel"] if format == "peft-lora" else []
    lines += ["from safetensors.torch import load_file"] if how == "heads" else []
    lines += [f"from transformers import {auto}, AutoTokenizer", ""]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({base})", f"model = {auto}.from_pretrained({base})"]
    lines += ['model = PeftModel.from_pretrained(model, ".")'] if format == "peft-lora" else []
    lines += ["model.eval()", _texts(task)]
    return lines + (_head(run, task) if how == "heads" else [*_prompt(run), *_generation(run, task)])


def _texts(task: Task) -> str:
    texts = ", ".join(repr(text) for text in task.template)
    return f"texts = [{texts}]  # with the columns in braces filled in"


def _head(run: Run, task: Task) -> list[str]:
    head = f"linear.task_{task.name}"
    answer = 'float(logits[0, 0] * head["std"][0] + head["mean"][0])'
    if task.kind == "classification":
        answer = f"{list(task.labels)!r}[logits.argmax()]"
    return [
        'head = load_file("heads.safetensors")',
        f'batch = tokenizer(*texts, truncation=True, max_length={run.settings.data.max_length}, return_tensors="pt")',
        "with torch.no_grad():",
        "    states = model(**batch).last_hidden_state  # [1, T, D]",
        f'logits = states.mean(dim=1) @ head["{head}.weight"].T + head["{head}.bias"]  # without padding',
        f"answer = {answer}",
    ]


def _prompt(run: Run) -> list[str]:
    """Spell the tokens of a prompt as a list, `ids`."""
    length = run.settings.data.max_length
    if kind(run) == "encoder-decoder":
        return [f'ids = tokenizer(texts[0], truncation=True, max_length={length})["input_ids"]']
    return [
        f'cue = tokenizer({CUE!r}, add_special_tokens=False)["input_ids"]',
        f'ids = tokenizer(texts[0], truncation=True, max_length={length} - len(cue))["input_ids"]',
        "ids = [*(ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids), *cue]",
    ]


def _generation(run: Run, task: Task) -> list[str]:
    return [
        "ids = torch.tensor([ids])",
        "with torch.no_grad():",
        "    out = model.generate(",
        f"        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens={_longest(run, task)},",
        "        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,",
        "    )",
        f"written = out[0, {1 if kind(run) == 'encoder-decoder' else 'ids.shape[1]'}:]",
        "answer = tokenizer.decode(written, skip_special_tokens=True).strip()",
    ]


def _longest(run: Run, task: Task) -> int:
    assert isinstance(run.model, TextModel)
    return run.model.heads.longest(run.row(task.name))


def _onnx(run: Run, task: Task) -> list[str]:
    how = kind(run)
    lines = ["import numpy as np"] if how != "heads" else []
    lines += ["import onnxruntime", "from transformers import AutoTokenizer", ""]
    lines += [
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])',
        _texts(task),
    ]
    if how == "heads":
        answer = f"{list(task.labels)!r}[out.argmax()]" if task.kind == "classification" else "float(out[0, 0])"
        length = run.settings.data.max_length
        return [
            *lines,
            f'batch = tokenizer(*texts, truncation=True, max_length={length}, return_tensors="np")',
            "(out,) = session.run(None, {each.name: batch[each.name] for each in session.get_inputs()})",
            f"answer = {answer}",
        ]
    if how == "decoder":
        given = ["    ids_so_far = np.array([[*ids, *written]])"]
        given += ['    given = {"input_ids": ids_so_far, "attention_mask": np.ones_like(ids_so_far)}']
    else:
        assert isinstance(run.model, TextModel)
        given = ['    given = {"input_ids": np.array([ids]), "attention_mask": np.ones_like([ids])}']
        given += [f'    given["decoder_input_ids"] = np.array([[{run.model.start}, *written]])']
    return [
        *lines,
        *_prompt(run),
        "written = []",
        f"for _ in range({_longest(run, task)}):",
        *given,
        "    (logits,) = session.run(None, given)  # [1, T, V]",
        "    token = int(logits[0, -1].argmax())",
        "    if token == tokenizer.eos_token_id:",
        "        break",
        "    written.append(token)",
        "answer = tokenizer.decode(written, skip_special_tokens=True).strip()",
    ]


def _base(run: Run) -> str:
    """Spell the arguments with which `from_pretrained` finds the backbone."""
    found = runs.located(run.settings.backbone)
    path = found.pop("pretrained_model_name_or_path")
    return ", ".join([repr(path), *(f"{name}={value!r}" for name, value in found.items())])


def readme_of_all(run: Run) -> str:
    """Write the README of a folder that holds every task as a plain LoRA."""
    names, auto, r = [task.name for task in run.tasks], CLASSES[kind(run)], run.settings.adapter.r
    path = runs.located(run.settings.backbone)["pretrained_model_name_or_path"]
    first, last = names[0], names[-1]
    modules = " ".join(f"{name}=DIR/{name}" for name in names)
    return f"""# {len(names)} tasks as plain PEFT LoRAs

A folder for each task, all on one backbone, `{run.settings.backbone}`; the README in each says how good it is and how
its head or its prompt is used. DIR is where this folder lies.

## PEFT: any mix of tasks in a batch

```python
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({_base(run)})
model = {auto}.from_pretrained({_base(run)})
model = PeftModel.from_pretrained(model, "{first}", adapter_name="task_{first}")
for task in {names[1:]!r}:
    model.load_adapter(task, adapter_name=f"task_{{task}}")  # with a prefix, since torch keeps some names for itself
model.eval()
batch = tokenizer(["a text of {first}", "a text of {last}"], padding=True, return_tensors="pt")
out = model(**batch, adapter_names=["task_{first}", "task_{last}"])
```

## Servers of language models

vLLM (`--max-lora-rank` is {r} or the next that it knows):

    vllm serve {path} --enable-lora --max-loras {len(names)} --max-lora-rank {r} --lora-modules {modules}

A request names the task as its `model`. LoRAX:

    lorax-launcher --model-id {path}

A request says `"parameters": {{"adapter_id": "DIR/{first}", "adapter_source": "local"}}`. Both know certain models and
projections, which their pages list; an encoder with heads is for PEFT.
"""
