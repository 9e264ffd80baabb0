"""Fine-tune a 1.58-bit checkpoint of Hugging Face's, and get 1.58 bits back."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitnet.export.folder import load
from bitnet.export.hf import load_hf
from bitnet.export.verification import ternary_matrices
from bitnet.generate import encode_prompt, generate
from tests.helpers import hf_export
from tests.helpers.hf_folder import write
from tests.helpers.training_script import Run

Bitnet = Callable[..., tuple[int, str, str]]
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@pytest.mark.filterwarnings("ignore")  # of transformers, about itself
def test_bf16_master_weights_are_trained_and_go_out_again(
    run: Run, bitnet: Bitnet, tmp_path: Path
) -> None:
    theirs = write(hf_export.bitnet(**SHAPE), tmp_path / "bf16")
    hf_export.quantized(theirs, linear_class="autobitlinear", quantization_mode="online")
    start = tmp_path / "start"
    code, out, err = bitnet("convert", theirs, "--out", start)
    assert code == 0, err
    assert out.endswith("parameters, ternary\n")
    new = (f"data.path={tmp_path}/data", "data.vocab_size=300", "run.name=tuned")
    rows = run(*new, f"train.init_from={start}", "train.steps=12", "optim.lr=1e-2")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.3
    tuned, tokenizer = load(tmp_path / "tuned" / "model")
    before = {name: codes for name, codes, _ in ternary_matrices(load_hf(theirs)[0])}
    for name, codes, _ in ternary_matrices(tuned):
        assert not torch.equal(codes, before[name]), "training moved no code"
    prompt = encode_prompt(tokenizer, "the quick ")
    (ours,) = generate(tuned, [prompt], 20)
    for kind in ("online", "packed"):
        out_dir = tmp_path / kind
        code, _, err = bitnet(
            "export", tmp_path / "tuned", "--to", "hf", "--kind", kind, "--out", out_dir
        )
        assert code == 0, err
        with torch.compiler.set_stance("force_eager"):
            again = hf_export.load_theirs(out_dir)
            assert hf_export.greedy(again, prompt, 20) == ours
