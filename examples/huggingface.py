"""The same losses in Hugging Face's Trainer: a small vision Transformer, its loss in `compute_loss`."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import ibp_triton as ibp


class InvariantTrainer(Trainer):  # type: ignore[misc]
    """Trainer with a method in place of the model's own loss."""

    def __init__(self, *args: Any, method: ibp.Method, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.method = method
        self.model_accepts_loss_kwargs = False  # so that Trainer divides the loss by the accumulated batches

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The method's loss, with the logits where Trainer evaluates."""
        parts = self.method.parts(model, inputs["pixel_values"], inputs["labels"])
        return (parts.loss, {"logits": parts.logits}) if return_outputs else parts.loss


def images(count: int, seed: int) -> list[dict[str, Any]]:
    """Noise that is brighter on the left, or on the right."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for label in range(count):
        x = torch.rand(1, 8, 8, generator=generator)
        x[..., 4 * (label % 2) : 4 * (label % 2) + 4] += 0.5
        found.append({"pixel_values": x, "labels": label % 2})
    return found


def main(steps: int = 60) -> float:
    """Train, and evaluate on other images; the share that is right."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, num_labels=2,
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=16, learning_rate=3e-3, use_cpu=True,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer = InvariantTrainer(
            ViTForImageClassification(config), arguments, method=ibp.LossIBP(0.01),
            train_dataset=images(64, 1), eval_dataset=images(64, 2),
            compute_metrics=lambda found: {"right": float((found.predictions.argmax(1) == found.label_ids).mean())},
        )  # fmt: skip
        trainer.train()
        return float(trainer.evaluate()["eval_right"])


if __name__ == "__main__":
    print(main())
