"""Token roles: what a step's rows are, in classes whose formats go by it (`NumericClass.prompt`)."""

from __future__ import annotations

from typing import Final, Literal

from ganglion.proto import lane_pb2
from ganglion.wire.errors import ProtocolViolation

Role = Literal["any", "prompt", "generated"]
"""any: of every step in a class of one format; prompt: tokens that a session began with; generated: those drawn."""

_NUMBERS: Final[dict[Role, lane_pb2.TokenRole]] = {
    "any": lane_pb2.TOKEN_ROLE_UNSPECIFIED,
    "prompt": lane_pb2.TOKEN_ROLE_PROMPT,
    "generated": lane_pb2.TOKEN_ROLE_GENERATED,
}


def to_number(role: Role) -> lane_pb2.TokenRole:
    """As a `Step` says it."""
    return _NUMBERS[role]


def read_role(number: int) -> Role:
    """The role that a `Step` says; raises ProtocolViolation for one that is not known."""
    for role, known in _NUMBERS.items():
        if known == number:
            return role
    raise ProtocolViolation(f"a step of role {number}")
