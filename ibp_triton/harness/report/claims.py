"""What the paper says, statement by statement, beside what kept results say of it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ibp_triton.harness import stats
from ibp_triton.harness.evaluate import CLEAN, CURVES
from ibp_triton.harness.report.gather import Findings, in_order
from ibp_triton.harness.report.paper import BETAS, IMPROVEMENTS, TABLES, Published
from ibp_triton.harness.report.tables import Table
from ibp_triton.harness.summary import ResultRow, error_text, p_text
from ibp_triton.outcomes import mcnemar

HOLDS, FAILS, OPEN, ABSENT = "holds", "fails", "open", "no runs yet"
NAMES = {
    "bp": "BP",
    "prediction_ibp": "Prediction IBP",
    "loss_ibp": "Loss IBP",
    "at": "Adversarial Training",
    "fast_at": "Fast AT",
    "tbp": "Tangent BP",
    "fast_tbp": "Fast TBP",
}
HARMS = {"adversarial": "adversarial examples", "gaussian": "Gaussian noise"}
SETS = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
NEAR = 0.15  # of the paper's ratio of times
NOTE = (
    "holds: as the paper says, and beyond chance where there is a test; fails: beyond chance the other way, or outside "
    "the interval; open: chance could have made it. p is McNemar's exact test on paired test examples, the seeds "
    "pooled (of one seed it tells two networks apart, not two methods), or for an order the share of all orders that "
    "agree as well with the paper's; all p-values here are one family, corrected after Holm. Intervals are 95 %, "
    "bootstrapped over seeds and examples, each for itself. That a method is no better holds if the interval of the "
    "difference lies within two of the paper's standard deviations of BP, and fails beyond chance. A size of an "
    "improvement holds if the paper's figure lies in the interval; outside it, one seed leaves it open. A ratio of "
    "times holds within 15 % of the paper's; the lowest error goes by the means alone. Figures 2 and 3 are printed "
    "without numbers: they are read as saying that a method withstands the middle size better than BP. Rows are of the "
    "paper's semantics. A method that table1_cifar10 lacks is taken from table1_cifar10_fp32, beside a BP in float32; "
    "what is said of all methods goes by the one that has more of them."
)
Found = Mapping[str, Findings]


@dataclass(frozen=True)
class Claim:
    """A statement of the paper and what was found; `p` is not yet corrected.

    `agrees` is None where no run tells. A difference is certain where p is below 5 %; `tie` claims that there is none,
    which `agrees` says of its interval. `doubtful`: what does not agree may still be chance.
    """

    text: str
    ours: str = ""
    agrees: bool | None = None
    p: float | None = None
    tie: bool = False
    doubtful: bool = False

    def verdict(self, p: float | None) -> str:
        """One of the four, from the corrected p-value."""
        if self.agrees is None:
            return ABSENT
        if p is None:
            return HOLDS if self.agrees else OPEN if self.doubtful else FAILS
        if self.tie:
            return FAILS if p < 0.05 else HOLDS if self.agrees else OPEN
        return OPEN if p >= 0.05 else HOLDS if self.agrees else FAILS


def claims_text(experiments: Found) -> str:
    """The claims as Markdown: their summary, the table, how to read it. Experiments by name."""
    table, summary = judged(list(claims(experiments)))
    return f"# The paper's claims\n\n{summary}\n\n{table.markdown()}"


def judged(found: list[Claim]) -> tuple[Table, str]:
    """The table "claim · ours · verdict", and how many claims have which verdict."""
    tested = [number for number, claim in enumerate(found) if claim.p is not None]
    fair = dict(zip(tested, stats.holm([found[number].p or 0.0 for number in tested]), strict=True))
    cells = []
    for number, claim in enumerate(found):
        p = fair.get(number)
        ours = claim.ours + (f"; {p_text(p)}" if p is not None else "")
        cells.append([claim.text, ours or "–", claim.verdict(p)])
    counts = Counter(line[2] for line in cells)
    told = ", ".join(f"{counts[verdict]} {words}" for verdict, words in _WORDS.items() if counts[verdict])
    return Table("Claim by claim", ["claim", "ours", "verdict"], cells, NOTE), f"Of {len(found)} claims {told}."


_WORDS = {HOLDS: "hold", FAILS: "fail", OPEN: "are open", ABSENT: "have no runs yet"}


def claims(experiments: Found) -> Iterator[Claim]:
    """Each statement, in the paper's order."""
    for data, name in SETS.items():
        table = f"table1_{data}"
        yield from _table(experiments.get(table), experiments.get(f"{table}_fp32"), data, name)
    for data, name in SETS.items():
        yield from _figure(experiments.get(f"fig2_adversarial_{data}"), "adversarial", f"Figure 2, {name}")
        yield from _figure(experiments.get(f"fig3_gaussian_{data}"), "gaussian", f"Figure 3, {name}")
    yield from _sizes(experiments.get("fig4_dataset_size"))


def _table(findings: Findings | None, finer: Findings | None, data: str, name: str) -> Iterator[Claim]:
    """Table 1: each method against BP, the sizes of the differences, the order, the times.

    ``finer``: the methods that need float32, with a BP of their own.
    """
    paper = TABLES[f"table1_{data}"]  # type: ignore[index]
    rows, more = _published(findings), _published(finer)
    others = [key for key in paper if key != "bp"]

    def beside_bp(key: str) -> tuple[Findings | None, ResultRow | None, ResultRow | None]:
        if key in rows or key not in more:
            return findings, rows.get(key), rows.get("bp")
        return finer, more[key], more.get("bp")

    for key in others:
        theirs = paper[key].mean - paper["bp"].mean
        text = f"{name}: {_said(key, paper, 2 if data == 'mnist' else 1)}"
        yield _against_bp(*beside_bp(key), text, theirs, margin=2 * paper["bp"].sd)
    for key in others:
        if paper[key].mean != paper["bp"].mean:
            gain = paper["bp"].mean - paper[key].mean
            text = f"{name}: {NAMES[key]} improves on BP by {gain:.2f} points ({100 * gain / paper['bp'].mean:.0f} %)"
            yield _size(*beside_bp(key), text, gain)
    means = sorted({one.mean for one in paper.values()})
    ranked = " before ".join(" and ".join(NAMES[key] for key in paper if paper[key].mean == mean) for mean in means)
    fuller, every = (finer, more) if len(more) > len(rows) else (findings, rows)
    yield _order(fuller, every, paper, f"{name}: {ranked}")
    least = min(one.mean for one in paper.values())
    best = [key for key in paper if paper[key].mean == least]
    lead = f"{name}: {' and '.join(NAMES[key] for key in best)} ha{'s' if len(best) == 1 else 've'} the lowest error"
    if len(every) < len(paper):
        yield Claim(f"{lead} of all", f"{len(every)} of {len(paper)} methods have runs" if every else "")
    else:
        first = min(every, key=lambda key: every[key].mean)
        error = error_text(every[first].mean, every[first].sd)
        yield Claim(f"{lead} of all", f"{NAMES[first]}, {error} %", first in best)
    for key in others:
        ratio, row = paper[key].seconds / paper["bp"].seconds, beside_bp(key)[1]
        text = f"{name}: an epoch of {NAMES[key]} takes {ratio:.2f} times BP's"
        ours = row.measured if row else None
        yield Claim(text) if ours is None else Claim(text, f"{ours:.2f} times", abs(ours / ratio - 1) <= NEAR)


def _published(findings: Findings | None) -> dict[str, ResultRow]:
    """The rows in the paper's semantics by the key of their method."""
    if findings is None:
        return {}
    found = [row for row in findings.chosen if row.errors and getattr(row.method, "semantics", "paper") != "exact"]
    return {row.key: row for row in found}


def _said(key: str, paper: Mapping[str, Published], digits: int) -> str:
    one, base = paper[key], paper["bp"]
    word = "no better than" if one.mean == base.mean else "better than" if one.mean < base.mean else "worse than"
    errors = [f"{each.mean:.{digits}f} ± {each.sd:.{digits}f}" for each in (one, base)]
    return f"{NAMES[key]} is {word} BP, {' against '.join(errors)} %"


def _paired(findings: Findings | None, row: ResultRow | None, bp: ResultRow | None, name: str) -> list[Tensor]:
    """Outcomes of BP and of the row [seeds, levels, examples] on the seeds that both have; empty if there are none."""
    if findings is None or row is None or bp is None:
        return []
    first, second = findings.outcomes(bp, name), findings.outcomes(row, name)
    common = [seeds for seeds in first if seeds in second]
    return [torch.stack([part[seeds] for seeds in common]) for part in (first, second)] if common else []


def _seeds(pair: list[Tensor]) -> str:
    count = len(pair[0])
    return f"{count} seed{'s' if count > 1 else ''}"


def _against_bp(
    findings: Findings | None,
    row: ResultRow | None,
    bp: ResultRow | None,
    text: str,
    theirs: float,
    at: str = CLEAN,
    margin: float = 0.0,
) -> Claim:
    pair = _paired(findings, row, bp, at)
    if not pair:
        return Claim(text)
    middle = pair[0].shape[1] // 2
    before, after = (part[:, middle] for part in pair)
    test = mcnemar(before, after)
    errors = [100 * float((~part).float().mean()) for part in (after, before)]
    ours = f"{errors[0]:.2f} against {errors[1]:.2f} %, {_seeds(pair)}"
    if theirs == 0:
        low, high = (float(bound[0]) for bound in stats.difference_band(pair[0], pair[1]))
        ours = f"{errors[0]:.2f} against {errors[1]:.2f} %, better by {low:.2f} … {high:.2f}, {_seeds(pair)}"
        return Claim(text, ours, -margin <= low and high <= margin, test.p, tie=True)
    return Claim(text, ours, (errors[0] - errors[1]) * theirs > 0, test.p)


def _size(
    findings: Findings | None,
    row: ResultRow | None,
    bp: ResultRow | None,
    text: str,
    theirs: float,
    share: bool = False,
) -> Claim:
    """An improvement on BP in points, or as a share of BP's error in per cent."""
    pair = _paired(findings, row, bp, CLEAN)
    if not pair:
        return Claim(text)
    low, high = (float(bound[0]) for bound in stats.difference_band(pair[0], pair[1]))
    before, after = (100 * float((~part).float().mean()) for part in pair)
    scale, unit = (100 / before, "%") if share else (1.0, "points")
    ours = f"{scale * (before - after):.2f} {unit} ({scale * low:.2f} … {scale * high:.2f}), {_seeds(pair)}"
    return Claim(text, ours, scale * low <= theirs <= scale * high, doubtful=len(pair[0]) == 1)


def _order(
    findings: Findings | None, rows: Mapping[str, ResultRow], paper: Mapping[str, Published], text: str
) -> Claim:
    if findings is None or len(rows) < len(paper):
        return Claim(text, f"{len(rows)} of {len(paper)} methods have runs" if rows else "")
    same, total = in_order(findings, rows["bp"].variant)
    printed = [paper[key].mean for key in rows]
    places = itertools.permutations(range(len(printed)))
    as_well = [_agree(printed, order) >= same for order in places]
    ours = f"{same} of the {total} pairs that differ in the paper lie the same way round"
    return Claim(text, ours, 2 * same > total, sum(as_well) / len(as_well))


def _agree(printed: list[float], order: tuple[int, ...]) -> int:
    pairs = itertools.combinations(range(len(printed)), 2)
    return sum((printed[a] - printed[b]) * (order[a] - order[b]) > 0 for a, b in pairs)


def _figure(findings: Findings | None, curve: str, name: str) -> Iterator[Claim]:
    """Figures 2 and 3: each method under the middle size of a perturbation, against BP."""
    rows = _published(findings)
    kind, harm = CURVES[curve], HARMS[curve]
    if findings is None or "bp" not in rows:
        yield Claim(f"{name}: the methods withstand {harm} better than BP")
        return
    levels = findings.curves[curve][0][1].levels if findings.curves[curve] else []
    size = f" ({kind.symbol} = {levels[len(levels) // 2]:g})" if levels else ""
    for key in (key for key in NAMES if key != "bp"):
        text = f"{name}: {NAMES[key]} withstands {harm} better than BP{size}"
        yield _against_bp(findings, rows.get(key), rows["bp"], text, -1.0, curve)


def _sizes(findings: Findings | None) -> Iterator[Claim]:
    """Figure 4: Prediction IBP against BP by the number of digits, and the strength that serves it best."""
    chosen = [row for row in findings.chosen if row.errors] if findings else []
    for size, theirs in IMPROVEMENTS.items():
        rows = {row.key: row for row in chosen if _is(row, size, augment=False)}
        text = f"Figure 4: Prediction IBP improves on BP by {theirs:g} % with {size} digits, not augmented"
        yield _size(findings, rows.get("prediction_ibp"), rows.get("bp"), text, theirs, share=True)
    for augment, words in ((False, "without"), (True, "with")):
        text = f"Figure 4: the best β falls with the number of digits, {words} augmentation ({BETAS[augment]})"
        ours = {
            _count(row): float(row.values(["beta"])[0])
            for row in chosen
            if row.key == "prediction_ibp" and _is(row, _count(row), augment) and row.axes
        }
        values = [ours[size] for size in sorted(ours)]
        if len(values) < 2:
            yield Claim(text)
        else:
            falls = all(a >= b for a, b in itertools.pairwise(values)) and values[0] > values[-1]
            yield Claim(text, ", ".join(f"{value:g} at {size}" for size, value in sorted(ours.items())), falls)


def _count(row: ResultRow) -> int:
    return row.runs[0].data.subset or 60_000


def _is(row: ResultRow, size: int, augment: bool) -> bool:
    return _count(row) == size and (row.runs[0].training.augment is not None) == augment


def experiments_in(folder: Path, read: Callable[[Path], Findings]) -> dict[str, Findings]:
    """The experiments in the folders of `folder`, by name."""
    found = [read(path.parent) for path in sorted(folder.glob("*/experiment.yaml"))]
    return {findings.experiment.name: findings for findings in found}
