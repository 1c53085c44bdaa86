from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_AGENT: _ClassVar[Role]
    ROLE_GATEWAY: _ClassVar[Role]
    ROLE_COORDINATOR: _ClassVar[Role]
    ROLE_OWNER: _ClassVar[Role]

class TrustLabel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRUST_LABEL_UNSPECIFIED: _ClassVar[TrustLabel]
    TRUST_LABEL_STRANGER: _ClassVar[TrustLabel]
    TRUST_LABEL_FRIEND: _ClassVar[TrustLabel]
    TRUST_LABEL_OWNER: _ClassVar[TrustLabel]
ROLE_UNSPECIFIED: Role
ROLE_AGENT: Role
ROLE_GATEWAY: Role
ROLE_COORDINATOR: Role
ROLE_OWNER: Role
TRUST_LABEL_UNSPECIFIED: TrustLabel
TRUST_LABEL_STRANGER: TrustLabel
TRUST_LABEL_FRIEND: TrustLabel
TRUST_LABEL_OWNER: TrustLabel

class Hello(_message.Message):
    __slots__ = ("protocol", "version", "features", "kernel_family")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FAMILY_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    version: str
    features: _containers.RepeatedScalarFieldContainer[str]
    kernel_family: str
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ..., features: _Optional[_Iterable[str]] = ..., kernel_family: _Optional[str] = ...) -> None: ...

class DeviceRecord(_message.Message):
    __slots__ = ("node_id", "role", "label", "tls_public_key", "sealing_public_key", "issued_unix_s")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    TLS_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SEALING_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    ISSUED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    role: Role
    label: TrustLabel
    tls_public_key: bytes
    sealing_public_key: bytes
    issued_unix_s: int
    def __init__(self, node_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., label: _Optional[_Union[TrustLabel, str]] = ..., tls_public_key: _Optional[bytes] = ..., sealing_public_key: _Optional[bytes] = ..., issued_unix_s: _Optional[int] = ...) -> None: ...

class JoinGrant(_message.Message):
    __slots__ = ("token_id", "one_time_public_key", "label", "role", "expires_unix_s", "uses")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    ONE_TIME_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    token_id: str
    one_time_public_key: bytes
    label: TrustLabel
    role: Role
    expires_unix_s: int
    uses: int
    def __init__(self, token_id: _Optional[str] = ..., one_time_public_key: _Optional[bytes] = ..., label: _Optional[_Union[TrustLabel, str]] = ..., role: _Optional[_Union[Role, str]] = ..., expires_unix_s: _Optional[int] = ..., uses: _Optional[int] = ...) -> None: ...

class SignedGrant(_message.Message):
    __slots__ = ("grant", "signature")
    GRANT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    grant: bytes
    signature: bytes
    def __init__(self, grant: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class SignedRecord(_message.Message):
    __slots__ = ("record", "signature", "grant")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    record: bytes
    signature: bytes
    grant: SignedGrant
    def __init__(self, record: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., grant: _Optional[_Union[SignedGrant, _Mapping]] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("record", "address", "name")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    record: SignedRecord
    address: str
    name: str
    def __init__(self, record: _Optional[_Union[SignedRecord, _Mapping]] = ..., address: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class JoinTokenBody(_message.Message):
    __slots__ = ("addresses", "authority_pin", "owner_public_key", "seed", "grant", "gateway_grant")
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_PIN_FIELD_NUMBER: _ClassVar[int]
    OWNER_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_GRANT_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    authority_pin: bytes
    owner_public_key: bytes
    seed: bytes
    grant: SignedGrant
    gateway_grant: SignedGrant
    def __init__(self, addresses: _Optional[_Iterable[str]] = ..., authority_pin: _Optional[bytes] = ..., owner_public_key: _Optional[bytes] = ..., seed: _Optional[bytes] = ..., grant: _Optional[_Union[SignedGrant, _Mapping]] = ..., gateway_grant: _Optional[_Union[SignedGrant, _Mapping]] = ...) -> None: ...
