"""The plan of a call: which tokens run, at which positions, and what each of them sees."""
