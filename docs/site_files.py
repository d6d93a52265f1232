"""A hook of MkDocs: the site has the folders of the repository, so that links lead to the same place in both."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

FIRST_PAGES = ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of docs/ by the first pages and every file that they link to, directly or through pages."""
    root = Path(config.config_file_path).parent
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in find_linked(root):
        files.append(File.generated(config, path, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave the tables of measurements out of the search: their numbers would come before every page's text."""
    if page.file.src_uri.startswith("results/"):
        page.meta["search"] = {"exclude": True}
    return markdown


def find_linked(root: Path) -> list[str]:
    """Return the paths of the site's files below ``root``."""
    found: list[str] = []
    waiting = [*FIRST_PAGES, *(f"docs/{page.name}" for page in (root / "docs").glob("*.md"))]
    while waiting:
        path = waiting.pop()
        if path in found or not (root / path).is_file():
            continue
        found.append(path)
        if path.endswith(".md"):
            targets = re.findall(r"\]\(([^)#\s]+)", (root / path).read_text(encoding="utf-8"))
            waiting += [posixpath.normpath(posixpath.join(Path(path).parent.as_posix(), target)) for target in targets]
    return sorted(found)
