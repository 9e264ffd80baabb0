"""Distillation: a quantized student learns a full-precision teacher's predictions and attention.

Two terms are added to the cross-entropy. Both are Kullback-Leibler divergences from teacher to
student, in fp32 for any dtype of the forward::

    logits      T^2 * KL(softmax(z_t / T) || softmax(z_s / T)), mean over tokens
                (Hinton, arXiv 1503.02531; T^2 keeps its gradient's size independent of T)
    attention   mean over X in {Q, K, V}, heads and tokens of KL(R(X_t) || R(X_s)),
                R(X) = softmax(X X^T / sqrt(d)) of one head's states X [T, d]
                (MiniLMv2, arXiv 2012.15828; one late layer suffices: BitDistill, arXiv 2510.13998)

Relations compare tokens with tokens, so teacher and student may differ in width: the states of each
projection are cut into ``relation_heads`` parts, independent of the attention's own heads.

**Weights.** Published weights (10 for logits, 1e5 for attention) fit one model and one data set. If
one term dominates the others, the student ends worse than with plain fine-tuning. So weights here
are ratios of gradient norms. ``balance`` takes a tensor that a term shares with the cross-entropy,
and scales the term so that the norm of its gradient there is the configured multiple of the
cross-entropy's. For the logits term that tensor is the logits. For the relations it is the input of
their layer's projections, the last tensor that both depend on. The norms are measured on the first
micro-batch every ``balance_every`` steps (two more backward passes per term, down to that tensor).
The scales are kept in between and in the checkpoint.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from einops import rearrange
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bitnet.export.folder import load
from bitnet.model import Transformer
from bitnet.schema import STRICT, Positive, UserError
from bitnet.training.distributed import World

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=STRICT)
class DistillConfig:
    """The ``[distill]`` section: a teacher and the weights of its terms."""

    teacher: str = ""
    """model folder of the teacher (same tokenizer as the student); "" = no distillation"""
    device: str = ""
    """device of the teacher; "" = the student's"""
    logits: _Weight = 1.0
    """weight of the loss against the teacher's next-token distribution; 0 = off"""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0
    """divides the logits of teacher and student before they are compared"""
    attention: _Weight = 1.0
    """weight of the loss on relations among queries, keys and values; 0 = off"""
    attention_layer: Annotated[int, Field(lt=0, ge=-1000)] = -1
    """layer whose relations are learned; -1 = the last layer of each model, -2 = the one before"""
    relation_heads: Positive = 8
    """heads that a projection's output is split into; must divide its width in both models"""
    balance: bool = True
    """before its weight, scale each term to the cross-entropy's gradient norm; false = do not"""
    balance_every: Positive = 50
    """steps between measurements of these norms"""


def logit_loss(student_BTV: Tensor, teacher_BTV: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(teacher || student)`` of next-token distributions, mean over tokens: fp32 ``[]``.

    Arguments:
        student_BTV, teacher_BTV: logits ``[..., V]``, any float dtype (the sums are in fp32).
    """
    loss: Tensor = _Divergence.apply(student_BTV, teacher_BTV, temperature)
    return loss * temperature**2


def relation_loss(student_BTD: Tensor, teacher_BTD: Tensor, heads: int) -> Tensor:
    """KL of the relations among a projection's states, mean over heads and tokens: fp32 ``[]``.

    Arguments:
        student_BTD, teacher_BTD: ``[B, T, width]``; widths may differ. heads: divides both.
    """
    loss: Tensor = _Divergence.apply(
        _relations(student_BTD, heads), _relations(teacher_BTD, heads), 1.0
    )
    return loss


def _relations(states_BTD: Tensor, heads: int) -> Tensor:
    """Logits of R between all pairs of tokens: ``[B, T, heads * d]`` -> ``[B, heads, T, T]``."""
    x = rearrange(states_BTD.float(), "b t (h d) -> b h t d", h=heads)
    return x @ x.transpose(-1, -2) / math.sqrt(x.shape[-1])


_CPU_CHUNK, _GPU_CHUNK = 2**18, 2**26
"""Logits per chunk. CPU: 1 MiB in fp32 stays in the cache; fresh tensors of many MiB cost page
faults in each operation. GPU: 256 MiB, large enough to fill the device."""


class _Divergence(torch.autograd.Function):
    """``KL(softmax(teacher / T) || softmax(student / T))`` over the last axis, averaged over rows,
    from logits: fp32 ``[]``. Differentiable once, in the student.

    The gradient, ``(softmax(student / T) - softmax(teacher / T)) / (M T)`` for M rows, is computed
    in the forward, chunk by chunk, and is all that is kept for the backward.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        student_MV, teacher_MV = student.flatten(0, -2), teacher.flatten(0, -2)
        limit = _CPU_CHUNK if student.device.type == "cpu" else _GPU_CHUNK
        rows = max(1, limit // student.shape[-1])
        gradient_MV = torch.empty_like(student_MV, dtype=torch.float32)
        sums = []
        for ours_MV, theirs_MV, part_MV in zip(
            student_MV.split(rows), teacher_MV.split(rows), gradient_MV.split(rows), strict=True
        ):
            log_student = F.log_softmax(ours_MV.float() / temperature, -1)
            log_teacher = F.log_softmax(theirs_MV.float() / temperature, -1)
            taught = log_teacher.exp()
            sums.append((taught * (log_teacher - log_student)).sum())
            torch.sub(log_student.exp_(), taught, out=part_MV)
        ctx.save_for_backward(gradient_MV)
        ctx.shape, ctx.dtype = student.shape, student.dtype
        ctx.scale = 1 / (len(student_MV) * temperature)
        return torch.stack(sums).sum() / len(student_MV)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient_MV,) = ctx.saved_tensors
        gradient = (gradient_MV * (grad * ctx.scale)).reshape(ctx.shape)
        return gradient.to(ctx.dtype), None, None


class Distiller:
    """The teacher of a student in training.

    Arguments:
        teacher: on its device; is put in eval mode, without gradients.
        student: on its device, with its final modules; hooks are added to them.
        config: with weights and layer.
        bf16: run the teacher under bf16 autocast.
        world: the processes that share each step; all have the same scales.
    Raises:
        UserError: teacher and student do not fit together; names the key.
    """

    def __init__(
        self,
        teacher: Transformer,
        student: Transformer,
        config: DistillConfig,
        bf16: bool,
        world: World | None = None,
    ) -> None:
        self.config = config
        self._world = world or World(student.norm.weight.device)
        self._teacher = teacher.eval().requires_grad_(False)
        self._device = teacher.norm.weight.device
        self._bf16 = bf16
        self._scales = {"logits": config.logits, "attention": config.attention}
        self._terms: dict[str, list[Tensor]] = {}
        self._balance_due = False
        self._student_states: _States | None = None
        self._teacher_states: _States | None = None
        if config.attention:
            self._student_states = _States(student, config.attention_layer, student=True)
            self._teacher_states = _States(self._teacher, config.attention_layer, student=False)

    def begin(self, step: int) -> None:
        """Begin a step. Every ``balance_every`` steps, its first micro-batch measures the norms."""
        self._balance_due = self.config.balance and step % self.config.balance_every == 0

    def losses(
        self, student: nn.Module, tokens_BT: Tensor, targets_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of a micro-batch, and its sum with the terms of distillation: fp32 ``[]``
        (:data:`bitnet.training.step.Losses`).

        Arguments:
            student: the constructor's student, wrapped or not. Its forward runs under the caller's
                autocast, the rest in fp32.
        """
        logits_BTV = student(tokens_BT)
        with torch.autocast(logits_BTV.device.type, enabled=False):
            cross_entropy = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())
            return cross_entropy, cross_entropy + self.lesson(tokens_BT, logits_BTV, cross_entropy)

    def lesson(self, inputs_BT: Tensor, logits_BTV: Tensor, cross_entropy: Tensor) -> Tensor:
        """The weighted terms of a micro-batch, summed: fp32 ``[]``. Call outside autocast.

        Arguments:
            inputs_BT, logits_BTV: input and result of the student's last forward.
            cross_entropy: of these logits, still with its graph.
        """
        with (
            torch.no_grad(),
            torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16),
        ):
            taught_BTV = self._teacher(inputs_BT.to(self._device)).to(logits_BTV.device)
        terms: dict[str, tuple[Tensor, Tensor]] = {}  # name -> term, tensor shared with the loss
        if self.config.logits:
            term = logit_loss(logits_BTV, taught_BTV, self.config.temperature)
            terms["logits"] = term, logits_BTV
        if self._student_states is not None and self._teacher_states is not None:
            shared, ours = self._student_states.take()
            _, theirs = self._teacher_states.take()
            heads = self.config.relation_heads
            each = [
                relation_loss(a, b.to(a.device), heads) for a, b in zip(ours, theirs, strict=True)
            ]
            terms["attention"] = torch.stack(each).mean(), shared
        total = torch.zeros((), device=logits_BTV.device, dtype=torch.float32)
        for name, (term, shared) in terms.items():
            if self._balance_due:
                self._balance(name, term, cross_entropy, shared)
            self._terms.setdefault(name, []).append(term.detach())
            total = total + self._scales[name] * term
        self._balance_due = False
        return total

    def _balance(self, name: str, term: Tensor, cross_entropy: Tensor, shared: Tensor) -> None:
        """Set the scale. If either norm is 0 or not finite, the old scale stays."""
        (of_loss,) = torch.autograd.grad(cross_entropy, shared, retain_graph=True)
        (of_term,) = torch.autograd.grad(term, shared, retain_graph=True)
        norms = torch.stack([of_loss.float().norm(), of_term.float().norm()])
        if self._world.size > 1:  # each process has other rows of the same tensor
            norms = self._world.sum(norms.double().square()).sqrt()
        weight = getattr(self.config, name)
        scale = float(weight * norms[0] / norms[1])
        if math.isfinite(scale) and scale > 0:
            self._scales[name] = scale

    def readings(self) -> dict[str, float]:
        """For a line of metrics: each term (mean over the micro-batches of all processes since the
        last call) and its scale in the loss. All processes call it."""
        row: dict[str, float] = {}
        for name, values in self._terms.items():
            row[f"distill/{name}"] = float(self._world.mean(torch.stack(values).mean()))
            row[f"distill/{name}_scale"] = self._scales[name]
        self._terms = {}
        return row

    def state(self) -> dict[str, float]:
        """The state for a checkpoint, as JSON."""
        return dict(self._scales)

    def load_state(self, state: dict[str, float]) -> None:
        """Continue from :meth:`state`."""
        self._scales = dict(state)


class _States:
    """Records the input and the outputs of one layer's projections by forward hooks: for a student
    only in training mode, for a teacher always."""

    def __init__(self, model: Transformer, layer: int, *, student: bool) -> None:
        self._model, self._is_student = model, student
        self._input: Tensor | None = None
        self._outputs: dict[str, Tensor] = {}
        attention = f"layers.{model.config.n_layers + layer}.self_attn"
        for name in PROJECTIONS:
            projection = model.get_submodule(f"{attention}.{name}")
            projection.register_forward_hook(self._on_output(name))
            if name == PROJECTIONS[0]:  # all three get the same input
                projection.register_forward_pre_hook(self._on_input)

    def _listening(self) -> bool:
        return self._model.training or not self._is_student

    def _on_input(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if self._listening():
            self._input = args[0]
            if self._is_student and not args[0].requires_grad:  # all layers below are frozen
                args[0].requires_grad_()

    def _on_output(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self._listening():
                self._outputs[name] = output

        return hook

    def take(self) -> tuple[Tensor, list[Tensor]]:
        """Return and drop the input ``[B, T, D]`` and the outputs of the last forward."""
        shared, self._input = self._input, None
        assert shared is not None, "take() belongs to a forward"
        return shared, [self._outputs.pop(name) for name in PROJECTIONS]


def load_teacher(
    config: DistillConfig, student: Transformer, tokenizer_hash: str, seq_len: int, device: Any
) -> Transformer:
    """Load the teacher of a config and check it against the student.

    Arguments:
        tokenizer_hash: of the data's tokenizer. seq_len: tokens in a training sequence.
    Raises:
        UserError: another vocabulary, too short a context, or shapes whose relations cannot be
            compared; names the key.
    """
    folder = Path(config.teacher)
    teacher, tokenizer = load(folder, device)
    where = f"distill.teacher = {config.teacher}"
    vocabularies = teacher.config.vocab_size, student.config.vocab_size
    if tokenizer.hash != tokenizer_hash or len(set(vocabularies)) > 1:
        raise UserError(
            f"{where}: its tokenizer is not the one of the data; set data.tokenizer = "
            f"{str(tokenizer.path)!r}, or take a teacher of this vocabulary"
        )
    if teacher.config.max_seq_len < seq_len:
        raise UserError(
            f"{where}: its context of {teacher.config.max_seq_len} tokens is shorter than "
            f"data.seq_len = {seq_len}"
        )
    if config.attention:
        _check_relations(config, teacher, student)
    return teacher


def _check_relations(config: DistillConfig, teacher: Transformer, student: Transformer) -> None:
    n_layers = min(teacher.config.n_layers, student.config.n_layers)
    if -config.attention_layer > n_layers:
        raise UserError(
            f"distill.attention_layer = {config.attention_layer}: one of the models has only "
            f"{n_layers} layers; the nearest is {-n_layers}"
        )
    widths = [
        model.config.matrices()[f"self_attn.{name}"][0]
        for model in (teacher, student)
        for name in PROJECTIONS
    ]
    common = math.gcd(*widths)
    if common % config.relation_heads:
        fitting = [n for n in range(1, common + 1) if common % n == 0]
        nearest = min(fitting, key=lambda n: abs(n - config.relation_heads))
        raise UserError(
            f"distill.relation_heads = {config.relation_heads} does not divide the widths of "
            f"queries, keys and values ({', '.join(map(str, sorted(set(widths))))}); the nearest "
            f"that does is {nearest}"
        )
