"""Train one of the demo models: on the standard library's own source, on another domain's text, or on all of them.

    python models/train.py --model demo --minutes 78
    python models/train.py --model demo --finish 11 --threads 2
    python models/train.py --model demo-drafter --minutes 13 --teacher models/ganglion/models/demo
    python models/train.py --model demo-c --minutes 9 --start models/ganglion/models/demo-drafter
    python models/train.py --model demo-mixture --minutes 33 --start models/ganglion/models/demo-drafter

The learning rate follows the wall clock (warm-up, constant, linear to zero), so a run always ends
fully decayed however much of the machine it gets. `--finish` goes on from a trained model at a lower
rate on cleaner text: docstrings of one line, and functions that stand alone. A run that was killed
goes on with `--resume`. The checkpoint is written when the run is over.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoint import export, load_checkpoint, new_model, write_atomically
from corpus import (
    END_OF_TEXT,
    Corpus,
    clean_documents,
    function_documents,
    shuffled,
    token_id,
    train_tokenizer,
)
from domains import chat_turns, load_domain
from llama import EDGE_EXPERTS, SHAPES, Llama
from mixture import Mixture
from muon import Muon
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import safe_open
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from ganglion.models import DOMAINS, demo_path

HERE = Path(__file__).resolve().parent
CHAT_SHARE = 0.04
FINISH_CHAT_SHARE = 0.10
MUON_LR = 0.03
ADAMW_LR = 3e-3
LEANING_ROWS = 16
VALIDATION_TOKENS = 4096
FINAL_VALIDATION_TOKENS = 98_304
LOG_EVERY_S = 20.0
SAVE_EVERY_S = 240.0
VALIDATE_EVERY_S = 300.0

DOMAINS_OF = {name: (name.removeprefix("demo-"),) for name in EDGE_EXPERTS} | {"demo-mixture": DOMAINS}
"""The domains a model is trained on; the others are trained on Python alone."""

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Progressed:
    """How far a run has come; saved with its state."""

    steps: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Sequence length and learning rate by the share (0 to 1) of the time that has passed."""

    phases: tuple[tuple[float, int], ...]
    """(share of the time at which the phase ends, sequence length)"""
    peak: float
    """The highest rate, as a share of `MUON_LR` and `ADAMW_LR`."""
    decay_from: float
    warmup: float = 0.01
    tokens_per_step: int = 4096

    def sequence_length(self, progress: float) -> int:
        """The sequence length at this share of the time."""
        return next((length for end, length in self.phases if progress < end), self.phases[-1][1])

    def learning_rate_factor(self, progress: float) -> float:
        """Warm-up, constant, then linear to zero."""
        if progress < self.warmup:
            return self.peak * max(progress / self.warmup, 0.01)
        return self.peak * min(1.0, max(0.0, (1.0 - progress) / (1.0 - self.decay_from)))


TRAIN = Schedule(phases=((0.50, 256), (0.80, 512), (1.00, 1024)), peak=1.0, decay_from=0.45)
START = Schedule(phases=((0.60, 256), (1.00, 512)), peak=0.5, decay_from=0.2, tokens_per_step=2048)
FINISH = Schedule(phases=((1.00, 512),), peak=0.3, decay_from=0.0)


def pack(texts: list[str], tokenizer: Tokenizer) -> Tensor:
    """One stream of token ids, each text led by the separator; attention crosses separators."""
    separator = token_id(tokenizer, END_OF_TEXT)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids.append(separator)
        ids.extend(encoding.ids)
    ids.append(separator)
    return torch.tensor(ids, dtype=torch.int64)


def batches(stream: Tensor, length: int, rows: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of `length + 1` ids, without end; every epoch shifts the cuts and draws a new order."""
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        count = (len(stream) - 1 - offset) // length
        for chosen in torch.split(torch.randperm(count, generator=generator), rows):
            if len(chosen) == rows:
                yield stream[offset + chosen[:, None] * length + torch.arange(length + 1)]


def document_rows(
    stream: Tensor, separator: int, length: int, rows: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Rows of `length + 1` ids, without end, that begin at the first id of a document, its separator left out."""
    starts = (stream == separator).nonzero().flatten() + 1
    starts = starts[starts + length < len(stream)]
    while True:
        for chosen in torch.split(starts[torch.randperm(len(starts), generator=generator)], rows):
            if len(chosen) == rows:
                yield stream[chosen[:, None] + torch.arange(length + 1)]


def optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding, the routers and the norms."""

    def is_matrix(name: str, parameter: Tensor) -> bool:
        return parameter.ndim >= 2 and "embed" not in name and not name.endswith("mlp.gate.weight")

    matrices = [p for name, p in model.named_parameters() if is_matrix(name, p)]
    rest = [p for name, p in model.named_parameters() if not is_matrix(name, p)]
    return [
        Muon(matrices, lr=MUON_LR, weight_decay=0.02, momentum=0.95),
        torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def distillation(model: Llama, teacher: Llama) -> Loss:
    """Half cross entropy on the text, half divergence from the teacher's distribution."""

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(teacher(tokens).float(), dim=-1)
        log_probs = F.log_softmax(model(tokens).float(), dim=-1)
        divergence = (wanted.exp() * (wanted - log_probs)).sum(-1).mean()
        return 0.5 * F.nll_loss(log_probs.flatten(0, 1), targets.flatten()) + 0.5 * divergence

    return loss


@torch.no_grad()
def validation_loss(model: Llama, stream: Tensor, loss: Loss, limit: int | None = None) -> float:
    """Mean nats per token over rows of the full context, at most `limit` tokens of them."""
    length = model.shape.context
    rows = VALIDATION_TOKENS // length
    count = (len(stream) - 1) // length // rows * rows
    index = torch.arange(count)[:, None] * length + torch.arange(length + 1)
    chunks = torch.split(stream[index], rows)
    if limit is not None:
        chunks = chunks[: max(1, limit // VALIDATION_TOKENS)]
    device = next(model.parameters()).device
    losses = [float(loss(chunk[:, :-1].to(device), chunk[:, 1:].to(device))) for chunk in chunks]
    return sum(losses) / len(losses)


def optimizer_state(number: int, groups: list[dict[str, Any]], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The state of optimizer `number` as `load_state_dict` takes it."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, *rest = name.split("/")
        if kind == "optimizer" and int(rest[0]) == number:
            state.setdefault(int(rest[1]), {})[rest[2]] = tensor
    return {"state": state, "param_groups": groups}


class Run:
    """One training run: model, optimizers, clock, log and saved state."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        self.finishing: bool = arguments.finish is not None
        self.schedule = FINISH if self.finishing else TRAIN if arguments.start is None else START
        self.budget_s: float = (arguments.finish if self.finishing else arguments.minutes) * 60.0
        self.seed: int = arguments.seed
        self.folder: Path = arguments.out / arguments.model
        self.work: Path = arguments.work / arguments.model
        self.work.mkdir(parents=True, exist_ok=True)
        self.state_path = self.work / ("finish.safetensors" if self.finishing else "state.safetensors")
        self.log_path = self.work / ("finish.jsonl" if self.finishing else "log.jsonl")
        torch.manual_seed(self.seed)
        domains = DOMAINS_OF.get(arguments.model, ("python",))
        corpora = {domain: load_domain(domain) for domain in domains}
        self.tokenizer = self._tokenizer(arguments, corpora)
        self.functions: Tensor | None = None
        self.streams: list[Tensor] = []
        for domain, corpus in corpora.items():
            texts = corpus.train
            if self.finishing:
                texts = clean_documents(corpus.train)
                self.functions = pack(shuffled(function_documents(texts)), self.tokenizer)
            chat = chat_turns(domain, corpus.train, FINISH_CHAT_SHARE if self.finishing else CHAT_SHARE, self.seed)
            self.streams.append(pack(shuffled([document.text for document in texts] + chat), self.tokenizer))
        held_out = [document.text for corpus in corpora.values() for document in corpus.validation]
        self.validation = pack(held_out if len(corpora) == 1 else shuffled(held_out), self.tokenizer)
        self.model = new_model(arguments.model).to(self.device)
        self.optimizers = optimizers(self.model)
        self.done = Progressed()
        if arguments.resume:
            self.done = self._load(self.state_path)
        elif self.finishing:
            self._load(self.work / "state.safetensors")
        elif arguments.start is not None:
            self.model.start_from(load_checkpoint(arguments.start, self.device))
            if isinstance(self.model, Mixture):
                self.model.lean_routers(self._rows_by_domain(LEANING_ROWS, length=256))
        compiled = (lambda f: torch.compile(f, dynamic=False)) if arguments.compile else (lambda f: f)
        self.plain_loss: Loss = compiled(self.model.training_loss)
        self.distil_loss: Loss | None = None
        if arguments.teacher is not None:
            self.distil_loss = compiled(distillation(self.model, load_checkpoint(arguments.teacher, self.device)))

    @staticmethod
    def _tokenizer(arguments: argparse.Namespace, corpora: dict[str, Corpus]) -> Tokenizer:
        """Trained once, with `demo`; every other model takes it over."""
        if arguments.model != "demo":
            return Tokenizer.from_file(str(demo_path("demo") / "tokenizer.json"))
        path: Path = arguments.work / "tokenizer.json"
        if not path.exists():
            write_atomically(path, train_tokenizer(corpora["python"].train).to_str().encode())
        return Tokenizer.from_file(str(path))

    def _rows_by_domain(self, rows: int, length: int) -> Tensor:
        """Some rows of each domain's text: [domains, rows, length]."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = [next(batches(stream, length, rows, generator))[:, :-1] for stream in self.streams]
        return torch.stack(drawn).to(self.device)

    def _load(self, path: Path) -> Progressed:
        """Take over a saved state's weights and optimizers; how far that run had come."""
        with safe_open(path, framework="pt") as opened:
            rest = json.loads(opened.metadata()["rest"])
        tensors = load_file(path, device=str(self.device))
        self.model.load_state_dict({name: tensors[f"model/{name}"] for name in self.model.state_dict()})
        for number, (optimizer, saved) in enumerate(zip(self.optimizers, rest["optimizers"], strict=True)):
            optimizer.load_state_dict(optimizer_state(number, saved, tensors))
        return Progressed(**rest["done"])

    def save(self) -> None:
        """Save what `--resume` and `--finish` need: tensors by name, everything else as JSON in the header."""
        tensors = {f"model/{name}": weight for name, weight in self.model.state_dict().items()}
        groups = []
        for number, optimizer in enumerate(self.optimizers):
            state = optimizer.state_dict()
            groups.append(state["param_groups"])
            for parameter, values in state["state"].items():
                tensors |= {f"optimizer/{number}/{parameter}/{key}": value for key, value in values.items()}
        rest = {"optimizers": groups, "done": asdict(self.done)}
        kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(self.state_path, save(kept, metadata={"rest": json.dumps(rest)}))

    def log(self, **figures: float | int | str) -> None:
        """Append one JSON line to the run's log."""
        record = {"steps": self.done.steps, "tokens": self.done.tokens, "elapsed_s": round(self.done.elapsed_s, 1)}
        with self.log_path.open("a") as file:
            file.write(json.dumps(record | figures) + "\n")

    def loss_at(self, progress: float) -> Loss:
        """Cross entropy; with a teacher, distillation in the second half."""
        first_phase = progress < self.schedule.phases[0][0]
        return self.plain_loss if self.distil_loss is None or first_phase else self.distil_loss

    def batches_of(self, length: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The steps' batches: as many rows of each domain; in the last phase half begin with a function alone."""
        rows = self.schedule.tokens_per_step // length
        if self.functions is None:
            share = rows // len(self.streams)
            for parts in zip(*(batches(s, length, share, generator) for s in self.streams), strict=True):
                yield torch.cat(parts)
            return
        alone = document_rows(self.functions, token_id(self.tokenizer, END_OF_TEXT), length, rows // 2, generator)
        files = batches(self.streams[0], length, rows - rows // 2, generator)
        for pair in zip(alone, files, strict=True):
            yield torch.cat(pair)

    def step(self, batch: Tensor, loss_function: Loss, factor: float) -> Tensor:
        """One optimizer step on [rows, length + 1] ids at `factor` of the peak rate; the loss."""
        batch = batch.to(self.device)
        loss = loss_function(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, peak in zip(self.optimizers, (MUON_LR, ADAMW_LR), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    def warm_up_compiler(self) -> None:
        """Compile every phase before the clock starts, without touching the weights."""
        start = 0.0
        for end, length in self.schedule.phases:
            rows = self.schedule.tokens_per_step // length
            tokens = torch.zeros(rows, length, dtype=torch.int64, device=self.device)
            self.loss_at(start)(tokens, tokens).backward()  # type: ignore[no-untyped-call]
            self.model.zero_grad()
            start = end

    def train(self, progress_bar: Progress) -> None:
        """Train until the time is spent; the state is saved on the way and at the end, the checkpoint at the end."""
        self.warm_up_compiler()
        task = progress_bar.add_task("train", total=self.budget_s, loss=float("nan"), speed=0.0)
        generator = torch.Generator().manual_seed(self.seed + self.done.tokens)
        length = 0
        source: Iterator[Tensor] = iter(())
        began = time.monotonic() - self.done.elapsed_s
        logged_s = saved_s = validated_s = self.done.elapsed_s
        saved_s -= SAVE_EVERY_S / 2
        tokens_logged, recent = self.done.tokens, torch.zeros((), device=self.device)
        steps_logged = self.done.steps
        while (progress := (time.monotonic() - began) / self.budget_s) < 1.0:
            if length != self.schedule.sequence_length(progress):
                length = self.schedule.sequence_length(progress)
                source = self.batches_of(length, generator)
            recent += self.step(next(source), self.loss_at(progress), self.schedule.learning_rate_factor(progress))
            self.done.steps += 1
            self.done.tokens += self.schedule.tokens_per_step
            now = self.done.elapsed_s = time.monotonic() - began
            if now - logged_s >= LOG_EVERY_S:
                mean = float(recent) / (self.done.steps - steps_logged)
                speed = (self.done.tokens - tokens_logged) / (now - logged_s)
                self.log(loss=round(mean, 4), tokens_per_s=round(speed), sequence=length)
                progress_bar.update(task, completed=now, loss=mean, speed=speed)
                logged_s, tokens_logged, steps_logged = now, self.done.tokens, self.done.steps
                recent.zero_()
            if now - saved_s >= SAVE_EVERY_S:
                self.save()
                saved_s = now
            if now - validated_s >= VALIDATE_EVERY_S:
                self.log(validation=round(validation_loss(self.model, self.validation, self.model.loss, 16384), 4))
                validated_s = now
        self.save()
        export(self.model, self.tokenizer, self.folder)
        final = validation_loss(self.model, self.validation, self.model.loss, FINAL_VALIDATION_TOKENS)
        self.log(validation_final=round(final, 4))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="demo")
    parser.add_argument("--minutes", type=float, default=78.0, help="training time, compilation not counted")
    parser.add_argument(
        "--finish",
        type=float,
        metavar="MINUTES",
        help="the last phase of demo, on cleaner text",
    )
    parser.add_argument(
        "--start", type=Path, help="checkpoint to begin from: of the same shape, or what a mixture grows from"
    )
    parser.add_argument("--teacher", type=Path, help="checkpoint to distil from in the second half of the time")
    parser.add_argument("--device", default="auto", help="auto (cuda if there is one, else cpu), cpu or cuda")
    parser.add_argument("--out", type=Path, default=HERE / "ganglion" / "models", help="where checkpoints go")
    parser.add_argument("--work", type=Path, default=HERE / ".work", help="state, logs and the tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--resume", action="store_true", help="go on from the saved state")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run without torch.compile")
    arguments = parser.parse_args()
    if arguments.finish is not None and arguments.teacher is not None:
        parser.error("--finish trains on the text alone; leave --teacher out")
    if arguments.finish is not None and arguments.model in DOMAINS_OF:
        parser.error(f"--finish cleans Python; {arguments.model} is trained on other text too")
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    return arguments


def main() -> None:
    """Train one model."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%  loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tokens/s"),
        TimeElapsedColumn(),
    )
    run = Run(arguments)
    with Progress(*columns) as progress_bar:
        run.train(progress_bar)


if __name__ == "__main__":
    main()
