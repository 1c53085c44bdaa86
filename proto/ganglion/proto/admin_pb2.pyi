from ganglion.proto import identity_pb2 as _identity_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DeploymentPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DEPLOYMENT_PHASE_UNSPECIFIED: _ClassVar[DeploymentPhase]
    DEPLOYMENT_PHASE_PLANNING: _ClassVar[DeploymentPhase]
    DEPLOYMENT_PHASE_PREPARING: _ClassVar[DeploymentPhase]
    DEPLOYMENT_PHASE_CONNECTING: _ClassVar[DeploymentPhase]
    DEPLOYMENT_PHASE_READY: _ClassVar[DeploymentPhase]
    DEPLOYMENT_PHASE_REPLANNING: _ClassVar[DeploymentPhase]
    DEPLOYMENT_PHASE_FAILED: _ClassVar[DeploymentPhase]
    DEPLOYMENT_PHASE_STOPPED: _ClassVar[DeploymentPhase]
DEPLOYMENT_PHASE_UNSPECIFIED: DeploymentPhase
DEPLOYMENT_PHASE_PLANNING: DeploymentPhase
DEPLOYMENT_PHASE_PREPARING: DeploymentPhase
DEPLOYMENT_PHASE_CONNECTING: DeploymentPhase
DEPLOYMENT_PHASE_READY: DeploymentPhase
DEPLOYMENT_PHASE_REPLANNING: DeploymentPhase
DEPLOYMENT_PHASE_FAILED: DeploymentPhase
DEPLOYMENT_PHASE_STOPPED: DeploymentPhase

class DeployRequest(_message.Message):
    __slots__ = ("manifest", "options", "holder", "drafter")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    options: bytes
    holder: str
    drafter: bytes
    def __init__(self, manifest: _Optional[bytes] = ..., options: _Optional[bytes] = ..., holder: _Optional[str] = ..., drafter: _Optional[bytes] = ...) -> None: ...

class DeployEvent(_message.Message):
    __slots__ = ("deployment", "epoch", "phase", "message", "devices", "error_code")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    epoch: int
    phase: DeploymentPhase
    message: str
    devices: _containers.RepeatedCompositeFieldContainer[DeviceProgress]
    error_code: str
    def __init__(self, deployment: _Optional[str] = ..., epoch: _Optional[int] = ..., phase: _Optional[_Union[DeploymentPhase, str]] = ..., message: _Optional[str] = ..., devices: _Optional[_Iterable[_Union[DeviceProgress, _Mapping]]] = ..., error_code: _Optional[str] = ...) -> None: ...

class DeviceProgress(_message.Message):
    __slots__ = ("node_id", "name", "phase", "done_bytes", "total_bytes")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    name: str
    phase: str
    done_bytes: int
    total_bytes: int
    def __init__(self, node_id: _Optional[str] = ..., name: _Optional[str] = ..., phase: _Optional[str] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class ExplainReply(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: bytes
    def __init__(self, report: _Optional[bytes] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    def __init__(self, deployment: _Optional[str] = ...) -> None: ...

class StopReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("once",)
    ONCE_FIELD_NUMBER: _ClassVar[int]
    once: bool
    def __init__(self, once: bool = ...) -> None: ...

class Fleetwide(_message.Message):
    __slots__ = ("devices", "deployments", "tokens_unused", "coordinator_version", "refused_offers")
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_UNUSED_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_VERSION_FIELD_NUMBER: _ClassVar[int]
    REFUSED_OFFERS_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[DeviceState]
    deployments: _containers.RepeatedCompositeFieldContainer[DeploymentState]
    tokens_unused: int
    coordinator_version: str
    refused_offers: _containers.RepeatedCompositeFieldContainer[RefusedOffer]
    def __init__(self, devices: _Optional[_Iterable[_Union[DeviceState, _Mapping]]] = ..., deployments: _Optional[_Iterable[_Union[DeploymentState, _Mapping]]] = ..., tokens_unused: _Optional[int] = ..., coordinator_version: _Optional[str] = ..., refused_offers: _Optional[_Iterable[_Union[RefusedOffer, _Mapping]]] = ...) -> None: ...

class DeviceState(_message.Message):
    __slots__ = ("node_id", "name", "role", "label", "state", "profile", "address", "last_seen_s", "record")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_S_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    name: str
    role: _identity_pb2.Role
    label: _identity_pb2.TrustLabel
    state: str
    profile: bytes
    address: str
    last_seen_s: float
    record: _identity_pb2.SignedRecord
    def __init__(self, node_id: _Optional[str] = ..., name: _Optional[str] = ..., role: _Optional[_Union[_identity_pb2.Role, str]] = ..., label: _Optional[_Union[_identity_pb2.TrustLabel, str]] = ..., state: _Optional[str] = ..., profile: _Optional[bytes] = ..., address: _Optional[str] = ..., last_seen_s: _Optional[float] = ..., record: _Optional[_Union[_identity_pb2.SignedRecord, _Mapping]] = ...) -> None: ...

class DeploymentState(_message.Message):
    __slots__ = ("deployment", "model", "manifest_digest", "epoch", "phase", "message", "plan", "manifest", "lead", "holders", "sessions", "drafts_for", "drafter", "drafter_digest")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    LEAD_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FOR_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    model: str
    manifest_digest: str
    epoch: int
    phase: DeploymentPhase
    message: str
    plan: bytes
    manifest: bytes
    lead: _identity_pb2.Peer
    holders: _containers.RepeatedCompositeFieldContainer[_identity_pb2.Peer]
    sessions: int
    drafts_for: str
    drafter: str
    drafter_digest: str
    def __init__(self, deployment: _Optional[str] = ..., model: _Optional[str] = ..., manifest_digest: _Optional[str] = ..., epoch: _Optional[int] = ..., phase: _Optional[_Union[DeploymentPhase, str]] = ..., message: _Optional[str] = ..., plan: _Optional[bytes] = ..., manifest: _Optional[bytes] = ..., lead: _Optional[_Union[_identity_pb2.Peer, _Mapping]] = ..., holders: _Optional[_Iterable[_Union[_identity_pb2.Peer, _Mapping]]] = ..., sessions: _Optional[int] = ..., drafts_for: _Optional[str] = ..., drafter: _Optional[str] = ..., drafter_digest: _Optional[str] = ...) -> None: ...

class RefusedOffer(_message.Message):
    __slots__ = ("node_id", "model", "target", "reason")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    model: str
    target: str
    reason: str
    def __init__(self, node_id: _Optional[str] = ..., model: _Optional[str] = ..., target: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ListTokensRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTokensReply(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[TokenState]
    def __init__(self, tokens: _Optional[_Iterable[_Union[TokenState, _Mapping]]] = ...) -> None: ...

class TokenState(_message.Message):
    __slots__ = ("grant", "used", "revoked")
    GRANT_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    grant: _identity_pb2.JoinGrant
    used: int
    revoked: bool
    def __init__(self, grant: _Optional[_Union[_identity_pb2.JoinGrant, _Mapping]] = ..., used: _Optional[int] = ..., revoked: bool = ...) -> None: ...

class RegisterTokenRequest(_message.Message):
    __slots__ = ("grant",)
    GRANT_FIELD_NUMBER: _ClassVar[int]
    grant: _identity_pb2.SignedGrant
    def __init__(self, grant: _Optional[_Union[_identity_pb2.SignedGrant, _Mapping]] = ...) -> None: ...

class RegisterTokenReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RevokeTokenRequest(_message.Message):
    __slots__ = ("token_id",)
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    token_id: str
    def __init__(self, token_id: _Optional[str] = ...) -> None: ...

class RevokeTokenReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PutRecordRequest(_message.Message):
    __slots__ = ("record",)
    RECORD_FIELD_NUMBER: _ClassVar[int]
    record: _identity_pb2.SignedRecord
    def __init__(self, record: _Optional[_Union[_identity_pb2.SignedRecord, _Mapping]] = ...) -> None: ...

class RenameRequest(_message.Message):
    __slots__ = ("node_id", "name")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    name: str
    def __init__(self, node_id: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class RevokeRequest(_message.Message):
    __slots__ = ("node_id",)
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    def __init__(self, node_id: _Optional[str] = ...) -> None: ...
