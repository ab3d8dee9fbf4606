"""
One family, one effect
======================

The Fisher information of a deep network is singular, so there are many natural gradients. They
differ in every layer, and move the network's end-to-end map all in the same way (Eqs 24–30).
A gradient does not.
"""

import matplotlib.pyplot as plt
import numpy as np

import natgrad_array as ng

rng = np.random.default_rng(4)
x = rng.standard_normal((500, 4)) * [2.0, 1.0, 0.7, 0.4]
task = ng.GaussianTask.from_samples(x, x @ rng.standard_normal((4, 3)))
weights = ng.deep_linear.gaussian(rng, (4, 5, 3), like=x)

# %%
# Two members of the family by name, and one at random: to any natural gradient may be added
# what the Fisher information does not see.

gradient = ng.deep_linear.gradient(weights, task)
F = ng.deep_linear.fisher(weights, task)
layerwise, shortest = (F.precondition(gradient, inverse=name) for name in ("layerwise", "moore_penrose"))
noise = tuple(0.8 * rng.standard_normal(w.shape) for w in weights)
seen = F.precondition(F.matvec(noise), inverse="moore_penrose")
arbitrary = tuple(d + z - s for d, z, s in zip(shortest, noise, seen, strict=True))
rows = {
    "layerwise\n(Eq 42)": layerwise,
    "Moore–Penrose\n$F^+ \\nabla$": shortest,
    "another one,\nat random": arbitrary,
    "the gradient\n(is none)": gradient,
}

# %%
# Squares show entries of matrices: size for magnitude, filled for positive, open for negative.


def squares(panel, matrix, colour):
    """Draw a matrix."""
    matrix = matrix / np.abs(matrix).max()
    for (i, j), value in np.ndenumerate(matrix):
        side = 0.86 * np.sqrt(abs(value))
        face = colour if value > 0 else "none"
        panel.add_patch(
            plt.Rectangle((j - side / 2, i - side / 2), side, side, facecolor=face, edgecolor=colour, linewidth=1.2)
        )
    panel.set(xlim=(-0.6, matrix.shape[1] - 0.4), ylim=(matrix.shape[0] - 0.4, -0.6), aspect="equal", anchor="N")
    panel.axis("off")


figure, panels = plt.subplots(4, 3, figsize=(7.0, 6.6), width_ratios=(4, 5, 4))
for line, (name, direction) in zip(panels, rows.items(), strict=True):
    for panel, matrix in zip(line, (*direction, ng.deep_linear.end_to_end_velocity(weights, direction)), strict=True):
        last = panel is line[-1]
        squares(panel, matrix, ("#667080" if name.startswith("the") else "#c24a00") if last else "#0068a6")
    line[0].text(-0.1, 0.5, name, ha="right", va="center", transform=line[0].transAxes)
for panel, title in zip(panels[0], ("layer 1", "layer 2", "end to end"), strict=True):
    panel.set_title(title)
figure.set_label(
    """Matrices drawn as squares, a row for each of four directions, columns for layer 1, layer 2 and the effect end
    to end. Three natural gradients differ in both layers, and have the same last column. The gradient's differs."""
)
plt.show()
