"""No secret in any log, event or error: values of credential variables, and credentials inside URLs, become `***`."""

import json
import logging
import os
import re
import sys
import traceback
from types import TracebackType
from typing import Any

MASK = "***"

MIN_LENGTH = 6
"""Characters of a value that is masked; shorter ones are no secrets, and would riddle every text."""

_SECRET = re.compile(r"(^|_)(KEY|KEYS|KEY_ID|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS)$")
_IN_URL = re.compile(r"(?<=://)[^/@\s\"']+@")


def masked(text: str) -> str:
    """The text without the values of this process's credential variables, plain or as JSON writes them."""
    for value in _secrets():
        text = text.replace(value, MASK)
    return _IN_URL.sub(f"{MASK}@", text)


def _secrets() -> list[str]:
    """Longest first, so that none leaves a part of another behind."""
    values = {value for name, value in os.environ.items() if len(value) >= MIN_LENGTH and _SECRET.search(name)}
    return sorted(values | {json.dumps(value)[1:-1] for value in values}, key=lambda value: (-len(value), value))


def install() -> None:
    """Mask every log record of this process, of whichever library, and the traceback that it may end with."""
    make = logging.getLogRecordFactory()

    def record(*arguments: Any, **options: Any) -> logging.LogRecord:
        made = make(*arguments, **options)
        made.msg, made.args = masked(made.getMessage()), ()
        if made.exc_info:
            made.exc_text = masked("".join(traceback.format_exception(*made.exc_info)).rstrip())
        return made

    def hook(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        sys.stderr.write(masked("".join(traceback.format_exception(kind, error, where))))

    if getattr(make, "masks", False):
        return
    record.masks = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(record)
    sys.excepthook = hook
