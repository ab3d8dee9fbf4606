"""What this site adds to Sphinx: the table of libraries, links, shapes in docstrings, and MathML."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from natgrad_array import _support

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
#: Where other projects document what has a page of its own. An inventory would have to be fetched.
REFERENCES = {
    "numpy": "https://numpy.org/doc/stable/reference/generated/{name}.html",
    "scipy": "https://docs.scipy.org/doc/scipy/reference/generated/{name}.html",
    "cupy": "https://docs.cupy.dev/en/stable/reference/generated/{name}.html",
    "torch": "https://docs.pytorch.org/docs/stable/generated/{name}.html",
    "jax": "https://docs.jax.dev/en/latest/_autosummary/{name}.html",
}
#: What has none.
ELSEWHERE = {
    "numpy.random.Generator": "https://numpy.org/doc/stable/reference/random/generator.html",
    "torch.nn.Module": "https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html",
}
TITLES = {"numpy": "NumPy", "cupy": "CuPy", "torch": "PyTorch", "jax": "JAX", "dask": "Dask", "scipy": "SciPy"}


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
    """Turn literals such as ``ng.pinvh`` or ``numpy.linalg.pinv`` into links, where there is something to link to."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            match = re.fullmatch(rf"(ng|{'|'.join(REFERENCES)})((?:\.\w+)+)(?:\(.*)?", literal.astext())
            if match is None or isinstance(literal.parent, addnodes.pending_xref):
                continue
            reference = addnodes.pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=("natgrad_array" if match[1] == "ng" else match[1]) + match[2],
                refexplicit=True,
                refwarn=False,
                refdoc=self.env.docname,
            )
            literal.replace_self(reference)
            reference += literal


def link_elsewhere(app: Sphinx, env: Any, node: nodes.Element, child: nodes.Node) -> nodes.reference | None:
    """Link names of other libraries to their own reference."""
    name = str(node.get("reftarget", ""))
    library, _, rest = name.partition(".")
    if node.get("refdomain") != "py" or library not in REFERENCES or not rest:
        return None
    target = ELSEWHERE.get(name) or REFERENCES[library].format(name=name)
    return nodes.reference(
        "", "", child, refuri=target, internal=False, reftitle=f"{name}, in the reference of {TITLES[library]}"
    )


# ---------------------------------------------------------- equations, functions and tests


def equation_numbers(text: str) -> list[int]:
    """Numbers in a cell such as ``1–2, 5–6``; none where it is something else."""
    if not re.fullmatch(r"\d+(–\d+)?(, \d+(–\d+)?)*", text):
        return []
    spans = [part.partition("–") for part in text.split(", ")]
    return [number for first, _, last in spans for number in range(int(first), int(last or first) + 1)]


class MarkEquations(SphinxTransform):
    """Give each row of the theory page's table of equations a place that can be linked to."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        if self.env.docname != "theory":
            return
        for row in self.document.findall(nodes.row):
            numbers = equation_numbers(row[0].astext().strip())
            row["ids"] += [f"eq-{number}" for number in numbers]


class LinkEquations(SphinxPostTransform):
    """Link "Eq 42" to its row, and names of test files to their pages."""

    default_priority = 300
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        name = self.env.docname
        for text in list(self.document.findall(nodes.Text)):
            parent = text.parent
            if isinstance(parent, nodes.literal) and re.fullmatch(r"tests/test_\w+\.py", text):
                if not isinstance(parent.parent, nodes.reference):
                    link = nodes.reference("", "", refuri=self.uri(f"_modules/{text[:-3]}"), internal=True)
                    parent.replace_self(link)
                    link += parent
                continue
            # What other papers number is none of ours.
            if not isinstance(parent, nodes.paragraph | nodes.strong) or (
                name.startswith("api/") and "Bernacchia" not in parent.astext()
            ):
                continue
            pieces = re.split(r"(\bEqs?\s\d+)", text)
            if len(pieces) > 1:
                parent.replace(text, [self.piece(piece) for piece in pieces])

    def piece(self, text: str) -> nodes.Node:
        match = re.fullmatch(r"Eqs?\s(\d+)", text)
        if match is None:
            return nodes.Text(text)
        return nodes.reference("", text, refuri=f"{self.uri('theory')}#eq-{match[1]}", internal=True)

    def uri(self, name: str) -> str:
        return str(self.app.builder.get_relative_uri(self.env.docname, name))


def test_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Pages with the tests that the theory page names."""
    if app.builder.format != "html":
        return
    theory = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    for name in sorted(set(re.findall(r"`(tests/test_\w+)\.py`", theory))):
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        body = app.builder.highlighter.highlight_block(source, "python")
        yield f"_modules/{name}", {"title": f"{name}.py", "body": f"<h1>{name}.py</h1>{body}"}, "page.html"


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
    app.add_transform(MarkEquations)
    app.add_post_transform(LinkEquations)
    app.connect("missing-reference", link_elsewhere)
    app.connect("html-collect-pages", test_pages)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("builder-inited", forget_pages, priority=100)
    app.connect("autodoc-process-docstring", escape_shapes, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
