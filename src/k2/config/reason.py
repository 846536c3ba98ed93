"""What is wrong with a value, in words: pydantic's errors as `must be at least 1, found 0`."""

import re
from typing import Any

_LIMITS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a section of fields",
    "model": "a section of fields",
}


def reason(item: Any) -> str:
    """What one of pydantic's errors says, with the value that was found where that helps."""
    kind, context, value = item["type"], item.get("ctx", {}), item["input"]
    if kind == "value_error":
        return str(item["msg"].removeprefix("Value error, "))
    if kind in _LIMITS:
        name, words = _LIMITS[kind]
        return f"must be {words} {context[name]}, found {shown(value)}"
    if (name := re.sub("_(type|parsing|from_float)$", "", kind)) in _TYPES:
        return f"must be {_TYPES[name]}, found {shown(value)}"
    if kind == "literal_error":
        return f"must be {context['expected']}, found {shown(value)}"
    return f"{item['msg']}, found {shown(value)}"


def shown(value: Any) -> str:
    """Short, and without the credentials of a URL."""
    text = re.sub(r"//[^/@]*@", "//…@", repr(value))
    return text if len(text) <= 80 else f"{text[:79]}…"
