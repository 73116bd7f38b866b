"""The hooks for mkdocs. They add the pages of the reference, and the files outside docs/ that a page links to.

The start page is README.md. If a link leads to another file, such as LOG.md or an example, that file becomes a page. So
a link works both in the repository and on the site.
"""

import os
import posixpath
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from scripts.site import reference  # `python -m mkdocs` runs at the repository's root and finds it there

ROOT = reference.ROOT
START = "README.md"
LINK = re.compile(r"(\]\(|^\[[^\]]+\]: )([^)\s#]+)", re.MULTILINE)
LANGUAGES = {
    ".py": "python",
    ".sh": "bash",
    ".toml": "toml",
    ".csv": "text",
    ".txt": "text",
    ".cff": "yaml",
    "": "text",
}


def on_config(config: MkDocsConfig) -> None:
    """Fill in the navigation's entry Reference."""
    for part in config.nav or ():
        if "Reference" in part:
            part["Reference"] = [{_title(path): path} for path in reference.pages()]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the reference, and the files outside docs/ that are linked to."""
    for path, text in reference.pages().items():
        files.append(File.generated(config, path, content=text))
    docs = Path(config.docs_dir).relative_to(ROOT).as_posix()
    texts = {f"{docs}/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    texts[START] = (ROOT / START).read_text()
    waiting, seen = list(texts), set(texts)
    files.append(File.generated(config, _page_of(START), content=texts[START]))
    while waiting:
        path = waiting.pop()
        if not path.endswith(".md"):
            continue
        for target in _targets(path, texts.get(path) or (ROOT / path).read_text()):
            if target not in seen and not target.startswith(f"{docs}/") and (ROOT / target).is_file():
                seen.add(target)
                waiting.append(target)
                files.append(File.generated(config, _page_of(target), content=_content(target)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Change links from docs/ to other folders, and back, so that they lead to pages of the site."""
    origin = _origin(page.file.src_uri)

    def on_site(match: re.Match[str]) -> str:
        target = _resolved(origin, match[2])
        if target is None:
            return match[0]
        uri = target.removeprefix("docs/") if target.startswith("docs/") else _page_of(target)
        return match[1] + posixpath.relpath(uri, PurePosixPath(page.file.src_uri).parent.as_posix())

    return LINK.sub(on_site, markdown)


def _title(path: str) -> str:
    name = PurePosixPath(path).stem
    return name if name == reference.PACKAGE else f"{reference.PACKAGE}.{name}"


def _content(path: str) -> str:
    """A page with the text of a file. Markdown stays. Anything else becomes a block of code under the file's name."""
    text = (ROOT / path).read_text()
    suffix = PurePosixPath(path).suffix
    return text if suffix == ".md" else f"# {path}\n\n````{LANGUAGES[suffix]}\n{text}````\n"


def _page_of(path: str) -> str:
    if path == START:
        return "index.md"
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def _origin(uri: str) -> str:
    """The file in the repository that a page was made of."""
    if uri == _page_of(START):
        return START
    if uri.startswith("repository/"):
        path = uri.removeprefix("repository/")
        return path if (ROOT / path).is_file() else path.removesuffix(".md")
    return f"docs/{uri}"


def _targets(path: str, text: str) -> list[str]:
    resolved = (_resolved(path, match[2]) for match in LINK.finditer(text))
    return [target for target in resolved if target is not None]


def _resolved(origin: str, link: str) -> str | None:
    """The path in the repository that a relative link leads to. None if the link is an address on the web."""
    if re.match(r"[a-z]+:", link):
        return None
    return os.path.normpath(posixpath.join(posixpath.dirname(origin), link)).replace(os.sep, "/")
