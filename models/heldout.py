"""Write the sample of each domain's held-out text that tests and benchmarks use on any machine.

    python models/heldout.py

The files are named here: their licences allow it, and next to none of their lines stand in the training text too.
One that is not held out on this machine, or not there, is an error.
"""

from __future__ import annotations

from corpus import Corpus
from domains import load_domain

from ganglion.models import DOMAINS, heldout_path

SAMPLES = {
    "python": (
        "heapq.py",
        "selectors.py",
        "random.py",
        "mailbox.py",
        "asyncio/taskgroups.py",
        "idlelib/format.py",
        "lib2to3/btm_matcher.py",
    ),
    "c": (
        "include/node/cppgc/member.h",
        "include/expat.h",
        "include/node/openssl/rsa.h",
        "include/llvm-14/llvm/Support/Error.h",
        "include/python3.11/methodobject.h",
        "include/libxml2/libxml/schemasInternals.h",
        "include/llvm-c-14/llvm-c/ExecutionEngine.h",
    ),
    "javascript": (
        "node_modules/npm/node_modules/undici/lib/web/fetch/data-url.js",
        "node_modules/npm/node_modules/minimatch/dist/commonjs/index.js",
        "node_modules/npm/node_modules/qrcode-terminal/vendor/QRCode/QRUtil.js",
        "node_modules/npm/node_modules/@npmcli/arborist/lib/dep-valid.js",
        "node_modules/npm/node_modules/tar/dist/commonjs/mkdir.js",
        "node_modules/npm/node_modules/@npmcli/config/lib/parse-field.js",
        "node_modules/npm/node_modules/bin-links/lib/link-mans.js",
    ),
    "english": (
        "man7/crypto.7ssl.gz",
        "man7/cmake-commands.7.gz",
        "man5/x509v3_config.5ssl.gz",
        "man7/ALTER_EXTENSION.7.gz",
        "man7/openssl-env.7ssl.gz",
        "man1/viewres.1.gz",
        "man7/CREATE_TEXT_SEARCH_PARSER.7.gz",
        "man1/sqldiff.1.gz",
        "man7/CHECKPOINT.7.gz",
    ),
}
SAMPLE_CHARACTERS = 24_000
EXCERPT_CHARACTERS = 4_200


def sample(corpus: Corpus, paths: tuple[str, ...]) -> str:
    """The beginnings of the named held-out files, each cut after a whole line, together `SAMPLE_CHARACTERS` at most."""
    held_out = {document.path: document.text for document in corpus.validation}
    missing = [path for path in paths if path not in held_out]
    if missing:
        raise SystemExit(f"not among this machine's held-out files: {', '.join(missing)}")
    text = ""
    for path in paths:
        excerpt = held_out[path][: min(EXCERPT_CHARACTERS, SAMPLE_CHARACTERS - len(text))]
        text += excerpt[: excerpt.rfind("\n") + 1]
    return text


def main() -> None:
    """Write the four samples."""
    for domain in DOMAINS:
        text = sample(load_domain(domain), SAMPLES[domain])
        heldout_path(domain).write_text(text, encoding="utf-8")
        print(f"{domain}: {len(text.encode())} bytes of {len(SAMPLES[domain])} files")


if __name__ == "__main__":
    main()
