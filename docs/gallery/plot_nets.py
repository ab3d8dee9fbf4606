"""
Deep linear networks learn from a teacher
=========================================

The three deep linear networks of the paper with half their width and a seventh of their samples, two seeds of
each. A random network teaches another of the same shape. The dashed line is the teacher's own loss, from the
variance of its noise. ``examples/nets.py`` runs the experiments at full size, eight seeds of each as one ensemble.
"""

import sys

import matplotlib.pyplot as plt

sys.path.append("../../examples")
import nets

import natgrad_array as ng

shapes = {
    "16 layers of 10": (10,) * 17,
    "10-15-…-50-…-15-10": (*range(10, 51, 5), *range(45, 9, -5)),
    "100-40-…-2-…-40-100": (100, 40, 17, 10, 5, 2, 5, 10, 17, 40, 100),
}
steps = (55, 30, 80)

figure, panels = plt.subplots(1, 3, figsize=(8.4, 3.6), sharey=True)
for number, (panel, (name, sizes)) in enumerate(zip(panels, shapes.items(), strict=True)):
    floor = 0.5 * nets.NOISE**2 * sizes[-1]
    nets.NETS[name] = nets.Net(sizes, floor, steps[number])
    optimizer = ng.optimizers.natural_gradient(damping=0.01)
    found = nets.run(name, optimizer, seeds=2, samples=1500, batch=400, steps=steps[number])
    for seed, (loss, dash) in enumerate(zip(found.losses.T, ("-", (0, (4, 1.5))), strict=True)):
        panel.plot(loss, color="#0068a6", linestyle=dash, linewidth=1.8, label=f"seed {seed}")
    panel.axhline(floor, color="#c24a00", linestyle="--", linewidth=1.6)
    panel.annotate("the teacher's own", (0, floor), (0, -13), textcoords="offset points", color="#c24a00")
    panel.set(yscale="log", xlabel="steps", title=f"NET {number + 1}, halved\n{name}", ylim=(1e-6, None))
panels[0].set_ylabel("test loss")
panels[0].legend()
figure.set_label(
    """Test loss against steps on a log scale for NET 1, 2 and 3 at half their width, two seeds each. In all three
    panels the loss falls by six orders of magnitude on a nearly straight line and settles on the dashed line, the
    teacher's own loss."""
)
plt.show()
