"""Chat templates: rendered in a child process, kept warm, killed when a template does not end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ganglion.gateway.sandbox import OUTPUT_BYTES
from ganglion.gateway.template_child import CPU_S, MEMORY_BYTES
from ganglion.gateway.tokenizing import ChatTemplate
from ganglion.wire.errors import Internal, InvalidRequest

START_S = 30.0  # of a child: an interpreter's imports on a busy machine
WALL_S = 5.0  # of one rendering; its processor time is limited to CPU_S
REPLY_BYTES = 8 * OUTPUT_BYTES  # JSON may write a character as six
PASSED_ON = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "TZ", "SYSTEMROOT")


class TemplateRenderer:
    """One warm child process; renders one template at a time. Close it when done."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._child: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Of the child, when one runs."""
        return None if self._child is None else self._child.pid

    async def render(self, model: str, template: ChatTemplate, variables: Mapping[str, Any]) -> str:
        """The prompt text; raises InvalidRequest with the template's own message or naming the limit it met."""
        request = {"source": template.source, "variables": {**template.specials, **variables}}
        async with self._turn:
            reply = await self._exchange(model, json.dumps(request).encode() + b"\n")
        if "text" in reply:
            return str(reply["text"])
        match reply.get("error"):
            case "too_long":
                raise InvalidRequest(
                    f"the chat template of {model} wrote more than {OUTPUT_BYTES} bytes; send a shorter conversation",
                    param="messages",
                )
            case "memory":
                raise InvalidRequest(
                    f"the chat template of {model} needs more than {MEMORY_BYTES >> 20} MiB of memory", param="messages"
                )
            case _:
                raise InvalidRequest(
                    f"the chat template of {model} refuses this conversation: {reply.get('message', '')}",
                    param="messages",
                )

    async def warm(self) -> None:
        """Start the child before the first request needs it."""
        async with self._turn:
            await self._started()

    async def close(self) -> None:
        """End the child."""
        async with self._turn:
            await self._end()

    async def _exchange(self, model: str, line: bytes) -> dict[str, Any]:
        child = await self._started()
        try:
            async with asyncio.timeout(WALL_S):
                reply = await _ask(child, line)
        except TimeoutError:
            await self._end()
            reply = b""
        except BaseException:
            await self._end()  # a cancelled request leaves its reply in the pipe: the next one must not read it
            raise
        if reply.endswith(b"\n"):
            parsed: dict[str, Any] = json.loads(reply)
            return parsed
        await self._end()
        raise InvalidRequest(f"the chat template of {model} did not end within {CPU_S:g} s", param="messages")

    async def _started(self) -> asyncio.subprocess.Process:
        if self._child is not None and self._child.returncode is None:
            return self._child
        await self._end()
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self._child = child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "ganglion.gateway.template_child",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
            limit=REPLY_BYTES,
            start_new_session=True,  # an interrupt typed at the terminal is not for the child
        )
        try:
            async with asyncio.timeout(START_S):
                ready = await _ask(child, b"")
        except BaseException as error:
            await self._end()
            if isinstance(error, TimeoutError):
                raise Internal(f"the chat template process did not start within {START_S:g} s") from error
            raise
        if not ready:
            await self._end()
            raise Internal("the chat template process ended while it started")
        return child

    async def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
        if child.stdin is not None:
            child.stdin.close()


async def _ask(child: asyncio.subprocess.Process, line: bytes) -> bytes:
    """Write `line`, read one line; b"" or a part of a line when the child is gone."""
    if child.stdin is None or child.stdout is None:
        raise Internal("the chat template process has no pipes")
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        child.stdin.write(line)
        await child.stdin.drain()
    try:
        return await child.stdout.readline()
    except ValueError:  # longer than REPLY_BYTES
        return b""


def chat_variables(
    messages: Sequence[Mapping[str, Any]], extra: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """What a template sees of a conversation, as transformers passes it; `tools` None: none are given."""
    given = None if tools is None else list(tools)
    return {**extra, "messages": list(messages), "tools": given, "documents": None, "add_generation_prompt": True}
