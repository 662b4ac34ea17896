"""What experiments give: labelled values for each pair, as a table, a figure and a file.

- `result`: the values, and their scale from one unpatched run to the other; `scale`: where that is too short.
- `statistics`: standard errors, bootstrap intervals, permutation tests.
- `figures` and `file`: drawing, writing and reading.
"""
