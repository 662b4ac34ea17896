"""What experiments give: labelled values for each pair, as a table, a figure and a file.

- `result`: the values, and their scale from one unpatched run to the other; `scale`: where that is too short.
- `edge_scores`: the scores of edges, and the circuits that the strongest make up.
- `statistics`: standard errors, bootstrap intervals, permutation tests; `over_pairs` gives every result them, and
  `moments` keeps sums where the values of single pairs would be too many.
- `file`: writing and reading.
"""
