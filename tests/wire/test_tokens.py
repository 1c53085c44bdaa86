"""Join tokens."""

# ruff: noqa: N802 - test names carry the case ids of shared/notes/faults.md

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.wire.errors import InvalidDocument, InvalidRequest, Unauthenticated
from ganglion.wire.identity import OwnerKey, Role, TrustLabel
from ganglion.wire.tokens import JoinToken, mint

OWNER = OwnerKey.generate()
TOKEN = mint(OWNER, addresses=["192.168.1.2:7461", "[fd00::1]:7461"], authority_pin=bytes(range(16)))
TEXT = TOKEN.encode()


@given(
    st.lists(st.integers(1, 65535), min_size=1, max_size=4),
    st.sampled_from(list(Role)),
    st.sampled_from(list(TrustLabel)),
    st.integers(1, 100),
)
@settings(max_examples=40, deadline=None)
def test_decode_of_encode_is_the_same(ports: list[int], role: Role, label: TrustLabel, uses: int) -> None:
    token = mint(
        OWNER,
        addresses=[f"192.168.100.200:{port}" for port in ports],
        authority_pin=bytes(16),
        role=role,
        label=label,
        lifetime_s=60,
        uses=uses,
        now=1000.5,
    )
    text = token.encode()
    assert len(text) <= 600
    assert JoinToken.decode(f" {text}\n") == token
    allows = token.allows
    assert (allows.role, allows.label, allows.uses) == (role.number, label.number, uses)
    assert allows.expires_unix_s == 1060


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_B2_a_token_with_any_character_changed_or_missing_is_damaged(data: st.DataObject) -> None:
    at = data.draw(st.integers(4, len(TEXT) - 1))
    match data.draw(st.sampled_from(["change", "cut", "drop", "append"])):
        case "change":
            other = data.draw(st.sampled_from("ABCxyz019-_!").filter(lambda character: character != TEXT[at]))
            changed = TEXT[:at] + other + TEXT[at + 1 :]
        case "cut":
            changed = TEXT[:at]
        case "drop":
            changed = TEXT[:at] + TEXT[at + 1 :]
        case _:
            changed = TEXT + data.draw(st.sampled_from("Ax="))
    with pytest.raises(InvalidDocument, match="damaged or cut short"):
        JoinToken.decode(changed)


@given(st.text(max_size=80))
def test_A13_other_text_is_not_a_token(text: str) -> None:
    with pytest.raises(InvalidDocument):
        JoinToken.decode(text)
    with pytest.raises(InvalidDocument):
        JoinToken.decode("gj1." + text)


def test_a_token_that_is_too_long() -> None:
    with pytest.raises(InvalidDocument, match="2004 characters"):
        JoinToken.decode("gj1." + "A" * 2000)


def test_a_token_that_the_owner_in_it_did_not_sign() -> None:
    other = OwnerKey.generate()
    forged = JoinToken(TOKEN.addresses, TOKEN.authority_pin, other.public_key, TOKEN.seed, TOKEN.grant)
    with pytest.raises(Unauthenticated):
        JoinToken.decode(forged.encode())
    swapped = JoinToken(TOKEN.addresses, TOKEN.authority_pin, TOKEN.owner_public_key, bytes(32), TOKEN.grant)
    with pytest.raises(Unauthenticated, match="seed"):
        JoinToken.decode(swapped.encode())


def test_B2_an_expired_token_says_so_and_what_to_do() -> None:
    token = mint(OWNER, addresses=["h:1"], authority_pin=bytes(16), lifetime_s=60, now=1000)
    token.check_fresh(1060)
    with pytest.raises(Unauthenticated, match=r"expired 1 s ago.*ganglion token create"):
        token.check_fresh(1061)


def test_B10_the_secret_is_not_in_the_representation() -> None:
    assert TOKEN.seed.hex() not in repr(TOKEN)
    assert repr(TOKEN.seed) not in repr(TOKEN)
    assert str(TOKEN.allows.token_id) in repr(TOKEN)


@pytest.mark.parametrize(
    "wrong", [{"addresses": []}, {"addresses": ["h:1"] * 9}, {"addresses": ["h"]}, {"uses": 0}, {"lifetime_s": 0}]
)
def test_a_token_that_cannot_be(wrong: dict[str, object]) -> None:
    arguments = {"addresses": ["h:1"], "authority_pin": bytes(16)} | wrong
    with pytest.raises(InvalidRequest):
        mint(OWNER, **arguments)  # type: ignore[arg-type]


def test_a_token_that_lets_a_gateway_in_beside_an_agent() -> None:
    token = mint(OWNER, addresses=["192.168.1.2:7461"], authority_pin=bytes(16), gateway=True, uses=2, now=1000)
    again = JoinToken.decode(token.encode())
    assert again == token
    beside = again.for_gateway
    assert (again.allows.role, beside.allows.role) == (Role.AGENT.number, Role.GATEWAY.number)
    assert (beside.allows.label, beside.allows.uses) == (again.allows.label, 2)
    assert beside.allows.token_id != again.allows.token_id  # each has uses of its own
    assert beside.allows.expires_unix_s == again.allows.expires_unix_s
    assert len(again.grants) == 2
    assert JoinToken.decode(beside.encode()) == beside
    with pytest.raises(InvalidRequest, match="token create --draft"):
        _ = TOKEN.for_gateway
    with pytest.raises(InvalidRequest, match="beside an agent"):
        mint(OWNER, addresses=["h:1"], authority_pin=bytes(16), gateway=True, role=Role.GATEWAY)


def test_a_second_grant_is_the_owner_s_and_a_gateway_s_or_the_token_is_none() -> None:
    token = mint(OWNER, addresses=["192.168.1.2:7461"], authority_pin=bytes(16), gateway=True)
    forged = mint(OwnerKey.generate(), addresses=["192.168.1.2:7461"], authority_pin=bytes(16), gateway=True)
    others = mint(OWNER, addresses=["192.168.1.2:7461"], authority_pin=bytes(16), gateway=True)
    for grant in (forged.gateway_grant, others.gateway_grant, token.grant):
        with pytest.raises(Unauthenticated):
            JoinToken.decode(replace(token, gateway_grant=grant).encode())
