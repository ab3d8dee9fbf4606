"""
What damping does
=================

Damping adds to the eigenvalues of the Fisher information before they are inverted. Directions
whose eigenvalue is above it are learned at the natural rate, 1. Those below it are learned as by gradient
descent, in proportion to their eigenvalue. So damping decides which part of a task the natural
gradient does not reach.
"""

import matplotlib.pyplot as plt
import numpy as np

import natgrad_array as ng

# %%
# One layer whose inputs have variances over five decades: there the Fisher information has the same
# eigenvalues. The rate of a direction is its velocity over its distance from the target.

variance = np.geomspace(1e-4, 10.0, 41)
task = ng.GaussianTask.from_modes(np.eye(1), np.ones(1), np.ones((41, 1)), input_moment=np.diag(variance))
weights = (np.zeros((1, 41)),)
gradient = ng.deep_linear.gradient(weights, task)
distance = weights[0] - task.optimum()

# %%
# A sweep over dampings is a batch axis.

dampings = np.asarray([0.0, 1e-3, 1e-2, 1e-1])
direction = ng.precondition(np.stack(4 * [gradient[0]]), np.eye(1), task.input_moment, damping=dampings)
rates = (direction / distance)[:, 0, :]

figure, panel = plt.subplots()
for damping, rate in zip(dampings, rates, strict=True):
    (line,) = panel.plot(variance, rate, label=f"{damping:g}" if damping else "none")
    if damping:
        panel.plot([damping], [0.5], "o", color=line.get_color(), markersize=8, markerfacecolor="#ffffff")
panel.plot(variance, 0.1 * variance, color="#667080", linestyle="-", linewidth=1.0, label="gradient descent")
words = "half the rate\nwhere eigenvalue\n= damping"
panel.annotate(words, (1e-2, 0.5), (1.5e-2, 1.9e-2), arrowprops={"arrowstyle": "-"})
panel.set(xscale="log", yscale="log", ylim=(3e-4, 2), xlabel="eigenvalue of the Fisher information")
panel.set_ylabel("rate at which the direction is learned")
panel.legend(title="damping", loc="lower right")
figure.set_label(
    """Rate of learning against the eigenvalue of a direction, both on log scales. Without damping the rate is 1
    everywhere. With damping it is 1 above the damping and falls in proportion to the eigenvalue below it, in
    parallel to the line of gradient descent; it is one half where the two are equal."""
)
plt.show()
