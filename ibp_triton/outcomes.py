"""Which examples models got right under attacks: error rates, paired tests, masked gradients, tables, a plot."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ibp_triton.errors import InputError

CLEAN = "clean"


@dataclass(frozen=True)
class ErrorRate:
    """One model under one attack of one size."""

    model: str
    attack: str
    size: float  # ε or σ, in pixel units
    errors: int
    examples: int

    @property
    def error(self) -> float:
        """In per cent."""
        return 100 * self.errors / self.examples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the error, in per cent."""
        z, n, p = 1.959964, self.examples, self.errors / self.examples
        centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return 100 * (centre - half) / (1 + z * z / n), 100 * (centre + half) / (1 + z * z / n)


@dataclass(frozen=True)
class Mcnemar:
    """What McNemar's exact test found of two models on the same examples."""

    gained: int  # examples that only the second model gets right
    lost: int  # examples that only the first gets right
    p: float  # two-sided


@dataclass(frozen=True)
class Comparison(Mcnemar):
    """The test of two models under the same attack."""

    attack: str
    size: float


@dataclass(frozen=True, eq=False)
class Robustness:
    """What ``robustness`` measured: a table to print, store, draw and compare.

    Attributes:
        outcomes: {(model, attack, size): booleans [N], True where the example is classified right}.
        norm: of the perturbations of fgsm and pgd.
        zero_gradients: {model: share of examples whose input gradient is all zeros}.
    """

    outcomes: Mapping[tuple[str, str, float], Tensor]
    norm: str
    zero_gradients: Mapping[str, float]

    @property
    def rows(self) -> list[ErrorRate]:
        """One for each model, attack and size."""
        return [ErrorRate(*key, int((~right).sum()), len(right)) for key, right in self.outcomes.items()]

    @property
    def models(self) -> list[str]:
        """Their names."""
        return list(dict.fromkeys(name for name, _, _ in self.outcomes))

    def error(self, attack: str = CLEAN, size: float = 0.0, model: str | None = None) -> float:
        """Error in per cent.

        Args:
            attack: its name; "clean" for the examples as they are.
            size: ε or σ in pixel units, as it was measured.
            model: its name; the first by default.

        Raises:
            InputError (a ValueError): for what was not measured.
        """
        name = self.models[0] if model is None else model
        for key, right in self.outcomes.items():
            if key[:2] == (name, attack) and math.isclose(key[2], size, abs_tol=1e-12):
                return 100 * float((~right).double().mean())
        raise InputError(f"{attack} of size {size} of model {name!r} was not measured")

    def compare(self, other: Robustness | None = None) -> list[Comparison]:
        """Paired tests of the two models, or of this result's one and another's, wherever both were measured.

        Args:
            other: the result of another model on the same examples, where this one has one model.

        Raises:
            InputError (a ValueError): where there are not two models, or they saw different examples.
        """
        both = (
            list(self._single()) + list(other._single())
            if other is not None
            else [{key[1:]: right for key, right in self.outcomes.items() if key[0] == name} for name in self.models]
        )
        if len(both) != 2:
            raise InputError(f"a comparison takes two models, not {len(both)}: give one result of two, or two of one")
        first, second = both
        if any(first[key].shape != second[key].shape for key in first.keys() & second.keys()):
            raise InputError("the two models were measured on different examples")
        tests = {key: mcnemar(right, second[key]) for key, right in first.items() if key in second}
        return [Comparison(test.gained, test.lost, test.p, *key) for key, test in tests.items()]

    def _single(self) -> Iterator[dict[tuple[str, float], Tensor]]:
        for name in self.models:
            yield {key[1:]: right for key, right in self.outcomes.items() if key[0] == name}

    def masking(self) -> list[str]:
        """Signs that gradients are masked, so that errors under fgsm and pgd say little; empty where there is none.

        PGD should harm at least as much as FGSM of the same size, FGSM more than random signs, more ε more than less,
        and few examples should have no gradient at all.
        """
        found = []
        for model in self.models:
            own = {key[1:]: right for key, right in self.outcomes.items() if key[0] == model}
            for (attack, size), right in own.items():
                weaker = {"pgd": "fgsm", "fgsm": "random_sign"}.get(attack)
                other = own.get((weaker, size)) if weaker else None
                if other is not None and _clearly_more(other, right):
                    found.append(f"{model}: {attack} at {size:g} harms less than {weaker}")
                steps = [(s, r) for (a, s), r in own.items() if a == attack and s < size]
                if attack in ("fgsm", "pgd") and steps and _clearly_more(steps[-1][1], right):
                    found.append(f"{model}: {attack} at {size:g} harms less than at {steps[-1][0]:g}")
            if self.zero_gradients.get(model, 0.0) > 0.1:
                found.append(f"{model}: {100 * self.zero_gradients[model]:.0f}% of the examples have no gradient")
        return found

    def _cells(self) -> list[tuple[str, str, str, str, str]]:
        return [
            (row.model, row.attack, f"{row.size:.4g}", f"{row.error:.2f}", "{:.2f} – {:.2f}".format(*row.interval))
            for row in self.rows
        ]

    def to_csv(self, path: str | Path | None = None) -> str:
        """One line a row with header, full precision; written to ``path`` too if that is given."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["model", "attack", "size", "errors", "examples", "error_percent", "low_percent", "high_percent"]
        )
        for row in self.rows:
            writer.writerow(
                [csv_cell(row.model), row.attack, row.size, row.errors, row.examples, row.error, *row.interval]
            )
        return _written(file.getvalue(), path)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """A Markdown table, error in per cent with its 95 % interval; written to ``path`` too if that is given."""
        head = ["| model | attack | size | error % | 95 % |", "| --- | --- | --- | --- | --- |"]
        rows = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in self._cells()]
        return _written("\n".join([*head, *rows]) + "\n", path)

    def to_latex(self, path: str | Path | None = None) -> str:
        """A LaTeX tabular, error in per cent with its 95 % interval; written to ``path`` too if that is given."""
        rows = [" & ".join(latex_cell(cell) for cell in cells) + r" \\" for cells in self._cells()]
        head = [r"\begin{tabular}{llrrr}", r"\hline", r"model & attack & size & error \% & 95 \% \\", r"\hline"]
        return _written("\n".join([*head, *rows, r"\hline", r"\end{tabular}"]) + "\n", path)

    def plot(self, path: str | Path | None = None) -> Any:
        """Error against size, a panel an attack, with bands of 95 %; the figure, also written to ``path`` if given.

        Raises:
            ImportError: without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install matplotlib") from error
        attacks = list(dict.fromkeys(row.attack for row in self.rows if row.attack != CLEAN)) or [CLEAN]
        figure = Figure(figsize=(4 * len(attacks), 3.2), layout="constrained")
        for axes, attack in zip(figure.subplots(1, len(attacks), squeeze=False)[0], attacks, strict=True):
            for model in self.models:
                own = [row for row in self.rows if row.model == model and row.attack in (CLEAN, attack)]
                own.sort(key=lambda row: row.size)
                sizes = [row.size for row in own]
                axes.plot(sizes, [row.error for row in own], marker=".", label=model.replace("$", r"\$"))
                axes.fill_between(sizes, *zip(*(row.interval for row in own), strict=True), alpha=0.2, linewidth=0)
            axes.set(title=attack.replace("_", " "), xlabel="σ" if attack == "gaussian" else "ε", ylabel="error %")
            axes.legend(frameon=False)
        if path is not None:
            figure.savefig(path)
        return figure

    def __str__(self) -> str:
        return self.to_markdown()


def mcnemar(first: Tensor, second: Tensor) -> Mcnemar:
    """McNemar's exact test of two outcomes (True: right) on the same examples, booleans of one shape."""
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    n, k = gained + lost, min(gained, lost)
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return Mcnemar(gained, lost, 1.0 if n == 0 else min(1.0, 2 * sum(math.exp(log) for log in logs)))


def _clearly_more(harmed: Tensor, other: Tensor) -> bool:
    """Whether the first outcomes have more errors than the second, beyond chance (p < 0.05, paired)."""
    test = mcnemar(harmed, other)
    return test.gained > test.lost and test.p < 0.05


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def csv_cell(label: str) -> str:
    """A label that no spreadsheet takes for a formula."""
    return f"'{label}" if label.startswith(("=", "+", "-", "@", "\t", "\r")) else label


def latex_cell(text: str) -> str:
    """A text that LaTeX sets as it is, Greek letters and signs as formulas."""
    return re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", "\0")).translate(_LATEX)


_SIGNS = {"±": "pm", "×": "times", "ε": "varepsilon", "β": "beta", "σ": "sigma", "λ": "lambda", "∇": "nabla"}
_LATEX = {ord(sign): f"$\\{name}$" for sign, name in _SIGNS.items()}
_LATEX |= {0: r"\textbackslash{}", ord("−"): "$-$", ord("–"): "--", ord("~"): r"\textasciitilde{}", ord("^"): r"\^{}"}
_LATEX |= {ord("<"): "$<$", ord(">"): "$>$", ord("|"): "$|$"}
