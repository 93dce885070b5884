"""mkdocs hooks: the front page, the package for the API reference, and links out of docs/."""

from __future__ import annotations

import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "build/docs-package/capipe"
LINK = re.compile(r"\[([^\]]+)\]\(([^)#:\s]+)\)")
ROLE = re.compile(r":(?:mod|meth|attr|class|func|data):<code>[~.]*")


def on_startup(**_: object) -> None:
    """Lay the package out as griffe expects it: a folder of its name. The repository's root is that package, whatever
    it is called, and holds a virtual environment that must not be read, so the folder links to what pyproject lists.
    At start-up: mkdocstrings checks for the folder before hooks receive the configuration.
    """
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    wanted = {name.split(".")[1] for name in packages if "." in name} | {path.name for path in ROOT.glob("*.py")}
    PACKAGE.mkdir(parents=True, exist_ok=True)
    for link in PACKAGE.iterdir():
        link.unlink()
    for name in wanted:
        (PACKAGE / name).symlink_to(ROOT / name)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Use the README as the front page, so that there is only one."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](").replace('src="docs/', 'src="')
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to files of the repository outside the site by their names."""
    at = posixpath.dirname(f"docs/{page.file.src_uri}")

    def named(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(at, link[2]))
        outside = not target.startswith("docs/") or (page.file.src_uri == "index.md" and (ROOT / link[2]).exists())
        return f"{link[1]} (`{link[2] if page.file.src_uri == 'index.md' else target}`)" if outside else link[0]

    return LINK.sub(named, markdown)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Reduce Sphinx roles in docstrings (``:meth:`open```) to the name."""
    return ROLE.sub("<code>", html)
