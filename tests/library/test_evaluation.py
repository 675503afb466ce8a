"""``ibp.robustness``: errors under attacks for any model, and what it leaves alone."""

import csv
import io

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ibp_triton as ibp

SIZES = {"fgsm": [0.0, 0.05, 0.2], "pgd": [0.05, 0.2], "gaussian": [0.3], "random_sign": [0.2]}


@pytest.fixture(scope="module")
def trained():
    """Two blobs that a network with draws and statistics has learned."""
    torch.manual_seed(0)
    y = torch.arange(90) % 3
    x = (0.5 + 0.1 * torch.randn(90, 1, 4, 4) + 0.15 * (y[:, None, None, None] - 1)).clamp(0, 1)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    )
    step = ibp.EagerStep(model, ibp.BP(), torch.optim.Adam(model.parameters(), lr=0.01))
    for _ in range(150):
        step((x - 0.5) / 0.25, y)
    return model, x, y


def measured(trained, **options):
    model, x, y = trained
    return ibp.robustness(model, (x, y), SIZES, mean=0.5, std=0.25, **options)


def test_errors_are_those_of_the_attacks(trained):
    model, x, y = trained
    found = measured(trained)
    model.eval()

    def classify(u):
        return model((u - 0.5) / 0.25)

    star = ibp.fgsm(classify, x, y, 0.2, bounds=(0, 1))
    assert found.error("fgsm", 0.2) == pytest.approx(100 * float((classify(star).argmax(1) != y).float().mean()))
    assert found.error() == found.error("fgsm", 0.0) <= found.error("fgsm", 0.05) <= found.error("fgsm", 0.2)
    assert found.error("pgd", 0.2) >= found.error("fgsm", 0.2) - 1e-9
    assert found.error("fgsm", 0.2) > found.error()
    with pytest.raises(ValueError, match="was not measured"):
        found.error("pgd", 0.3)


def test_the_model_and_the_generators_are_left_as_they_were(trained):
    model = trained[0].train()
    model[2].eval()
    before = {name: v.clone() for name, v in model.state_dict().items()}
    model[1].weight.grad = torch.ones_like(model[1].weight)
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    measured(trained)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert torch.equal(model[1].weight.grad, torch.ones_like(model[1].weight))
    assert model[5].weight.grad is None or model[5].weight.grad is not model[1].weight.grad
    model.zero_grad()


def test_loaders_and_pairs_repeat(trained):
    model, x, y = trained
    one, again = measured(trained, batch_size=32), measured(trained, batch_size=32)
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    many = ibp.robustness(model, loader, SIZES, mean=torch.tensor([0.5]), std=[0.25])
    for key, right in one.outcomes.items():
        assert torch.equal(right, again.outcomes[key])
        assert torch.equal(right, many.outcomes[key])


def test_l2(trained):
    found = measured(trained, norm="l2")
    assert found.norm == "l2"
    assert found.error("pgd", 0.2) >= found.error()


def test_two_models_are_compared_in_pairs(trained):
    model, x, y = trained
    torch.manual_seed(1)
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    both = ibp.robustness({"trained": model, "raw|new": other}, (x, y), SIZES, mean=0.5, std=0.25)
    tests = {(t.attack, t.size): t for t in both.compare()}
    assert tests["clean", 0.0].lost > tests["clean", 0.0].gained
    assert tests["clean", 0.0].p < 1e-3
    apart = measured(trained).compare(ibp.robustness(other, (x, y), SIZES, mean=0.5, std=0.25))
    assert [t.p for t in apart] == [t.p for t in both.compare()]
    with pytest.raises(ValueError, match="takes two models"):
        measured(trained).compare()
    rows = list(csv.DictReader(io.StringIO(both.to_csv())))
    assert len(rows) == len(both.rows) == 16
    assert float(rows[0]["error_percent"]) == both.error()
    assert "raw\\|new" in both.to_markdown()
    assert both.to_latex().count(r"\\") == 17


def test_mcnemar_is_the_binomial_test():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(400, generator=generator) < 0.8, torch.rand(400, generator=generator) < 0.7
    one = ibp.Robustness({("a", "clean", 0.0): first, ("b", "clean", 0.0): second}, "linf", {})
    (found,) = one.compare()
    n = found.gained + found.lost
    assert found.p == pytest.approx(stats.binomtest(found.gained, n).pvalue, rel=1e-9)
    interval = stats.binomtest(int((~first).sum()), 400).proportion_ci(method="wilson")
    assert one.rows[0].interval == pytest.approx((100 * interval.low, 100 * interval.high), rel=1e-6)


def test_masking_is_noticed(trained):
    assert measured(trained).masking() == []
    model, x, y = trained

    class Masked(nn.Module):
        def forward(self, u):
            return model(u.mul(8).round().div(8))

    found = ibp.robustness(Masked().eval(), (x, y), SIZES, mean=0.5, std=0.25).masking()
    assert any("no gradient" in sign for sign in found)


def test_files_and_figures(trained, tmp_path):
    found = measured(trained)
    assert (tmp_path / "a.csv").write_text("") == 0
    for write, name in ((found.to_csv, "a.csv"), (found.to_markdown, "a.md"), (found.to_latex, "a.tex")):
        assert write(tmp_path / name) == (tmp_path / name).read_text(encoding="utf-8")
    found.plot(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 1000


WRONG = {
    "unknown attack": ({"attacks": {"fgms": [0.1]}}, "unknown attack 'fgms'"),
    "negative": ({"attacks": {"fgsm": [-0.1]}}, "not negative"),
    "bounds": ({"bounds": (1, 0)}, "bounds must be"),
    "norm": ({"norm": "l1"}, "norm must be one of"),
    "normalised images": ({"bounds": (0, 0.3)}, "outside bounds"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_questions_are_refused(trained, name):
    options, message = WRONG[name]
    model, x, y = trained
    with pytest.raises(ValueError, match=message):
        ibp.robustness(model, (x, y), **options)


def test_whole_numbers_and_no_examples_are_refused(trained):
    model, x, y = trained
    with pytest.raises(ValueError, match="images / 255"):
        ibp.robustness(model, ((x * 255).to(torch.uint8), y))
    with pytest.raises(ValueError, match="no examples"):
        ibp.robustness(model, [])
