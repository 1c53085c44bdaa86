from ganglion.proto import identity_pb2 as _identity_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EnrolRequest(_message.Message):
    __slots__ = ("hello", "csr", "record", "name")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    CSR_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    hello: _identity_pb2.Hello
    csr: bytes
    record: _identity_pb2.SignedRecord
    name: str
    def __init__(self, hello: _Optional[_Union[_identity_pb2.Hello, _Mapping]] = ..., csr: _Optional[bytes] = ..., record: _Optional[_Union[_identity_pb2.SignedRecord, _Mapping]] = ..., name: _Optional[str] = ...) -> None: ...

class EnrolReply(_message.Message):
    __slots__ = ("hello", "enrolled", "pending")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ENROLLED_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    hello: _identity_pb2.Hello
    enrolled: Enrolled
    pending: Pending
    def __init__(self, hello: _Optional[_Union[_identity_pb2.Hello, _Mapping]] = ..., enrolled: _Optional[_Union[Enrolled, _Mapping]] = ..., pending: _Optional[_Union[Pending, _Mapping]] = ...) -> None: ...

class Enrolled(_message.Message):
    __slots__ = ("certificate", "authority", "record", "owner_public_key", "name", "fleet_port")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    OWNER_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    FLEET_PORT_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    authority: bytes
    record: _identity_pb2.SignedRecord
    owner_public_key: bytes
    name: str
    fleet_port: int
    def __init__(self, certificate: _Optional[bytes] = ..., authority: _Optional[bytes] = ..., record: _Optional[_Union[_identity_pb2.SignedRecord, _Mapping]] = ..., owner_public_key: _Optional[bytes] = ..., name: _Optional[str] = ..., fleet_port: _Optional[int] = ...) -> None: ...

class Pending(_message.Message):
    __slots__ = ("retry_after_s",)
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    retry_after_s: float
    def __init__(self, retry_after_s: _Optional[float] = ...) -> None: ...
