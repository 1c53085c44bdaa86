"""The user's side: OpenAI-compatible API, chat templates, tokenizer, sessions."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ganglion.gateway.keys import Key, create_key, list_keys, revoke_key
    from ganglion.gateway.serve import Listening, run_gateway

__all__ = ["Key", "Listening", "create_key", "list_keys", "revoke_key", "run_gateway"]

_HOMES = {"Key": "keys", "create_key": "keys", "list_keys": "keys", "revoke_key": "keys"}


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the chat template process imports this package and must not carry grpc with it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'serve')}"), name)
