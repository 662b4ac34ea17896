"""What displays are made of: elements of HTML, a theme for light and dark pages, tables that fold, plain text.

A display stands in a notebook or in a file of its own and needs nothing else: no network, no other package, no
script where none is wanted. It has no background of its own and few colours, so that it goes with the page it is on.
"""

from hooklens.display.blocks import code, facts, fold, heading, note, paragraph, table
from hooklens.display.colours import diverging, sequential
from hooklens.display.elements import Child, Element, element, render
from hooklens.display.labels import visible
from hooklens.display.numbers import format_bytes, format_count, format_number, format_shape
from hooklens.display.page import document, fragment
from hooklens.display.text import MOST_LINES, columns, shorten
from hooklens.display.view import View

__all__ = [
    "MOST_LINES",
    "Child",
    "Element",
    "View",
    "code",
    "columns",
    "diverging",
    "document",
    "element",
    "facts",
    "fold",
    "format_bytes",
    "format_count",
    "format_number",
    "format_shape",
    "fragment",
    "heading",
    "note",
    "paragraph",
    "render",
    "sequential",
    "shorten",
    "table",
    "visible",
]
