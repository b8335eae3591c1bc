"""What the site needs besides Markdown: fences without the marks of the tests, and links to the repository's files."""

import re
from typing import Any


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Take the marks off fences, and let links out of the manual lead to the repository, if its address is known."""
    markdown = re.sub(r"^```(\w+) [^\n]*$", r"```\1", markdown, flags=re.MULTILINE)

    def outward(link: re.Match[str]) -> str:
        text, path = link.groups()
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})" if config.repo_url else text

    return re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", outward, markdown)
