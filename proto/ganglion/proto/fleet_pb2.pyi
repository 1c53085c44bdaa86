from ganglion.proto import identity_pb2 as _identity_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AssignmentPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ASSIGNMENT_PHASE_UNSPECIFIED: _ClassVar[AssignmentPhase]
    ASSIGNMENT_PHASE_FETCHING: _ClassVar[AssignmentPhase]
    ASSIGNMENT_PHASE_LOADING: _ClassVar[AssignmentPhase]
    ASSIGNMENT_PHASE_LISTENING: _ClassVar[AssignmentPhase]
    ASSIGNMENT_PHASE_CONNECTED: _ClassVar[AssignmentPhase]
    ASSIGNMENT_PHASE_FAILED: _ClassVar[AssignmentPhase]
    ASSIGNMENT_PHASE_RELEASED: _ClassVar[AssignmentPhase]
ASSIGNMENT_PHASE_UNSPECIFIED: AssignmentPhase
ASSIGNMENT_PHASE_FETCHING: AssignmentPhase
ASSIGNMENT_PHASE_LOADING: AssignmentPhase
ASSIGNMENT_PHASE_LISTENING: AssignmentPhase
ASSIGNMENT_PHASE_CONNECTED: AssignmentPhase
ASSIGNMENT_PHASE_FAILED: AssignmentPhase
ASSIGNMENT_PHASE_RELEASED: AssignmentPhase

class AgentMessage(_message.Message):
    __slots__ = ("hello", "advert", "heartbeat", "status", "links", "held", "draft_offer", "routes")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ADVERT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    DRAFT_OFFER_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    hello: _identity_pb2.Hello
    advert: Advert
    heartbeat: Heartbeat
    status: AssignmentStatus
    links: LinkReport
    held: HeldModels
    draft_offer: DraftOffer
    routes: RouteReport
    def __init__(self, hello: _Optional[_Union[_identity_pb2.Hello, _Mapping]] = ..., advert: _Optional[_Union[Advert, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., status: _Optional[_Union[AssignmentStatus, _Mapping]] = ..., links: _Optional[_Union[LinkReport, _Mapping]] = ..., held: _Optional[_Union[HeldModels, _Mapping]] = ..., draft_offer: _Optional[_Union[DraftOffer, _Mapping]] = ..., routes: _Optional[_Union[RouteReport, _Mapping]] = ...) -> None: ...

class CoordinatorMessage(_message.Message):
    __slots__ = ("hello", "assign", "connect", "release", "measure_links", "reprobe", "verifier", "draft_answer")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ASSIGN_FIELD_NUMBER: _ClassVar[int]
    CONNECT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    MEASURE_LINKS_FIELD_NUMBER: _ClassVar[int]
    REPROBE_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_FIELD_NUMBER: _ClassVar[int]
    DRAFT_ANSWER_FIELD_NUMBER: _ClassVar[int]
    hello: _identity_pb2.Hello
    assign: Assign
    connect: Connect
    release: Release
    measure_links: MeasureLinks
    reprobe: Reprobe
    verifier: Verifier
    draft_answer: DraftAnswer
    def __init__(self, hello: _Optional[_Union[_identity_pb2.Hello, _Mapping]] = ..., assign: _Optional[_Union[Assign, _Mapping]] = ..., connect: _Optional[_Union[Connect, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., measure_links: _Optional[_Union[MeasureLinks, _Mapping]] = ..., reprobe: _Optional[_Union[Reprobe, _Mapping]] = ..., verifier: _Optional[_Union[Verifier, _Mapping]] = ..., draft_answer: _Optional[_Union[DraftAnswer, _Mapping]] = ...) -> None: ...

class Advert(_message.Message):
    __slots__ = ("profile", "addresses")
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    profile: bytes
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, profile: _Optional[bytes] = ..., addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("sequence", "workers")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    workers: _containers.RepeatedCompositeFieldContainer[WorkerBeat]
    def __init__(self, sequence: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[WorkerBeat, _Mapping]]] = ...) -> None: ...

class WorkerBeat(_message.Message):
    __slots__ = ("deployment", "epoch", "steps", "longest_run_s", "sessions", "kv_bytes")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LONGEST_RUN_S_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    epoch: int
    steps: int
    longest_run_s: float
    sessions: int
    kv_bytes: int
    def __init__(self, deployment: _Optional[str] = ..., epoch: _Optional[int] = ..., steps: _Optional[int] = ..., longest_run_s: _Optional[float] = ..., sessions: _Optional[int] = ..., kv_bytes: _Optional[int] = ...) -> None: ...

class Assign(_message.Message):
    __slots__ = ("deployment", "epoch", "plan", "manifest", "holders", "gateways", "drafter", "drafter_holders")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_HOLDERS_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    epoch: int
    plan: bytes
    manifest: bytes
    holders: _containers.RepeatedCompositeFieldContainer[_identity_pb2.Peer]
    gateways: _containers.RepeatedCompositeFieldContainer[_identity_pb2.Peer]
    drafter: bytes
    drafter_holders: _containers.RepeatedCompositeFieldContainer[_identity_pb2.Peer]
    def __init__(self, deployment: _Optional[str] = ..., epoch: _Optional[int] = ..., plan: _Optional[bytes] = ..., manifest: _Optional[bytes] = ..., holders: _Optional[_Iterable[_Union[_identity_pb2.Peer, _Mapping]]] = ..., gateways: _Optional[_Iterable[_Union[_identity_pb2.Peer, _Mapping]]] = ..., drafter: _Optional[bytes] = ..., drafter_holders: _Optional[_Iterable[_Union[_identity_pb2.Peer, _Mapping]]] = ...) -> None: ...

class Connect(_message.Message):
    __slots__ = ("deployment", "epoch", "peers", "gateways")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    epoch: int
    peers: _containers.RepeatedCompositeFieldContainer[_identity_pb2.Peer]
    gateways: _containers.RepeatedCompositeFieldContainer[_identity_pb2.Peer]
    def __init__(self, deployment: _Optional[str] = ..., epoch: _Optional[int] = ..., peers: _Optional[_Iterable[_Union[_identity_pb2.Peer, _Mapping]]] = ..., gateways: _Optional[_Iterable[_Union[_identity_pb2.Peer, _Mapping]]] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("deployment", "epoch", "reason")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    epoch: int
    reason: str
    def __init__(self, deployment: _Optional[str] = ..., epoch: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class AssignmentStatus(_message.Message):
    __slots__ = ("deployment", "epoch", "phase", "done_bytes", "total_bytes", "lane_address", "error_code", "error_message")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    LANE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    epoch: int
    phase: AssignmentPhase
    done_bytes: int
    total_bytes: int
    lane_address: str
    error_code: str
    error_message: str
    def __init__(self, deployment: _Optional[str] = ..., epoch: _Optional[int] = ..., phase: _Optional[_Union[AssignmentPhase, str]] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., lane_address: _Optional[str] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ...) -> None: ...

class MeasureLinks(_message.Message):
    __slots__ = ("peers",)
    PEERS_FIELD_NUMBER: _ClassVar[int]
    peers: _containers.RepeatedCompositeFieldContainer[_identity_pb2.Peer]
    def __init__(self, peers: _Optional[_Iterable[_Union[_identity_pb2.Peer, _Mapping]]] = ...) -> None: ...

class LinkReport(_message.Message):
    __slots__ = ("links",)
    LINKS_FIELD_NUMBER: _ClassVar[int]
    links: _containers.RepeatedCompositeFieldContainer[Link]
    def __init__(self, links: _Optional[_Iterable[_Union[Link, _Mapping]]] = ...) -> None: ...

class Link(_message.Message):
    __slots__ = ("node_id", "reachable", "rtt_s", "bytes_per_s")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    REACHABLE_FIELD_NUMBER: _ClassVar[int]
    RTT_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    reachable: bool
    rtt_s: float
    bytes_per_s: float
    def __init__(self, node_id: _Optional[str] = ..., reachable: bool = ..., rtt_s: _Optional[float] = ..., bytes_per_s: _Optional[float] = ...) -> None: ...

class HeldModels(_message.Message):
    __slots__ = ("manifest_digests", "partial_manifest_digests")
    MANIFEST_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_MANIFEST_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    manifest_digests: _containers.RepeatedScalarFieldContainer[str]
    partial_manifest_digests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, manifest_digests: _Optional[_Iterable[str]] = ..., partial_manifest_digests: _Optional[_Iterable[str]] = ...) -> None: ...

class Reprobe(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DraftOffer(_message.Message):
    __slots__ = ("manifest", "drafting")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    DRAFTING_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    drafting: bytes
    def __init__(self, manifest: _Optional[bytes] = ..., drafting: _Optional[bytes] = ...) -> None: ...

class DraftAnswer(_message.Message):
    __slots__ = ("target", "refused")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    target: str
    refused: str
    def __init__(self, target: _Optional[str] = ..., refused: _Optional[str] = ...) -> None: ...

class Verifier(_message.Message):
    __slots__ = ("deployment", "epoch", "target", "lead", "lead_deployment", "lead_epoch", "manifest_digest", "numeric_class", "context", "vocab", "eos_ids", "url", "why_away")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    LEAD_FIELD_NUMBER: _ClassVar[int]
    LEAD_DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    LEAD_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUMERIC_CLASS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_FIELD_NUMBER: _ClassVar[int]
    EOS_IDS_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    WHY_AWAY_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    epoch: int
    target: str
    lead: _identity_pb2.Peer
    lead_deployment: str
    lead_epoch: int
    manifest_digest: str
    numeric_class: str
    context: int
    vocab: int
    eos_ids: _containers.RepeatedScalarFieldContainer[int]
    url: str
    why_away: str
    def __init__(self, deployment: _Optional[str] = ..., epoch: _Optional[int] = ..., target: _Optional[str] = ..., lead: _Optional[_Union[_identity_pb2.Peer, _Mapping]] = ..., lead_deployment: _Optional[str] = ..., lead_epoch: _Optional[int] = ..., manifest_digest: _Optional[str] = ..., numeric_class: _Optional[str] = ..., context: _Optional[int] = ..., vocab: _Optional[int] = ..., eos_ids: _Optional[_Iterable[int]] = ..., url: _Optional[str] = ..., why_away: _Optional[str] = ...) -> None: ...

class RouteReport(_message.Message):
    __slots__ = ("manifest_digest", "tokens", "layers")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: str
    tokens: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerRoutes]
    def __init__(self, manifest_digest: _Optional[str] = ..., tokens: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerRoutes, _Mapping]]] = ...) -> None: ...

class LayerRoutes(_message.Message):
    __slots__ = ("sets", "others")
    SETS_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    sets: _containers.RepeatedCompositeFieldContainer[RouteSet]
    others: int
    def __init__(self, sets: _Optional[_Iterable[_Union[RouteSet, _Mapping]]] = ..., others: _Optional[int] = ...) -> None: ...

class RouteSet(_message.Message):
    __slots__ = ("experts", "tokens")
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedScalarFieldContainer[int]
    tokens: int
    def __init__(self, experts: _Optional[_Iterable[int]] = ..., tokens: _Optional[int] = ...) -> None: ...
