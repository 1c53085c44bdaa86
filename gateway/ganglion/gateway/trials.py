"""Foreign tokenizers are tried in a child process before the gateway loads them, once for each set of files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path

from ganglion.gateway.templates import PASSED_ON
from ganglion.gateway.tokenizer_child import CPU_S, MEMORY_BYTES
from ganglion.gateway.tokenizing import TOKENIZER_FILE
from ganglion.wire.errors import Corrupt
from ganglion.wire.home import write_secret

WALL_S = 120.0  # its processor time is limited to CPU_S
PASSED_FILE = "tried-1"  # in the folder of the files, which is named by their digest


async def try_tokenizer(folder: Path) -> None:
    """Load and use `folder`'s tokenizer.json in a child; raises Corrupt when it is hostile or meets a limit.

    A file that merely cannot be read passes: who loads it says so.
    """
    passed = folder / PASSED_FILE
    if passed.exists():
        return
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "ganglion.gateway.tokenizer_child",
        str(folder / TOKENIZER_FILE),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=environment | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"},
        start_new_session=True,  # an interrupt typed at the terminal is not for the child
    )
    said = b""
    try:
        async with asyncio.timeout(WALL_S):
            said, _ = await child.communicate()
    except TimeoutError:
        pass
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    if child.returncode == 1:
        return  # an exception: the same one comes where it is loaded
    if child.returncode != 0 or not said:
        raise Corrupt(
            f"{TOKENIZER_FILE} of the model takes more than {CPU_S} s of processor time or {MEMORY_BYTES >> 30} GiB of "
            f"memory for a page of text"
        )
    fault = json.loads(said).get("fault")
    if fault:
        raise Corrupt(f"{TOKENIZER_FILE} of the model is refused: {fault}")
    await asyncio.to_thread(write_secret, passed, b"")
