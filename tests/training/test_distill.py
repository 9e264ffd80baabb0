"""Distillation: losses against float64 numpy, gradients by finite differences, and the balance."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from bitnet.data.tokenizer import Tokenizer, train_tokenizer
from bitnet.export.folder import save_model
from bitnet.model import ModelConfig, Transformer
from bitnet.schema import UserError
from bitnet.training.distill import (
    DistillConfig,
    Distiller,
    load_teacher,
    logit_loss,
    relation_loss,
)
from bitnet.training.distributed import World
from tests.helpers.ranks import on_ranks


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numpy_kl(teacher: np.ndarray, student: np.ndarray) -> float:
    return float((teacher * (np.log(teacher) - np.log(student))).sum(-1).mean())


def numpy_logit_loss(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    kl = numpy_kl(softmax(teacher / temperature), softmax(student / temperature))
    return kl * temperature**2


def numpy_relations(states: np.ndarray, heads: int) -> np.ndarray:
    batch, tokens, width = states.shape
    size = width // heads
    relations = np.empty((batch, heads, tokens, tokens))
    for b in range(batch):
        for h in range(heads):
            part = states[b, :, h * size : (h + 1) * size]
            relations[b, h] = softmax(part @ part.T / np.sqrt(size))
    return relations


def numpy_relation_loss(student: np.ndarray, teacher: np.ndarray, heads: int) -> float:
    return numpy_kl(numpy_relations(teacher, heads), numpy_relations(student, heads))


def check_gradient(loss: Tensor, x: Tensor, reference: object, rng: np.random.Generator) -> None:
    """Against central differences of the float64 reference, along random directions."""
    (gradient,) = torch.autograd.grad(loss, x)
    values = x.detach().double().numpy()
    for _ in range(5):
        direction = rng.standard_normal(values.shape)
        direction /= np.linalg.norm(direction)
        h = 1e-5
        slope = (reference(values + h * direction) - reference(values - h * direction)) / (2 * h)  # type: ignore[operator]
        assert float((gradient.double() * torch.from_numpy(direction)).sum()) == pytest.approx(
            slope, rel=1e-3, abs=1e-6
        )


@pytest.mark.parametrize("temperature", [1.0, 2.5, 5.0])
def test_logit_loss(temperature: float) -> None:
    rng = np.random.default_rng(0)
    student = torch.from_numpy(rng.standard_normal((2, 3, 11)) * 4).float().requires_grad_()
    teacher = torch.from_numpy(rng.standard_normal((2, 3, 11)) * 4).float()
    loss = logit_loss(student, teacher, temperature)
    taught = teacher.double().numpy()
    ours = student.detach().double().numpy()
    assert loss.item() == pytest.approx(numpy_logit_loss(ours, taught, temperature), rel=1e-5)
    check_gradient(loss, student, lambda x: numpy_logit_loss(x, taught, temperature), rng)
    assert logit_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("ours", "theirs", "heads"), [(12, 12, 1), (12, 20, 4), (6, 15, 3)])
def test_relation_loss_of_other_widths(ours: int, theirs: int, heads: int) -> None:
    rng = np.random.default_rng(1)
    student = torch.from_numpy(rng.standard_normal((2, 5, ours)) * 2).float().requires_grad_()
    teacher = torch.from_numpy(rng.standard_normal((2, 5, theirs)) * 2).float()
    loss = relation_loss(student, teacher, heads)
    taught = teacher.double().numpy()
    wanted = numpy_relation_loss(student.detach().double().numpy(), taught, heads)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert loss.item() > 0
    check_gradient(loss, student, lambda x: numpy_relation_loss(x, taught, heads), rng)
    assert relation_loss(teacher, teacher, heads).item() == pytest.approx(0, abs=1e-6)


def test_chunks_of_rows_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """7 x 3 rows of 40, in chunks of 2 rows with one left over: loss and gradient as without."""
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 3, 40, requires_grad=True), torch.randn(7, 3, 40)
    whole = logit_loss(student, teacher, 2.0)
    (of_whole,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr("bitnet.training.distill._CPU_CHUNK", 99)
    parts = logit_loss(student, teacher, 2.0)
    (of_parts,) = torch.autograd.grad(parts, student)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
    assert torch.equal(of_parts, of_whole)  # rows do not know of each other
    log_q, log_p = (F.log_softmax(x / 2, -1) for x in (student.detach(), teacher))
    wanted = 2 * (log_q.exp() - log_p.exp()) / 21
    torch.testing.assert_close(of_whole, wanted)
    turned = logit_loss(student.transpose(0, 1), teacher.transpose(0, 1), 2.0)  # other strides
    assert torch.equal(torch.autograd.grad(turned, student)[0], of_whole)


def test_losses_are_fp32_whatever_comes_in() -> None:
    x, y = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    for dtype in (torch.bfloat16, torch.float16):
        a, b = x.to(dtype), y.to(dtype)
        assert logit_loss(a, b, 5.0).dtype == torch.float32
        assert torch.equal(logit_loss(a, b, 5.0), logit_loss(a.float(), b.float(), 5.0))
        assert torch.equal(relation_loss(a, b, 2), relation_loss(a.float(), b.float(), 2))


def transformer(seed: int, **options: object) -> Transformer:
    torch.manual_seed(seed)
    values: dict[str, object] = {
        **{"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48},
        **{"vocab_size": 50, "max_seq_len": 16, "linear": "fp"},
    }
    model = Transformer(ModelConfig(**(values | options)))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # initial logits are nearly uniform; these are not
    return model


def forward(student: Transformer, distiller: Distiller, step: int, first: bool = True) -> tuple:
    torch.manual_seed(9)
    tokens, targets = torch.randint(50, (3, 8)), torch.randint(50, (3, 8))
    student.train()
    logits = student(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    if first:
        distiller.begin(step)
    return logits, loss, distiller.lesson(tokens, logits, loss)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_balance_gives_each_term_its_multiple_of_the_gradient_norm(weight: float) -> None:
    student, teacher = transformer(0), transformer(1, d_model=64, n_layers=3)
    hidden: list[Tensor] = []
    student.layers[-1].self_attn.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    for name in ("logits", "attention"):
        hidden.clear()
        weights = {"logits": 0.0, "attention": 0.0} | {name: weight}
        distiller = Distiller(teacher, student, DistillConfig(**weights), False)
        logits, loss, added = forward(student, distiller, 0)
        shared = logits if name == "logits" else hidden[0]
        (of_loss,) = torch.autograd.grad(loss, shared, retain_graph=True)
        (of_term,) = torch.autograd.grad(added, shared)
        assert float(of_term.norm() / of_loss.norm()) == pytest.approx(weight, rel=1e-4)
        reading = distiller.readings()
        scale = reading[f"distill/{name}_scale"]
        assert added.item() == pytest.approx(scale * reading[f"distill/{name}"], rel=1e-5)
        assert distiller.state()[name] == scale
        assert distiller.readings() == {}


def test_scales_are_measured_when_due_and_kept_in_between() -> None:
    student, teacher = transformer(0), transformer(1)
    distiller = Distiller(teacher, student, DistillConfig(balance_every=5), False)
    forward(student, distiller, 1)
    assert distiller.state() == {"logits": 1.0, "attention": 1.0}
    forward(student, distiller, 5, first=False)
    assert distiller.state() == {"logits": 1.0, "attention": 1.0}
    forward(student, distiller, 5)
    measured = distiller.state()
    assert all(scale != 1.0 for scale in measured.values())
    with torch.no_grad():
        student.embed_tokens.weight.mul_(2)
    forward(student, distiller, 6)
    assert distiller.state() == measured
    other = Distiller(teacher, student, DistillConfig(balance_every=5), False)
    other.load_state(measured)
    a, b = forward(student, distiller, 7)[2], forward(student, other, 7)[2]
    assert torch.equal(a, b)
    forward(student, distiller, 10)
    assert distiller.state() != measured


def lessons(size: int) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Scales and readings of this process, which has a part of 4 sequences; then those where the
    loss of rank 0 alone is not finite."""
    rank, found = dist.get_rank(), []
    world = World(torch.device("cpu"), rank, size)
    student, teacher = transformer(0), transformer(1, n_layers=3)
    distiller = Distiller(teacher, student.train(), DistillConfig(), False, world)
    torch.manual_seed(9)
    tokens, targets = torch.randint(50, (4, 8)), torch.randint(50, (4, 8))
    for spoil in (1.0, math.nan):
        distiller.begin(0)
        logits = student(tokens.chunk(size)[rank])
        loss = F.cross_entropy(logits.flatten(0, 1), targets.chunk(size)[rank].flatten())
        distiller.lesson(tokens.chunk(size)[rank], logits, loss * (spoil if rank == 0 else 1))
        found.append((distiller.state(), distiller.readings()))
    return found


def test_processes_have_the_scales_of_their_whole_batch(tmp_path: Path) -> None:
    """Their sum of gradients else belongs to no loss, and the checkpoint has the main one's."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    (alone,) = on_ranks(lessons, 1, folders[0], 1)
    both = on_ranks(lessons, 2, folders[1], 2)
    assert both[0] == both[1]
    for ours, theirs in zip(both[0], alone, strict=True):
        for part, expected in zip(ours, theirs, strict=True):
            assert part == pytest.approx(expected, rel=1e-5)


def test_plain_weights_and_terms_that_are_off() -> None:
    student, teacher = transformer(0), transformer(1)
    config = DistillConfig(logits=10.0, attention=3.0, balance=False, temperature=2.0)
    distiller = Distiller(teacher, student, config, False)
    logits, _, added = forward(student, distiller, 0)
    torch.manual_seed(9)
    taught = teacher(torch.randint(50, (3, 8)))
    reading = distiller.readings()
    assert reading["distill/logits"] == pytest.approx(logit_loss(logits, taught, 2.0).item())
    assert added.item() == pytest.approx(
        10 * reading["distill/logits"] + 3 * reading["distill/attention"], rel=1e-5
    )
    off = Distiller(teacher, student, DistillConfig(logits=0.0, attention=0.0), False)
    assert forward(student, off, 0)[2].item() == 0
    assert off.readings() == {}


def test_a_student_that_is_its_teacher_keeps_its_scales() -> None:
    student, teacher = transformer(0), transformer(0)
    distiller = Distiller(teacher, student, DistillConfig(logits=2.0), False)
    _, loss, added = forward(student, distiller, 0)
    assert added.item() == pytest.approx(0, abs=1e-4)
    (loss + added).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
    assert all(math.isfinite(scale) for scale in distiller.state().values())


@pytest.mark.parametrize(
    ("of_loss", "of_term"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (math.nan, 1.0)]
)
def test_norms_that_give_no_ratio_leave_the_scale(of_loss: float, of_term: float) -> None:
    """A gradient of 0, as of a student that is its teacher, or NaN."""
    distiller = Distiller(transformer(0), transformer(1), DistillConfig(logits=2.0), False)
    distiller.load_state({"logits": 7.0, "attention": 1.0})
    shared = torch.ones(3, requires_grad=True)
    distiller._balance("logits", (shared * of_term).sum(), (shared * of_loss).sum(), shared)
    assert distiller.state()["logits"] == 7.0
    distiller._balance("logits", (shared * 4).sum(), (shared * 3).sum(), shared)
    assert distiller.state()["logits"] == pytest.approx(2 * 3 / 4)


def test_the_teacher_is_not_touched() -> None:
    student, teacher = transformer(0), transformer(1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    distiller = Distiller(teacher, student, DistillConfig(), False)
    _, loss, added = forward(student, distiller, 0)
    (loss + added).backward()
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[n]) for n, tensor in teacher.state_dict().items())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_evaluation_and_frozen_layers_below() -> None:
    """Eval forwards are not listened to; a layer above frozen ones still has a shared tensor."""
    student, teacher = transformer(0, n_layers=1), transformer(1)
    distiller = Distiller(teacher, student, DistillConfig(), False)
    student.eval()
    with torch.no_grad():
        student(torch.randint(50, (1, 4)))
    student.requires_grad_(False)
    student.layers[0].self_attn.q_proj.requires_grad_(True)
    _, loss, added = forward(student, distiller, 0)
    (loss + added).backward()
    assert student.layers[0].self_attn.q_proj.weight.grad is not None


def test_bf16_teachers_teach_in_fp32() -> None:
    student, teacher = transformer(0), transformer(1)
    distiller = Distiller(teacher, student, DistillConfig(), True)
    assert forward(student, distiller, 0)[2].dtype == torch.float32


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = ["the quick brown fox " * 50], ["jumps over lazy dogs " * 50]
    return [train_tokenizer(t, 280, folder / f"{i}.model") for i, t in enumerate(texts)]


def test_teachers_that_do_not_fit(tokenizers: list[Tokenizer], tmp_path: Path) -> None:
    ours, other = tokenizers
    student = transformer(0, vocab_size=280)

    def load(folder: str, **options: object) -> Transformer:
        config = DistillConfig(teacher=str(tmp_path / folder), **options)  # type: ignore[arg-type]
        return load_teacher(config, student, ours.hash, 16, "cpu")

    save_model(tmp_path / "fits", transformer(1, vocab_size=280, d_model=64, d_ff=64), ours)
    save_model(tmp_path / "other", transformer(1, vocab_size=280), other)
    save_model(tmp_path / "short", transformer(1, vocab_size=280, max_seq_len=8), ours)
    assert load("fits").config.d_model == 64
    with pytest.raises(UserError, match=r"its tokenizer is not the one of the data"):
        load("other")
    with pytest.raises(UserError, match=r"its context of 8 tokens is shorter than data.seq_len"):
        load("short")
    with pytest.raises(UserError, match=r"distill.attention_layer = -3.*the nearest is -2"):
        load("fits", attention_layer=-3)
    with pytest.raises(UserError, match=r"distill.relation_heads = 5 does not.*that does is 4"):
        load("fits", relation_heads=5)
    load("fits", relation_heads=5, attention=0.0)
    with pytest.raises(UserError, match="no such model folder"):
        load("nowhere")
