"""
Modes, one after the other or all at once
=========================================

Gradient descent learns the modes of a task one by one, strong ones first, and the deeper the network,
the longer the weak ones wait. Natural gradient removes what depth put in the way: every mode
goes straight to its target at the same rate. Lines are closed forms, markers simulated networks.
"""

import matplotlib.pyplot as plt
import numpy as np

import natgrad_array as ng

strength = np.asarray([4.0, 3.0, 2.0, 1.0])
task = ng.GaussianTask.from_modes(np.eye(4), strength, np.eye(4))
start = np.full(4, 0.05)
depth, steps, size = 3, 1500, 0.004
weights = ng.deep_linear.balanced(0, (4, 6, 6, 4), like=start, end_to_end=np.diag(start))
time = np.linspace(0.0, steps * size, 300)

figure, panels = plt.subplots(1, 2, sharex=True, sharey=True)
for panel, rule in zip(panels, ("gradient", "exact"), strict=True):
    history = ng.simulate(
        weights, task, rule=rule, integrator="rk4", learning_rate=size, steps=steps, record="modes", record_every=125
    )
    for k, (marker, s) in enumerate(zip("os^D", strength, strict=True)):
        if rule == "gradient":
            curve = ng.deep_linear.gradient_flow_modes(start[k : k + 1], strength[k : k + 1], time, depth=depth)
        else:
            curve = ng.deep_linear.natural_gradient_flow_modes(start[k : k + 1], strength[k : k + 1], time)
        (line,) = panel.plot(time, curve)
        panel.plot(
            history.steps * size,
            history.modes[:, k],
            marker,
            color=line.get_color(),
            markerfacecolor="#ffffff",
            markersize=5,
        )
        panel.annotate(f"s = {s:g}", (time[-1], s), xytext=(7, 0), textcoords="offset points", va="center")
    panel.set_xlabel("time")
    panel.margins(x=0.01)
panels[0].set_title("Gradient flow: one by one")
panels[1].set_title("Natural gradient flow: all at once")
panels[0].set_ylabel("strength of a mode in the network")
figure.set_label(
    """Strength of four modes against time. Under gradient flow each waits and then rises in an S, the strongest
    first and the weakest last. Under natural gradient flow all rise at once, each an exponential towards its
    target."""
)
plt.show()
