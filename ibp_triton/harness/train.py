"""One training run: resumable after any epoch, the same bits whether it was interrupted or not."""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ibp_triton as ibp
from ibp_triton.errors import LaunchError
from ibp_triton.harness import data, models, optimizers, provenance, store
from ibp_triton.harness.batches import Batches
from ibp_triton.harness.data import Dataset
from ibp_triton.harness.grid import Run
from ibp_triton.harness.probe import semantics_gap
from ibp_triton.harness.schedule import RATE
from ibp_triton.harness.sources import Examples
from ibp_triton.harness.streams import derive
from ibp_triton.harness.team import ALONE, Team
from ibp_triton.harness.turns import Course, Turn, Watch, alone

Report = Callable[[store.Record], None]
Say = Callable[[str], None]
Shared = dict[int, tuple[Dataset, Batches]]  # by subset seed
PROBE = 256
_RATIOS: dict[tuple[object, ...], float] = {}


@dataclass
class State:
    """What a checkpoint holds: model, optimizer and the metrics of the epochs done."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    metrics: list[store.Record]


def warn(message: str) -> None:
    """Tell the user, beside what a command prints."""
    print(message, file=sys.stderr)


def train(
    run: Run, folder: Path, report: Report, data_dir: str | None = None, say: Say = warn, team: Team = ALONE
) -> store.Record:
    """Train `run` in `folder`, from its last finished epoch if there is one; the result, also in result.json.

    `report` gets every epoch's record, `say` what is wrong with stored files and what is done about it. The caller
    holds the folder's lock, and is process 0 of `team`. Raises DataError and NetworkError, and LaunchError for a team
    that breaks up.
    """
    return alone(course(run, folder, report, data_dir, say, team), team)


def course(
    run: Run,
    folder: Path,
    report: Report,
    data_dir: str | None = None,
    say: Say = warn,
    team: Team = ALONE,
    shared: Shared | None = None,
) -> Course[store.Record]:
    """What `train` does, as a course of steps that others make; `shared` are the data of runs beside this one."""
    dataset, batches = _batches(run, data_dir, team, {} if shared is None else shared)
    state = restore(run, folder, start(run, dataset), say)
    store.write_json(folder / store.CONFIG, provenance.config(run), last=False)
    several = {"processes": team.size} if team.size > 1 else {}
    store.write_json(folder / store.ENVIRONMENT, {**store.environment(), **several, **_beside(run)}, last=False)
    _check_team(run, team)
    team.call((run, data_dir))
    with team.together():
        team.spread((_tensors(run, state), state.metrics))
        for epoch in range(len(state.metrics), run.training.epochs):
            record = yield from _epoch(run, state, batches, epoch, team)
            if _is_test_epoch(run, epoch):
                record |= errors(state.model, dataset, run.training.channels_last)
            if run.track_cosine and hasattr(run.method, "semantics"):
                record |= semantics_gap(state.model, run.method, batches.first(PROBE))
            state.metrics.append(record)
            save(run, folder, state)
            report(record)
    return finish(run, folder, state, dataset)


def _beside(run: Run) -> store.Record:
    return {"replicas": run.training.replicas} if run.training.replicas != 1 else {}


def assist(run: Run, team: Team, data_dir: str | None = None) -> None:
    """Do this process's share of what `train` does in process 0, from the state that it has; nothing is written."""
    with team.together():
        alone(_assisting(run, team, data_dir), team)


def _assisting(run: Run, team: Team, data_dir: str | None) -> Course[None]:
    dataset, batches = _batches(run, data_dir, team, {})
    state = start(run, dataset)
    _take(run, state, *team.spread())
    for epoch in range(len(state.metrics), run.training.epochs):
        yield from _epoch(run, state, batches, epoch, team)


def _batches(run: Run, data_dir: str | None, team: Team, shared: Shared) -> tuple[Dataset, Batches]:
    """The data of a run; those of a subset seed are loaded once for all runs that share them."""
    if run.seeds.subset not in shared:
        dataset = data.load(run.data.found_in(data_dir), run.seeds.subset).to(torch.device(run.training.device))
        tangents = run.tangents if run.method.needs_tangents else None
        shared[run.seeds.subset] = dataset, Batches(dataset, run.training, run.seeds, tangents, team.share)
    dataset, batches = shared[run.seeds.subset]
    return dataset, batches.of(run.seeds)


def _check_team(run: Run, team: Team) -> None:
    if team.size > 1 and run.training.compile:
        raise LaunchError("training.compile is for one process: leave it out, or torchrun")


def start(run: Run, dataset: Dataset) -> State:
    """A fresh model and optimizer for `run`, weights from its weights seed."""
    model = models.build(run.network, dataset.shape, dataset.classes, run.seeds.weights).to(run.training.device)
    if run.training.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return State(model, _optimizer(run, model), [])


def _optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    training = run.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    cuda = optimizers.on_cuda(training.device)
    if training.optimizer is not None:
        return optimizers.make(training.optimizer, trained, cuda)
    optimizer = torch.optim.SGD(
        trained,
        # on the device, a rate that decays makes no new CUDA graph
        lr=torch.tensor(training.learning_rate, device=training.device) if cuda else training.learning_rate,
        momentum=training.momentum,
        dampening=training.dampening if training.momentum else 0.0,
        weight_decay=training.weight_decay,
        foreach=False,
        fused=cuda,
    )
    for parameter in trained if training.momentum else []:
        # torch does not dampen the first step unless the buffer is there already.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _epoch(run: Run, state: State, batches: Batches, epoch: int, team: Team) -> Course[store.Record]:
    rate, method = run.rate_in(epoch), run.method_in(epoch)
    for group in state.optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    state.model.train()
    seed = derive(run.seeds.order, "step", epoch, *([team.rank] if team.rank else []))
    place = run.seeds.subset, run.seeds.order, epoch
    turn = Turn(run, state.model, state.optimizer, method, batches.first(run.training.batch_size), place, seed)
    yield turn
    watch = Watch(run.training.device)
    total = torch.zeros((), device=next(state.model.parameters()).device)
    sound, count = torch.zeros_like(total), 0  # steps until the objective was no number, and all
    for batch in batches.epoch(epoch):
        watch.stop()
        answer = yield replace(turn, batch=batch, seed=None)
        watch.go()
        assert answer is not None
        total += batch.size * answer.loss
        sound, count = sound + answer.loss.isfinite(), count + 1
        watch.add(answer)
    loss = float(total) / len(batches)
    watch.stop()
    shown = loss if math.isfinite(loss) else None
    record = {name: getattr(method, name) for name in run.schedule.root if name != RATE}
    record |= {"epoch": epoch + 1, "loss": shown, "learning_rate": rate, **watch.record()}
    if shown is None or not _is_finite(state.model):
        record["diverged_step"] = epoch * count + min(int(sound) + 1, count)
    return record


def _is_finite(model: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def _is_test_epoch(run: Run, epoch: int) -> bool:
    return bool(run.training.test_every) and (epoch + 1) % run.training.test_every == 0


def errors(model: nn.Module, dataset: Dataset, channels_last: bool = True) -> store.Record:
    """Error in per cent on the test set and, where there is one, on the validation split."""
    record = {"test_error": error(model, dataset.test, dataset.mean, channels_last)}
    if len(dataset.validation.labels):
        record["validation_error"] = error(model, dataset.validation, dataset.mean, channels_last)
    return record


def error(model: nn.Module, split: Examples, mean: Tensor, channels_last: bool = True) -> float:
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
    """The weights and the records of their epochs in one file, the one before kept; metrics.jsonl is a copy to read.

    The state before the first epoch that diverged is kept as a plain state dict.
    """
    if [_has_diverged(record) for record in state.metrics[-2:]] == [False, True]:
        good = store.read_tensors(folder / store.RESUME)
        assert good is not None, "save or restore has left it"
        store.write_tensors(folder / store.LAST_GOOD, _model_part(good[0]))
    metadata = {"epochs": str(len(state.metrics)), "run": run.name, "metrics": store.metrics_text(state.metrics)}
    store.write_tensors(folder / store.RESUME, _tensors(run, state), metadata, folder / store.PREVIOUS)
    store.write_metrics(folder, state.metrics)


def _tensors(run: Run, state: State) -> dict[str, Tensor]:
    if run.training.optimizer is None:
        own = {f"momentum/{number}": tensor for number, tensor in enumerate(_buffers(state.optimizer))}
    else:
        own = optimizers.tensors(state.optimizer)
    return {f"model/{name}": tensor for name, tensor in state.model.state_dict().items()} | own


def _model_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "model/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def restore(run: Run, folder: Path, state: State, say: Say = warn) -> State:
    """The state of the last finished epoch that is stored soundly, or `state` as it is if there is none."""
    refused = []
    for name in (store.RESUME, store.PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        reason = _adopt(run, path, state)
        if reason is None:
            os.replace(path, folder / store.RESUME)
            break
        refused.append(f"{path}: {reason}")
    lost = len(store.read_metrics(folder))
    if not state.metrics and (refused or lost):
        refused = refused or [f"{folder / store.RESUME}: missing, {lost} epochs had been done"]
        say(f"{'; '.join(refused)}; the run is trained from the start")
    elif refused:
        say(f"{'; '.join(refused)}; the run goes on after epoch {len(state.metrics)}")
    if state.metrics and store.read_metrics(folder) != state.metrics:
        store.write_metrics(folder, state.metrics)
    return state


def _adopt(run: Run, path: Path, state: State) -> str | None:
    """Take the stored state over, whole or not at all; why not, if not."""
    found = store.read_tensors(path)
    if found is None:
        return "damaged"
    tensors, metadata = found
    if metadata.get("run") != run.name:
        return f"of another run, {metadata.get('run', 'nameless')}"
    records = _records(metadata, path.parent)
    if records is None:
        return "without the records of its epochs"
    if _kinds(tensors) != _kinds(_tensors(run, state)):
        return "of another network"
    _take(run, state, tensors, records)
    return None


def _take(run: Run, state: State, tensors: dict[str, Tensor], records: list[store.Record]) -> None:
    state.model.load_state_dict(_model_part(tensors))
    if run.training.optimizer is not None:
        optimizers.load(state.optimizer, tensors)
    else:
        for number, buffer in enumerate(_buffers(state.optimizer)):
            buffer.copy_(tensors[f"momentum/{number}"])
    state.metrics = list(records)


def _kinds(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Shapes and dtypes; not of an optimizer's state, which begins with its first step."""
    own = (optimizers.STATE, optimizers.NUMBER)
    return {name: (t.shape, t.dtype) for name, t in tensors.items() if not name.startswith(own)}


def _records(metadata: dict[str, str], folder: Path) -> list[store.Record] | None:
    """The records beside the weights; files of before they were stored there have them in metrics.jsonl alone."""
    text, count = metadata.get("metrics"), metadata.get("epochs", "")
    epochs = int(count) if count.isdecimal() else -1
    lines = text.encode().splitlines() if text else None
    records = store.read_metrics(folder, epochs) if lines is None else list(store.sound_records(lines))
    return records if len(records) == epochs else None


def _buffers(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [entry["momentum_buffer"] for entry in optimizer.state.values() if "momentum_buffer" in entry]


def finish(run: Run, folder: Path, state: State, dataset: Dataset) -> store.Record:
    """Final errors, the model as a plain state dict, the input mean; result.json last: it marks the run as finished."""
    checkpoint = folder / store.CHECKPOINT
    store.write_tensors(checkpoint, state.model.state_dict(), last=False)
    store.write_tensors(folder / store.MEAN, {"mean": dataset.mean}, last=False)
    result: store.Record = {
        "run": run.name,
        "method": run.method.key,
        "epochs": len(state.metrics),
        "final_loss": state.metrics[-1]["loss"],
        **divergence(state.metrics),
        **errors(state.model, dataset, run.training.channels_last),
        "seconds_per_epoch": statistics.median(record["seconds"] for record in state.metrics),
        "clock": "cpu" if run.training.device == "cpu" else "wall",
        "predicted_ratio": _predicted_ratio(run, state.model, dataset),
        "train_examples": len(dataset.train.labels),
        "test_examples": len(dataset.test.labels),
        store.SEAL: {path.name: store.digest(path) for path in (checkpoint, folder / store.MEAN)},
    }
    store.write_json(folder / store.RESULT, result)
    leftover = (store.RESUME, store.PREVIOUS, *(() if result["diverged"] else (store.LAST_GOOD,)))
    for name in leftover:
        (folder / name).unlink(missing_ok=True)
    return result


def _predicted_ratio(run: Run, model: nn.Module, dataset: Dataset) -> float:
    """Of a network of ours worked out once for all runs alike."""
    batch = min(run.training.batch_size, len(dataset.train.labels))
    key = (run.network.model_dump_json(), dataset.shape, dataset.classes, batch, run.method)
    if key not in _RATIOS or not run.network.name:
        _RATIOS[key] = run.method.predicted_ratio(ibp.Network(model), (batch, *dataset.shape))
    return _RATIOS[key]


def divergence(records: list[store.Record]) -> store.Record:
    """Whether the last epoch diverged; if so, the first step that did (from 1) and the last epoch before it."""
    good = next((record["epoch"] for record in reversed(records) if not _has_diverged(record)), 0)
    if good == len(records):
        return {"diverged": False}
    return {"diverged": True, "diverged_step": records[good].get("diverged_step"), "last_good_epoch": good}


def _has_diverged(record: store.Record) -> bool:
    return record["loss"] is None or "diverged_step" in record
