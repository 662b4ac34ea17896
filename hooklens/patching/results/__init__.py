"""What experiments give: labelled values for each pair, as a table, a figure and a file."""
