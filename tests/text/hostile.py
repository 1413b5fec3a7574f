"""Schemas and grammars that are meant to do harm: deep, long, recursive, exploding, invalid, with NULs and
halves of surrogate pairs. Each is made from a seed alone.

    python tests/text/hostile.py SEED    shows the request of a seed, cut
"""

from __future__ import annotations

import random
import reprlib
import sys
from collections.abc import Callable
from typing import Any

Form = dict[str, Any]
_ODD_CHARACTERS = (
    "\0\x01\n\r\x7f\x85\ud800\udfff\ufdd0\uffff\u2028é猫😀\U0010ffff\"'\\/|&~<>[](){}^$.*+?#%@:;,-_ aA0"
)


def request(seed: int | str) -> Form:
    """A response_format."""
    rng = random.Random(seed)
    kind = rng.choice(("schema", "schema", "gbnf", "regex", "lark"))
    if kind == "schema":
        schema = rng.choice(_SCHEMAS)(rng)
        return {"type": "json_schema", "json_schema": {"schema": schema}}
    if kind == "regex":
        return {"type": "regex", "regex": _regex(rng)}
    make = rng.choice(_GBNF if kind == "gbnf" else _LARK)
    return {"type": kind, "grammar": _spoilt(rng, make(rng))}


def _size(rng: random.Random, most: int) -> int:
    """A number from 1 up, small ones as likely as large ones."""
    return int(most ** rng.random())


def _text(rng: random.Random, most: int = 40) -> str:
    return "".join(rng.choice(_ODD_CHARACTERS) for _ in range(_size(rng, most)))


def _spoilt(rng: random.Random, text: str) -> str:
    """Now and then with a few characters more, less or changed."""
    if rng.random() < 0.75 or not text:
        return text
    for _ in range(_size(rng, 5)):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(("", _text(rng, 3))) + text[at + rng.randrange(3) :]
    return text


# ---- regular expressions -----------------------------------------------------------------------------------


def _regex(rng: random.Random) -> str:
    return _spoilt(rng, rng.choice(_REGEXES)(rng))


def _nested_groups(rng: random.Random) -> str:
    n = _size(rng, 30_000)
    return "(" * n + rng.choice(("a", "a*", "[a-z]", "")) + rng.choice((")", ")*", ")?", "){2}", "|b)")) * n


def _nested_counts(rng: random.Random) -> str:
    text = rng.choice(("a", ".", "[a-z]", r"\w", r"\S", "(ab|a)", "a?"))
    for _ in range(rng.randrange(1, 6)):
        low, more = _size(rng, 2000) - 1, _size(rng, 2000)
        text = f"({text}){{{low},{rng.choice((low + more, ''))}}}"
    return text


def _optional_then_fixed(rng: random.Random) -> str:
    n = _size(rng, 3000)
    return "a?" * n + "a" * n


def _look_back_far(rng: random.Random) -> str:
    """The states of an automaton for it double with each step of the count."""
    n = _size(rng, 3000)
    first, other = rng.choice((("a", "."), ("[ab]", "[a-c]"), (r"\d", r"\w"), ("x", r"[^\0]"), ("é", ".")))
    return f"{other}*{first}{other}{{{n}}}{rng.choice(('', first, f'|{other}*b{other}{{{n}}}c'))}"


def _alternatives(rng: random.Random) -> str:
    n = _size(rng, 3000)
    words = ("".join(rng.choice("abc") for _ in range(rng.randrange(12))) for _ in range(n))
    return f"({'|'.join(words)}){rng.choice(('', '*', '{1,50}', '+x'))}"


def _classes(rng: random.Random) -> str:
    ranges = []
    for _ in range(_size(rng, 1500)):
        low = rng.randrange(0x110000)
        ranges.append(f"{chr(low)}-{chr(min(0x10FFFF, low + _size(rng, 5000)))}".replace("\\", ""))
    inside = "".join(ranges).replace("]", "").replace("[", "")
    return f"[{rng.choice(('', '^'))}{inside}]{rng.choice(('*', '+', '{1,300}', '{77}', ''))}"


def _what_is_refused(rng: random.Random) -> str:
    parts = (
        r"(?=a)",
        r"(?<!b)",
        r"(a)\1",
        "(?i)",
        "(?P<n>a)(?P=n)",
        r"\b",
        "^",
        "$",
        "a++",
        "(?>a)",
        r"\p{L}",
    )
    return "".join(rng.choice((*parts, "a", ".*")) for _ in range(_size(rng, 300)))


def _any_signs(rng: random.Random) -> str:
    signs = [*r"()[]{}|*+?.^$\-,0123456789abz", r"\d", r"\w", r"\s", r"\x00", r"\u1234", "(?:", "{1,", "[^"]
    return "".join(rng.choice(signs) for _ in range(_size(rng, 3000)))


def _long_gaps(rng: random.Random) -> str:
    n = _size(rng, 300)
    return "".join(
        f"{rng.choice(('.*', '[^b]*', '.{0,200}', '(a|b)*'))}{rng.choice('abc')}" for _ in range(n)
    )


_REGEXES: list[Callable[[random.Random], str]] = [
    _nested_groups,
    _nested_counts,
    _optional_then_fixed,
    _look_back_far,
    _alternatives,
    _classes,
    _what_is_refused,
    _any_signs,
    _long_gaps,
    lambda rng: f"[a-z]{{1,{_size(rng, 10**7)}}}",
    lambda rng: f"(ab){{{_size(rng, 10**5)},{_size(rng, 10**6)}}}",
    lambda rng: "a" * _size(rng, 100_000),
    lambda rng: f"(.{{1,100}}x){{1,{_size(rng, 1000)}}}",
    lambda rng: "(" * _size(rng, 50) + r"\w*\d*" * _size(rng, 60),
    _text,
]

# ---- JSON schemas ------------------------------------------------------------------------------------------


def _within(rng: random.Random, inner: Any) -> Any:
    """A schema around another."""
    name = rng.choice(("a", "b", "é", _text(rng, 5)))
    return rng.choice(
        (
            {"type": "object", "properties": {name: inner}, "required": [name]},
            {"properties": {name: inner}, "additionalProperties": False},
            {"additionalProperties": inner},
            {"items": inner},
            {"type": "array", "items": inner, "minItems": 1, "maxItems": _size(rng, 1000)},
            {"prefixItems": [inner] * rng.randrange(1, 4)},
            {"anyOf": [inner, {"type": "null"}]},
            {"allOf": [inner]},
            {"oneOf": [inner, {"type": "integer"}]},
            {"patternProperties": {"^a": inner}},
        )
    )


def _deep(rng: random.Random) -> Any:
    one_kind = rng.random() < 0.6
    keyword = rng.choice(("items", "additionalProperties", "not", "const"))
    schema: Any = {"type": "string"}
    for _ in range(_size(rng, 100_000 if one_kind else 60)):
        schema = {keyword: schema} if one_kind else _within(rng, schema)
    return schema


def _wide(rng: random.Random) -> Any:
    n = _size(rng, 20_000)
    inner: Any = rng.choice(
        (True, {"type": "integer"}, {"type": "string", "maxLength": 50}, {"enum": ["x", 1]})
    )
    properties = {f"p{i}": inner for i in range(n)}
    return rng.choice(
        (
            {"properties": properties, "required": list(properties)},
            {"properties": properties, "minProperties": rng.randrange(3), "additionalProperties": False},
            {"enum": [f"{'s' * rng.randrange(9)}{i}" for i in range(n)]},
            {"enum": list(range(n))},
            {"anyOf": [{"const": f"{i}"} for i in range(n)]},
            {"allOf": [{"type": "string", "maxLength": i} for i in range(n)]},
            {"oneOf": [{"properties": {"k": {"const": i}}, "required": ["k"]} for i in range(n)]},
            {"prefixItems": [inner] * n, "minItems": n},
            {"patternProperties": {f"^{i}_": inner for i in range(n % 40)}},
        )
    )


def _counted(rng: random.Random) -> Any:
    schema: Any = {"type": "string"}
    for name in rng.sample(("minLength", "maxLength", "pattern", "format"), rng.randrange(1, 4)):
        schema[name] = _count(rng)
    if "pattern" in schema:
        schema["pattern"] = _regex(rng)
    if "format" in schema:
        schema["format"] = rng.choice(("date", "time", "date-time", "uri", "email", "uuid", "regex", 5))
    for _ in range(rng.randrange(4)):
        schema = {"type": "array", "items": schema, "minItems": _count(rng), "maxItems": _count(rng)}
    return schema


def _count(rng: random.Random) -> Any:
    odd = (-1, 1.5, 1e400, float("nan"), 10**400, "3", None, True, 2**31, 2**63, 1e300)
    return rng.choice(odd) if rng.random() < 0.15 else _size(rng, 10**12) - 1


_NUMBERS: list[Any] = [0, -0.0, 1, -1, 0.1, 1 / 3, 5e-324, 1e308, -1e308, 2**53, 2**64, 10**400, -(10**400)]
_NUMBERS += [1e400, -1e400, float("nan"), 123456789012345678, 1e-15, 0.30000000000000004, 999999999999999.9]


def _numeric(rng: random.Random) -> Any:
    names = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "const")
    schema: Any = {"type": rng.choice(("integer", "number", ["number", "null"], "string"))}
    for name in rng.sample(names, rng.randrange(1, 4)):
        value = rng.choice((*_NUMBERS, rng.uniform(-1e3, 1e3), rng.randrange(-(10**16), 10**16)))
        schema[name] = value
    if "const" in schema and rng.random() < 0.5:
        schema["enum"] = [schema.pop("const"), *rng.sample(_NUMBERS, 3)]
    return schema


def _references(rng: random.Random) -> Any:
    n = _size(rng, 2000)
    shape = rng.choice(("chain", "laughs", "cycle", "tree", "odd", "choices"))
    definitions: dict[str, Any] = {}
    for i in range(n):
        following = {"$ref": f"#/$defs/d{i + 1}"}
        if shape == "cycle" and i == n - 1:
            following = {"$ref": "#/$defs/d0"}
        definitions[f"d{i}"] = (
            {"type": "object", "properties": {"l": following, "r": following}, "required": ["l", "r"]}
            if shape == "laughs"
            else {"anyOf": [following, {"$ref": f"#/$defs/d{rng.randrange(n + 1)}"}]}
            if shape == "choices"
            else {"items": following, "maxItems": 2}
            if shape == "tree"
            else _within(rng, following)
            if shape == "odd"
            else following
        )
    definitions[f"d{n}"] = {"type": "boolean"}
    return {"$ref": "#/$defs/d0", "$defs": definitions}


def _combined(rng: random.Random) -> Any:
    def one() -> Any:
        kind = rng.randrange(6)
        if kind == 0:
            return {"pattern": _regex(rng)}
        if kind == 1:
            return {"maxLength": _size(rng, 100)}
        if kind == 2:
            return {"properties": {rng.choice("abc"): {"enum": rng.sample(["x", "y", 1, None], 2)}}}
        if kind == 3:
            return {"type": rng.sample(["string", "integer", "null", "object"], 2)}
        if kind == 4:
            return {"minimum": rng.randrange(9), "multipleOf": rng.randrange(1, 999)}
        return {"required": rng.sample(["a", "b", "c"], 2)}

    def some(n: int) -> Any:
        return {rng.choice(("anyOf", "oneOf", "anyOf")): [one() for _ in range(rng.randrange(1, n))]}

    return {"allOf": [some(8) for _ in range(_size(rng, 40))]}


_JUNK: list[Any] = [
    None,
    True,
    -1,
    1e400,
    10**400,
    "",
    "\0",
    "\ud800",
    [],
    {},
    [[]],
    [None],
    {"": None},
    (1,),
]
_JUNK += [b"x", {1, 2}, object, {1: 2}, {None: {}}, {"\ud800": {}}, {"$ref": "#"}, 1j, "#/", ["a", "a"]]
_KEYWORDS = (
    "type enum const multipleOf maximum minimum exclusiveMinimum exclusiveMaximum maxLength minLength "
    "pattern items prefixItems additionalItems maxItems minItems uniqueItems contains maxProperties "
    "minProperties required properties patternProperties additionalProperties dependencies "
    "propertyNames if then else allOf anyOf oneOf not format $ref $defs definitions $id $schema "
    "$anchor $dynamicRef title default nullable x-guidance"
)


def _junk(rng: random.Random) -> Any:
    if rng.random() < 0.15:
        return rng.choice(_JUNK)
    schema: Any = {}
    for _ in range(_size(rng, 6)):
        value = rng.choice((*_JUNK, *_SCHEMA_VALUES)) if rng.random() < 0.7 else _junk(rng)
        schema[rng.choice(_KEYWORDS.split())] = value
    return schema


_SCHEMA_VALUES: list[Any] = [
    "object",
    "string",
    "array",
    3,
    0,
    ["a"],
    {"a": True},
    [{"type": "null"}],
    False,
    "^a",
]


def _circular(rng: random.Random) -> Any:
    schema: dict[str, Any] = {}
    inner: Any = schema
    for _ in range(_size(rng, 50)):
        inner = _within(rng, inner)
    schema[rng.choice(("items", "additionalProperties", "const"))] = inner
    return schema


def _odd_texts(rng: random.Random) -> Any:
    texts = [_text(rng, 6000) for _ in range(_size(rng, 60))]
    return rng.choice(
        (
            {"enum": texts},
            {"const": texts[0]},
            {"properties": dict.fromkeys(texts, True), "required": texts},
            {"type": "string", "pattern": texts[0]},
            {"patternProperties": {texts[0]: {"type": "null"}}},
            {"$ref": "#/" + texts[0]},
        )
    )


def _spoilt_schema(rng: random.Random) -> Any:
    schema: Any = {"type": "string", "maxLength": 5}
    for _ in range(rng.randrange(1, 12)):
        schema = _within(rng, schema)
    node = schema
    for _ in range(rng.randrange(8)):
        inner = [value for value in node.values() if isinstance(value, dict) and value]
        if not inner:
            break
        node = rng.choice(inner)
    node[rng.choice(_KEYWORDS.split())] = rng.choice(_JUNK)
    return schema


_SCHEMAS: list[Callable[[random.Random], Any]] = [
    _deep,
    _wide,
    _counted,
    _numeric,
    _references,
    _combined,
    _junk,
    _circular,
    _odd_texts,
    _spoilt_schema,
    lambda rng: {"type": "string", "pattern": _regex(rng)},
    lambda rng: {"pattern": f"^{_regex(rng)}$", "maxLength": _size(rng, 1000)},
    lambda rng: {"patternProperties": {_regex(rng): True, "^b": {"type": "null"}}},
]

# ---- GBNF --------------------------------------------------------------------------------------------------


def _gbnf_nested(rng: random.Random) -> str:
    n = _size(rng, 20_000)
    return f'root ::= {"(" * n}"a"{rng.choice((")", ")*", ")+", " | root)", "){2,3}")) * n}'


def _gbnf_chain(rng: random.Random) -> str:
    n = _size(rng, 3000)
    links = rng.choice(
        ("r{}", '"a" r{}', 'r{} "a"', 'r{} | "b"', "r{}?", "r{} r{}", '"(" r{} ")"', "r{}*", "(r{} root)?")
    )
    rules = [f"r{i} ::= {links.replace('{}', str(i + 1))}" for i in range(n)]
    last = rng.choice(("[a-z]", "root", "r0", '""'))
    return "\n".join(["root ::= r0", *rules, f"r{n} ::= {last}"])


def _gbnf_repeats(rng: random.Random) -> str:
    text = rng.choice(('"a"', "[a-z]", ".", '("a" | "ab")', "x"))
    for _ in range(rng.randrange(1, 6)):
        low = _size(rng, 10_000) - 1
        text = f"({text}){{{low},{rng.choice((low + _size(rng, 1000), '', low - 1))}}}"
    return f'root ::= {text}\nx ::= "b" | x "c"'


def _gbnf_alternatives(rng: random.Random) -> str:
    n = _size(rng, 2500)
    words = (f'"{"".join(rng.choice("abc") for _ in range(rng.randrange(9)))}"' for _ in range(n))
    return f"root ::= ({' | '.join(words)}){rng.choice(('', '*', ' root', '{1,99}'))}"


def _gbnf_words(rng: random.Random) -> str:
    words = [
        "root",
        "x",
        "y",
        "::=",
        "|",
        "(",
        ")",
        "*",
        "+",
        "?",
        "{1,3}",
        "{",
        "[a-z]",
        "[",
        '"a"',
        '"',
        ".",
        "\n",
    ]
    words += [
        "# c",
        "\\",
        "[^\\x00]",
        '"\\u0000"',
        '"\\ud800"',
        "<[1]>",
        "!<[1]>",
        "<think>",
        "-",
        "\0",
        "\ud800",
    ]
    return "root ::= " + " ".join(rng.choice(words) for _ in range(_size(rng, 3000)))


def _gbnf_random_rules(rng: random.Random) -> str:
    """Rules that name each other in any order: left recursion, empty rules, ambiguity."""
    n = _size(rng, 300)
    names = ["root", *(f"r{i}" for i in range(n))]

    def part() -> str:
        word = rng.choice((rng.choice(names), rng.choice(names), '"a"', '"b"', "[ab]", '""', "[^a]"))
        return word + rng.choice(("", "", "*", "?", "+", "{2}"))

    def side() -> str:
        return " | ".join(
            " ".join(part() for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))
        )

    return "\n".join(f"{name} ::= {side()}" for name in names)


_GBNF_FIXED = (
    "root ::= root",
    'root ::= root root | "a"',
    'root ::= root "a" | "" | root root root',
    'root ::= ("" | "a"?)*',
    "root ::= (((.*)*)*)*",
    'root ::= "a" root "a" | "b" root "b" | ""',
    'root ::= ([a-z]* " "?)* root?',
    'root ::= x\nx ::= "[" (x ("," x)*)? "]" | "{" (s ":" x)? "}" | s\ns ::= "\\"" [^"]* "\\""',
)

_GBNF: list[Callable[[random.Random], str]] = [
    _gbnf_nested,
    _gbnf_chain,
    _gbnf_repeats,
    _gbnf_alternatives,
    _gbnf_words,
    _gbnf_random_rules,
    lambda rng: rng.choice(_GBNF_FIXED),
    lambda rng: f"root ::= [{_text(rng, 5000)}]",
    lambda rng: f'root ::= "{_text(rng, 5000)}"',
    lambda rng: (
        "root ::= " + rng.choice(("(", "[", '"', "{", "|", "\\", "#", "root ")) * _size(rng, 1_000_000)
    ),
    lambda rng: f'root ::= "a"{{{_count(rng)},{_count(rng)}}}',
    _text,
]

# ---- Lark --------------------------------------------------------------------------------------------------


def _lark_nested(rng: random.Random) -> str:
    n = _size(rng, 30_000)
    opened, closed = rng.choice(
        (("(", ")"), ("[", "]"), ("(", ")*"), ("(", ")?"), ("(", '| "b")'), ("(", "){2,3}"))
    )
    name = rng.choice(("start: ", "start: T\nT: "))
    return f'{name}{opened * n}"a"{closed * n}'


def _lark_chain(rng: random.Random) -> str:
    n = _size(rng, 3000)
    upper = rng.random() < 0.4
    name = "R" if upper else "r"
    links = rng.choice(
        ("{}", '"a" {}', '{} "a"', '{} | "b"', "{}?", "{} {}", "({} start)?", "{}~3", "{}{{2,9}}")
    )
    sep = rng.choice((": ", ":"))
    rules = [f"{name}{i}{sep}{links.replace('{}', f'{name}{i + 1}')}" for i in range(n)]
    last = rng.choice(("/[a-z]/", "start", f"{name}0", '""'))
    return "\n".join([f"start: {name}0", *rules, f"{name}{n}: {last}"])


def _lark_regexes(rng: random.Random) -> str:
    n = _size(rng, 30)
    parts = [f"/{_regex(rng)}/".replace("\n", "") for _ in range(n)]
    join = rng.choice((" | ", " & ", " ", " ~", " & ~"))
    return f"start: T\nT: {join.join(parts)}"


def _lark_directives(rng: random.Random) -> str:
    lines = [
        "start: a b\na: /x*/\nb: /y/",
        "%ignore /.*/",
        "%ignore / +/",
        "%import common.INT",
        "%import common.WS",
        '%llguidance {"no_forcing": false}',
        '%llguidance {"allow_initial_skip": true, "max_items_in_row": 1000000000}',
        "%llguidance {",
        "start: <|image|>",
        "start: <[0-1024]>",
        "start: <[99999999999]>",
        "start: <[^1]>",
        "start: <[*]> start?",
        "start: @other",
        '%json {"type": "object"}',
        "% json {}",
        'start: %regex {"substring_chars": "' + "abc" * _size(rng, 3000) + '"}',
        'start: %regex {"substring_words": "' + "ab c " * _size(rng, 3000) + '"}',
        'start: %lark { start: "a" }',
        "start: " + "%lark { start: " * _size(rng, 300) + '"a"' + " }" * 300,
        f"start[max_tokens={_count(rng)}]: /.*/",
        'start[stop="x"]: /(?s:.*)/',
        'start[suffix=/b+/, capture="n"]: /a.*/',
        "start[lazy]: /.*?/",
        "start[temperature=1e999]: /.*/",
        'start: x::0\nx::_: "a" x::incr(_) | "b"',
        "start  : x::1\nx::_ : [a::set_bit(0)] %if lt(_, 5)",
        "?start: a -> b",
        "start.5: /a/i",
        'start: "a"i',
        "start: T{1,2}\nT{1,2}: /a/",
        f"start: /a/{{1,{_size(rng, 10**9)}}}",
        "start: (/a/{1,999}){1,999}",
        "%declare A B",
        "%override start: /a/",
        "%extend start: /b/",
        "// comment",
        'start: "\\x00" "\\u0000"',
        "start: /\\0/",
    ]
    return "\n".join(rng.choice(lines) for _ in range(_size(rng, 12)))


def _lark_random_rules(rng: random.Random) -> str:
    n = _size(rng, 300)
    names = ["start", *(f"r{i}" for i in range(n)), "T", "U"]

    def part() -> str:
        word = rng.choice((rng.choice(names), rng.choice(names), '"a"', "/[ab]+/", '""', "/.*/"))
        return word + rng.choice(("", "", "*", "?", "+", "{2}"))

    def side() -> str:
        return " | ".join(
            " ".join(part() for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))
        )

    rules = [f"{name}: {side()}" for name in names[:-2]]
    return "\n".join([*rules, "T: /a*b/", f"U: {rng.choice(('T T', '/.*/', 'T | U', 'T{1,500}'))}"])


_LARK_FIXED = (
    "start: start",
    'start: start start | "a"',
    'start: ("" | "a"?)*',
    "start: (/.*/ /.*/)* start?",
    "start: /(?s:.*)/ & /a*/ & ~/aaa/",
    "start: T*\nT: /.*a.{15}/ & /.*b.{15}/",
    'start: a\na: "x" a "x" | "y" a "y" |',
)

_LARK: list[Callable[[random.Random], str]] = [
    _lark_nested,
    _lark_chain,
    _lark_regexes,
    _lark_directives,
    _lark_random_rules,
    lambda rng: rng.choice(_LARK_FIXED),
    lambda rng: f'start: "{_text(rng, 5000)}"',
    lambda rng: (
        "start: "
        + rng.choice(("(", "[", '"', "/", "|", "~", "&", "%", "@", "start ", '"a"')) * _size(rng, 100_000)
    ),
    lambda rng: "start: " + " | ".join(f'"{i}"' for i in range(_size(rng, 5000))),
    lambda rng: "\n".join(["start: /a/", *(f"t{i}: /{'b' * (i % 50)}/" for i in range(_size(rng, 3000)))]),
    _text,
]


if __name__ == "__main__":
    cut = reprlib.Repr()
    cut.maxstring = cut.maxother = 600
    print(cut.repr(request(sys.argv[1])))
