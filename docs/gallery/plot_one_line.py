"""
Two hundred networks, one line
==============================

Two hundred deep linear networks start at random and learn the same task. Under gradient
descent each takes its own time. Under the natural gradient their excess loss falls by the same
factor in the same time, whatever the start: from the theory, :math:`e^{-2t}` (Eq 30).
"""

import matplotlib.pyplot as plt
import numpy as np

import natgrad_array as ng

# %%
# A task with five modes of unequal strength, and an ensemble: its axis comes before the
# axes of the matrices.

rng = np.random.default_rng(3)
left, right = (np.linalg.qr(rng.standard_normal((5, 5)))[0] for _ in range(2))
task = ng.GaussianTask.from_modes(left, np.asarray([4.0, 2.5, 1.5, 1.0, 0.6]), right)
weights = ng.deep_linear.gaussian(rng, (5, 8, 8, 5), (200,), like=left, scale=0.7)

# %%
# Both rules are one call. Time is the number of steps times their size.

time = 0.01 * np.arange(601)
curves = {}
for rule, name in (("gradient", "Gradient descent"), ("layerwise", "Natural gradient")):
    history = ng.simulate(weights, task, rule=rule, learning_rate=0.01, steps=600, record="excess_loss")
    curves[name] = history.excess_loss / history.excess_loss[0]

# %%

figure, panels = plt.subplots(1, 2, sharex=True, sharey=True)
for panel, (name, loss) in zip(panels, curves.items(), strict=True):
    panel.plot(time, loss, color="#0068a6", linestyle="-", linewidth=0.6, alpha=0.35)
    panel.set_title(name)
    panel.set_xlabel("time")
    panel.set_yscale("log")
    panel.set_ylim(1e-5, 1.3)
    panel.margins(x=0)
panels[1].plot(time[::50], np.exp(-2 * time[::50]), "o", color="#c24a00", markerfacecolor="#ffffff", markersize=5)
panels[1].annotate("theory: $e^{-2t}$", (3.0, np.exp(-6.0)), (3.4, 2e-2), arrowprops={"arrowstyle": "-"})
panels[0].set_ylabel("excess loss / at the start")
figure.set_label(
    """Two panels of excess loss against time on a log scale, 200 networks in each. Under gradient descent the curves
    spread into a wide tangle; under the natural gradient all lie on one straight line, e to the -2t."""
)
plt.show()
