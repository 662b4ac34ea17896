"""Several models, named together."""
