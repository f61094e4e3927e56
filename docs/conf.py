"""Sphinx's settings; ``make docs`` builds the site."""

import mimdet

project = "mimdet"
author = copyright = "the mimdet authors"
version = release = mimdet.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = f"mimdet {release}"
myst_heading_anchors = 3

autodoc_typehints = "none"  # docstrings give shapes, dtypes and units; signatures stay short
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes are listed once, with the class
