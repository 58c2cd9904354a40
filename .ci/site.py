"""What the site needs of the pages: files of the repository beside docs/ are named there, and are no part of it."""

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of docs/ as the names of files."""
    return OUTSIDE.sub(lambda link: f"`{link[2]}`", markdown)
