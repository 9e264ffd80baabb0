"""One contender of ``bitnet bench decode``: a model, and a process that generates on request.

    ours-auto, ours-dot, ours-addsub     packed ternary layers in bitnet's Engine, by kernel
    ours-...-bf16-head, -int8-head       the same on a CPU, with the head in bf16 or int8, and keys
                                         and values in bf16
    llama.cpp, llama.cpp-fa              the same weights as GGUF, TQ2_0 with an fp16 head, without
                                         and with flash attention
    baseline-fp32, baseline-bf16         nn.Linear layers of the same shape in the same Engine
    transformers-fp32, -bf16             generate() of BitNetForCausalLM on the ternary weights
    transformers-bf16-static             the same with its static cache

Random weights are drawn from a seed on the device, matrix by matrix: ternary ones as packed codes
and a scale, others as normal numbers that are cast to their dtype at once, so that fp32 weights of
the whole model never exist. All ternary contenders have the same weights: scales are representable
in fp16, and normal numbers are rounded to values that both fp16 and bf16 can represent.
transformers holds the weights as when it loads such a checkpoint (``linear_class="autobitlinear"``,
offline): codes in the model's dtype and a scale, for a dense product of activations that were
quantized and dequantized.

A process is started with its :class:`Job` as JSON. bitnet/bench/decode.py tells it what to do,
through bitnet/bench/worker.py.
"""

import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bitnet.bench.peers import LlamaCpp, disagreement, exact_logits
from bitnet.bench.worker import serve
from bitnet.engine.decoder import CacheDtype, Decoder, HeadDtype
from bitnet.engine.engine import Engine
from bitnet.export.folder import load_model
from bitnet.export.gguf_write import save_gguf
from bitnet.linear import BitLinear, Kernel, RMSNorm, TernaryLinear, pack
from bitnet.model import ModelConfig, Transformer, as_transformer
from bitnet.modules import replace_modules
from bitnet.schema import UserError
from bitnet.training.throughput import peak_memory, reset_peak_memory
from bitnet_kernels.bench.machine import Meter, find_meter

BF16_HEAD = "ours-bf16-head"
LLAMA, LLAMA_FA = "llama.cpp", "llama.cpp-fa"
CONTENDERS = (
    "ours-auto",
    "ours-dot",
    "ours-addsub",
    BF16_HEAD,
    LLAMA,
    LLAMA_FA,
    "ours-int8-head",
    "ours-addsub-bf16-head",
    "ours-dot-bf16-head",
    "baseline-bf16",
    "transformers-bf16",
    "transformers-bf16-static",
    "baseline-fp32",
    "transformers-fp32",
)
"""The most important first: if memory is short, the last are left out."""
STATIC = "-static"
CHECKED = 16
"""Tokens of the prompt after which llama.cpp's logits are compared."""
LONGEST = 2**20
"""The context length in a GGUF file, enough for the longest case."""


class Case(NamedTuple):
    """Work to time: ``batch`` prompts of ``prompt`` random tokens, each continued greedily by
    ``new`` tokens, two or more."""

    batch: int
    prompt: int
    new: int


@dataclass(frozen=True)
class Job:
    """A contender with a model, which a process runs."""

    contender: str
    config: dict[str, Any]
    """Fields of the ternary model's resolved :class:`bitnet.model.ModelConfig`."""
    folder: str
    """Folder of the trained model; "": random weights."""
    seed: int
    device: str
    threads: int
    """CPU threads; 0: torch's choice."""
    gguf: str = ""
    """The file that llama.cpp reads; :func:`check` writes it."""

    @property
    def family(self) -> str:
        """ "ours", "baseline", "transformers" or "llama.cpp"."""
        return self.contender.partition("-")[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of embedding, head, norms, activations and everything else that is not ternary."""
        if self.family == "ours":
            return torch.bfloat16 if self.device.startswith("cuda") else torch.float32
        if self.family == LLAMA:
            return torch.float16
        return torch.bfloat16 if "-bf16" in self.contender else torch.float32

    @property
    def kernel(self) -> Kernel:
        """Kernel of packed layers."""
        kernels: tuple[Kernel, ...] = ("dot", "addsub")
        return next((one for one in kernels if one in self.contender.split("-")), "auto")

    @property
    def head(self) -> HeadDtype:
        """The head's dtype in our engine; on a CPU "auto" keeps the model's."""
        heads: tuple[HeadDtype, ...] = ("bf16", "int8")
        return next((one for one in heads if self.contender.endswith(f"-{one}-head")), "auto")

    @property
    def cache(self) -> CacheDtype:
        """The dtype of keys and values in our engine: 16 bits if the head has 16 bits or fewer, as
        in llama.cpp."""
        return "auto" if self.head == "auto" else "bf16"

    def model(self, max_seq_len: int) -> Transformer:
        """Build the model to generate from. The model of transformers is made from it."""
        config = dataclasses.replace(ModelConfig(**self.config), max_seq_len=max_seq_len)
        if self.family == "baseline":
            config = dataclasses.replace(config, linear="fp")
        device = torch.device(self.device)
        if self.folder and self.family != "baseline":
            return packed_model(self.folder, device, self.kernel).to(self.dtype)
        return random_model(config, self.seed, device, self.dtype, self.kernel)


def packed_model(folder: str, device: torch.device, kernel: Kernel) -> Transformer:
    """Load a folder's ternary model and pack it. Raises UserError if a layer is not ternary."""
    model = load_model(folder, device, kernel)
    names = model.config.matrices()
    for name, module in model.layers.named_modules():
        if name.partition(".")[2] in names and not isinstance(module, BitLinear | TernaryLinear):
            raise UserError(f"--model: {folder}: its {name} is not ternary; name a ternary model")
    return as_transformer(pack(model, kernel)).eval()


def random_model(
    config: ModelConfig, seed: int, device: torch.device, dtype: torch.dtype, kernel: Kernel
) -> Transformer:
    """A packed model with random weights, for a config with separate norms.

    Ternary codes are -1, 0 and +1 with equal probability, with a scale that keeps the variance of
    the inputs; other matrices are normal with the initial deviation of training, norms are 1.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(like: Tensor) -> nn.Parameter:
        fp32 = torch.float32  # the same numbers for any dtype
        drawn = torch.randn(like.shape, generator=generator, device=device, dtype=fp32)
        drawn = drawn.mul_(0.02).half().bfloat16()  # fp16 holds all: few digits, coarser step
        return nn.Parameter(drawn.to(dtype), requires_grad=False)

    def fill(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, BitLinear):
            shape = (module.out_features, module.in_features)
            codes = torch.randint(
                -1, 2, shape, generator=generator, device=device, dtype=torch.int8
            )
            gamma = (1.5 / shape[1]) ** 0.5  # codes' variance is 2/3
            scale = torch.tensor(gamma, device=device, dtype=torch.float16)
            return TernaryLinear.from_codes(codes, scale.float(), kernel=kernel)
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight = normal(module.weight)
        elif isinstance(module, RMSNorm):
            ones = torch.ones(module.weight.shape, device=device, dtype=dtype)
            module.weight = nn.Parameter(ones, requires_grad=False)
        return None

    with torch.device("meta"):
        model = Transformer(config)
    model = as_transformer(replace_modules(model, fill))
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def unfit_for_transformers(config: ModelConfig) -> str:
    """Why transformers' BitNet class cannot hold such a model; "" if it can."""
    wanted = {"norm_placement": "sub_norm", "granularity": "tensor", "qk_norm": False}
    for key, value in wanted.items():
        if (found := getattr(config, key)) != value:
            return f"its BitNet class has no model.{key} = {found!r}"
    return ""


def as_transformers(model: Transformer, dtype: torch.dtype) -> Any:
    """``BitNetForCausalLM`` with the weights of a packed model, on its device, as if loaded from an
    offline ``autobitlinear`` checkpoint."""
    from transformers import BitNetConfig, BitNetForCausalLM
    from transformers.integrations.bitnet import replace_with_bitnet_linear
    from transformers.models.bitnet.modeling_bitnet import BitNetRotaryEmbedding
    from transformers.utils.quantization_config import BitNetQuantConfig

    config = model.config
    settings: dict[str, Any] = {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "hidden_act": config.activation,
        "tie_word_embeddings": config.tie_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "dtype": dtype,
        "attn_implementation": "sdpa",
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    theirs = BitNetConfig(**settings)
    quantized = BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="offline")
    with torch.device("meta"):
        made: Any = BitNetForCausalLM(theirs)
        made = replace_with_bitnet_linear(made, ["lm_head"], quantized)
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        place = name if name == "lm_head" else f"model.{name}"
        if isinstance(module, TernaryLinear):
            tensors[f"{place}.weight"] = module.codes().to(dtype)
            tensors[f"{place}.weight_scale"] = module.scale.to(dtype).reshape(1)
        elif isinstance(module, nn.Linear | nn.Embedding | RMSNorm):
            tensors[f"{place}.weight"] = module.weight.detach().to(dtype)
    made.load_state_dict(tensors, assign=True)
    made.tie_weights()
    with torch.device(model.embed_tokens.weight.device):  # its frequencies are no state
        made.model.rotary_emb = BitNetRotaryEmbedding(theirs)
    return made.eval().requires_grad_(False)


class Turn(NamedTuple):
    """One generation."""

    first_s: float
    """Seconds until every row has its first token."""
    rest_s: float
    """Seconds from the first to the last token: batch * (new - 1) tokens."""
    rest_joules: float | None
    """Energy of the whole board over the same time; None if it cannot be measured."""
    tokens: list[list[int]]


class Clock:
    """Reads time and the board's energy counter when tokens arrive."""

    def __init__(self, meter: Meter | None) -> None:
        self._meter, self.start = meter, time.perf_counter()
        self.first = self.last = (0.0, 0.0)

    def read(self) -> tuple[float, float]:
        """Seconds and joules now."""
        joules = self._meter.millijoules() / 1e3 if self._meter else 0.0
        return time.perf_counter(), joules

    def turn(self, tokens: list[list[int]]) -> Turn:
        """The measured turn."""
        joules = self.last[1] - self.first[1] if self._meter else None
        return Turn(self.first[0] - self.start, self.last[0] - self.first[0], joules, tokens)


class Runner(Protocol):
    """A contender with a model, ready to generate."""

    def generate(self, prompts: list[list[int]], new: int) -> Turn:
        """Continue each prompt greedily by ``new`` tokens."""
        ...

    def memory(self) -> dict[str, int]:
        """Bytes held between generations in ``weights``, ``head``, ``embedding``, ``cache``."""
        ...


class EngineRunner:
    """Our engine, with a cache as large as the case needs."""

    def __init__(self, job: Job, case: Case, meter: Meter | None) -> None:
        model = job.model(case.prompt + case.new)
        self.engine = Engine(
            model,
            max_batch=case.batch,
            max_len=case.prompt + case.new,
            cache_dtype=job.cache,
            head=job.head,
            kernel=job.kernel,
        )
        self._meter = meter

    def generate(self, prompts: list[list[int]], new: int) -> Turn:
        """As the protocol; tokens are timed when the engine passes them to ``on_token``."""
        clock, count = Clock(self._meter), 0

        def on_token(row: int, token: int) -> None:
            nonlocal count
            count += 1
            if count == len(prompts):
                clock.first = clock.read()
            elif count == len(prompts) * new:
                clock.last = clock.read()

        return clock.turn(self.engine.generate(prompts, new, on_token=on_token))

    def memory(self) -> dict[str, int]:
        """As the protocol; counted by the decoder."""
        return self.engine.decoder.memory()


class TransformersRunner:
    """transformers' ``generate``: greedy, no end token, SDPA attention, with a growing or a static
    cache. It may compile before anything is timed."""

    def __init__(self, job: Job, case: Case, meter: Meter | None) -> None:
        from transformers import GenerationConfig

        self.model = as_transformers(job.model(case.prompt + case.new), job.dtype)
        self.settings: Any = GenerationConfig(
            do_sample=False,
            max_new_tokens=case.new,
            min_new_tokens=case.new,
            cache_implementation="static" if job.contender.endswith(STATIC) else None,
        )
        self._meter = meter

    def generate(self, prompts: list[list[int]], new: int) -> Turn:
        """As the protocol; tokens are timed by a streamer."""
        clock, steps = Clock(self._meter), 0

        class Stamps:
            def put(self, value: Tensor) -> None:
                nonlocal steps  # 0: the prompt itself
                if steps == 1:
                    clock.first = clock.read()
                elif steps == new:
                    clock.last = clock.read()
                steps += 1

            def end(self) -> None:
                pass

        ids = torch.tensor(prompts, device=self.model.device, dtype=torch.int64)
        whole = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=self.settings,
            max_new_tokens=new,
            min_new_tokens=new,
            streamer=Stamps(),
        )
        return clock.turn(whole[:, ids.shape[1] :].tolist())

    def memory(self) -> dict[str, int]:
        """As the protocol; the cache exists only during a generation."""
        return transformers_memory(self.model)


class LlamaRunner:
    """llama.cpp, which chooses greedily from the logits it returns."""

    def __init__(self, job: Job, case: Case, meter: Meter | None) -> None:
        self._config, self._prompt = ModelConfig(**job.config), case.prompt
        self._llama = LlamaCpp(
            Path(job.gguf),
            self._config,
            case.batch,
            case.prompt + case.new,
            torch.get_num_threads(),
            flash=job.contender == LLAMA_FA,
        )

    def generate(self, prompts: list[list[int]], new: int) -> Turn:
        """As the protocol."""
        clock, tokens = Clock(None), list[list[int]]()
        logits = self._llama.prefill(prompts)
        for step in range(new):
            if step:
                logits = self._llama.step(tokens[-1], self._prompt + step - 1)
            tokens.append(logits.argmax(-1).tolist())
            clock.last = clock.read()
            if not step:
                clock.first = clock.last
        return clock.turn([list(row) for row in zip(*tokens, strict=True)])

    def memory(self) -> dict[str, int]:
        """As the protocol; the tied head counts as embedding. The file is mapped, so its bytes are
        resident once."""
        embedding = 2 * self._config.vocab_size * self._config.d_model
        weights = self._llama.weight_bytes() - embedding
        cache = self._llama.cache_bytes
        return {"weights": weights, "head": 0, "embedding": embedding, "cache": cache}


def transformers_memory(model: Any) -> dict[str, int]:
    """Bytes of a transformers model's tensors by kind; a tied head counts as embedding."""
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    state = model.state_dict(keep_vars=True).values()
    total = sum({tensor.data_ptr(): tensor.nbytes for tensor in state}.values())
    own_head = 0 if head.data_ptr() == embedding.data_ptr() else head.nbytes
    weights = total - embedding.nbytes - own_head
    return {"weights": weights, "head": own_head, "embedding": embedding.nbytes, "cache": 0}


def make_runner(job: Job, case: Case, meter: Meter | None) -> Runner:
    """A contender with its model, for this case."""
    makers: dict[str, Callable[[Job, Case, Meter | None], Runner]] = {
        "transformers": TransformersRunner,
        LLAMA: LlamaRunner,
    }
    return makers.get(job.family, EngineRunner)(job, case, meter)


def check(job: Job) -> str:
    """Write the job's model as GGUF and run llama.cpp on a short prompt, with and without flash
    attention. Returns why it cannot be computing our model; "" if it does."""
    (prompt,) = prompts_of(Case(1, CHECKED, 2), job.config["vocab_size"], job.seed)
    model = dataclasses.replace(job, contender="ours-auto").model(LONGEST)
    save_gguf(model, None, job.gguf)
    decoder = Decoder(model, 1, CHECKED, head="float")
    decoder.prefill(torch.tensor([prompt], dtype=torch.int64, device="cpu"), [CHECKED])
    exact = exact_logits(model, prompt)
    for flash in (False, True):
        threads = torch.get_num_threads()
        llama = LlamaCpp(Path(job.gguf), model.config, 1, CHECKED, threads, flash=flash)
        theirs = torch.from_numpy(llama.prefill([prompt])[0].copy())
        if why := disagreement(decoder.logits[0], theirs, exact):
            return why
    return ""


def prompts_of(case: Case, vocab_size: int, seed: int) -> list[list[int]]:
    """Random tokens, the same for every contender."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(
        vocab_size, (case.batch, case.prompt), generator=draw, device="cpu"
    ).tolist()


class Session:
    """What a process remembers between two requests."""

    def __init__(self, job: Job) -> None:
        self.job, self.device = job, torch.device(job.device)
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # streams and graphs use the current device
        self.meter, _ = find_meter(self.device)
        if self.meter is not None and not _counts(self.meter):
            self.meter = None
        self.runner: Runner | None = None
        self.case, self.is_reset = Case(1, 1, 2), False

    def prepare(self, case: Case) -> dict[str, int]:
        """Make the model for a case, generate once, which compiles and captures what is needed, and
        reset peak memory. Returns the bytes that the model holds."""
        self.runner = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.case, self.runner = case, make_runner(self.job, case, self.meter)
        gc.collect()  # the model that an engine was made from
        self.turn(0, min(case.new, 4))
        self.is_reset = reset_peak_memory(self.device)
        return self.runner.memory()

    def turn(self, number: int, new: int) -> Turn:
        """Generate from prompts that differ for each ``number``, because an engine remembers."""
        assert self.runner is not None
        seed = self.job.seed * 1_000_003 + number
        prompts = prompts_of(self.case, self.job.config["vocab_size"], seed)
        return self.runner.generate(prompts, new)

    def joules(self, seconds: float) -> float | None:
        """Joules per token while decoding, over generations that decode for that long in total: the
        board's counter is updated every few tens of milliseconds."""
        spent = energy = 0.0
        tokens = turns = 0
        while spent < seconds:
            turns += 1
            turn = self.turn(10_000 + turns, self.case.new)
            if turn.rest_joules is None:
                return None
            spent, energy = spent + turn.rest_s, energy + turn.rest_joules
            tokens += self.case.batch * (self.case.new - 1)
        return energy / tokens

    def peak(self) -> int | None:
        """Peak bytes since :meth:`prepare`; None if the system cannot reset the peak."""
        return peak_memory(self.device) if self.is_reset else None


def _counts(meter: Meter) -> bool:
    try:
        meter.millijoules()
    except Exception:  # a GPU without a counter: NVMLError, of a package that may be absent
        return False
    return True


def main(job: Job) -> None:
    """A worker, until its parent closes it."""

    def make() -> dict[str, Callable[..., Any]]:
        if job.threads:
            torch.set_num_threads(job.threads)
        base = peak_memory(torch.device("cpu")) if reset_peak_memory(torch.device("cpu")) else None
        session = Session(job)
        return {
            "prepare": lambda *case: session.prepare(Case(*case)),
            "turn": lambda number: session.turn(number, session.case.new),
            "joules": session.joules,
            "peak": session.peak,
            "check": lambda: check(job),
            "base": lambda: base,
        }

    serve(make)


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])))
