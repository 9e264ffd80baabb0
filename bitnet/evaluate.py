"""Measure a model on unseen text: loss, perplexity and bits per byte.

Loss in nats per token depends on the tokenizer (longer tokens make fewer and harder predictions),
so it compares only runs with the same tokenizer. Bits per byte divides the same total by the bytes
of the text,

    bits_per_byte = sum of -log2 p(token | tokens before it) / bytes of the text,

so it compares models with different tokenizers, and models with compressors: it is the size of the
text, in bits per byte, after arithmetic coding with the model's probabilities.

The text is cut into windows of the context length that do not overlap. Each token except the first
is predicted once. The first tokens of a window are predicted from little context. Sliding windows
(bitnet/perplexity.py) give somewhat better numbers and cost several times as much. Sums are in
float64 and the softmax in fp32; the result depends on the batch size only by rounding.
"""

import gzip
import lzma
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.data.tokenizer import Tokenizer
from bitnet.data.windows import text_windows
from bitnet.linear import weights_quantized
from bitnet.model import Transformer
from bitnet.schema import STRICT, Count, Positive, UserError
from bitnet.training.distributed import World

_CPU_LOGITS, _GPU_LOGITS = 2**23, 2**28
"""Logits computed together if no batch size is given: 32 MiB and 1 GiB in fp32. The softmax needs
the same amount again. A CPU gains nothing from more: at 4M parameters, windows of 256 and a
vocabulary of 4096, a token in a batch of 64 windows takes up to 3 times as long as in a batch of 8
(2 threads)."""


@dataclass(frozen=True, config=STRICT)
class EvalConfig:
    """The ``[eval]`` section: measurements on the validation split during a run."""

    every: Positive = 250
    """steps between evaluations (the last step is always evaluated)"""
    max_tokens: Count = 0
    """validation tokens per evaluation, in windows spread over the split (for a mixture: per part);
    0 = all"""
    micro_batch: Count = 0
    """sequences per forward; 0 = as many as keep the logits within 32 MiB (CPU) or 1 GiB (GPU)"""
    sample_prompt: str = ""
    """prompt of the text that each evaluation samples; "" = the start of a document"""
    sample_tokens: Count = 64
    """tokens of that sample; 0 = no sample"""


class EvalResult(NamedTuple):
    """The result of an evaluation."""

    loss: float
    """mean negative log likelihood per token, in nats"""
    bits_per_byte: float
    """total negative log likelihood in bits, divided by the bytes of the text"""
    tokens: int
    """tokens predicted"""
    bytes: int
    """bytes of UTF-8 in those tokens"""
    nats_per_word: float = math.nan
    """the same loss per word; white space separates words (only for a text)"""

    @property
    def perplexity(self) -> float:
        """Per token: exp(loss); infinite if a float cannot hold it."""
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float:
        """Per word: exp(nats_per_word); infinite if a float cannot hold it."""
        return _exp(self.nats_per_word)


def _exp(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)


def evaluate_windows(
    model: Transformer,
    windows: Iterable[Tensor],
    count_bytes: Callable[[Tensor], int],
    batch_size: int = 0,
    world: World | None = None,
) -> EvalResult:
    """Evaluate on windows of tokens from ``bitnet.data.loader.sequential_windows``.

    End-of-document tokens are predicted like any other and count 0 bytes.

    Arguments:
        model: evaluated on its device, in eval mode (restored afterwards), under the caller's
            autocast if there is one.
        windows: integers ``[T + 1]`` each: T inputs and, shifted by one, T targets. T may vary.
        count_bytes: counts the bytes of text in the targets ``window[1:]`` of a window
            (``Tokenizer.count_bytes``).
        batch_size: windows per forward; 0 = as many as keep the logits within 32 MiB on a CPU,
            1 GiB elsewhere. If a single window has more logits, the model's forward computes its
            loss in parts (:func:`bitnet.loss.head_loss`).
        world: the processes that divide the work. Each passes all windows; all get the result.

    Raises:
        UserError: the windows hold nothing to predict.
    """
    n_bytes = 0

    def counted() -> Iterator[Tensor]:
        nonlocal n_bytes
        for window in windows:
            n_bytes += count_bytes(window)
            yield window

    nats, tokens = _negative_log_likelihood(model, counted(), batch_size, world)
    return _result(nats, tokens, n_bytes)


def mixed(results: Sequence[EvalResult], weights: Sequence[float]) -> EvalResult:
    """The result on a text whose tokens come from several sources, mixed as in training.

    The loss and the bytes per token are the weighted means over the sources. The counts of tokens
    and bytes are sums.

    Arguments:
        results: one per source; a single one is returned as it is. weights: one per source,
            positive; their sum need not be 1.
    """
    if len(results) == 1:
        return results[0]
    shares = [weight / sum(weights) for weight in weights]
    loss = sum(p * result.loss for p, result in zip(shares, results, strict=True))
    token_bytes = sum(p * r.bytes / r.tokens for p, r in zip(shares, results, strict=True))
    tokens, n_bytes = sum(r.tokens for r in results), sum(r.bytes for r in results)
    return EvalResult(loss, loss / math.log(2) / token_bytes, tokens, n_bytes)


def evaluate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    batch_size: int = 0,
    track: Callable[[list[Tensor]], Iterable[Tensor]] = iter,
    context: int = 0,
) -> EvalResult:
    """Evaluate on a text taken as one document, predicting every token of it.

    The first token's context is the end-of-document token, as in training. The end of the text is
    not predicted. ``bytes`` is the length of the text in UTF-8.

    Arguments:
        model, batch_size: see :func:`evaluate_windows`.
        track: wraps the windows to show progress, as ``bitnet.progress.Reports.track`` does.
        context: tokens of a window; 0 = the model's context.
    Raises:
        UserError: the text is empty, or the tokenizer is not the model's.
    """
    check_text_fits(model, tokenizer, text)
    windows = text_windows(tokenizer, text, context or model.config.max_seq_len)
    nats, tokens = _negative_log_likelihood(model, track(windows), batch_size)
    return of_text(nats / tokens, tokens, tokens, text)


def check_text_fits(model: Transformer, tokenizer: Tokenizer, text: str) -> None:
    """Raise UserError if a text is empty, or the tokenizer has more tokens than the model."""
    if not text:
        raise UserError("the text to evaluate is empty")
    vocab_size = model.config.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, "
            f"the model only {vocab_size}: they do not belong together"
        )


def of_text(loss: float, predicted: int, tokens: int, text: str) -> EvalResult:
    """The result on a text of ``tokens`` tokens, all or nearly all of them predicted. The mean loss
    of the predicted tokens stands for all, per byte and per word."""
    nats = loss * tokens
    words = len(text.split())
    return EvalResult(
        loss=loss,
        bits_per_byte=nats / math.log(2) / len(text.encode()),
        tokens=predicted,
        bytes=len(text.encode()),
        nats_per_word=nats / words if words else math.nan,
    )


def compressor_baselines(text: bytes) -> dict[str, float]:
    """Bits per byte that ``gzip -9`` and ``xz -9`` reach on a text, for comparison.

    Their output is enough to unpack the text. A model's bits per byte leave out the model's size.

    Raises:
        UserError: the text is empty.
    """
    if not text:
        raise UserError("the text to compress is empty")
    return {
        "gzip -9": 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }


def logits_at_once(device: torch.device) -> int:
    """The largest number of logits that an evaluation computes together on a device."""
    return _CPU_LOGITS if device.type == "cpu" else _GPU_LOGITS


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside the block; afterwards each module has its old mode again.

    The weights of BitLinears are quantized once, on entry
    (:func:`bitnet.linear.weights_quantized`, which raises RuntimeError if they change inside).

    This is not ``torch.inference_mode``: training could not use a tensor that a module keeps from
    a forward in that mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), weights_quantized(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _result(nats: float, tokens: int, n_bytes: int) -> EvalResult:
    if tokens == 0 or n_bytes == 0:
        raise UserError("there is nothing to evaluate on: the data hold no text to predict")
    return EvalResult(
        loss=nats / tokens,
        bits_per_byte=nats / math.log(2) / n_bytes,
        tokens=tokens,
        bytes=n_bytes,
    )


def _negative_log_likelihood(
    model: Transformer, windows: Iterable[Tensor], batch_size: int, world: World | None = None
) -> tuple[float, int]:
    """The summed loss of all predictions, in nats, and their number."""
    device = model.norm.weight.device
    world = world or World(device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    max_predictions = logits_at_once(device) // model.config.vocab_size
    with evaluation_mode(model):
        for batch, counts in _share(_batches(windows, batch_size, max_predictions), world):
            batch_BT = batch.to(device, torch.int64)
            inputs, targets = batch_BT[:, :-1], batch_BT[:, 1:]
            if batch_size or inputs.numel() <= max_predictions:
                nats = _nats(model(inputs), targets)
            else:  # a single window with too many logits: the forward computes its loss in parts
                nats = model(inputs, targets).double() * targets.numel()
            if counts:
                total += nats
                tokens += targets.numel()
    if world.data_size > 1:
        total, count = world.sum(torch.stack([total, total.new_tensor(tokens)]))
        tokens = int(count)
    return float(total), tokens


def _share(batches: Iterator[Tensor], world: World) -> Iterator[tuple[Tensor, bool]]:
    """This process's batches, dealt in turns, and whether each counts. If there are too few for the
    last round, the processes without one repeat the main one's batch, which counts only there:
    sharded weights need all processes in each forward."""
    rank = world.data_rank
    while dealt := list(islice(batches, world.data_size)):
        mine = rank < len(dealt)
        yield dealt[rank if mine else 0], mine


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the negative log likelihoods of ``[...]`` targets under ``[..., V]`` logits: fp64."""
    flat = logits.float().flatten(0, -2)
    return F.cross_entropy(flat, targets.flatten(), reduction="none").double().sum()


def _batches(windows: Iterable[Tensor], batch_size: int, max_predictions: int) -> Iterator[Tensor]:
    """Stack neighbouring windows of equal length: ``batch_size`` of them. 0: as many as have at
    most ``max_predictions``, and at least one."""
    batch: list[Tensor] = []
    for window in windows:
        if len(window) < 2:
            continue
        limit = batch_size or max(1, max_predictions // (len(window) - 1))
        if batch and (len(batch) == limit or len(batch[0]) != len(window)):
            yield torch.stack(batch)
            batch = []
        batch.append(window)
    if batch:
        yield torch.stack(batch)
