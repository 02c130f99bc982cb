"""Links and images: of Markdown files in the project, and of the pages of a built site."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

LINK = re.compile(r'\]\(([^)\s]+)\)|<img src="([^"]+)"')
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
FOREIGN = re.compile(r"^(?:https?:)?//")
OTHER = ("mailto:", "data:", "javascript:")
CSS_URL = re.compile(r"url\(\s*['\"]?((?:https?:)?//[^'\")]+)")


def broken_in_markdown(path: Path) -> list[str]:
    """Relative links and images of a Markdown file that lead nowhere."""
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    targets = [(link or image).partition("#")[0] for link, image in LINK.findall(text)]
    local = [one for one in targets if one and not FOREIGN.match(one)]
    return [one for one in local if not (path.parent / one).exists()]


class Page(HTMLParser):
    """Anchors of a page, where it links to, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.anchors |= {named[name] for name in ("id", "name") if name in named}
        if "href" in named:
            (self.loads if tag == "link" else self.links).append(named["href"])
        self.loads += [named[name] for name in ("src", "poster", "data-src") if name in named]


def broken_in_site(site: Path) -> list[str]:
    """Links, images and anchors of a built site that lead nowhere, and whatever a page would load
    from another host; one line each.
    """
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    problems = []
    for path, page in pages.items():
        here = path.relative_to(site.resolve())
        problems += [f"{here} loads {one}" for one in page.loads if FOREIGN.match(one)]
        for link in page.links + page.loads:
            if FOREIGN.match(link) or link.startswith(OTHER):
                continue
            place, _, anchor = link.partition("#")
            file = unquote(place.partition("?")[0])
            target = (path.parent / file).resolve() if file else path
            if not target.exists():
                problems.append(f"{here}: {link} does not exist")
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                problems.append(f"{here}: {link} has no such anchor")
    for path in sorted(site.rglob("*.css")):
        foreign = CSS_URL.findall(path.read_text(encoding="utf-8"))
        problems += [f"{path.name} loads {one}" for one in foreign]
    return problems
