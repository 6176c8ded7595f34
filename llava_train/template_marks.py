"""Generation marks of chat templates, shown or hidden.

transformers alone knows the tags `{% generation %}` and `{% endgeneration %}`, which tell training what the assistant
says. Plain jinja2 stops at them, and with it readers of exported models (llama-cpp-python, text-generation-webui and
tabbyAPI had to learn them one by one; llama.cpp and others render with jinja of their own). An exported template has
them as comments, which every reader passes over and which trim the same white space:

    {%- generation -%}{{- text_of(message) -}}{%- endgeneration -%}
    {#- generation -#}{{- text_of(message) -}}{#- endgeneration -#}
"""

from __future__ import annotations

import re

_SHOWN = re.compile(r"\{%([-+]?)\s*((?:end)?generation)\s*([-+]?)%\}")
_HIDDEN = re.compile(r"\{#([-+]?) ((?:end)?generation) ([-+]?)#\}")


def hide_marks(template: str) -> str:
    """The template with its marks as comments: it renders the same text and needs no extension of jinja."""
    return _SHOWN.sub(r"{#\1 \2 \3#}", template)


def show_marks(template: str) -> str:
    """The template as it was before `hide_marks`; one that was never hidden stays as it is."""
    return _HIDDEN.sub(r"{%\1 \2 \3%}", template)


def has_marks(template: str) -> bool:
    """Whether a template has generation marks, shown or hidden."""
    return bool(_SHOWN.search(show_marks(template)))
