"""Files that hold more than tensors: what libraries say of them, in words that do not advise to run what is in them."""

from __future__ import annotations

import pickle
import re

_NAMED = re.compile(r"(?:GLOBAL|globals:)\s+([\w.]*\w)")
_ADVICE = re.compile(r"weights_only|allow_pickle")


def is_refused_pickle(error: BaseException) -> bool:
    """Return whether an error says that a file was not unpickled, or not to the end."""
    return isinstance(error, pickle.UnpicklingError) or _ADVICE.search(str(error)) is not None


def what_failed(error: BaseException) -> str:
    """Return the words of an error of a loader of weights.

    torch, numpy and timm advise to read a file that they refuse with another setting, which runs whatever is in it;
    their advice is left out.
    """
    if not is_refused_pickle(error):
        return str(error)
    named = _NAMED.search(str(error))
    return f"it holds other things than tensors{f' ({named[1]})' if named else ''}, which are not unpickled"
