"""LoRA by peft on a packed ternary base, which takes 2 bits per weight.

    pip install -e ".[examples]"
    python examples/lora.py

A packed layer has nothing to train, but gradients flow through it to its input, as through a
BitLinear. So the adapters of all layers learn. peft can adapt an unknown class of layers if you
name the peft layer that stands for it.
"""

import warnings

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from transformers import LlamaConfig, LlamaForCausalLM

from bitnet import TernaryLinear, pack, replace_linear

TEXT = b"Ternary weights are -1, 0 or +1, so a product adds, subtracts or skips. "


def main(steps: int = 40) -> list[float]:
    """Overfit one sentence by adapters alone; returns the loss of each step in nats per byte."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    base = LlamaForCausalLM(config)  # in place of a trained model
    pack(replace_linear(base, skip=("lm_head",)))
    stored = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    tokens = torch.tensor([list(TEXT)])
    with torch.no_grad():
        before = base(input_ids=tokens).logits

    lora = LoraConfig(
        r=8, lora_alpha=32, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]
    )
    lora._register_custom_module({TernaryLinear: LoraLinear})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # peft's, of TernaryLinear
        model = get_peft_model(base, lora)
    model.print_trainable_parameters()

    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        assert all(adapter.grad is not None for adapter in adapters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0] - 1.0, "the adapters have not learned"

    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=tokens).logits, before)
    restored = model.unload().state_dict()
    assert all(torch.equal(restored[name], tensor) for name, tensor in stored.items())
    print("without the adapters, the base is what it was, bit for bit")
    return losses


if __name__ == "__main__":
    main()
