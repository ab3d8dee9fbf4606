"""
An autoencoder of digits
========================

A nonlinear network squeezes 64 pixels through 8 numbers and draws them again, on the digits that come
with scikit-learn. It is the paper's experiment made small; ``examples/autoencoder.py`` runs it in full on
images of MNIST's format.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import natgrad_array as ng

pixels = np.random.default_rng(0).permutation(load_digits().data)
scale = pixels.std()
x = ((pixels - pixels.mean(axis=0)) / scale).astype(np.float32)
train, test = x[:1500], x[1500:]
net = ng.networks.MLP((64, 32, 16, 8, 16, 32, 64), activation="tanh")
presets = {
    "natural gradient": ng.optimizers.natural_gradient(),
    "K-FAC": ng.optimizers.kfac(),
    "Adam": ng.optimizers.adam(learning_rate=0.02),  # the best of four tried
}

steps, losses, drawn = 60, {}, {}
for name, opt in presets.items():
    rng = np.random.default_rng(0)
    params = net.init(rng, like=x)
    state, losses[name] = opt.init(net, params), []
    for step in range(steps):
        losses[name].append(float(net.loss(params, test, test)))
        if step == 30:
            drawn[name] = net.output(params, test[:5])
        batch = train[rng.choice(len(train), 500, replace=False)]
        params, state, info = opt.step(net, params, state, batch, batch, rng)

figure = plt.figure(figsize=(8.4, 3.7))
left, right = figure.subfigures(1, 2, width_ratios=(1.0, 1.15))
panel = left.subplots()
for name, loss in losses.items():
    panel.plot(loss, label=name)
panel.axvline(30, color="#667080", linewidth=1.0, linestyle=":")
panel.set(yscale="log", xlabel="steps", ylabel="test loss: half the squared error", title="Loss")
panel.legend()
rows = {"the digits": test[:5], **drawn}
right.suptitle("Unseen digits after 30 steps", x=0.56, fontweight="bold", fontsize=11.5)
for line, (name, images) in zip(
    right.subplots(4, 5, gridspec_kw={"hspace": 0.02, "wspace": 0.02}), rows.items(), strict=True
):
    for cell, image in zip(line, images, strict=True):
        cell.imshow((image * scale + pixels.mean(axis=0)).reshape(8, 8), cmap="gray_r", vmin=0, vmax=16)
        cell.axis("off")
    line[0].text(-0.15, 0.5, name, ha="right", va="center", transform=line[0].transAxes)
figure.set_label(
    """Left: test loss of an autoencoder against steps; K-FAC falls fastest at first, the natural gradient lowest in
    the end, and Adam stays behind. Right: five unseen digits, and what each optimizer's network draws of them
    after 30 steps."""
)
plt.show()
