"""Hard limits: named constants with their unit. Every one is a default that a release may lower, never a peer."""

from __future__ import annotations

from typing import Final

PROTOCOL: Final = 1  # of ganglion.v1; a release speaks this and the one before it

API_PORT: Final = 7460
ENROLMENT_PORT: Final = 7461
FLEET_PORT: Final = 7462  # fleet and admin services; agents use any free port and advertise it

CONTROL_MESSAGE_BYTES: Final = 4 << 20
TENSOR_MESSAGE_BYTES: Final = 16 << 20
PIECE_CHUNK_BYTES: Final = 1 << 20
ADVERT_BYTES: Final = 16 << 10
MANIFEST_BYTES: Final = 3 << 20
PLAN_BYTES: Final = 256 << 10
REPORT_BYTES: Final = 2 << 20
NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9-]{0,62}$"

HANDSHAKE_S: Final = 5.0
FIRST_FRAME_S: Final = 10.0
CONNECT_S: Final = 5.0
HEARTBEAT_ACTIVE_S: Final = 0.25
HEARTBEAT_IDLE_S: Final = 2.0
SUSPECT_MISSED: Final = 3  # heartbeats, idle; an active deployment: 4 missed (1 s)
DEAD_MISSED: Final = 6
ACTIVE_SILENCE_S: Final = 1.0
SESSIONS_QUEUED: Final = 32  # per deployment; the next one is refused with Exhausted
DRAFTS_BYTES: Final = 64 << 10  # of one message of a session after its Open
DRAFTS_WAITING: Final = 64  # messages, until a session's lead takes them
CHOICE_S: Final = 60.0  # a client that chooses may be silent for so long
ASKED_IDS: Final = 8192  # of one question of a client that chooses
EVENTS_QUEUED: Final = 256  # per client stream; then its generation is cancelled

HTTP_HEADER_BYTES: Final = 16 << 10
HTTP_BODY_BYTES: Final = 8 << 20
JSON_DEPTH: Final = 32
STOP_STRINGS: Final = 16
STOP_STRING_CHARACTERS: Final = 256
TOP_LOGPROBS: Final = 20
LOGIT_BIASES: Final = 1024  # tokens of one session
WINDOW_TOKENS: Final = 64  # drafted tokens of one session in one pass at most
TREE_BRANCHES: Final = 4  # verified beside a session's window at most; each has key-value state of its own
DRAFT_CREDITS: Final = 256  # drafted tokens of one session that a verifier holds at most
ROUTED_TOKENS: Final = 512  # a report of a mixture's routes counts at least so many
ROUTE_SETS: Final = 256  # of a layer in a report of routes, the most frequent ones
TENANT_BYTES: Final = 64  # of the name that keeps one client's prompts from another's
GRAMMAR_BYTES: Final = 256 << 10  # of llguidance's JSON; chains of its rules fit the compiling thread's stack
GRAMMAR_RULES: Final = 500  # of Lark: the time to compile a chain of token rules grows with its square
GRAMMAR_COMPILE_S: Final = 5.0  # and for the first mask
GRAMMAR_MASK_S: Final = 1.0  # a mask that takes longer ends its session; normally it takes below 0.001
