"""Functions on weights and state dicts that need no network: layout, processing, factored matrices."""
