"""
Where the empirical Fisher goes wrong
=====================================

The empirical Fisher information takes the errors of the data where the Fisher information takes those of
the model. The two names sound alike. The steps do not look alike: a line is fitted to points, and arrows show
where each rule sends its slope and offset from everywhere in the plane.
"""

import matplotlib.pyplot as plt
import numpy as np

import natgrad_array as ng

rng = np.random.default_rng(5)
x = rng.standard_normal((200, 1)) + 1.0
y = 1.5 * x + 0.5 + 0.6 * rng.standard_normal((200, 1))
net = ng.networks.MLP((1, 1))

# %%
# Every point of the plane is a network, and the grid is an ensemble of 30 × 30 of them.

slope, offset = np.linspace(-1.0, 4.0, 30), np.linspace(-3.0, 4.0, 30)
grid = np.stack(np.meshgrid(slope, offset), axis=-1)
params = (grid[..., None, :],)
gradient = net.gradient(params, x, y)
exact = net.fisher(params, x).precondition(gradient, inverse="moore_penrose")
empirical = ng.empirical_fisher(net, params, x, y).precondition(gradient, inverse="moore_penrose")
best = np.linalg.lstsq(np.concatenate([x, np.ones_like(x)], axis=1), y)[0][:, 0]

figure, panels = plt.subplots(1, 3, sharex=True, sharey=True, figsize=(8.4, 3.6))
loss = net.loss(params, x, y)
levels = np.geomspace(loss.min() * 1.05, loss.max(), 9)
titles = ("Gradient", "Natural gradient", "Empirical Fisher")
for panel, title, direction in zip(panels, titles, (gradient, exact, empirical), strict=True):
    step = -direction[0][..., 0, :]
    panel.contour(slope, offset, loss, levels, colors="#667080", linewidths=0.6, linestyles="-", alpha=0.6)
    panel.streamplot(
        slope, offset, step[..., 0], step[..., 1], color="#0068a6", linewidth=1.1, density=0.8, arrowsize=1.1
    )
    panel.plot(*best, marker="*", markersize=15, color="#c24a00", markeredgecolor="#ffffff", zorder=5)
    panel.set(title=title, xlabel="slope")
    panel.grid(visible=False)
panels[0].set_ylabel("offset")
figure.set_label(
    """Flow lines in the plane of slope and offset, with the best fit marked by a star. Gradient: lines fall into a
    valley and bend along it. Natural gradient: straight lines to the star from everywhere. Empirical Fisher:
    lines are bent and miss the straight way."""
)
plt.show()
