"""What displays are made of: elements of HTML, a theme for light and dark pages, tables that fold, plain text.

A display stands in a notebook or in a file of its own and needs nothing else: no network, no other package, no
script where none is wanted. It has no background of its own and few colours, so that it goes with the page it is on.
"""

from hooklens.display.blocks import Cell, code, facts, fold, heading, note, paragraph, table
from hooklens.display.colours import diverging, sequential
from hooklens.display.elements import Child, Element, element, render
from hooklens.display.labels import visible
from hooklens.display.layers import format_numbers, layer_of_name, merge_layers
from hooklens.display.numbers import format_bytes, format_count, format_number, format_shape
from hooklens.display.page import document, fragment
from hooklens.display.summary import Displayed, Listing, Picture, Summary
from hooklens.display.text import MOST_COLUMNS, MOST_LINES, clip, columns, flatten, one_line, shorten
from hooklens.display.view import View

__all__ = [
    "MOST_COLUMNS",
    "MOST_LINES",
    "Cell",
    "Child",
    "Displayed",
    "Element",
    "Listing",
    "Picture",
    "Summary",
    "View",
    "clip",
    "code",
    "columns",
    "diverging",
    "document",
    "element",
    "facts",
    "flatten",
    "fold",
    "format_bytes",
    "format_count",
    "format_number",
    "format_numbers",
    "format_shape",
    "fragment",
    "heading",
    "layer_of_name",
    "merge_layers",
    "note",
    "one_line",
    "paragraph",
    "render",
    "sequential",
    "shorten",
    "table",
    "visible",
]
