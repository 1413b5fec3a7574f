"""XMP sidecars: a caption as dc:description, tags as dc:subject, beside whatever else a file has.

darktable, digiKam and Lightroom read and write such files. Everything else in a file stays: other programs
keep their work there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree as ET

from ..handles import ModuleLock
from ..reading import decode_text, parse_json

_X = "adobe:ns:meta/"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_DC = "http://purl.org/dc/elements/1.1/"
_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
_LISTS = tuple(f"{{{_RDF}}}{kind}" for kind in ("Alt", "Bag", "Seq"))
_OURS = {"x": _X, "rdf": _RDF, "dc": _DC}
_HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
_TAIL = '\n<?xpacket end="w"?>\n'

LARGEST = 16 << 20  # bytes; darktable's history of an image takes some hundred thousand
_DEEPEST = 200  # elements inside each other
_PREFIXES = 100  # of namespaces; a file that several programs wrote has some twenty
_NO_XML = re.compile("[^\t\n\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# Names, in replies of a schema, of what is the caption and of what are the tags.
_TEXTS = ("description", "caption", "summary", "text", "title")
_TAGS = ("tags", "keywords")

_registry = ModuleLock()  # of prefixes, which ElementTree keeps for the whole process


class XmpError(ValueError):
    """A file that is not XMP, or that nothing can be added to."""


def parts_of(caption: str) -> tuple[str, list[str]]:
    """The description and the tags in a caption. One that is not a JSON object is a description alone; of an
    object the description is its text of that name, or else all of it."""
    try:
        values = parse_json(caption)
    except ValueError:
        return caption, []
    if not isinstance(values, dict):
        return caption, []
    named = {str(name).lower(): value for name, value in values.items()}
    tags: list[Any] = next((named[name] for name in _TAGS if isinstance(named.get(name), list)), [])
    text = next((named[name] for name in _TEXTS if isinstance(named.get(name), str)), caption)
    return text, [tag.strip() for tag in tags if isinstance(tag, str) and tag.strip()]


def read_description(data: bytes) -> str:
    """The description in an XMP file; "" if it has none. Raises XmpError."""
    rdf = _rdf(_parse(data)[0])
    tag = f"{{{_DC}}}description"
    texts = []
    for block in _descriptions(rdf):  # several programs may have one each
        for found in block.findall(tag):
            item = _default_item(found)
            texts.append(_text(found if item is None else item))
        texts.append(block.get(tag, ""))
    return next(filter(str.strip, texts), "")


def write_description(old: bytes, description: str, tags: Sequence[str] = ()) -> bytes:
    """An XMP file with this description, in the default language, and with these tags beside those that are
    there.

    old: the file as it is, of which all else stays; b"": there is none

    Raises XmpError.
    """
    if old.strip():
        root, builder = _parse(old)
    else:
        root, builder = ET.Element(f"{{{_X}}}xmpmeta"), _Builder()
        ET.SubElement(root, f"{{{_RDF}}}RDF")
    rdf = _rdf(root)
    _set_description(rdf, clean(description))
    if tags:
        _add_tags(rdf, [clean(tag) for tag in tags])
    try:
        with _registry, _registered({**builder.prefixes, **_OURS}):
            text = ET.tostring(root, encoding="unicode")
    except RecursionError as e:
        raise XmpError("its elements are nested too deeply") from e
    before, after = map("".join, builder.around)
    text = text.strip().replace("\r", "&#xD;")  # a bare one would be read as a line end
    return (f"{_HEAD}{before}{text}\n{after}".rstrip("\n") + _TAIL).encode("utf-8")


# ---- reading -----------------------------------------------------------------------------------------------


class _Builder(ET.TreeBuilder):
    """Keeps comments, notes prefixes, and bounds how deep elements are nested."""

    def __init__(self) -> None:
        super().__init__(insert_comments=True, insert_pis=True)
        self.prefixes: dict[str, str] = {}
        self.around: tuple[list[str], list[str]] = [], []  # comments before and after the root
        self._is_begun = False
        self._depth = 0

    def start(self, tag: str, attrs: Mapping[Any, Any], /) -> Any:
        self._is_begun = True
        self._depth += 1
        if self._depth > _DEEPEST:
            raise XmpError("its elements are nested too deeply")
        return super().start(tag, dict(attrs))

    def end(self, tag: str, /) -> Any:
        self._depth -= 1
        return super().end(tag)

    def comment(self, text: str | None, /) -> Any:
        if self._depth:
            return super().comment(text)
        self.around[self._is_begun].append(f"<!--{text}-->\n")
        return None

    def pi(self, target: str, text: str | None = None, /) -> Any:
        if self._depth:
            return super().pi(target, text)
        if target != "xpacket":  # which is written anew
            self.around[self._is_begun].append(f"<?{target} {text or ''}?>\n")
        return None

    def start_ns(self, prefix: str, uri: str) -> None:
        self.prefixes.setdefault(prefix or "", uri)
        if len(self.prefixes) > _PREFIXES:
            raise XmpError(f"it has more than {_PREFIXES} prefixes of namespaces")


def _parse(data: bytes) -> tuple[ET.Element, _Builder]:
    """The root of a file, and its builder, which knows the rest. Nothing that a document type may do is
    done."""
    if len(data) > LARGEST:
        raise XmpError(f"it has more than {LARGEST} bytes")
    try:
        text = decode_text(data)
    except UnicodeDecodeError as e:
        raise XmpError("it is neither UTF-8 nor UTF-16") from e
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise XmpError("it has a document type, which XMP never has")
    builder = _Builder()
    parser = ET.XMLParser(target=builder)
    try:
        parser.feed(text.strip("\ufeff\0 \t\r\n"))
        root = parser.close()
    except ET.ParseError as e:
        raise XmpError(f"it is not XML: {e}") from e
    return root, builder


def _rdf(root: ET.Element) -> ET.Element:
    tag = f"{{{_RDF}}}RDF"
    found = root if root.tag == tag else root.find(f".//{tag}")
    if found is None:
        raise XmpError("it is not XMP (rdf:RDF is missing)")
    return found


def _descriptions(rdf: ET.Element) -> list[ET.Element]:
    return rdf.findall(f"{{{_RDF}}}Description")


def _default_item(description: ET.Element) -> ET.Element | None:
    """The text in the default language, or the first one; also where a program wrote another kind of list."""
    items = list(description.iter(f"{{{_RDF}}}li"))
    return next(filter(_is_default, items), items[0] if items else None)


def _text(element: ET.Element) -> str:
    """All text in an element, beside and amid comments; `itertext` would give theirs too."""
    parts = [element.text]
    for child in element:
        parts += [_text(child) if isinstance(child.tag, str) else "", child.tail]
    return "".join(filter(None, parts))


def _is_default(item: ET.Element) -> bool:
    """Whether a text has no language of its own."""
    return item.get(_LANG, "x-default") == "x-default"


# ---- writing -----------------------------------------------------------------------------------------------


@contextmanager
def _registered(prefixes: Mapping[str, str]) -> Iterator[None]:
    """The prefixes of namespaces in what is written meanwhile. Those of other files would stay for ever, and
    each further one takes longer the more there are."""
    known: dict[str, str] = ET._namespace_map  # type: ignore[attr-defined]  # nothing public takes one out
    before = dict(known)
    try:
        for prefix, uri in prefixes.items():
            if prefix and not re.fullmatch(r"ns\d+|xml.*", prefix, re.IGNORECASE):
                ET.register_namespace(prefix, uri)
        yield
    finally:
        for uri in prefixes.values():
            known.pop(uri, None)
        known.update(before)


def _place(rdf: ET.Element, name: str) -> ET.Element:
    """The property dc:NAME, made if it is missing."""
    tag = f"{{{_DC}}}{name}"
    blocks = _descriptions(rdf)
    for block in blocks:
        found = block.find(tag)
        if found is not None:
            return found
    if not blocks:
        blocks = [ET.SubElement(rdf, f"{{{_RDF}}}Description", {f"{{{_RDF}}}about": ""})]
    made = ET.SubElement(blocks[0], tag)
    for block in blocks:  # the short form, which has no languages and no list
        made.text = block.attrib.pop(tag, None) or made.text
    return made


def _list_in(parent: ET.Element, kind: str) -> tuple[ET.Element, str]:
    """The list in a property, an rdf:KIND if it is made here, and the text that stood in its place, or "".
    Raises XmpError for a property that is something else."""
    children = [child for child in parent if isinstance(child.tag, str)]
    if len(children) == 1 and children[0].tag in _LISTS:
        return children[0], ""
    if children or any(name != _LANG for name in parent.attrib):
        raise XmpError(f"its {parent.tag.partition('}')[2]} is of a form that is not known")
    text = _text(parent).strip()
    _set_text(parent, None)
    return ET.SubElement(parent, f"{{{_RDF}}}{kind}"), text


def _set_description(rdf: ET.Element, text: str) -> None:
    for block in _descriptions(rdf):
        block.attrib.pop(f"{{{_DC}}}description", None)
    alternatives, _ = _list_in(_place(rdf, "description"), "Alt")
    alternatives.tag = f"{{{_RDF}}}Alt"
    items = alternatives.findall(f"{{{_RDF}}}li")
    item = next(filter(_is_default, items), None)
    if item is None:
        item = ET.Element(f"{{{_RDF}}}li")
        alternatives.insert(0, item)
    if any(isinstance(child.tag, str) for child in item):
        raise XmpError("its description is of a form that is not known")
    item.set(_LANG, "x-default")
    _set_text(item, text)


def _set_text(element: ET.Element, text: str | None) -> None:
    """Put a text in the place of all that an element has beside comments."""
    element.text = text
    for child in element:
        child.tail = None


def _add_tags(rdf: ET.Element, tags: Sequence[str]) -> None:
    bag, text = _list_in(_place(rdf, "subject"), "Bag")
    there = {_text(item) for item in bag.findall(f"{{{_RDF}}}li")}
    for tag in dict.fromkeys([text, *tags] if text else tags):
        if tag not in there:
            ET.SubElement(bag, f"{{{_RDF}}}li").text = tag


def clean(text: str) -> str:
    """A text without the characters that XML cannot have."""
    return _NO_XML.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))
