"""Two image tasks on a ViT: handwritten digits, and the same digits turned by 90 degrees.

    python examples/images.py

The data comes with scikit-learn. The ViT is tiny and random, and stays frozen but for its classifier, which both tasks
share; with pretrained weights, put `ViTForImageClassification.from_pretrained(...)` in its place.
"""

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from unolora import UnoLoraConfig

TASKS = ["upright", "turned"]


def rows() -> tuple[list[dict], list[dict]]:
    """Training and test rows; no digit is in both."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    images = torch.tensor(digits.images[order] / 8 - 1, dtype=torch.float32).unsqueeze(1)  # [N, 1, 8, 8]
    found = [
        [{"pixel_values": image, "labels": int(label), "tasks": 0} for image, label in pairs]
        + [{"pixel_values": image.rot90(dims=(1, 2)), "labels": int(label), "tasks": 1} for image, label in pairs]
        for pairs in (
            list(zip(images, digits.target[order], strict=True))[part] for part in (slice(1437), slice(1437, None))
        )
    ]
    return found[0], found[1]


def adapted(conditioning: str = "task+sample") -> PeftModel:
    """A tiny random ViT with UnoLoRA* on all its projections."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, num_labels=10, initializer_range=0.2,
    )  # fmt: skip
    settings = UnoLoraConfig(
        tasks=TASKS, conditioning=conditioning, target_modules="all-linear", modules_to_save=["classifier"]
    )
    return get_peft_model(ViTForImageClassification(config), settings)


def main(steps: int = 200, output: str = "runs/images") -> dict[str, float]:
    """Train; return the accuracy of each task on the test rows."""
    train, test = rows()
    model = adapted()
    arguments = TrainingArguments(
        output, max_steps=steps, per_device_train_batch_size=64, learning_rate=0.01, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=train).train()
    model.eval()
    found = {}
    for row, name in enumerate(TASKS):
        own = [each for each in test if each["tasks"] == row]
        images, labels = torch.stack([each["pixel_values"] for each in own]), torch.tensor([e["labels"] for e in own])
        with torch.no_grad():
            answers = model(pixel_values=images, tasks=name).logits.argmax(1)
        found[name] = (answers == labels).float().mean().item()
    return found


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name}  {accuracy:.3f}")
