"""Links from a page to files of the repository that are no pages (tutorials, demos) lead to the repository."""

import re
from typing import Any

_OUTSIDE = re.compile(r"\]\((?:\.\./)+(?P<path>[^)#\s]+)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Write such links as the repository's own addresses; links to pages stay as they are."""
    pages = {file.src_uri for file in files}

    def write(match: re.Match[str]) -> str:
        if match["path"] in pages:
            return match[0]
        return f"]({config.repo_url.rstrip('/')}/blob/main/{match['path']}"

    return _OUTSIDE.sub(write, markdown)
