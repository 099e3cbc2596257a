"""Sphinx configuration. Build with `python -m sphinx -W --keep-going docs docs/_build/html`."""

import importlib.metadata
import inspect
import os
import pathlib
import pkgutil
import shutil

from docutils import nodes
from sphinx.util import logging

import jaxjd
import jaxjd.integrations.flax
import jaxjd.integrations.nnx

HERE = pathlib.Path(__file__).parent

project = "jaxjd"
author = "The jaxjd contributors"
copyright = "2026, The jaxjd contributors"
release = importlib.metadata.version("jaxjd")

# The notebooks live at the top of the repository; the documentation builds a copy of them.
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", dirs_exist_ok=True)

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

# Inventories are fetched from the network, so links into other projects are made only where the
# pages are published or where somebody asks for them.
if os.environ.get("READTHEDOCS") or os.environ.get("JAXJD_DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
    }

html_theme = "sphinx_book_theme"
html_title = "jaxjd"
html_theme_options = {"show_toc_level": 2, "use_download_button": False}
html_static_path: list[str] = []

templates_path = ["_templates"]
default_role = "py:obj"

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def check_coverage(app, env):
    """Warns about public names that no page documents; with -W the build then fails."""
    logger = logging.getLogger(__name__)
    documented = {id(_resolve(name)) for name in env.get_domain("py").objects}
    for module in (
        jaxjd,
        jaxjd.diagnostics,
        jaxjd.labels,
        jaxjd.linalg,
        jaxjd.scalarizers,
        jaxjd.sharding,
        jaxjd.weightings,
        jaxjd.integrations.flax,
        jaxjd.integrations.nnx,
    ):
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.ismodule(value) and id(value) not in documented:
                logger.warning("%s.%s is public, but on no page", module.__name__, name)


def _resolve(full_name):
    """Imports what a documented name such as `jaxjd.linalg.gramian` stands for."""
    try:
        return pkgutil.resolve_name(full_name)
    except (AttributeError, ImportError):  # Not a name but a field in a docstring.
        return None


def strip_code(app, doctree):
    """Removes the empty line that ends the examples in Markdown, where doctest needs it."""
    for block in doctree.findall(nodes.literal_block):
        # Sphinx highlights a block only if its source and its text are the same.
        block.rawsource = block.astext().rstrip("\n")
        block.children = [nodes.Text(block.rawsource)]


def skip_fields(app, what, name, obj, skip, options):
    """Leaves out the fields of NamedTuples, which the docstring of the class describes."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app):
    """Connects the functions above."""
    app.connect("env-check-consistency", check_coverage)
    app.connect("doctree-read", strip_code)
    app.connect("autodoc-skip-member", skip_fields)
