"""Every criterion with every method against the oracle, which applies the user's own module to one sample at a time."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ibp_triton as ibp
from tests.library.comparing import error, example, oracle, ours

N, M = 4, 3


def vectors(classes=M):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, classes)).double(), torch.randn(N, 5).double()


def maps():
    torch.manual_seed(1)
    body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, M, 1)).double()
    return body, torch.randn(N, 2, 3, 3).double()


def coupled():
    """Batch statistics: the samples' losses depend on one another."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, M)).double(), torch.randn(
        N, 5
    ).double()


WEIGHT = torch.tensor([0.3, 2.0, 1.1]).double()
NUMBERS = torch.tensor([0, 2, 1, 2])
SOME = torch.tensor([0, -100, 1, 2])
SOFT = torch.softmax(torch.randn(N, M, generator=torch.Generator().manual_seed(3)).double(), 1)
FLAGS = (torch.rand(N, M, generator=torch.Generator().manual_seed(4)) > 0.5).double()
DENSE = torch.randint(M, (N, 3, 3), generator=torch.Generator().manual_seed(5))
HOLES = DENSE.masked_fill(torch.arange(3)[:, None] == DENSE, -100)
HOLES[1] = -100  # a sample without any position that counts


def squared_hinge(z, y):
    """Of a user's own: twice differentiable almost everywhere."""
    margins = (1 - (2 * F.one_hot(y, z.shape[1]) - 1) * z).clamp_min(0)
    return margins.square().sum(1)


CASES = {
    "plain": (vectors, nn.CrossEntropyLoss(), NUMBERS),
    "sum": (vectors, nn.CrossEntropyLoss(reduction="sum"), NUMBERS),
    "none": (vectors, nn.CrossEntropyLoss(reduction="none"), NUMBERS),
    "smoothed": (vectors, nn.CrossEntropyLoss(label_smoothing=0.1), NUMBERS),
    "weighted": (vectors, nn.CrossEntropyLoss(WEIGHT), NUMBERS),
    "weighted, smoothed, ignored": (vectors, nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2), SOME),
    "weighted sum": (vectors, nn.CrossEntropyLoss(WEIGHT, reduction="sum"), SOME),
    "weighted, batch statistics": (coupled, nn.CrossEntropyLoss(WEIGHT), NUMBERS),
    "ignored": (vectors, nn.CrossEntropyLoss(), SOME),
    "soft": (vectors, nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), SOFT),
    "dense": (maps, nn.CrossEntropyLoss(), DENSE),
    "dense, ignored": (maps, nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), HOLES),
    "dense sum, ignored": (maps, nn.CrossEntropyLoss(reduction="sum"), HOLES),
    "dense, soft": (maps, nn.CrossEntropyLoss(), torch.softmax(maps()[0](maps()[1]).detach() * 2, 1)),
    "multi-label": (vectors, nn.BCEWithLogitsLoss(), FLAGS),
    "pos_weight": (vectors, nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=1 + WEIGHT), FLAGS),
    "one logit": (lambda: vectors(1), nn.BCEWithLogitsLoss(), FLAGS[:, :1]),
    "squares": (vectors, nn.MSELoss(), SOFT),
    "sum of squares": (vectors, nn.MSELoss(reduction="sum"), SOFT),
    "smooth l1": (vectors, nn.SmoothL1Loss(beta=0.4), SOFT),
    "huber": (vectors, nn.HuberLoss(delta=0.4), SOFT),
    "negative log-likelihood": (vectors, nn.NLLLoss(WEIGHT), SOME),
    "a function": (vectors, squared_hinge, NUMBERS),
    "batchmean": (vectors, nn.KLDivLoss(reduction="batchmean"), SOFT),
}
MODES = ("paper", "exact")
METHODS = [
    ibp.BP(),
    *(kind(0.7, norm, mode) for kind in (ibp.LossIBP, ibp.PredictionIBP) for norm in (1, 2) for mode in MODES),
    *(kind(0.7, 2, mode) for kind in (ibp.TangentBP, ibp.FastTangentBP) for mode in MODES),
    ibp.AdversarialTraining(0.1),
    ibp.FastAdversarialTraining(0.1),
    ibp.PGDTraining(0.1, 0.05, 2, random_start=False),
    ibp.JacobianRegularisation(0.7, "all"),
]  # fmt: skip


WRITTEN_OUT = {  # where torch has no derivative for the oracle to take, forward over reverse
    "squares": lambda z, y: (z - y).square().mean(1),
    "huber": lambda z, y: torch.where((z - y).abs() < 0.4, (z - y).square() / 2, 0.4 * ((z - y).abs() - 0.2)).mean(1),
}


def setting(name, method):
    make, criterion, y = CASES[name]
    model, x = make()
    if isinstance(criterion, nn.NLLLoss):
        model.append(nn.LogSoftmax(1))
    tau = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(7)).double()
    return model, method.at(criterion=criterion), (x, y, tau if method.needs_tangents else None)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_agrees_with_the_oracle(name, method):
    if method.key == "jacobian" and name.startswith("dense"):
        pytest.skip("needs logits [N, M]: refused below")
    model, method, batch = setting(name, method)
    value, found = ours(method, ibp.Network(model), *batch)
    expected_value, expected = oracle(method.at(criterion=WRITTEN_OUT.get(name, method.criterion)), model, *batch)
    assert torch.allclose(value, expected_value, rtol=1e-10, atol=0)
    assert error(found, expected) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_without_penalty_it_is_the_criterion_to_the_bit_of_bp_and_to_rounding_of_autograd(name):
    model, bp, (x, y, _) = setting(name, ibp.BP())
    value, found = bp.gradients(ibp.Network(model), x, y)
    own = CASES[name][1](model(x), y).mean(dtype=torch.float64)  # of what "none" and functions give: their mean
    own.backward()
    assert torch.allclose(value, own.detach(), rtol=1e-12, atol=0)
    assert error(found, {n: p.grad for n, p in model.named_parameters()}) < 1e-12
    zero, same = ibp.LossIBP(0.0, criterion=CASES[name][1]).gradients(ibp.Network(model), x, y)
    assert ibp.LossIBP(0.0, criterion=CASES[name][1]).parts(model, x, y).penalty.dtype == x.dtype
    assert torch.equal(zero, value)
    assert all(torch.equal(same[n], g) for n, g in found.items())


@pytest.mark.parametrize("count", [1, 10, 100])
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(WEIGHT), nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()])
def test_batches_of_any_size(count, criterion):
    model, _ = vectors()
    x = torch.randn(count, 5).double()
    y = (
        (torch.rand(count, M) > 0.5).double()
        if isinstance(criterion, nn.BCEWithLogitsLoss)
        else torch.arange(count) % M
    )
    _, found = ibp.LossIBP(0.0, criterion=criterion).gradients(ibp.Network(model), x, y)
    criterion(model(x), y).backward()
    assert error(found, {n: p.grad for n, p in model.named_parameters()}) < 1e-12


def test_logits_of_one_axis():
    model, x = vectors(1)
    model.append(nn.Flatten(0))
    criterion, y = nn.BCEWithLogitsLoss(), FLAGS[:, 0]
    method = ibp.LossIBP(0.3, 2, "exact", criterion=criterion)
    assert error(ours(method, ibp.Network(model), x, y)[1], oracle(method, model, x, y)[1]) < 1e-10


def test_the_module_is_read_at_each_step():
    model, x = vectors()
    criterion = nn.CrossEntropyLoss()
    method, network = ibp.BP(criterion=criterion), ibp.Network(model)
    before = method.value(network, x, NUMBERS)
    criterion.label_smoothing = 0.5
    after = method.value(network, x, NUMBERS)
    assert not torch.equal(before, after)
    assert torch.allclose(after, criterion(model(x), NUMBERS).detach())


def test_a_sample_that_does_not_count_adds_nothing_whatever_its_numbers():
    model, x = vectors()
    method, network = ibp.LossIBP(0.7, criterion=nn.CrossEntropyLoss()), ibp.Network(model)
    with_hole = method.value(network, x, SOME)
    y = torch.cat([SOME[:1], SOME[2:]])
    assert torch.allclose(with_hole, method.value(network, torch.cat([x[:1], x[2:]]), y), rtol=1e-12)
    x[1] = float("nan")
    assert torch.isfinite(method.value(network, x, SOME))


WRONG = {
    "all ignored": (nn.CrossEntropyLoss(), torch.full((N,), -100), "no label of the batch counts"),
    "too large": (nn.CrossEntropyLoss(), torch.tensor([0, 1, 2, 3]), "labels must lie in"),
    "a shape": (nn.CrossEntropyLoss(), SOFT[:, :2], "logits' shape"),
    "column": (nn.BCEWithLogitsLoss(), FLAGS[:, 0], "targets of the logits' shape"),
    "batch of weights": (nn.BCEWithLogitsLoss(weight=torch.ones(7, 1)), FLAGS, "does not fit"),
    "class weights": (nn.CrossEntropyLoss(WEIGHT[:2]), NUMBERS, "class weights"),
    "a mean": (F.cross_entropy, NUMBERS, "one loss a sample"),
    "not logits": (lambda z, y: y.double(), NUMBERS, "do not depend on the logits"),
    "labels of another batch": (nn.CrossEntropyLoss(), NUMBERS[:2], "one entry a sample"),
    "floats without a criterion": (None, SOFT, "pass criterion=nn.CrossEntropyLoss"),
    "flags": (nn.CrossEntropyLoss(), NUMBERS > 1, "int64"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_targets_are_refused(name):
    criterion, y, message = WRONG[name]
    model, x = vectors()
    with pytest.raises((ValueError, TypeError), match=message):
        ibp.LossIBP(0.1, criterion=criterion)(model, x, y)


class _NoSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        return 2 * d * ctx.saved_tensors[0]


def test_a_criterion_without_second_derivative_is_refused_by_name_where_one_is_needed():
    def rough(z, y):
        return _NoSecond.apply(z).sum(1)

    model, x = vectors()
    network = ibp.Network(model)
    for method in (ibp.BP(), ibp.FastAdversarialTraining(0.1), ibp.LossIBP(0.1)):
        assert float(method.at(criterion=rough).value(network, x, NUMBERS)) > 0
    with pytest.raises(ValueError, match="rough has no second derivative"):
        ibp.LossIBP(0.1, semantics="exact", criterion=rough)(network, x, NUMBERS)


@pytest.mark.parametrize("margins", [nn.MultiMarginLoss(), nn.MultiLabelMarginLoss()])
def test_a_criterion_of_whole_numbers_keeps_them_whole(margins):
    model, x = vectors()
    y = (
        NUMBERS
        if isinstance(margins, nn.MultiMarginLoss)
        else torch.full((len(x), M), -1).index_fill_(1, x.new_zeros(1).long(), 1)
    )
    loss, found = ibp.BP(criterion=margins).gradients(model, x, y)
    expected = margins(model(x), y)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-12)
    named = dict(model.named_parameters())
    assert error(found, dict(zip(named, torch.autograd.grad(expected, list(named.values())), strict=True))) < 1e-12
    ibp.LossIBP(0.1, criterion=margins).gradients(model, x, y)


def test_a_module_that_is_no_mean_over_samples_is_refused():
    class Scaled(nn.MSELoss):
        def forward(self, z, y):
            return super().forward(z, y) * (2 if self.reduction == "mean" else 1)

    model, x = vectors()
    with pytest.raises(ValueError, match="no mean over samples"):
        ibp.BP(criterion=Scaled())(model, x, SOFT)


def test_trades_and_dense_jacobians_are_refused():
    model, x = vectors()
    with pytest.raises(ValueError, match="plain cross-entropy"):
        ibp.TRADES(1.0, 0.1, 0.05, 1, criterion=nn.CrossEntropyLoss())(model, x, NUMBERS)
    model, x = maps()
    with pytest.raises(ValueError, match=r"logits \[N, M\]"):
        ibp.JacobianRegularisation(0.1, criterion=nn.CrossEntropyLoss())(model, x, DENSE)
    with pytest.raises(TypeError, match="criterion must be"):
        ibp.BP(criterion="cross_entropy")
    with pytest.raises(TypeError, match="criterion must be"):
        ibp.BP(criterion=nn.MSELoss)


@pytest.mark.parametrize("key", ibp.METHODS)
def test_parts(key):
    model, x = vectors()
    method, network = example(key), ibp.Network(model)
    tau = torch.randn(2, *x.shape).double() if method.needs_tangents else None
    torch.manual_seed(0)
    parts = method.parts(network, x, NUMBERS, tau)
    torch.manual_seed(0)
    assert torch.equal(parts.loss, method(network, x, NUMBERS, tau))
    parts.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.allclose(parts.data_loss, F.cross_entropy(model(x), NUMBERS), rtol=1e-12)
    assert torch.allclose(parts.logits, model(x), rtol=1e-12)
    assert not any(t.requires_grad for t in parts[1:] if t is not None)
    if method.parameter == "epsilon" or key == "bp":
        assert parts.penalty is None
    else:
        strength = getattr(method, method.parameter)
        assert torch.allclose(parts.data_loss + strength * parts.penalty, parts.loss, rtol=1e-12)
    with torch.no_grad():
        torch.manual_seed(0)
        again = method.parts(network, x, NUMBERS, tau)
    assert torch.equal(again.loss, parts.loss.detach())
    assert not again.loss.requires_grad


def test_a_bare_model_is_taken_and_not_kept_alive():
    model, x = vectors()
    method = ibp.LossIBP(0.1)
    expected = method(ibp.Network(model), x, NUMBERS)
    for _ in range(2):
        found = method(model, x, NUMBERS)
        found.backward()
        assert torch.equal(found.detach(), expected.detach())
    gone = weakref.ref(model)
    del model, found, expected
    gc.collect()
    assert gone() is None


def test_methods_compare_and_hash_without_reading_tensors():
    beta = torch.tensor(0.1)
    a, b = ibp.LossIBP(beta), ibp.LossIBP(beta)
    assert a == b
    assert hash(a) == hash(b)
    assert a != ibp.LossIBP(torch.tensor(0.1))
    assert ibp.LossIBP(0.1) == ibp.LossIBP(0.1) != ibp.LossIBP(0.2)
    assert "tensor on cpu" in repr(a)
    meta = ibp.LossIBP(torch.tensor(0.1, device="meta"))  # has no number to read
    assert meta == meta.at()
    assert "meta" in repr(meta)
    assert ibp.LossIBP(0.1).at(beta=0.3, norm=2) == ibp.LossIBP(0.3, 2)
    assert ibp.BP() != ibp.BP(criterion=nn.MSELoss())


def test_pickle_and_deepcopy():
    model, x = vectors()
    network, method = ibp.Network(model), ibp.LossIBP(0.1, criterion=nn.CrossEntropyLoss(label_smoothing=0.1))
    expected = method.gradients(network, x, NUMBERS)[1]
    for again in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        found = again(method).gradients(again(network), x, NUMBERS)[1]
        assert error(found, expected) == 0


def test_under_vmap_over_beta():
    model, x = vectors()
    network = ibp.Network(model)
    criterion = nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)
    betas = torch.tensor([0.0, 0.3, 0.7]).double()
    found = torch.func.vmap(lambda b: ibp.LossIBP(b, criterion=criterion).gradients(network, x, NUMBERS)[1])(betas)
    for i, beta in enumerate(betas.tolist()):
        expected = ibp.LossIBP(beta, criterion=criterion).gradients(network, x, NUMBERS)[1]
        assert error({n: g[i] for n, g in found.items()}, expected) < 1e-12
