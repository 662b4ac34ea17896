"""Studies of discovery: what it finds on some prompts, tried on others, and found again.

`split` parts pairs of prompts, `held_out` scores edges on one part and measures circuits on the other, `stability`
repeats a discovery over subsets of pairs and seeds.
"""
