"""What a pool is made of, as it is written in YAML files, dicts and keywords: read, checked, and written back."""
