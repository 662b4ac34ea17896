"""Interchange accuracy at every layer and position: what to do at a cell, cells in the making, the table.

- `plan`: what a caller asked for, read and checked; `cells`: the bases and the margins of one table; `measuring`:
  margins by a sweep; `search`: a table and its controls; `table`: the result.
"""
