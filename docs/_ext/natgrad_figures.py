"""Figures of the gallery: one style, alternative text, and colours that follow the page's theme."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

#: Colours in light pages and what stands for them in dark ones.
THEME = {
    "paper": ("#ffffff", "#14181e"),
    "ink": ("#1f2328", "#e4e8ed"),
    "faint": ("#667080", "#9aa5b4"),
    "grid": ("#e1e5ea", "#2b323c"),
    "blue": ("#0068a6", "#5bb8f5"),
    "orange": ("#c24a00", "#ff9a52"),
    "green": ("#00785c", "#38c79f"),
    "purple": ("#9c4785", "#e391c8"),
    "ochre": ("#8f6300", "#efc043"),
}
#: Told apart by colour, and by dash where there is no colour.
COLOURS = ("blue", "orange", "green", "purple", "ochre")
DASHES = ("-", (0, (6, 2)), (0, (6, 2, 1.5, 2)), (0, (1.5, 1.5)), (0, (9, 2, 1.5, 2, 1.5, 2)))


def style(gallery_conf: Any = None, fname: Any = None) -> None:
    """Set Matplotlib up before a script runs."""
    import matplotlib as mpl

    light = {name: pair[0] for name, pair in THEME.items()}
    mpl.rcParams.update(
        {
            "figure.figsize": (7.6, 3.9),
            "figure.constrained_layout.use": True,
            "figure.facecolor": light["paper"],
            "savefig.facecolor": light["paper"],
            "axes.facecolor": light["paper"],
            "axes.edgecolor": light["faint"],
            "axes.labelcolor": light["ink"],
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlecolor": light["ink"],
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.prop_cycle": mpl.cycler(color=[light[name] for name in COLOURS]) + mpl.cycler(linestyle=DASHES),
            "grid.color": light["grid"],
            "grid.linewidth": 0.8,
            "text.color": light["ink"],
            "xtick.color": light["faint"],
            "ytick.color": light["faint"],
            "xtick.labelcolor": light["ink"],
            "ytick.labelcolor": light["ink"],
            "legend.frameon": False,
            "legend.handlelength": 3.2,
            "lines.linewidth": 2.2,
            "font.size": 10.5,
            "mathtext.fontset": "dejavusans",
            "patch.edgecolor": light["ink"],
            "path.simplify_threshold": 0.4,
            "svg.hashsalt": "natgrad-array",
            "svg.id": "figure",
        }
    )


def follow_theme(svg: str) -> str:
    """Let an SVG take the dark colours where the page around it is dark, and leave out digits that nobody sees."""
    svg = re.sub(r'(?<= d=")[^"]+', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), svg)
    for name, (light, _) in THEME.items():
        svg = svg.replace(light, f"var(--{name})")
    shades = [";".join(f"--{name}:{pair[k]}" for name, pair in THEME.items()) for k in (0, 1)]
    rules = f"<style>svg{{{shades[0]}}}@media(prefers-color-scheme:dark){{svg{{{shades[1]}}}}}</style>"
    start = svg.index(">", svg.index("<svg ")) + 1
    return svg[:start] + rules + svg[start:]


def scraper(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Save the figures of a block as SVG; a figure's label is its alternative text."""
    import matplotlib.pyplot as plt

    rst = []
    for number, template in zip(plt.get_fignums(), block_vars["image_path_iterator"], strict=False):
        figure, path = plt.figure(number), Path(template).with_suffix(".svg")
        text = " ".join(figure.get_label().split())
        if len(text) < 40:
            raise ValueError(f"{block_vars['src_file']}: say with set_label what figure {number} shows")
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        path.write_text(follow_theme(path.read_text(encoding="utf-8")), encoding="utf-8")
        source = path.relative_to(gallery_conf["src_dir"]).as_posix()
        rst.append(f".. image:: /{source}\n   :alt: {text}\n   :class: gallery-figure\n\n")
    plt.close("all")
    return "\n".join(rst)


#: The order of the gallery: what to see first comes first.
ORDER = (
    "introduction",
    "one_line",
    "regimes",
    "family",
    "modes",
    "spectrum",
    "damping",
    "empirical",
    "shrinkage",
    "nets",
    "autoencoder",
    "stack",
)


class Order:
    """Sort scripts as `ORDER` has them."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, name: str) -> int:
        return ORDER.index(name.removeprefix("plot_").removesuffix(".py"))


def script(notebook: Path) -> str:
    """A notebook as a script of the gallery: what is Markdown there is reStructuredText here."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    parts = []
    for k, cell in enumerate(cells):
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            parts.append(f"# %%\n\n{text}")
            continue
        text = re.sub(r"`([^`]+)`", r"``\1``", text)
        text = re.sub(r"\$([^$]+)\$", r":math:`\1`", text)
        rule = "-" if k else "="
        text = re.sub(r"^#+ (.*)$", rf"\1\n{120 * rule}", text, flags=re.MULTILINE)
        parts.append(f'r"""\n{text}\n"""' if k == 0 else "# %%\n" + re.sub(r"^", "# ", text, flags=re.MULTILINE))
    return "\n\n".join(parts) + "\n"
