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

class Combine(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMBINE_UNSPECIFIED: _ClassVar[Combine]
    COMBINE_BEST: _ClassVar[Combine]
    COMBINE_VOTE: _ClassVar[Combine]
    COMBINE_RERANK: _ClassVar[Combine]
    COMBINE_BLEND: _ClassVar[Combine]
DEPLOYMENT_PHASE_UNSPECIFIED: DeploymentPhase
DEPLOYMENT_PHASE_PLANNING: DeploymentPhase
DEPLOYMENT_PHASE_PREPARING: DeploymentPhase
DEPLOYMENT_PHASE_CONNECTING: DeploymentPhase
DEPLOYMENT_PHASE_READY: DeploymentPhase
DEPLOYMENT_PHASE_REPLANNING: DeploymentPhase
DEPLOYMENT_PHASE_FAILED: DeploymentPhase
DEPLOYMENT_PHASE_STOPPED: DeploymentPhase
COMBINE_UNSPECIFIED: Combine
COMBINE_BEST: Combine
COMBINE_VOTE: Combine
COMBINE_RERANK: Combine
COMBINE_BLEND: Combine

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
    __slots__ = ("devices", "deployments", "tokens_unused", "coordinator_version", "refused_offers", "experts", "selections")
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_UNUSED_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_VERSION_FIELD_NUMBER: _ClassVar[int]
    REFUSED_OFFERS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    SELECTIONS_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[DeviceState]
    deployments: _containers.RepeatedCompositeFieldContainer[DeploymentState]
    tokens_unused: int
    coordinator_version: str
    refused_offers: _containers.RepeatedCompositeFieldContainer[RefusedOffer]
    experts: _containers.RepeatedCompositeFieldContainer[ExpertState]
    selections: _containers.RepeatedCompositeFieldContainer[Selection]
    def __init__(self, devices: _Optional[_Iterable[_Union[DeviceState, _Mapping]]] = ..., deployments: _Optional[_Iterable[_Union[DeploymentState, _Mapping]]] = ..., tokens_unused: _Optional[int] = ..., coordinator_version: _Optional[str] = ..., refused_offers: _Optional[_Iterable[_Union[RefusedOffer, _Mapping]]] = ..., experts: _Optional[_Iterable[_Union[ExpertState, _Mapping]]] = ..., selections: _Optional[_Iterable[_Union[Selection, _Mapping]]] = ...) -> None: ...

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

class ExpertSpec(_message.Message):
    __slots__ = ("name", "url", "model", "domains", "label", "claimed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DOMAINS_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    CLAIMED_FIELD_NUMBER: _ClassVar[int]
    name: str
    url: str
    model: str
    domains: _containers.RepeatedScalarFieldContainer[str]
    label: _identity_pb2.TrustLabel
    claimed: ExpertFigures
    def __init__(self, name: _Optional[str] = ..., url: _Optional[str] = ..., model: _Optional[str] = ..., domains: _Optional[_Iterable[str]] = ..., label: _Optional[_Union[_identity_pb2.TrustLabel, str]] = ..., claimed: _Optional[_Union[ExpertFigures, _Mapping]] = ...) -> None: ...

class ExpertFigures(_message.Message):
    __slots__ = ("tokens_per_s", "ttft_s", "ttft_p95_s", "tpot_p95_s", "link_s", "energy_j_per_token", "samples", "energy_measured")
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_P95_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_P95_S_FIELD_NUMBER: _ClassVar[int]
    LINK_S_FIELD_NUMBER: _ClassVar[int]
    ENERGY_J_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    ENERGY_MEASURED_FIELD_NUMBER: _ClassVar[int]
    tokens_per_s: float
    ttft_s: float
    ttft_p95_s: float
    tpot_p95_s: float
    link_s: float
    energy_j_per_token: float
    samples: int
    energy_measured: bool
    def __init__(self, tokens_per_s: _Optional[float] = ..., ttft_s: _Optional[float] = ..., ttft_p95_s: _Optional[float] = ..., tpot_p95_s: _Optional[float] = ..., link_s: _Optional[float] = ..., energy_j_per_token: _Optional[float] = ..., samples: _Optional[int] = ..., energy_measured: bool = ...) -> None: ...

class ExpertState(_message.Message):
    __slots__ = ("spec", "state", "why", "figures", "queue", "deployment", "tokenizer_digest", "node_id")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    FIGURES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    spec: ExpertSpec
    state: str
    why: str
    figures: ExpertFigures
    queue: int
    deployment: str
    tokenizer_digest: str
    node_id: str
    def __init__(self, spec: _Optional[_Union[ExpertSpec, _Mapping]] = ..., state: _Optional[str] = ..., why: _Optional[str] = ..., figures: _Optional[_Union[ExpertFigures, _Mapping]] = ..., queue: _Optional[int] = ..., deployment: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ..., node_id: _Optional[str] = ...) -> None: ...

class PutExpertRequest(_message.Message):
    __slots__ = ("spec",)
    SPEC_FIELD_NUMBER: _ClassVar[int]
    spec: ExpertSpec
    def __init__(self, spec: _Optional[_Union[ExpertSpec, _Mapping]] = ...) -> None: ...

class RemoveExpertRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RemoveExpertReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Budget(_message.Message):
    __slots__ = ("name", "latency_p95_s", "energy_j", "tokens", "combine", "most", "private", "domains")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LATENCY_P95_S_FIELD_NUMBER: _ClassVar[int]
    ENERGY_J_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMBINE_FIELD_NUMBER: _ClassVar[int]
    MOST_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_FIELD_NUMBER: _ClassVar[int]
    DOMAINS_FIELD_NUMBER: _ClassVar[int]
    name: str
    latency_p95_s: float
    energy_j: float
    tokens: int
    combine: Combine
    most: int
    private: bool
    domains: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., latency_p95_s: _Optional[float] = ..., energy_j: _Optional[float] = ..., tokens: _Optional[int] = ..., combine: _Optional[_Union[Combine, str]] = ..., most: _Optional[int] = ..., private: bool = ..., domains: _Optional[_Iterable[str]] = ...) -> None: ...

class PutBudgetRequest(_message.Message):
    __slots__ = ("budget",)
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    budget: Budget
    def __init__(self, budget: _Optional[_Union[Budget, _Mapping]] = ...) -> None: ...

class RemoveBudgetRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RemoveBudgetReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SelectRequest(_message.Message):
    __slots__ = ("budget",)
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    budget: Budget
    def __init__(self, budget: _Optional[_Union[Budget, _Mapping]] = ...) -> None: ...

class Selection(_message.Message):
    __slots__ = ("budget", "experts", "value", "latency_p95_s", "energy_j", "optimal", "gap", "refused", "generation", "left_out")
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LATENCY_P95_S_FIELD_NUMBER: _ClassVar[int]
    ENERGY_J_FIELD_NUMBER: _ClassVar[int]
    OPTIMAL_FIELD_NUMBER: _ClassVar[int]
    GAP_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    budget: Budget
    experts: _containers.RepeatedScalarFieldContainer[str]
    value: float
    latency_p95_s: float
    energy_j: float
    optimal: bool
    gap: float
    refused: str
    generation: int
    left_out: _containers.RepeatedCompositeFieldContainer[LeftOut]
    def __init__(self, budget: _Optional[_Union[Budget, _Mapping]] = ..., experts: _Optional[_Iterable[str]] = ..., value: _Optional[float] = ..., latency_p95_s: _Optional[float] = ..., energy_j: _Optional[float] = ..., optimal: bool = ..., gap: _Optional[float] = ..., refused: _Optional[str] = ..., generation: _Optional[int] = ..., left_out: _Optional[_Iterable[_Union[LeftOut, _Mapping]]] = ...) -> None: ...

class LeftOut(_message.Message):
    __slots__ = ("expert", "why")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    expert: str
    why: str
    def __init__(self, expert: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class OutcomeReport(_message.Message):
    __slots__ = ("outcomes", "links", "profile")
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[ExpertOutcome]
    links: _containers.RepeatedCompositeFieldContainer[LinkFigure]
    profile: QualityProfile
    def __init__(self, outcomes: _Optional[_Iterable[_Union[ExpertOutcome, _Mapping]]] = ..., links: _Optional[_Iterable[_Union[LinkFigure, _Mapping]]] = ..., profile: _Optional[_Union[QualityProfile, _Mapping]] = ...) -> None: ...

class ExpertOutcome(_message.Message):
    __slots__ = ("expert", "ttft_s", "tpot_s", "tokens", "failed", "why")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    expert: str
    ttft_s: float
    tpot_s: float
    tokens: int
    failed: str
    why: str
    def __init__(self, expert: _Optional[str] = ..., ttft_s: _Optional[float] = ..., tpot_s: _Optional[float] = ..., tokens: _Optional[int] = ..., failed: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class LinkFigure(_message.Message):
    __slots__ = ("expert", "rtt_s")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    RTT_S_FIELD_NUMBER: _ClassVar[int]
    expert: str
    rtt_s: float
    def __init__(self, expert: _Optional[str] = ..., rtt_s: _Optional[float] = ...) -> None: ...

class QualityProfile(_message.Message):
    __slots__ = ("experts", "rows")
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedScalarFieldContainer[str]
    rows: _containers.RepeatedCompositeFieldContainer[QualityRow]
    def __init__(self, experts: _Optional[_Iterable[str]] = ..., rows: _Optional[_Iterable[_Union[QualityRow, _Mapping]]] = ...) -> None: ...

class QualityRow(_message.Message):
    __slots__ = ("share", "quality")
    SHARE_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    share: float
    quality: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, share: _Optional[float] = ..., quality: _Optional[_Iterable[float]] = ...) -> None: ...

class ReportReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
