"""Other libraries' interfaces and notations, as thin layers on HookLens."""
