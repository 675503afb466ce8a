"""Runs on the boards of experiment trackers: TensorBoard, Weights & Biases, trackio, or what has their protocol."""

from __future__ import annotations

import contextvars
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import ibp_triton as ibp
from ibp_triton.errors import BoardError, ConfigError, DamageError, DataError
from ibp_triton.harness import data, evaluate, plugins, store
from ibp_triton.harness.config import Evaluate
from ibp_triton.harness.grid import Run

Listener = Callable[[dict[str, Any]], None]
Say = Callable[[str], None]
LOGGED = "logged.json"  # of a run's folder: the boards that have all of it
SAMPLES = 8  # test images that are shown


class Page(Protocol):
    """One run on a board."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name after `step` epochs."""

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """An RGB image, uint8 [H, W, 3]."""

    def close(self) -> None:
        """The run is logged: everything is written or sent."""


class Board(Protocol):
    """Where runs are logged. `name` says which, `place` the folder or project where that is given, else empty."""

    def __call__(self, run: Run, folder: Path, place: str) -> Page:
        """The page of a run, whose files are in `folder`; an earlier page of the same run goes on."""


class TensorBoardPage:
    """Event files in the run's folder, or in a subfolder of its name of `place`."""

    def __init__(self, run: Run, folder: Path, place: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(place) / run.name if place else folder / "tensorboard"))
        self._writer.add_text("config", f"```\n{json.dumps(run.config(), indent=2)}\n```", 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name after `step` epochs."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """An RGB image, uint8 [H, W, 3]."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandbPage:
    """A run of the project `place`, by its own name: logged again, it goes on."""

    def __init__(self, run: Run, folder: Path, place: str) -> None:
        import wandb

        about = {"id": run.name, "name": run.label, "group": run.row, "config": run.config(), "dir": str(folder)}
        self._image = wandb.Image
        self._run = wandb.init(project=place or "ibp-triton", resume="allow", reinit="create_new", **about)
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name after `step` epochs."""
        self._run.log({"epoch": step, **values})

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """An RGB image, uint8 [H, W, 3]."""
        self._run.log({"epoch": step, name: self._image(pixels.numpy())})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class TrackioPage:
    """A run of the project `place`; in a context of its own, for trackio ends the run before where it knows of one."""

    def __init__(self, run: Run, folder: Path, place: str) -> None:
        import trackio

        self._image, self._context = trackio.Image, contextvars.Context()
        about = {"name": f"{run.label} {run.name}", "group": run.row, "config": run.config(), "resume": "allow"}
        self._run = self._context.run(
            trackio.init, project=place or "ibp-triton", auto_log_gpu=False, auto_log_cpu=False, embed=False, **about
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name after `step` epochs."""
        self._context.run(self._run.log, dict(values), step)

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """An RGB image, uint8 [H, W, 3]."""
        self._context.run(self._run.log, {name: self._image(pixels.numpy())}, step)

    def close(self) -> None:
        """Send what is left."""
        self._context.run(self._run.finish)


BOARDS: dict[str, Board] = {"tensorboard": TensorBoardPage, "wandb": WandbPage, "trackio": TrackioPage}


class Log:
    """Boards by what a command calls them: "tensorboard", "wandb=PROJECT", "package.module:Page=PLACE"."""

    def __init__(self, texts: Iterable[str], root: Path, choice: Evaluate, data_dir: str | None, say: Say) -> None:
        self._boards = {text: _board(text) for text in dict.fromkeys(texts)}
        self._root, self._choice, self._data_dir, self._say = root, choice, data_dir, say
        self._pages: dict[str, dict[str, Page]] = {}
        self._ended: set[str] = set()

    def listening(self, runs: Iterable[Run], listen: Listener) -> Listener:
        """A listener of `launch` that logs epochs as they come and runs as they end, and then calls `listen`."""
        if not self._boards:
            return listen
        known = {run.name: run for run in runs}

        def hear(event: dict[str, Any]) -> None:
            run = known.get(event["run"])
            if run and event["kind"] == "epoch":
                self._each(run, lambda page: page.scalars(event["epoch"], _numbers(event)))
            elif run and event["kind"] == "done":
                self._end(run, earlier=event["run"] not in self._pages)
            elif run and event["kind"] == "failed" and run.name in self._pages:
                self._close(run)
            listen(event)

        return hear

    def finished(self, run: Run, again: bool = False) -> None:
        """Log a run that is stored already, on the boards that do not have it yet, or on all."""
        folder = self._root / run.name
        had = () if again else (store.find_json(folder / LOGGED) or {}).get("boards", ())
        wanted = [text for text in self._boards if text not in had]
        if wanted and run.name not in self._ended and store.result(folder):
            self._open(run, wanted)
            self._end(run, earlier=True)

    def close(self) -> None:
        """Close the pages of runs that have not ended."""
        for pages in self._pages.values():
            for page in pages.values():
                with suppress(Exception):
                    page.close()
        self._pages.clear()

    def _open(self, run: Run, texts: Iterable[str]) -> None:
        pages = self._pages[run.name] = {}
        for text in texts:
            try:
                pages[text] = self._boards[text](run, self._root / run.name, text.partition("=")[2])
            except Exception as error:
                self._left_out(run, text, error)

    def _left_out(self, run: Run, text: str, error: Exception) -> None:
        """What a board raises stops no training: it is told, and the board has no more of this run."""
        self._say(f"{run.label}: not logged to {text}; {type(error).__name__}: {error}")

    def _each(self, run: Run, do: Callable[[Page], None]) -> None:
        if run.name not in self._pages:
            self._open(run, self._boards)
        for text, page in list(self._pages[run.name].items()):
            try:
                do(page)
            except Exception as error:
                self._left_out(run, text, error)
                del self._pages[run.name][text]

    def _end(self, run: Run, earlier: bool) -> None:
        """What a finished run has besides its epochs; those too if they were trained `earlier`."""
        folder = self._root / run.name
        records = store.read_metrics(folder)
        for record in records if earlier else ():
            self._each(run, lambda page, record=record: page.scalars(record["epoch"], _numbers(record)))  # type: ignore[misc]
        last, summary = len(records), evaluate.summary_of(folder, self._choice) or {}
        values = {**_numbers(store.result(folder) or {}), **robustness_scalars(summary)}
        self._each(run, lambda page: page.scalars(last, values))
        for name, pixels in self._samples(run, folder).items():
            self._each(run, lambda page, name=name, pixels=pixels: page.picture(last, name, pixels))  # type: ignore[misc]
        logged = self._close(run)
        self._ended.add(run.name)
        had = (store.find_json(folder / LOGGED) or {}).get("boards", [])
        store.write_json(folder / LOGGED, {"boards": list(dict.fromkeys([*had, *logged]))})

    def _close(self, run: Run) -> list[str]:
        """Close the run's pages; the boards that have it now."""
        self._each(run, lambda page: page.close())
        return list(self._pages.pop(run.name))

    def _samples(self, run: Run, folder: Path) -> dict[str, Tensor]:
        try:
            return sample_pictures(run, folder, self._choice, self._data_dir)
        except (DataError, DamageError) as error:
            self._say(f"{run.label}: no sample images on the boards; {error}")
            return {}


def _board(text: str) -> Board:
    """The board that a command names; raises BoardError and ConfigError."""
    name = text.partition("=")[0]
    target = None if name in BOARDS else plugins.target_of("boards", name)
    if target is not None:
        found: Board = plugins.load(target)
        return found
    if name not in BOARDS:
        known = ", ".join([*BOARDS, *plugins.offered("boards")])
        raise ConfigError(f"{text}: no board; choose one of {known}, or package.module:Page, then =PLACE if need be")
    if find_spec(name) is None:
        raise BoardError(f"{text}: {name} is not installed; install it with: pip install 'ibp-triton[{name}]'")
    return BOARDS[name]


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an epoch's record or of a result."""
    plain = {name: value for name, value in record.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in plain.items() if name not in ("epoch", "epochs")}


def robustness_scalars(summary: Mapping[str, Any]) -> dict[str, float]:
    """Errors in per cent of a stored evaluation by the curve and its level, and its check for masking."""
    found: dict[str, float] = {}
    for name, curve in summary.items():
        if isinstance(curve, dict) and "levels" in curve:
            found |= {
                f"robustness/{name}" if name == evaluate.CLEAN else f"robustness/{name}/{level:g}": error
                for level, error in zip(curve["levels"], curve["error"], strict=True)
            }
    return found | {f"masking/{name}": float(value) for name, value in summary.get("masking", {}).items()}


def sample_pictures(run: Run, folder: Path, choice: Evaluate, data_dir: str | None) -> dict[str, Tensor]:
    """The first test images, and the same after FGSM of the largest size measured: a row of images each [H, W, 3].

    Raises:
        DataError, DamageError: where the data or the checkpoint are not there.
    """
    dataset = data.load(run.data.found_in(data_dir), run.seeds.subset)
    images, labels = dataset.test.images[:SAMPLES], dataset.test.labels[:SAMPLES]
    found = {"samples/clean": _row(images)}
    sizes = [size for name in ("adversarial", "pgd") for size in evaluate.levels_of(choice, name)]
    size = max(sizes, default=choice.masking or 0.0)
    if size:
        model = evaluate.load_model(run, folder, dataset)
        (moved,) = ibp.fgsm(model, images - dataset.mean, labels, [size])
        found[f"samples/fgsm {size:g}"] = _row(moved + dataset.mean)
    return found


def _row(images: Tensor) -> Tensor:
    """Images [N, C, H, W] in [0, 1] side by side, as uint8 [H, N·W, 3]."""
    row = torch.cat(list(images.clamp(0, 1)), -1).mul(255).round().to(torch.uint8)
    return (row if len(row) == 3 else row[:1].expand(3, -1, -1)).permute(1, 2, 0).contiguous()
