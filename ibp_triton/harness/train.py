"""One training run: resumable after any epoch, the same bits whether it was interrupted or not."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import ibp_triton as ibp
from ibp_triton.harness import data, methods, models, store
from ibp_triton.harness.batches import Batches
from ibp_triton.harness.compiled import EagerStep, compiled
from ibp_triton.harness.data import Dataset
from ibp_triton.harness.grid import Run
from ibp_triton.harness.probe import semantics_gap
from ibp_triton.harness.seeds import derive
from ibp_triton.harness.sources import Split

Report = Callable[[store.Record], None]
PROBE = 256


@dataclass
class State:
    """What a checkpoint holds: model, optimizer and the metrics of the epochs done."""

    model: nn.Module
    optimizer: torch.optim.SGD
    metrics: list[store.Record]


def train(run: Run, folder: Path, report: Report, data_dir: str | None = None) -> store.Record:
    """Train `run` in `folder`, from its last finished epoch if there is one; the result, also in result.json.

    `report` gets every epoch's record. The caller holds the folder's lock. Raises DataError and ModelError.
    """
    device = torch.device(run.training.device)
    dataset = data.load(run.data.found_in(data_dir), run.seeds.subset).to(device)
    state = restore(run, folder, start(run, dataset, device))
    store.write_json(folder / "config.json", run.config())
    store.write_json(folder / "environment.json", store.environment())
    batches = Batches(dataset, run.training, run.seeds, run.tangents if methods.needs_tangents(run.method) else None)
    step = _step(run, state, batches)
    for epoch in range(len(state.metrics), run.training.epochs):
        record = _epoch(run, step, state, batches, epoch)
        if _is_test_epoch(run, epoch):
            record |= errors(state.model, dataset, run.training.channels_last)
        if run.track_cosine and run.method.semantics:
            record |= semantics_gap(state.model, run.method, batches.first(PROBE))
        state.metrics.append(record)
        save(run, folder, state)
        report(record)
    return finish(run, folder, state, dataset)


def start(run: Run, dataset: Dataset, device: torch.device) -> State:
    """A fresh model and optimizer for `run`, weights from its weights seed."""
    model = models.build(run.network, dataset.shape, dataset.classes, run.seeds.weights).to(device)
    if run.training.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return State(model, _optimizer(run, model), [])


def _optimizer(run: Run, model: nn.Module) -> torch.optim.SGD:
    training = run.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        trained,
        lr=training.learning_rate,
        momentum=training.momentum,
        dampening=training.dampening if training.momentum else 0.0,
        weight_decay=training.weight_decay,
        foreach=False,
    )
    for parameter in trained if training.momentum else []:
        # torch does not dampen the first step unless the buffer is there already.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _step(run: Run, state: State, batches: Batches) -> EagerStep:
    network = ibp.Network(state.model, dtype=methods.PRECISIONS[run.training.precision])
    doubled = run.method.key == "at" and run.training.at_gradient == "sum"
    eager = EagerStep(network, state.optimizer, 2.0 if doubled else 1.0)
    if not run.training.compile:
        return eager
    state.model.train()
    return compiled(eager, methods.build(run.method), batches.first(run.training.batch_size), run.training.precision)


def _epoch(run: Run, step: EagerStep, state: State, batches: Batches, epoch: int) -> store.Record:
    decay = run.training.decay**epoch
    rate = run.training.learning_rate * decay
    method = methods.build(run.method, decay if run.training.beta_decay else 1.0)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    torch.manual_seed(derive(run.seeds.order, "step", epoch))
    state.model.train()
    clock = _clock(run)
    begin, wall = clock(), time.perf_counter()
    total = torch.zeros((), device=next(state.model.parameters()).device)
    for batch in batches.epoch(epoch):
        total += len(batch.labels) * step(method, batch)
    loss = float(total) / len(batches)
    shown = loss if math.isfinite(loss) else None
    seconds, wall = clock() - begin, time.perf_counter() - wall
    return {"epoch": epoch + 1, "loss": shown, "seconds": seconds, "wall_seconds": wall, "learning_rate": rate}


def _clock(run: Run) -> Callable[[], float]:
    """CPU seconds of the process, which a busy machine does not stretch; wall-clock seconds on an accelerator."""
    return time.process_time if run.training.device == "cpu" else time.perf_counter


def _is_test_epoch(run: Run, epoch: int) -> bool:
    return bool(run.training.test_every) and (epoch + 1) % run.training.test_every == 0


def errors(model: nn.Module, dataset: Dataset, channels_last: bool = True) -> store.Record:
    """Error in per cent on the test set and, where there is one, on the validation split."""
    record = {"test_error": error(model, dataset.test, dataset.mean, channels_last)}
    if len(dataset.validation.labels):
        record["validation_error"] = error(model, dataset.validation, dataset.mean, channels_last)
    return record


def error(model: nn.Module, split: Split, mean: Tensor, channels_last: bool = True) -> float:
    """Share of wrong predictions in per cent, in float32 and evaluation mode."""
    wrong = (predictions(model, split.images, mean, channels_last) != split.labels).sum()
    return 100.0 * float(wrong) / len(split.labels)


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor, mean: Tensor, channels_last: bool = True) -> Tensor:
    """Predicted classes [N] of images [N, C, H, W] in [0, 1]."""
    model.eval()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    parts = [model((part - mean).contiguous(memory_format=layout)).argmax(1) for part in torch.split(images, 500)]
    model.train()
    return torch.cat(parts)


def save(run: Run, folder: Path, state: State) -> None:
    """Metrics first, then the checkpoint that says how many of them count."""
    store.write_metrics(folder, state.metrics)
    tensors = {f"model/{name}": tensor for name, tensor in state.model.state_dict().items()}
    tensors |= {f"momentum/{number}": tensor for number, tensor in enumerate(_buffers(state.optimizer))}
    store.write_tensors(folder / store.RESUME, tensors, {"epochs": str(len(state.metrics)), "run": run.name})


def restore(run: Run, folder: Path, state: State) -> State:
    """The state of the last finished epoch, or `state` as it is if no epoch was finished."""
    found = store.read_tensors(folder / store.RESUME)
    if found is None or found[1].get("run") != run.name:
        return state
    tensors, metadata = found
    prefix = "model/"
    state.model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    for number, buffer in enumerate(_buffers(state.optimizer)):
        buffer.copy_(tensors[f"momentum/{number}"])
    state.metrics = store.read_metrics(folder, int(metadata["epochs"]))
    return state


def _buffers(optimizer: torch.optim.SGD) -> list[Tensor]:
    return [entry["momentum_buffer"] for entry in optimizer.state.values() if "momentum_buffer" in entry]


def finish(run: Run, folder: Path, state: State, dataset: Dataset) -> store.Record:
    """Final errors, the model as a plain state dict, the input mean; result.json last: it marks the run as finished."""
    result: store.Record = {
        "run": run.name,
        "method": run.method.key,
        "epochs": len(state.metrics),
        "final_loss": state.metrics[-1]["loss"],
        "diverged": state.metrics[-1]["loss"] is None,
        **errors(state.model, dataset, run.training.channels_last),
        "seconds_per_epoch": statistics.median(record["seconds"] for record in state.metrics),
        "clock": "cpu" if run.training.device == "cpu" else "wall",
        "predicted_ratio": methods.predicted_ratio(run.method, state.model, run.training.batch_size, dataset.shape),
        "train_examples": len(dataset.train.labels),
        "test_examples": len(dataset.test.labels),
    }
    store.write_tensors(folder / store.CHECKPOINT, state.model.state_dict())
    store.write_tensors(folder / store.MEAN, {"mean": dataset.mean})
    store.write_json(folder / store.RESULT, result)
    (folder / store.RESUME).unlink(missing_ok=True)
    return result
