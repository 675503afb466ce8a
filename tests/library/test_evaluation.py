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


def test_attacks_of_torchattacks_are_measured_like_ours(trained):
    torchattacks = pytest.importorskip("torchattacks")
    model, x, y = trained
    seen = []

    def kept(kind, ours):
        def attack(m, u, v):
            star = kind(m, u, v)
            seen.append(float((star - ours(m, u, v)).abs().max()))
            return star

        return attack

    theirs = ibp.attacks.from_torchattacks(torchattacks.PGD, [0.05, 0.2], alpha=0.03, steps=5, random_start=False)
    options = {"steps": 5, "step_size": 0.03, "random_start": False, "bounds": (0, 1)}
    both = {size: kept(a, lambda m, u, v, e=size: ibp.pgd(m, u, v, e, **options)) for size, a in theirs.items()}
    found = ibp.robustness(model, (x, y), {"theirs": both}, mean=0.5, std=0.25)
    assert max(seen) < 1e-6
    assert len(seen) == 2
    assert found.error() <= found.error("theirs", 0.05) <= found.error("theirs", 0.2)


@pytest.mark.parametrize(("norm", "size", "version"), [("Linf", 0.1, "standard"), ("L2", 0.4, "rand")])
def test_autoattack_harms_at_least_as_much_as_pgd_and_repeats(norm, size, version):
    torchattacks = pytest.importorskip("torchattacks")
    auto = ibp.attacks.from_torchattacks(
        torchattacks.AutoAttack, [size], norm=norm
    )  # ten classes by default: here five
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), torch.rand(30, 1, 8, 8)
    y = (0.3 * torch.randn(30, 5) + model(4 * (x - 0.5))).argmax(1)
    before = torch.get_rng_state()
    attacks = {"pgd": [size], "auto": auto}
    found, again = (ibp.robustness(model, (x, y), attacks, norm=norm.lower(), mean=0.5, std=0.25) for _ in "12")
    assert torch.equal(torch.get_rng_state(), before)
    assert found.error("auto", size) >= found.error("pgd", size) > found.error()
    assert torch.equal(found.outcomes["model", "auto", size], again.outcomes["model", "auto", size])


def test_the_seed_and_the_number_of_classes_stand_in_where_an_attack_asks_for_them():
    made = []

    def kind(model, eps=0.1, n_classes=10, seed=None, norm="Linf"):
        made.append((eps, n_classes, seed, norm))
        return lambda x, y: x

    model, x, y = nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 1])
    for options in ({}, {"seed": 7, "n_classes": 2, "norm": "L2"}):
        for attack in ibp.attacks.from_torchattacks(kind, [0.5], **options).values():
            attack(model, x, y)
    assert made == [(0.5, 3, 0, "Linf"), (0.5, 2, 7, "L2")]


def test_ones_own_attack_sees_pixels_and_leaves_no_gradient(trained):
    model, x, y = trained
    model.zero_grad()
    model[1].weight.grad = torch.ones_like(model[1].weight)

    def blank(classifier, u, v):
        assert float(u.min()) >= 0
        assert not classifier.training
        torch.nn.functional.cross_entropy(classifier(u.requires_grad_()), v).backward()
        return 5 * torch.rand_like(u)  # clipped to the bounds

    found, again = (ibp.robustness(model, (x, y), {"blank": {1.0: blank}}, mean=0.5, std=0.25) for _ in "12")
    assert torch.equal(found.outcomes["model", "blank", 1.0], again.outcomes["model", "blank", 1.0])
    assert torch.equal(model[1].weight.grad, torch.ones_like(model[1].weight))
    assert model[5].weight.grad is None
    assert not x.requires_grad


def test_attacks_that_do_not_fit_are_refused(trained):
    model, x, y = trained
    wrong = {
        "takes functions": [{"pgd": {0.1: lambda m, u, v: u}}, {"mine": {0.1: 3}}, {"clean": {0.0: lambda m, u, v: u}}],
        r"must return images \[90, 1, 4, 4\]": [
            {"mine": {0.1: lambda m, u, v: u[:5]}},
            {"mine": {0.1: lambda m, u, v: 0}},
        ],
        "not finite": [{"mine": {0.1: lambda m, u, v: u / 0}}],
        "not negative": [{"mine": {-0.1: lambda m, u, v: u}}],
    }
    for message, attacks in wrong.items():
        for attack in attacks:
            with pytest.raises(ValueError, match=message):
                ibp.robustness(model, (x, y), attack)


def test_torchattacks_refuses_what_it_would_get_wrong(trained):
    torchattacks = pytest.importorskip("torchattacks")
    model, x, y = trained
    with pytest.raises(ValueError, match="has no size eps"):
        ibp.attacks.from_torchattacks(torchattacks.DeepFool, [0.1])
    fgsm = {"theirs": ibp.attacks.from_torchattacks(torchattacks.FGSM, [0.1])}
    with pytest.raises(ValueError, match="pixels from 0 to 1"):
        ibp.robustness(model, (255 * x, y), fgsm, bounds=(0, 255))
    free = {"free": {0.0: lambda m, u, v: torchattacks.DeepFool(m, steps=3)(u, v)}}
    assert ibp.robustness(model, (x, y), free, mean=0.5, std=0.25).rows[1].attack == "free"


def test_whole_numbers_and_no_examples_are_refused(trained):
    model, x, y = trained
    with pytest.raises(ValueError, match="images / 255"):
        ibp.robustness(model, ((x * 255).to(torch.uint8), y))
    with pytest.raises(ValueError, match="no examples"):
        ibp.robustness(model, [])


def test_labels_are_class_numbers_in_any_form(trained):
    model, x, y = trained
    expected = ibp.robustness(model, (x, y), {"fgsm": [0.1]}).rows
    for same in (y.tolist(), y.numpy(), y.int(), y.byte()):
        assert ibp.robustness(model, (x, same), {"fgsm": [0.1]}).rows == expected
    for wrong in (y.double(), torch.eye(3)[y], y[:, None]):
        with pytest.raises(ValueError, match=r"labels must be whole class numbers \[90\]"):
            ibp.robustness(model, (x, wrong), {"fgsm": [0.1]})
    with pytest.raises(ValueError, match="there are 90 images and 5 labels"):
        ibp.robustness(model, (x, y[:5]), {"fgsm": [0.1]})


def test_logits_that_are_no_numbers_are_no_class(trained):
    _, x, y = trained
    labels = torch.zeros_like(y)

    class Rooted(nn.Module):
        """NaN for images with a dark pixel."""

        def forward(self, u):
            return (u.flatten(1) - 0.4).sqrt().sum(1, keepdim=True) * torch.tensor([1.0, 0.5])

    bright = x.clamp(0.5, 1)
    found = ibp.robustness(Rooted(), (bright, labels), {"fgsm": [0.05, 0.3]})
    assert [row.error for row in found.rows] == [0, 0, 100]
    with pytest.raises(ValueError, match=r"'model' gives logits that are no numbers \(NaN\) for \d+ of \d+ images"):
        ibp.robustness(Rooted(), (x * 0, labels), {"fgsm": [0.05]})
