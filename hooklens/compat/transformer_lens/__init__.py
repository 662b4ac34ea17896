"""An import layer for TransformerLens 2.x (Nanda and Bloom 2022): its names and behaviour, computed by HookLens."""
