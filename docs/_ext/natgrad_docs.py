"""What this site adds to Sphinx: the table of libraries, links, shapes in docstrings, and MathML."""

import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from natgrad_array import _support

logger = logging.getLogger(__name__)
TITLES = {"numpy": "NumPy", "cupy": "CuPy", "torch": "PyTorch", "jax": "JAX", "dask": "Dask"}


class SupportTable(SphinxDirective):
    """``support-table``: what works on which library, from `natgrad_array._support`."""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(_support.__file__)
        titles = ["function", *(TITLES[library] for library in _support.LIBRARIES), "jax.jit", "note"]
        table = nodes.table(classes=["support-table"])
        group = nodes.tgroup(cols=len(titles))
        table += group
        group += [nodes.colspec(colwidth=1) for _ in titles]
        head, body = nodes.thead(), nodes.tbody()
        group += [head, body]
        head += self.row([nodes.Text(title) for title in titles])
        for row in _support.SUPPORT:
            name = f"ng.{row.name}"
            marks = [*(library in row.libraries for library in _support.LIBRARIES), row.jit]
            body += self.row(
                [
                    nodes.literal(name, name),
                    *(nodes.Text("yes" if mark else "–") for mark in marks),
                    nodes.Text(row.note),
                ]
            )
        return [table]

    @staticmethod
    def row(cells: list[nodes.Node]) -> nodes.row:
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells))


class LinkLiterals(SphinxTransform):
    """Turn literals such as ``ng.pinvh`` into links to the reference, where there is one."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            match = re.fullmatch(r"ng((?:\.\w+)+)(?:\(.*)?", literal.astext())
            if match is None or isinstance(literal.parent, addnodes.pending_xref):
                continue
            reference = addnodes.pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget="natgrad_array" + match[1],
                refexplicit=True,
                refwarn=False,
                refdoc=self.env.docname,
            )
            literal.replace_self(reference)
            reference += literal


def escape_shapes(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep the star of ``(*batch, n, n)`` from opening an emphasis."""
    lines[:] = [re.sub(r"(?<=[(\[ ,])\*(?=[a-z]\w*[,)])", r"\\*", line) for line in lines]


def forget_pages(app: Sphinx) -> None:
    """Remove the reference's pages of an earlier build: some may be of names that are gone."""
    shutil.rmtree(Path(app.srcdir) / "api" / "generated", ignore_errors=True)


def visit_math(self: Any, node: nodes.Element) -> None:
    """Write a formula as MathML, which browsers show by themselves: pages load nothing from elsewhere."""
    block = isinstance(node, nodes.math_block)
    try:
        formula = tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        logger.warning("formula %r: %s", node.astext(), error, location=node)
        formula = self.encode(node.astext())
    self.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("support-table", SupportTable)
    app.add_transform(LinkLiterals)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("builder-inited", forget_pages, priority=100)
    app.connect("autodoc-process-docstring", escape_shapes, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
