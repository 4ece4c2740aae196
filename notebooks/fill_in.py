"""Write the address of this repository, and the first cell, into every notebook and the README.

    python notebooks/fill_in.py                                  after a change to notebooks/first_cell.py
    python notebooks/fill_in.py https://github.com/OWNER/NAME    once, where the project has got an address

The address is kept in one place, REPO_URL in notebooks/first_cell.py. Until it is set, notebooks have no
badge and the README says REPO_URL where an address belongs.
"""

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
CELL = HERE / "first_cell.py"
README = HERE.parent / "README.md"
_SETTING = re.compile(r'^REPO_URL = "(.*)"', re.M)
_BADGE = re.compile(r"\[!\[Open In Colab\]\(.*?\)\]\(.*?\)\n\n?")


def repo_url() -> str:
    """The address that is set, or ""."""
    return _SETTING.search(CELL.read_text(encoding="utf-8"))[1]


def badge(url: str, name: str) -> str:
    """The Markdown of a badge that opens a notebook of a GitHub repository in Colab, or ""."""
    if not url.startswith("https://github.com/"):
        return ""
    place = f"https://colab.research.google.com/github/{url.removeprefix('https://github.com/')}/blob/main"
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open In Colab]({image})]({place}/notebooks/{name})\n\n"


def fill_in(notebook: str, name: str, cell: str, url: str) -> str:
    """A notebook's JSON with this first code cell and the badge below its title."""
    content = json.loads(notebook)
    title, code = content["cells"][:2]
    heading, rest = "".join(title["source"]).split("\n\n", 1)
    title["source"] = f"{heading}\n\n{badge(url, name)}{_BADGE.sub('', rest)}".splitlines(keepends=True)
    code |= {"source": cell.rstrip("\n").splitlines(keepends=True), "outputs": []}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main(url: str) -> None:
    before = repo_url()
    CELL.write_text(_SETTING.sub(f'REPO_URL = "{url}"', CELL.read_text(encoding="utf-8")), encoding="utf-8")
    for path in sorted(HERE.glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        path.write_text(fill_in(text, path.name, CELL.read_text(encoding="utf-8"), url), encoding="utf-8")
    if url:
        readme = README.read_text(encoding="utf-8")
        README.write_text(readme.replace(before or "REPO_URL", url), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1].removesuffix("/").removesuffix(".git") if sys.argv[1:] else repo_url())
