"""Heads: each row by its own task's linear map, its own loss and its own units."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import tiny
from unolora import tasks
from unolora.heads import MultiTaskModel, TaskHeads

B, D = 7, 5
MOMENTS = {"heat": (20.0, 10.0)}
ROWS = torch.tensor([0, 2, 1, 1, 2, 0, 1])
LABELS = torch.tensor([1.0, 35.0, 2.0, 0.0, 20.0, 0.0, 1.0])


@pytest.fixture
def heads():
    named = tasks.resolve([{**tiny.tasks("mood")[0], "labels": ["bad", "good"]}, *tiny.tasks("topic", "heat")])
    return TaskHeads(D, named, MOMENTS)


@pytest.fixture
def pooled():
    return torch.randn(B, D)


def test_logits_are_those_of_the_rows_own_head(heads, pooled):
    found = heads(pooled, ROWS)
    assert found.shape == (B, 3)
    for row, task in enumerate(ROWS.tolist()):
        wanted = heads.linear[f"task_{tiny.NAMES[task]}"](pooled[row])
        torch.testing.assert_close(found[row, : len(wanted)], wanted)
        assert found[row, len(wanted) :].eq(-torch.inf).all()
    assert {len(heads.linear[f"task_{name}"].bias) for name in tiny.NAMES} == {1, 2, 3}


def test_losses_are_cross_entropy_or_squares_in_standard_deviations(heads, pooled):
    logits = heads(pooled, ROWS)
    found = heads.losses(logits, ROWS, LABELS)
    for row, task in enumerate(ROWS.tolist()):
        own = heads.linear[f"task_{tiny.NAMES[task]}"](pooled[row])
        wanted = (own[0] - (LABELS[row] - 20) / 10).square() if task == 2 else F.cross_entropy(own, LABELS[row].long())
        torch.testing.assert_close(found[row], wanted)


def test_gradients_are_finite_and_stay_with_their_task(heads, pooled):
    """Columns that a task lacks are -inf, which must not become NaN on the way back."""
    rows = torch.tensor([0, 2])
    heads.losses(heads(pooled[:2], rows), rows, torch.tensor([1.0, 35.0])).mean().backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad.abs().max() > 0) == ("topic" not in name), name


def test_gradients_are_those_of_the_definition(heads):
    heads, pooled = heads.double(), torch.randn(B, D, dtype=torch.double, requires_grad=True)
    # The logits are float32 whatever comes in, so the differences are taken wide.
    assert torch.autograd.gradcheck(
        lambda x: heads.losses(heads(x, ROWS), ROWS, LABELS), pooled, eps=1e-2, atol=1e-2, rtol=1e-2
    )


def test_predictions_are_ids_or_numbers_in_the_tasks_units(heads, pooled):
    logits = heads(pooled, ROWS)
    found = heads.predict(logits, ROWS)
    for row, task in enumerate(ROWS.tolist()):
        own = heads.linear[f"task_{tiny.NAMES[task]}"](pooled[row])
        assert found[row].item() == pytest.approx(
            own[0].item() * 10 + 20 if task == 2 else own.argmax().item(), abs=1e-4
        )


def test_logits_are_float32_under_autocast(heads, pooled):
    with torch.autocast("cpu", torch.bfloat16):
        found = heads(pooled, ROWS)
    assert found.dtype == torch.float32
    assert not torch.equal(found, heads(pooled, ROWS)), "autocast was not felt"


def test_regressions_alone_have_one_column():
    heads = TaskHeads(D, tasks.resolve(tiny.tasks("heat")), {})
    rows = torch.zeros(3, dtype=torch.long)
    logits = heads(torch.randn(3, D), rows)
    assert logits.shape == (3, 1)
    assert heads.losses(logits, rows, torch.zeros(3)).equal(logits[:, 0].square())
    assert heads.predict(logits, rows).equal(logits[:, 0])


def test_what_is_saved_is_what_is_needed(heads):
    assert set(heads.state_dict()) == {
        *(f"linear.task_{name}.{part}" for name in tiny.NAMES for part in ("weight", "bias")), "mean", "std"
    }  # fmt: skip


class Encoder(torch.nn.Module):
    """Gives known states."""

    def __init__(self, states):
        super().__init__()
        self.states, self.seen = states, None

    def forward(self, tasks, **inputs):
        self.seen = {"tasks": tasks, **inputs}
        return self.states


def test_the_model_pools_over_the_mask_and_means_over_rows(heads):
    states = torch.randn(2, 4, D)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    encoder = Encoder(states)
    model = MultiTaskModel(encoder, heads)
    rows, labels = torch.tensor([1, 0]), torch.tensor([2.0, 1.0])
    out = model(mask, rows, labels, input_ids=torch.zeros(2, 4))
    pooled = torch.stack([states[0].mean(0), states[1, :2].mean(0)])
    found = model(mask, rows, input_ids=torch.zeros(2, 4))
    torch.testing.assert_close(found["logits"], heads(pooled, rows))
    assert found["answers"].equal(heads.predict(heads(pooled, rows), rows))
    torch.testing.assert_close(out["losses"], heads.losses(heads(pooled, rows), rows, labels))
    assert out["loss"] == out["losses"].mean()
    assert set(encoder.seen) == {"input_ids", "attention_mask", "tasks"}
    assert set(out) == {"loss", "losses"}
    assert set(found) == {"logits", "answers"}
