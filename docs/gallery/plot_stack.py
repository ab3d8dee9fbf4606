"""
A stack is not a loop
=====================

An ensemble is one more axis of an array, and a natural gradient of all its members is one call. Here is what that
saves on the machine that built this page, with NumPy: time for each network against their number. On a GPU, where
a call on one small network leaves nearly all of the device idle, there is more to save.
"""

import time

import matplotlib.pyplot as plt
import numpy as np

import natgrad_array as ng

rng = np.random.default_rng(0)
x = rng.standard_normal((500, 10))
task = ng.GaussianTask.from_samples(x, x @ rng.standard_normal((10, 10)))
counts = (1, 4, 16, 64, 256, 1024, 4096)


def fastest(call, repeats=5):
    """Seconds of the fastest of a few calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


figure, panel = plt.subplots()
for sizes, marker in {(10, 10, 10): "o", (10, 20, 20, 10): "s"}.items():
    weights = ng.deep_linear.gaussian(rng, sizes, (max(counts),), like=x)
    seconds = [
        fastest(lambda n=n, w=weights: ng.deep_linear.natural_gradient([v[:n] for v in w], task)) for n in counts
    ]
    micro = 1e6 * np.asarray(seconds) / counts
    name = "-".join(map(str, sizes))
    (line,) = panel.plot(counts, micro, marker=marker, markersize=6, label=f"{name}: one call for all")
    panel.axhline(micro[0], color=line.get_color(), linestyle=":", linewidth=1.4, label=f"{name}: a loop over networks")
panel.set(xscale="log", yscale="log", xlabel="networks", ylabel="microseconds for each network")
panel.set_xticks(counts, labels=map(str, counts))
panel.minorticks_off()
panel.legend(loc="center right", bbox_to_anchor=(1.0, 0.68))
figure.set_label(
    """Time for each network against the number of networks, on log scales, for two architectures. A loop takes the
    same time for each, a level line. One call for all falls far below it: the more networks, the less for each."""
)
plt.show()
