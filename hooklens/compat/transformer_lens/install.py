"""Importing this module makes `import transformer_lens` mean the layer."""

from hooklens.compat import install_transformer_lens

install_transformer_lens()
