"""Names and maths against Hugging Face's BitNet, the model class itself.

Slow, and needs the `hf` extra: pip install -e ".[hf,dev]"; pytest -m slow tests/export
"""

import pytest
import torch

from bitnet.model import ModelConfig, Transformer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers, at import
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["relu2", "silu"])
def test_same_logits_as_hugging_face(tied: bool, activation: str) -> None:
    from transformers import BitNetConfig, BitNetForCausalLM

    config = ModelConfig(
        linear="fp",  # without a quantization_config theirs are plain linears
        d_model=96,
        n_layers=3,
        n_heads=6,
        n_kv_heads=2,
        d_ff=160,
        vocab_size=300,
        max_seq_len=64,
        tie_embeddings=tied,
        activation=activation,  # type: ignore[arg-type]
        rope_theta=500_000.0,
    )
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    theirs = BitNetForCausalLM(
        BitNetConfig(
            hidden_size=96,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            vocab_size=300,
            max_position_embeddings=64,
            hidden_act=activation,
            tie_word_embeddings=tied,
            rms_norm_eps=1e-5,
            rope_theta=500_000.0,
        )
    ).eval()
    renamed = {
        name if name.startswith("lm_head.") else f"model.{name}": tensor
        for name, tensor in model.state_dict().items()
    }
    missing, unexpected = theirs.load_state_dict(renamed, strict=False)
    assert not missing
    assert not unexpected
    tokens = torch.randint(0, 300, (2, 64))
    with torch.no_grad():
        # both fp32, products in another order: some 2^-24 * sqrt(160) a layer
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
