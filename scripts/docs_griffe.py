"""An extension of Griffe, which reads docstrings for the documentation: it knows `Examples:`, we write `Example:`."""

from __future__ import annotations

from typing import Any

import griffe


class SingularExample(griffe.Extension):
    """Shows the one example of a docstring as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Renames the section before it is parsed."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
