"""
The spectrum of the Fisher information
======================================

A network with P weights has a Fisher information of size P × P, but only as many directions count
as the end-to-end map has degrees of freedom. The rank is :math:`n_0 n_L` where every hidden layer is
at least as wide as the narrower end, and :math:`r (n_0 + n_L - r)` at a bottleneck of width r (Eq 22).
"""

import matplotlib.pyplot as plt
import numpy as np

import natgrad_array as ng

rng = np.random.default_rng(1)
x = rng.standard_normal((500, 5)) * np.geomspace(10.0, 0.1, 5)
task = ng.GaussianTask.from_samples(x, x @ rng.standard_normal((5, 5)))

figure, panel = plt.subplots()
for sizes, marker in {(5, 8, 5): "o", (5, 5, 5): "s", (5, 3, 5): "^", (5, 1, 5): "D"}.items():
    weights = ng.deep_linear.gaussian(rng, sizes, like=x)
    F = ng.deep_linear.fisher(weights, task)
    eigenvalues = np.linalg.eigvalsh(F.to_dense())[::-1]
    rank, size = int(F.rank()), len(eigenvalues)
    level = np.clip(eigenvalues / eigenvalues[0], 1e-17, None)
    name = f"{'-'.join(map(str, sizes))}: rank {rank} of {size}"
    (line,) = panel.plot(np.arange(1, rank + 1), level[:rank], marker=marker, markersize=5, linewidth=1.2, label=name)
    # Beyond the rank there is only rounding.
    panel.plot(
        np.arange(rank + 1, size + 1),
        level[rank:],
        marker,
        color=line.get_color(),
        markerfacecolor="none",
        markersize=3.5,
    )
    assert rank == np.linalg.matrix_rank(F.to_dense(), hermitian=True)
panel.axhspan(1e-18, 1e-14, color="#667080", alpha=0.12, linewidth=0)
panel.text(79, 2.5e-15, "rounding: exactly zero", ha="right", color="#667080")
panel.set(yscale="log", ylim=(1e-18, 3), xlabel="eigenvalue, in order", ylabel="relative to the largest")
panel.legend(title="network", loc="center right", bbox_to_anchor=(1.0, 0.56))
figure.set_label(
    """Eigenvalues of the Fisher information of four networks, in order, on a log scale. Each falls gently up to its
    rank and then drops to rounding error: 25 eigenvalues count for 5-8-5 and 5-5-5, 21 for 5-3-5, 9 for 5-1-5."""
)
plt.show()
