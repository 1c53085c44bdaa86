from ganglion.proto import identity_pb2 as _identity_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TokenRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TOKEN_ROLE_UNSPECIFIED: _ClassVar[TokenRole]
    TOKEN_ROLE_PROMPT: _ClassVar[TokenRole]
    TOKEN_ROLE_GENERATED: _ClassVar[TokenRole]

class Miss(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MISS_UNSPECIFIED: _ClassVar[Miss]
    MISS_WAIT: _ClassVar[Miss]
    MISS_RUN: _ClassVar[Miss]
    MISS_DRAFT: _ClassVar[Miss]

class Away(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AWAY_UNSPECIFIED: _ClassVar[Away]
    AWAY_WAIT: _ClassVar[Away]
    AWAY_LOCAL: _ClassVar[Away]
    AWAY_FAIL: _ClassVar[Away]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
TOKEN_ROLE_UNSPECIFIED: TokenRole
TOKEN_ROLE_PROMPT: TokenRole
TOKEN_ROLE_GENERATED: TokenRole
MISS_UNSPECIFIED: Miss
MISS_WAIT: Miss
MISS_RUN: Miss
MISS_DRAFT: Miss
AWAY_UNSPECIFIED: Away
AWAY_WAIT: Away
AWAY_LOCAL: Away
AWAY_FAIL: Away
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason

class Sealed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Opening(_message.Message):
    __slots__ = ("deployment", "epoch", "source", "destination", "handshake")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    HANDSHAKE_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    epoch: int
    source: int
    destination: int
    handshake: bytes
    def __init__(self, deployment: _Optional[str] = ..., epoch: _Optional[int] = ..., source: _Optional[int] = ..., destination: _Optional[int] = ..., handshake: _Optional[bytes] = ...) -> None: ...

class SocketWish(_message.Message):
    __slots__ = ("wanted",)
    WANTED_FIELD_NUMBER: _ClassVar[int]
    wanted: bool
    def __init__(self, wanted: bool = ...) -> None: ...

class SocketOffer(_message.Message):
    __slots__ = ("port", "ticket", "secret")
    PORT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    port: int
    ticket: bytes
    secret: bytes
    def __init__(self, port: _Optional[int] = ..., ticket: _Optional[bytes] = ..., secret: _Optional[bytes] = ...) -> None: ...

class SocketResult(_message.Message):
    __slots__ = ("refused",)
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    refused: str
    def __init__(self, refused: _Optional[str] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("step", "entries", "closed", "put_back", "keeps", "begins", "role")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    PUT_BACK_FIELD_NUMBER: _ClassVar[int]
    KEEPS_FIELD_NUMBER: _ClassVar[int]
    BEGINS_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    step: int
    entries: _containers.RepeatedCompositeFieldContainer[StepEntry]
    closed: _containers.RepeatedScalarFieldContainer[int]
    put_back: _containers.RepeatedScalarFieldContainer[int]
    keeps: _containers.RepeatedCompositeFieldContainer[KeepBlocks]
    begins: _containers.RepeatedCompositeFieldContainer[BeginWithBlocks]
    role: TokenRole
    def __init__(self, step: _Optional[int] = ..., entries: _Optional[_Iterable[_Union[StepEntry, _Mapping]]] = ..., closed: _Optional[_Iterable[int]] = ..., put_back: _Optional[_Iterable[int]] = ..., keeps: _Optional[_Iterable[_Union[KeepBlocks, _Mapping]]] = ..., begins: _Optional[_Iterable[_Union[BeginWithBlocks, _Mapping]]] = ..., role: _Optional[_Union[TokenRole, str]] = ...) -> None: ...

class KeepBlocks(_message.Message):
    __slots__ = ("session", "first", "blocks")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    session: int
    first: int
    blocks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, session: _Optional[int] = ..., first: _Optional[int] = ..., blocks: _Optional[_Iterable[int]] = ...) -> None: ...

class BeginWithBlocks(_message.Message):
    __slots__ = ("session", "blocks", "prompt_tokens")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    session: int
    blocks: _containers.RepeatedScalarFieldContainer[int]
    prompt_tokens: int
    def __init__(self, session: _Optional[int] = ..., blocks: _Optional[_Iterable[int]] = ..., prompt_tokens: _Optional[int] = ...) -> None: ...

class StepEntry(_message.Message):
    __slots__ = ("session", "start", "count", "draws", "take_from", "take_first")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    DRAWS_FIELD_NUMBER: _ClassVar[int]
    TAKE_FROM_FIELD_NUMBER: _ClassVar[int]
    TAKE_FIRST_FIELD_NUMBER: _ClassVar[int]
    session: int
    start: int
    count: int
    draws: _containers.RepeatedCompositeFieldContainer[Draw]
    take_from: int
    take_first: int
    def __init__(self, session: _Optional[int] = ..., start: _Optional[int] = ..., count: _Optional[int] = ..., draws: _Optional[_Iterable[_Union[Draw, _Mapping]]] = ..., take_from: _Optional[int] = ..., take_first: _Optional[int] = ...) -> None: ...

class Draw(_message.Message):
    __slots__ = ("candidates", "temperature", "seed", "position", "repetition_penalty", "adjustments", "allowed", "top_logprobs", "mass", "keep")
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    ADJUSTMENTS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MASS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    candidates: int
    temperature: float
    seed: int
    position: int
    repetition_penalty: float
    adjustments: Adjustments
    allowed: bytes
    top_logprobs: int
    mass: bool
    keep: bool
    def __init__(self, candidates: _Optional[int] = ..., temperature: _Optional[float] = ..., seed: _Optional[int] = ..., position: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., adjustments: _Optional[_Union[Adjustments, _Mapping]] = ..., allowed: _Optional[bytes] = ..., top_logprobs: _Optional[int] = ..., mass: bool = ..., keep: bool = ...) -> None: ...

class Adjustments(_message.Message):
    __slots__ = ("gaps", "bias", "repeated", "subtract")
    GAPS_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    REPEATED_FIELD_NUMBER: _ClassVar[int]
    SUBTRACT_FIELD_NUMBER: _ClassVar[int]
    gaps: _containers.RepeatedScalarFieldContainer[int]
    bias: _containers.RepeatedScalarFieldContainer[float]
    repeated: bytes
    subtract: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, gaps: _Optional[_Iterable[int]] = ..., bias: _Optional[_Iterable[float]] = ..., repeated: _Optional[bytes] = ..., subtract: _Optional[_Iterable[float]] = ...) -> None: ...

class Candidates(_message.Message):
    __slots__ = ("ids", "logits", "log_sum_exp", "best_id", "best_score", "best_logit", "scaled_log_sum_exp", "numeric_error", "raw_logits", "top_ids", "top_logits")
    IDS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    LOG_SUM_EXP_FIELD_NUMBER: _ClassVar[int]
    BEST_ID_FIELD_NUMBER: _ClassVar[int]
    BEST_SCORE_FIELD_NUMBER: _ClassVar[int]
    BEST_LOGIT_FIELD_NUMBER: _ClassVar[int]
    SCALED_LOG_SUM_EXP_FIELD_NUMBER: _ClassVar[int]
    NUMERIC_ERROR_FIELD_NUMBER: _ClassVar[int]
    RAW_LOGITS_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGITS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    logits: _containers.RepeatedScalarFieldContainer[float]
    log_sum_exp: _containers.RepeatedScalarFieldContainer[float]
    best_id: int
    best_score: float
    best_logit: float
    scaled_log_sum_exp: _containers.RepeatedScalarFieldContainer[float]
    numeric_error: bool
    raw_logits: _containers.RepeatedScalarFieldContainer[float]
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logits: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., logits: _Optional[_Iterable[float]] = ..., log_sum_exp: _Optional[_Iterable[float]] = ..., best_id: _Optional[int] = ..., best_score: _Optional[float] = ..., best_logit: _Optional[float] = ..., scaled_log_sum_exp: _Optional[_Iterable[float]] = ..., numeric_error: bool = ..., raw_logits: _Optional[_Iterable[float]] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logits: _Optional[_Iterable[float]] = ...) -> None: ...

class CandidatesReply(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[Candidates]
    def __init__(self, entries: _Optional[_Iterable[_Union[Candidates, _Mapping]]] = ...) -> None: ...

class MoreCandidates(_message.Message):
    __slots__ = ("entry", "candidates", "session", "ids")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    entry: int
    candidates: int
    session: int
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, entry: _Optional[int] = ..., candidates: _Optional[int] = ..., session: _Optional[int] = ..., ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("hello", "open", "cancel", "drafts", "choose", "ask")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    CHOOSE_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    hello: _identity_pb2.Hello
    open: Open
    cancel: Cancel
    drafts: Drafts
    choose: Choose
    ask: Ask
    def __init__(self, hello: _Optional[_Union[_identity_pb2.Hello, _Mapping]] = ..., open: _Optional[_Union[Open, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., drafts: _Optional[_Union[Drafts, _Mapping]] = ..., choose: _Optional[_Union[Choose, _Mapping]] = ..., ask: _Optional[_Union[Ask, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("request_id", "prompt", "max_tokens", "sampling", "stop_ids", "grammar", "tenant", "answered", "contract", "away", "target", "choosing")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_FIELD_NUMBER: _ClassVar[int]
    AWAY_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    CHOOSING_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt: _containers.RepeatedScalarFieldContainer[int]
    max_tokens: int
    sampling: Sampling
    stop_ids: _containers.RepeatedScalarFieldContainer[int]
    grammar: str
    tenant: str
    answered: int
    contract: Contract
    away: Away
    target: str
    choosing: Choosing
    def __init__(self, request_id: _Optional[str] = ..., prompt: _Optional[_Iterable[int]] = ..., max_tokens: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., stop_ids: _Optional[_Iterable[int]] = ..., grammar: _Optional[str] = ..., tenant: _Optional[str] = ..., answered: _Optional[int] = ..., contract: _Optional[_Union[Contract, _Mapping]] = ..., away: _Optional[_Union[Away, str]] = ..., target: _Optional[str] = ..., choosing: _Optional[_Union[Choosing, _Mapping]] = ...) -> None: ...

class Choosing(_message.Message):
    __slots__ = ("candidates",)
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    candidates: int
    def __init__(self, candidates: _Optional[int] = ...) -> None: ...

class Choose(_message.Message):
    __slots__ = ("position", "tokens")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    position: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, position: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class Ask(_message.Message):
    __slots__ = ("position", "ids")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    position: int
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, position: _Optional[int] = ..., ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Contract(_message.Message):
    __slots__ = ("manifest_digest", "numeric_class", "tokenizer_digest", "vocab", "window_tokens", "miss")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUMERIC_CLASS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VOCAB_FIELD_NUMBER: _ClassVar[int]
    WINDOW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: str
    numeric_class: str
    tokenizer_digest: bytes
    vocab: int
    window_tokens: int
    miss: Miss
    def __init__(self, manifest_digest: _Optional[str] = ..., numeric_class: _Optional[str] = ..., tokenizer_digest: _Optional[bytes] = ..., vocab: _Optional[int] = ..., window_tokens: _Optional[int] = ..., miss: _Optional[_Union[Miss, str]] = ...) -> None: ...

class Drafts(_message.Message):
    __slots__ = ("round", "branches", "miss")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BRANCHES_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    round: int
    branches: _containers.RepeatedCompositeFieldContainer[Branch]
    miss: Miss
    def __init__(self, round: _Optional[int] = ..., branches: _Optional[_Iterable[_Union[Branch, _Mapping]]] = ..., miss: _Optional[_Union[Miss, str]] = ...) -> None: ...

class Branch(_message.Message):
    __slots__ = ("parent", "tokens")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    parent: bytes
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, parent: _Optional[bytes] = ..., tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "seed", "top_logprobs", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    top_logprobs: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.RepeatedCompositeFieldContainer[TokenBias]
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., top_logprobs: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Iterable[_Union[TokenBias, _Mapping]]] = ...) -> None: ...

class TokenBias(_message.Message):
    __slots__ = ("id", "bias")
    ID_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    id: int
    bias: float
    def __init__(self, id: _Optional[int] = ..., bias: _Optional[float] = ...) -> None: ...

class SessionEvent(_message.Message):
    __slots__ = ("hello", "accepted", "tokens", "finished", "failed", "scored")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    hello: _identity_pb2.Hello
    accepted: Accepted
    tokens: Tokens
    finished: Finished
    failed: Failed
    scored: Scored
    def __init__(self, hello: _Optional[_Union[_identity_pb2.Hello, _Mapping]] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., scored: _Optional[_Union[Scored, _Mapping]] = ...) -> None: ...

class Scored(_message.Message):
    __slots__ = ("position", "ids", "logits", "log_sum_exp", "asked")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    LOG_SUM_EXP_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    position: int
    ids: _containers.RepeatedScalarFieldContainer[int]
    logits: _containers.RepeatedScalarFieldContainer[float]
    log_sum_exp: float
    asked: bool
    def __init__(self, position: _Optional[int] = ..., ids: _Optional[_Iterable[int]] = ..., logits: _Optional[_Iterable[float]] = ..., log_sum_exp: _Optional[float] = ..., asked: bool = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("numeric_class", "terms", "vocab")
    NUMERIC_CLASS_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_FIELD_NUMBER: _ClassVar[int]
    numeric_class: str
    terms: Terms
    vocab: int
    def __init__(self, numeric_class: _Optional[str] = ..., terms: _Optional[_Union[Terms, _Mapping]] = ..., vocab: _Optional[int] = ...) -> None: ...

class Terms(_message.Message):
    __slots__ = ("window_tokens", "credits", "drafter", "prefix")
    WINDOW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    window_tokens: int
    credits: int
    drafter: str
    prefix: bytes
    def __init__(self, window_tokens: _Optional[int] = ..., credits: _Optional[int] = ..., drafter: _Optional[str] = ..., prefix: _Optional[bytes] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("tokens", "cached_tokens", "outcome", "local")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    cached_tokens: int
    outcome: Outcome
    local: bool
    def __init__(self, tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ..., cached_tokens: _Optional[int] = ..., outcome: _Optional[_Union[Outcome, _Mapping]] = ..., local: bool = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("round", "prefix", "drafted", "accepted", "credits", "own", "queued", "verify_s", "idle_s", "branched", "beside")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    OWN_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    VERIFY_S_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    BRANCHED_FIELD_NUMBER: _ClassVar[int]
    BESIDE_FIELD_NUMBER: _ClassVar[int]
    round: int
    prefix: bytes
    drafted: int
    accepted: int
    credits: int
    own: int
    queued: int
    verify_s: float
    idle_s: float
    branched: bool
    beside: int
    def __init__(self, round: _Optional[int] = ..., prefix: _Optional[bytes] = ..., drafted: _Optional[int] = ..., accepted: _Optional[int] = ..., credits: _Optional[int] = ..., own: _Optional[int] = ..., queued: _Optional[int] = ..., verify_s: _Optional[float] = ..., idle_s: _Optional[float] = ..., branched: bool = ..., beside: _Optional[int] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("id", "logprob", "top")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("id", "logprob")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    id: int
    logprob: float
    def __init__(self, id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("reason", "prompt_tokens", "completion_tokens", "timings", "cached_tokens", "local_tokens", "speculation")
    REASON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    timings: Timings
    cached_tokens: int
    local_tokens: int
    speculation: Speculation
    def __init__(self, reason: _Optional[_Union[FinishReason, str]] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., cached_tokens: _Optional[int] = ..., local_tokens: _Optional[int] = ..., speculation: _Optional[_Union[Speculation, _Mapping]] = ...) -> None: ...

class Speculation(_message.Message):
    __slots__ = ("passes", "drafted", "accepted", "hits", "accepted_counts", "sent_bytes", "received_bytes", "mode")
    PASSES_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_COUNTS_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    passes: int
    drafted: int
    accepted: int
    hits: int
    accepted_counts: _containers.RepeatedScalarFieldContainer[int]
    sent_bytes: int
    received_bytes: int
    mode: str
    def __init__(self, passes: _Optional[int] = ..., drafted: _Optional[int] = ..., accepted: _Optional[int] = ..., hits: _Optional[int] = ..., accepted_counts: _Optional[_Iterable[int]] = ..., sent_bytes: _Optional[int] = ..., received_bytes: _Optional[int] = ..., mode: _Optional[str] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("wall_s", "queue_s", "compute_s", "exchange_s", "seal_s", "sample_s", "other_s", "ttft_s", "sent_bytes", "received_bytes", "draft_s")
    WALL_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_S_FIELD_NUMBER: _ClassVar[int]
    SEAL_S_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_S_FIELD_NUMBER: _ClassVar[int]
    OTHER_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRAFT_S_FIELD_NUMBER: _ClassVar[int]
    wall_s: float
    queue_s: float
    compute_s: float
    exchange_s: float
    seal_s: float
    sample_s: float
    other_s: float
    ttft_s: float
    sent_bytes: int
    received_bytes: int
    draft_s: float
    def __init__(self, wall_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., exchange_s: _Optional[float] = ..., seal_s: _Optional[float] = ..., sample_s: _Optional[float] = ..., other_s: _Optional[float] = ..., ttft_s: _Optional[float] = ..., sent_bytes: _Optional[int] = ..., received_bytes: _Optional[int] = ..., draft_s: _Optional[float] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("code", "message", "param")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    param: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., param: _Optional[str] = ...) -> None: ...
