"""Sphinx's settings; docs/build.py writes what it reads."""

project = "scir"
copyright = "2026 onwards, the scir authors"
extensions = ["myst_nb"]
exclude_patterns = ["_static"]

nb_execution_mode = "off"
nb_code_prompt_show, nb_code_prompt_hide = "Source", "Source"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_inline", "attrs_block", "fieldlist"]
myst_heading_anchors = 4

highlight_language = "none"
html_theme = "furo"
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "github-dark"
html_title = "scir"
html_static_path = ["../_proc/_static"]
html_css_files = ["style.css"]
html_favicon = "icon.svg"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}

mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}, "svg": {"fontCache": "global"}}
math_number_all = False

add_module_names = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 80
