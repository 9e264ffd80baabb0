"""BitLinear in a Hugging Face model, built from a config: no download, no tokenizer.

    pip install -e ".[hf]"
    python examples/huggingface.py

The same lines work on a pretrained model, but a trained model that is made ternary needs
fine-tuning; docs/qat.md says what to expect.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bitnet import coverage, pack, replace_linear

TEXT = b"Ternary weights are -1, 0 or +1, so a product adds, subtracts or skips. "


def main(steps: int) -> str:
    """Overfit one sentence, pack, and continue the sentence's beginning; returns the text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    replace_linear(model, skip=("lm_head",))
    print(coverage(model))

    tokens = torch.tensor([list(TEXT)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")

    pack(model.eval())  # 2 bits per weight; generate works as before
    start = tokens[:, :16]
    new = model.generate(start, max_new_tokens=len(TEXT) - 16, do_sample=False, pad_token_id=0)
    text = bytes(new[0].tolist()).decode("latin-1")
    print(text)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
